"""Accounts of a plan: what it costs, what it does, and what makes no problem at all."""

from dataclasses import replace

import numpy as np
import pytest

from difa_compile.decision import FULL, REUSE, Decision, Window
from difa_compile.errors import DecisionError, ErrorTableError
from difa_compile.planner.effects import Effects
from difa_compile.planner.problem import (
    FORECAST,
    Costs,
    Problem,
    Unit,
    accounts,
    additive_error,
    flat_response,
    outcome,
    psnr,
    rescaled,
)
from tests.support.planner_problems import make_problem, smooth_values

BAND = Window("band", 3)
WINDOW = Decision.parse("window(band:3)")
RESIDUAL = Decision.parse("window(band:3)+residual")


def windowed(steps=6, **costs):
    """A unit inside a block, with a window of effect 1 and residuals of effect 0.1 per step of age."""
    rng = np.random.default_rng(0)
    drift = 0.1 * rng.standard_normal((steps, steps, 3))
    ages = np.arange(steps)[None, :, None] * np.ones((steps, steps, 3)) * 0.1
    own = Effects(drift, {WINDOW: np.ones((steps, 3))}, {RESIDUAL: ages})
    block = Unit((0,), Effects(drift), Costs({FULL: 4.0}))
    priced = Costs({FULL: 2.0, WINDOW: 1.0, RESIDUAL: 1.5}, **{"residual": {BAND: 0.0}} | costs)
    return Problem(
        tuple((steps - s) / steps for s in range(steps)),
        (block, Unit((1,), own, priced, inside=0)),
        np.ones(steps),
        base=0.5,
        coherence=0.0,
    )


def test_a_full_plan_costs_all_and_changes_nothing():
    problem = make_problem(units=2)
    full = outcome(problem, [[FULL] * 8] * 2)
    assert (full.share, full.error, full.psnr) == (pytest.approx(1), 0, np.inf)
    assert full.decisions(problem) == ((FULL, FULL),) * 8


def test_readers_cost_what_they_read_and_keep():
    problem = make_problem(steps=6, base=0.0, costs=Costs({FULL: 10.0}, read=0.5, fill=0.1))
    found = accounts(problem, [[FULL, FULL, FORECAST, REUSE, FULL, FULL]])
    assert found.cost == pytest.approx(40 + 0.5 * 3 + 0.1 * 2)
    drift = problem.units[0].effects.drift
    np.testing.assert_allclose(found.effects[0, 2], 2 * drift[2, 1] - drift[2, 2], atol=1e-12)
    np.testing.assert_allclose(found.effects[0, 3], drift[3, 2])
    assert not found.effects[0, [0, 1, 4, 5]].any()


def test_windows_pass_their_errors_on_and_residuals_count_their_age():
    problem = windowed(residual={BAND: 0.25}, read=0.5)
    inner = [FULL, RESIDUAL, WINDOW, REUSE, RESIDUAL, FULL]
    found = accounts(problem, [[FULL] * 6, inner])
    np.testing.assert_allclose(found.effects[1, 1], 0.1)
    np.testing.assert_allclose(found.effects[1, 4], 0.4)
    np.testing.assert_allclose(found.effects[1, 3], problem.units[1].effects.drift[3, 1] + 1)
    assert found.cost == pytest.approx(6 * 4.5 + 2 + 1.5 + 1 + 0.5 + 1.5 + 2 + 0.25)


def test_what_a_block_covers_neither_costs_nor_changes():
    problem = windowed()
    found = accounts(problem, [[FULL, FULL, FORECAST, REUSE, FULL, FULL], [FULL, WINDOW, FULL, FULL, REUSE, FULL]])
    assert not found.effects[1, [2, 3]].any()
    assert found.cost == pytest.approx(6 * 0.5 + 4 * 4 + 2 + 1 + 2)
    lag = problem.units[1].effects.drift[4, 3] + 1  # of step 1, whose window it hands on
    np.testing.assert_allclose(found.effects[1, 4], lag)


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ([FULL, FORECAST, FULL, FULL, FULL, FULL], "more computed steps"),
        ([FULL, WINDOW, FULL, FULL, FULL, FULL], "no cost"),
        ([FULL, REUSE, REUSE, REUSE, REUSE, FULL], "3 were measured"),
    ],
)
def test_what_was_not_measured_has_no_account(column, said):
    with pytest.raises(ErrorTableError, match=said):
        accounts(make_problem(steps=6, lags=3), [column])


def test_a_residual_needs_a_full_step():
    with pytest.raises(ErrorTableError, match="no full step"):
        accounts(windowed(), [[FULL] * 6, [WINDOW, RESIDUAL, FULL, FULL, FULL, FULL]])


def test_errors_add_up_over_units_within_a_step_and_by_coherence_over_steps():
    problem = make_problem(units=2, coherence=0.0)
    columns = [[FULL, FULL, FORECAST, FULL, REUSE, FORECAST, FULL, FULL]] * 2
    both = accounts(problem, columns).effects
    by_hand = float(((both.sum(0) ** 2).sum(1) * problem.response**2).sum())
    assert outcome(problem, columns).error == pytest.approx(by_hand)
    alone = float(((both**2).sum((0, 2)) * problem.response**2).sum())
    assert additive_error(problem, columns) == pytest.approx(alone)


