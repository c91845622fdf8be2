"""Plans that keep to a limit: measured, chosen, run beside the full model, and held to what was said of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difa_compile.calibration.check_table import check_table
from difa_compile.calibration.measure import measure
from difa_compile.calibration.sampling import identity_of, models_of
from difa_compile.calibration.state import default_path
from difa_compile.comparison import metrics
from difa_compile.comparison.compare import Call, Caller, compiled_by, quiet, undisturbed
from difa_compile.comparison.kept import (
    ROUNDS,
    Held,
    KeptTrials,
    Runs,
    as_stored,
    delete_kept,
    digest_of_decisions,
    identity_of_trials,
    trials_file,
)
from difa_compile.decision import Decision
from difa_compile.errors import BudgetError, ErrorTableError, NonFiniteError, RowLimitError
from difa_compile.pipeline.apply import AppliedPlan, apply_for_trials, remove
from difa_compile.pipeline.transformers import find_transformers
from difa_compile.plan.data import Promise
from difa_compile.plan.plan import Plan
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


class Trials:
    """The full model's side of a comparison, compiled and run once, against which plans are run.

    ``inputs``: keyword arguments of the pipeline's call, without seed, steps and form of the output. ``seeds``: plans
    are chosen by what they do with these; ``held_out``: with these it is only said.
    """

    def __init__(
        self, pipe: Any, inputs: Mapping[str, Any], steps: int, seeds: Sequence[int], held_out: Sequence[int]
    ) -> None:
        self._pipe = pipe
        self._seeds, self._held_out = tuple(seeds), tuple(held_out)
        self._full = Caller(copy.copy(pipe), inputs, steps)  # shares all components; a plan is put on ``pipe`` alone
        self._planned = Caller(pipe, inputs, steps)
        self._images: dict[int, Tensor] = {}
        self._applied: AppliedPlan | None = None
        self._known: dict[tuple[str, tuple[int, ...]], float] = {}
        """By what a plan does and the seeds its PSNR in dB."""

    def judge(self, plan: Plan) -> float:
        """The PSNR in dB of a plan with the seeds that plans are chosen by."""
        self._follow(plan)
        return self._psnr(plan, self._seeds)

    def run(self, plan: Plan, rounds: int = ROUNDS) -> Held:
        """Run a plan beside the full model, timed so many times."""
        self._follow(plan)
        quality, held_out = self._psnr(plan, self._seeds), self._psnr(plan, self._held_out)
        full: list[Call] = []
        planned: list[Call] = []
        for turn in range(rounds):
            sides = [(self._full, full), (self._planned, planned)]
            for side, calls in sides if turn % 2 else reversed(sides):
                calls.append(side(self._seeds[0]).timing())
        return Held(undisturbed(planned) / undisturbed(full), quality, held_out)

    def close(self) -> None:
        """Take the plan off the pipeline."""
        if self._applied is not None:
            remove(self._pipe)
            self._applied = None

    def _follow(self, plan: Plan) -> None:
        """Put a plan on the pipeline; what is compiled for the one before stays."""
        if self._applied is None:
            self._applied = apply_for_trials(self._pipe, plan)
        else:
            self._applied.follow(plan)

    def _psnr(self, plan: Plan, seeds: tuple[int, ...]) -> float:
        """The mean over the pairs of images that differ, in dB; infinite if none does, 0 for images with NaN. Of the
        plan on the pipeline, whose images are made once.

        Raises :class:`NonFiniteError` if the full model's have some.
        """
        key = digest_of_decisions(plan), seeds
        if key in self._known:
            return self._known[key]
        for seed in seeds:
            if seed not in self._images:
                self._images[seed] = self._full(seed).images
                if not self._images[seed].isfinite().all():
                    raise NonFiniteError(
                        f"the full model's images with seed {seed} hold NaN or infinity; load the model in float32"
                    )
        pairs = [(self._images[seed], self._planned(seed).images) for seed in seeds]
        finite = all(planned.isfinite().all() for _, planned in pairs)
        self._known[key] = psnr_of(pairs) if finite else 0.0
        return self._known[key]


def psnr_of(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The mean PSNR in dB over the pairs of images (N, C, H, W) that differ; infinite if none does."""
    ratios = torch.cat([metrics.psnr(full, planned) for full, planned in pairs])
    differing = ratios[ratios.isfinite()]
    return float(differing.mean()) if len(differing) else math.inf


