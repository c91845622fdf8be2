"""Recipes that nobody measured anything for: every n-th step is computed, else all blocks are reused or forecast.

What tools with a fixed recipe do, as plans, so that a choice can be compared with them.
"""

from __future__ import annotations

from dataclasses import replace

from difa_compile.decision import FULL, REUSE
from difa_compile.errors import ErrorTableError
from difa_compile.planner.problem import FORECAST, Outcome, Problem, outcome

FIRST = 3
"""So many steps are computed before a recipe begins, and again where what was kept is gone."""
INTERVALS = (2, 3, 4, 6)


def uniform(problem: Problem, every: int, order: int) -> Outcome | None:
    """The first three steps and then every n-th computed; at the others all units that are in no other are reused, or
    forecast with this ``order``.

    None where the table has not measured as far back as that reads, or where the schedule has too few steps for it.
    """
    reader = replace(FORECAST, order=order) if order else REUSE
    column = tuple(
        FULL if since < FIRST or (since - FIRST) % every == 0 else reader
        for since in (
            step - max([0, *(each for each in problem.begins if each <= step)]) for step in range(problem.steps)
        )
    )
    full = (FULL,) * problem.steps
    if column == full:
        return None
    try:
        return outcome(problem, [column if unit.inside is None else full for unit in problem.units])
    except ErrorTableError:
        return None


def recipes(problem: Problem) -> dict[str, Outcome]:
    """The recipes of usual intervals, by name."""
    named = {
        f"{'forecast' if order else 'reuse'} every {every}": uniform(problem, every, order)
        for order in (0, 1)
        for every in INTERVALS
    }
    return {name: found for name, found in named.items() if found is not None}
