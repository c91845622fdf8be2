"""Choices keep to their budgets, are as good as the best of all plans, and say what is not possible."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from difa_compile.decision import FULL, REUSE, Decision, Window
from difa_compile.errors import BudgetError, ErrorTableError
from difa_compile.plan.schedule import assign_roles
from difa_compile.planner.choice import Planner, choose, choose_error, knapsack
from difa_compile.planner.effects import Effects, drift_of_values
from difa_compile.planner.problem import (
    FORECAST,
    Costs,
    Problem,
    Unit,
    accounts,
    additive_error,
    flat_response,
    outcome,
)
from tests.support.planner_problems import all_columns, make_problem, possible, smooth_values

BAND = Window("band", 3)
WINDOW = Decision.parse("window(band:3)")
RESIDUAL = Decision.parse("window(band:3)+residual")
SHARED = Decision.parse("full+cfg")


def nested(steps=16, blocks=2, seed=0):
    """Blocks with attention inside, which has windows, residuals and shared halves."""
    units = []
    rng = np.random.default_rng(seed)
    for block in range(blocks):
        drift = drift_of_values(smooth_values(seed + block, steps), 8)
        units.append(Unit((2 * block,), Effects(drift), Costs({FULL: 3.0}, read=0.05, fill=0.05)))
        inner = drift_of_values(smooth_values(seed + 50 + block, steps) + rng.standard_normal((steps, 6)), 8)
        ages = 0.002 * np.arange(9)[None, :, None] * rng.standard_normal((steps, 9, 6))
        own = {WINDOW: 0.02 * rng.standard_normal((steps, 6)), SHARED: 0.01 * rng.standard_normal((steps, 6))}
        costs = Costs(
            {FULL: 1.0, WINDOW: 0.4, RESIDUAL: 0.45, SHARED: 0.5}, read=0.02, fill=0.02, residual={BAND: 0.03}
        )
        units.append(Unit((2 * block + 1,), Effects(inner, own, {RESIDUAL: ages}), costs, inside=2 * block))
    progress = tuple((steps - step) / steps for step in range(steps))
    return Problem(progress, tuple(units), flat_response(steps), 0.2)


@pytest.mark.parametrize("budget", [0.35, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("readers", [(FORECAST,), (REUSE, FORECAST)])
def test_one_unit_has_the_best_plan_there_is(budget, readers):
    problem = make_problem(steps=7, readers=readers)
    found = choose(problem, budget)
    plans = (possible(outcome, problem, [column]) for column in all_columns(problem))
    best = min(plan.error for plan in plans if plan is not None and plan.share <= budget)
    assert found.share <= budget
    if readers == (REUSE, FORECAST):
        assert found.error == pytest.approx(best, rel=1e-9)  # of one unit and without coherence the error is additive
    else:
        assert found.error >= best * (1 - 1e-9)


def test_more_budget_is_never_worse():
    problem = make_problem(steps=20, units=3, readers=(REUSE, FORECAST))
    errors = [choose(problem, budget).error for budget in (0.25, 0.3, 0.4, 0.5, 0.7, 1.0)]
    assert all(later <= earlier * 1.05 for earlier, later in pairwise(errors))
    assert errors[-1] == 0


def test_nested_units_keep_to_the_budget_and_can_be_run():
    problem = nested()
    for budget in (0.25, 0.4, 0.6, 0.8):
        found = choose(problem, budget)
        assert found.share <= budget
        assert found.share > budget - 0.12
        again = outcome(problem, found.columns)
        assert again == found
        rows = found.decisions(problem)
        assign_roles(rows, (None, 0, None, 2))  # raises if it cannot be run
        assert len(rows) == 16
        assert len(rows[0]) == 4


def test_nested_choice_beats_blocks_alone_where_windows_are_good():
    problem = nested()
    alone = replace(
        problem,
        units=tuple(
            replace(unit, costs=replace(unit.costs, computed={FULL: unit.costs.computed[FULL]}))
            for unit in problem.units
        ),
    )
    assert choose(problem, 0.8).error < choose(alone, 0.8).error
    used = {decision for column in choose(problem, 0.8).columns for decision in column}
    assert used & {WINDOW, RESIDUAL, SHARED}


def test_polish_sees_coherence():
    """Values that zigzag: with coherence, consecutive errors of opposite sign cancel, which paths cannot know."""
    rng = np.random.default_rng(3)
    values = smooth_values(3, 30) + 0.05 * ((-1.0) ** np.arange(30))[:, None] * rng.standard_normal(6)
    unit = Unit((0,), Effects(drift_of_values(values, 10)), Costs({FULL: 1.0}))
    problem = Problem(tuple((30 - s) / 30 for s in range(30)), (unit,), flat_response(30), 0.0, coherence=0.9)
    rough, fine = (choose(problem, 0.5, polish=polish) for polish in (False, True))
    assert fine.error <= rough.error
    assert fine.share <= 0.5


def test_worst_cell_first():
    problem = make_problem(steps=20, readers=(REUSE, FORECAST))

    def worst(found):
        return ((accounts(problem, found.columns).effects ** 2).sum(2) * problem.response**2).max()

    by_sum, by_worst = choose(problem, 0.4), choose(problem, 0.4, worst=True)
    assert by_worst.share <= 0.4
    assert worst(by_worst) <= worst(by_sum) * (1 + 1e-9)


@pytest.mark.slow
def test_an_error_is_kept_to_with_little_time():
    problem = make_problem(steps=20, readers=(REUSE, FORECAST))
    wanted = choose(problem, 0.5).error
    found = choose_error(problem, wanted)
    assert found.error <= wanted
    assert found.share <= 0.5 + 1e-3
    assert choose_error(problem, 1e-300).share == pytest.approx(1)
    assert choose_error(problem, 1e300).share == pytest.approx(Planner(problem).least.share)


def test_an_error_that_only_the_full_model_keeps_to():
    """Whose share, added up step by step, comes to 1 and not to a rounding above."""
    problem = make_problem(steps=8, costs=Costs({FULL: 0.7}))
    assert outcome(problem, [(FULL,) * 8]).share == 1
    found = choose_error(problem, 1e-300)
    assert (set(found.columns[0]), found.error) == ({FULL}, 0)


@pytest.mark.parametrize("budget", [0, -0.1, 1.0001, float("nan"), float("inf"), True, "half", None])
def test_what_is_no_budget(budget):
    with pytest.raises(BudgetError, match="above 0 and at most 1"):
        choose(make_problem(), budget)


def test_an_impossible_budget_names_the_nearest_possible():
    problem = make_problem(steps=12, lags=4)
    with pytest.raises(BudgetError, match=r"the least is (0\.\d+)") as raised:
        choose(problem, 0.1)
    named = float(str(raised.value).split("the least is ")[1].split(" ")[0])
    assert choose(problem, named).share <= named


@pytest.mark.parametrize("error", [0, -1, float("nan"), float("inf"), "low"])
def test_what_is_no_error(error):
    with pytest.raises(BudgetError, match="positive mean squared error"):
        choose_error(make_problem(), error)


def test_nan_in_a_table():
    drift = np.zeros((8, 4, 3))
    drift[5, 2, 1] = np.nan
    with pytest.raises(ErrorTableError, match="step 5"):
        choose(replace(make_problem(), units=(Unit((0,), Effects(drift), Costs({FULL: 1.0})),)), 0.5)


@pytest.mark.slow
def test_sixty_sites_take_seconds():
    rng = np.random.default_rng(0)
    costs = Costs({FULL: 1.0}, read=0.01)
    units = tuple(
        Unit((site,), Effects(drift_of_values(rng.standard_normal((50, 8)).cumsum(0) * 0.1, 12)), costs)
        for site in range(60)
    )
    problem = Problem(tuple((50 - s) / 50 for s in range(50)), units, flat_response(50), 1.0)
    found = choose(problem, 0.4, polish=False)
    assert 0.38 < found.share <= 0.4


def test_the_bound_is_one():
    problem = make_problem(steps=16, units=2, readers=(REUSE, FORECAST))
    planner = Planner(problem)
    for budget in (0.3, 0.5, 0.7):
        found = planner.choose(budget, polish=False)
        assert planner.bound(budget) <= additive_error(problem, found.columns) * (1 + 1e-9)
    assert planner.bound(0.5) > 0
    inside = nested()
    found = choose(inside, 0.5, polish=False)
    assert 0 < Planner(inside).bound(0.5) <= additive_error(inside, found.columns) * (1 + 1e-9)


def test_of_one_unit_the_bound_is_close():
    """It takes each number of computed steps by itself; one price for all of them is further off."""
    problem = make_problem(steps=16, readers=(REUSE, FORECAST))
    planner = Planner(problem)
    for budget in (0.3, 0.5, 0.7):
        found = planner.choose(budget, polish=False)
        assert planner.bound(budget) >= additive_error(problem, found.columns) * 0.97


def test_there_is_no_bound_where_more_than_full_is_computed():
    window = Decision.parse("window(band:3)")
    problem = make_problem(steps=8)
    effects = Effects(problem.units[0].effects.drift, {window: np.full((8, 6), 1e-3)})
    unit = Unit((0,), effects, Costs({FULL: 1.0, window: 0.5}))
    assert Planner(replace(problem, units=(unit,))).bound(0.5) == 0


def test_the_bound_is_one_for_plans_of_other_readers():
    """Reuse, where values do not go on as before, is better than a forecast, and a plan may reuse at all steps."""
    rng = np.random.default_rng(2)
    unit = Unit((0,), Effects(drift_of_values(rng.standard_normal((16, 6)), 16)), Costs({FULL: 1.0}))
    problem = Problem(tuple((16 - s) / 16 for s in range(16)), (unit,), flat_response(16), 0.1, (FORECAST,))
    planner = Planner(problem)
    for budget in (0.4, 0.6):
        found = choose(replace(problem, readers=(REUSE,)), budget)
        assert additive_error(problem, found.columns) < additive_error(problem, planner.choose(budget).columns)
        assert 0 < planner.bound(budget) <= additive_error(problem, found.columns) * (1 + 1e-9)


def test_knapsack():
    rng = np.random.default_rng(0)
    costs, errors = rng.uniform(0, 1, (4, 5)), rng.uniform(0, 1, (4, 5))
    errors[1, 2] = np.inf
    for total in (0.8, 1.5, 2.5):
        tried = [
            (sum(errors[unit, option] for unit, option in enumerate(options)), options)
            for options in product(range(5), repeat=4)
            if sum(costs[unit, option] for unit, option in enumerate(options)) <= total
        ]
        if not tried:
            continue
        taken = knapsack(costs, errors, total)
        assert sum(costs[unit, option] for unit, option in enumerate(taken)) <= total
        assert sum(errors[unit, option] for unit, option in enumerate(taken)) == pytest.approx(min(tried)[0], rel=0.02)
    assert knapsack(costs, errors, 0.0) == [int(option) for option in costs.argmin(1)]
    assert knapsack(costs[:1], errors[:1], 1.0) == [int(errors[0].argmin())]


@pytest.mark.parametrize("make", [lambda: make_problem(steps=16, units=2, readers=(REUSE, FORECAST)), nested])
def test_no_choice_reads_across_the_begin_of_a_stream(make):
    """At any budget and by any way; steps that are moved stay within what can be run."""
    begins = (3, 10)
    problem = replace(make(), begins=begins)
    planner = Planner(problem)
    free = Planner(replace(problem, begins=()))
    for budget, worst in ((planner.least.share, False), (0.45, True), (0.6, False), (0.8, False)):
        found = planner.choose(budget, worst=worst)
        assert found.share <= budget * (1 + 1e-9)
        assert outcome(problem, found.columns) == found  # which raises for what reads across
        assert all(found.columns[unit][begin] == FULL for unit in planner.outer for begin in begins)
    assert planner.least.share > free.least.share
    start = planner.choose(0.6)
    for each in planner.neighbours(start, 0.6):
        assert outcome(problem, each.columns) == each


def test_steps_of_units_that_can_be_computed_in_several_ways_move_where_all_are_in_full():
    plain = make_problem(steps=16, readers=(REUSE, FORECAST))
    (unit,) = plain.units
    own = {SHARED: 0.01 * np.random.default_rng(0).standard_normal((16, 6))}
    unit = replace(unit, effects=replace(unit.effects, computed=own), costs=Costs({FULL: 1.0, SHARED: 0.5}))
    planner = Planner(replace(plain, units=(unit,)))
    start = Planner(plain).choose(0.5)
    moved = planner.neighbours(start, 0.5)
    assert [each.columns for each in moved] == [each.columns for each in Planner(plain).neighbours(start, 0.5)]
    assert moved
    columns = [tuple(SHARED if place == 15 else each for place, each in enumerate(start.columns[0]))]
    assert planner.neighbours(outcome(planner.problem, columns), 1.0) == []
