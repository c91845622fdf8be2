"""Decisions that are predicted slower than full attention: left out of plans and calibrations unless asked for."""

import pytest
import torch

from difa_compile.backend.entry import eager
from difa_compile.calibration.calibrate import calibrate
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import DecisionError, ProfileError, SiteSkippedError
from difa_compile.pipeline.apply import apply, remove
from difa_compile.plan.cost import Setting, site_seconds, without_window
from difa_compile.plan.schedule import assign_roles
from tests.support.captures import capture_of
from tests.support.profiles import made_up
from tests.support.tiny_models import captured_plain, plain_plan
from tests.support.tiny_pipelines import sample, tiny_pipeline

D = Decision.parse
WINDOW = D("window(band:2)")
RESIDUAL = D("window(band:2)+residual")
SHARED = D("window(band:2)+residual+cfg")
SLOW = {"full": 1.0, "window": 10.0}


@pytest.fixture
def pipe(tmp_path, monkeypatch):
    """A tiny pipeline; states of calibrations go to a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tiny_pipeline()


def quick(pipe, **settings):
    """Calibrate with the rewritten graphs run eagerly, without progress bar."""
    given = {"class_labels": [1, 2], "generator": torch.Generator().manual_seed(3)}
    return calibrate(pipe, given, **{"steps": 3, "progress": False, "inner": "eager", **settings})


def capture(rows, **options):
    """A :class:`Capture` of two plain attentions with a plan, run eagerly."""
    _, _, module, values = captured_plain()
    plan = plain_plan(rows, conditional_half=0)
    return capture_of(module, values, eager, plan=plan, conditional_half=0, **options)


def outcomes(found):
    return {record.decision: (record.outcome, record.reason) for record in found.verdicts.records}


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_slower_window_is_left_full_with_both_figures_on_record(profile_at):
    profile_at(**SLOW)
    found = capture([FULL, WINDOW, REUSE])
    outcome, reason = outcomes(found)[str(WINDOW)]
    assert outcome == "skipped"
    window, full = (found.prediction.seconds(0, decision) for decision in (WINDOW, FULL))
    assert f"predicted slower than full: {window:.3g} s against {full:.3g} s on this machine" in reason
    assert reason.endswith("allow_slower=True takes it anyway")
    assert found.verdicts.effective(0, WINDOW) == FULL
    assert found.verdicts.effective(0, REUSE) == REUSE


def test_a_faster_window_is_carried_out(profile_at):
    profile_at(full=1.0, window=0.01)
    found = capture([FULL, WINDOW])
    assert outcomes(found)[str(WINDOW)] == ("rewritten", "")
    assert found.verdicts.effective(0, WINDOW) == WINDOW


def test_asked_for_it_is_carried_out(profile_at):
    profile_at(**SLOW)
    found = capture([FULL, WINDOW], allow_slower=True)
    assert outcomes(found)[str(WINDOW)] == ("rewritten", "")
    assert found.verdicts.effective(0, WINDOW) == WINDOW


def test_without_a_profile_nothing_changes():
    found = capture([FULL, WINDOW])
    assert found.prediction.profile is None
    assert outcomes(found)[str(WINDOW)] == ("rewritten", "")


def test_a_dtype_that_was_not_measured_changes_nothing(profile_at):
    profile_at(**SLOW, dtype="bfloat16")
    found = capture([FULL, WINDOW])
    assert found.prediction.profile is not None
    assert outcomes(found)[str(WINDOW)] == ("rewritten", "")


def test_a_strict_plan_minds_what_cannot_be_done_and_not_what_is_slower(profile_at):
    profile_at(**SLOW)
    assert outcomes(capture([FULL, WINDOW], strict=True))[str(WINDOW)][0] == "skipped"
    _, _, module, values = captured_plain()
    with pytest.raises(SiteSkippedError, match="2 such decisions in all"):
        capture_of(module, values, eager, plan=plain_plan([D("full+cfg")]), strict=True)


def test_halves_stay_shared_where_a_slower_window_is_left_out(profile_at):
    profile_at(**SLOW)
    found = capture([FULL, SHARED])
    assert outcomes(found)[str(SHARED)][0] == "skipped"
    assert found.verdicts.effective(0, SHARED) == D("full+cfg")


def test_the_step_before_takes_no_residual_for_a_window_that_is_left_out(profile_at):
    profile_at(**SLOW)
    rows = [FULL, RESIDUAL, REUSE, SHARED, RESIDUAL]
    found = capture(rows)
    carried = [[found.verdicts.effective(index, one) for index in (0, 1)] for one in rows]
    roles = assign_roles(carried)
    assert [str(row[0]) for row in roles] == ["full", "full >output", "reuse", "full+cfg", "full"]


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
    assert one.why_slower(0, RESIDUAL) is None
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


def test_an_applied_plan_samples_in_full_what_is_slower(profile_at, pipe):
    plan = quick(pipe, candidates=["window"], window="band:2", threshold=10)
    assert {str(decision) for row in plan.decisions[1:] for decision in row} == {"window(band:2)"}
    whole = sample(pipe, steps=3)
    profile_at(**SLOW)
    found = {}
    for allowed in (False, True):
        applied = apply(pipe, plan, inner="eager", allow_slower=allowed)
        found[allowed] = sample(pipe, steps=3)
        assert {record.outcome for record in applied.records} == {"full", "rewritten" if allowed else "skipped"}
        remove(pipe)
    assert (found[False] == whole).all()
    assert not (found[True] == whole).all()


# --- calibration -----------------------------------------------------------------------------------------------------


def tried(plan):
    """The candidates of the last step and site, in the order tried, with the reasons of those that were not."""
    return {str(trial.decision): trial.reason for trial in plan.rows[-1][-1].trials}


NEVER = 1e-9
"""A threshold that admits nothing, so that every candidate is tried."""


def test_candidates_are_weighed_by_predicted_time(profile_at, pipe):
    names = ["full+cfg", "window+residual", "window+residual+cfg", "reuse"]
    profile_at(full=1.0, window=0.01)
    plan = quick(pipe, candidates=names, rank="time", threshold=NEVER)
    assert list(tried(plan)) == ["reuse", "window(band:2)+residual+cfg", "window(band:2)+residual", "full+cfg"]
    assert not any(tried(plan).values())
    given = quick(pipe, candidates=names, threshold=NEVER, rank="published")
    assert list(tried(given)) == ["full+cfg", "window(band:2)+residual", "window(band:2)+residual+cfg", "reuse"]


def test_windows_no_faster_than_full_are_left_out_and_noted(profile_at, pipe):
    profile_at(**SLOW)
    plan = quick(pipe, threshold=NEVER)
    found = tried(plan)
    assert list(found)[:2] == ["reuse", "full+cfg"]
    for name in ("window(band:2)+residual+cfg", "window(band:2)+residual"):
        assert found[name].startswith("predicted no faster than full: ")
        assert found[name].endswith('rank="published" tries it anyway')
    assert [trial.loss for trial in plan.rows[-1][-1].trials].count(None) == 2
    published = quick(pipe, threshold=NEVER, rank="published")
    assert not any(tried(published).values())


def test_operations_are_weighed_without_a_profile_and_where_it_cannot_tell(profile_at, pipe):
    order = ["reuse", "window(band:2)+residual+cfg", "full+cfg", "window(band:2)+residual"]
    plain = quick(pipe, threshold=NEVER)
    assert list(tried(plain)) == order
    assert plain.rows == quick(pipe, threshold=NEVER, rank="flops").rows
    profile_at(full=1.0, window=0.01, dtype="float16")
    assert quick(pipe, threshold=NEVER, rank="time").rows == plain.rows


def test_ranking_by_time_needs_a_profile(pipe):
    with pytest.raises(ProfileError, match="run difa tune --device cpu"):
        quick(pipe, rank="time")
    with pytest.raises(DecisionError, match="rank is 'speed'; choose one of auto, time, flops, published"):
        quick(pipe, rank="speed")


def test_what_replaces_a_window_shares_as_it_did():
    assert without_window(SHARED) == D("full+cfg")
    assert without_window(RESIDUAL) == FULL
    assert without_window(REUSE) == REUSE
