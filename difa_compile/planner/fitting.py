"""The weights of forecasts, fitted to what was measured.

A forecast sums what earlier steps have computed, by the weights of a polynomial that knows the schedule alone. For a
plan whose decisions are chosen, the table of errors knows more: the effect of a forecast at step t is linear in its
weights (:mod:`difa_compile.planner.effects`), so the error of the image (:func:`~.effects.total_error`) is quadratic in
those of all forecasts together, with the errors of one step making up for those of others. Weights that sum to 1 are
kept to by writing them as the polynomial's p plus differences d from it, and near it by a ridge:

    least over d of  E(p + d) + firmness * sum over i of H_ii d_i^2,     H the second derivatives of E / 2

which is one linear system. Weights are numbers that a variant is given: they cost no time when sampling. Forecasts of
more sources, which have more to fit, cost what these take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from difa_compile.decision import Decision
from difa_compile.plan.schedule import output_sources
from difa_compile.planner.effects import Array, kernel, reader_effect, weights_of
from difa_compile.planner.problem import (
    Outcome,
    Problem,
    accounts,
    covered_steps,
    effects_of,
    outcome,
)
from difa_compile.planner.rows import distinct

EVEN = 0.01
"""By how much, as a share of it, a time may be predicted to grow where forecasts are raised."""
_MOST = 100.0
"""Weights of greater size are not taken: they would amplify what is noise in the outputs."""


@dataclass(frozen=True)
class Fitting:
    """How weights are fitted. ``order``: forecasts of less are raised to it where what that reads was measured.
    ``firmness``: how firmly weights are held to the polynomial's."""

    order: int
    firmness: float

    def __call__(self, problem: Problem, start: Outcome) -> Outcome:
        """The plan with fitted weights; the same one where it forecasts nothing."""
        return fit(problem, raised(problem, start, self.order), self.firmness)

    def within(self, problem: Problem, start: Outcome, max_rows: int | None = None) -> Outcome:
        """The plan with fitted weights, of forecasts as they are where raised ones would take more rows than
        ``max_rows``, or more time; the plan itself where nothing is to be fitted."""
        found = self(problem, start)
        rows = max_rows is None or distinct(found.columns) <= max_rows
        if not rows or found.share > start.share * (1 + EVEN):
            found = replace(self, order=1)(problem, start)
        return found if found.weights else start


FITTINGS = (Fitting(2, 1.0), Fitting(2, 0.1), Fitting(2, 5.0))
"""Which is the best for a plan shows when it is run: the more steps are left out, the less can the table tell."""


def raised(problem: Problem, start: Outcome, order: int) -> Outcome:
    """The plan with its forecasts raised to ``order`` where there are as many sources, as far back as was measured."""
    columns: list[tuple[Decision, ...]] = []
    for unit, column in zip(problem.units, start.columns, strict=True):
        more = [replace(each, order=order) if 0 < each.order < order else each for each in column]
        for step, sources in enumerate(output_sources(more, covered_steps(unit, start.columns))):
            near = len(sources) > more[step].order and step - min(sources, default=step) <= unit.effects.lags
            if not near or problem.streams[min(sources, default=step)] != problem.streams[step]:
                more[step] = column[step]
        columns.append(tuple(more))
    return start if tuple(columns) == start.columns else outcome(problem, columns)


@dataclass(frozen=True)
class _Forecast:
    """One forecast. ``known``: the weights of the polynomial. ``ways`` (order, K): by what its effect changes where
    a weight goes from the newest source to each of the others."""

    unit: int
    step: int
    known: tuple[float, ...]
    ways: Array


def fit(problem: Problem, start: Outcome, firmness: float) -> Outcome:
    """The plan with the weights of its forecasts fitted (see the module); the same one where it forecasts nothing, or
    where the table tells nothing of them."""
    forecasts = [each for index in range(len(problem.units)) for each in _forecasts(problem, index, start.columns)]
    effects = accounts(problem, start.columns).effects.sum(0)
    while forecasts:
        moved = _solved(problem, forecasts, effects, firmness)
        found = [_rounded(np.asarray(each.known) + own) for each, own in zip(forecasts, moved, strict=True)]
        usable = [each for each, weights in zip(forecasts, found, strict=True) if max(map(abs, weights)) <= _MOST]
        if len(usable) < len(forecasts):
            forecasts = usable  # the others stay the polynomial's, and are to be made up for as such
            continue
        if not any(own.any() for own in moved):
            return start
        weights: list[list[tuple[float, ...]]] = [[()] * problem.steps for _ in problem.units]
        for each, own_weights in zip(forecasts, found, strict=True):
            weights[each.unit][each.step] = own_weights
        return outcome(problem, start.columns, tuple(map(tuple, weights)))
    return start


def _solved(problem: Problem, forecasts: Sequence[_Forecast], effects: Array, firmness: float) -> list[Array]:
    """By forecast how its weights differ from the polynomial's (order + 1,), where the error is least."""
    ways = np.concatenate([each.ways for each in forecasts])
    steps = np.concatenate([np.full(len(each.ways), each.step) for each in forecasts])
    felt = kernel(problem.steps, problem.coherence) * np.outer(problem.response, problem.response)
    curvature = felt[np.ix_(steps, steps)] * (ways @ ways.T)
    slope = ((felt @ effects)[steps] * ways).sum(1)
    size = np.diag(curvature)
    told = size > 1e-12 * size.max()
    moved = np.zeros(len(size))
    if told.any():
        system = (curvature + firmness * np.diag(size))[np.ix_(told, told)]
        moved[told] = np.linalg.lstsq(system, -slope[told], rcond=None)[0]
    ends = np.cumsum([len(each.ways) for each in forecasts])[:-1]
    return [np.concatenate([[-own.sum()], own]) for own in np.split(moved, ends)]


def _rounded(weights: Array) -> tuple[float, ...]:
    """Weights to eight decimals, the same on every machine, that sum to 1."""
    others = [round(float(weight), 8) for weight in weights[1:]]
    return (round(1 - sum(others), 8), *others)


def _forecasts(problem: Problem, index: int, columns: Sequence[Sequence[Decision]]) -> list[_Forecast]:
    """The forecasts of one unit in the steps at which it exists."""
    unit, column = problem.units[index], columns[index]
    covered = covered_steps(unit, columns)
    done = effects_of(problem, unit, column, covered)
    found = []
    for step, sources in enumerate(output_sources(column, covered)):
        if covered[step] or not column[step].order:
            continue
        each = np.stack([reader_effect(unit.effects.drift, (1.0,), (step - source,), step) for source in sources])
        each = each + done[list(sources)]
        known = weights_of(column[step], problem.progress, step, sources)
        found.append(_Forecast(index, step, known, each[1:] - each[0]))
    return found