def test_the_response_is_rescaled():
    problem = make_problem()
    columns = [[FULL, FULL, FORECAST, FORECAST, FULL, FORECAST, FULL, FULL]]
    predicted = outcome(problem, columns).error
    again = rescaled(problem, predicted, predicted / 4)
    assert outcome(again, columns).error == pytest.approx(predicted / 4)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ErrorTableError, match="must be positive"):
            rescaled(problem, predicted, wrong)


def test_flat_response():
    response = flat_response(50)
    assert response[:-2].tolist() == [0.025] * 48
    assert response[-2] < response[-1] == pytest.approx(0.0625)
    assert flat_response(1).shape == (1,)


def test_psnr():
    assert psnr(1e-4) == pytest.approx(40)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"response": np.full(8, np.nan)}, "response"),
        ({"response": np.ones(7)}, "response"),
        ({"response": -np.ones(8)}, "response"),
        ({"units": ()}, "nothing to choose"),
        ({"coherence": 1.5}, "coherence"),
        ({"base": -1.0}, "outside of all sites"),
        ({"units": (Unit((0,), Effects(np.zeros((5, 3, 6))), Costs({FULL: 1.0})),)}, "unit 0 has effects of 5 steps"),
        ({"units": (Unit((0,), Effects(np.zeros((8, 3, 6))), Costs({REUSE: 1.0})),)}, "what full costs"),
        ({"units": (Unit((0,), Effects(np.zeros((8, 3, 6))), Costs({FULL: float("nan")})),)}, "costs of unit 0"),
        ({"units": (Unit((0,), Effects(np.zeros((8, 3, 6))), Costs({FULL: 1.0, WINDOW: 1.0})),)}, "not measured"),
        ({"units": (Unit((0,), Effects(np.zeros((8, 3, 6))), Costs({FULL: 0.0})),), "base": 0.0}, "costs nothing"),
        ({"units": (Unit((0,), Effects(np.zeros((8, 3, 6))), Costs({FULL: 1.0}), inside=0),)}, "inside unit 0"),
        ({"units": (Unit((0, 0), Effects(np.zeros((8, 3, 6))), Costs({FULL: 1.0})),)}, "two units"),
    ],
)
def test_what_makes_no_problem(change, said):
    with pytest.raises(ErrorTableError, match=said):
        replace(make_problem(), **change)


@pytest.mark.parametrize("readers", [(), (FULL,), (Decision.parse("reuse+cfg"),), (Decision.parse("forecast:3"),)])
def test_readers_that_are_none(readers):
    with pytest.raises(DecisionError):
        replace(make_problem(), readers=readers)


def test_smooth_values_are_smooth():
    values = smooth_values(0, 40)
    assert ((values[2:] - 2 * values[1:-1] + values[:-2]) ** 2).sum() < (values[1:] ** 2).sum() / 100


# Streams


def test_nothing_reads_across_the_begin_of_a_stream():
    problem = replace(make_problem(steps=8, readers=(REUSE, FORECAST)), begins=(4,))
    assert problem.streams == (0, 0, 0, 0, 1, 1, 1, 1)
    good = [FULL, FULL, FORECAST, REUSE, FULL, REUSE, FULL, FORECAST]
    assert outcome(problem, [good]) == outcome(replace(problem, begins=()), [good])
    for step, decision in ((4, REUSE), (4, FORECAST), (5, FORECAST)):
        column = [FULL, FULL, FULL, FULL, FULL, FULL, FULL, FULL]
        column[step] = decision
        with pytest.raises(ErrorTableError, match=f"step {step}: {decision} reads what step . has kept, which is gone"):
            outcome(problem, [column])
        assert outcome(replace(problem, begins=()), [column]).share < 1


def test_a_residual_is_of_its_own_stream():
    problem = replace(windowed(), begins=(3,))
    columns = [[FULL] * 6, [FULL, FULL, RESIDUAL, WINDOW, WINDOW, RESIDUAL]]
    with pytest.raises(ErrorTableError, match=r"step 5: .*residual reads what step 1 has kept.* gone at step 3"):
        outcome(problem, columns)
    columns[1][4] = FULL
    assert outcome(problem, columns).share < 1


@pytest.mark.parametrize("begins", [(0,), (8,), (3, 3), (4, 2), (-1,)])
def test_begins_that_make_no_sense(begins):
    with pytest.raises(ErrorTableError, match="they must ascend, from 1 to 7"):
        replace(make_problem(steps=8), begins=begins)


def test_a_full_step_keeps_one_residual():
    """And what taking it costs must be known."""
    other = Decision.parse("window(band:1)+residual")
    made = windowed()
    unit = made.units[1]
    own = replace(unit.effects, residual={**unit.effects.residual, other: unit.effects.residual[RESIDUAL]})
    priced = replace(unit.costs, computed={**unit.costs.computed, other: 0.5})
    with pytest.raises(ErrorTableError, match=r"nobody knows what taking the residual of window\(band:1\)"):
        replace(made, units=(made.units[0], replace(unit, effects=own, costs=priced)))
    priced = replace(priced, residual={BAND: 0.25, Window("band", 1): 0.125})
    made = replace(made, units=(made.units[0], replace(unit, effects=own, costs=priced)))
    column = [FULL, RESIDUAL, FULL, other, other, FULL]
    assert accounts(made, [[FULL] * 6, column]).cost == pytest.approx(6 * 4.5 + 3 * 2 + 1.5 + 2 * 0.5 + 0.25 + 0.125)
    with pytest.raises(ErrorTableError, match="a full step keeps one"):
        accounts(made, [[FULL] * 6, [FULL, RESIDUAL, other, FULL, FULL, FULL]])
