"""The best path of a unit that can be computed in several ways: which steps are computed, how, and what lies between.

Beside the last computed steps (:mod:`difa_compile.planner.paths`) the state has how old the last full step is and
which window's residual it keeps, so that windows with a residual, and what taking it costs, are weighed against the
steps that could be computed in full for the same price. A decision that is not full has its error at its own step and
at those that read what it has computed, as if these errors were unrelated to the readers' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from difa_compile.decision import FULL, Decision, Window
from difa_compile.planner.effects import Array
from difa_compile.planner.paths import Indices, Prices, between
from difa_compile.planner.problem import Problem


def best_forms(problem: Problem, unit: int, place: int, prices: Prices, active: Indices, price: float) -> list[
    Decision | None
]:  # fmt: skip
    """The decision at each computed step of one unit, None at the others, such that error + ``price`` x cost is least.

    ``prices``: of the readers, in which the unit has the number ``place``. ``active`` (T,): where the unit exists.
    """
    return _Forms(problem, unit, place, prices, active, price).best()


@dataclass(frozen=True)
class _Kind:
    """Computed decisions that leave a unit in the same state: all that are full, all that read no residual, or those
    with one window's residual.

    ``own[form]`` (T,) or (T, ages + 1): squared effects.
    """

    window: Window | None
    forms: tuple[Decision, ...]
    full: bool
    own: tuple[Array, ...]


class _Forms:
    """One path. A state is (lag to the computed step before, that to the one before that, age of the last full step,
    the residual that this keeps); 0 is none of each, and where nothing looks so far back the second has one place."""

    def __init__(self, problem: Problem, unit: int, place: int, prices: Prices, active: Indices, price: float) -> None:
        self.problem, self.price, self.active = problem, price, active
        own = slice(place, place + 1)
        self.prices = Prices(prices.cells[own], prices.form[own], prices.fill[own], prices.weight)
        self.effects, self.costs = problem.units[unit].effects, problem.units[unit].costs
        self.weight = np.where(active, problem.response**2, 0.0)
        self.windows = tuple(dict.fromkeys(d.window for d in self.costs.computed if d.kind.reads == "residual"))
        self.most = max((self.effects.ages(d) for d in self.effects.residual), default=0)
        """The greatest age of a residual."""
        self.kinds = self._kinds()
        lags, depth = prices.cells.shape[2], prices.cells.shape[4]
        self.shape = (lags, depth, self.most + 1, len(self.windows) + 1)

    def _kinds(self) -> list[_Kind]:
        forms = list(self.costs.computed)
        full = tuple(form for form in forms if form.is_full)
        plain = tuple(form for form in forms if not form.is_full and form.kind.reads != "residual")
        kinds = [_Kind(None, full, True, tuple(map(self._own, full)))]
        if plain:
            kinds.append(_Kind(None, plain, False, tuple(map(self._own, plain))))
        for window in self.windows:
            mine = tuple(form for form in forms if form.kind.reads == "residual" and form.window == window)
            kinds.append(_Kind(window, mine, False, tuple(map(self._own_by_age, mine))))
        return kinds

    def _own(self, form: Decision) -> Array:
        if form == FULL:
            return np.zeros(self.problem.steps)
        return np.asarray((self.effects.computed[form] ** 2).sum(1))

    def _own_by_age(self, form: Decision) -> Array:
        """(T, most + 1): infinite where there is no such residual."""
        squares = (self.effects.residual[form] ** 2).sum(2)
        found = np.full((self.problem.steps, self.most + 1), np.inf)
        streams = self.problem.streams
        for step in range(self.problem.steps):
            for age in range(1, min(step, squares.shape[1] - 1) + 1):
                if streams[step - age] == streams[step]:
                    found[step, age] = squares[step, age]
        return found

    def best(self) -> list[Decision | None]:
        """The decisions of the cheapest path."""
        steps, lags = self.problem.steps, self.shape[0]
        value = np.full((steps + 1, *self.shape), np.inf)
        """The price of all before a computed step, by its state; the last is behind the schedule."""
        origin = np.zeros((steps + 1, *self.shape), dtype=np.int64)
        """The kind and the state of the computed step before: kind * size of a state + state."""
        first = int(self.active.argmax())
        value[first, 0, 0, 0, 0] = 0.0
        for step in range(first, steps):
            here = value[step]
            if not self.active[step] or not np.isfinite(here).any():
                continue
            gaps = min(lags - 1, steps - step)
            readers = between(self.prices, self.active[None], np.zeros((1, steps)), step)[0, : gaps + 1]
            for number, kind in enumerate(self.kinds):
                prices, sources = self._decide(kind, here)
                own = self._priced(kind, step, gaps)
                for gap in range(1, gaps + 1):
                    self._arrive(
                        value[step + gap, gap], origin[step + gap, gap], kind, number, gap,
                        prices + readers[gap][:, :, None, None] + own[gap][None, None], sources,
                    )  # fmt: skip
        return self._walked(value, origin)

    def _decide(self, kind: _Kind, here: Array) -> tuple[Array, Indices]:
        """The prices (states) after a step is computed in a way of this kind, without that way's own, and the state
        before it of each. A full step's age is 0 then, which stands for itself here, not for none."""
        numbers = np.arange(here.size).reshape(here.shape)
        if kind.full:
            flat = here.reshape(*here.shape[:2], -1)
            best = flat.argmin(2)[:, :, None]
            found = np.full(here.shape, np.inf)
            sources = np.zeros(here.shape, dtype=np.int64)
            found[:, :, 0, 0] = np.take_along_axis(flat, best, 2)[:, :, 0]
            sources[:, :, 0, 0] = np.take_along_axis(numbers.reshape(flat.shape), best, 2)[:, :, 0]
            return found, sources
        if kind.window is None:
            return here, numbers
        kept = 1 + self.windows.index(kind.window)
        taken = here[..., 0] + self.price * self.costs.residual[kind.window]
        found = np.full(here.shape, np.inf)
        sources = numbers.copy()
        found[..., kept] = np.minimum(taken, here[..., kept])
        sources[..., kept] = np.where(taken < here[..., kept], numbers[..., 0], numbers[..., kept])
        return found, sources

    def _priced(self, kind: _Kind, step: int, gaps: int) -> Array:
        """(gaps + 1, ages, 1): error and price of the best way of this kind at a step that is read up to ``gaps`` steps
        later, by the age of the last full step."""
        prices = [self._price_of(kind, number, step, gaps) for number in range(len(kind.forms))]
        return np.asarray(np.min(prices, axis=0))

    def _price_of(self, kind: _Kind, number: int, step: int, gaps: int) -> Array:
        own = kind.own[number][step]
        felt = np.cumsum([0.0, *self.weight[step : step + gaps]])  # at the step itself, and at those that read it
        with np.errstate(invalid="ignore"):
            error = felt[:, None] * np.atleast_1d(own)[None]
        error = np.where(np.isnan(error), np.inf, error)
        return np.asarray((error + self.price * self.costs.computed[kind.forms[number]])[:, :, None])

    def _arrive(
        self, value: Array, origin: Indices, kind: _Kind, number: int, gap: int, prices: Array, sources: Indices
    ) -> None:
        """Put prices (states after a step) into those of the step ``gap`` later (second lag, age, residual)."""
        axis = 0 if self.shape[1] == 1 else 1
        best = np.expand_dims(prices.argmin(axis), axis)
        prices = np.take_along_axis(prices, best, axis).squeeze(axis)
        came = np.take_along_axis(sources, best, axis).squeeze(axis) + number * np.prod(self.shape)
        if kind.full:
            age = gap if gap <= self.most else 0
            _lower(value[:, age, 0], origin[:, age, 0], prices[:, 0, 0], came[:, 0, 0])
            return
        near = max(1, self.most + 1 - gap)
        _lower(value[:, 1 + gap :], origin[:, 1 + gap :], prices[:, 1:near], came[:, 1:near])
        rest = np.concatenate([prices[:, :1], prices[:, near:]], axis=1).reshape(len(prices), -1)  # too old, or none
        from_rest = np.concatenate([came[:, :1], came[:, near:]], axis=1).reshape(len(prices), -1)
        least = rest.argmin(1)[:, None]
        _lower(
            value[:, 0, 0], origin[:, 0, 0],
            np.take_along_axis(rest, least, 1)[:, 0], np.take_along_axis(from_rest, least, 1)[:, 0],
        )  # fmt: skip

    def _walked(self, value: Array, origin: Indices) -> list[Decision | None]:
        """The decisions of the path that ends behind the schedule for the least."""
        forms: list[Decision | None] = [None] * self.problem.steps
        step = self.problem.steps
        state = int(value[step].argmin())
        first = int(self.active.argmax())
        while step != first:
            lag = int(np.unravel_index(state, self.shape)[0])
            number, state = divmod(int(origin[step].reshape(-1)[state]), int(np.prod(self.shape)))
            step -= lag
            kind = self.kinds[number]
            age = int(np.unravel_index(state, self.shape)[2])
            prices = [self._price_of(kind, form, step, lag)[lag, :, 0] for form in range(len(kind.forms))]
            at = age if kind.window is not None else 0
            forms[step] = kind.forms[int(np.argmin([each[at] for each in prices]))]
        return forms


def _lower(value: Array, origin: Indices, price: Array, source: Indices) -> None:
    """Where a price is lower, it and where it came from are taken over."""
    better = price < value
    value[better] = price[better]
    origin[better] = source[better]


def has_forms(problem: Problem, units: Sequence[int]) -> bool:
    """Whether any of these units can be computed in another way than in full."""
    return any(len(problem.units[unit].costs.computed) > 1 for unit in units)
