"""Tiny models with random weights, one per transformer class of diffusers: what the survey runs."""
