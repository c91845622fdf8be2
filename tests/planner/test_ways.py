"""Several ways to choose: each keeps to the budget and the number of rows; neighbours are one move away."""

from itertools import pairwise

import numpy as np
import pytest

from difa_compile.decision import FULL, REUSE
from difa_compile.planner.choice import choose
from difa_compile.planner.problem import FORECAST
from difa_compile.planner.rows import distinct
from difa_compile.planner.ways import LONG, Way, Ways, ways_of
from tests.support.planner_problems import make_problem


@pytest.fixture(scope="module")
def problem():
    return make_problem(steps=16)


def test_a_problem_s_own_way_comes_first(problem):
    ways = ways_of(problem)
    assert ways[0] == Way((FORECAST,))
    assert len(set(ways)) == len(ways)
    assert any(REUSE in way.readers and len(way.readers) == 3 for way in ways)
    assert ways_of(make_problem(readers=(REUSE,))) == (Way((REUSE,)), Way((REUSE,), worst=True))


@pytest.mark.parametrize("most", [None, 3])
def test_candidates_differ_and_keep_to_budget_and_rows(problem, most):
    found = Ways(problem).candidates(0.45, most)
    if most is None:
        assert found[0] == (Ways(problem).own, choose(problem, 0.45))
    assert len({each.columns for _, each in found}) == len(found) > 1
    for _, each in found:
        assert each.share <= 0.45
        assert most is None or distinct(each.columns) <= most


def test_ways_that_have_no_plan_are_left_out(problem):
    assert Ways(problem).candidates(0.01, None) == []
    assert Ways(problem).candidates(0.5, 1) == []


def test_neighbours_have_one_step_moved_and_keep_to_the_budget(problem):
    ways = Ways(problem)
    start = choose(problem, 0.45)
    found = ways.neighbours(ways.own, start, 0.45, None)
    computed = {step for step, each in enumerate(start.columns[0]) if each == FULL}
    assert found
    moved = []
    for each in found:
        steps = {step for step, decision in enumerate(each.columns[0]) if decision == FULL}
        assert 0 in steps
        (gone,), (new,) = computed - steps, steps - computed
        assert abs(gone - new) <= 3
        assert each.share <= 0.45 * (1 + 1e-9)
        moved.append(gone)
    first = moved[: len(set(moved))]
    assert len(set(first)) == len(first)  # every step's best move comes before any step's second
    errors = [each.error for each in found[: len(first)]]
    assert all(before <= after for before, after in pairwise(errors))
    assert ways.neighbours(ways.own, start, 0.45, 1) == []


def test_a_way_of_several_orders_forecasts_by_them():
    problem = make_problem(steps=24, seed=3)
    found = choose(ways_of(problem)[1].problem(problem), 0.4)
    assert {each.order for each in found.columns[0]} >= {0, 1}
    assert np.isfinite(found.error)


def test_long_schedules_have_no_forecasts_of_order_2():
    orders = {reader.order for way in ways_of(make_problem(steps=LONG + 1, lags=3)) for reader in way.readers}
    assert orders == {0, 1}
