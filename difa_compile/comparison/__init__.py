"""Comparison: a pipeline with and without its plan, in images and in time.

``compare`` samples and times both, ``metrics`` measures images against each other. Imports pipeline and what lies
below.
"""
