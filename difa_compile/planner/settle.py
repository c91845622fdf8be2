"""Decisions changed one by one, where a unit can be computed in several ways: for what sums over steps cannot see.

Paths take the errors of different steps to be unrelated (:mod:`difa_compile.planner.forms`). In the image those of
neighbouring steps cancel or add up, and forecasts make the errors of what they read larger. So each decision of a plan
is changed to every other one, and exchanged with those near it, as long as the whole error at the price of the cost
gets less; the price is moved until the budget is met, and what is left of it then is filled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.planner.effects import Array, kernel, reader_effect, weights_of
from difa_compile.planner.problem import Outcome, Problem, covered_steps, outcome

NEAR = 3
"""How far decisions are exchanged."""
ROUNDS = 5
"""At how many prices decisions are changed."""
SWEEPS = 4
"""How often all decisions are looked at, at one price."""

Column = tuple[Decision, ...]
Key = tuple[int, Decision, tuple[int, ...]]
"""A step, what it does, and the steps that it reads."""


def settled(problem: Problem, start: Outcome, units: Sequence[int], price: float, budget: float) -> Outcome:
    """The best plan found within ``budget`` from ``start`` on by changing what ``units`` do, none of which hold others.

    ``price``: of cost, in error, to begin with. Where nothing is better it is ``start``.
    """
    limit = budget * problem.full_cost * (1 + 1e-9)
    fits = start.share * problem.full_cost <= limit
    best = start if fits else None
    plan = _Plan(problem, start.columns, units)
    low, high = 0.0, math.inf
    for _ in range(ROUNDS):
        plan.sweep(functools.partial(_priced, price))
        if plan.cost <= limit:
            high = price
            found = outcome(problem, plan.columns)
            best = found if best is None or found.error < best.error else best
        else:
            low = price
        price = price / 3 if not low else price * 3 if math.isinf(high) else math.sqrt(low * high)
    if best is None:
        return start
    last = _Plan(problem, best.columns, units)
    last.sweep(functools.partial(_within, limit))
    filled = outcome(problem, last.columns)
    return filled if filled.error < best.error else best


def _priced(price: float, error: float, cost: float) -> float:
    return error + price * cost


def _within(limit: float, error: float, cost: float) -> float:
    return error if cost <= limit else math.inf


@dataclass
class _State:
    """What a column does: ``effects`` (T, K), ``cost``, and for each step what its effect depends on beside those of
    others."""

    column: Column
    effects: Array
    cost: float
    keys: list[Key]


@dataclass
class _Change:
    """Another column: its cost and keys, and the rows of its effects that are not those of the one before."""

    column: Column
    cost: float
    keys: list[Key]
    rows: dict[int, Array]


class _Plan:
    """A plan whose units' decisions are changed in place."""

    def __init__(self, problem: Problem, columns: Sequence[Column], units: Sequence[int]) -> None:
        self.problem, self.columns = problem, list(columns)
        self._kernel = kernel(problem.steps, problem.coherence)
        every = [
            _Unit(problem, unit, covered_steps(each, columns)) for unit, each in enumerate(problem.units)
        ]  # fmt: skip
        states = [each.state(column) for each, column in zip(every, self.columns, strict=True)]
        self._units = {unit: every[unit] for unit in units}
        self._states = {unit: states[unit] for unit in units}
        self.cost = problem.base * problem.steps + sum(state.cost for state in states)
        self._effects = np.sum([state.effects for state in states], axis=0)
        self._felt, self._error = self._of(self._effects)

    def _of(self, effects: Array) -> tuple[Array, float]:
        """``sum over u of coherence^|t - u| r_u effect_u``, (T, K), and the error."""
        scaled = effects * self.problem.response[:, None]
        felt = self._kernel @ scaled
        return felt, float((felt * scaled).sum())

    def sweep(self, value: Callable[[float, float], float]) -> None:
        """Change decisions while ``value(error, cost)`` gets less."""
        worth = value(self._error, self.cost)
        for _ in range(SWEEPS):
            before = worth
            for unit, each in self._units.items():
                for step in range(1, self.problem.steps):
                    for column in each.changes(self._states[unit].column, step):
                        worth = self._try(unit, each, column, worth, value)
            if not worth < before * (1 - 1e-3):
                break

    def _try(
        self, unit: int, each: _Unit, column: Column, worth: float, value: Callable[[float, float], float]
    ) -> float:
        """Take a column if it is worth less."""
        now = self._states[unit]
        change = each.change(now, column)
        if change is None:
            return worth
        cost = self.cost + change.cost - now.cost
        rows = list(change.rows)
        error = self._error
        difference = np.zeros((0, now.effects.shape[1]))
        if rows:
            difference = np.stack([change.rows[row] for row in rows]) - now.effects[rows]
            moved = difference * self.problem.response[rows, None]
            error += float((moved * (2 * self._felt[rows] + self._kernel[np.ix_(rows, rows)] @ moved)).sum())
        if not value(error, cost) < worth * (1 - 1e-6):
            return worth
        effects = now.effects.copy()
        for row, effect in change.rows.items():
            effects[row] = effect
        self._states[unit] = _State(column, effects, change.cost, change.keys)
        self.columns[unit], self.cost = column, cost
        self._effects[rows] += difference
        self._felt, self._error = self._of(self._effects)
        return value(self._error, cost)


