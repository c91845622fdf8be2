"""Calibration: a plan found by measuring, in one pass of a pipeline through its schedule.

``calibrate`` is the way in, ``search`` decides site by site, ``state`` keeps what is decided on disk. Imports pipeline
and what lies below.
"""
