"""The backend "difa" of ``torch.compile``: from Dynamo's graph to a function that follows a plan.

``entry`` is what ``torch.compile`` calls, ``capture`` compiles and runs an analysed model row by row, ``run`` holds the
step, the branch and the caches of one pass through the schedule. Imports passes, plans and the machine's profile; knows
no pipeline.
"""
