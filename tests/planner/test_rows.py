"""At most K distinct rows."""

from dataclasses import replace

import pytest

from difa_compile.decision import FULL, REUSE
from difa_compile.errors import BudgetError, RowLimitError
from difa_compile.planner import rows
from difa_compile.planner.choice import Planner, choose
from difa_compile.planner.problem import FORECAST, outcome
from difa_compile.planner.rows import FewRows, distinct, limit_rows
from tests.support.planner_problems import make_problem


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
    alone = [limit_rows(problem, budget, 3) for budget in (0.4, 0.5, 0.7)]
    made = []

    def counted(problem):
        made.append(problem)
        return Planner(problem)

    monkeypatch.setattr(rows, "Planner", counted)
    few = FewRows(Planner(problem), 3)
    assert [few.choose(budget) for budget in (0.4, 0.5, 0.7)] == alone
    assert len(made) == 1, "that of all units together"


def test_what_the_planner_chooses_is_not_chosen_again(monkeypatch):
    planner = Planner(make_problem(steps=12))
    free = planner.choose(0.5)
    monkeypatch.setattr(planner, "choose", lambda *given, **options: pytest.fail("it was"))
    assert FewRows(planner, 12).choose(0.5, free) is free
