"""Plans that keep to a limit: measured, chosen, run beside the full model, and held to what was said of them."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difa_compile.calibration.measure import measure
from difa_compile.comparison import metrics
from difa_compile.comparison.compare import Call, Caller, compiled_by, quiet
from difa_compile.decision import Window
from difa_compile.errors import BudgetError, RowLimitError
from difa_compile.pipeline.apply import apply, remove
from difa_compile.pipeline.transformers import find_transformers
from difa_compile.plan.data import Promise
from difa_compile.plan.plan import Plan
from difa_compile.planner.make import Limit, chosen, plan_of
from difa_compile.planner.problem import refitted
from difa_compile.planner.table import ErrorTable

ROUNDS = 3
"""How often the full model and a plan are timed, one after the other, where a plan is held to its word."""
TRIES = 3
"""How many plans are run at most."""
SLACK = 0.05
"""By how much, as a share of it, a time may be over the budget; machines are not more even than that."""


@dataclass(frozen=True)
class Held:
    """What came of a plan in a run: ``share`` of the full model's time (median of the rounds' ratios), and PSNR in dB
    against its images, with the seed it was measured with and with the others; infinite for equal images."""

    share: float
    psnr: float
    held_out_psnr: float


class Trials:
    """The full model's side of a comparison, compiled and run once, against which plans are run.

    ``inputs``: keyword arguments of the pipeline's call, without seed, steps and form of the output. ``seeds``: the
    first is the one that was measured with.
    """

    def __init__(self, pipe: Any, inputs: Mapping[str, Any], steps: int, seeds: Sequence[int]) -> None:
        self._pipe = pipe
        self._seeds = tuple(seeds)
        self._full = Caller(copy.copy(pipe), inputs, steps)  # shares all components; a plan is put on ``pipe`` alone
        self._planned = Caller(pipe, inputs, steps)
        self._images: dict[int, Tensor] = {}

    def run(self, plan: Plan) -> Held:
        """Run a plan beside the full model."""
        applied = apply(self._pipe, plan)
        try:
            planned = {seed: self._planned(seed).images for seed in self._seeds}  # compiles
            for seed in self._seeds:
                if seed not in self._images:
                    self._images[seed] = self._full(seed).images
            ratios = []
            for turn in range(ROUNDS):
                sides: list[Callable[[int], Call]] = [self._full, self._planned]
                times = [side(self._seeds[0]).seconds for side in (sides if turn % 2 else reversed(sides))]
                full, own = times if turn % 2 else reversed(times)
                ratios.append(own / full)
        finally:
            remove(self._pipe)
        del applied
        quality = [_psnr(self._images[seed], planned[seed]) for seed in self._seeds]
        return Held(statistics.median(ratios), quality[0], statistics.fmean(quality[1:] or quality))


def _psnr(full: Tensor, planned: Tensor) -> float:
    """The mean over the pairs that differ, in dB; infinite if none does."""
    ratios = metrics.psnr(full, planned)
    differing = ratios[ratios.isfinite()]
    return float(differing.mean()) if len(differing) else math.inf


@contextmanager
def trials(pipe: Any, inputs: Mapping[str, Any], steps: int, seeds: Sequence[int]) -> Iterator[Trials]:
    """:class:`Trials` of a pipeline, which is as it was when they are over."""
    with ExitStack() as stack:
        stack.enter_context(quiet(pipe))
        for transformer in find_transformers(pipe):
            stack.enter_context(compiled_by(transformer, "inductor"))
        yield Trials(pipe, inputs, steps, seeds)


def plan_within(
    pipe: Any,
    inputs: Mapping[str, Any],
    limit: Limit,
    steps: int = 50,
    *,
    table: ErrorTable | None = None,
    windows: Sequence[Window | str] = (),
    attention: bool | None = None,
    seed: int = 0,
    held_out: Sequence[int] = (1,),
    state: Path | None = None,
    progress: bool = True,
    told: Callable[[str], None] = lambda text: None,
) -> Plan:
    """The best plan for ``pipe`` within ``limit``, run and held to it.

    Measures (:func:`difa_compile.calibration.measure.measure`) unless a ``table`` is given, chooses, runs the choice
    beside the full model with ``seed`` and the ``held_out`` ones, and chooses anew from what that showed where it is
    over the limit or far below it, three times at most. The plan says what was predicted, what was measured, and what
    was given up (``settings.promise``). ``told`` is given a line of text for each run.

    Raises :class:`BudgetError`, naming the nearest possible one, :class:`RowLimitError`, and what measuring and
    :func:`difa_compile.apply` raise.
    """
    if table is None:
        generator = torch.Generator().manual_seed(seed)
        table = measure(
            pipe,
            {**inputs, "generator": generator},
            steps,
            windows=windows,
            attention=attention,
            state=state,
            progress=progress,
        )
    problem = table.problem()
    best: tuple[bool, float, Plan] | None = None
    aimed = limit
    with trials(pipe, inputs, steps, (seed, *held_out)) as run:
        for attempt in range(TRIES):
            try:
                outcome, note = chosen(problem, aimed)
            except (BudgetError, RowLimitError):
                if best is None:
                    raise
                break  # less than the first choice took is not possible
            plan = plan_of(table, outcome, limit, note)
            held = run.run(plan)
            plan = with_promise(plan, held, _over(limit, held))
            told(str(plan.settings.promise))
            kept, merit = _kept(limit, held)
            if best is None or (kept, merit) > best[:2]:
                best = kept, merit, plan
            if attempt + 1 == TRIES or (kept and _close(limit, held)):
                break
            if limit.budget is not None:
                off = held.share / outcome.share if outcome.share else 1.0
                least = 0.5 * limit.budget
                aimed = replace(limit, budget=min(1.0, max(least, limit.budget / off)))
            elif math.isfinite(held.psnr):
                problem = refitted(problem, max(outcome.error, 1e-12), 10 ** (-held.psnr / 10))
            else:
                break  # the same images, which say nothing of the response
    assert best is not None
    return best[2]


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
        held.psnr if math.isfinite(held.psnr) else None,
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
    """Whether there is little to gain in another try: within a tenth of the budget, or 1.5 dB of the quality."""
    if limit.budget is not None:
        return held.share >= 0.9 * limit.budget
    assert limit.mean_squared is not None
    return held.psnr <= -10 * math.log10(limit.mean_squared) + 1.5


def _over(limit: Limit, held: Held) -> str:
    """What is to be said of a run that does not keep to its limit."""
    if _kept(limit, held)[0]:
        return ""
    if limit.budget is not None:
        return f"over the budget by {100 * (held.share / limit.budget - 1):.0f} %"
    assert limit.mean_squared is not None
    return f"{-10 * math.log10(limit.mean_squared) - held.psnr:.1f} dB below what was asked for"
