"""A front that is run: which plans, in which order, and what is said of them."""

import math
from dataclasses import replace

import pytest

from difa_compile.comparison.front import Origin, choices_for_budgets, measured_front
from difa_compile.comparison.kept import Held
from difa_compile.plan.data import Promise
from difa_compile.planner.make import plan_from_table
from tests.support.tables import made_table


class Fake:
    """Runs that take as long as predicted."""

    def __init__(self):
        self.ran, self.judged = [], []

    def judge(self, plan):
        self.judged.append(plan)
        return sum(row[-1].order == 2 for row in plan.decisions) or plan.settings.promise is None

    def run(self, plan, rounds):
        self.ran.append(plan)
        computed = sum(row[-1].is_full for row in plan.decisions)
        return Held(computed / plan.steps, math.inf if computed == plan.steps else 30.0 + computed, 0.0)


def table():
    made = made_table(8)
    return replace(made, units=made.units[:1])


def test_several_plans_for_each_budget_that_is_possible():
    found = choices_for_budgets(table().problem(), (0.1, 0.5, 0.8))
    assert list(found) == [0.5, 0.8]
    assert all(1 <= len(choices) <= 3 for choices in found.values())
    assert all(choice.share <= budget for budget, choices in found.items() for choice in choices)


@pytest.mark.parametrize("better", [True, False])
def test_the_best_is_tried_with_fitted_weights(better):
    run = Fake()
    run.judge = lambda plan: run.judged.append(plan) or (10 + better if plan.fitted else 10.5)
    measured_front(table(), run)
    assert any(plan.fitted for plan in run.judged)
    assert any(plan.fitted for plan in run.ran) == better


def test_of_each_budget_the_best_is_timed():
    run = Fake()
    points = measured_front(table(), run)
    budgets = [point for point in points if point.origin is Origin.PLANNER]
    assert len(run.judged) > len(budgets) > 1
    assert {point.name for point in points if point.origin is Origin.RECIPE} >= {"reuse every 2", "forecast every 2"}


def test_all_are_run_but_the_plan_in_question_quickest_first():
    made = table()
    plan = plan_from_table(made, budget=0.6)
    promise = Promise("budget 0.7", 0.7, 40.0, 0.69, None, None, "")
    own = replace(plan, settings=replace(plan.settings, promise=promise))
    run, told = Fake(), []
    points = measured_front(made, run, own, {"another": plan}, told.append)
    assert [point.share for point in points] == sorted(point.share for point in points)
    assert len(run.ran) == len(points) - 1
    budgets = [point.name for point in points if point.origin is Origin.PLANNER]
    timed = [text.split(":")[0] for text in told if "of full's time" in text]
    assert sorted(timed) == sorted(point.name for point in points if point.origin is not Origin.PLAN)
    assert [text.split(":")[0] for text in told if "trying" in text] == sorted(budgets)
    assert run.ran[-1] == plan
    assert "budget 0.7" not in [point.name for point in points if point.origin is Origin.PLANNER]
    (mine,) = [point for point in points if point.origin is Origin.PLAN]
    assert (mine.name, mine.share, mine.psnr) == ("budget 0.7", 0.69, None)
    assert [point.name for point in points if point.origin is Origin.SEARCH] == ["another"]
    assert any("dB" in text for text in told)
    assert all(point.origin is not Origin.PLAN for point in measured_front(made, run, plan))
