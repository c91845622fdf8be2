"""Plans held to their word: what a run makes of a promise, when another plan is tried, and what is left behind."""

import math
from contextlib import contextmanager

import pytest
import torch
from diffusers import DiTPipeline

from difa_compile.comparison import planned
from difa_compile.comparison.planned import TRIES, Held, Trials, _psnr, plan_within
from difa_compile.errors import BudgetError
from difa_compile.pipeline.apply import apply
from difa_compile.planner.make import Limit, plan_from_table
from tests.support.tables import made_table
from tests.support.tiny_pipelines import tiny_pipeline


@pytest.fixture
def runs(monkeypatch):
    """Stands in for running plans: gives what is in ``held``, in turn, the last again and again; notes the rest."""
    seen = {"held": [], "plans": [], "seeds": None}

    class Fake:
        def run(self, plan):
            seen["plans"].append(plan)
            return seen["held"].pop(0) if len(seen["held"]) > 1 else seen["held"][0]

    @contextmanager
    def trials(pipe, inputs, steps, seeds):
        seen["seeds"] = seeds
        yield Fake()

    monkeypatch.setattr(planned, "trials", trials)
    return seen


def within(limit, steps=6, **options):
    return plan_within(object(), {}, limit, steps, table=made_table(steps), **options)


def test_the_promise_says_what_was_measured(runs):
    runs["held"] = [Held(0.49, 41.0, 39.5)]
    told = []
    plan = within(Limit(0.5), seed=3, held_out=(4, 5), told=told.append)
    promise = plan.settings.promise
    assert (promise.measured_share, promise.measured_psnr, promise.held_out_psnr) == (0.49, 41.0, 39.5)
    assert promise.limit == "budget 0.5"
    assert promise.predicted_share <= 0.5
    assert promise.note == ""
    assert runs["seeds"] == (3, 4, 5)
    assert len(runs["plans"]) == 1
    assert told == [str(promise)]


def test_what_is_over_the_budget_is_tried_with_less_and_said(runs):
    runs["held"] = [Held(0.9, 41.0, 39.5)]
    plan = within(Limit(0.8))
    assert 1 < len(runs["plans"]) <= TRIES
    shares = [each.settings.promise.predicted_share for each in runs["plans"]]
    assert shares[1] < shares[0]
    assert plan.settings.promise.note == "over the budget by 12 %"
    assert plan.settings.promise.limit == "budget 0.8"


def test_the_first_plan_stays_where_less_time_is_not_possible(runs):
    least = 0.45
    runs["held"] = [Held(0.9, 41.0, 39.5)]
    plan = within(Limit(least))
    assert "over the budget by 100 %" in plan.settings.promise.note


def test_a_budget_that_is_not_possible_at_all(runs):
    with pytest.raises(BudgetError, match="the least is"):
        within(Limit(0.05))
    assert runs["plans"] == []


def test_the_best_that_keeps_to_the_limit_is_taken(runs):
    runs["held"] = [Held(0.6, 30.0, 30.0), Held(0.78, 44.0, 44.0)]
    plan = within(Limit(0.8))
    assert plan.settings.promise.measured_psnr == 44.0
    assert len(runs["plans"]) == 2


def test_a_quality_is_refitted_to_what_was_measured(runs):
    runs["held"] = [Held(0.5, 30.0, 30.0), Held(0.8, 40.5, 40.0)]
    plan = within(Limit(psnr=40.0))
    first, second = runs["plans"]
    assert second.settings.promise.predicted_share > first.settings.promise.predicted_share
    assert plan.settings.promise.measured_psnr == 40.5
    assert plan.settings.promise.note == ""


def test_what_is_below_the_quality_is_said(runs):
    runs["held"] = [Held(0.5, 37.5, 37.0)]
    assert within(Limit(psnr=40.0)).settings.promise.note == "2.5 dB below what was asked for"


def test_the_same_images_end_the_search(runs):
    runs["held"] = [Held(1.0, math.inf, math.inf)]
    plan = within(Limit(psnr=40.0))
    assert len(runs["plans"]) == 1
    assert (plan.settings.promise.measured_psnr, plan.settings.promise.held_out_psnr) == (None, None)


def test_psnr_is_of_the_pairs_that_differ():
    full = torch.zeros(2, 1, 4, 4)
    assert _psnr(full, full) == math.inf
    other = full.clone()
    other[0] += 0.1
    assert _psnr(full, other) == pytest.approx(20.0, abs=1e-3)


@pytest.mark.slow
def test_a_pipeline_is_left_as_it_was_also_after_an_error(monkeypatch):
    from difa_compile.calibration.measure import measure

    pipe = tiny_pipeline()
    given = {"class_labels": [1, 2]}
    table = measure(pipe, given, 4, progress=False, inner="eager")
    plan = plan_from_table(table, budget=1.0)
    monkeypatch.setattr(planned, "apply", lambda pipe, plan: apply(pipe, plan, inner="eager"))
    trials = Trials(pipe, given, 4, (0, 1))
    held = trials.run(plan)
    assert held.share > 0
    assert held.psnr > 60
    assert type(pipe) is DiTPipeline
    monkeypatch.setattr(trials, "_planned", lambda seed: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        trials.run(plan)
    assert type(pipe) is DiTPipeline
    assert pipe.transformer._compiled_call_impl is None
