"""Plans: what every site does at every step, apart from any graph or tensor.

``plan`` is a plan and its forms on other schedules and sizes, ``data`` its parts, ``schedule`` works out roles and
buckets, ``cost`` counts and predicts, ``json_form`` and ``text`` are a plan as a file and for people. Imports machine,
ops and files.
"""
