"""The search: against one written independently, its losses, and what a profile of the machine makes of it."""

import numpy as np
import pytest
import torch

from difa_compile.calibration.calibrate import calibrate
from difa_compile.calibration.search import default_window, loss_of
from difa_compile.decision import REUSE, Decision, Kind, Window
from difa_compile.errors import DecisionError, ProfileError
from difa_compile.layout import Layout
from difa_compile.pipeline.apply import apply, remove
from difa_compile.plan.plan import SiteInfo
from tests.support.slow_search import DECISIONS, assert_same_search, quick, slow_loss, slow_search
from tests.support.tiny_pipelines import sample
from tests.support.two_attentions import SLOW


def brief(pipe, **settings):
    """Calibrate with the rewritten graphs run eagerly, without progress bar."""
    given = {"class_labels": [1, 2], "generator": torch.Generator().manual_seed(3)}
    return calibrate(pipe, given, **{"steps": 3, "progress": False, "inner": "eager", **settings})


def test_an_applied_plan_samples_in_full_what_is_slower(profile_at, pipe):
    plan = brief(pipe, candidates=["window"], window="band:2", threshold=10)
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


def tried(plan):
    """The candidates of the last step and site, in the order tried, with the reasons of those that were not."""
    return {str(trial.decision): trial.reason for trial in plan.rows[-1][-1].trials}


NEVER = 1e-9
"""A threshold that admits nothing, so that every candidate is tried."""


def test_candidates_are_weighed_by_predicted_time(profile_at, pipe):
    names = ["full+cfg", "window+residual", "window+residual+cfg", "reuse"]
    profile_at(full=1.0, window=0.01)
    plan = brief(pipe, candidates=names, rank="time", threshold=NEVER)
    assert list(tried(plan)) == ["reuse", "window(band:2)+residual+cfg", "window(band:2)+residual", "full+cfg"]
    assert not any(tried(plan).values())
    given = brief(pipe, candidates=names, threshold=NEVER, rank="published")
    assert list(tried(given)) == ["full+cfg", "window(band:2)+residual", "window(band:2)+residual+cfg", "reuse"]


def test_windows_no_faster_than_full_are_left_out_and_noted(profile_at, pipe):
    profile_at(**SLOW)
    plan = brief(pipe, threshold=NEVER)
    found = tried(plan)
    assert list(found)[:2] == ["reuse", "full+cfg"]
    for name in ("window(band:2)+residual+cfg", "window(band:2)+residual"):
        assert found[name].startswith("predicted no faster than full: ")
        assert found[name].endswith('rank="published" tries it anyway')
    assert [trial.loss for trial in plan.rows[-1][-1].trials].count(None) == 2
    published = brief(pipe, threshold=NEVER, rank="published")
    assert not any(tried(published).values())


def test_operations_are_weighed_without_a_profile_and_where_it_cannot_tell(profile_at, pipe):
    order = ["reuse", "window(band:2)+residual+cfg", "full+cfg", "window(band:2)+residual"]
    plain = brief(pipe, threshold=NEVER)
    assert list(tried(plain)) == order
    assert plain.rows == brief(pipe, threshold=NEVER, rank="flops").rows
    profile_at(full=1.0, window=0.01, dtype="float16")
    assert brief(pipe, threshold=NEVER, rank="time").rows == plain.rows


def test_ranking_by_time_needs_a_profile(pipe):
    with pytest.raises(ProfileError, match="run difa tune --device cpu"):
        brief(pipe, rank="time")
    with pytest.raises(DecisionError, match="rank is 'speed'; choose one of auto, time, flops, published"):
        brief(pipe, rank="speed")


@pytest.mark.parametrize("form", ["paper", "code"])
def test_equals_a_slow_search_written_independently(pipe, form):
    rows, measured = slow_search(pipe, form=form)
    plan = quick(pipe, loss=form, rank="published")
    assert_same_search(plan, rows, measured)
    chosen = {decision for row in rows for decision in row}
    assert len(chosen) >= 4, "the case is too easy: choose a threshold at which candidates of several kinds win"


