"""Passes over the captured graph of a model: prepare it, find out what it shows, rewrite its sites by their roles.

``order`` says what is done in what order, and is the way in: ``analyse`` gives an analysed model, ``rewrite`` a
variant. One pass per file, which begins with the graph before and after, or with what it finds. Imports plans, ops and
ground words; emits ops and never a kernel; knows no compiler, no pipeline and no model class.
"""
