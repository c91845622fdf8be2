"""Paths whose steps can be computed in several ways, against every plan there is."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from difa_compile.decision import FULL, REUSE, Decision, Kind, Window
from difa_compile.planner.choice import Planner, choose
from difa_compile.planner.effects import Effects
from difa_compile.planner.forms import best_forms, has_forms
from difa_compile.planner.paths import Readers, decided
from difa_compile.planner.problem import FORECAST, Costs, Problem, Unit, additive_error, cost_of, outcome
from tests.support.planner_problems import make_problem, possible, smooth_values

WIDE, NARROW = Window("band", 3), Window("band", 1)
WINDOW = Decision.parse("window(band:3)")
RESIDUAL = Decision.parse("window(band:3)+residual")
OTHER = Decision.parse("window(band:1)+residual")
SHARED = Decision.parse("full+cfg")
HEADS = Decision.parse("heads(0:window(band:3);1:full)")
SIZE = 12
"""Numbers of an effect: readers' errors lie in the first half, those of what is computed in one number each of the
other, so that squared errors add up as paths take them to."""


def problem(steps=5, seed=0, readers=(REUSE,), begins=(), ages=3, taking=0.1, forms=None):
    """One unit with every form that can be computed, in which nothing cancels."""
    rng = np.random.default_rng(seed)
    drift = np.zeros((steps, 5, SIZE))
    values = smooth_values(seed, steps)
    for lag in range(1, 5):
        drift[lag:, lag, :6] = (values[:-lag] - values[lag:])[: max(0, steps - lag)]
    forms = (SHARED, WINDOW, HEADS, RESIDUAL, OTHER) if forms is None else forms
    computed, residual = {}, {}
    for number, form in enumerate(forms):
        if form.kind is Kind.WINDOW_RESIDUAL:
            residual[form] = np.zeros((steps, ages + 1, SIZE))
            residual[form][:, :, 6 + number] = 0.05 * np.arange(ages + 1) * rng.uniform(0.5, 2, (steps, 1))
        else:
            computed[form] = np.zeros((steps, SIZE))
            computed[form][:, 6 + number] = rng.uniform(0.05, 0.4, steps)
    prices = dict(zip((SHARED, WINDOW, HEADS, RESIDUAL, OTHER), (0.5, 0.3, 0.6, 0.35, 0.2), strict=True))
    costs = Costs({FULL: 1.0} | {form: prices[form] for form in forms}, 0.02, 0.02, {WIDE: taking, NARROW: taking / 2})
    unit = Unit((0,), Effects(drift, computed, residual), costs)
    progress = tuple((steps - step) / steps for step in range(steps))
    return Problem(progress, (unit,), np.linspace(0.5, 1.5, steps), 0.1, readers, 0.0, begins)


def found_at(made, price, active=None):
    readers = Readers(made, [0])
    prices = readers.priced(price)
    active = np.ones(made.steps, dtype=bool) if active is None else active
    return decided(readers, prices, 0, best_forms(made, 0, 0, prices, active, price), active)


def price_of(made, column, price, covered=None):
    """Error and price of a column, None if it cannot be run."""
    covered = [False] * made.steps if covered is None else covered
    error = possible(additive_error, made, [column])
    cost = possible(cost_of, made.units[0], column, covered)
    return None if error is None or cost is None else error + price * cost


@pytest.mark.parametrize("begins", [(), (2,)])
@pytest.mark.parametrize("price", [1e-4, 0.003, 0.03, 0.1, 1.0])
def test_the_path_is_the_cheapest_of_all_plans(price, begins):
    made = problem(begins=begins)
    options = (*made.units[0].costs.computed, REUSE)
    everything = (price_of(made, column, price) for column in product(options, repeat=made.steps))
    best = min(each for each in everything if each is not None)
    assert price_of(made, found_at(made, price), price) == pytest.approx(best, rel=1e-9)


def test_what_is_chosen_depends_on_the_price():
    made = problem(steps=12)
    chosen = [set(found_at(made, price)) for price in np.geomspace(1e-4, 1, 40)]
    assert chosen[0] == {FULL}
    assert any({FULL, RESIDUAL} <= each or {FULL, OTHER} <= each for each in chosen)
    assert len(set.union(*chosen)) >= 4


def test_what_taking_a_residual_costs_counts():
    """A residual that is dear to take is taken for several steps or not at all."""
    cheap = found_at(problem(taking=0.0, forms=(RESIDUAL,)), 0.02)
    dear = found_at(problem(taking=10.0, forms=(RESIDUAL,)), 0.02)
    assert RESIDUAL in cheap
    assert RESIDUAL not in dear


def test_a_residual_is_not_older_than_was_measured():
    for price in np.geomspace(1e-4, 1, 20):
        last = None
        for step, decision in enumerate(found_at(problem(steps=12, ages=2, forms=(RESIDUAL,)), price)):
            assert decision != RESIDUAL or step - last <= 2
            last = step if decision.is_full else last


def test_where_the_unit_does_not_exist_nothing_is_computed():
    made = problem(steps=7)
    active = np.array([False, True, True, False, True, True, False])
    for price in (1e-3, 0.03, 1.0):
        column = found_at(made, price, active)
        assert [column[step] for step in (0, 3, 6)] == [FULL] * 3
        assert column[1].kind.reads is None
        assert price_of(made, column, price, list(~active)) is not None


def test_forecasts_of_both_orders_keep_their_steps_apart():
    for readers in ((FORECAST,), (FORECAST, replace(FORECAST, order=2))):
        made = problem(steps=12, readers=readers)
        for price in (1e-3, 0.01, 0.1):
            assert possible(outcome, made, [found_at(made, price)]) is not None


@pytest.mark.parametrize("readers", [(REUSE,), (FORECAST,), (FORECAST, replace(FORECAST, order=2))])
def test_without_other_forms_it_is_the_path_of_computed_steps(readers):
    """With orders that look back one and two steps, and the two functions have nothing in common."""
    made = make_problem(steps=10, readers=readers, costs=Costs({FULL: 1.0}, 0.02, 0.02))
    planner = Planner(made)
    for price in (1e-6, 1e-5, 1e-4, 1e-3):
        columns = planner._columns_at(price, np.inf)
        assert price_of(made, columns[0], price) == pytest.approx(
            price_of(made, found_at(made, price), price), rel=1e-9
        )


@pytest.mark.parametrize("budget", [0.4, 0.5, 0.6])
def test_a_window_with_a_residual_is_planned_where_it_is_better(budget):
    """Residuals stay good for long, outputs do not: so windows with a residual stand where else steps were reused."""
    steps = 16
    rng = np.random.default_rng(1)
    drift = np.zeros((steps, 5, 6))
    drift[:, 1:] = rng.standard_normal((steps, 4, 6))
    residual = 0.01 * rng.standard_normal((steps, 5, 6))
    unit = Unit((0,), Effects(drift, {}, {RESIDUAL: residual}), Costs({FULL: 1.0, RESIDUAL: 0.2}, 0, 0, {WIDE: 0.2}))
    progress = tuple((steps - step) / steps for step in range(steps))
    made = Problem(progress, (unit,), np.ones(steps), 0.05)
    without = replace(made, units=(Unit((0,), Effects(drift), Costs({FULL: 1.0})),))
    found, other = choose(made, budget), choose(without, budget)
    assert RESIDUAL in found.columns[0]
    assert found.share <= budget
    assert found.error < other.error / 5


def test_which_units_have_forms():
    assert has_forms(problem(), [0])
    assert not has_forms(make_problem(), [0])
