"""Verdicts: what of a plan is carried out, what is left full, and the records that say why."""

import pytest

from difa_compile.backend.entry import eager
from difa_compile.decision import FULL, REUSE
from difa_compile.errors import SiteSkippedError
from difa_compile.plan.schedule import assign_roles
from tests.support.captures import capture_of
from tests.support.tiny_models import captured_plain, graph_of, plain, plain_plan
from tests.support.two_attentions import RESIDUAL, SHARED, SLOW, WINDOW, D, capture, outcomes


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


def test_groups_of_heads_that_are_slower_are_left_full_and_those_without_a_window_never(profile_at):
    profile_at(**SLOW)
    windowed, reused = D("heads(0:window(band:2);1:reuse)"), D("heads(0:full;1:reuse)")
    found = capture([FULL, windowed, reused])
    outcome, reason = outcomes(found)[str(windowed)]
    assert outcome == "skipped"
    assert "predicted slower than full" in reason
    assert found.verdicts.effective(0, windowed) == FULL
    assert outcomes(found)[str(reused)] == ("rewritten", "")
    assert found.verdicts.effective(0, reused) == reused


def test_heads_of_attention_that_takes_no_window_are_skipped_with_the_reason():
    model, inputs = plain(masks=("none", "causal"))
    decision = D("heads(0:window(band:2);1:full)")
    module, values = graph_of(model, inputs)
    found = capture_of(module, values, eager, plan=plain_plan([FULL, decision, D("heads(0:full;1:reuse)")]))
    assert [(one.site, one.outcome, one.reason) for one in found.verdicts.records if one.decision == str(decision)] == [
        ("layers.0.attention", "rewritten", ""),
        ("layers.1.attention", "skipped", "the attention is causal"),
    ]
    assert found.verdicts.effective(1, decision) == FULL
    other = D("heads(0-1:full;2:reuse)")
    assert found.verdicts.why_not(0, other) == "0-2 are named of 2 heads; name every head of the attention once"


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
