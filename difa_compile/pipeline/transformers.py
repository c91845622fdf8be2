"""The denoising transformers and the scheduler of a pipeline: where they are, and whether a plan can work with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from difa_compile.errors import NotAppliedError, UnsupportedPipelineError
from difa_compile.pipeline.module_hooks import check_hooks
from difa_compile.pipeline.wiring import wiring_of

_FIRST, _SECOND = "transformer", "transformer_2"
"""Components that denoise; a pipeline has one of them or both, which then share the steps."""


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
