"""Weights fitted to a table: right where the answer is known, the least error where it is not, and never far out."""

from dataclasses import replace

import numpy as np
import pytest

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.plan.schedule import forecast_weights, output_sources
from difa_compile.planner.choice import choose
from difa_compile.planner.effects import Effects, drift_of_values
from difa_compile.planner.fitting import FITTINGS, Fitting, fit, raised
from difa_compile.planner.problem import FORECAST, Costs, Problem, Unit, outcome
from tests.planner.test_problem import BAND, WINDOW, windowed
from tests.support.planner_problems import make_problem

SECOND = replace(FORECAST, order=2)


def columns_of(*texts):
    letters = {"F": FULL, ".": REUSE, "P": FORECAST, "Q": SECOND, "W": WINDOW}
    return [tuple(letters[letter] for letter in text) for text in texts]


def of_values(values, coherence=0.0):
    """A problem of one unit whose outputs are ``values`` (T, K)."""
    steps = len(values)
    unit = Unit((0,), Effects(drift_of_values(np.asarray(values), steps)), Costs({FULL: 1.0}))
    progress = tuple((steps - step) / steps for step in range(steps))
    return Problem(progress, (unit,), np.ones(steps), coherence=coherence)


def test_outputs_that_grow_by_a_factor_are_forecast_without_error():
    """By a line they are not; the weights are those that solve f(s) = 2^s at the sources and the step."""
    problem = of_values(2.0 ** np.arange(8)[:, None] * [[1.0, -3.0]])
    (column,) = columns_of("FFPFPPFP")
    plain = outcome(problem, [column])
    found = fit(problem, plain, 0.0)
    assert plain.error > 1
    assert found.error < 1e-15 * plain.error  # weights are rounded to eight decimals
    for step, sources in enumerate(output_sources(column)):
        if sources:
            newest, before = (2.0**source for source in sources)
            first = (2.0**step - before) / (newest - before)
            assert found.weights[0][step] == pytest.approx((first, 1 - first))
        else:
            assert found.weights[0][step] == ()
    assert found.columns == plain.columns
    assert found.share == plain.share


@pytest.mark.parametrize("coherence", [0.0, 0.97])
@pytest.mark.parametrize("firmness", [0.0, 0.3])
def test_no_other_weights_have_less_error(coherence, firmness):
    problem = make_problem(steps=12, units=2, coherence=coherence)
    plain = outcome(problem, columns_of("FFPPFFQPF.FP", "FFFPPPPFQQFF"))
    found = fit(problem, plain, firmness)

    def objective(weights):
        differing = 0.0
        for unit, column in enumerate(plain.columns):
            for step, own in enumerate(weights[unit]):
                if own:
                    known = forecast_weights(problem.progress, step, output_sources(column)[step])
                    lags = [step - source for source in output_sources(column)[step]]
                    drift = problem.units[unit].effects.drift[step, lags]
                    moved = np.subtract(own, known)[1:, None] * (drift[1:] - drift[0]) * problem.response[step]
                    differing += (moved**2).sum()
        return outcome(problem, plain.columns, weights).error + firmness * differing

    least = objective(found.weights)
    assert least <= plain.error
    rng = np.random.default_rng(0)
    for _ in range(50):
        other = [list(column) for column in found.weights]
        for column in other:
            for step, own in enumerate(column):
                if own:
                    moved = 0.02 * rng.standard_normal(len(own))
                    column[step] = tuple(np.add(own, moved - moved.mean()))
        assert objective(tuple(map(tuple, other))) >= least * (1 - 1e-9)


def test_weights_sum_to_one_and_firmly_held_they_are_the_polynomials():
    problem = make_problem(steps=10, coherence=0.97)
    plain = outcome(problem, columns_of("FFPPFPQFPP"))
    for firmness in (0.0, 0.1, 5.0):
        for own in fit(problem, plain, firmness).weights[0]:
            assert not own or sum(own) == pytest.approx(1)
    firm = fit(problem, plain, 1e9)
    assert firm.error == pytest.approx(plain.error, rel=1e-6)
    sources = output_sources(plain.columns[0])
    assert firm.weights[0][6] == pytest.approx(forecast_weights(problem.progress, 6, sources[6]), abs=1e-6)


def test_what_a_window_did_to_a_source_is_told():
    """The forecast inside a block reads a windowed step, whose error its weights pass on."""
    problem = windowed(steps=6, read=0.1)
    problem = replace(problem, readers=(FORECAST, REUSE))
    plain = outcome(problem, columns_of("FFFFFF", "FFWPFF"))
    found = fit(problem, plain, 0.0)
    assert found.error < plain.error
    assert found.weights[0] == ((),) * 6
    assert abs(found.weights[1][3][0]) < 0.9, "the window's error is much larger than the drift of the full step"
    assert BAND in problem.units[1].costs.residual


def test_nothing_is_fitted_where_nothing_is_forecast_or_known():
    problem = make_problem(steps=6)
    for text in ("FFFFFF", "FF.F.."):
        plain = outcome(problem, columns_of(text))
        for fitting in FITTINGS:
            assert fitting(problem, plain) is plain
    constant = of_values(np.ones((6, 2)))
    plain = outcome(constant, columns_of("FFPFPP"))
    assert fit(constant, plain, 0.0) is plain


def test_weights_that_would_amplify_noise_are_the_polynomials():
    """Two sources that hardly differ tell a line of any slope: 1e4 times their difference would fit best."""
    values = np.array([[0.0], [1e-4], [1.0], [2.0]])
    problem = of_values(values)
    found = fit(problem, outcome(problem, columns_of("FFPF")), 0.0)
    assert found.weights == ()
    more = of_values(np.concatenate([values, 2.0 ** np.arange(4)[:, None]]))
    found = fit(more, outcome(more, columns_of("FFPFFPFF")), 0.0)
    assert found.weights[0][2] == ()
    assert found.weights[0][5] != ()


def test_forecasts_are_raised_where_there_are_sources():
    problem = make_problem(steps=9, lags=4)
    plain = outcome(problem, columns_of("FFPFPPFPF"))
    higher = raised(problem, plain, 2)
    assert [str(decision) for decision in higher.columns[0]] == [
        "full", "full", "forecast:1", "full", "forecast:2", "forecast:1", "full", "forecast:1", "full",
    ]  # fmt: skip
    assert raised(problem, plain, 1) is plain
    again = replace(problem, begins=(3,))
    plain = outcome(again, columns_of("FFPFFPPFF"))
    assert raised(again, plain, 2) is plain


def test_a_fitting_raises_and_fits():
    problem = make_problem(steps=16, coherence=0.97)
    plain = choose(problem, 0.5)
    found = Fitting(2, 0.1)(problem, plain)
    assert found.error < plain.error
    assert any(decision.order == 2 for decision in found.columns[0])
    assert [decision == FULL for decision in found.columns[0]] == [decision == FULL for decision in plain.columns[0]]
    assert Decision.parse("forecast:2") in found.columns[0]