def test_weighing_equals_a_slow_search_written_independently(pipe):
    """16 tokens, width 16; a band of 2 shows 74 of the 256 pairs."""
    window = (4 * 74 * 16 + 8 * 16 * 16 * 16) / (4 * 256 * 16 + 8 * 16 * 16 * 16)
    costs = {0.0: REUSE, window / 2: DECISIONS[1], 0.5: DECISIONS[3], window: DECISIONS[2]}
    rows, measured = slow_search(pipe, [costs[cost] for cost in sorted(costs)], costs=sorted(costs), threshold=0.8)
    plan = quick(pipe, rank="flops", threshold=0.8)
    assert_same_search(plan, rows, measured)
    assert len({decision for row in rows for decision in row}) >= 3, "the case is too easy"
    assert rows != quick(pipe, rank="published", threshold=0.8).decisions
    names = ["full+cfg", "window+residual", "window+residual+cfg", "reuse"]
    assert quick(pipe, candidates=names, threshold=0.8).decisions == rows, "their order does not matter"
    for trial in (trial for row in plan.rows for cell in row for trial in cell.trials):
        assert costs[min(costs, key=lambda cost: abs(cost - trial.cost))] == trial.decision
        assert trial.price == pytest.approx(trial.cost + trial.loss / trial.threshold)


def test_other_candidates_and_windows(pipe):
    names = ["window+cfg", "window", "reuse"]
    window = Window("band", 5)
    decisions = [Decision(Kind.WINDOW, window, True), Decision(Kind.WINDOW, window), REUSE]
    rows, measured = slow_search(pipe, decisions)
    for given in ("band:5", window):
        assert_same_search(quick(pipe, candidates=names, window=given, rank="published"), rows, measured)


@pytest.mark.slow
def test_compiled_search_finds_the_same_without_recompiling(pipe):
    rows, measured = slow_search(pipe)
    with torch._dynamo.config.patch(error_on_recompile=True):
        plan = quick(pipe, inner="inductor", rank="published")
    assert_same_search(plan, rows, measured)


def test_loss_by_hand():
    a = torch.tensor([[1.0, -2.0, 0.0, 4.0]])
    b = torch.tensor([[2.0, -1.0, 0.0, 4.0]])
    assert loss_of("paper", [a], [b]) == pytest.approx((0.5 + 0.5 + 0 + 0) / 4, rel=1e-5)
    assert loss_of("code", [a], [b]) == pytest.approx((0.5 + 1.0 + 0 + 0) / 4, rel=1e-5)
    # Clipped at 10: values of opposite sign near zero.
    assert loss_of("code", [torch.tensor([-1.0])], [torch.tensor([1e-6])]) == pytest.approx(10.0)
    assert loss_of("paper", [torch.tensor([-1.0])], [torch.tensor([1.0])]) == pytest.approx(2.0, rel=1e-5)
    # Several outputs count alike; those that are not floating point do not count.
    assert loss_of("paper", [a, a, torch.tensor([1]), None], [a, b, torch.tensor([2]), None]) == pytest.approx(
        0.125, rel=1e-5
    )
    assert np.isnan(loss_of("paper", [a], [b * float("nan")]))
    for form in ("paper", "code"):
        x, y = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
        assert loss_of(form, [x], [y]) == pytest.approx(slow_loss(x, y, form), rel=1e-5)


def test_default_window_is_an_eighth_of_the_image():
    def site(tokens, layout):
        return SiteInfo("a", "self", 2, 8, tokens, 16, layout)

    assert default_window(site(1024, Layout((32, 32)))) == Window("band", 128)
    assert default_window(site(4096 + 512, Layout((64, 64), before=512))) == Window("band", 512)
    assert default_window(site(256, None)) == Window("band", 32)
    assert default_window(site(4, Layout((2, 2)))) == Window("band", 1)
