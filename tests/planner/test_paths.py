"""Paths are the cheapest of all, found by trying all."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from difa_compile.decision import FULL, REUSE, Decision, Window
from difa_compile.planner.effects import Effects, drift_of_values
from difa_compile.planner.paths import Readers, best_paths, decided, forms_of
from difa_compile.planner.problem import FORECAST, Costs, Problem, Unit, accounts, additive_error, cost_of
from tests.support.planner_problems import all_columns, make_problem, possible, smooth_values

SECOND = Decision.parse("forecast:2")
BAND = Window("band", 3)
WINDOW = Decision.parse("window(band:3)")
RESIDUAL = Decision.parse("window(band:3)+residual")


def cheapest(problem, price, count=None):
    """The least additive error plus price times cost over all columns of the only unit."""
    best = np.inf
    for column in all_columns(problem):
        if count is not None and column.count(FULL) != count:
            continue
        error = possible(additive_error, problem, [column])
        if error is not None:
            best = min(best, error + price * cost_of(problem.units[0], column, [False] * problem.steps))
    return best


def solved(problem, price, counts=False):
    readers = Readers(problem, range(len(problem.units)))
    prices = readers.priced(price)
    nodes = np.array([[price * unit.costs.computed[FULL]] * problem.steps for unit in problem.units])
    active = np.ones(nodes.shape, dtype=bool)
    return readers, prices, best_paths(prices, nodes, active, np.zeros(nodes.shape), counts)


@pytest.mark.parametrize("readers", [(REUSE,), (REUSE, FORECAST), (REUSE, FORECAST, SECOND)])
@pytest.mark.parametrize("price", [1e-7, 1e-5, 1e-4, 1e-3])
def test_the_path_is_the_cheapest(readers, price):
    problem = make_problem(steps=7, readers=readers, costs=Costs({FULL: 1.0}, read=0.02))
    table, prices, found = solved(problem, price)
    assert found.price[0, 0] == pytest.approx(cheapest(problem, price), rel=1e-9)
    forms = [FULL if on else None for on in found.computed[0, 0]]
    column = decided(table, prices, 0, forms, np.ones(7, dtype=bool))
    own = additive_error(problem, [column]) + price * cost_of(problem.units[0], column, [False] * 7)
    assert own == pytest.approx(found.price[0, 0], rel=1e-9)


def test_every_number_of_computed_steps():
    problem = make_problem(steps=7, readers=(REUSE, FORECAST))
    _, _, found = solved(problem, 1e-5, counts=True)
    for count in range(1, 8):
        assert found.computed[count - 1, 0].sum() == count
        assert found.price[count - 1, 0] == pytest.approx(cheapest(problem, 1e-5, count), rel=1e-9)


def test_units_are_solved_together_as_alone():
    problem = make_problem(steps=9, units=3)
    together = solved(problem, 2e-5)[2]
    for unit in range(3):
        alone = make_problem(steps=9, seed=unit)
        assert solved(alone, 2e-5)[2].price[0, 0] == pytest.approx(together.price[0, unit])


def test_a_forecast_alone_leaves_reuse_to_where_it_cannot_stand():
    problem = make_problem(steps=9, readers=(FORECAST,))
    table, prices, found = solved(problem, 1e-3)
    forms = [FULL if on else None for on in found.computed[0, 0]]
    column = decided(table, prices, 0, forms, np.ones(9, dtype=bool))
    for step, decision in enumerate(column):
        if decision == REUSE:
            assert column[:step].count(FULL) == 1


def test_a_lag_that_was_not_measured_is_not_taken():
    problem = make_problem(steps=12, lags=3)
    computed = np.flatnonzero(solved(problem, 1e3)[2].computed[0, 0])
    assert np.diff(np.append(computed, 12)).max() <= 3


def test_a_cap_keeps_every_cell_below_it():
    problem = make_problem(steps=9)
    table, _, found = solved(problem, 1e3)
    loose = found.computed.sum()
    capped = table.priced(1e3, cap=1e-6)
    nodes = np.full((1, 9), 1e3)
    tight = best_paths(capped, nodes, np.ones((1, 9), dtype=bool), np.zeros((1, 9)))
    assert tight.computed.sum() > loose
    column = decided(table, capped, 0, [FULL if on else None for on in tight.computed[0, 0]], np.ones(9, dtype=bool))
    cells = (accounts(problem, [column]).effects ** 2).sum(2) * problem.response**2
    assert cells.max() <= 1e-6


def test_steps_at_which_a_unit_is_not_there():
    problem = make_problem(steps=8)
    readers = Readers(problem, [0])
    prices = readers.priced(1e3)
    active = np.array([[False, True, True, False, False, True, True, True]])
    found = best_paths(prices, np.full((1, 8), 1e3), active, np.zeros((1, 8)))
    assert np.flatnonzero(found.computed[0, 0]).tolist() == [1]
    column = decided(readers, prices, 0, [None, FULL, *[None] * 6], active[0])
    assert column == (FULL, FULL, REUSE, FULL, FULL, REUSE, REUSE, REUSE)


def test_the_forms_of_computed_steps():
    """Windows where they are cheap, residuals soon after a full step, one window for each full step's residual."""
    steps = 6
    drift = drift_of_values(smooth_values(0, steps, 3), steps)
    ages = np.arange(steps + 1)[None, :, None] ** 2 * np.ones((steps, steps + 1, 3)) * 1e-2
    own = Effects(drift, {WINDOW: np.full((steps, 3), 1.0)}, {RESIDUAL: ages})
    costs = Costs({FULL: 2.0, WINDOW: 0.5, RESIDUAL: 0.6}, residual={BAND: 0.1})
    problem = Problem(
        tuple((6 - s) / 6 for s in range(6)), (Unit((0,), own, costs),), np.ones(steps), 0.1, coherence=0.0
    )
    everywhere = np.ones(steps, dtype=bool)

    def forms(price):
        return forms_of(problem, 0, everywhere, everywhere, price)

    assert forms(1e-9) == [FULL] * 6
    assert forms(1e9) == [WINDOW] * 6
    assert forms(0.01)[0] == FULL
    assert RESIDUAL in forms(0.01)
    best = min(
        (additive_error(problem, [column]) + 0.01 * cost_of(problem.units[0], column, [False] * 6), column)
        for column in _all_forms(steps)
        if possible(additive_error, problem, [column]) is not None
    )
    found = forms(0.01)
    assert additive_error(problem, [found]) + 0.01 * cost_of(problem.units[0], found, [False] * 6) == pytest.approx(
        best[0]
    )


