"""What hangs around modules: PyTorch's forward hooks, and those of accelerate and diffusers that move weights, cast
them, or leave work out.

Forward hooks of the transformer itself are called around the compiled call, as ``nn.Module`` calls them. Those of
modules inside it are part of the graph, which is captured anew when they come or go (``compiled_forward.py``).

Accelerate and diffusers put a ``forward`` of their own on the instance. One of accelerate's around the whole
transformer is fine, as model offload has it: it moves weights and inputs before the call and runs around the compiled
one. All others act between the layers, where a graph of the whole model has no room for them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module

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
    forward = model.__dict__.get("forward")
    function = forward.func if isinstance(forward, functools.partial) else None
    if not getattr(function, "__module__", "").startswith("accelerate."):
        return None  # none was there, or somebody has put another forward in its place
    return getattr(model, "_hf_hook", None) if hasattr(model, "_old_forward") else None


def inner_forward(model: nn.Module) -> Callable[..., object]:
    """The model's ``forward`` without accelerate's hook around it."""
    forward: Callable[..., object] = model.forward if outer_hook(model) is None else model._old_forward  # type: ignore[assignment]
    return forward


def global_hooks() -> tuple[int, ...]:
    """Names of the forward hooks that PyTorch calls around every module."""
    return *_module._global_forward_pre_hooks, *_module._global_forward_hooks


def is_hooked(model: nn.Module) -> bool:
    """Whether anything is hung around the whole ``model``: forward hooks, its own or global, or accelerate's hook."""
    return bool(
        model._forward_pre_hooks
        or model._forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_forward_hooks
        or outer_hook(model) is not None
    )


def call_in_hooks(
    model: nn.Module, forward: Callable[..., object], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> object:
    """Call ``forward`` in place of the model's own, within all that is hung around the whole ``model``.

    Outside are the forward hooks, global ones first, with the arguments and results that ``nn.Module`` gives them.
    """
    own_before, own_after = model._forward_pre_hooks, model._forward_hooks
    if not (own_before or own_after or global_hooks()):
        return _call_in_outer_hook(model, forward, args, kwargs)
    after = {**_module._global_forward_hooks, **own_after}
    always = [
        key
        for key in after
        if key in _module._global_forward_hooks_always_called or key in model._forward_hooks_always_called
    ]
    result: Any = None
    called = set()

    def call_after(key: int) -> None:
        nonlocal result
        called.add(key)
        with_kwargs = key in _module._global_forward_hooks_with_kwargs or key in model._forward_hooks_with_kwargs
        given = (args, kwargs, result) if with_kwargs else (args, result)
        replaced = after[key](model, *given)
        if replaced is not None:
            result = replaced

    try:
        for key, hook in {**_module._global_forward_pre_hooks, **own_before}.items():
            if key in model._forward_pre_hooks_with_kwargs:
                both = hook(model, args, kwargs)
                if both is not None:
                    args, kwargs = both
            else:
                changed = hook(model, args)
                if changed is not None:
                    args = changed if isinstance(changed, tuple) else (changed,)
        result = _call_in_outer_hook(model, forward, args, kwargs)
        for key in after:
            call_after(key)
        return result
    except Exception:
        for key in always:
            if key not in called:
                try:
                    call_after(key)
                except Exception as error:
                    warnings.warn(
                        f"a forward hook with always_call=True raised, while another error was raised: {error}",
                        stacklevel=2,
                    )
        raise


def _call_in_outer_hook(
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
