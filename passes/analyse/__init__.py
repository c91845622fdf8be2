"""Analysis: what a graph shows of itself, without changing what it computes.

Where the attention sites are, which grid their tokens are, which dimension is the batch. What is found is a value, or
noted on nodes; where nothing is, there is a reason.
"""
