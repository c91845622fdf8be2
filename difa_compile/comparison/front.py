"""What each budget buys: plans by the time they take and by how close their images are to the full model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from difa_compile.planner.fitting import FITTINGS
from difa_compile.planner.make import plan_of
from difa_compile.planner.recipes import recipes
from difa_compile.planner.table import ErrorTable
from difa_compile.planner.ways import Ways

if TYPE_CHECKING:
    from difa_compile.comparison.kept import Runs
    from difa_compile.plan.plan import Plan
    from difa_compile.planner.problem import Outcome, Problem

BUDGETS = (0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
"""Of a front that is run."""
NEAR = 0.03
"""A budget that is no further from the time of the plan in question is left to that."""
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


def choices_for_budgets(problem: Problem, budgets: Sequence[float] = BUDGETS) -> dict[float, list[Outcome]]:
    """For each budget that is possible what several ways choose for it: none of them is the best at all budgets."""
    ways = Ways(problem)
    found = {budget: ways.candidates(budget, None) for budget in budgets}
    return {budget: [outcome for way, outcome in each if way in ways.few] for budget, each in found.items() if each}


def measured_front(
    table: ErrorTable,
    run: Runs,
    own: Plan | None = None,
    others: Mapping[str, Plan] | None = None,
    told: Callable[[str], None] = lambda text: None,
) -> tuple[Point, ...]:
    """Run plans for several budgets, and fixed recipes, beside the full model; quickest first.

    Of each budget what several ways choose is tried, then the best with fitted weights, and the best of these timed.
    ``own``: the plan in question, which has been run, maybe after more trials than that: its promise says what came of
    it, and its budget is not planned for again. ``others``: plans of other searches, by name. ``told`` is given a line
    of text for each budget and for each plan that is timed.
    """
    points = []
    promise = None if own is None else own.settings.promise
    if promise is not None and promise.measured_share is not None:
        points.append(Point(promise.limit, Origin.PLAN, promise.measured_share, promise.measured_psnr))
    taken = [point.share for point in points]

    def add(name: str, origin: Origin, plan: Plan) -> None:
        held = run.run(plan, rounds=ROUNDS)
        points.append(Point(name, origin, held.share, held.decibels))
        told(f"{name}: {held}")

    problem = table.problem()
    for budget, choices in choices_for_budgets(problem).items():
        if all(abs(budget - share) > NEAR for share in taken):
            name = f"budget {budget:g}"
            told(f"{name}: trying what several ways choose, and fitted weights")
            add(name, Origin.PLANNER, _best(table, problem, choices, run))
    for name, outcome in recipes(problem).items():
        add(name, Origin.RECIPE, plan_of(table, outcome))
    for name, plan in (others or {}).items():
        add(name, Origin.SEARCH, plan)
    return tuple(sorted(points, key=lambda point: point.share))


def _best(table: ErrorTable, problem: Problem, choices: Sequence[Outcome], run: Runs) -> Plan:
    """The plan whose images are closest, of these choices and of the best of them with fitted weights."""
    judged = [(run.judge(plan_of(table, each)), each) for each in choices]
    psnr, outcome = max(judged, key=lambda each: each[0])
    fitted = FITTINGS[0].within(problem, outcome)
    if fitted is not outcome and run.judge(plan_of(table, fitted)) > psnr:
        outcome = fitted
    return plan_of(table, outcome)
