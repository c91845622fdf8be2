"""The calls of its transformers that a pipeline makes, captured: what engines are made from.

    calls = captured(pipe, {"class_labels": [3]}, plan)

The pipeline runs a few steps with the plan applied (:mod:`difa_compile.pipeline.apply`), graphs run eagerly, and the
first call of each transformer and branch is kept. So what an export sees is what a run of the plan computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from difa_compile.backend.capture import Capture
from difa_compile.backend.run import Run
from difa_compile.errors import EngineError, NoAttentionError, NotAppliedError
from difa_compile.layout import Layout
from difa_compile.passes.autocast import Autocast
from difa_compile.pipeline.apply import apply_for_trials, remove
from difa_compile.pipeline.compiled_forward import CompiledForward
from difa_compile.pipeline.schedule_follower import ScheduleFollower
from difa_compile.pipeline.transformers import check_scheduler, find_transformers
from difa_compile.pipeline.wiring import Wiring, wiring_of
from difa_compile.plan.plan import Plan
from difa_compile.wording import quoted

MOST_STEPS = 8
"""Steps after which a transformer that no call has come to is taken to get none."""
PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
"""Arguments of pipelines' calls that say how many images each prompt is for."""


@dataclass(frozen=True, eq=False)
class CapturedCall:
    """One call of a transformer, captured.

    ``args``: the inputs of the captured graph, in order, the parameters of ``model`` among them. ``images``: how many
    images the call is for. ``expert``: which of a pipeline's transformers it is (from 0, in the order in which they
    take over). ``branch``: ``"cond"`` or ``"uncond"`` where guidance is two calls, else None.
    """

    capture: Capture
    args: tuple[Any, ...]
    model: nn.Module
    images: int
    expert: int = 0
    branch: str | None = None


def captured(
    pipe: Any,
    inputs: Mapping[str, Any],
    plan: Plan,
    *,
    strict: bool = False,
    resize: str | None = None,
    layout: Layout | None = None,
    allow_slower: bool = False,
) -> tuple[CapturedCall, ...]:
    """The first call of each transformer of ``pipe`` in each branch, in the order in which they are made.

    ``inputs``: keyword arguments of one call of the pipeline, but for the steps; it makes latents, where it can. The
    other arguments are those of :func:`difa_compile.apply`, and so is what is raised; besides :class:`EngineError` if
    one of the pipeline's transformers is never called, or if it is not told how many images the call makes.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    call = {"output_type": "latent", **inputs} if "output_type" in parameters else dict(inputs)
    found: dict[tuple[int, str | None], CapturedCall] = {}
    images = 0

    def note(run: Run, capture: Capture, args: Sequence[Any]) -> None:
        expert = run.model_of(capture, args)
        if (expert, run.current_branch) in found:
            return
        if str(Autocast.now()):
            raise EngineError(
                f"{type(pipe).__name__} calls its transformer under torch.autocast ({Autocast.now()}), which is no "
                "part of an engine; leave it, and load the model in the dtype that it is to compute in"
            )
        model = run.models[expert]
        own = owned_names(model)
        kept = tuple(value.clone() if isinstance(value, Tensor) and id(value) not in own else value for value in args)
        found[expert, run.current_branch] = CapturedCall(capture, kept, model, 0, expert, run.current_branch)

    options = {"strict": strict, "resize": resize, "layout": layout, "allow_slower": allow_slower}
    applied = apply_for_trials(pipe, plan, inner="eager", **options)
    applied.told = note
    try:
        wanted = len(find_transformers(pipe))
        for steps in (1, 2, 4, MOST_STEPS):  # experts that take over late are called in longer runs alone
            if "num_inference_steps" in parameters:
                call["num_inference_steps"] = steps
            with torch.no_grad():
                images = images_of(pipe, pipe(**call))
            called = len({expert for expert, _ in found})
            if called == wanted:
                break
        else:
            raise EngineError(
                f"{type(pipe).__name__} has {wanted} transformers, but in {MOST_STEPS} steps {called} of them were "
                "called; give inputs with which all are"
            )
    finally:
        remove(pipe)
    return tuple(replace(each, images=images) for each in found.values())


class _Told(Exception):
    """The progress of a pipeline's steps, at which it is stopped."""

    def __init__(self, progress: tuple[float, ...]) -> None:
        super().__init__()
        self.progress = progress


def progress_of(pipe: Any, inputs: Mapping[str, Any], steps: int) -> tuple[float, ...]:
    """The progress of each step that ``pipe`` makes when it is asked for ``steps``, falling from 1 to 0; there may be
    more of them, or fewer. The pipeline is stopped at its first call of a transformer.

    Raises :class:`NotAppliedError` if it carries a plan, and :class:`NoAttentionError` if it calls no transformer.
    """

    def stop(progress: tuple[float, ...]) -> Run:
        raise _Told(progress)

    def start(_: Any, scheduler: Any, __: Mapping[str, object]) -> ScheduleFollower:
        return ScheduleFollower(scheduler, stop, one_call_each=False)

    if wiring_of(pipe) is not None:
        raise NotAppliedError(f"this {type(pipe).__name__} carries a plan; call remove(pipe) first")
    check_scheduler(pipe)
    wiring = Wiring(pipe, {model: CompiledForward(model, _never) for model in find_transformers(pipe)}, start)
    wiring.connect()
    try:
        with torch.no_grad():
            pipe(**{**inputs, "num_inference_steps": steps})
    except _Told as told:
        return told.progress
    finally:
        wiring.disconnect()
        if hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()  # the call was stopped before it came to that
    raise NoAttentionError(f"{type(pipe).__name__} returned without calling its transformer")


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing is compiled")


def images_of(pipe: Any, result: Any) -> int:
    """How many images (videos, sounds) a pipeline has made: the length of the first thing that it returned.

    Raises :class:`EngineError` if that cannot be told.
    """
    try:
        return len(result[0])
    except (TypeError, KeyError, IndexError):
        raise EngineError(
            f"how many images a call of {type(pipe).__name__} makes cannot be told from its result, "
            f"{quoted(type(result).__name__)}; a pipeline returns its images first"
        ) from None


def more_images(pipe: Any, inputs: Mapping[str, Any], times: int) -> dict[str, Any]:
    """``inputs`` of a call of ``pipe`` for ``times`` as many images: more images for each prompt, or, where the
    pipeline makes one for each label, every label as often.

    Raises :class:`EngineError` for a pipeline whose call names neither.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    call = dict(inputs)
    for name in PER_PROMPT:
        if name in parameters:
            call[name] = times * (call.get(name) or 1)
            return call
    if isinstance(call.get("class_labels"), (list, tuple)):
        call["class_labels"] = [label for label in call["class_labels"] for _ in range(times)]
        return call
    raise EngineError(
        f"the call of {type(pipe).__name__} takes neither class_labels nor any of {', '.join(PER_PROMPT)}, so it is "
        "not known how to ask for more images; capture calls of your own for several numbers of images"
    )


def owned_names(model: nn.Module) -> dict[int, str]:
    """By id of each parameter and buffer of a model its name; of one that has several, the first."""
    found: dict[int, str] = {}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        found.setdefault(id(value), name)
    return found
