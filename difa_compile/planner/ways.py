"""Several ways to choose, for plans that are tried: none of them is the best for every model and budget.

They differ in what a step that is not computed may take, and in whether the sum of errors or the greatest is made least
first. Which way is the best shows when its plan is run; the planner's model of errors cannot tell, and the order is
another one at every budget.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from difa_compile.decision import REUSE, Decision
from difa_compile.errors import BudgetError, RowLimitError
from difa_compile.planner.choice import Planner
from difa_compile.planner.problem import Outcome, Problem
from difa_compile.planner.rows import FewRows, distinct

LONG = 120
"""Steps from which on forecasts of order 2 are not considered."""


@dataclass(frozen=True)
class Way:
    """``readers``: as in :class:`~difa_compile.planner.problem.Problem`. ``worst``: as in
    :func:`~difa_compile.planner.choice.choose`."""

    readers: tuple[Decision, ...]
    worst: bool = False

    def problem(self, problem: Problem) -> Problem:
        """The problem with these readers."""
        return replace(problem, readers=self.readers)


class Ways:
    """The ways for one problem; what a way works out for all budgets is kept."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._planners: dict[tuple[Decision, ...], Planner] = {}
        self.all = ways_of(problem)

    @property
    def own(self) -> Way:
        """The problem's own way."""
        return self.all[0]

    @property
    def few(self) -> tuple[Way, ...]:
        """One way of each kind: the problem's own, one of more readers, and the least greatest error."""
        return (self.all[0], self.all[1], next(way for way in self.all if way.worst))

    def candidates(self, budget: float, most: int | None) -> list[tuple[Way, Outcome]]:
        """What each way chooses for a budget, with at most ``most`` distinct rows, each plan once, beginning with the
        problem's own way. A way that has no such plan is left out."""
        found: dict[object, tuple[Way, Outcome]] = {}
        for way in self.all:
            outcome = self.choose(way, budget, most)
            if outcome is not None:
                found.setdefault(outcome.columns, (way, outcome))
        return list(found.values())

    def choose(self, way: Way, budget: float, most: int | None) -> Outcome | None:
        """What a way chooses for a budget, with at most ``most`` distinct rows; None where it has no such plan."""
        try:
            outcome = self.planner(way).choose(budget, worst=way.worst)
            if most is None or distinct(outcome.columns) <= most:
                return outcome
            if way.worst:
                return None  # held to few rows it is what the way of these readers is that is not ``worst``
            return FewRows(self.planner(way), most).choose(budget, outcome)
        except (BudgetError, RowLimitError):
            return None

    def neighbours(self, way: Way, start: Outcome, budget: float, most: int | None) -> list[Outcome]:
        """Plans that differ from ``start`` in one computed step, the most promising first."""
        found = self.planner(way).neighbours(start, budget)
        return [each for each in found if most is None or distinct(each.columns) <= most]

    def planner(self, way: Way) -> Planner:
        """The planner of a way, made once."""
        if way.readers not in self._planners:
            self._planners[way.readers] = Planner(way.problem(self._problem))
        return self._planners[way.readers]


def ways_of(problem: Problem) -> tuple[Way, ...]:
    """The ways for a problem, its own first. Order 2 takes memory with the square of the steps, times that of the lags:
    it is left out of long schedules."""
    own = problem.readers
    first = next((each for each in own if each.order), None)
    if first is None:
        return Way(own), Way(own, worst=True)
    both = (REUSE, replace(first, order=1))
    if problem.steps > LONG:
        return Way(own), Way(both), Way(own, worst=True), Way(both, worst=True)
    mixed = (*both, replace(first, order=2))
    return Way(own), Way(mixed), Way(mixed[1:]), Way(own, worst=True), Way(mixed, worst=True)
