"""A plan held to its limit: chosen, run, chosen anew from what that showed, and others tried in its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from difa_compile.comparison.kept import ROUNDS, Held, Runs
from difa_compile.decision import Decision
from difa_compile.errors import BudgetError, RowLimitError
from difa_compile.plan.data import Promise
from difa_compile.plan.plan import Plan
from difa_compile.planner.choice import Planner
from difa_compile.planner.fitting import FITTINGS, Fitting
from difa_compile.planner.make import Limit, chosen, cost_of_rows, in_decibels, plan_of, planned_from
from difa_compile.planner.problem import Outcome, rescaled
from difa_compile.planner.problem import outcome as accounted
from difa_compile.planner.rows import FewRows
from difa_compile.planner.table import ErrorTable
from difa_compile.planner.ways import Way, Ways

TRIES = 3
"""How many plans are run at most to keep to a limit."""
OFF = 0.05
"""By how much a measured time may differ from the expected one, as a share of it, before it is measured again."""
AGAIN = 2 * ROUNDS
"""How often a plan is timed then."""
MOST_OFF = 1.5
"""By what factor a measured time is taken to differ from the predicted one at most."""
RUNS = 16
"""How many plans are run at most, all in all."""
SLACK = 0.05
"""By how much, as a share of it, a time may be over the budget; machines are not more even than that."""


def held_to(
    table: ErrorTable, limit: Limit, run: Runs, runs: int = RUNS, told: Callable[[str], None] = lambda text: None
) -> Plan:
    """The best plan of a table within a limit, by trials that go on afterwards; see
    :func:`difa_compile.comparison.planned.plan_within`."""
    return _Search(table, limit, run, runs, told).best()


@dataclass(frozen=True)
class _Tried:
    """A plan that was run and timed."""

    outcome: Outcome
    held: Held
    plan: Plan
    rank: tuple[bool, float]
    """Whether it keeps to the limit, and how good it is otherwise; greater is better."""


class _Search:
    """The search of one plan. ``left``: how many more plans may be run."""

    def __init__(self, table: ErrorTable, limit: Limit, run: Runs, runs: int, told: Callable[[str], None]) -> None:
        self.table, self.limit, self.run, self.left, self.told = planned_from(table, limit), limit, run, runs, told
        self.problem = self.table.problem()
        self.ways = Ways(self.problem)
        self.aimed = limit
        """The limit that choices are made for: corrected by what was measured."""
        self.first: Held | None = None
        """What came of the choice for the limit itself."""
        self.kept: _Tried | None = None
        self.off = 1.0
        """By what factor times differ from the predicted ones, as the last plan showed it."""
        self.timed = 0
        self.exhausted = False
        """Whether the table has no plan of as little time as would have to be tried next."""

    def best(self) -> Plan:
        """The best plan found."""
        self._corrected()
        assert self.kept is not None
        if self.limit.budget is not None:
            self._closer(self.kept)
        elif self.kept.rank[0]:
            self._quicker(self.kept)
        elif math.isfinite(self.kept.held.psnr):
            outcome = self.kept.outcome
            fitting, _ = self._best_fitting(outcome, self.kept.held.psnr)
            if fitting is not None and self.left:
                self._try(self._fitted(outcome, fitting), self._cost_of_rows(outcome, outcome.share))
        if self.kept.rank[0]:
            return self.kept.plan
        return with_note(self.kept.plan, _relaxed(self.limit, self.kept.held, self.timed, self.exhausted))

    def _try(self, outcome: Outcome, note: str = "") -> _Tried:
        """Run a choice, timed, and keep it if it is the best so far."""
        self.left -= 1
        self.timed += 1
        plan = plan_of(self.table, outcome, self.limit, note)
        held = self.run.run(plan)
        if abs(held.share - outcome.share * self.off) > OFF * outcome.share * self.off:
            held = self.run.run(plan, AGAIN)  # the machine's doing, or else it says the same again
        self.off = held.share / outcome.share if outcome.share else 1.0
        plan = with_promise(plan, held, _over(self.limit, held))
        if self.first is None:
            self.first = held
        else:
            plan = with_note(plan, _given_up(self.limit, self.first, held))
        tried = _Tried(outcome, held, plan, _kept(self.limit, held))
        self.told(str(plan.settings.promise))
        if self.kept is None or tried.rank > self.kept.rank:
            self.kept = tried
        return tried

    def _corrected(self) -> None:
        """Choose, run, and choose anew from what that showed."""
        for _ in range(min(TRIES, self.left)):
            try:
                outcome, note = chosen(Planner(self.problem), self.aimed)
            except (BudgetError, RowLimitError):
                if self.kept is None:
                    raise
                self.exhausted = True
                return  # less than the first choice took is not possible
            if self.kept is not None and outcome.columns == self.kept.outcome.columns:
                return
            tried = self._try(outcome, note)
            if tried.rank[0] and _close(self.limit, tried.held):
                return
            held = tried.held
            if self.limit.budget is not None:
                at_once = min(MOST_OFF, max(1 / MOST_OFF, self.off))  # more than that is the machine's doing
                self.aimed = replace(self.limit, budget=min(1.0, self.limit.budget / at_once))
            elif math.isfinite(held.psnr):
                self.problem = rescaled(self.problem, max(outcome.error, 1e-12), 10 ** (-held.psnr / 10))
            else:
                return  # the same images, which say nothing of the response

    def _closer(self, kept: _Tried) -> None:
        """Look for plans of the same predicted time whose images are closer to the full model's. One run is left for
        the closest, to be timed."""
        budget = min(1.0, kept.outcome.share)
        if self.left < 2 or not math.isfinite(kept.held.psnr):
            return
        way, outcome, psnr = self.ways.own, kept.outcome, kept.held.psnr
        seen = {outcome.columns}
        for other, each in self.ways.candidates(budget, self.limit.max_rows):
            if self.left > 1 and each.columns not in seen:
                seen.add(each.columns)
                found = self._judged(each, psnr)
                if found > psnr:
                    way, outcome, psnr = other, each, found
        fitting, psnr = self._best_fitting(outcome, psnr)
        moved = True
        while moved and self.left > 1:
            moved = False
            for each in self._moved(way, outcome, budget, seen):
                found = self._judged(self._fitted(each, fitting), psnr)
                if found > psnr:
                    outcome, psnr, moved = each, found, True
                    break
        if fitting is not None or outcome.columns != kept.outcome.columns:
            self._try(self._fitted(outcome, fitting), self._cost_of_rows(outcome, budget))

    def _moved(
        self, way: Way, outcome: Outcome, budget: float, seen: set[tuple[tuple[Decision, ...], ...]]
    ) -> Iterator[Outcome]:
        """Plans with one computed step moved that are not in ``seen``, which they are put in, until one run is left."""
        for each in self.ways.neighbours(way, outcome, budget, self.limit.max_rows):
            if self.left < 2:
                return
            if each.columns not in seen:
                seen.add(each.columns)
                yield each

    def _cost_of_rows(self, outcome: Outcome, budget: float) -> str:
        """What the limit on rows costs a choice for a budget, in words."""
        if self.limit.max_rows is None:
            return ""
        planner = self.ways.planner(self.ways.own)
        free = planner.choose(max(budget, planner.least.share))
        return cost_of_rows(FewRows(planner, self.limit.max_rows), outcome, free)

    def _best_fitting(self, outcome: Outcome, psnr: float) -> tuple[Fitting | None, float]:
        """How to fit the weights of a plan's forecasts, and what that comes to; None and ``psnr``, which it comes to as
        it is, where that is no gain."""
        best: Fitting | None = None
        for fitting in FITTINGS:
            each = self._fitted(outcome, fitting)
            if self.left > 1 and each is not outcome:
                found = self._judged(each, psnr)
                if found > psnr:
                    best, psnr = fitting, found
        return best, psnr

    def _fitted(self, outcome: Outcome, fitting: Fitting | None) -> Outcome:
        """A plan with fitted weights; the plan itself where nothing is to be fitted."""
        return outcome if fitting is None else fitting.within(self.problem, outcome, self.limit.max_rows)

    def _judged(self, outcome: Outcome, best: float) -> float:
        self.left -= 1
        found = self.run.judge(plan_of(self.table, outcome, self.limit))
        self.told(f"another of the same time: {found:.1f} dB{'' if found > best else f', not the {best:.1f} so far'}")
        return found

    def _quicker(self, kept: _Tried) -> None:
        """Where another way to choose, or fitted weights, come closer in the same time, or the plan itself closer than
        was asked for, see how little time that needs. One run is left for what is found, to be timed."""
        better: tuple[float, Way, Outcome] | None = None
        for way, each in self.ways.candidates(min(1.0, kept.outcome.share), self.limit.max_rows):
            if self.left > 1 and not way.worst and each.columns != kept.outcome.columns:
                found = self._judged(each, kept.held.psnr)
                if found > max(kept.held.psnr, better[0] if better else -math.inf):
                    better = found, way, each
        psnr, way, outcome = better or (kept.held.psnr, self.ways.own, kept.outcome)
        if not math.isfinite(psnr):
            return
        fitting, psnr = self._best_fitting(outcome, psnr)
        if not self.left or not math.isfinite(psnr):
            return
        if better is not None or fitting is not None or not _close(self.limit, kept.held):
            quickest, columns = self._least_time(way, fitting, outcome, psnr)
            if quickest.share < kept.outcome.share - self._even:
                self._try(quickest, self._cost_of_rows(columns, quickest.share))

    @property
    def _even(self) -> float:
        """Shares of the full model's time that are no further apart are not told apart: half a step's."""
        return 0.5 / self.problem.steps

    def _least_time(self, way: Way, fitting: Fitting | None, start: Outcome, psnr: float) -> tuple[Outcome, Outcome]:
        """The quickest plan found that has the quality asked for, fitted: ``start``, whose images come to ``psnr``, or
        one that takes less; and the same not fitted. With one run left it is what is expected to have that quality.

        First the time is bisected, the error that the last plan showed for a guess; then computed steps are moved of
        the plan that takes less and fell short by the least.
        """
        assert self.limit.mean_squared is not None
        asked, factor = -10 * math.log10(self.limit.mean_squared), self._factor(way, start, psnr)
        quickest, seen = start, {start.columns}
        expected = self._as_expected(way, start, fitting, factor)
        nearest: tuple[float, Outcome] | None = None
        most_time, least_time = start.share, self.ways.planner(way).least.share
        guess = True
        while most_time - least_time > self._even:
            between = most_time - least_time
            each = self._between(way, factor if guess else None, least_time, most_time)
            if each is None:
                break
            if self.left < 2:
                return (
                    (self._as_expected(way, each, fitting, factor), each) if quickest is start else (expected, quickest)
                )
            seen.add(each.columns)
            psnr = self._reached(self._fitted(each, fitting), asked)
            if psnr >= asked:
                quickest, most_time = each, each.share
                expected = self._as_expected(way, each, fitting, factor)
            else:
                least_time = each.share
                if nearest is None or psnr > nearest[0]:
                    nearest = psnr, each
            if not math.isfinite(psnr):
                return expected, quickest
            factor = self._factor(way, each, psnr)
            guess = most_time - least_time <= between / 2
        moved = nearest is not None
        while moved and self.left > 1:
            assert nearest is not None
            moved = False
            most = (nearest[1].share + most_time) / 2
            for each in self._moved(way, nearest[1], most, seen):
                psnr = self._reached(self._fitted(each, fitting), asked)
                if psnr >= asked:
                    return self._as_expected(way, each, fitting, factor), each
                if psnr > nearest[0]:
                    nearest, moved = (psnr, each), True
                    break
        return expected, quickest

    def _factor(self, way: Way, outcome: Outcome, psnr: float) -> float:
        """By what factor a plan's error, as a way sees it, differs from the measured one."""
        predicted = accounted(self.ways.planner(way).problem, outcome.columns).error  # fitted ones have another
        return 10 ** (-psnr / 10) / max(predicted, 1e-12)

    def _between(self, way: Way, factor: float | None, least_time: float, most_time: float) -> Outcome | None:
        """A choice that takes more time than one and less than the other: that which is expected to have the quality
        asked for, or (without a ``factor``, too) one in the middle; None where there is none."""
        assert self.limit.mean_squared is not None
        if factor is not None:
            aimed = replace(self.limit, psnr=None, error=self.limit.mean_squared / factor)
            with suppress(BudgetError, RowLimitError):
                outcome, _ = chosen(self.ways.planner(way), aimed)
                if least_time < outcome.share < most_time:
                    return outcome
        for part in (1 / 2, 7 / 8):
            found = self.ways.choose(way, least_time + part * (most_time - least_time), self.limit.max_rows)
            if found is not None and least_time < found.share < most_time:
                return found
        return None

    def _as_expected(self, way: Way, outcome: Outcome, fitting: Fitting | None, factor: float) -> Outcome:
        """The plan with fitted weights, and the error that it is expected to have after what came of others."""
        error = accounted(self.ways.planner(way).problem, outcome.columns).error * factor
        return replace(self._fitted(outcome, fitting), error=error)

    def _reached(self, outcome: Outcome, asked: float) -> float:
        """The PSNR that a plan comes to where ``asked`` dB are wanted."""
        self.left -= 1
        found = self.run.judge(plan_of(self.table, outcome, self.limit))
        short = "" if found >= asked else f", not the {asked:.1f} asked for"
        self.told(f"another of {outcome.share:.2f} of full's time: {found:.1f} dB{short}")
        return found