def _all_forms(steps):
    return [list(column) for column in product((FULL, WINDOW, RESIDUAL), repeat=steps)]


@pytest.mark.parametrize("readers", [(REUSE,), (REUSE, FORECAST), (REUSE, FORECAST, SECOND)])
@pytest.mark.parametrize("price", [1e-7, 1e-5, 1e-3])
def test_the_path_is_the_cheapest_of_those_that_begin_each_stream_anew(readers, price):
    problem = replace(make_problem(steps=7, readers=readers, costs=Costs({FULL: 1.0}, read=0.02)), begins=(2, 5))
    table, prices, found = solved(problem, price)
    assert found.price[0, 0] == pytest.approx(cheapest(problem, price), rel=1e-9)
    column = decided(table, prices, 0, [FULL if on else None for on in found.computed[0, 0]], np.ones(7, dtype=bool))
    assert column[2] == column[5] == FULL
    own = additive_error(problem, [column]) + price * cost_of(problem.units[0], column, [False] * 7)
    assert own == pytest.approx(found.price[0, 0], rel=1e-9)


def test_a_residual_of_another_stream_is_not_taken():
    steps = 6
    drift = drift_of_values(smooth_values(0, steps, 3), steps)
    ages = np.arange(steps + 1)[None, :, None] ** 2 * np.ones((steps, steps + 1, 3)) * 1e-2
    own = Effects(drift, {WINDOW: np.full((steps, 3), 1.0)}, {RESIDUAL: ages})
    costs = Costs({FULL: 2.0, WINDOW: 0.5, RESIDUAL: 0.6}, residual={BAND: 0.1})
    progress = tuple((6 - s) / 6 for s in range(6))
    problem = Problem(progress, (Unit((0,), own, costs),), np.ones(steps), 0.1, coherence=0.0)
    everywhere = np.ones(steps, dtype=bool)
    plain = forms_of(problem, 0, everywhere, everywhere, 0.1)
    begun = forms_of(replace(problem, begins=(1,)), 0, everywhere, everywhere, 0.1)
    assert plain[:2] == [FULL, RESIDUAL]
    assert begun[1] != RESIDUAL
