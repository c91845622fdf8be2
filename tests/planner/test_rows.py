"""At most K distinct rows."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import BudgetError, ErrorTableError, RowLimitError
from difa_compile.planner import rows
from difa_compile.planner.choice import Planner, choose
from difa_compile.planner.effects import Effects, drift_of_values
from difa_compile.planner.problem import FORECAST, Costs, Unit, outcome
from difa_compile.planner.proof import optimum
from difa_compile.planner.rows import FewRows, distinct, limit_rows, price_of_rows
from tests.support.planner_problems import all_columns, make_problem, possible, smooth_values


def test_rows_are_counted_over_all_units():
    assert distinct([[FULL, REUSE, FULL], [FULL, FULL, FULL]]) == 2
    assert distinct([[FULL, REUSE, FULL], [FULL, FULL, FORECAST]]) == 3


@pytest.mark.parametrize("most", [2, 3, 4, 6])
def test_the_limit_and_the_budget_are_kept(most):
    problem = make_problem(steps=16, units=4, readers=(REUSE, FORECAST))
    free = choose(problem, 0.5)
    found = limit_rows(problem, 0.5, most)
    assert distinct(found.columns) <= most < distinct(free.columns)
    assert found.share <= 0.5 + 1e-9
    assert outcome(problem, found.columns) == found


def test_more_rows_are_about_as_good_or_better():
    problem = make_problem(steps=16, units=3, readers=(REUSE, FORECAST))
    few, many = limit_rows(problem, 0.5, 3), limit_rows(problem, 0.5, 12)
    assert many.error <= few.error * 1.1


def test_a_limit_that_does_not_bind_changes_nothing():
    problem = make_problem(steps=16, units=2)
    assert limit_rows(problem, 0.5, 16) == choose(problem, 0.5)


def test_one_row():
    problem = make_problem(steps=8)
    assert set(limit_rows(problem, 1.0, 1).columns[0]) == {FULL}
    with pytest.raises(RowLimitError, match="allow 2 rows"):
        limit_rows(problem, 0.5, 1)


@pytest.mark.parametrize("most", [0, -3, 1.5, True, "two"])
def test_what_is_no_limit(most):
    with pytest.raises(RowLimitError, match="at least 1"):
        limit_rows(make_problem(), 0.5, most)


def test_an_impossible_budget_stays_one():
    with pytest.raises(BudgetError, match="the least is"):
        limit_rows(make_problem(steps=12, lags=3), 0.1, 4)


@pytest.mark.parametrize("most", [2, 3])
def test_few_rows_begin_each_stream_anew(most):
    problem = replace(make_problem(steps=16, units=3, readers=(REUSE, FORECAST)), begins=(5, 11))
    found = limit_rows(problem, 0.6, most)
    assert distinct(found.columns) <= most
    assert outcome(problem, found.columns) == found
    assert all(column[begin] == FULL for column in found.columns for begin in (5, 11))


def test_several_budgets_share_what_is_worked_out(monkeypatch):
    problem = make_problem(steps=12, units=2, readers=(REUSE, FORECAST))
    alone = [limit_rows(problem, budget, 2) for budget in (0.4, 0.5, 0.7)]
    made = []

    def counted(problem):
        made.append(problem)
        return Planner(problem)

    monkeypatch.setattr(rows, "Planner", counted)
    few = FewRows(Planner(problem), 2)
    assert [few.choose(budget) for budget in (0.4, 0.5, 0.7)] == alone
    assert len(made) == 1, "that of all units together"


def test_what_the_planner_chooses_is_not_chosen_again(monkeypatch):
    planner = Planner(make_problem(steps=12))
    free = planner.choose(0.5)
    monkeypatch.setattr(planner, "choose", lambda *given, **options: pytest.fail("it was"))
    assert FewRows(planner, 12).choose(0.5, free) is free


# Rows that are kinds of decisions.

SHARED = Decision.parse("full+cfg")
ORDERS = (REUSE, FORECAST, Decision.parse("forecast:2"))


def plans_of(problem, most):
    """Every plan of one unit with at most so many distinct rows."""
    columns = (column for column in all_columns(problem) if len(set(column)) <= most)
    return [plan for column in columns if (plan := possible(outcome, problem, [column])) is not None]


def within(plans, budget):
    return min(plan.error for plan in plans if plan.share <= budget)


@pytest.mark.parametrize("most", [2, 3])
@pytest.mark.parametrize("seed", [0, 7])
def test_of_all_plans_of_so_few_rows_the_best_is_found(most, seed):
    """Of one unit; the bound says that no plan of so few rows is better by more than a tenth."""
    problem = make_problem(steps=7, seed=seed, readers=ORDERS)
    plans = plans_of(problem, most)
    few = FewRows(Planner(problem), most)
    for budget in (0.4, 0.6):
        best = within(plans, budget)
        assert few.choose(budget).error == pytest.approx(best, rel=1e-6)
        assert best * 0.9 <= few.bound(budget) <= best * (1 + 1e-9)


def test_forecasts_need_no_row_of_reuse():
    """Two rows are full and forecast, where that is better than full and reuse: then the second step is computed."""
    problem = make_problem(steps=16, readers=(FORECAST,))
    found = limit_rows(problem, 0.5, 2)
    assert set(found.columns[0]) == {FULL, FORECAST}
    assert found.columns[0][:2] == (FULL, FULL)


@pytest.mark.parametrize("coherence", [0.0, 0.9])
def test_two_rows_begin_each_stream_with_what_a_forecast_reads(coherence):
    problem = replace(make_problem(steps=18, readers=(FORECAST,), coherence=coherence), begins=(7,))
    for budget in (0.5, 0.8):
        found = limit_rows(problem, budget, 2)
        assert distinct(found.columns) == 2
        assert found.share <= budget
        assert outcome(problem, found.columns) == found


@pytest.mark.parametrize("seed", [0, 4])
def test_few_rows_against_the_exact_optimum(seed):
    """HiGHS, for each choice of kinds."""
    pytest.importorskip("scipy")
    problem = make_problem(steps=12, seed=seed, readers=(REUSE, FORECAST))
    few = FewRows(Planner(problem), 2)
    kinds = [frozenset({FULL, reader}) for reader in problem.readers]
    for budget in (0.4, 0.6):
        exact = min(optimum(replace(problem, allowed=(each,)), budget) for each in kinds)
        assert few.choose(budget).error == pytest.approx(exact, rel=1e-6)
        assert few.bound(budget) <= exact * (1 + 1e-6)


def problem_of_blocks(steps=6, seed=0):
    """Blocks, and attention in them whose halves may be shared."""
    own = smooth_values(seed + 9, steps) * 0.02
    blocks = Unit((0,), Effects(drift_of_values(smooth_values(seed, steps), steps)), Costs({FULL: 1.0}))
    drift = drift_of_values(smooth_values(seed + 1, steps) * 0.3, steps)
    attention = Unit((1,), Effects(drift, {SHARED: own}), Costs({FULL: 0.6, SHARED: 0.3}), inside=0)
    return replace(make_problem(steps, readers=(FORECAST,)), units=(blocks, attention))


@pytest.mark.parametrize("most", [2, 3, 4])
def test_blocks_and_their_attention_share_the_rows(most):
    """Tried against all plans: the choice keeps to the limits, and nothing is below the bound."""
    problem = problem_of_blocks()
    rows = [(REUSE, FULL), (FORECAST, FULL), *((FULL, each) for each in (FULL, SHARED, REUSE, FORECAST))]
    plans = [
        plan
        for chosen in product(rows, repeat=problem.steps)
        if chosen[0] in ((FULL, FULL), (FULL, SHARED)) and len(set(chosen)) <= most
        if (plan := possible(outcome, problem, list(zip(*chosen, strict=True)))) is not None
    ]
    few = FewRows(Planner(problem), most)
    for budget in (0.35, 0.55):
        best, found = within(plans, budget), few.choose(budget)
        assert distinct(found.columns) <= most
        assert found.share <= budget
        assert best * (1 - 1e-9) <= found.error <= best * 1.5
        assert 0 < few.bound(budget) <= best * (1 + 1e-9)


def test_many_kinds_are_left_out_one_by_one(monkeypatch):
    problem = problem_of_blocks(steps=10)
    every = FewRows(Planner(problem), 3).choose(0.5)
    monkeypatch.setattr(rows, "_WEIGHED", 1)
    few = FewRows(Planner(problem), 3)
    found = few.choose(0.5)
    assert distinct(found.columns) <= 3
    assert every.error <= found.error <= every.error * 2
    assert few.bound(0.5) == few.planner.bound(0.5)


@pytest.mark.parametrize("seed", [0, 7])
def test_what_a_limit_costs_lies_between_its_bounds(seed):
    problem = make_problem(steps=7, seed=seed, readers=(REUSE, FORECAST))
    planner = Planner(problem)
    few, free = FewRows(planner, 2), planner.choose(0.5)
    limited = few.choose(0.5, free)
    budget = max(limited.share, free.share)
    cost = 10 * np.log10(within(plans_of(problem, 2), budget) / within(plans_of(problem, 9), budget))
    price = price_of_rows(few, limited, free)
    assert 0 <= price.low <= cost + 1e-6  # of rounding
    assert cost - 1e-6 <= price.high <= price.low + 1
    assert 0 <= price.gap <= price.high + 1e-6


def test_what_is_allowed_is_checked():
    problem = make_problem()
    with pytest.raises(ErrorTableError, match="2 units"):
        replace(problem, allowed=(frozenset({FULL}), frozenset({FULL})))
    with pytest.raises(ErrorTableError, match="cannot begin"):
        replace(problem, allowed=(frozenset({REUSE}),))
