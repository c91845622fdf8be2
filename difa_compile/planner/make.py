"""Plans from a table of errors: under a budget of time, for a quality, with few distinct rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from difa_compile.decision import FULL
from difa_compile.errors import BudgetError
from difa_compile.plan.cost import flops_saved
from difa_compile.plan.data import Cell, Promise
from difa_compile.plan.plan import Plan
from difa_compile.planner.choice import Planner, choose, choose_error
from difa_compile.planner.problem import Outcome, Problem, psnr
from difa_compile.planner.rows import check_most, limit_rows
from difa_compile.planner.table import ErrorTable
from difa_compile.wording import quoted

FRONT = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The budgets of a front."""


@dataclass(frozen=True)
class Limit:
    """What a plan is to keep to: one of ``budget`` (share of the full model's time), ``psnr`` (dB, against the full
    model's images) and ``error`` (mean squared, of images in [0, 1]); and at most ``max_rows`` distinct rows.

    Raises :class:`BudgetError` unless exactly one is given, and for values that make no sense, and
    :class:`RowLimitError`.
    """

    budget: float | None = None
    psnr: float | None = None
    error: float | None = None
    max_rows: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("budget", "psnr", "error") if getattr(self, name) is not None]
        if len(given) != 1:
            raise BudgetError(
                f"{' and '.join(given) or 'nothing'} is given to plan for; give one of budget (a share of the full "
                "model's time), psnr (dB) and error (mean squared)"
            )
        if self.budget is not None and not (_is_number(self.budget) and 0 < self.budget <= 1):
            raise BudgetError(
                f"the budget is {quoted(self.budget)}; give a share of the full model's time, above 0 and at most 1"
            )
        if self.psnr is not None and not (_is_number(self.psnr) and 0 < self.psnr <= 200):
            raise BudgetError(f"the PSNR to plan for is {quoted(self.psnr)}; give decibels, above 0 and at most 200")
        if self.error is not None and not (_is_number(self.error) and self.error > 0):
            raise BudgetError(f"the error allowed is {quoted(self.error)}; give a positive mean squared error")
        if self.max_rows is not None:
            check_most(self.max_rows)

    @property
    def mean_squared(self) -> float | None:
        """The error allowed; None where a budget is given."""
        return 10 ** (-self.psnr / 10) if self.psnr is not None else self.error

    def __str__(self) -> str:
        rows = "" if self.max_rows is None else f", at most {self.max_rows} distinct rows"
        if self.budget is not None:
            return f"budget {self.budget:g}{rows}"
        return (f"{self.psnr:g} dB" if self.psnr is not None else f"error {self.error:g}") + rows


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def chosen(problem: Problem, limit: Limit) -> tuple[Outcome, str]:
    """The best decisions under a limit, and what is to be said of them.

    Raises :class:`BudgetError`, naming the nearest possible budget, and :class:`RowLimitError`.
    """
    if limit.budget is None:
        assert limit.mean_squared is not None
        found = choose_error(problem, limit.mean_squared)
        if limit.max_rows is None:
            return found, ""
        return _few_rows_for(problem, found, limit)
    if limit.max_rows is None:
        return choose(problem, limit.budget), ""
    limited = limit_rows(problem, limit.budget, limit.max_rows)
    return limited.outcome, cost_of_rows(limited.outcome, choose(problem, limit.budget))


def _few_rows_for(problem: Problem, free: Outcome, limit: Limit) -> tuple[Outcome, str]:
    """The least share at which few rows come to the error allowed."""
    assert limit.mean_squared is not None
    assert limit.max_rows is not None
    low, high = free.share, 1.0
    best = limit_rows(problem, high, limit.max_rows).outcome
    for _ in range(10):
        middle = (low + high) / 2
        found = limit_rows(problem, middle, limit.max_rows).outcome
        if found.error <= limit.mean_squared:
            high, best = middle, found
        else:
            low = middle
    return best, cost_of_rows(best, free)


def cost_of_rows(limited: Outcome, free: Outcome) -> str:
    """What a limit on distinct rows costs, in words; empty where it costs nothing."""
    if limited.columns == free.columns:
        return ""
    return (
        f"any number of rows would give {free.psnr:.1f} dB at {free.share:.2f} of the time, where these give "
        f"{limited.psnr:.1f} dB at {limited.share:.2f}"
    )


def plan_of(table: ErrorTable, outcome: Outcome, limit: Limit | None = None, note: str = "") -> Plan:
    """The plan that a choice from ``table`` is; with a ``limit``, what is promised of it stands in it."""
    columns: list[Sequence[object]] = [(FULL,) * len(table.progress) for _ in table.sites]
    for unit, column in zip(table.units, outcome.columns, strict=True):
        for site in unit.sites:
            columns[site] = column
    rows = tuple(
        tuple(Cell(columns[i][step], (), flops_saved(columns[i][step], site)) for i, site in enumerate(table.sites))  # type: ignore[arg-type]
        for step in range(len(table.progress))
    )
    promise = None if limit is None else Promise(str(limit), outcome.share, _finite(outcome.psnr), note=note)
    return Plan(table.model, replace(table.settings, promise=promise), table.sites, table.progress, rows)


def _finite(decibels: float) -> float | None:
    """For a promise: None where nothing differs. An error above 1, which no image has, is 0 dB."""
    return max(0.0, decibels) if math.isfinite(decibels) else None


def plan_from_table(
    table: ErrorTable,
    *,
    budget: float | None = None,
    psnr: float | None = None,
    error: float | None = None,
    max_rows: int | None = None,
) -> Plan:
    """The best plan that a table of errors shows under one limit: see :class:`Limit`. Nothing is run.

    Raises :class:`BudgetError`, :class:`RowLimitError`, and :class:`ErrorTableError` for a table that is not complete.
    Warns where the limit is one of time and another machine has measured the table.
    """
    limit = Limit(budget, psnr, error, max_rows)
    if limit.budget is not None:
        table.tell_machine()
    outcome, note = chosen(table.problem(), limit)
    return plan_of(table, outcome, limit, note)


def front_of(problem: Problem, budgets: Sequence[float] = FRONT) -> tuple[Outcome, ...]:
    """What each budget buys, from the least that is possible on, ``budgets`` ascending; what a smaller one already
    bought is not repeated."""
    planner = Planner(problem)
    front = [planner.least]
    for budget in budgets:
        if budget > front[0].share:
            found = planner.choose(budget)
            if found.error < front[-1].error:
                front.append(found)
    return tuple(front)


__all__ = ["FRONT", "Limit", "chosen", "front_of", "plan_from_table", "plan_of", "psnr"]
