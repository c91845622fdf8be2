"""Effects of decisions: differences to the full step, linear in the sources, exact where errors are tiny."""

import numpy as np
import pytest

from difa_compile.decision import FULL, REUSE, Decision, Kind
from difa_compile.errors import ErrorTableError
from difa_compile.plan.schedule import forecast_weights
from difa_compile.planner.effects import (
    Effects,
    drift_of_gram,
    drift_of_values,
    kernel,
    reader_effect,
    tied,
    total_error,
    weights_of,
)
from tests.support.planner_problems import smooth_values

PROGRESS = tuple((10 - step) / 10 for step in range(10))
WINDOW = Decision.parse("window(band:3)")
RESIDUAL = Decision.parse("window(band:3)+residual")


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_reader_s_effect_is_what_its_weights_miss(order):
    values = smooth_values(1, 10)
    drift = drift_of_values(values, 6)
    sources = (6, 4, 3)[: order + 1]
    reader = REUSE if order == 0 else Decision(Kind.FORECAST, order=order)
    weights = weights_of(reader, PROGRESS, 8, sources)
    assert sum(weights) == pytest.approx(1)
    missed = np.asarray(weights) @ values[list(sources)] - values[8]
    np.testing.assert_allclose(reader_effect(drift, weights, [8 - s for s in sources], 8), missed, rtol=1e-12)


def test_the_basis_of_a_forecast_is_its_own():
    uneven = (1.0, 0.9, 0.5, 0.4, 0.0)
    by_step = Decision.parse("forecast:1(step)")
    assert weights_of(by_step, uneven, 3, (2, 1)) == forecast_weights(uneven, 3, (2, 1), "step") == (2.0, -1.0)
    assert weights_of(Decision.parse("forecast:1"), uneven, 3, (2, 1)) == pytest.approx((1.25, -0.25))


def test_a_gram_matrix_tells_the_same_as_the_values():
    values = smooth_values(2, 10) * 100
    by_gram, by_values = drift_of_gram(values @ values.T, 5), drift_of_values(values, 5)
    weights = np.array([2.0, -1.0])
    for step in range(3, 10):
        a, b = ((weights @ each[step, [1, 3]]) ** 2 for each in (by_gram, by_values))
        assert a.sum() == pytest.approx(b.sum(), rel=1e-6)


def test_an_error_of_a_millionth_of_the_output_keeps_its_digits():
    """60 dB: products of outputs in float32 would leave nothing of it."""
    rng = np.random.default_rng(0)
    values = np.full((3, 50), 1000.0)
    values[1] += 1e-3 * rng.standard_normal(50)
    exact = ((values[0] - values[1]) ** 2).sum()
    assert (drift_of_values(values, 2)[1, 1] ** 2).sum() == pytest.approx(exact, rel=1e-12)
    assert (drift_of_gram(values @ values.T, 2)[1, 1] ** 2).sum() == pytest.approx(exact, rel=0.2, abs=1e-7)


def test_what_lies_before_the_start_is_ignored():
    drift = np.full((4, 3, 2), 5.0)
    drift[0] = np.nan  # step 0 has no lag
    assert np.isfinite(Effects(drift).drift).all()
    assert not Effects(drift).drift[:, 0].any()


def test_tied_effects_add_up():
    members = [Effects(drift_of_values(smooth_values(seed, 5), 3), {WINDOW: np.ones((5, 6))}) for seed in (0, 1)]
    both = tied(members)
    np.testing.assert_allclose(both.drift, members[0].drift + members[1].drift)
    np.testing.assert_allclose(both.computed[WINDOW], 2)
    assert not tied([members[0], Effects(members[1].drift)]).computed
    short = tied([members[0], Effects(members[1].drift[:, :3])])
    np.testing.assert_allclose(short.drift, both.drift[:, :3])


def test_coherence():
    effects, response = np.ones((4, 1)) * [[1.0], [-1.0], [1.0], [-1.0]], np.full(4, 2.0)
    assert total_error(effects, response, 0.0) == pytest.approx(16)
    assert total_error(effects, response, 1.0) == pytest.approx(0)
    assert total_error(abs(effects), response, 1.0) == pytest.approx(64)
    assert 0 < total_error(effects, response, 0.9) < 16
    assert kernel(3, 0.5).tolist() == [[1, 0.5, 0.25], [0.5, 1, 0.5], [0.25, 0.5, 1]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((np.full((4, 3, 2), np.nan),), "NaN or infinite at step 1"),
        ((np.zeros((4, 3)),), "2 dimensions"),
        ((np.zeros((4, 1, 2)),), "no lag"),
        ((np.zeros((4, 3, 2)), {WINDOW: np.zeros((3, 2))}), "shape"),
        ((np.zeros((4, 3, 2)), {REUSE: np.zeros((4, 2))}), "no effects of its own"),
        ((np.zeros((4, 3, 2)), {FULL: np.zeros((4, 2))}), "no effects of its own"),
        ((np.zeros((4, 3, 2)), {Decision.parse("heads(0:reuse;1:full)"): np.zeros((4, 2))}), "what single heads have"),
        ((np.zeros((4, 3, 2)), {}, {WINDOW: np.zeros((4, 3, 2))}), "residual's age"),
        ((np.zeros((4, 3, 2)), {RESIDUAL: np.zeros((4, 2))}), "residual's age"),
        ((np.zeros((4, 3, 2)), {WINDOW: np.full((4, 2), np.inf)}), "infinite"),
        (([["a"]],), "no array of numbers"),
    ],
)
def test_damaged_tables_are_refused(arguments, said):
    with pytest.raises(ErrorTableError, match=said):
        Effects(*arguments)


@pytest.mark.parametrize(
    ("gram", "said"),
    [
        (np.array([[1.0, 2.0], [0.0, 1.0]]), "not symmetric"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "negative eigenvalue"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "NaN"),
        (np.zeros((2, 3)), "not symmetric"),
    ],
)
def test_what_is_no_gram_matrix_is_refused(gram, said):
    with pytest.raises(ErrorTableError, match=said):
        drift_of_gram(gram, 1)
