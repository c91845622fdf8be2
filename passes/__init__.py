"""Passes over the captured graph of a model: find the attention sites, then rewrite them by their roles.

One pass per file, named after what it does; the module docstring shows the graph before and after and what is left
untouched. A rewriting pass is a function ``(variant, context) -> None`` that acts on the sites whose role concerns it.
Their order is one visible tuple, ``PASSES`` in :mod:`difa_compile.passes.order`, with the reason for it.
"""
