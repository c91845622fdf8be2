"""Plans held to their word: what a run makes of a promise, and when another plan is tried."""

import math
from dataclasses import replace

import pytest

from difa_compile.comparison.holding import AGAIN, RUNS, TRIES
from difa_compile.comparison.kept import Held
from difa_compile.errors import BudgetError
from difa_compile.planner.make import Limit
from difa_compile.planner.ways import Ways
from tests.support.held import same_images, single, within
from tests.support.tables import made_table, measured_unit


def test_the_promise_says_what_was_measured(runs):
    runs["held"] = [Held(0.49, 41.0, 39.5)]
    told = []
    plan = within(Limit(0.5), seeds=(3, 6), held_out=(4, 5), told=told.append, runs=1)
    promise = plan.settings.promise
    assert (promise.measured_share, promise.measured_psnr, promise.held_out_psnr) == (0.49, 41.0, 39.5)
    assert promise.limit == "budget 0.5"
    assert promise.predicted_share <= 0.5
    assert promise.note == ""
    assert runs["seeds"] == ((3, 6), (4, 5))
    assert len(runs["plans"]) == 1
    assert told == [str(promise)]


def test_what_is_over_the_budget_is_tried_with_less_and_said(runs):
    runs["held"] = [Held(0.9, 41.0, 39.5)]
    plan = within(Limit(0.8))
    assert 1 < len(runs["plans"]) <= TRIES
    shares = [each.settings.promise.predicted_share for each in runs["plans"]]
    assert shares[1] < shares[0]
    assert plan.settings.promise.note == (
        f"over the budget by 12 %; the limit is relaxed to 0.90 of the time: none of {len(shares)} plans that were run "
        "takes less"
    )
    assert plan.settings.promise.limit == "budget 0.8"


def test_what_a_plan_gives_up_for_the_budget_is_said(runs):
    runs["held"] = [Held(0.95, 44.0, 43.0), Held(0.78, 41.5, 41.0)]
    told = []
    plan = within(Limit(0.8), told=told.append)
    assert plan.settings.promise.note == (
        "the first choice took 0.95 of the time, at 44.0 dB; given up for the budget: 2.5 dB"
    )
    assert told == [told[0], str(plan.settings.promise)]
    assert "over the budget by 19 %" in told[0]
    runs["held"] = [Held(0.95, 41.0, 41.0), Held(0.78, 41.5, 41.0)]
    assert within(Limit(0.8)).settings.promise.note == "the first choice took 0.95 of the time"
    runs["held"] = [Held(1.2, math.inf, math.inf), Held(0.78, 41.5, 41.0)]
    assert within(Limit(0.8)).settings.promise.note == "the first choice took 1.20 of the time, at the same images"


def test_a_time_that_was_not_expected_is_measured_again(runs):
    runs["held"] = [Held(0.9, 41.0, 39.5)]
    runs["later"] = Held(0.79, 41.0, 39.5)
    plan = within(Limit(0.8))
    assert plan.settings.promise.measured_share == 0.79
    assert [rounds for _, rounds in runs["again"]] == [AGAIN]
    assert len(runs["plans"]) == 1
    expected = plan.settings.promise.predicted_share
    runs.update(held=[Held(expected * 1.04, 41.0, 39.5)], again=[])
    within(Limit(0.8), runs=1)
    assert not runs["again"]


def test_times_that_all_differ_from_the_prediction_are_expected(runs):
    runs["held"] = [lambda plan: Held(1.3 * plan.settings.promise.predicted_share, 41.0, 39.5)]
    within(Limit(0.8))
    assert len(runs["plans"]) > 1
    assert len(runs["again"]) == 1


def test_a_time_within_what_timings_differ_by_is_said(runs):
    runs["held"] = [Held(0.82, 41.0, 41.0)]
    note = "over the budget by 2 %, which is within what timings differ by"
    assert within(Limit(0.8), runs=1).settings.promise.note == note
    runs["held"] = [Held(0.803, 41.0, 41.0)]
    assert within(Limit(0.8), runs=1).settings.promise.note == ""


def test_of_one_plan_nothing_else_is_said_but_that(runs):
    runs["held"] = [Held(0.9, 41.0, 39.5)]
    note = "over the budget by 12 %; the limit is relaxed to 0.90 of the time: no other plan was run"
    assert within(Limit(0.8), runs=1).settings.promise.note == note


