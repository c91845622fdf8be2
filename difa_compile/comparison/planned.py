"""Plans that keep to a limit: measured, chosen, run beside the full model, and held to what was said of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from difa_compile.comparison.holding import RUNS, held_to
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
from difa_compile.errors import ErrorTableError, NonFiniteError
from difa_compile.pipeline.apply import AppliedPlan, apply_for_trials, remove
from difa_compile.pipeline.transformers import find_transformers
from difa_compile.plan.plan import Plan
from difa_compile.planner.make import Limit
from difa_compile.planner.table import ErrorTable


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
    its computed steps moved (of blocks alone, or of attention alone in full); the one whose images with ``seeds`` are
    closest is taken. For a quality: how little time another way, or fitted weights, if they come closer in the same
    time, need for it, with computed steps moved where that falls just short. What the plan does with the seeds
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
