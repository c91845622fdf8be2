"""This machine: how long each kind of work takes on it.

``tune`` measures and fits, ``profile`` keeps, finds and predicts. Imports ops and files; knows neither plans nor
graphs.
"""