def with_promise(plan: Plan, held: Held, note: str) -> Plan:
    """The plan with what was measured of it."""
    promise = plan.settings.promise
    assert promise is not None
    measured = Promise(
        promise.limit,
        promise.predicted_share,
        promise.predicted_psnr,
        held.share,
        held.decibels,
        held.held_out_psnr if math.isfinite(held.held_out_psnr) else None,
        promise.note,
    )
    return with_note(replace(plan, settings=replace(plan.settings, promise=measured)), note)


def with_note(plan: Plan, note: str) -> Plan:
    """The plan with one more thing said of what was given up; the same plan where that is nothing."""
    promise = plan.settings.promise
    assert promise is not None
    notes = "; ".join(text for text in (promise.note, note) if text)
    return replace(plan, settings=replace(plan.settings, promise=replace(promise, note=notes)))


def _kept(limit: Limit, held: Held) -> tuple[bool, float]:
    """Whether a run keeps to a limit, and how good it is otherwise: its PSNR, or how little time it takes."""
    if limit.budget is not None:
        kept = held.share <= limit.budget * (1 + SLACK)
        return kept, held.psnr if kept else -held.share
    assert limit.mean_squared is not None
    kept = 10 ** (-held.psnr / 10) <= limit.mean_squared
    return kept, -held.share if kept else held.psnr


