"""What a decision at a site does to the model's output, in K numbers per cell: linear, so that sums tell the truth.

The *effect* of a decision at a step is the change of the model's output (after guidance) that it causes alone, put
through one random projection to K numbers that is the same for all sites and steps; its squared norm is the mean
squared change of the output. Effects are kept as differences to the step computed in full, never as products of two
outputs: at 60 dB the error is a millionth of the output, and nothing of that size is lost.

For weights ``w_j`` over source steps ``s_j`` that sum to 1, with ``d[t, i]`` the effect of giving step t what step
t - i computed (:attr:`Effects.drift`),

    effect(t) = sum over j of w_j d[t, t - s_j]

Effects of several sites at a step add up (first order), and those of several steps add up in the image as
:func:`total_error` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from difa_compile.decision import FULL, Decision, Kind
from difa_compile.errors import ErrorTableError
from difa_compile.plan.schedule import forecast_weights

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Effects:
    """The effects of one site, or of sites that share one path, measured in one full run of T steps.

    ``drift`` (T, W + 1, K): ``drift[t, i]`` is the effect at step t of the output that step t - i computed; zero for
    i = 0, ignored where t - i is negative. W is the longest lag that was measured.
    ``computed`` decision -> (T, K): the effect of a computed decision other than full (a window, shared halves).
    ``residual`` decision -> (T, A + 1, K): the effect at step t of a window with the residual of full step t - i, up to
    the greatest age A that was measured, W at most.
    """

    drift: Array
    computed: Mapping[Decision, Array] = field(default_factory=dict)
    residual: Mapping[Decision, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        drift = _numbers(self.drift, "the drift", 3)
        steps, lags, _ = drift.shape
        if lags < 2 or not steps:
            raise ErrorTableError(
                f"a drift of shape {drift.shape} has no lag to choose from; give (steps, lags + 1, K)"
            )
        for step in range(steps):
            drift[step, min(step, lags - 1) + 1 :] = 0
        drift[:, 0] = 0
        object.__setattr__(self, "drift", _finite(drift, "the drift"))
        own = {decision: _finite(_numbers(a, str(decision), 2), str(decision)) for decision, a in self.computed.items()}
        object.__setattr__(self, "computed", own)
        kept = {}
        for decision, array in self.residual.items():
            values = _numbers(array, str(decision), 3)
            for step in range(min(steps, len(values))):
                values[step, step + 1 :] = 0
            kept[decision] = _finite(values, str(decision))
        object.__setattr__(self, "residual", kept)
        numbers = drift.shape[2]
        for decision, values in (*self.computed.items(), *self.residual.items()):
            ages = [values.shape[1]] if values.ndim == 3 and 2 <= values.shape[1] <= lags else []
            if values.shape != (steps, *ages, numbers):
                raise ErrorTableError(f"the effects of {decision} have shape {values.shape}, the drift {drift.shape}")
            if (
                decision.kind.reads == "output"
                or decision == FULL
                or (decision in self.computed and decision in self.residual)
            ):
                raise ErrorTableError(f"{decision} has no effects of its own to be measured here")
            if decision.groups and decision.reads_caches:
                raise ErrorTableError(
                    f"{decision} reads what single heads have left in earlier steps; of decisions by heads only those "
                    "whose heads are full or windowed are planned"
                )
            if (decision.kind is Kind.WINDOW_RESIDUAL) != (decision in self.residual):
                raise ErrorTableError(f"{decision}: effects by the residual's age belong to window+residual alone")

    @property
    def steps(self) -> int:
        """T."""
        return len(self.drift)

    @property
    def lags(self) -> int:
        """W, the longest lag."""
        return int(self.drift.shape[1]) - 1

    def ages(self, decision: Decision) -> int:
        """A, the greatest age at which the residual of a window+residual was measured."""
        return int(self.residual[decision].shape[1]) - 1

    @property
    def size(self) -> int:
        """K."""
        return int(self.drift.shape[2])


def tied(members: Sequence[Effects]) -> Effects:
    """The effects of sites that share one path: the sums of theirs; of lags and decisions, those that all of them
    have."""
    first = members[0]
    lags = min(each.lags for each in members)
    ages = {d: min(lags, *(each.ages(d) for each in members))
            for d in first.residual if all(d in each.residual for each in members)}  # fmt: skip
    return Effects(
        np.sum([each.drift[:, : lags + 1] for each in members], axis=0),
        {d: np.sum([each.computed[d] for each in members], axis=0)
         for d in first.computed if all(d in each.computed for each in members)},
        {d: np.sum([each.residual[d][:, : most + 1] for each in members], axis=0) for d, most in ages.items()},
    )  # fmt: skip


def drift_of_values(values: Array, lags: int) -> Array:
    """The drift (T, lags + 1, K) of a site whose outputs in the full run are ``values`` (T, K), unseen by gradients:
    ``values[t - i] - values[t]``."""
    values = _numbers(values, "the values", 2)
    drift = np.zeros((len(values), lags + 1, values.shape[1]))
    for lag in range(1, min(lags, len(values) - 1) + 1):
        drift[lag:, lag] = values[:-lag] - values[lag:]
    return drift


def drift_of_gram(gram: Array, lags: int) -> Array:
    """The drift of a site of which only ``gram[t, s] = <output_t, output_s>`` (T, T) is known.

    The outputs are taken from its eigenvectors, so K = T and all squared errors of weights that sum to 1 are those of
    the Gram matrix, to about 1e-15 of its largest entry. Raises :class:`ErrorTableError` if it is not symmetric or has
    a negative eigenvalue that is more than rounding.
    """
    gram = _finite(_numbers(gram, "the Gram matrix", 2), "the Gram matrix")
    if gram.shape[0] != gram.shape[1] or not np.allclose(gram, gram.T, rtol=1e-9, atol=1e-9 * np.abs(gram).max()):
        raise ErrorTableError("the Gram matrix is not symmetric")
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    if values[0] < -1e-6 * max(values[-1], 0):
        raise ErrorTableError(f"the Gram matrix has the negative eigenvalue {values[0]:.3g}: it is of no outputs")
    return drift_of_values(vectors * np.sqrt(np.maximum(values, 0)), lags)


def reader_effect(drift: Array, weights: Sequence[float], lags: Sequence[int], step: int) -> Array:
    """The effect (K,) at ``step`` of the outputs of ``lags`` steps before, summed by ``weights``."""
    return np.asarray(weights, dtype=np.float64) @ drift[step, list(lags)]


def weights_of(decision: Decision, progress: Sequence[float], step: int, sources: Sequence[int]) -> tuple[float, ...]:
    """The weights by which a reader at ``step`` sums the outputs of ``sources``: 1 for reuse."""
    if decision.kind is Kind.REUSE:
        return (1.0,)
    assert decision.basis is not None  # a forecast has one
    return forecast_weights(progress, step, sources, decision.basis)


def total_error(effects: Array, response: Array, coherence: float) -> float:
    """The mean squared error of the image: ``effects`` (T, K) of the steps, ``response`` (T,) their amplitudes r in it.

        E = sum over t, u of coherence^|t - u| r_t r_u <effect_t, effect_u>

    With coherence 0 errors of different steps are taken to be unrelated, with 1 to add up as vectors.
    """
    scaled = effects * response[:, None]
    return max(0.0, float(((kernel(len(scaled), coherence) @ scaled) * scaled).sum()))


def kernel(steps: int, coherence: float) -> Array:
    """``coherence^|t - u|`` (T, T)."""
    apart = np.abs(np.subtract.outer(np.arange(steps), np.arange(steps)))
    return np.asarray(np.power(float(coherence), apart), dtype=np.float64)


def _numbers(array: Array, what: str, dimensions: int) -> Array:
    try:
        values = np.array(array, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ErrorTableError(f"{what} of a table of errors is no array of numbers: {error}") from error
    if values.ndim != dimensions:
        raise ErrorTableError(f"{what} of a table of errors has {values.ndim} dimensions; it needs {dimensions}")
    return values


def _finite(values: Array, what: str) -> Array:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise ErrorTableError(
            f"{what} of a table of errors is NaN or infinite at step {bad[0][0]} ({len(bad)} numbers); measure it again"
        )
    values.flags.writeable = False
    return values
