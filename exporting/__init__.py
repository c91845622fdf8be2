"""Bundles from pipelines: engines of a plan's rows, the sampling loop as data, all of it in one folder.

Engines are variants of the analysed model through ``torch.export``: no passes of its own. Imports the pipeline and what
lies below; only the command line imports it. What runs bundles is :mod:`difa_compile.bundle`.
"""
