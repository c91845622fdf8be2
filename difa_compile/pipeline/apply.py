"""Applying a plan to a diffusers pipeline, in place, and taking it off again.

    applied = difa_compile.apply(pipe, plan)
    images = pipe(class_labels=[1, 2], num_inference_steps=30).images
    difa_compile.remove(pipe)

``pipe.transformer`` stays the same object with the same weights; see :mod:`difa_compile.pipeline.wiring` for what is
attached where. Every call of the pipeline is a run of its own, which ends when the call returns or raises.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from difa_compile.backend.batch_sizes import AnyBatch
from difa_compile.backend.entry import compiler_named, difa
from difa_compile.backend.inductor import inductor_config
from difa_compile.backend.run import Run, run_of
from difa_compile.decision import Kind
from difa_compile.errors import (
    DecisionError,
    NotAppliedError,
    PlanMismatchError,
    PlanNotFollowedError,
    PlanNotFollowedWarning,
    UnsupportedPipelineError,
)
from difa_compile.layout import Layout
from difa_compile.pipeline.guidance import conditional_half_of, guidance_is_on, guidance_of, how_to_guide
from difa_compile.pipeline.module_hooks import check_hooks
from difa_compile.pipeline.schedule_follower import Following, RunStats
from difa_compile.pipeline.wiring import Wiring, compile_forward, wiring_of
from difa_compile.plan.plan import RESIZES, Plan

if TYPE_CHECKING:
    from difa_compile.backend.capture import Capture
    from difa_compile.backend.verdicts import Record

__all__ = ["AppliedPlan", "RunStats", "apply", "find_transformer", "find_transformers", "remove"]

_FIRST, _SECOND = "transformer", "transformer_2"
"""Components that denoise; a pipeline has one of them or both, which then share the steps."""


_NOT_TOLD_APART = (
    "the pipeline makes two calls per step for guidance, and nothing says which of them is the conditional one: it is "
    'no pipeline of diffusers whose order is known, and it does not name them with transformer.cache_context("cond") '
    'and ("uncond")'
)


class AppliedPlan:
    """A plan at work in a pipeline.

    ``captures``: the captured graphs so far, one per input shape. ``last_run``: what the latest run took, ``None``
    before the first. Set ``time_steps = True`` to have each step timed, which makes the device finish its work at every
    step.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.captures: list[Capture] = []
        self.last_run: RunStats | None = None
        self.time_steps = False

    @property
    def records(self) -> tuple[Record, ...]:
        """What happened to every site, in the latest captured graph; empty before the first call."""
        return self.captures[-1].verdicts.records if self.captures else ()

    def _note(self, stats: RunStats) -> None:
        self.last_run = stats


class _AppliedRun(Run):
    """A run that notes which graphs it calls. ``halves``: the plan shares the halves of a batch."""

    def __init__(
        self, models: tuple[nn.Module, ...], progress: tuple[float, ...], applied: AppliedPlan, halves: bool
    ) -> None:
        super().__init__(models[0], len(progress), progress=progress, experts=models[1:])
        self._applied = applied
        self._tells_calls_apart = True
        self._halves = halves
        self._batch: int | None = None

    def before_call(self, capture: Capture) -> None:
        self._tells_calls_apart = self._tells_calls_apart and self.current_branch is not None
        if capture.model.context.two_call and not self._tells_calls_apart:
            capture.leave_unshared(_NOT_TOLD_APART)
        if not any(known is capture for known in self._applied.captures):
            self._applied.captures.append(capture)
        if self._halves:
            self._check_batch(capture)

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


class _Followed:
    """A compiled forward that says if Dynamo did not compile: the model then runs as it is, without the plan."""

    def __init__(self, model: nn.Module, compiled: Callable[..., object], strict: bool) -> None:
        self._model, self._compiled, self._strict = model, compiled, strict
        self._said: weakref.WeakSet[Run] = weakref.WeakSet()

    def __call__(self, *args: object, **kwargs: object) -> object:
        run = run_of(self._model)
        calls = None if run is None else run.calls
        result = self._compiled(*args, **kwargs)
        if run is not None and run.calls == calls and run not in self._said:
            text = (
                f"step {run.index}: {type(self._model).__name__} was called as it is, without its plan, because "
                "nothing was compiled; torch.compile is switched off (torch.compiler.set_stance) or the call stands in "
                "a region that Dynamo leaves alone (torch.compiler.disable). Switch it on, or remove the plan"
            )
            if self._strict:
                raise PlanNotFollowedError(text)
            self._said.add(run)
            warnings.warn(text, PlanNotFollowedWarning, stacklevel=2)
        return result


