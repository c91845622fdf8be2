"""The survey on a representative dozen of classes, and that its committed result leaves nothing unexplained."""

import json

import pytest
import torch

from benchmarks.model_survey import BLOCKS, DECISIONS, survey
from benchmarks.tables import RESULTS
from benchmarks.zoo.registry import build, registered

pytest.importorskip("diffusers")

ROUNDING = 3e-6
"""Relative to the largest output: float32 rounding of another attention kernel, or of half a batch."""

DOZEN = {
    "AuraFlowTransformer2DModel": ("cat of registers, text and image", "15+4x6"),
    "CogVideoXTransformer3DModel": ("text and video projected together, written in place", "7+2x4x6"),
    "DiTTransformer2DModel": ("one stream", "6x6"),
    "FluxTransformer2DModel": ("packed tokens with position ids, parallel blocks", "7+4x6"),
    "HunyuanVideoTransformer3DModel": ("image first, a mask, text refiner", ""),
    "LTXVideoTransformer3DModel": ("packed tokens, the grid in Python ints", "2x4x6"),
    "LatteTransformer3DModel": ("spatial and temporal attention", "4x6, 3"),
    "PRXTransformer2DModel": ("image queries over text and image keys", "7+4x6"),
    "PixArtTransformer2DModel": ("cross-attention beside", "4x6"),
    "QwenImageTransformer2DModel": ("joint, complex rotary embedding, shapes in Python ints", "7+4x6"),
    "SD3Transformer2DModel": ("joint, image first, and the image alone", "4x6+7, 4x6"),
    "WanTransformer3DModel": ("video, rotary embedding written in place", "3x4x6"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DOZEN)
def test_the_dozen(name):
    row = survey(name)
    assert row["captured"]
    assert row["graphs"] == 1
    _, layout = DOZEN[name]
    assert not layout or row["layout"] == layout
    for column in DECISIONS:
        value = row[column]
        assert value == "exact" or value <= ROUNDING, (column, value, row["reason"])
    assert row["reuse"] == "exact"
    held, every = row["blocks"].split(" of ")
    assert held == every
    assert row["block_reuse"] == "exact"
    assert row["span_reuse"] == ("exact" if name != "LatteTransformer3DModel" else None)


def test_builders_are_deterministic_and_small():
    one, two = build("PixArtTransformer2DModel"), build("PixArtTransformer2DModel")
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert torch.equal(one.inputs[one.latent], two.inputs[two.latent])
    assert sum(parameter.numel() for parameter in one.model.parameters()) < 2e6
    assert not one.model.training


def test_the_committed_survey_leaves_nothing_unexplained():
    rows = json.loads((RESULTS / "model_survey.json").read_text())["rows"]
    assert {row["class"] for row in rows} >= set(registered())
    for row in rows:
        values = [row.get(column) for column in (*DECISIONS, *BLOCKS)]
        assert row.get("reason") or (row["captured"] and None not in values), row["class"]
        for column in BLOCKS:
            assert not row.get("sites") or row[column] is not None or f"{column}: " in row["reason"], row["class"]
        for value in values:
            allowed = 1e-2 if "bfloat16" in row.get("dtype", "") else 1e-5
            assert value in (None, "exact") or value <= allowed, row["class"]
