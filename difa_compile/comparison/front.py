"""What each budget buys: plans by the time they take and by how close their images are to the full model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from difa_compile.planner.make import chosen_for, plan_of
from difa_compile.planner.recipes import recipes
from difa_compile.planner.table import ErrorTable

if TYPE_CHECKING:
    from difa_compile.comparison.planned import Trials
    from difa_compile.plan.plan import Plan

BUDGETS = (0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
"""Of a front that is run."""
ROUNDS = 1
"""How often each of its plans is timed beside the full model."""


class Origin(StrEnum):
    """Where a point comes from: the planner, for another budget; the plan in question; a fixed recipe; a search by a
    threshold."""

    PLANNER = "planner"
    PLAN = "plan"
    RECIPE = "recipe"
    SEARCH = "search"


@dataclass(frozen=True)
class Point:
    """A plan that was run: ``share`` of the full model's time, PSNR in dB, None for the same images."""

    name: str
    origin: Origin
    share: float
    psnr: float | None

    def to_json(self) -> dict[str, object]:
        """The point as JSON types."""
        return {"name": self.name, "origin": str(self.origin), "share": self.share, "psnr": self.psnr}


def plans_of_front(table: ErrorTable, budgets: Sequence[float] = BUDGETS) -> Iterator[tuple[str, Origin, Plan]]:
    """What the planner chooses for each budget that is possible, and fixed recipes: name, origin and plan."""
    problem = table.problem()
    for budget, outcome in chosen_for(problem, budgets).items():
        yield f"budget {budget:g}", Origin.PLANNER, plan_of(table, outcome)
    for name, outcome in recipes(problem).items():
        yield name, Origin.RECIPE, plan_of(table, outcome)


def measured_front(
    table: ErrorTable,
    run: Trials,
    own: Plan | None = None,
    others: Mapping[str, Plan] | None = None,
    told: Callable[[str], None] = lambda text: None,
) -> tuple[Point, ...]:
    """Run the plans of a front beside the full model, quickest first.

    ``own``: the plan in question, which has been run: its promise says what came of it. ``others``: plans of other
    searches, by name. ``told`` is given a line of text for each plan.
    """
    points = []
    promise = None if own is None else own.settings.promise
    if promise is not None and promise.measured_share is not None:
        points.append(Point(promise.limit, Origin.PLAN, promise.measured_share, promise.measured_psnr))
    searched = ((name, Origin.SEARCH, plan) for name, plan in (others or {}).items())
    for name, origin, plan in (*plans_of_front(table), *searched):
        held = run.run(plan, rounds=ROUNDS)
        points.append(Point(name, origin, held.share, held.decibels))
        told(f"{name}: {held}")
    return tuple(sorted(points, key=lambda point: point.share))
