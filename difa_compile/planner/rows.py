"""At most K distinct rows: engines are built one by one, and each distinct row of a plan is one.

Two ways, the better one counts. *Merging*: as long as a plan has too many rows, the pair whose merging changes least is
merged; the price of letting a step follow another's row is estimated cell by cell and the most promising pairs are
worked out in full; then every step tries all rows that are left. *Tying*: all units share one path, so that there are
two or three rows. What the limit can have cost at most says :meth:`difa_compile.planner.choice.Planner.bound`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import combinations

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import BudgetError, ErrorTableError, RowLimitError
from difa_compile.planner.choice import Planner
from difa_compile.planner.effects import tied
from difa_compile.planner.problem import Costs, Outcome, Problem, Unit, outcome
from difa_compile.wording import quoted

Row = tuple[Decision, ...]

_TRIED = 12
"""Pairs of rows worked out in full for each merging."""


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
        found = [each for each in (self._merged(budget), self._tied(budget, polish)) if each is not None]
        if not found:
            raise RowLimitError(
                f"no plan of at most {self.most} distinct rows was found for a budget of {budget:.4g}; allow more"
            )
        return min(found, key=lambda each: each.error)

    def _tied(self, budget: float, polish: bool) -> Outcome | None:
        """The best plan in which all units that are in no other share one path, and those inside are full there."""
        problem = self.planner.problem
        try:
            found = self._together.choose(budget, polish=polish)
        except BudgetError:
            return None
        column, full_column = found.columns[0], (FULL,) * problem.steps
        columns = [column if unit.inside is None else full_column for unit in problem.units]
        result = outcome(problem, columns)
        return result if distinct(columns) <= self.most and result.share <= budget * (1 + 1e-9) else None

    @cached_property
    def _together(self) -> Planner:
        """The planner of one unit in place of all that are in no other."""
        problem = self.planner.problem
        outer = [unit for unit in problem.units if unit.inside is None]
        full = sum(unit.costs.computed[FULL] for unit in problem.units)
        costs = Costs({FULL: full}, *(sum(getattr(unit.costs, name) for unit in outer) for name in ("read", "fill")))
        effects = tied([replace(unit.effects, computed={}, residual={}) for unit in outer])
        group = Unit(tuple(site for unit in outer for site in unit.sites), effects, costs)
        readers = problem.readers if self.most > len({REUSE, *problem.readers}) else (REUSE,)
        return Planner(replace(problem, units=(group,), readers=readers))

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