def test_the_first_plan_stays_where_less_time_is_not_possible(runs):
    least = 0.45
    runs["held"] = [Held(0.9, 41.0, 39.5)]
    plan = within(Limit(least))
    assert plan.settings.promise.note == (
        "over the budget by 100 %; the limit is relaxed to 0.90 of the time: no other plan was run, and the table has "
        "none that would take little enough"
    )


def test_a_budget_that_is_not_possible_at_all(runs):
    with pytest.raises(BudgetError, match="the least is"):
        within(Limit(0.05))
    assert runs["plans"] == []


def test_the_best_that_keeps_to_the_limit_is_taken(runs):
    runs["held"] = [Held(0.6, 30.0, 30.0), Held(0.78, 44.0, 44.0)]
    plan = within(Limit(0.8))
    assert plan.settings.promise.measured_psnr == 44.0
    assert len(runs["plans"]) == 2


def test_a_quality_is_rescaled_to_what_was_measured(runs):
    runs["held"] = [Held(0.5, 30.0, 30.0), Held(0.8, 40.5, 40.0)]
    plan = within(Limit(psnr=40.0))
    first, second = runs["plans"]
    assert second.settings.promise.predicted_share > first.settings.promise.predicted_share
    assert plan.settings.promise.measured_psnr == 40.5
    assert plan.settings.promise.note == (
        "the first choice came to 30.0 dB, at 0.50 of the time; given up for the quality: 0.30 of it"
    )


def test_what_is_below_the_quality_is_said(runs):
    runs["held"] = [Held(0.5, 37.5, 37.0)]
    note = within(Limit(psnr=40.0)).settings.promise.note
    first, _, second = note.partition("; ")
    assert first == "2.5 dB below what was asked for"
    assert second == f"the limit is relaxed to 37.5 dB: none of {len(runs['plans'])} plans that were run comes closer"
    assert len(runs["plans"]) > 1


def test_images_that_are_nothing_are_said(runs):
    runs["held"] = [Held(0.4, 0.0, 0.0)]
    assert "hold NaN or infinity" in within(Limit(0.8), runs=1).settings.promise.note


def test_the_same_images_end_the_search(runs):
    runs["held"] = [Held(1.0, math.inf, math.inf)]
    plan = within(Limit(psnr=40.0))
    assert len(runs["plans"]) == 1
    assert (plan.settings.promise.measured_psnr, plan.settings.promise.held_out_psnr) == (None, None)


@pytest.mark.parametrize("fits", [False, True])
def test_weights_are_fitted_where_that_comes_closer(runs, fits, monkeypatch):
    """A plan with fitted weights is kept, and so are those of its neighbours, where it is closer, and only there."""
    runs["held"] = [Held(0.5, 40.0, 39.0), Held(0.5, 43.0, 42.0)]

    class Gains(list):
        def pop(self, _):
            return 41.0 + 0.01 * len(runs["others"]) if bool(runs["others"][-1].fitted) == fits else 39.0

    runs["judged"] = Gains([0])
    plan = within(Limit(0.5), 16, runs=14, table=single())
    assert any(each.fitted for each in runs["others"])
    assert not all(each.fitted for each in runs["others"])
    assert bool(plan.fitted) == fits
    assert bool(runs["others"][-1].fitted) == fits, "a neighbour"
    assert plan.settings.promise.measured_psnr == 43.0
    if fits:
        assert all(sum(weights) == pytest.approx(1) for _, weights in plan.fitted.values())


@pytest.mark.parametrize("most", [3, 4])
def test_fitted_weights_take_no_more_rows_than_there_may_be(runs, most):
    """Forecasts are raised to order 2 where a row for them is left, and fitted as they are where none is."""
    runs["held"] = [Held(0.5, 40.0, 39.0)]
    runs["judged"] = [45.0] * 20
    table = replace(made_table(16), units=(measured_unit("blocks", [2], None, tuple(range(1, 9)), 16),))
    plan = within(Limit(0.5, max_rows=most), 16, runs=9, table=table)
    fitted = [each for each in runs["others"] if each.fitted]
    assert fitted
    orders = {cell.decision.order for each in fitted for row in each.rows for cell in row}
    assert (2 in orders) == (most > 3)
    for each in (plan, *runs["others"]):
        assert len(set(each.decisions)) <= most


class ByPlan(list):
    """Stands for PSNR of plans that are judged: a function of the plan."""

    def __init__(self, runs, psnr):
        super().__init__([0])
        self.runs, self.psnr = runs, psnr

    def pop(self, _):
        return self.psnr(self.runs["others"][-1])


