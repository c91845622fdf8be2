"""Decisions changed one by one, where a unit can be computed in several ways: for what sums over steps cannot see.

Paths take the errors of different steps to be unrelated (:mod:`difa_compile.planner.forms`). In the image those of
neighbouring steps cancel or add up, and forecasts make the errors of what they read larger. So each decision of a plan
is changed to every other one, and exchanged with those near it, as long as the whole error at the price of the cost
gets less; the price is moved until the budget is met, and what is left of it then is filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from difa_compile.decision import FULL, REUSE, Decision, Kind
from difa_compile.planner.effects import Array, kernel, reader_effect, weights_of
from difa_compile.planner.problem import Outcome, Problem, cost_of, covered_steps, outcome

NEAR = 3
"""How far decisions are exchanged."""
ROUNDS = 5
"""At how many prices decisions are changed."""
SWEEPS = 4
"""How often all decisions are looked at, at one price."""

Column = tuple[Decision, ...]


def settled(problem: Problem, start: Outcome, units: Sequence[int], price: float, budget: float) -> Outcome:
    """The best plan found within ``budget`` from ``start`` on by changing what ``units`` do, none of which holds others.

    ``price``: of cost, in error, to begin with. Where nothing is better it is ``start``.
    """
    limit = budget * problem.full_cost * (1 + 1e-9)
    best = start if start.share * problem.full_cost <= limit else None
    plan = _Plan(problem, start.columns, units)
    low, high = 0.0, np.inf
    for _ in range(ROUNDS):
        plan.sweep(lambda error, cost, price=price: error + price * cost)  # type: ignore[misc]
        if plan.cost <= limit:
            high = price
            copy = _Plan(problem, plan.columns, units)
            copy.sweep(lambda error, cost: error if cost <= limit else np.inf)
            found = outcome(problem, copy.columns)
            best = found if best is None or found.error < best.error else best
        else:
            low = price
        price = price / 3 if not low else price * 3 if np.isinf(high) else float(np.sqrt(low * high))
    return start if best is None else best


@dataclass
class _State:
    """What a column does: its effects (T, K), and what it costs."""

    column: Column
    effects: Array
    cost: float


class _Plan:
    """A plan whose units' decisions are changed in place."""

    def __init__(self, problem: Problem, columns: Sequence[Column], units: Sequence[int]) -> None:
        self.problem, self.columns = problem, list(columns)
        self._kernel = kernel(problem.steps, problem.coherence)
        self._units = {unit: _Unit(problem, unit, covered_steps(problem.units[unit], columns)) for unit in units}
        found = {unit: each.state(self.columns[unit]) for unit, each in self._units.items()}
        self._states = {unit: state for unit, state in found.items() if state is not None}
        others = [
            _Unit(problem, unit, covered_steps(problem.units[unit], columns)).state(column)
            for unit, column in enumerate(columns)
            if unit not in self._units
        ]
        every = [*self._states.values(), *(state for state in others if state is not None)]
        self.cost = problem.base * problem.steps + sum(state.cost for state in every)
        self._felt, self._error = self._of(np.sum([state.effects for state in every], axis=0))
        self._effects = np.sum([state.effects for state in every], axis=0)

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
        state = each.state(column)
        if state is None:
            return worth
        difference = state.effects - now.effects
        rows = np.flatnonzero(difference.any(1))
        moved = difference[rows] * self.problem.response[rows, None]
        change = float((moved * (2 * self._felt[rows] + self._kernel[np.ix_(rows, rows)] @ moved)).sum())
        cost = self.cost + state.cost - now.cost
        found = value(self._error + change, cost)
        if not found < worth * (1 - 1e-6):
            return worth
        self._states[unit], self.columns[unit], self.cost = state, column, cost
        self._effects = self._effects + difference
        self._felt, self._error = self._of(self._effects)
        return value(self._error, cost)


class _Unit:
    """What columns of one unit do, each cell worked out once."""

    def __init__(self, problem: Problem, unit: int, covered: Sequence[bool]) -> None:
        self.problem, self.unit, self.covered = problem, problem.units[unit], list(covered)
        self._options = (*self.unit.costs.computed, *dict.fromkeys((*problem.readers, REUSE)))
        self._cells: dict[tuple[int, tuple[int, ...], Decision], tuple[Array, Array]] = {}

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

    def state(self, column: Column) -> _State | None:
        """What a column does; None where it cannot be run, or reads what was not measured."""
        own, streams = self.unit.effects, self.problem.streams
        effects = np.zeros((self.problem.steps, own.size))
        computed: list[int] = []
        changed: set[int] = set()
        last_full, window = -1, None
        for step, decision in enumerate(column):
            if self.covered[step]:
                continue
            if decision.kind.reads == "output":
                sources = tuple(computed[: -2 - decision.order : -1])
                if len(sources) <= decision.order or step - sources[-1] > own.lags:
                    return None
                if streams[sources[-1]] != streams[step]:
                    return None
                effect, weights = self._cell(step, sources, decision)
                effects[step] = effect
                if not changed.isdisjoint(sources):
                    effects[step] += weights @ effects[list(sources)]
                continue
            computed.append(step)
            if decision.kind is Kind.WINDOW_RESIDUAL:
                age = step - last_full
                if last_full < 0 or age > own.ages(decision) or streams[last_full] != streams[step]:
                    return None
                if window not in (None, decision.window):
                    return None
                window = decision.window
                effects[step] = own.residual[decision][step, age]
                changed.add(step)
            elif decision != FULL:
                effects[step] = own.computed[decision][step]
                changed.add(step)
            if decision.is_full:
                last_full, window = step, None
        return _State(column, effects, cost_of(self.unit, column, self.covered))

    def _cell(self, step: int, sources: tuple[int, ...], decision: Decision) -> tuple[Array, Array]:
        """The effect of a reader whose sources are full, and its weights."""
        key = (step, sources, decision)
        if key not in self._cells:
            weights = weights_of(decision, self.problem.progress, step, sources)
            lags = [step - source for source in sources]
            self._cells[key] = reader_effect(self.unit.effects.drift, weights, lags, step), np.asarray(weights)
        return self._cells[key]
