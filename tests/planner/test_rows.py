"""At most K distinct rows."""

from dataclasses import replace

import pytest

from difa_compile.decision import FULL, REUSE
from difa_compile.errors import BudgetError, RowLimitError
from difa_compile.planner.choice import choose
from difa_compile.planner.problem import FORECAST, outcome
from difa_compile.planner.rows import distinct, limit_rows
from tests.support.planner_problems import make_problem


def test_rows_are_counted_over_all_units():
    assert distinct([[FULL, REUSE, FULL], [FULL, FULL, FULL]]) == 2
    assert distinct([[FULL, REUSE, FULL], [FULL, FULL, FORECAST]]) == 3


@pytest.mark.parametrize("most", [2, 3, 4, 6])
def test_the_limit_and_the_budget_are_kept(most):
    problem = make_problem(steps=16, units=4, readers=(REUSE, FORECAST))
    free = choose(problem, 0.5)
    found = limit_rows(problem, 0.5, most)
    assert found.rows == distinct(found.outcome.columns) <= most < distinct(free.columns)
    assert found.outcome.share <= 0.5 + 1e-9
    assert 0 < found.bound <= found.additive
    assert outcome(problem, found.outcome.columns) == found.outcome


def test_more_rows_are_about_as_good_or_better():
    problem = make_problem(steps=16, units=3, readers=(REUSE, FORECAST))
    few, many = limit_rows(problem, 0.5, 3), limit_rows(problem, 0.5, 12)
    assert many.outcome.error <= few.outcome.error * 1.1


def test_a_limit_that_does_not_bind_changes_nothing():
    problem = make_problem(steps=16, units=2)
    assert limit_rows(problem, 0.5, 16).outcome == choose(problem, 0.5)


def test_one_row():
    problem = make_problem(steps=8)
    assert set(limit_rows(problem, 1.0, 1).outcome.columns[0]) == {FULL}
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
    assert found.rows <= most
    assert outcome(problem, found.outcome.columns) == found.outcome
    assert all(column[begin] == FULL for column in found.outcome.columns for begin in (5, 11))