def find_transformer(pipe_or_model: Any) -> tuple[str, nn.Module]:
    """The denoising transformer and its component name in the pipeline; a bare module is returned with the name ``""``.

    Of two (:func:`find_transformers`) the first. Raises :class:`UnsupportedPipelineError` if the pipeline has none.
    """
    if isinstance(pipe_or_model, nn.Module):
        return "", pipe_or_model
    for name in (_FIRST, _SECOND):
        model = getattr(pipe_or_model, name, None)
        if isinstance(model, nn.Module):
            return name, model
    components = getattr(pipe_or_model, "components", None)
    names = ", ".join(sorted(components)) if isinstance(components, Mapping) else "none"
    raise UnsupportedPipelineError(
        f"{type(pipe_or_model).__name__} has no transformer (components: {names}); plans work on pipelines that "
        "denoise with a diffusion transformer, or on such a transformer itself"
    )


def find_transformers(pipe: Any) -> tuple[nn.Module, ...]:
    """All denoising transformers of a pipeline: of Wan 2.2 and the like two, one for the early steps, one for the late.

    Raises as :func:`find_transformer`; :class:`UnsupportedPipelineError` also for one that ``torch.compile`` wrapped,
    which bypasses plans.
    """
    _, first = find_transformer(pipe)
    models = dict.fromkeys([first, getattr(pipe, _SECOND, None)])
    found = tuple(model for model in models if isinstance(model, nn.Module))
    for model in found:
        check_transformer(pipe, model)
    return found


def check_transformer(pipe: Any, model: nn.Module) -> None:
    """Raise :class:`UnsupportedPipelineError` for a transformer that ``torch.compile`` wrapped, which bypasses plans,
    and for one with hooks that cannot be part of one graph (:func:`difa_compile.pipeline.module_hooks.check_hooks`)."""
    if hasattr(model, "_orig_mod"):
        raise UnsupportedPipelineError(
            f"the transformer of this {type(pipe).__name__} is wrapped by torch.compile, which a plan replaces; put "
            "the module itself back first: pipe.transformer = pipe.transformer._orig_mod"
        )
    check_hooks(model)


def check_scheduler(pipe: Any) -> None:
    """Raise :class:`UnsupportedPipelineError` unless ``pipe`` has a scheduler whose steps can be followed."""
    scheduler = getattr(pipe, "scheduler", None)
    missing = [name for name in ("set_timesteps", "step") if not callable(getattr(scheduler, name, None))]
    if missing:
        found = "no scheduler" if scheduler is None else f"{type(scheduler).__name__} without {' and '.join(missing)}"
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} has {found}, so its steps cannot be followed; use a diffusers pipeline with a "
            "scheduler, or drive the model yourself with difa_compile.sampling"
        )


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
) -> AppliedPlan:
    """Make every later call of ``pipe`` follow ``plan`` (or the plan file named), in place; :func:`remove` undoes it.

    The model is captured and compiled at the first call, once per input shape. A pipeline with two transformers (Wan
    2.2's, for the early and the late steps) follows the plan with both, the second starting with empty caches: what
    it cannot read yet is computed in full, as noted in ``last_run.promotions``. ``strict``: a decision that cannot be
    carried out is a :class:`~difa_compile.errors.SiteSkippedError` instead of a record. ``layout``: where the image
    stands in the attention sequence, for models whose graph does not show it. ``inner``: what compiles the rewritten
    graphs, ``"inductor"`` or, for debugging, ``"eager"``. ``resize``: ``"fraction"`` or ``"tokens"`` carries the plan
    onto other image sizes than its own (:meth:`Plan.resized`); without it they are errors. ``mode``: of
    ``torch.compile``, for instance ``"reduce-overhead"``; ``inductor_options``: values of ``torch._inductor.config``.
    ``dynamic``: what is compiled at the second batch size serves all others (:mod:`difa_compile.backend.batch_sizes`),
    instead of compiling for each. ``allow_slower``: windows that are predicted slower than full attention on this
    machine, by a profile that ``difa tune`` measured, are carried out all the same; by default they are left full and
    recorded as skipped.

    Raises :class:`NotAppliedError` if the pipeline carries a plan already, :class:`UnsupportedPipelineError` without a
    transformer or scheduler or if the plan shares guidance halves and it is not known which is which,
    :class:`PlanMismatchError` if the plan was made for another model than its transformers,
    :class:`DecisionError` for options that inductor does not know, and what :meth:`Plan.load` raises.
    """
    models = find_transformers(pipe)
    check_scheduler(pipe)
    if resize not in (None, *RESIZES):
        raise DecisionError(f"resize is {resize!r}; choose one of {', '.join(RESIZES)}, or leave it out")
    compiler_named(inner, inductor_config(mode, inductor_options))
    if wiring_of(pipe) is not None:
        raise NotAppliedError(f"this {type(pipe).__name__} already carries a plan; call remove(pipe) first")
    if not isinstance(plan, Plan):
        plan = Plan.load(plan)
    for model in models:
        plan.validate(model=model)
    applied = AppliedPlan(plan)
    options: dict[str, object] = {"plan": plan, "strict": strict, "layout": layout, "inner": inner, "resize": resize}
    if mode is not None:
        options["mode"] = mode
    if inductor_options:
        options["inductor_options"] = dict(inductor_options)
    if allow_slower:
        options["allow_slower"] = True
    if dynamic:
        options["dynamic"] = AnyBatch()
    options["cfg"] = cfg = _cfg_option(pipe, plan)
    decisions = {decision for row in plan.decisions for decision in row}
    shares = any(decision.cfg_shared for decision in decisions)
    halves = shares and not cfg.get("two_call")
    caches = any(decision.kind in (Kind.REUSE, Kind.WINDOW_RESIDUAL) for decision in decisions)

    def start(pipe: Any, scheduler: Any, arguments: Mapping[str, object]) -> Following:
        check_unchanged(pipe, models)

        def check_guidance() -> None:  # at every call: a callback may switch guidance off
            if shares and guidance_is_on(pipe, arguments) is False:
                raise PlanMismatchError(
                    f"the plan shares the two halves of classifier-free guidance, but this call of "
                    f"{type(pipe).__name__} has guidance off, so it has no CFG half; {how_to_guide(pipe, arguments)}"
                )

        def open_run(progress: tuple[float, ...]) -> Run:
            return _AppliedRun(models, progress, applied, halves)

        device = getattr(pipe, "_execution_device", None)  # where offloaded weights are not
        if not isinstance(device, torch.device):
            device = next((parameter.device for parameter in models[0].parameters()), None)
        return Following(
            scheduler,
            open_run,
            check=check_guidance,
            one_call_each=caches or shares,
            conditional_first=guidance_of(pipe).conditional_first,
            finished=applied._note,
            timed=applied.time_steps,
            device=device,
        )

    backend: Callable[..., object] = difa
    if shares and not halves and not guidance_of(pipe).conditional_first:
        # Whether calls are told apart shows only when they are made, and is then said of the capture: it must be this
        # pipeline's alone. Dynamo takes no graph of another backend for it.
        backend = functools.partial(difa)
    compiled = {model: _Followed(model, compile_forward(model, backend, options), strict) for model in models}
    Wiring(pipe, compiled, start).connect()
    return applied


