"""What accelerate and diffusers hang around modules: hooks that move weights, cast them, or leave work out.

Both libraries put a ``forward`` of their own on the instance. One of accelerate's around the whole transformer is fine,
as model offload has it: it moves weights and inputs before the call and runs around the compiled one. All others act
between the layers, where a graph of the whole model has no room for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from difa_compile.errors import UnsupportedPipelineError

_DIFFUSERS_HOOKS = {
    "group_offloading": (
        "group offloading (enable_group_offload)",
        "load the pipeline without it; pipe.enable_model_cpu_offload() works with a plan",
    ),
    "layerwise_casting": (
        "layerwise casting (enable_layerwise_casting)",
        "load the pipeline without it, in the type it is to compute in",
    ),
}
"""Hooks of diffusers by part of their name: what the user knows them as, and the remedy."""


def outer_hook(model: nn.Module) -> Any:
    """Accelerate's hook around the whole of ``model``, or ``None``."""
    return getattr(model, "_hf_hook", None) if hasattr(model, "_old_forward") else None


def inner_forward(model: nn.Module) -> Callable[..., object]:
    """The model's ``forward`` without accelerate's hook around it."""
    forward: Callable[..., object] = model.forward if outer_hook(model) is None else model._old_forward  # type: ignore[assignment]
    return forward


def uncompiled_call(model: nn.Module) -> Callable[..., object]:
    """What calling ``model`` runs, from accelerate's hook around it inwards where there is one."""
    return model._call_impl if outer_hook(model) is None else inner_forward(model)


def call_in_hook(
    model: nn.Module, forward: Callable[..., object], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> object:
    """Call ``forward`` as accelerate's hook around ``model`` calls the model's own; plainly where there is no hook."""
    hook = outer_hook(model)
    if hook is None:
        return forward(*args, **kwargs)
    args, kwargs = hook.pre_forward(model, *args, **kwargs)
    with torch.no_grad() if hook.no_grad else nullcontext():
        output = forward(*args, **kwargs)
    result: object = hook.post_forward(model, output)
    return result


def check_hooks(model: nn.Module) -> None:
    """Raise :class:`UnsupportedPipelineError` for hooks with which ``model`` is not one graph over its own weights."""
    name = type(model).__name__
    for path, module in model.named_modules():
        where = f"{name}.{path}" if path else name
        _check_accelerate(where, getattr(module, "_hf_hook", None), is_outer=not path)
        for key in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}):
            what, remedy = next(
                (words for part, words in _DIFFUSERS_HOOKS.items() if part in key),
                (f"a hook of diffusers ({key})", "disable it first; a cache of diffusers with disable_cache()"),
            )
            raise UnsupportedPipelineError(
                f"{where} carries {what}, which acts between the layers of the model; a plan needs the whole model in "
                f"one graph. Remedy: {remedy}"
            )
    if outer_hook(model) is not None and (model._forward_pre_hooks or model._forward_hooks):
        raise UnsupportedPipelineError(
            f"{name} carries forward hooks of its own inside the hook that accelerate put around it, and compiled code "
            "would leave them out; remove one or the other"
        )


def _check_accelerate(where: str, hook: Any, *, is_outer: bool) -> None:
    if hook is None:
        return
    if any(getattr(part, "offload", False) is True for part in getattr(hook, "hooks", (hook,))):
        raise UnsupportedPipelineError(
            f"the weights of {where} are offloaded layer by layer (enable_sequential_cpu_offload, or a device map that "
            "offloads), so they are other tensors at every call; a plan needs the whole model in one graph. Remedy: "
            "pipe.enable_model_cpu_offload(), which moves the transformer as a whole and works with a plan"
        )
    if not is_outer:
        raise UnsupportedPipelineError(
            f"{where} carries a hook of accelerate ({type(hook).__name__}), which acts between the layers of the model "
            "(a device map, or layerwise casting); a plan needs the whole model in one graph. Remedy: load the "
            "pipeline without, or call pipe.reset_device_map(); then use pipe.to(device) or "
            "pipe.enable_model_cpu_offload()"
        )