@contextmanager
def trials(
    pipe: Any,
    inputs: Mapping[str, Any],
    steps: int,
    seeds: Sequence[int],
    held_out: Sequence[int],
    table: ErrorTable,
    state: Path | None = None,
) -> Iterator[Runs]:
    """:class:`Trials` of a pipeline, which is as it was when they are over, with plans of ``table``.

    Each result is kept in ``state`` (by default a file in the package's cache folder, deleted in the end), so that the
    same trials, started again after an interruption, begin with what is known.

    Raises :class:`CalibrationStateError` for a ``state`` that is damaged or of other trials, and :class:`OutputError`.
    """
    identity = identity_of_trials(pipe, inputs, steps, seeds, held_out, table)
    with ExitStack() as stack:
        stack.enter_context(quiet(pipe))
        for transformer in find_transformers(pipe):
            stack.enter_context(compiled_by(transformer, "inductor"))
        made = Trials(pipe, inputs, steps, seeds, held_out)
        kept = KeptTrials.open(made, default_path(identity) if state is None else state, identity)
        stack.callback(made.close)
        yield kept
    if state is None:
        delete_kept(kept.path)


def plan_within(
    pipe: Any,
    inputs: Mapping[str, Any],
    limit: Limit,
    steps: int = 50,
    *,
    table: ErrorTable | None = None,
    decisions: Sequence[Decision | str] | None = None,
    attention: bool | None = None,
    seeds: Sequence[int] = (0, 1),
    held_out: Sequence[int] = (2,),
    runs: int = RUNS,
    state: Path | None = None,
    progress: bool = True,
    told: Callable[[str], None] = lambda text: None,
) -> Plan:
    """The best plan for ``pipe`` within ``limit``, run and held to it.

    Measures (:func:`difa_compile.calibration.measure.measure`, with the first of ``seeds``) unless a ``table`` is
    given, chooses, and runs the choice beside the full model. Where it is over the limit or far below it, it is chosen
    anew from what that showed, three times at most. A time that was not expected is measured again. Then others are
    tried, until ``runs`` plans have been run. Under a budget: other ways to choose (:mod:`difa_compile.planner.ways`),
    the best of them with the weights of its forecasts fitted (:mod:`difa_compile.planner.fitting`), then with one of
    its computed steps moved (where no attention was measured beside the blocks); the one whose images with ``seeds``
    are closest is taken. For a quality: what another way, or fitted weights, if they come closer in the same time, need
    for it. What the plan does with the seeds
    ``held_out`` is said beside that. The plan says what was predicted, what was measured, and what was given up
    (``settings.promise``). ``told`` is given a line of text for each run.

    What was measured is kept in ``state``, and what came of each plan beside it, in a file of that name with
    ``.trials``, so that the same call goes on after an interruption; both stay there, and serve other limits. By
    default they are in the package's cache folder, and deleted in the end.

    Raises :class:`BudgetError`, naming the nearest possible one, :class:`RowLimitError`, for a ``table`` that is not of
    this pipeline and these steps what :func:`difa_compile.calibration.check_table.check_table` raises,
    :class:`ErrorTableError` where it holds no attention to plan alone, :class:`CalibrationStateError` for a ``state``
    of another search, ``ValueError`` without seeds of both kinds, for seeds of both, or without runs, and what
    measuring and :func:`difa_compile.apply` raise. Warns where another machine has measured the table and the limit is
    one of time.
    """
    if not seeds or not held_out or runs < 1:
        raise ValueError(
            f"{len(seeds)} seeds, {len(held_out)} held out and {runs} runs were given; at least one of each is needed"
        )
    if set(seeds) & set(held_out):
        raise ValueError(f"seeds {sorted(set(seeds) & set(held_out))} are held out, and plans are to be chosen by them")
    if not limit.blocks and attention is False:
        raise ErrorTableError("attention is neither to be measured nor anything else to be planned; measure it")
    place = state
    if table is None:
        attention = attention if limit.blocks else True
        call = {**inputs, "generator": torch.Generator().manual_seed(seeds[0])}
        if place is None:
            tried = {"attention": attention, "decisions": None if decisions is None else [*map(str, decisions)]}
            place = default_path(identity_of(pipe, models_of(pipe), call, {"planned within": tried}, steps))
        found = measure(pipe, call, steps, decisions=decisions, attention=attention, state=place, progress=progress)
        table = as_stored(found)
    else:
        check_table(table, pipe, inputs, steps)
        if limit.budget is not None:
            table.tell_machine()
    kept = None if state is None else trials_file(state)
    with trials(pipe, inputs, steps, seeds, held_out, table, kept) as run:
        plan = held_to(table, limit, run, runs, told)
    if state is None and place is not None:
        delete_kept(place)
    return plan


