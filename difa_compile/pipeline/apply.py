"""Applying a plan to a diffusers pipeline, in place, and taking it off again.

    applied = difa_compile.apply(pipe, plan)
    images = pipe(class_labels=[1, 2], num_inference_steps=30).images
    difa_compile.remove(pipe)

``pipe.transformer`` stays the same object with the same weights; see :mod:`difa_compile.pipeline.wiring` for what is
attached where. Every call of the pipeline is a run of its own, which ends when the call returns or raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from difa_compile.backend.batch_sizes import AnyBatch
from difa_compile.backend.entry import difa
from difa_compile.backend.options import Options
from difa_compile.backend.run import Run
from difa_compile.errors import NotAppliedError, PlanMismatchError
from difa_compile.layout import Layout
from difa_compile.pipeline.compiled_forward import CompiledForward
from difa_compile.pipeline.schedule_follower import RunStats, ScheduleFollower
from difa_compile.pipeline.transformers import check_scheduler, check_unchanged, find_transformers
from difa_compile.pipeline.wiring import Wiring, wiring_of
from difa_compile.plan.guidance import Guidance, check_guides, settle, shares_halves
from difa_compile.plan.plan import Plan

if TYPE_CHECKING:
    from difa_compile.backend.capture import Capture
    from difa_compile.backend.verdicts import Record

__all__ = ["AppliedPlan", "RunStats", "apply", "remove"]

_NOT_TOLD_APART = (
    "the pipeline makes two calls per step for guidance, and nothing says which of them is the conditional one: it is "
    'no pipeline of diffusers whose order is known, and it does not name them with transformer.cache_context("cond") '
    'and ("uncond")'
)


class AppliedPlan:
    """A plan at work in a pipeline.

    ``captures``: the captured graphs so far, one per input shape. ``last_run``: what the latest run took, ``None``
    before the first. ``told``: called before every call of a transformer, with the run, the captured graph and the
    inputs of that; ``None`` for nobody. Where somebody is told, the calls of a step are told apart.
    """

    def __init__(self, plan: Plan, guidance: Guidance, guidance_of: Callable[[Plan], Guidance] | None = None) -> None:
        self.plan = plan
        self.captures: list[Capture] = []
        self.last_run: RunStats | None = None
        self.told: Callable[[Run, Capture, Sequence[Any]], None] | None = None
        self._guidance = guidance
        self._guidance_of = guidance_of
        """How the pipeline guides, for a plan; None where no other plan may be followed."""

    @property
    def records(self) -> tuple[Record, ...]:
        """What happened to every site, in the latest captured graph; empty before the first call."""
        return self.captures[-1].verdicts.records if self.captures else ()

    @property
    def shares(self) -> bool:
        """Whether the plan shares the halves of guidance."""
        return shares_halves(self.plan)

    @property
    def halves(self) -> bool:
        """Whether it shares the halves of a batch."""
        return self.shares and self._guidance.form != "two-call"

    @property
    def one_call_each(self) -> bool:
        """Whether a step must be one call of the model for each branch of guidance."""
        return self.shares or any(decision.reads_caches for row in self.plan.decisions for decision in row)

    def follow(self, plan: Plan) -> None:
        """From the next run on, follow another plan of the same model and sizes; what is compiled stays.

        Captures that are made later, for other sizes, follow the first. Only for what :func:`apply_for_trials` made.
        Raises :class:`NotAppliedError` otherwise, :class:`PlanMismatchError` also where it shares halves otherwise than
        the first plan, :class:`SitesMismatchError` and, where skips are errors, :class:`SiteSkippedError`.
        """
        if self._guidance_of is None:
            raise NotAppliedError("this plan was applied alone; call remove(pipe), and apply the other one")
        if shares_halves(plan) and self._guidance_of(plan) != self._guidance:
            raise PlanMismatchError(
                "the plan shares the halves of guidance otherwise than the one that was applied; call remove(pipe), "
                "and apply it"
            )
        for capture in self.captures:
            capture.follow(plan)
        self.plan = plan

    def _note(self, stats: RunStats) -> None:
        self.last_run = stats


class _AppliedRun(Run):
    """A run that notes which graphs it calls."""

    def __init__(self, models: tuple[nn.Module, ...], progress: tuple[float, ...], applied: AppliedPlan) -> None:
        super().__init__(models[0], len(progress), progress=progress, experts=models[1:])
        self._applied = applied
        self._tells_calls_apart = True
        self._halves = applied.halves
        self._batch: int | None = None

    def before_call(self, capture: Capture, args: Sequence[Any]) -> None:
        self._tells_calls_apart = self._tells_calls_apart and self.current_branch is not None
        if capture.model.context.two_call and not self._tells_calls_apart:
            capture.leave_unshared(_NOT_TOLD_APART)
        if not any(known is capture for known in self._applied.captures):
            self._applied.captures.append(capture)
        if self._halves:
            self._check_batch(capture)
        if self._applied.told is not None:
            self._applied.told(self, capture, args)

    def _check_batch(self, capture: Capture) -> None:
        """Raise :class:`PlanMismatchError` if the batch changes in mid-run: half of it is a half of guidance at some
        steps, and other images at the rest."""
        batch = capture.model.batch
        if self._batch not in (None, batch):
            raise PlanMismatchError(
                f"step {self.index}: the plan shares the two halves of classifier-free guidance, but the transformer "
                f"was called with a batch of {batch} in its attention, after one of {self._batch}: one of them has no "
                "two halves. Leave out the option that changes it (guidance in an interval or cut off in mid-run, "
                "perturbed or skipped-layer guidance), or use a plan without +cfg"
            )
        self._batch = batch


def apply(
    pipe: Any,
    plan: Plan | str | Path,
    *,
    strict: bool = False,
    layout: Layout | None = None,
    inner: str = "inductor",
    resize: str | None = None,
    mode: str | None = None,
    inductor_options: Mapping[str, Any] | None = None,
    allow_slower: bool = False,
    dynamic: bool = False,
    trace: str | Path | None = None,
) -> AppliedPlan:
    """Make every later call of ``pipe`` follow ``plan`` (or the plan file named), in place; :func:`remove` undoes it.

    The model is captured and compiled at the first call, once per input shape. A pipeline with two transformers (Wan
    2.2's, for the early and the late steps) follows the plan with both, the second starting with empty caches: what
    it cannot read yet is computed in full, as noted in ``last_run.promotions``. The keyword arguments are the options
    of the same names, which :class:`difa_compile.backend.options.Options` explains; ``dynamic=True`` lets what is
    compiled at the second batch size serve all others.

    Raises :class:`NotAppliedError` if the pipeline carries a plan already, :class:`UnsupportedPipelineError` without a
    transformer or scheduler or if the plan shares guidance halves and it is not known which is which,
    :class:`PlanMismatchError` if the plan was made for another model than its transformers or shares halves as the
    pipeline does not have them, :class:`DecisionError` and :class:`LayoutError` for values that an option does not
    take, and what :meth:`Plan.load` raises.
    """
    options = Options.of(
        {
            "strict": strict,
            "layout": layout,
            "inner": inner,
            "resize": resize,
            "mode": mode,
            "inductor_options": inductor_options,
            "allow_slower": allow_slower,
            "dynamic": AnyBatch() if dynamic else None,
            "trace": trace,
        }
    )
    return _wired(pipe, plan, options, trials=False)


def apply_for_trials(pipe: Any, plan: Plan, *, inner: str = "inductor", **options: Any) -> AppliedPlan:
    """:func:`apply` for a plan that others are going to take the place of (:meth:`AppliedPlan.follow`).

    What is captured is this pipeline's alone: Dynamo would give it to every other one with an equal plan. ``options``:
    further ones of the backend (:class:`difa_compile.backend.options.Options`). Raises as :func:`apply`.
    """
    return _wired(pipe, plan, Options.of({"inner": inner, **options}), trials=True)


def _wired(pipe: Any, plan: Plan | str | Path, options: Options, trials: bool) -> AppliedPlan:
    models = find_transformers(pipe)
    check_scheduler(pipe)
    if wiring_of(pipe) is not None:
        raise NotAppliedError(f"this {type(pipe).__name__} already carries a plan; call remove(pipe) first")
    if not isinstance(plan, Plan):
        plan = Plan.load(plan)
    for model in models:
        plan.validate(model=model)
    guidance = settle(pipe, plan=plan)
    guidance_of = functools.partial(_guidance_of, pipe) if trials else None
    applied = AppliedPlan(plan, guidance, guidance_of)
    options = replace(options, plan=plan, cfg=guidance.option)

    def start(pipe: Any, scheduler: Any, arguments: Mapping[str, object]) -> ScheduleFollower:
        check_unchanged(pipe, models)

        def open_run(progress: tuple[float, ...]) -> Run:
            return _AppliedRun(models, progress, applied)

        check = functools.partial(check_guides, pipe, arguments)
        return ScheduleFollower(
            scheduler,
            open_run,
            check=check if applied.shares else None,  # a callback may switch it off
            one_call_each=applied.one_call_each or applied.told is not None,
            conditional_first=guidance.conditional_first,
            finished=applied._note,
        )

    backend: Callable[..., object] = difa
    if trials or (applied.shares and not applied.halves and not guidance.conditional_first):
        # Whether calls are told apart shows only when they are made, and is then said of the capture, as another plan
        # is: it must be this pipeline's alone. Dynamo takes no graph of another backend for it.
        backend = functools.partial(difa)
    compiled = {model: CompiledForward(model, backend, options.given, strict=options.strict) for model in models}
    Wiring(pipe, compiled, start).connect()
    return applied


def _guidance_of(pipe: Any, plan: Plan) -> Guidance:
    return settle(pipe, plan=plan)


def remove(pipe: Any) -> None:
    """Take the plan off ``pipe``, leaving it as it was before :func:`apply`.

    Raises :class:`NotAppliedError` if it carries none.
    """
    wiring = wiring_of(pipe)
    if wiring is None:
        raise NotAppliedError(f"this {type(pipe).__name__} carries no plan; there is nothing to remove")
    wiring.disconnect()
