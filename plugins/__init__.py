"""Kernels that serve the ops of :mod:`difa_compile.ops`, one file or folder each: ``cpu/`` (C++), ``triton/`` (CUDA).

A kernel is loaded when a call first asks for one, so that a machine without its toolchain can import everything else.
It answers ``why_not(call)``: None if it can serve, else the reason, which is told if no kernel can. Imports ops, files
and ground words.
"""
