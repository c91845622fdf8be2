"""Kernels behind the ops of :mod:`difa_compile.ops.local_attention`.

One folder per place a kernel runs in: ``cpu/`` (C++), ``triton/`` (CUDA), ``tensorrt/`` (plugin), ``ort/`` (ONNX
Runtime). A kernel registers itself as an implementation of an op and is imported when it is first wanted, so that a
machine without its toolchain can import everything else. It answers ``why_not(site) -> str | None``: None if it can
serve the site, else the reason, which ends in that site's record. Passes never import plugins: a pass emits an op, and
which kernel serves it is the op's business.
"""
