"""Predicted seconds of a model's sites, and the windows that they leave out."""

from dataclasses import replace

import pytest
import torch

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.plan.cost import Setting, full_flops, site_seconds
from difa_compile.plan.data import blocks_of
from difa_compile.plan.schedule import COVERED_ROLE, Role
from tests.support.profiles import made_up
from tests.support.two_attentions import RESIDUAL, SLOW, WINDOW, D, capture, outcomes


def test_without_a_profile_nothing_changes():
    found = capture([FULL, WINDOW])
    assert found.prediction.profile is None
    assert outcomes(found)[str(WINDOW)] == ("rewritten", "")


def test_a_dtype_that_was_not_measured_changes_nothing(profile_at):
    profile_at(**SLOW, dtype="bfloat16")
    found = capture([FULL, WINDOW])
    assert found.prediction.profile is not None
    assert outcomes(found)[str(WINDOW)] == ("rewritten", "")


def test_a_residual_that_too_few_steps_read_does_not_pay(profile_at):
    """The window takes about 0.7 of full attention: with the residual's own window one reader loses, four win."""
    site = capture([FULL]).model.sites[0].info
    probe = made_up(full=1.0, window=1.0)
    setting = Setting(2, torch.float32, torch.device("cpu"))
    ratio = site_seconds(WINDOW, site, setting, probe) / site_seconds(FULL, site, setting, probe)
    profile_at(full=1.0, window=0.7 / ratio)
    one = capture([FULL, RESIDUAL])
    assert outcomes(one)[str(RESIDUAL)][0] == "skipped"
    assert "s (with its residual) against" in outcomes(one)[str(RESIDUAL)][1]
    assert one.prediction.why_slower(0, RESIDUAL) is None
    assert outcomes(capture([FULL, *[RESIDUAL] * 4]))[str(RESIDUAL)][0] == "rewritten"


def test_the_profile_is_read_once_for_a_capture(profile_at):
    path = profile_at(**SLOW)
    found = capture([FULL, WINDOW])
    path.unlink()
    assert found.verdicts.effective(0, WINDOW) == FULL
    assert found.prediction.seconds(0, D("window(band:3)")) > found.prediction.seconds(0, FULL)


def test_more_tokens_than_were_measured_are_said(profile_at):
    profile_at(**SLOW, tokens=8)
    assert (
        "on this machine, extrapolated from fewer tokens; allow_slower"
        in outcomes(capture([FULL, WINDOW]))[str(WINDOW)][1]
    )


def test_a_row_takes_what_its_sites_and_the_rest_of_its_blocks_take(profile_at):
    """Not linear layers of attention twice; nothing of what a block covers that is left out."""
    profile_at(elements=1e-3)
    model = capture([FULL]).model
    found = capture([FULL]).prediction
    count = len(model.sites)
    blocks = [index for index, unit in enumerate(model.units) if unit.info.is_block]
    assert blocks
    full = found.row_seconds([Role(FULL)] * len(model.units))
    sites = sum(found.seconds(index, FULL) for index in range(count))
    single = [index for index in blocks if not model.units[index].info.blocks]
    rest = [
        model.units[block].info.flops
        - sum(full_flops(site.info).total for site in model.sites if site.info.path.startswith(model.units[block].path))
        for block in single
    ]
    batch = model.sites[0].query_shape[0]
    assert full - sites == pytest.approx(sum(rest) / 2 * batch * 1e-9, rel=1e-3)  # 1e-9 s a product
    row = [Role(FULL)] * len(model.units)
    keeping = [replace(row[0], emit_output=True), *row[1:]]
    assert found.row_seconds(keeping) > full
    held = blocks_of([unit.info for unit in model.units])
    block = single[0]
    left = [Role(REUSE) if i == block else COVERED_ROLE if held[i] == block else each for i, each in enumerate(row)]
    inside = sum(found.seconds(i, FULL) for i in range(count) if held[i] == block)
    assert full - found.row_seconds(left) == pytest.approx(inside + rest[0] / 2 * batch * 1e-9, rel=1e-3)
    forecast = [Role(Decision.parse("forecast:1")) if i == block else each for i, each in enumerate(left)]
    assert found.row_seconds(forecast) > found.row_seconds(left)


def test_no_row_is_predicted_without_a_profile_that_can_tell(profile_at):
    row = [Role(FULL)] * len(capture([FULL]).model.units)
    assert capture([FULL]).prediction.row_seconds(row) is None
    profile_at(dtype="bfloat16")
    assert capture([FULL]).prediction.row_seconds(row) is None
