"""The registry of tiny models: ``build("PixArtTransformer2DModel")`` gives a model with random weights and its inputs.

A file of this folder holds one builder per transformer class of diffusers; importing :func:`registered` reads them all.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_builders: dict[str, Callable[[], Example]] = {}
_unbuildable: dict[str, str] = {}


@dataclass(frozen=True)
class Example:
    """A model, the keyword arguments of one call for two samples, and the name of the noisy sample among them."""

    model: nn.Module
    inputs: Mapping[str, Any]
    latent: str


def model(name: str) -> Callable[[Callable[[], Example]], Callable[[], Example]]:
    """Register the builder of the transformer class ``name``."""

    def register(builder: Callable[[], Example]) -> Callable[[], Example]:
        if name in _builders or name in _unbuildable:
            raise ValueError(f"{name} is registered twice")
        _builders[name] = builder
        return builder

    return register


def unbuildable(name: str, reason: str) -> None:
    """Register a class that cannot be built or run tiny, and why."""
    if name in _builders or name in _unbuildable:
        raise ValueError(f"{name} is registered twice")
    _unbuildable[name] = reason


def registered() -> tuple[str, ...]:
    """Names of the classes that can be built, sorted."""
    _read_all()
    return tuple(sorted(_builders))


def reasons() -> Mapping[str, str]:
    """Classes that cannot be built, and why."""
    _read_all()
    return dict(_unbuildable)


def build(name: str, seed: int = 0) -> Example:
    """The tiny model of class ``name``, in eval mode, without degenerate parameters, with its inputs."""
    _read_all()
    torch.manual_seed(seed)
    example = _builders[name]()
    enliven(example.model)
    example.model.eval().requires_grad_(False)
    return example


def enliven(net: nn.Module) -> None:
    """Re-draw weights that are all zero, and sharpen attention, so that every attention call shows in the output."""
    with torch.no_grad():
        for path, parameter in net.named_parameters():
            if not parameter.is_floating_point():
                continue
            if not parameter.any():
                nn.init.normal_(parameter, std=0.3)
            parts = path.split(".")
            if len(parts) > 1 and parts[-1] == "weight" and parts[-2] in _SHARPENED:
                parameter.mul_(3.0)


_SHARPENED = {
    "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_qkv", "qkv", "qkv_proj", "img_qkv_proj",
    "txt_kv_proj", "to_query", "to_key", "to_value", "to_q_t", "to_k_t", "to_v_t", "img_attn_qkv", "txt_attn_qkv",
}  # fmt: skip


def _read_all() -> None:
    package = importlib.import_module("benchmarks.zoo")
    for info in pkgutil.iter_modules(package.__path__):
        if info.name not in ("registry", "check"):
            importlib.import_module(f"benchmarks.zoo.{info.name}")