def check_unchanged(pipe: Any, models: tuple[nn.Module, ...]) -> None:
    """Raise :class:`NotAppliedError` if other transformers than ``models`` are in ``pipe``, or its plan is off them."""
    found = find_transformers(pipe)
    name = type(pipe).__name__
    if len(found) != len(models) or any(one is not other for one, other in zip(found, models, strict=True)):
        raise NotAppliedError(
            f"a transformer of this {name} was exchanged after the plan was applied, and the plan is not applied to "
            "the new one; call remove(pipe) and apply(pipe, plan) again"
        )
    wiring = wiring_of(pipe)
    if wiring is not None and not all(wiring.is_attached(model) for model in models):
        raise NotAppliedError(
            f"the transformer of this {name} was compiled in place (transformer.compile()) after the plan was applied, "
            "which took the plan off; call remove(pipe), leave that compilation out, and apply(pipe, plan) again"
        )


def remove(pipe: Any) -> None:
    """Take the plan off ``pipe``, leaving it as it was before :func:`apply`.

    Raises :class:`NotAppliedError` if it carries none.
    """
    wiring = wiring_of(pipe)
    if wiring is None:
        raise NotAppliedError(f"this {type(pipe).__name__} carries no plan; there is nothing to remove")
    wiring.disconnect()


def _cfg_option(pipe: Any, plan: Plan) -> dict[str, object]:
    """How the halves of guidance are told apart: by the plan and the pipeline, which must not contradict each other."""
    guidance = guidance_of(pipe)
    told, known = plan.settings.conditional_half, guidance.conditional_half
    shares = any(decision.cfg_shared for row in plan.decisions for decision in row)
    if shares and told is not None and known is not None and told != known:
        raise PlanMismatchError(
            f"the plan was made with the conditional half at position {told}, but {type(pipe).__name__} puts it at "
            f"{known}; calibrate a plan with this pipeline"
        )
    made_for = plan.settings.guidance
    if shares and guidance.form == "none":
        raise PlanMismatchError(
            f"the plan shares guidance halves, but {type(pipe).__name__} has none: {guidance.reason}; use a plan "
            "without +cfg"
        )
    if shares and {made_for, guidance.form} == {"batched", "two-call"}:
        raise PlanMismatchError(
            f"the plan shares guidance halves as {made_for} calls have them, but {type(pipe).__name__} makes "
            f"{guidance.form} ones; calibrate a plan with this pipeline"
        )
    if "two-call" in (made_for, guidance.form):
        return {"two_call": True}
    half = told if told is not None else known
    if half is None and shares:
        half = conditional_half_of(pipe)
    return {} if half is None else {"conditional_half": half}
