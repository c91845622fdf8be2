"""Engines from plans: the variants of an analysed model, exported.

A bucket's rewritten graph goes through ``torch.export`` and becomes one engine (ONNX, TensorRT, AOTInductor); a bundle
is a folder with the engines of all buckets, one weight file, the plan and a manifest (planned). It has no passes of
its own.
"""
