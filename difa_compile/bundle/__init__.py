"""Bundles: folders of engines with one file of weights, and what runs them; no diffusers, no compiler."""
