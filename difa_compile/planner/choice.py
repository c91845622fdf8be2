"""Choosing under a budget of time, or for an error: prices bisected, counts filled up, neighbours tried.

For a fixed price of cost every unit takes its cheapest path (:mod:`difa_compile.planner.paths`); units inside others
are solved after them, on the steps that are left to them, and once more the other way round. The price is bisected to
the budget. What is left of the budget then is filled by choosing each unit's number of computed steps (a knapsack of
exact paths, one for each number), since one price cannot reach every number. Last, computed steps are moved, from there
and from even spacing, as long as that lowers the error with its coherence, which paths cannot see.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from difa_compile.decision import FULL, REUSE, Decision, Kind
from difa_compile.errors import BudgetError
from difa_compile.planner.effects import Array, kernel, reader_effect, weights_of
from difa_compile.planner.forms import best_forms, has_forms
from difa_compile.planner.paths import Indices, Paths, Prices, Readers, best_paths, decided, forms_of
from difa_compile.planner.problem import Outcome, Problem, cost_of, covered_steps, effects_of, outcome, psnr
from difa_compile.planner.settle import settled
from difa_compile.wording import quoted

Columns = list[tuple[Decision, ...]]

_HALVINGS = 40
_GRID = 4000
"""Into how many parts a budget is cut where counts are chosen."""
_SWEEPS = 12
_NEAR = 3
"""How far a computed step is moved where plans are tried one by one."""
_PRICES = 20
"""How many prices a bound is looked for at."""
_FEW = 3
"""Units up to which computed steps are moved to any place."""


def choose(problem: Problem, budget: float, *, worst: bool = False, polish: bool = True) -> Outcome:
    """The decisions of least error whose share of a full run's cost is at most ``budget``.

    ``worst``: first the greatest squared error of any one cell (times its response) is made as small as the budget
    allows (LeMiCa, arXiv 2511.00090), then the sum. ``polish``: computed steps are moved in the end.
    Raises :class:`BudgetError`, naming the nearest possible budget, if there is none, or if it is not in (0, 1].
    """
    return Planner(problem).choose(budget, worst=worst, polish=polish)


def choose_error(problem: Problem, error: float) -> Outcome:
    """The cheapest decisions found whose predicted mean squared error is at most ``error``; for a PSNR of p dB that is
    ``10^(-p / 10)``. Raises :class:`BudgetError` unless it is a positive number."""
    return Planner(problem).choose_error(error)


class Planner:
    """A problem whose readers' errors are worked out once, for many budgets."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.outer = [index for index, unit in enumerate(problem.units) if unit.inside is None]
        self.inner = [index for index, unit in enumerate(problem.units) if unit.inside is not None]
        self.readers = {"outer": Readers(problem, self.outer)}
        if self.inner:
            self.readers["inner"] = Readers(problem, self.inner)
        self._all_readers: Readers | None = None
        """Those of the planner that this one is a stricter form of, reuse wherever it is better."""
        self._set_up()

    def held_to(self, allowed: tuple[frozenset[Decision], ...]) -> Planner:
        """The planner of the same problem with nothing else allowed; what readers do is not worked out again."""
        held = copy.copy(self)
        held.__dict__.pop("_any_reader", None)
        held.problem = replace(self.problem, allowed=allowed)
        held.readers = {level: readers.held_to(held.problem) for level, readers in self.readers.items()}
        held._all_readers = self._any_reader
        held._set_up()
        return held

    def _set_up(self) -> None:
        problem = self.problem
        self.kernel = kernel(problem.steps, problem.coherence)
        self.weight = problem.response**2
        largest = max(float((unit.effects.drift**2).sum(2).max()) for unit in problem.units) * float(self.weight.max())
        self.top = 1e6 * max(largest, 1e-30) * problem.steps * len(problem.units) / problem.full_cost
        """A price at which nothing is computed that can be left out."""
        self._known: dict[tuple[float, float], Columns] = {}
        """Columns by price and cap: prices are bisected from the same ends for all budgets."""
        self.least = outcome(problem, self._columns(self.top))

    def choose(self, budget: float, *, worst: bool = False, polish: bool = True) -> Outcome:
        """As :func:`choose`."""
        self._check(budget)
        if budget >= 1:
            return outcome(self.problem, [(FULL,) * self.problem.steps for _ in self.problem.units])
        cap = self._least_cap(budget) if worst else math.inf
        price, best = self._bisected(budget, cap)
        if not worst:
            found = [best, self._filled(price, budget)]
            if polish:
                found = [self._polished(each, price, budget) for each in self._starts(found, price)]
            if self._formed_units:
                found += self._settled(found, price, budget, polish)
            best = min((each for each in found if each.share <= budget), key=lambda each: each.error)
        return best

    @cached_property
    def _formed_units(self) -> list[int]:
        """The units that can be computed in several ways, and hold no others."""
        problem = self.problem
        return [u for u in range(len(problem.units)) if has_forms(problem, [u]) and not problem.children(u)]

    @cached_property
    def _in_full(self) -> Planner:
        """The planner of the same units, each of which is computed in full or not."""
        units = tuple(
            replace(unit, effects=replace(unit.effects, computed={}, residual={}),
                    costs=replace(unit.costs, computed={FULL: unit.costs.computed[FULL]}, residual={}))
            for unit in self.problem.units
        )  # fmt: skip
        return Planner(replace(self.problem, units=units))

    def _settled(self, found: Sequence[Outcome], price: float, budget: float, polish: bool) -> list[Outcome]:
        """What is chosen where everything computed is full, so that more ways to compute are never worse; with
        ``polish``, the best that changing that, and the best of what was ``found``, comes to."""
        others = []
        if self._in_full.least.share <= budget:
            others.append(self._in_full.choose(budget, polish=polish))
        if not polish:
            return others
        starts = [min((each for each in found if each.share <= budget), key=lambda each: each.error), *others]
        return [*others, *(settled(self.problem, each, self._formed_units, price, budget) for each in starts)]

    def bound(self, budget: float) -> float:
        """A sum of squared errors that no decisions within the budget can go below, coherence apart
        (:func:`~difa_compile.planner.problem.additive_error`), whether they forecast or reuse: the best that prices can
        say of it,

            max over price p >= 0 of min over paths (error + p cost) - p budget

        Where there is one unit, that for each number of computed steps, and the least of these, which is closer. What
        units inside others do is taken to be the best that they could do at each step by itself. 0 where units in no
        other have more than full among their computed decisions: there paths are no bound. Takes some twenty paths.
        """
        self._check(budget)
        problem = self.problem
        if any(problem.computed(unit) != (FULL,) for unit in self.outer):
            return 0.0
        total = budget * problem.full_cost - problem.base * problem.steps

        def dual(logarithm: float) -> float:
            price = math.exp(logarithm)
            return float(self._loosest(price).price.sum()) - price * total

        top = math.log(self.top)
        price, most = _greatest(dual, top - 60, top, _PRICES)
        if len(self.outer) == 1:
            prices = [math.exp(each) for each in (top - 60, price - 1, price, price + 1, top)]
            counts = [self._loosest(each, counts=True).price[:, 0] - each * total for each in prices]
            most = max(most, float(np.max(counts, axis=0).min()))
        return max(0.0, most)

    def price(self, budget: float) -> float:
        """The price of cost at which paths keep to a budget."""
        return self._bisected(budget, math.inf)[0]

    def loosely(self, budget: float, price: float) -> float:
        """What :meth:`bound` comes to at one price, whichever it is: a bound as well where that is one, and quick."""
        total = budget * self.problem.full_cost - self.problem.base * self.problem.steps
        return float(self._loosest(price).price.sum()) - price * total

    def _loosest(self, price: float, counts: bool = False) -> Paths:
        """Paths of the units in no other that cost no more than any plan's do at this price of cost."""
        nodes, carry = self._nodes(self.outer, price)
        for place, unit in enumerate(self.outer):
            for child in self.problem.children(unit):
                nodes[place] += self._at_best(child, price)
        everywhere = np.ones_like(nodes, dtype=bool)
        return best_paths(self._any_reader.priced(price), nodes, everywhere, carry, counts)

    def _at_best(self, unit: int, price: float) -> Array:
        """(T,): what a unit inside another costs at least at each step, at this price of cost."""
        problem, costs = self.problem, self.problem.units[unit].costs
        nodes, _ = self._nodes([unit], price)
        found = [nodes[0]]
        for form, residual in problem.units[unit].effects.residual.items():
            if form in problem.computed(unit):
                power = (residual**2).sum(2)
                steps, lags = np.arange(problem.steps)[:, None], np.arange(residual.shape[1])[None]
                power = np.where((lags > 0) & (lags <= steps), power, np.inf).min(1)
                found.append(power * self.weight + price * costs.computed[form])
        readers = self.readers["inner"]
        least = readers.least(self.inner.index(unit))
        if problem.computed(unit) != (FULL,):  # what a source has lost may make up for what reading it loses
            least = np.where(np.isfinite(least), 0.0, np.inf)
        found += [
            each + price * costs.read * (reader.order + 1) for each, reader in zip(least, readers.readers, strict=True)
        ]
        return np.asarray(np.min(found, axis=0))

    @cached_property
    def _any_reader(self) -> Readers:
        """The readers of the units that are in no other, reuse wherever it is better."""
        if self._all_readers is not None:
            return self._all_readers.held_to(self.problem)
        problem = self.problem
        if REUSE in problem.readers:
            return self.readers["outer"]
        return Readers(replace(problem, readers=(*problem.readers, REUSE)), self.outer)

    def choose_error(self, error: float) -> Outcome:
        """As :func:`choose_error`."""
        if not (isinstance(error, (int, float)) and error > 0 and math.isfinite(error)):
            raise BudgetError(f"the error allowed is {quoted(error)}; give a positive mean squared error")
        if self.least.error <= error:
            return self.least
        best = self.choose(1.0)
        low, high = self.least.share, 1.0
        for halvings, polish in ((10, False), (4, True)):
            for _ in range(halvings):
                middle = (low + high) / 2
                found = self.choose(middle, polish=polish)
                if found.error <= error:
                    high, best = min(middle, found.share), found
                else:
                    low = middle
            low = max(self.least.share, high - 0.1)
        polished = self.choose(min(1.0, best.share))  # the last step that was moved may have been of a dearer one
        return polished if polished.error < best.error else best

    def _check(self, budget: float) -> None:
        if not (isinstance(budget, (int, float)) and not isinstance(budget, bool) and 0 < budget <= 1):
            raise BudgetError(
                f"the budget is {quoted(budget)}; give a share of the full model's time, above 0 and at most 1"
            )
        if budget < self.least.share:
            raise BudgetError(
                f"a budget of {budget:.4g} is not possible with this table: the least is {self._rounded():.4g} of the "
                f"full model's time, at a predicted {psnr(self.least.error):.1f} dB"
            )

    def _rounded(self) -> float:
        """The least share, rounded up to what a message shows of it."""
        return math.ceil(self.least.share * 1e4) / 1e4

    def _bisected(self, budget: float, cap: float) -> tuple[float, Outcome]:
        """The lowest price found at which the budget is kept, and what it buys."""
        low, high = math.log(self.top) - 60, math.log(self.top)
        best = self._columns(self.top, cap)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            found = self._columns(math.exp(middle), cap)
            if self._share(found) <= budget:
                high, best = middle, found
            else:
                low = middle
            if high - low < 1e-3:
                break
        return math.exp(high), outcome(self.problem, best)

    def _share(self, columns: Columns) -> float:
        """The share of a full run's cost."""
        problem = self.problem
        spent = sum(cost_of(unit, column, covered_steps(unit, columns))
                    for unit, column in zip(problem.units, columns, strict=True))  # fmt: skip
        return (spent + problem.base * problem.steps) / problem.full_cost

    def _least_cap(self, budget: float) -> float:
        """The smallest greatest error of a cell that the budget allows."""
        errors = [table.errors[np.isfinite(table.errors)] for table in self.readers.values()]
        levels = np.unique(np.concatenate(errors))
        low, high = 0, len(levels) - 1
        while low < high:
            middle = (low + high) // 2
            if self._share(self._columns(self.top, float(levels[middle]))) <= budget:
                high = middle
            else:
                low = middle + 1
        return float(levels[low])

    # Paths at a price.

    def _columns(self, price: float, cap: float = math.inf) -> Columns:
        """The decisions of all units at a price of cost, none of whose readers has an error above ``cap``."""
        if (price, cap) not in self._known:
            self._known[price, cap] = self._columns_at(price, cap)
        return self._known[price, cap]

    def _columns_at(self, price: float, cap: float) -> Columns:
        problem = self.problem
        everywhere = np.ones((len(self.outer), problem.steps), dtype=bool)
        outer = self.readers["outer"].priced(price, cap)
        nodes, carry = self._nodes(self.outer, price)
        if not self.inner:
            found = best_paths(outer, nodes, everywhere, carry)
            return self._formed({"outer": (outer, found.computed[0])}, price)
        inner = self.readers["inner"].priced(price, cap)
        inner_nodes, inner_carry = self._nodes(self.inner, price)
        active = np.ones((len(self.inner), problem.steps), dtype=bool)
        for _ in range(2):
            within = best_paths(inner, inner_nodes, active, inner_carry)
            mean = within.price[0] / active.sum(1)
            extra = np.array([sum(mean[self.inner.index(c)] for c in problem.children(u)) for u in self.outer])
            around = best_paths(outer, nodes + extra[:, None], everywhere, carry).computed[0]
            active = self._active(around)
        within = best_paths(inner, inner_nodes, active, inner_carry)
        return self._formed({"outer": (outer, around), "inner": (inner, within.computed[0])}, price)

    def _formed(self, paths: dict[str, tuple[Prices, Indices]], price: float) -> Columns:
        """As :meth:`_decided`; but units that can be computed in several ways, and hold no others, take paths of their
        own, in which that is chosen together with the steps."""
        columns = self._decided(paths, price)
        for level, (prices, _) in paths.items():
            readers = self.readers[level]
            for place, unit in enumerate(readers.units):
                if unit in self._formed_units:
                    active = ~np.array(covered_steps(self.problem.units[unit], columns))
                    forms = best_forms(self.problem, unit, place, prices, active, price)
                    columns[unit] = decided(readers, prices, place, forms, active)
        return columns

    def _active(self, around: Indices) -> Indices:
        """(inner units, T): where the units around them are computed."""
        outer = [self.problem.units[unit].inside for unit in self.inner]
        return np.stack([around[self.outer.index(each)] for each in outer if each is not None])

    def _nodes(self, units: Sequence[int], price: float) -> tuple[Array, Array]:
        """(U, T): the price of computing a step in the best way that reads nothing, and that way's squared effect."""
        nodes, carry = [], []
        for index in units:
            unit = self.problem.units[index]
            forms = [form for form in self.problem.computed(index) if form.kind is not Kind.WINDOW_RESIDUAL]
            power = np.stack([self._own(index, form) for form in forms])
            cost = np.array([unit.costs.computed[form] for form in forms])
            prices = price * cost[:, None] + power * self.weight
            best = prices.argmin(0)
            nodes.append(prices[best, np.arange(self.problem.steps)])
            carry.append(power[best, np.arange(self.problem.steps)])
        return np.stack(nodes), np.stack(carry)

    def _own(self, unit: int, form: Decision) -> Array:
        """(T,): the squared effect of a computed decision."""
        if form == FULL:
            return np.zeros(self.problem.steps)
        return np.asarray((self.problem.units[unit].effects.computed[form] ** 2).sum(1))

    def _decided(self, paths: dict[str, tuple[Prices, Indices]], price: float) -> Columns:
        """The columns of all units from their computed steps (units, T)."""
        columns: dict[int, tuple[Decision, ...]] = {}
        for level, (prices, computed) in paths.items():
            for place, unit in enumerate(self.readers[level].units):
                inside = self.problem.units[unit].inside
                active = np.ones(self.problem.steps, dtype=bool)
                if inside is not None:
                    active = np.array([each.kind.reads != "output" for each in columns[inside]])
                columns[unit] = self._column(level, prices, place, computed[place], active, price)
        return [columns[unit] for unit in range(len(self.problem.units))]

    def _column(
        self, level: str, prices: Prices, place: int, computed: Indices, active: Indices, price: float
    ) -> tuple[Decision, ...]:
        unit = self.readers[level].units[place]
        done = forms_of(self.problem, unit, computed, active, price)
        forms: list[Decision | None] = [None] * self.problem.steps
        for step, form in zip(np.flatnonzero(computed).tolist(), done, strict=True):
            forms[step] = form
        return decided(self.readers[level], prices, place, forms, active)

    # Every number of computed steps.

    def _filled(self, price: float, budget: float) -> Outcome:
        """The best numbers of computed steps of the outer units, then of the inner ones, within the budget."""
        problem = self.problem
        total = budget * problem.full_cost - problem.base * problem.steps
        prices = self.readers["outer"].priced(price)
        nodes, carry = self._nodes(self.outer, price)
        everywhere = np.ones((len(self.outer), problem.steps), dtype=bool)
        within = np.zeros(len(self.outer))
        """For each outer unit what the units inside it cost at a step, at this price."""
        if self.inner:
            columns = self._columns(price)
            for place, unit in enumerate(self.outer):
                on = sum(decision.kind.reads != "output" for decision in columns[unit])
                for child in problem.children(unit):
                    covered = covered_steps(problem.units[child], columns)
                    within[place] += cost_of(problem.units[child], columns[child], covered) / on
        around = self._counted("outer", prices, nodes, carry, everywhere, within, total, price)
        if not self.inner:
            return outcome(problem, self._decided({"outer": (prices, around)}, price))
        active = self._active(around)
        columns = self._decided(
            {"outer": (prices, around), "inner": (self.readers["inner"].priced(price), active)}, price
        )
        for unit in self.outer:
            total -= cost_of(problem.units[unit], columns[unit], covered_steps(problem.units[unit], columns))
        prices = self.readers["inner"].priced(price)
        nodes, carry = self._nodes(self.inner, price)
        inside = self._counted("inner", prices, nodes, carry, active, np.zeros(len(self.inner)), total, price)
        outer_prices = self.readers["outer"].priced(price)
        return outcome(problem, self._decided({"outer": (outer_prices, around), "inner": (prices, inside)}, price))

    def _counted(
        self, level: str, prices: Prices, nodes: Array, carry: Array, active: Indices, extra: Array, total: float,
        price: float,
    ) -> Indices:  # fmt: skip
        """Computed steps (U, T) of a level's units: each of its best paths of so many computed steps, the numbers such
        that the costs are at most ``total`` and the errors least. ``extra`` (U,) goes with each computed step."""
        found: Paths = best_paths(prices, nodes, active, carry, counts=True)
        layers, units = found.price.shape
        costs = np.full((layers, units), np.inf)
        errors = np.full((layers, units), np.inf)
        for layer, place in zip(*np.nonzero(np.isfinite(found.price)), strict=True):
            unit = self.problem.units[self.readers[level].units[place]]
            column = self._column(level, prices, place, found.computed[layer, place], active[place], price)
            spent = cost_of(unit, column, (~active[place]).tolist())
            costs[layer, place] = spent + extra[place] * (layer + 1)
            errors[layer, place] = found.price[layer, place] - price * spent
        taken = knapsack(costs.T, errors.T, total)
        return np.stack([found.computed[layer, place] for place, layer in enumerate(taken)])

    # Neighbours.

    def neighbours(self, start: Outcome, budget: float) -> list[Outcome]:
        """What comes of moving one computed step of a unit, within the budget, the least error first; of all moves of a
        step the best one comes before the second best of any. None for units that are inside or around others, or that
        ``start`` computes in another way than in full."""
        if self._formed_units and all(_all_in_full(start.columns[unit]) for unit in self._formed_units):
            return self._in_full.neighbours(start, budget)
        problem = self.problem
        prices = self.readers["outer"].priced(0.0)
        everywhere = np.ones(problem.steps, dtype=bool)
        ranked: list[tuple[int, float, int, Outcome]] = []
        for unit in self._free():
            column = start.columns[unit]
            computed = np.array([decision == FULL for decision in column])
            for step in (np.flatnonzero(computed[1:]) + 1).tolist():
                found: list[Outcome] = []
                for target in range(max(1, step - _NEAR), min(problem.steps, step + _NEAR + 1)):
                    if computed[target]:
                        continue
                    moved = computed.copy()
                    moved[step], moved[target] = False, True
                    if not self._can_run(unit, moved):
                        continue
                    columns = list(start.columns)
                    place = self.outer.index(unit)
                    columns[unit] = self._column("outer", prices, place, moved, everywhere, 0.0)
                    each = outcome(problem, columns)
                    if each.share <= budget * (1 + 1e-9):
                        found.append(each)
                found.sort(key=lambda each: each.error)
                ranked += [(place, each.error, len(ranked) + place, each) for place, each in enumerate(found)]
        return [each for *_, each in sorted(ranked, key=lambda entry: entry[:3])]

    def _starts(self, given: Sequence[Outcome], price: float) -> list[Outcome]:
        """Where to move steps from: what was found, and the same numbers of computed steps evenly spaced."""
        problem = self.problem
        free = self._free()
        if not free:
            return list(given)
        prices = self.readers["outer"].priced(price)
        everywhere = np.ones(problem.steps, dtype=bool)
        columns = list(given[-1].columns)
        for unit in free:
            computed = np.zeros(problem.steps, dtype=bool)
            computed[np.linspace(0, problem.steps - 1, columns[unit].count(FULL)).round().astype(int)] = True
            needed = self._needed(unit)
            for begin in needed:  # the nearest computed step that is not needed where it is goes there
                others = [step for step in np.flatnonzero(computed).tolist() if step not in needed]
                if others and not computed[begin]:
                    computed[min((abs(step - begin), step) for step in others)[1]] = False
                    computed[begin] = True
            if self._can_run(unit, computed):
                columns[unit] = self._column("outer", prices, self.outer.index(unit), computed, everywhere, price)
        return [*given, outcome(problem, columns)]

    def _can_run(self, unit: int, computed: Indices) -> bool:
        """Whether a unit of no other can be computed at these steps (T,) alone: what lies between was measured, and
        every stream begins with a computed step."""
        near = _widest(computed) <= self.problem.units[unit].effects.lags
        if not near or not all(computed[step] for step in self._needed(unit)):
            return False
        return self.problem.allows(unit, REUSE) or self._can_forecast(unit, computed)

    def _can_forecast(self, unit: int, computed: Indices) -> bool:
        """Whether every step between can take something else than reuse, which reads the least."""
        readers = self.readers["outer"]
        errors = readers.errors[:, self.outer.index(unit)]
        done: list[int] = []
        for step, on in enumerate(computed.tolist()):
            if on:
                done = [*done[-2:], step]
                continue
            lags = [later - earlier for earlier, later in pairwise(done)][::-1]
            before, further = (*lags, 0, 0)[:2]
            if max(lags, default=0) > readers.lags or step - done[-1] > readers.lags:
                return False
            if not np.isfinite(
                errors[:, done[-1], step - done[-1], before, further if readers.shape[3] > 1 else 0]
            ).any():
                return False
        return True

    def _needed(self, unit: int) -> list[int]:
        """The steps that a unit must be computed at, whatever the plan: as many at the begin of a stream as the least
        reader reads."""
        orders = [reader.order for reader in self.readers["outer"].readers if self.problem.allows(unit, reader)]
        return sorted({
            step
            for begin in (0, *self.problem.begins)
            for step in range(begin, min(self.problem.steps, begin + 1 + min(orders, default=0)))
            if self.problem.streams[step] == self.problem.streams[begin]
        })  # fmt: skip

    def _free(self) -> list[int]:
        """The units whose computed steps may be moved: none inside or around, computed in full or not."""
        return [u for u in self.outer if not self.problem.children(u) and self.problem.computed(u) == (FULL,)]

    def _polished(self, start: Outcome, price: float, budget: float) -> Outcome:
        """Computed steps moved while that lowers the error; by up to three steps where there are many units."""
        problem = self.problem
        free = self._free()
        if not free or start.share > budget:
            return start
        columns = list(start.columns)
        prices = self.readers["outer"].priced(price)
        reach = problem.steps if len(free) <= _FEW else 3
        everywhere = np.ones(problem.steps, dtype=bool)
        never = [False] * problem.steps
        own = [
            effects_of(problem, unit, column, covered_steps(unit, columns))
            for unit, column in zip(problem.units, columns, strict=True)
        ]
        cells = {unit: _Cells(self, prices, unit) for unit in free}
        cost, limit = start.share * problem.full_cost, budget * problem.full_cost
        effects = np.sum(own, axis=0)
        felt, error = self._felt(effects), self._error(effects)
        for _ in range(_SWEEPS):
            before = error
            for unit in free:
                spent = cost_of(problem.units[unit], columns[unit], never)
                present = np.array([each == FULL for each in columns[unit]])
                for step in range(1, problem.steps):
                    for target in range(max(1, step - reach), min(problem.steps, step + reach + 1)):
                        if not present[step] or present[target]:
                            continue
                        computed = present.copy()
                        computed[step], computed[target] = False, True
                        if not self._can_run(unit, computed):
                            continue
                        done = cells[unit].effects(computed)
                        new_error = error + self._change(felt, done - own[unit])
                        if new_error >= error * (1 - 1e-6):
                            continue
                        place = self.outer.index(unit)
                        column = self._column("outer", prices, place, computed, everywhere, price)
                        new_spent = cost_of(problem.units[unit], column, never)
                        if cost + new_spent - spent <= limit:
                            error, cost, spent = new_error, cost + new_spent - spent, new_spent
                            effects = effects - own[unit] + done
                            own[unit], columns[unit], present = done, column, computed
                            felt = self._felt(effects)
            if error > before * (1 - 1e-3):
                break
        return outcome(problem, columns)

    def _felt(self, effects: Array) -> Array:
        """``sum over u of coherence^|t - u| r_u effect_u``, (T, K)."""
        return np.asarray(self.kernel @ (effects * self.problem.response[:, None]))

    def _error(self, effects: Array) -> float:
        """The error of effects (T, K)."""
        return float((self._felt(effects) * effects * self.problem.response[:, None]).sum())

    def _change(self, felt: Array, difference: Array) -> float:
        """By how much the error changes if the effects change by ``difference`` (T, K), few rows of which are not 0."""
        rows = np.flatnonzero(difference.any(1))
        moved = difference[rows] * self.problem.response[rows, None]
        return float((moved * (2 * felt[rows] + self.kernel[np.ix_(rows, rows)] @ moved)).sum())


