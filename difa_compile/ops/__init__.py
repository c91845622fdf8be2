"""The ops that passes put into graphs, and what they mean.

``local_attention`` and ``sized`` are the ops, ``reference`` the specification in plain PyTorch, ``gradient`` the
backward, ``operands`` the checks of what is handed over, ``pairs`` counts, ``kernels`` chooses who serves a call.
Imports ground words alone; kernels (:mod:`difa_compile.plugins`) are named, not imported.
"""
