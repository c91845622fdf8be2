"""At most K distinct rows: engines are built one by one, and each distinct row of a plan is one.

*Kinds*: where one unit stands by itself, or around one other (all blocks of a network, and its attention), a row is one
decision of either, so that K rows are K kinds of decisions. All choices of kinds are weighed by what paths over the
steps make of them at one price of time, and the most promising are planned in full. Else two ways, the better one
counts. *Merging*: as long as a plan has too many rows, the pair whose merging changes least is merged; the price of
letting a step follow another's row is estimated cell by cell and the most promising pairs are worked out in full; then
every step tries all rows that are left. *Tying*: all units share one path, and that is the first case. What the limit
costs at most, and how far the choice is from the best of so few rows at most, say the bounds of
:meth:`difa_compile.planner.choice.Planner.bound`: :func:`price_of_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import BudgetError, ErrorTableError, RowLimitError
from difa_compile.planner.choice import Planner
from difa_compile.planner.effects import tied
from difa_compile.planner.problem import Costs, Outcome, Problem, Unit, additive_error, outcome
from difa_compile.wording import quoted

Row = tuple[Decision, ...]
Allowed = tuple[frozenset[Decision], ...]
"""For each unit the decisions that it may take."""

_TRIED = 12
"""Pairs of rows worked out in full for each merging."""
_PLANNED = 4
"""Choices of kinds of rows that are planned in full."""
_WEIGHED = 64
"""Choices of kinds that are weighed at most: where there are more, kinds are left out one by one."""


def check_most(most: object) -> None:
    """Raise :class:`RowLimitError` unless a limit on distinct rows is a whole number, at least 1."""
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise RowLimitError(f"the limit on distinct rows is {quoted(most)}; give a whole number, at least 1")


def limit_rows(problem: Problem, budget: float, most: int) -> Outcome:
    """The choice for a budget with at most ``most`` distinct rows; for several budgets see :class:`FewRows`.

    Raises as :meth:`FewRows.choose`, and :class:`RowLimitError` for a limit that is no whole number above 0.
    """
    check_most(most)
    return FewRows(Planner(problem), most).choose(budget)


class FewRows:
    """A planner's choices held to at most ``most`` distinct rows; what they share is worked out once for all budgets.

    Raises :class:`RowLimitError` for a limit that is no whole number above 0.
    """

    def __init__(self, planner: Planner, most: int) -> None:
        check_most(most)
        self.planner, self.most = planner, most
        self._held: dict[Allowed, Planner] = {}
        self._plain: list[Outcome] = []

    def choose(self, budget: float, free: Outcome | None = None, *, polish: bool = True) -> Outcome:
        """The choice for a budget. ``free``: what the planner chooses for it, if that is known. ``polish``: as in
        :func:`difa_compile.planner.choice.choose`.

        Raises :class:`RowLimitError` where no plan of so few rows keeps to it: none of one row, which computes
        everything, does to a budget below 1. Raises :class:`BudgetError` as
        :func:`difa_compile.planner.choice.choose`.
        """
        free = self.planner.choose(budget, polish=polish) if free is None else free
        if distinct(free.columns) <= self.most:
            return free
        if self.most == 1:
            raise RowLimitError(
                "a plan of one row computes everything at every step, which takes the whole budget; allow 2 rows, or a "
                "budget of 1"
            )
        found = self._of_kinds(budget, polish)
        if not found:
            found = [each for each in (self._merged(budget), self._tied(budget, polish)) if each is not None]
        if not found:
            raise RowLimitError(
                f"no plan of at most {self.most} distinct rows was found for a budget of {budget:.4g}; allow more"
            )
        return min(found, key=lambda each: each.error)

    def unpolished(self, budget: float) -> list[Outcome]:
        """What paths have made of kinds of rows so far, within a budget: unlike the choice they make the plain sum of
        errors small (:func:`~difa_compile.planner.problem.additive_error`)."""
        return [each for each in self._plain if each.share <= budget]

    def bound(self, budget: float) -> float:
        """What :meth:`~difa_compile.planner.choice.Planner.bound` says of plans of so few rows: the least bound of all
        choices of kinds, where rows are kinds; else that of any number of rows. Raises :class:`BudgetError` as that."""
        anything = self.planner.bound(budget)
        least = math.inf
        for loose, allowed in self._weighed(budget) if anything > 0 else []:
            if loose >= least:
                break  # none of those that follow is below its own loose bound
            least = min(least, max(loose, self._planner(allowed).bound(budget)))
        return max(least, anything) if math.isfinite(least) else anything

    # Kinds of rows.

    @cached_property
    def _parts(self) -> tuple[tuple[Decision, ...], ...]:
        """By unit, the kinds of rows there are; none where rows are no kinds: unless one unit stands by itself, or
        around one other and is there computed in full or not."""
        problem = self.planner.problem
        readers = tuple(dict.fromkeys((REUSE, *problem.readers)))
        if len(problem.units) == 1:
            return ((*problem.computed(0), *readers),)
        if len(problem.units) == 2 and problem.units[1].inside == 0 and problem.computed(0) == (FULL,):
            return readers, (*problem.computed(1), *readers)
        return ()

    @cached_property
    def _kinds(self) -> list[Allowed]:
        """All choices of ``most`` kinds of rows; empty where rows are no kinds, or where there are too many."""
        every = [(place, kind) for place, part in enumerate(self._parts) for kind in part]
        count = min(self.most, len(every))
        if not every or math.comb(len(every), count) > _WEIGHED:
            return []
        choices = (self._allowing(chosen) for chosen in combinations(every, count))
        return [allowed for allowed in choices if allowed is not None]

    def _allowing(self, chosen: Sequence[tuple[int, Decision]]) -> Allowed | None:
        """What units may take where only these kinds of rows are there; None if no step could be the first."""
        parts = [frozenset(kind for place, kind in chosen if place == part) for part in range(len(self._parts))]
        if all(kind.reads_caches for kind in parts[-1]):
            return None
        return (parts[0],) if len(parts) == 1 else (parts[0] | {FULL}, parts[1])

    def _weighed(self, budget: float) -> list[tuple[float, Allowed]]:
        """The choices of kinds that can keep to a budget, the most promising first, each with a sum of errors that none
        of its plans can go below."""
        if not self._kinds:
            return []
        price = self.planner.price(budget)
        found = [
            (self._planner(allowed).loosely(budget, price), allowed)
            for allowed in self._kinds
            if self._planner(allowed).least.share <= budget
        ]
        return sorted(found, key=lambda each: each[0])

    def _left_over(self, budget: float) -> list[Allowed]:
        """What is left when kinds of rows are left out one by one, each time the one that is missed least."""
        kinds = [(place, kind) for place, part in enumerate(self._parts) for kind in part]
        price = self.planner.price(budget)
        while len(kinds) > self.most:
            found: list[tuple[float, int]] = []
            for index in range(len(kinds)):
                allowed = self._allowing(kinds[:index] + kinds[index + 1 :])
                if allowed is not None:
                    held = self.planner.held_to(allowed)
                    if held.least.share <= budget:
                        found.append((held.loosely(budget, price), index))
            if not found:
                return []
            del kinds[min(found)[1]]
        allowed = self._allowing(kinds)
        return [] if allowed is None else [allowed]

    def _planner(self, allowed: Allowed) -> Planner:
        if allowed not in self._held:
            self._held[allowed] = self.planner.held_to(allowed)
        return self._held[allowed]

    def _of_kinds(self, budget: float, polish: bool) -> list[Outcome]:
        """The best plan of the most promising choices of kinds, if there is one."""
        weighed = [allowed for _, allowed in self._weighed(budget)][:_PLANNED]
        found: list[tuple[Outcome, Planner]] = []
        for allowed in weighed or (self._left_over(budget) if self._parts else []):
            planner = self._planner(allowed)
            each = planner.choose(budget, polish=False)
            if distinct(each.columns) <= self.most and each.share <= budget * (1 + 1e-9):
                found.append((each, planner))
        self._plain += [each for each, _ in found]
        if not found:
            return []
        best, planner = min(found, key=lambda each: each[0].error)
        polished = planner.choose(budget) if polish else best
        return [polished if distinct(polished.columns) <= self.most else best]

    # Several units with paths of their own.

    def _tied(self, budget: float, polish: bool) -> Outcome | None:
        """The best plan in which all units that are in no other share one path, and those inside are full there."""
        problem = self.planner.problem
        if len(problem.units) == 1:
            return None
        try:
            found = self._together.choose(budget, polish=polish)
        except (BudgetError, RowLimitError):
            return None
        column, full_column = found.columns[0], (FULL,) * problem.steps
        columns = [column if unit.inside is None else full_column for unit in problem.units]
        result = outcome(problem, columns)
        return result if distinct(columns) <= self.most and result.share <= budget * (1 + 1e-9) else None

    @cached_property
    def _together(self) -> FewRows:
        """The same for one unit in place of all that are in no other."""
        problem = self.planner.problem
        outer = [unit for unit in problem.units if unit.inside is None]
        full = sum(unit.costs.computed[FULL] for unit in problem.units)
        costs = Costs({FULL: full}, *(sum(getattr(unit.costs, name) for unit in outer) for name in ("read", "fill")))
        effects = tied([replace(unit.effects, computed={}, residual={}) for unit in outer])
        group = Unit(tuple(site for unit in outer for site in unit.sites), effects, costs)
        return FewRows(Planner(replace(problem, units=(group,))), self.most)

    def _merged(self, budget: float) -> Outcome | None:
        """The best merged plan within the budget; the plan to start from is made cheaper until merging keeps to it."""
        start = budget
        for _ in range(6):
            try:
                rough = self.planner.choose(start, polish=False)
            except BudgetError:
                return None
            found = _merge(self.planner.problem, rough, self.most, budget)
            if found is not None:
                return found
            start = max(self.planner.least.share, start * 0.93)
        return None


@dataclass(frozen=True)
class RowPrice:
    """What a limit on distinct rows costs, in dB of the plain sum of errors
    (:func:`~difa_compile.planner.problem.additive_error`): at least ``low``, at most ``high``, and the best of the
    plans found is at most ``gap`` from the best one of so few rows. None where nothing is known."""

    low: float
    high: float | None
    gap: float | None


def price_of_rows(few: FewRows, limited: Outcome, free: Outcome) -> RowPrice:
    """What ``limited``, of few rows, gives up against ``free``, of any number, both of one budget."""
    problem = few.planner.problem
    budget = min(1.0, max(limited.share, free.share))
    error = min(additive_error(problem, each.columns) for each in (limited, *few.unpolished(budget)))
    unlimited = [free, few.planner.choose(budget, polish=False)]
    best = min(error, *(additive_error(problem, each.columns) for each in unlimited))
    below, bound = few.planner.bound(budget), few.bound(budget)
    if not (error > 0 and best > 0):
        return RowPrice(0.0, None, None)
    return RowPrice(
        max(0.0, _decibels(bound, best) or 0.0),
        None if below <= 0 else _decibels(error, below),
        None if bound <= 0 else _decibels(error, bound),
    )


def _decibels(error: float, other: float) -> float | None:
    """By how many dB an error is above another, at least 0."""
    return max(0.0, 10 * math.log10(error / other)) if error > 0 else None


def distinct(columns: Sequence[Sequence[Decision]]) -> int:
    """The number of distinct rows of ``columns[unit][step]``."""
    return len(set(zip(*columns, strict=True)))


def _merge(problem: Problem, start: Outcome, most: int, budget: float) -> Outcome | None:
    rows: list[Row] = list(zip(*start.columns, strict=True))
    share = start.share
    while len(set(rows)) > most:
        counts = {row: rows.count(row) for row in rows}
        pairs = sorted(
            ((_apart(problem, first, second) * min(counts[first], counts[second]), index, first, second)
             for index, (first, second) in enumerate(combinations(counts, 2))),
            key=lambda pair: pair[:2],
        )  # fmt: skip
        best: tuple[float, list[Row], Outcome] | None = None
        for _, _, first, second in pairs[:_TRIED]:
            for kept, gone in ((first, second), (second, first)):
                tried = [kept if row == gone else row for row in rows]
                result = _possible(problem, tried)
                if result is None:
                    continue
                # what goes over the budget is charged as if it were error in the same proportion
                price = result.error * (1 + 20 * max(0.0, result.share - max(budget, share)))
                if best is None or price < best[0]:
                    best = price, tried, result
        if best is None:
            return None
        _, rows, kept_outcome = best
        share = kept_outcome.share
    return _reassigned(problem, rows, budget)


def _reassigned(problem: Problem, rows: list[Row], budget: float) -> Outcome | None:
    """Every step tries every row: first for the budget's sake, then for the error's."""
    best = _possible(problem, rows)
    patterns = sorted(set(rows), key=rows.index)
    tries = max(1, 4000 // (len(rows) * len(patterns) * len(problem.units)))
    for _ in range(min(4, tries)):
        changed = False
        for step in range(len(rows)):
            for row in patterns:
                if row == rows[step] or best is None:
                    continue
                tried = [*rows[:step], row, *rows[step + 1 :]]
                result = _possible(problem, tried)
                if result is not None and (max(budget, result.share), result.error) < (
                    max(budget, best.share),
                    best.error,
                ):
                    rows, best, changed = tried, result, True
        if not changed:
            break
    return best if best is not None and best.share <= budget * (1 + 1e-9) else None


def _possible(problem: Problem, rows: Sequence[Row]) -> Outcome | None:
    """What comes of rows, or None if a reader among them finds too little, or what was not measured."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    for unit, column in zip(problem.units, columns, strict=True):
        if unit.inside is not None:  # what its unit covers does nothing
            outer = columns[unit.inside]
            column[:] = [FULL if outer[step].kind.reads == "output" else each for step, each in enumerate(column)]
    try:
        return outcome(problem, columns)
    except ErrorTableError:
        return None


def _apart(problem: Problem, first: Row, second: Row) -> float:
    """About how much a step changes that follows one row in place of the other: the cost of the units that differ."""
    return sum(
        unit.costs.computed[FULL] for unit, a, b in zip(problem.units, first, second, strict=True) if a != b
    ) or sum(a != b for a, b in zip(first, second, strict=True))