class _Cells:
    """The effects of the readers of one unit whose steps are computed in full or not, each worked out once."""

    def __init__(self, planner: Planner, prices: Prices, unit: int) -> None:
        self.readers, self.prices = planner.readers["outer"], prices
        self.place = self.readers.units.index(unit)
        self.problem, self.drift = planner.problem, planner.problem.units[unit].effects.drift
        self.known: dict[tuple[int, int, int, int], Array] = {}

    def effects(self, computed: Indices) -> Array:
        """(T, K) of a path."""
        result = np.zeros((len(computed), self.drift.shape[2]))
        newest = before = further = -1
        for step, on in enumerate(computed.tolist()):
            if on:
                newest, before, further = step, newest, before
                continue
            key = (step, newest, before, further if self.readers.shape[3] > 1 else -1)
            if key not in self.known:
                self.known[key] = self._effect(*key)
            result[step] = self.known[key]
        return result

    def _effect(self, step: int, newest: int, before: int, further: int) -> Array:
        lags = (newest - before if before >= 0 else 0, before - further if further >= 0 else 0)
        reader = self.readers.readers[self.prices.form[self.place, newest, step - newest, lags[0], lags[1]]]
        sources = (newest, before, further)[: reader.order + 1]
        weights = weights_of(reader, self.problem.progress, step, sources)
        return reader_effect(self.drift, weights, [step - source for source in sources], step)


