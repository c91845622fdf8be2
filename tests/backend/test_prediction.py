"""Predicted seconds of a model's sites, and the windows that they leave out."""

import torch

from difa_compile.decision import FULL
from difa_compile.plan.cost import Setting, site_seconds
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
