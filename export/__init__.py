"""Engines from plans: the variants of an analysed model, exported (planned).

A bucket's rewritten graph goes through ``torch.export`` and becomes one engine (ONNX, TensorRT, AOTInductor); a bundle
is a folder with the engines of all buckets, one weight file, the plan and a manifest. Imports passes and what lies
below, and has no passes of its own; only the command line imports it.
"""
