"""Rewriting: what a role makes of a site. One pass per file, which shows the graph before and after.

Passes here work on a variant, a copy of a graph; they are put in order in :mod:`difa_compile.passes.order`.
"""
