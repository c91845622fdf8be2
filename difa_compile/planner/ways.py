"""Several ways to choose, for plans that are tried: none of them is the best for every model and budget.

They differ in what a step that is not computed may take, and in whether the sum of errors or the greatest is made least
first. Which way is the best shows when its plan is run; the planner's model of errors cannot tell: on the demo model
plans of equal budget lie up to 2 dB apart, in another order at every budget.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from difa_compile.decision import REUSE, Decision, Kind
from difa_compile.errors import BudgetError, RowLimitError
from difa_compile.planner.choice import Planner
from difa_compile.planner.problem import Outcome, Problem
from difa_compile.planner.rows import distinct, limit_rows


@dataclass(frozen=True)
class Way:
    """``readers``: as in :class:`~difa_compile.planner.problem.Problem`. ``worst``: as in
    :func:`~difa_compile.planner.choice.choose`."""

    readers: tuple[Decision, ...]
    worst: bool = False

    def problem(self, problem: Problem) -> Problem:
        """The problem with these readers."""
        return replace(problem, readers=self.readers)


def ways_of(problem: Problem) -> tuple[Way, ...]:
    """The ways for a problem, its own first."""
    own = problem.readers
    first = next((each for each in own if each.kind is Kind.FORECAST), None)
    if first is None:
        return Way(own), Way(own, worst=True)
    mixed = (REUSE, replace(first, order=1), replace(first, order=2))
    return Way(own), Way(mixed), Way(mixed[1:]), Way(own, worst=True), Way(mixed, worst=True)


def candidates(problem: Problem, budget: float, most: int | None) -> list[tuple[Way, Outcome]]:
    """What each way chooses for a budget, with at most ``most`` distinct rows, each plan once, the problem's own way
    first.

    A way that has no such plan is left out.
    """
    found: dict[object, tuple[Way, Outcome]] = {}
    for way in ways_of(problem):
        try:
            outcome = chosen_by(way, problem, budget, most)
        except (BudgetError, RowLimitError):
            continue
        found.setdefault(outcome.columns, (way, outcome))
    return list(found.values())


def chosen_by(way: Way, problem: Problem, budget: float, most: int | None) -> Outcome:
    """What a way chooses for a budget, with at most ``most`` distinct rows.

    Raises :class:`BudgetError` and :class:`RowLimitError`.
    """
    given = way.problem(problem)
    outcome = Planner(given).choose(budget, worst=way.worst)
    if most is not None and distinct(outcome.columns) > most:
        return limit_rows(given, budget, most).outcome
    return outcome


def neighbours(way: Way, problem: Problem, start: Outcome, budget: float, most: int | None) -> list[Outcome]:
    """Plans that differ from ``start`` in one computed step, the most promising first."""
    found = Planner(way.problem(problem)).neighbours(start, budget)
    return [each for each in found if most is None or distinct(each.columns) <= most]
