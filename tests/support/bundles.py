"""A tiny pipeline with plans, exported: what tests of bundles look at."""

import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.export.write import export_bundle
from difa_compile.pipeline.rules import plan_from_rule
from tests.support.tiny_pipelines import tiny_pipeline

LAYERS, STEPS = 2, 4
INPUTS = {"class_labels": [1], "guidance_scale": 3.0}
AGREE = 2e-4
"""Of the largest value: at first a tiny model's rounding is divided by the little that is left of the image."""


def pipeline():
    return tiny_pipeline(layers=LAYERS)


def plan(pipe, later=REUSE):
    """Two steps in full, then what ``later`` says."""
    return plan_from_rule(pipe, steps=STEPS, rule=lambda step, site: FULL if step < 2 else later)


@functools.cache
def kept():
    """A bundle that was made once for all tests of a process; it is read, never changed."""
    pytest.importorskip("onnxruntime")
    folder = Path(tempfile.mkdtemp(prefix="difa-test-")) / "bundle"
    torch._dynamo.reset()
    pipe = pipeline()
    export_bundle(pipe, {"quick": plan(pipe)}, folder, inputs=INPUTS, steps=[STEPS], most_images=2)
    return folder


def copy(folder):
    """A copy of that bundle in a folder, to be changed."""
    return Path(shutil.copytree(kept(), folder / "bundle"))


FORECAST = Decision.parse("forecast:1")
