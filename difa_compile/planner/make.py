"""Plans from a table of errors: under a budget of time, for a quality, with few distinct rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from difa_compile.decision import FULL
from difa_compile.errors import BudgetError, ErrorTableError, RowLimitError
from difa_compile.plan.cost import flops_saved
from difa_compile.plan.data import Cell, Promise
from difa_compile.plan.plan import Plan
from difa_compile.planner.choice import Planner
from difa_compile.planner.problem import Outcome, Problem, psnr
from difa_compile.planner.rows import FewRows, check_most, distinct, price_of_rows
from difa_compile.planner.table import ErrorTable
from difa_compile.wording import quoted

FRONT = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The budgets of a front."""


@dataclass(frozen=True)
class Limit:
    """What a plan is to keep to: one of ``budget`` (share of the full model's time), ``psnr`` (dB, against the full
    model's images) and ``error`` (mean squared, of images in [0, 1]); and at most ``max_rows`` distinct rows. Without
    ``blocks`` attention alone is planned: every block is computed.

    Raises :class:`BudgetError` unless exactly one is given, and for values that make no sense, and
    :class:`RowLimitError`.
    """

    budget: float | None = None
    psnr: float | None = None
    error: float | None = None
    max_rows: int | None = None
    blocks: bool = True

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
        if self.budget is not None:
            wanted = f"budget {self.budget:g}"
        else:
            wanted = f"{self.psnr:g} dB" if self.psnr is not None else f"error {self.error:g}"
        rows = "" if self.max_rows is None else f", at most {self.max_rows} distinct rows"
        return wanted + rows + ("" if self.blocks else ", attention alone")


def planned_from(table: ErrorTable, limit: Limit) -> ErrorTable:
    """What of a table a limit lets plans be made of: all of it, or :func:`attention_alone`."""
    return table if limit.blocks else attention_alone(table)


def attention_alone(table: ErrorTable) -> ErrorTable:
    """The table for plans in which every block is computed.

    Raises :class:`ErrorTableError` where attention was not measured.
    """
    blocks = {number for number, site in enumerate(table.sites) if site.is_block}
    units = tuple(replace(unit, inside=None) for unit in table.units if not blocks & set(unit.sites))
    if not units:
        raise ErrorTableError(
            "the table of errors holds blocks alone, so there is no plan of attention alone; measure attention, too "
            "(difa measure --attention)"
        )
    return replace(table, units=units)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def chosen(planner: Planner, limit: Limit) -> tuple[Outcome, str]:
    """The best decisions under a limit, and what is to be said of them.

    Raises :class:`BudgetError`, naming the nearest possible budget, and :class:`RowLimitError`.
    """
    if limit.budget is not None:
        free = planner.choose(limit.budget)
        if limit.max_rows is None:
            return free, ""
        few = FewRows(planner, limit.max_rows)
        limited = few.choose(limit.budget, free)
        return limited, cost_of_rows(few, limited, free)
    assert limit.mean_squared is not None
    free = planner.choose_error(limit.mean_squared)
    if limit.max_rows is None or distinct(free.columns) <= limit.max_rows:
        return free, ""
    few = FewRows(planner, limit.max_rows)
    limited = _few_rows_for(few, limit.mean_squared, free.share)
    return limited, cost_of_rows(few, limited, free)


def _few_rows_for(few: FewRows, error: float, share: float) -> Outcome:
    """The least share found, above ``share``, at which few rows come to the error allowed. The full model does, and it
    is one row."""
    low, high, best = share, 1.0, few.planner.choose(1.0)
    for halvings, polish in ((7, False), (3, True)):
        for _ in range(halvings if few.most > 1 else 0):
            middle = (low + high) / 2
            try:
                free = few.planner.choose(middle, polish=False)
                found = few.choose(middle, free, polish=polish)
            except (BudgetError, RowLimitError):  # so few rows take more time
                low = middle
                continue
            if found.error <= error:
                high, best = min(middle, found.share), found
            else:
                low = middle
        low = max(share, high - 0.1)
    return best


def cost_of_rows(few: FewRows, limited: Outcome, free: Outcome) -> str:
    """What a limit on distinct rows costs, in words; empty where it costs nothing.

    Said is what the planner chooses without it, what the limit costs of the plain sum of errors, at least and at most,
    and how far the choice is at most from the best of as few rows (:func:`difa_compile.planner.rows.price_of_rows`).
    """
    if limited.columns == free.columns:
        return ""
    text = (
        f"any number of rows would give {in_decibels(free.psnr)} at {free.share:.2f} of the time, where these give "
        f"{in_decibels(limited.psnr)} at {limited.share:.2f}"
    )
    price = price_of_rows(few, limited, free)
    if price.high is None:
        return text
    text += (
        f"; if errors of different steps did not cancel, that limit would cost {price.low:.1f} to {price.high:.1f} dB"
    )
    if price.gap is not None and price.gap < price.high:
        text += f", and no plan of as few rows would be more than {price.gap:.1f} dB better than the best found"
    return text


def in_decibels(psnr: float) -> str:
    """A PSNR in words; of errors above 1, which no image has, 0 dB."""
    return f"{max(0.0, psnr):.1f} dB" if math.isfinite(psnr) else "the same images"


def plan_of(table: ErrorTable, outcome: Outcome, limit: Limit | None = None, note: str = "") -> Plan:
    """The plan that a choice from ``table`` is; with a ``limit``, what is promised of it stands in it."""
    columns: list[Sequence[object]] = [(FULL,) * len(table.progress) for _ in table.sites]
    for unit, column in zip(table.units, outcome.columns, strict=True):
        heads = [table.sites[site].heads for site in unit.sites]
        at_sites = {decision: decision.at_sites(heads) for decision in dict.fromkeys(column)}
        for place, site in enumerate(unit.sites):
            columns[site] = [at_sites[decision][place] for decision in column]
    fitted = {
        site: weights
        for unit, weights in zip(table.units, outcome.weights, strict=bool(outcome.weights))
        for site in unit.sites
    }
    rows = tuple(
        tuple(
            Cell(columns[i][step], (), flops_saved(columns[i][step], site), fitted[i][step] if i in fitted else ())  # type: ignore[arg-type]
            for i, site in enumerate(table.sites)
        )
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
    blocks: bool = True,
    steps: int | None = None,
) -> Plan:
    """The best plan that a table of errors shows under one limit: see :class:`Limit`. Nothing is run.

    ``steps``: of the schedule that the plan is for, by default as many as were measured, or fewer
    (:meth:`~difa_compile.planner.table.ErrorTable.thinned`).

    Raises :class:`BudgetError`, :class:`RowLimitError`, :class:`ErrorTableError` for a table that is not complete, or
    that has no attention where ``blocks`` are to be left alone, and :class:`ScheduleError` for a number of ``steps``
    that the table does not tell of. Warns where the limit is one of time and another machine has measured the table.
    """
    limit = Limit(budget, psnr, error, max_rows, blocks)
    if steps is not None:
        table = table.thinned(steps)
    if limit.budget is not None:
        table.tell_machine()
    table = planned_from(table, limit)
    outcome, note = chosen(Planner(table.problem()), limit)
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
