"""Fixed recipes as plans."""

from dataclasses import replace

import pytest

from difa_compile.decision import FULL, REUSE
from difa_compile.planner.recipes import FIRST, recipes, uniform
from tests.support.planner_problems import make_problem


@pytest.mark.parametrize("order", [0, 1])
def test_the_first_steps_are_computed_and_then_every_nth(order):
    found = uniform(make_problem(steps=12), 4, order)
    column = found.columns[0]
    computed = [step for step, each in enumerate(column) if each == FULL]
    assert computed == [*range(FIRST), 3, 7, 11]
    assert {each.order for each in column if each != FULL} == {order}
    assert (REUSE in column) == (order == 0)


def test_what_was_not_measured_so_far_back_is_left_out():
    short = make_problem(steps=16, lags=3)
    assert uniform(short, 6, 0) is None
    names = list(recipes(short))
    assert "reuse every 4" in names
    assert "reuse every 6" not in names
    assert "forecast every 4" not in names
    assert recipes(make_problem(steps=3)) == {}


def test_forecasts_do_better_than_reuse_where_outputs_change_smoothly():
    found = recipes(make_problem(steps=40))
    assert found["forecast every 3"].psnr > found["reuse every 3"].psnr
    assert found["reuse every 2"].share > found["reuse every 6"].share


@pytest.mark.parametrize("order", [0, 1])
def test_a_recipe_begins_anew_where_what_was_kept_is_gone(order):
    problem = replace(make_problem(steps=16), begins=(7,))
    column = uniform(problem, 4, order).columns[0]
    assert [step for step, each in enumerate(column) if each == FULL] == [0, 1, 2, 3, 7, 8, 9, 10, 14]
