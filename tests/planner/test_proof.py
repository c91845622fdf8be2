"""How far choices are from the exact optimum, by HiGHS."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import BudgetError, ErrorTableError, MissingDependencyError
from difa_compile.planner.choice import Planner
from difa_compile.planner.problem import FORECAST, Costs, additive_error, outcome
from difa_compile.planner.proof import optimum
from tests.support.planner_problems import all_columns, make_problem, possible

READERS = (REUSE, FORECAST)


def test_one_unit_s_optimum_is_that_of_all_plans():
    pytest.importorskip("scipy")
    problem = make_problem(steps=6, readers=READERS)
    plans = [plan for column in all_columns(problem) if (plan := possible(outcome, problem, [column])) is not None]
    for budget in (0.4, 0.6):
        best = min(plan.error for plan in plans if plan.share <= budget)
        assert optimum(problem, budget) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", [0, 10, 20])
@pytest.mark.parametrize("units", [1, 3])
def test_choices_are_near_the_optimum(units, seed):
    """Within 2 % of the error at the same budget: what rounding costs to parts of the budget leaves over."""
    pytest.importorskip("scipy")
    problem = make_problem(steps=12, units=units, seed=seed, readers=READERS)
    planner = Planner(problem)
    for budget in (0.4, 0.55):
        exact = optimum(problem, budget)
        mine = min(additive_error(problem, planner.choose(budget, polish=polish).columns) for polish in (False, True))
        assert exact * (1 - 1e-6) <= mine <= exact * 1.02
        assert planner.bound(budget) <= exact * (1 + 1e-6)


def test_what_has_no_proof():
    pytest.importorskip("scipy")
    with pytest.raises(ErrorTableError, match="exact optimum is for"):
        optimum(make_problem(readers=(Decision.parse("forecast:2"),)), 0.5)
    with pytest.raises(BudgetError, match="no exact optimum"):
        optimum(make_problem(steps=8, lags=3), 0.15)


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingDependencyError, match="scipy"):
        optimum(make_problem(), 0.5)


def test_costs_of_reading_count():
    pytest.importorskip("scipy")
    problem = make_problem(steps=10, units=2, readers=READERS)
    dear = replace(
        problem,
        units=tuple(replace(unit, costs=Costs({FULL: 1.0}, read=0.05, fill=0.05)) for unit in problem.units),
    )
    assert optimum(dear, 0.5) >= optimum(problem, 0.5)
    assert np.isfinite(optimum(dear, 0.5))
