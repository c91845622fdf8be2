"""Kernels of local attention: what one is, and which serves a call.

They are asked in order of preference: each answers ``why_not`` with a reason or None, and the first that can serve is
taken.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from difa_compile.decision import Window
from difa_compile.errors import LayoutError
from difa_compile.layout import Layout


@dataclass(frozen=True)
class LocalCall:
    """What a local-attention kernel is asked to do, without the tensors: enough to say whether it can."""

    layout: Layout
    window: Window
    """Of no larger radius than makes a difference on the layout's grid (:meth:`Window.within`)."""
    scale: float | None
    shape: tuple[int, ...]
    """(batch, heads, tokens, head_dim) of the query."""
    dtype: torch.dtype
    device: torch.device
    masked: bool = False
    """Whether a mask of the model's own comes on top of the window."""
    key_heads: int | None = None
    """Heads of keys and values, which divide those of the query (grouped-query attention); None: as many."""
    value_dim: int = 0
    """Channels of a value; 0 stands for head_dim."""
    pooled: int = 0
    """Further keys at the end, which only image queries see."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", self.window.within(self.layout.grid))

    @property
    def rows(self) -> slice:
        """Which tokens of the layout the queries are."""
        return self.layout.rows(self.shape[2])


@dataclass(frozen=True)
class LocalKernel:
    """One implementation of ``difa::local_attention``.

    ``why_not`` returns the reason it can't serve a call, or None. ``run`` takes query (B, H, L, D), key and value
    (B, key heads, S, D), the model's own mask or None, and the call, and returns (B, H, L, value_dim).
    """

    name: str
    why_not: Callable[[LocalCall], str | None]
    run: Callable[[Tensor, Tensor, Tensor, Tensor | None, LocalCall], Tensor]
    work: Callable[[LocalCall], tuple[int, int]] | None = None
    """Per head, how many (query, key) pairs the kernel goes through, hidden ones in its tiles included, and how many
    keys, counted anew for each tile. None: about the visible pairs, and each key once."""


KERNEL_MODULES = (
    "difa_compile.plugins.triton.local_attention",
    "difa_compile.plugins.flash",
    "difa_compile.plugins.cpu",
    "difa_compile.plugins.flex",
    "difa_compile.plugins.masked_sdpa",
)
"""In order of preference; each module has a ``KERNEL``. Names, not imports: kernels stand above the ops that they
serve,
and load when a call first asks for one.

On CUDA: the Triton kernel, which serves only who asks for it and so goes before all; flash-attn, proven elsewhere, for
plain bands where it is installed; FlexAttention.
"""


def local_kernels() -> tuple[LocalKernel, ...]:
    """All kernels of local attention, in order of preference."""
    return tuple(importlib.import_module(name).KERNEL for name in KERNEL_MODULES)


def choose_kernel(call: LocalCall) -> LocalKernel:
    """The first kernel that can serve a call. Raises :class:`LayoutError` with every kernel's reason if none can."""
    reasons = []
    for kernel in local_kernels():
        reason = kernel.why_not(call)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise LayoutError(f"no kernel serves local attention {call.window} on {call.layout}: " + "; ".join(reasons))