def held_to(
    table: ErrorTable, limit: Limit, run: Runs, runs: int = RUNS, told: Callable[[str], None] = lambda text: None
) -> Plan:
    """The best plan of a table within a limit, by trials that go on afterwards; see :func:`plan_within`."""
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
                outcome, note = chosen(self.problem, self.aimed)
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
            for each in self.ways.neighbours(way, outcome, budget, self.limit.max_rows):
                if self.left < 2:
                    break
                if each.columns in seen:
                    continue
                seen.add(each.columns)
                found = self._judged(self._fitted(each, fitting), psnr)
                if found > psnr:
                    outcome, psnr, moved = each, found, True
                    break
        if fitting is not None or outcome.columns != kept.outcome.columns:
            planner, most = self.ways.planner(self.ways.own), self.limit.max_rows
            note = "" if most is None else cost_of_rows(FewRows(planner, most), outcome, planner.choose(budget))
            self._try(self._fitted(outcome, fitting), note)

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
        """Where another way to choose comes closer in the same time, see what it takes for the quality asked for."""
        better: tuple[float, Way, Outcome] | None = None
        for way, each in self.ways.candidates(min(1.0, kept.outcome.share), self.limit.max_rows):
            if self.left > 1 and not way.worst and each.columns != kept.outcome.columns:
                found = self._judged(each, kept.held.psnr)
                if found > max(kept.held.psnr, better[0] if better else -math.inf):
                    better = found, way, each
        psnr, way, outcome = better or (kept.held.psnr, self.ways.own, kept.outcome)
        fitting = None
        if math.isfinite(psnr):
            fitting, psnr = self._best_fitting(outcome, psnr)
        if (better is None and fitting is None) or not math.isfinite(psnr):
            return
        problem, known = way.problem(self.problem), {kept.outcome.columns}
        for _ in range(min(TRIES, self.left)):
            now = accounted(problem, outcome.columns).error  # that of the outcome is by the response at its time
            problem = rescaled(problem, max(now, 1e-12), 10 ** (-psnr / 10))
            try:
                outcome, note = chosen(problem, self.limit)
            except (BudgetError, RowLimitError):
                return  # nothing else is possible
            if outcome.columns in known:
                return
            known.add(outcome.columns)
            fitted = replace(self._fitted(outcome, fitting), error=outcome.error)  # fitted ones were measured
            psnr = self._try(fitted, note).held.psnr
            if not math.isfinite(psnr) or (self.kept is not None and self.kept.outcome is fitted):
                return


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
