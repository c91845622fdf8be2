"""The best path of a unit over the steps for a fixed price: which steps are computed, what stands in between.

Here errors of different cells are taken to add up as they are (coherence 0), so that a path's price is a sum:

    price = sum over cells of response[t]^2 |effect|^2 + cost_price * cost

A state is the last computed step s with the one (or two) before it, as lags; between two computed steps every reader's
error depends on the state alone, so that the cheapest path is found step by step, exactly, for all units at once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from difa_compile.decision import FULL, REUSE, Decision, Kind
from difa_compile.planner.effects import Array, Effects, weights_of
from difa_compile.planner.problem import Problem

Indices = npt.NDArray[Any]
"""Integers or booleans."""


@dataclass(frozen=True)
class Prices:
    """For units ``u`` at a fixed price: ``cells[u, s, i, a, b]`` is the price of the best reader at step s + i whose
    sources are s, s - a and s - a - b (0: there is none), ``form`` which of ``readers`` it is; both for unmasked steps.

    ``fill`` (U,): the price of keeping an output. ``weight`` (T,): ``response^2``.
    """

    cells: Array
    form: Indices
    fill: Array
    weight: Array


class Readers:
    """The errors of all readers of some units, made once; :meth:`priced` gives their prices."""

    def __init__(self, problem: Problem, units: Sequence[int]) -> None:
        self.problem, self.units = problem, list(units)
        self.readers = tuple(sorted(problem.readers, key=lambda reader: -reader.order))
        if REUSE not in self.readers:
            self.readers += (REUSE,)
        self.reuse_is_last_resort = REUSE not in problem.readers
        self.lags = max(unit.effects.lags for unit in problem.units)
        """How far a path goes without computing: a unit may be covered for longer than it was measured."""
        depth = max(reader.order for reader in self.readers)
        self.shape = (problem.steps, self.lags + 1, self.lags + 1, self.lags + 1 if depth == 2 else 1)
        self.errors = np.full((len(self.readers), len(self.units), *self.shape), np.inf)
        weights = [_weights(problem, reader, self.shape) for reader in self.readers]
        for index, unit in enumerate(self.units):
            for reader, table in enumerate(weights):
                if problem.allows(unit, self.readers[reader]):
                    self._fill(self.errors[reader, index], problem.units[unit].effects, *table)
        costs = [problem.units[unit].costs for unit in self.units]
        self.read = np.array([cost.read for cost in costs])
        self.fill = np.array([cost.fill for cost in costs])

    def held_to(self, problem: Problem) -> Readers:
        """The same of a problem that differs in what is allowed alone, less than here."""
        held = copy.copy(self)
        held.problem = problem
        allowed = [[problem.allows(unit, reader) for unit in self.units] for reader in self.readers]
        held.errors = np.where(np.array(allowed)[:, :, None, None, None, None], self.errors, np.inf)
        return held

    def least(self, place: int) -> Array:
        """(readers, T): the least error of each reader at each step, of the unit at ``place``, whatever it reads."""
        found = np.full((len(self.readers), self.problem.steps), np.inf)
        errors = self.errors[:, place].min((3, 4))
        for lag in range(1, self.lags + 1):
            found[:, lag:] = np.minimum(found[:, lag:], errors[:, : self.problem.steps - lag, lag])
        return found

    def _fill(self, errors: Array, effects: Effects, places: Indices, weights: Array) -> None:
        """Errors at ``places`` (n, 4), rows of (s, i, a, b), for ``weights`` (n, order + 1) over the newest sources."""
        start, lag, before, further = places.T
        step = start + lag
        gram = np.einsum("tak,tbk->tab", effects.drift, effects.drift)
        lags = np.stack([lag, lag + before, lag + before + further][: weights.shape[1]], axis=1)
        streams = np.array(self.problem.streams)
        near = (lags <= effects.lags).all(1) & (streams[step] == streams[step - lags[:, -1]])
        step, lags, weights, places = step[near], lags[near], weights[near], places[near]
        found = np.einsum("ni,nij,nj->n", weights, gram[step[:, None, None], lags[:, :, None], lags[:, None]], weights)
        errors[tuple(places.T)] = np.maximum(found, 0) * self.problem.response[step] ** 2

    def priced(self, cost_price: float, cap: float = np.inf) -> Prices:
        """Prices at ``cost_price`` (error per unit of cost). A cell whose error is above ``cap`` cannot be taken."""
        count = np.array([reader.order + 1 for reader in self.readers])
        prices = np.where(self.errors <= cap, self.errors, np.inf)
        prices += cost_price * count[:, None, None, None, None, None] * self.read[:, None, None, None, None]
        if self.reuse_is_last_resort and len(self.readers) > 1:
            others = np.isfinite(self.errors[:-1]).any(0)
            prices[-1][others] = np.inf
        form = prices.argmin(0)
        cells = np.take_along_axis(prices, form[None], 0)[0]
        return Prices(cells, form.astype(np.int8), cost_price * self.fill, self.problem.response**2)


def _weights(problem: Problem, reader: Decision, shape: tuple[int, ...]) -> tuple[Indices, Array]:
    """All (s, i, a, b) at which a reader can stand, (n, 4), and its weights there, newest source first, (n, order + 1).

    A reader of order k ignores the lags beyond its own, so it stands at all of them.
    """
    places: list[tuple[int, int, int, int]] = []
    weights: list[tuple[float, ...]] = []
    steps, lags = shape[0], shape[1] - 1
    for start in range(steps):
        for before in range(min(start, lags) + 1):
            last = start - before
            deeper = range(min(last, lags) + 1) if before and shape[3] > 1 else range(1)
            for further in deeper:
                if (reader.order >= 1 and not before) or (reader.order >= 2 and not further):
                    continue
                sources = [start, last, last - further][: reader.order + 1]
                for lag in range(1, min(lags, steps - 1 - start) + 1):
                    places.append((start, lag, before, further))
                    weights.append(weights_of(reader, problem.progress, start + lag, sources))
    return np.array(places, dtype=np.int64).reshape(-1, 4), np.array(weights).reshape(-1, reader.order + 1)


@dataclass(frozen=True)
class Paths:
    """``price[m, u]`` and ``computed[m, u, T]`` of the best paths; ``m + 1`` is the number of computed steps where
    counts were asked for, else there is one ``m``. Where there is no path the price is infinite."""

    price: Array
    computed: Indices


def best_paths(prices: Prices, nodes: Array, active: Indices, carry: Array, counts: bool = False) -> Paths:
    """The cheapest paths of all units.

    ``nodes`` (U, T): the price of computing each step. ``active`` (U, T): the steps at which the unit exists; at the
    others it neither computes nor reads. ``carry`` (U, T): the squared effect of what a step computes, which its
    readers have too; zero where it is full.
    """
    units, steps, lags, depth = (
        nodes.shape[0],
        *prices.cells.shape[1:2],
        prices.cells.shape[2] - 1,
        prices.cells.shape[4],
    )
    nodes = np.where(active, nodes, np.inf)
    layers = steps if counts else 1
    value = np.full((layers, units, steps, lags + 1, depth), np.inf)
    origin = np.zeros((layers, units, steps, lags + 1, depth), dtype=np.int16)
    final = np.full((layers, units), np.inf)
    ends = np.zeros((layers, units, 2), dtype=np.int64)
    """Of the last computed step: its number, and its state (a * depth + b)."""
    first = active.argmax(1)
    each = np.arange(units)
    value[0, each, first, 0, 0] = nodes[each, first]
    for start in range(steps):
        here = value[:, :, start]
        if not np.isfinite(here).any():
            continue
        passed = between(prices, active, carry, start)
        for gap in range(1, min(lags, steps - start) + 1):
            reached = (here + passed[:, gap]).reshape(layers, units, lags + 1, depth)
            target = start + gap
            if target == steps:
                flat = reached.reshape(layers, units, -1)
                best = flat.argmin(2)
                price = np.take_along_axis(flat, best[:, :, None], 2)[:, :, 0]
                better = price < final
                final[better] = price[better]
                ends[better] = np.stack([np.full_like(best, start), best], 2)[better]
                continue
            if depth == 1:
                best = reached[..., 0].argmin(2)
                price = np.take_along_axis(reached[..., 0], best[:, :, None], 2) + nodes[:, target, None]
            else:
                best = reached.argmin(3)
                price = np.take_along_axis(reached, best[..., None], 3)[..., 0] + nodes[:, target, None]
            if counts:
                price, best = price[:-1], best[:-1]
            place = value[1 if counts else 0 :, :, target, gap]
            trace = origin[1 if counts else 0 :, :, target, gap]
            if depth == 1:
                place[..., 0], trace[..., 0] = price[..., 0], best
            else:
                place[...], trace[...] = price, best
    return Paths(final, _walked(final, ends, origin, counts, first))


def between(prices: Prices, active: Indices, carry: Array, start: int) -> Array:
    """(U, W + 1, W + 1, depth): the price of the readers strictly between ``start`` and ``start + gap``, with ``carry``
    as in :func:`best_paths`."""
    units, steps, lags = active.shape[0], active.shape[1], prices.cells.shape[2] - 1
    sums = np.zeros((units, lags + 1, *prices.cells.shape[3:]))
    any_reader = np.zeros((units, lags + 1), dtype=bool)
    for gap in range(2, min(lags, steps - start) + 1):
        step = start + gap - 1
        on = active[:, step]
        cell = prices.cells[:, start, gap - 1] + carry[:, start, None, None] * prices.weight[step]
        sums[:, gap] = sums[:, gap - 1] + np.where(on[:, None, None], cell, 0.0)
        any_reader[:, gap] = any_reader[:, gap - 1] | on
    return sums + (prices.fill[:, None] * any_reader)[:, :, None, None]


def _walked(final: Array, ends: Indices, origin: Indices, counts: bool, first: Indices) -> Indices:
    """The computed steps of each path, read back from its end."""
    layers, units, steps, _, depth = origin.shape
    computed = np.zeros((layers, units, steps), dtype=bool)
    for layer in range(layers):
        for unit in range(units):
            if not np.isfinite(final[layer, unit]):
                continue
            step, state = ends[layer, unit]
            before, further = divmod(int(state), depth)
            level = layer
            computed[layer, unit, step] = True
            while step != first[unit]:
                came = int(origin[level, unit, step, before, further])
                step -= before
                before, further = (came, 0) if depth == 1 else (further, came)
                level -= counts
                computed[layer, unit, step] = True
    return computed


def decided(
    readers: Readers, prices: Prices, place: int, forms: Sequence[Decision | None], active: Indices
) -> tuple[Decision, ...]:
    """The decisions of one unit (``place`` counts in ``readers.units``) whose computed steps have the decisions
    ``forms``; None is a step that is not computed. FULL where it is not ``active``, as plans say there."""
    chosen: list[Decision] = []
    done: list[int] = []
    for step, form in enumerate(forms):
        if not active[step]:
            chosen.append(FULL)
            continue
        if form is not None:
            chosen.append(form)
            done.append(step)
            continue
        before = done[-1] - done[-2] if len(done) > 1 else 0
        further = done[-2] - done[-3] if len(done) > 2 and readers.shape[3] > 1 else 0
        chosen.append(readers.readers[prices.form[place, done[-1], step - done[-1], before, further]])
    return tuple(chosen)


def forms_of(problem: Problem, unit: int, computed: Indices, active: Indices, cost_price: float) -> list[Decision]:
    """The best decision at each computed step (in order) of a unit, given which steps those are.

    A step's own error counts once for itself and once for every step that reads it. The state is the last full step and
    the window whose residual it keeps; one full step keeps one residual.
    """
    own, costs = problem.units[unit].effects, problem.units[unit].costs
    steps = np.flatnonzero(computed)
    choice = problem.computed(unit)
    if len(choice) == 1:
        return [*choice] * len(steps)
    weight = problem.response**2
    reach = np.append(steps[1:], problem.steps)
    charge = [float(weight[s:n][active[s:n]].sum()) for s, n in zip(steps, reach, strict=True)]
    states: dict[tuple[int, Decision | None], tuple[float, tuple[Decision, ...]]] = {(-1, None): (0.0, ())}
    for step, share in zip(steps.tolist(), charge, strict=True):
        after: dict[tuple[int, Decision | None], tuple[float, tuple[Decision, ...]]] = {}
        for (full, kept), (price, forms) in states.items():
            for form in choice:
                state = (full, kept)
                total = price + cost_price * costs.computed[form]
                if form.kind is Kind.WINDOW_RESIDUAL:
                    window = Decision(form.kind, form.window)
                    if full < 0 or step - full > own.ages(form) or kept not in (None, window):
                        continue
                    if problem.streams[full] != problem.streams[step]:
                        continue
                    total += share * float((own.residual[form][step, step - full] ** 2).sum())
                    if kept is None and form.window is not None:
                        total += cost_price * costs.residual[form.window]
                    state = (full, window)
                elif form != FULL:
                    total += share * float((own.computed[form][step] ** 2).sum())
                if form.is_full:
                    state = (step, None)
                if state not in after or total < after[state][0]:
                    after[state] = (total, (*forms, form))
        states = after
    return list(min(states.values(), key=lambda found: found[0])[1])