def _all_in_full(column: Sequence[Decision]) -> bool:
    """Whether everything that is computed is computed in full."""
    return all(decision == FULL or decision.kind.reads == "output" for decision in column)


def _widest(computed: Indices) -> int:
    """The longest way from a computed step to the next, or to the end."""
    return int(np.diff(np.append(np.flatnonzero(computed), len(computed))).max())


def _greatest(value: Callable[[float], float], low: float, high: float, most: int) -> tuple[float, float]:
    """Where between ``low`` and ``high`` the greatest ``value`` was found in ``most`` tries, by the golden section, and
    that; of a function that rises, then falls."""
    section = (math.sqrt(5) - 1) / 2
    left, right = high - section * (high - low), low + section * (high - low)
    at_left, at_right = value(left), value(right)
    for _ in range(most - 2):
        if at_left < at_right:
            low, left, at_left = left, right, at_right
            right = low + section * (high - low)
            at_right = value(right)
        else:
            high, right, at_right = right, left, at_left
            left = high - section * (high - low)
            at_left = value(left)
    return (left, at_left) if at_left >= at_right else (right, at_right)


def knapsack(costs: Array, errors: Array, total: float) -> list[int]:
    """For each of U units one of its options (U, M), such that costs are at most ``total`` and the errors' sum least.

    Costs are rounded up to 1/4000 of the total, so that it is kept; for one unit nothing is rounded. Where nothing fits
    each unit takes its cheapest option. Infinite costs or errors are no options.
    """
    options = np.isfinite(costs) & np.isfinite(errors)
    cheapest = [int(np.where(options[unit], costs[unit], np.inf).argmin()) for unit in range(len(costs))]
    if len(costs) == 1:
        fits = options[0] & (costs[0] <= total * (1 + 1e-12))
        return [int(np.where(fits, errors[0], np.inf).argmin())] if fits.any() else cheapest
    if total <= 0:
        return cheapest
    least = np.full(_GRID + 1, 0.0)
    """The least error of the units so far, for each part of the total."""
    trace = np.zeros((len(costs), _GRID + 1), dtype=np.int64)
    parts = np.ceil(np.where(options, costs, 0) / total * _GRID - 1e-9).astype(np.int64)
    for unit in range(len(costs)):
        after = np.full(_GRID + 1, np.inf)
        for option in np.flatnonzero(options[unit] & (parts[unit] <= _GRID)).tolist():
            part = int(parts[unit, option])
            tried = np.full(_GRID + 1, np.inf)
            tried[part:] = least[: _GRID + 1 - part] + errors[unit, option]
            better = tried < after
            after[better], trace[unit, better] = tried[better], option
        least = after
    if not np.isfinite(least[-1]):
        return cheapest
    chosen, room = [], _GRID
    for unit in reversed(range(len(costs))):
        option = int(trace[unit, room])
        chosen.append(option)
        room -= int(parts[unit, option])
    return chosen[::-1]