class _Unit:
    """What columns of one unit do, each cell worked out once."""

    def __init__(self, problem: Problem, unit: int, covered: Sequence[bool]) -> None:
        self.problem, self.unit, self.covered = problem, problem.units[unit], list(covered)
        self._options = (*self.unit.costs.computed, *dict.fromkeys((*problem.readers, REUSE)))
        self._cells: dict[Key, tuple[Array, Array]] = {}

    def changes(self, column: Column, step: int) -> Iterator[Column]:
        """The columns that differ from one in what a step does, or in which it is exchanged with one near it."""
        if self.covered[step]:
            return
        for decision in self._options:
            if decision != column[step]:
                yield (*column[:step], decision, *column[step + 1 :])
        for other in range(step + 1, min(self.problem.steps, step + NEAR + 1)):
            if column[other] != column[step] and not self.covered[other]:
                yield (*column[:step], column[other], *column[step + 1 : other], column[step], *column[other + 1 :])

    def state(self, column: Column) -> _State:
        """What a column that can be run does."""
        effects = np.zeros((self.problem.steps, self.unit.effects.size))
        empty = _State((), effects, 0.0, [(-1, FULL, ())] * self.problem.steps)
        change = self.change(empty, column)
        assert change is not None, "a plan to begin with can be run"
        for row, effect in change.rows.items():
            effects[row] = effect
        return _State(column, effects, change.cost, change.keys)

    def change(self, now: _State, column: Column) -> _Change | None:
        """What a column does that ``now`` does not; None where it cannot be run, or reads what was not measured."""
        own, costs, streams = self.unit.effects, self.unit.costs, self.problem.streams
        computed: list[int] = []
        rows: dict[int, Array] = {}
        keys: list[Key] = []
        kept: set[int] = set()
        cost = 0.0
        last_full, window = -1, None
        for step, decision in enumerate(column):
            if self.covered[step]:
                keys.append((step, FULL, ()))
                continue
            kind = decision.kind
            if kind.reads == "output":
                sources = tuple(computed[: -2 - decision.order : -1])
                if len(sources) <= decision.order or step - sources[-1] > own.lags:
                    return None
                if streams[sources[-1]] != streams[step]:
                    return None
                kept.update(sources)
                cost += costs.read * len(sources)
                key = (step, decision, sources)
                if key != now.keys[step] or not rows.keys().isdisjoint(sources):
                    rows[step] = self._read(key, rows, now.effects)
                keys.append(key)
                continue
            computed.append(step)
            cost += costs.computed[decision]
            key = (step, decision, ())
            if kind.reads == "residual":
                age = step - last_full
                if last_full < 0 or age > own.ages(decision) or streams[last_full] != streams[step]:
                    return None
                if window is None and decision.window is not None:
                    window = decision.window
                    cost += costs.residual[window]
                elif window != decision.window:
                    return None
                key = (step, decision, (last_full,))
                if key != now.keys[step]:
                    rows[step] = own.residual[decision][step, age]
            elif key != now.keys[step]:
                rows[step] = own.computed[decision][step] if decision != FULL else np.zeros(own.size)
            if decision.is_full:
                last_full, window = step, None
            keys.append(key)
        return _Change(column, cost + costs.fill * len(kept), keys, rows)

    def _read(self, key: Key, rows: Mapping[int, Array], effects: Array) -> Array:
        """The effect of a reader: of its sources as if they were full, and what they hand on."""
        step, decision, sources = key
        if key not in self._cells:
            weights = np.asarray(weights_of(decision, self.problem.progress, step, sources))
            lags = [step - source for source in sources]
            self._cells[key] = reader_effect(self.unit.effects.drift, weights.tolist(), lags, step), weights
        effect, weights = self._cells[key]
        for source, weight in zip(sources, weights, strict=True):
            effect = effect + weight * rows.get(source, effects[source])
        return effect
