"""Engines from plans: the variants of a compiled model, exported.

A bucket's rewritten graph goes through ``torch.export`` and becomes one engine (ONNX, TensorRT, AOTInductor); a bundle
is a folder with the engines of all buckets, one weight file, the plan and a manifest. Nothing in the package imports
this one: it stands on :mod:`difa_compile.plan.plan` and :mod:`difa_compile.passes`, and has no passes of its own.
"""
