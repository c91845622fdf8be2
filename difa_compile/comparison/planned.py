"""Plans that keep to a limit: measured, chosen, run beside the full model, and held to what was said of them."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difa_compile.calibration.check_table import check_table
from difa_compile.calibration.measure import measure
from difa_compile.comparison import metrics
from difa_compile.comparison.compare import Call, Caller, compiled_by, quiet
from difa_compile.decision import Decision
from difa_compile.errors import BudgetError, NonFiniteError, RowLimitError
from difa_compile.pipeline.apply import AppliedPlan, apply_for_trials, remove
from difa_compile.pipeline.transformers import find_transformers
from difa_compile.plan.data import Promise
from difa_compile.plan.plan import Plan
from difa_compile.planner.choice import choose
from difa_compile.planner.make import Limit, chosen, cost_of_rows, plan_of
from difa_compile.planner.problem import Outcome, refitted
from difa_compile.planner.table import ErrorTable
from difa_compile.planner.ways import Way, Ways

ROUNDS = 3
"""How often the full model and a plan are timed, one after the other, where a plan is held to its word."""
TRIES = 3
"""How many plans are run at most to keep to a limit."""
MOST_OFF = 1.5
"""By what factor a measured time is taken to differ from the predicted one at most."""
RUNS = 12
"""How many plans are run at most, all in all."""
SLACK = 0.05
"""By how much, as a share of it, a time may be over the budget; machines are not more even than that."""


@dataclass(frozen=True)
class Held:
    """What came of a plan in a run: ``share`` of the full model's time (median of the rounds' ratios), and PSNR in dB
    against its images, with the seeds that plans are chosen by and with the held-out ones; infinite for equal
    images."""

    share: float
    psnr: float
    held_out_psnr: float

    @property
    def decibels(self) -> float | None:
        """The PSNR; None for equal images."""
        return self.psnr if math.isfinite(self.psnr) else None

    def __str__(self) -> str:
        quality = "the same images" if self.decibels is None else f"{self.psnr:.1f} dB"
        return f"{self.share:.2f} of full's time, {quality}"


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

    def judge(self, plan: Plan) -> float:
        """The PSNR in dB of a plan with the seeds that plans are chosen by."""
        self._follow(plan)
        return self._psnr(self._seeds)

    def run(self, plan: Plan, rounds: int = ROUNDS) -> Held:
        """Run a plan beside the full model, timed so many times."""
        self._follow(plan)
        quality = self._psnr(self._seeds)
        held_out = self._psnr(self._held_out)
        ratios = []
        for turn in range(rounds):
            sides: list[Callable[[int], Call]] = [self._full, self._planned]
            times = [side(self._seeds[0]).seconds for side in (sides if turn % 2 else reversed(sides))]
            full, own = times if turn % 2 else reversed(times)
            ratios.append(own / full)
        return Held(statistics.median(ratios), quality, held_out)

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

    def _psnr(self, seeds: Sequence[int]) -> float:
        """The mean over the pairs of images that differ, in dB; infinite if none does, 0 for images with NaN.

        Raises :class:`NonFiniteError` if the full model's have some.
        """
        for seed in seeds:
            if seed not in self._images:
                self._images[seed] = self._full(seed).images
                if not self._images[seed].isfinite().all():
                    raise NonFiniteError(
                        f"the full model's images with seed {seed} hold NaN or infinity; load the model in float32"
                    )
        pairs = [(self._images[seed], self._planned(seed).images) for seed in seeds]
        return psnr_of(pairs) if all(planned.isfinite().all() for _, planned in pairs) else 0.0


def psnr_of(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The mean PSNR in dB over the pairs of images (N, C, H, W) that differ; infinite if none does."""
    ratios = torch.cat([metrics.psnr(full, planned) for full, planned in pairs])
    differing = ratios[ratios.isfinite()]
    return float(differing.mean()) if len(differing) else math.inf


