"""Preparation: from what Dynamo hands over to a graph of plain numbers in which all attention has one form.

Passes here change a graph's form, never what it computes. Each begins with what it is given and what it leaves.
"""
