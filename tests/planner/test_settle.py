"""Decisions changed one by one: what is found is counted as a plan's is, and never worse than what was begun with."""

from dataclasses import replace

import numpy as np
import pytest

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.planner.choice import Planner, choose
from difa_compile.planner.problem import FORECAST, outcome
from difa_compile.planner.settle import _Plan, settled
from tests.planner.test_choice import nested
from tests.planner.test_forms import RESIDUAL, WINDOW, problem


def alone(steps=14, coherence=0.9, **options):
    return replace(problem(steps=steps, readers=(FORECAST,), **options), coherence=coherence)


@pytest.mark.parametrize("begins", [(), (6,)])
@pytest.mark.parametrize("budget", [0.35, 0.5, 0.8])
def test_it_is_never_worse_and_keeps_to_the_budget(budget, begins):
    made = alone(begins=begins)
    start = outcome(made, Planner(made)._bisected(budget, np.inf)[1].columns)
    for price in (1e-6, 1e-3, 1.0):
        found = settled(made, start, [0], price, budget)
        assert found.share <= budget * (1 + 1e-6)
        assert found.error <= start.error
        assert found == outcome(made, found.columns)
        assert found.columns[0][0].kind.reads is None


def test_something_is_found():
    made = alone()
    start = outcome(made, [tuple(FULL if step % 4 == 0 else REUSE for step in range(14))])
    found = settled(made, start, [0], 1e-3, start.share)
    assert found.error < 0.8 * start.error


@pytest.mark.parametrize("coherence", [0.0, 0.9])
def test_what_is_kept_of_a_plan_is_what_its_outcome_says(coherence):
    """Errors and costs are those of whole plans, however many single changes lie behind them."""
    made = alone(coherence=coherence, begins=(6,))
    plan = _Plan(made, [tuple(FULL if step % 3 == 0 else REUSE for step in range(14))], [0])
    for price in (1e-3, 1e-2, 1e-1, 1e-4):
        plan.sweep(lambda error, cost, price=price: error + price * cost)
        whole = outcome(made, plan.columns)
        assert plan.cost == pytest.approx(whole.share * made.full_cost, rel=1e-9)
        assert plan._error == pytest.approx(whole.error, rel=1e-6, abs=1e-12)


def test_inside_blocks_what_is_covered_stays_as_it_is():
    made = nested()
    start = choose(made, 0.6, polish=False)
    found = settled(made, start, [1, 3], 1e-4, 0.6)
    assert found.error <= start.error
    assert found.share <= 0.6 * (1 + 1e-9)
    for unit in (1, 3):
        for step, decision in enumerate(found.columns[unit]):
            if found.columns[unit - 1][step].kind.reads == "output":
                assert decision == FULL


def test_more_ways_to_compute_are_never_worse():
    for seed in range(3):
        made = alone(seed=seed)
        full = replace(made.units[0].costs, computed={FULL: 1.0}, residual={})
        own = replace(made.units[0].effects, computed={}, residual={})
        without = replace(made, units=(replace(made.units[0], costs=full, effects=own),))
        for budget in (0.4, 0.55, 0.8):
            assert choose(made, budget).error <= choose(without, budget).error * (1 + 1e-9)
            rough = choose(made, budget, polish=False)
            assert rough.error <= choose(without, budget, polish=False).error * (1 + 1e-9)


def test_columns_that_cannot_be_run_are_no_changes():
    made = alone(ages=2, begins=(6,))
    (unit,) = _Plan(made, [(FULL,) * 14], [0])._units.values()
    now = unit.state((FULL,) * 14)

    def possible(*column):
        return unit.change(now, (*column, *[FULL] * (14 - len(column)))) is not None

    assert possible(FULL, RESIDUAL, RESIDUAL)
    assert not possible(FULL, RESIDUAL, RESIDUAL, RESIDUAL), "older than was measured"
    assert not possible(FULL, FORECAST), "too few outputs"
    assert not possible(FULL, *[REUSE] * 5 + [REUSE]), "another stream, and too far back"
    assert not possible(*[FULL] * 6, RESIDUAL), "the residual of another stream"
    assert not possible(FULL, RESIDUAL, Decision.parse("window(band:1)+residual")), "two residuals of one step"
    assert possible(FULL, WINDOW, RESIDUAL, FORECAST)