@contextmanager
def trials(
    pipe: Any, inputs: Mapping[str, Any], steps: int, seeds: Sequence[int], held_out: Sequence[int]
) -> Iterator[Trials]:
    """:class:`Trials` of a pipeline, which is as it was when they are over."""
    with ExitStack() as stack:
        stack.enter_context(quiet(pipe))
        for transformer in find_transformers(pipe):
            stack.enter_context(compiled_by(transformer, "inductor"))
        made = Trials(pipe, inputs, steps, seeds, held_out)
        stack.callback(made.close)
        yield made


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
    anew from what that showed, three times at most. Then others are tried, until ``runs`` plans have been run. Under a
    budget: other ways to choose (:mod:`difa_compile.planner.ways`), then the best with one of its computed steps moved
    (where no attention was measured beside the blocks); the one whose images with ``seeds`` are closest is taken. For a
    quality: what another way, if it comes closer in the same time, needs for it. What the plan does with the seeds
    ``held_out`` is said beside that. The plan says what was predicted, what was measured, and what was given up
    (``settings.promise``). ``told`` is given a line of text for each run.

    Raises :class:`BudgetError`, naming the nearest possible one, :class:`RowLimitError`, ``ValueError`` without seeds
    of both kinds, for seeds of both, or without runs, for a ``table`` that is not of this pipeline and these steps
    what :func:`difa_compile.calibration.check_table.check_table` raises, and what measuring and
    :func:`difa_compile.apply` raise. Warns where another machine has measured the table and the limit is one of time.
    """
    if not seeds or not held_out or runs < 1:
        raise ValueError(
            f"{len(seeds)} seeds, {len(held_out)} held out and {runs} runs were given; at least one of each is needed"
        )
    if set(seeds) & set(held_out):
        raise ValueError(f"seeds {sorted(set(seeds) & set(held_out))} are held out, and plans are to be chosen by them")
    if table is None:
        generator = torch.Generator().manual_seed(seeds[0])
        table = measure(
            pipe,
            {**inputs, "generator": generator},
            steps,
            decisions=decisions,
            attention=attention,
            state=state,
            progress=progress,
        )
    else:
        check_table(table, pipe, inputs, steps)
        if limit.budget is not None:
            table.tell_machine()
    with trials(pipe, inputs, steps, seeds, held_out) as run:
        return held_to(table, limit, run, runs, told)


def held_to(
    table: ErrorTable, limit: Limit, run: Trials, runs: int = RUNS, told: Callable[[str], None] = lambda text: None
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

    def __init__(self, table: ErrorTable, limit: Limit, run: Trials, runs: int, told: Callable[[str], None]) -> None:
        self.table, self.limit, self.run, self.left, self.told = table, limit, run, runs, told
        self.problem = table.problem()
        self.ways = Ways(self.problem)
        self.aimed = limit
        """The limit that choices are made for: corrected by what was measured."""
        self.kept: _Tried | None = None

    def best(self) -> Plan:
        """The best plan found."""
        self._corrected()
        assert self.kept is not None
        if self.limit.budget is not None:
            self._closer(self.kept)
        elif self.kept.rank[0]:
            self._quicker(self.kept)
        return self.kept.plan

    def _try(self, outcome: Outcome, note: str = "") -> _Tried:
        """Run a choice, timed, and keep it if it is the best so far."""
        plan = plan_of(self.table, outcome, self.limit, note)
        held = self.run.run(plan)
        plan = with_promise(plan, held, _over(self.limit, held))
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
                return  # less than the first choice took is not possible
            if self.kept is not None and outcome.columns == self.kept.outcome.columns:
                return
            self.left -= 1
            tried = self._try(outcome, note)
            if tried.rank[0] and _close(self.limit, tried.held):
                return
            held = tried.held
            if self.limit.budget is not None:
                off = held.share / outcome.share if outcome.share else 1.0
                at_once = min(MOST_OFF, max(1 / MOST_OFF, off))  # more than that is the machine's doing
                self.aimed = replace(self.limit, budget=min(1.0, self.limit.budget / at_once))
            elif math.isfinite(held.psnr):
                self.problem = refitted(self.problem, max(outcome.error, 1e-12), 10 ** (-held.psnr / 10))
            else:
                return  # the same images, which say nothing of the response

    def _closer(self, kept: _Tried) -> None:
        """Look for plans of the same predicted time whose images are closer to the full model's."""
        budget = kept.outcome.share
        if self.left < 1 or not math.isfinite(kept.held.psnr):
            return
        way, outcome, psnr = self.ways.own, kept.outcome, kept.held.psnr
        seen = {outcome.columns}
        for other, each in self.ways.candidates(budget, self.limit.max_rows):
            if self.left and each.columns not in seen:
                seen.add(each.columns)
                found = self._judged(each, psnr)
                if found > psnr:
                    way, outcome, psnr = other, each, found
        moved = True
        while moved and self.left:
            moved = False
            for each in self.ways.neighbours(way, outcome, budget, self.limit.max_rows):
                if not self.left:
                    break
                if each.columns in seen:
                    continue
                seen.add(each.columns)
                found = self._judged(each, psnr)
                if found > psnr:
                    outcome, psnr, moved = each, found, True
                    break
        if outcome.columns != kept.outcome.columns:
            note = "" if self.limit.max_rows is None else cost_of_rows(outcome, choose(self.problem, budget))
            self._try(outcome, note)

    def _judged(self, outcome: Outcome, best: float) -> float:
        self.left -= 1
        found = self.run.judge(plan_of(self.table, outcome, self.limit))
        self.told(f"another of the same time: {found:.1f} dB{'' if found > best else f', not the {best:.1f} so far'}")
        return found

    def _quicker(self, kept: _Tried) -> None:
        """Where another way to choose comes closer in the same time, see what it takes for the quality asked for."""
        better: tuple[float, Way, Outcome] | None = None
        for way, each in self.ways.candidates(kept.outcome.share, self.limit.max_rows):
            if self.left > 1 and not way.worst and each.columns != kept.outcome.columns:
                found = self._judged(each, kept.held.psnr)
                if found > max(kept.held.psnr, better[0] if better else -math.inf):
                    better = found, way, each
        if better is None or not math.isfinite(better[0]):
            return
        psnr, way, outcome = better
        problem = refitted(way.problem(self.problem), max(outcome.error, 1e-12), 10 ** (-psnr / 10))
        try:
            self._try(*chosen(problem, self.limit))
        except (BudgetError, RowLimitError):
            return  # nothing else is possible


def with_promise(plan: Plan, held: Held, note: str) -> Plan:
    """The plan with what was measured of it."""
    promise = plan.settings.promise
    assert promise is not None
    notes = "; ".join(text for text in (promise.note, note) if text)
    measured = Promise(
        promise.limit,
        promise.predicted_share,
        promise.predicted_psnr,
        held.share,
        held.decibels,
        held.held_out_psnr if math.isfinite(held.held_out_psnr) else None,
        notes,
    )
    return replace(plan, settings=replace(plan.settings, promise=measured))


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
    """What is to be said of a run that does not keep to its limit, or whose images are nothing."""
    if held.psnr <= 0:
        return "its images hold NaN or infinity, or nothing of the full model's"
    if _kept(limit, held)[0]:
        return ""
    if limit.budget is not None:
        return f"over the budget by {100 * (held.share / limit.budget - 1):.0f} %"
    assert limit.mean_squared is not None
    return f"{-10 * math.log10(limit.mean_squared) - held.psnr:.1f} dB below what was asked for"