def said_share(plan):
    return plan.settings.promise.predicted_share


def last_of(plan):
    """What a plan decides of its last site."""
    return [row[-1] for row in plan.decisions]


def steps_of(column):
    """At which steps a column computes."""
    return tuple(decision.is_full for decision in column)


def as_long_as_predicted(plan):
    return Held(said_share(plan), 50.2, 50.0)


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("needed", [0.6, 0.75])
def test_for_a_quality_the_least_time_is_looked_for(runs, fits, needed):
    """Of what comes closer in the same time, fitted weights or another way: plans of less and less, down to those that
    fall short."""
    runs["held"] = [lambda plan: Held(said_share(plan), 50.5, 50.0), as_long_as_predicted]
    runs["judged"] = ByPlan(
        runs, lambda plan: 50.0 + 40 * (said_share(plan) - needed) if bool(plan.fitted) == fits else 40.0
    )
    plan = within(Limit(psnr=50.0), 16, table=single(), runs=RUNS)
    first = runs["plans"][0]
    assert len(runs["plans"]) == 2
    assert bool(plan.fitted) == fits
    assert needed <= said_share(plan) < said_share(first)
    less = [each for each in runs["others"] if bool(each.fitted) == fits and said_share(each) < said_share(plan)]
    assert all(said_share(each) < needed for each in less)
    steps = sum(row[-1].is_full for row in plan.decisions)
    assert any(sum(row[-1].is_full for row in each.decisions) >= steps - 1 for each in less), (
        "one step less falls short"
    )
    assert plan.settings.promise.predicted_psnr == pytest.approx(50.0, abs=3), "by what others came to"
    assert plan.settings.promise.note == ""


def test_for_a_quality_a_step_is_moved_where_that_reaches_it(runs, monkeypatch):
    runs["held"] = [lambda plan: Held(said_share(plan), 50.5, 50.0), as_long_as_predicted]
    table, needed, moved = single(), 0.6, []
    real = Ways.neighbours

    def neighbours(self, *given):
        found = real(self, *given)
        moved.append([steps_of(each.columns[0]) for each in found])
        return found

    def psnr(plan):
        if not plan.fitted:
            return 40.0
        steps = steps_of(last_of(plan))
        if len(moved) > 1 and steps in moved[-1]:
            return 50.2
        if moved and steps in moved[0]:  # the second of them is closer than what they come from
            return 49.7 if moved[0].index(steps) else 49.0
        return 50.0 + 40 * (said_share(plan) - needed)

    monkeypatch.setattr(Ways, "neighbours", neighbours)
    runs["judged"] = ByPlan(runs, psnr)
    told = []
    plan = within(Limit(psnr=50.0), 16, table=table, runs=30, told=told.append)
    assert len(moved) > 1, "from one that is closer it goes on"
    assert plan.fitted
    assert steps_of(last_of(plan)) in moved[-1]
    assert said_share(plan) < said_share(runs["plans"][0])
    assert any("not the 50.0 asked for" in text for text in told)


def test_for_a_quality_one_run_that_is_left_is_of_what_is_expected_to_have_it(runs):
    runs["held"] = [lambda plan: Held(said_share(plan), 50.5, 50.0), as_long_as_predicted]
    runs["judged"] = ByPlan(runs, lambda plan: 60.0 if plan.fitted else 40.0)
    plan = within(Limit(psnr=50.0), 16, table=single(), runs=6)
    first, second = runs["plans"]
    assert len(runs["others"]) == 4
    assert said_share(second) < said_share(first)
    assert same_images(plan) == same_images(second)
    assert plan.settings.promise.predicted_psnr == pytest.approx(50.0, abs=3)


def test_for_a_quality_what_is_no_quicker_is_not_kept(runs):
    runs["held"] = [Held(0.8, 50.5, 50.0), Held(0.81, 50.2, 50.0)]
    runs["judged"] = ByPlan(runs, lambda plan: 60.0 if plan.fitted else 40.0)
    plan = within(Limit(psnr=50.0), 16, table=single(), runs=RUNS)
    assert len(runs["plans"]) == 2
    assert same_images(plan) == same_images(runs["plans"][0])