def _close(limit: Limit, held: Held) -> bool:
    """Whether there is little to gain in another try: within a twentieth of the budget, or 1.5 dB of the quality."""
    if limit.budget is not None:
        return held.share >= 0.95 * limit.budget
    assert limit.mean_squared is not None
    return held.psnr <= -10 * math.log10(limit.mean_squared) + 1.5


def _over(limit: Limit, held: Held) -> str:
    """What is to be said of a run that does not keep to its limit to the letter, or whose images are nothing."""
    if held.psnr <= 0:
        return "its images hold NaN or infinity, or nothing of the full model's"
    if limit.budget is not None:
        over = round(100 * (held.share / limit.budget - 1))
        within = ", which is within what timings differ by" if _kept(limit, held)[0] else ""
        return f"over the budget by {over} %{within}" if over > 0 else ""
    if _kept(limit, held)[0]:
        return ""
    assert limit.mean_squared is not None
    return f"{-10 * math.log10(limit.mean_squared) - held.psnr:.1f} dB below what was asked for"


def _given_up(limit: Limit, first: Held, held: Held) -> str:
    """What a plan that keeps to its limit gives up against the choice for the limit itself, which did not."""
    if _kept(limit, first)[0] or not _kept(limit, held)[0]:
        return ""
    if limit.budget is not None:
        text = f"the first choice took {first.share:.2f} of the time"
        if first.psnr > held.psnr:
            text += f", at {in_decibels(first.psnr)}"
            if math.isfinite(first.psnr):
                text += f"; given up for the budget: {first.psnr - held.psnr:.1f} dB"
        return text
    text = f"the first choice came to {in_decibels(first.psnr)}"
    if held.share > first.share:
        text += f", at {first.share:.2f} of the time; given up for the quality: {held.share - first.share:.2f} of it"
    return text


def _relaxed(limit: Limit, held: Held, timed: int, exhausted: bool) -> str:
    """To what a limit that nothing kept to is relaxed, and why; ``timed`` plans were run."""
    if limit.budget is not None:
        to, nearer = f"{held.share:.2f} of the time", "takes less"
    else:
        to, nearer = in_decibels(held.psnr), "comes closer"
    why = f"none of {timed} plans that were run {nearer}" if timed > 1 else "no other plan was run"
    if exhausted:
        why += ", and the table has none that would take little enough"
    return f"the limit is relaxed to {to}: {why}"
