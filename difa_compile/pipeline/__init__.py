"""diffusers pipelines: finding the transformer, attaching a plan, following the schedule, taking the plan off.

``apply`` is the way in, ``wiring`` what is attached where, ``schedule_follower`` what happens when a scheduler steps.
Imports the backend and what lies below; diffusers itself is only imported to load a pipeline.
"""