def test_for_a_quality_time_is_saved_where_the_plan_is_closer_than_asked_for(runs):
    """Also where nothing forecasts, so that there is no other way and nothing is fitted."""
    runs["held"] = [lambda plan: Held(said_share(plan), 58.0, 58.0), as_long_as_predicted]
    runs["judged"] = ByPlan(runs, lambda plan: 40.0)
    plan = within(Limit(psnr=50.0), 16, table=single(), runs=TRIES)
    assert same_images(plan) == same_images(runs["plans"][-1])
    runs["judged"] = ByPlan(runs, lambda plan: 51.0)
    quicker = within(Limit(psnr=50.0), 16, table=single(), runs=RUNS)
    assert said_share(quicker) < said_share(plan)


def test_for_a_quality_that_is_not_reached_fitted_weights_are_tried(runs):
    runs["held"] = [lambda plan: Held(said_share(plan), 50.2 if plan.fitted else 49.0, 50.0)]
    runs["judged"] = ByPlan(runs, lambda plan: 50.2)
    plan = within(Limit(psnr=50.0), 16, table=single(), runs=RUNS)
    assert plan.fitted
    assert plan.settings.promise.note.startswith("the first choice came to 49.0 dB")
    runs["judged"] = ByPlan(runs, lambda plan: 48.0)
    plan = within(Limit(psnr=50.0), 16, table=single(), runs=RUNS)
    assert not plan.fitted
    assert "the limit is relaxed to 49.0 dB" in plan.settings.promise.note


def test_for_a_quality_few_rows_stay_few_and_what_they_cost_is_said(runs):
    runs["held"] = [lambda plan: Held(said_share(plan), 50.5, 50.0), as_long_as_predicted]
    runs["judged"] = ByPlan(runs, lambda plan: 60.0 + 40 * (said_share(plan) - 1) if plan.fitted else 40.0)
    table = replace(made_table(16), units=(measured_unit("blocks", [2], None, tuple(range(1, 9)), 16),))
    plan = within(Limit(psnr=50.0, max_rows=3), 16, table=table, runs=RUNS)
    assert said_share(plan) < said_share(runs["plans"][0])
    for each in (plan, *runs["others"]):
        assert len(set(each.decisions)) <= 3
    assert "any number of rows would give" in plan.settings.promise.note


def test_the_same_images_in_less_time_end_the_search(runs):
    runs["held"] = [lambda plan: Held(said_share(plan), 50.5, 50.0), as_long_as_predicted]
    first = within(Limit(psnr=50.0), 16, table=single(), runs=1)
    runs["judged"] = ByPlan(
        runs, lambda plan: 40.0 if not plan.fitted else math.inf if said_share(plan) < said_share(first) else 60.0
    )
    plan = within(Limit(psnr=50.0), 16, table=single(), runs=RUNS)
    assert len([each for each in runs["others"] if each.fitted and said_share(each) < said_share(first)]) == 1
    assert plan.decisions == runs["others"][-1].decisions


def test_other_plans_of_the_same_time_are_tried_and_the_closest_kept(runs):
    runs["held"] = [Held(0.5, 40.0, 39.0), Held(0.5, 43.0, 42.0)]
    runs["judged"] = [39.0, 42.0, 41.0, 43.0]
    told = []
    plan = within(Limit(0.5), 16, runs=9, table=single(), told=told.append)
    assert plan.settings.promise.measured_psnr == 43.0
    assert plan.settings.promise.held_out_psnr == 42.0
    assert plan.decisions == runs["others"][3].decisions
    assert len(runs["others"]) == 7
    assert len({same_images(each) for each in runs["others"]}) == 7
    assert len(runs["plans"]) + len(runs["others"]) == 9
    assert "42.0 dB" in told[2]
    assert "not the 42.0 so far" in told[3]


def test_the_first_is_kept_where_none_is_closer(runs):
    runs["held"] = [Held(0.5, 40.0, 39.0)]
    plan = within(Limit(0.5), 16, runs=4, table=single())
    assert len(runs["plans"]) == 1
    assert len(runs["others"]) == 2, "one run is left for a closer one"
    assert plan.decisions == runs["plans"][0].decisions


@pytest.mark.parametrize("count", [1, 2, 3, RUNS])
@pytest.mark.parametrize("limit", [Limit(0.5), Limit(psnr=50.0)], ids=str)
def test_no_more_plans_are_run_than_was_said(runs, count, limit):
    runs["held"] = [Held(0.5, 51.0, 50.0)]
    runs["judged"] = [52.0 + number for number in range(count)]
    within(limit, 16, runs=count, table=single())
    assert 1 <= len(runs["plans"]) + len(runs["others"]) <= count
