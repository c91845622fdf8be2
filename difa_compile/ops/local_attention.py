"""The ops that passes put into graphs. Each is a ``torch.library`` op with schema, fake kernel and eager reference.

Which kernel serves an op is decided here, per call: the kernels of :mod:`difa_compile.plugins` are asked in order,
each answers ``why_not`` with a reason or None, and the first that can serve is taken. Kernels load when first needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difa_compile.ops.local_attention import gradient
from difa_compile.decision import Window
from difa_compile.errors import LayoutError
from difa_compile.layout import Layout
from difa_compile.ops.operands import check_kinds, check_sizes

LIBRARY = torch.library.Library("difa", "DEF")
LIBRARY.define(
    "local_attention(Tensor query, Tensor key, Tensor value, int[] grid, int before, int after, str shape, int radius, "
    "float? scale=None, Tensor? mask=None, int pooled=0) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # kernels keep masks for the next call and may compile themselves
)
LIBRARY.define("sized(Tensor value, int[] shape) -> Tensor")


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
"""In order of preference; each module has a ``KERNEL``.

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


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    window: Window,
    scale: float | None = None,
    mask: Tensor | None = None,
    pooled: int = 0,
) -> Tensor:
    """Attention limited to a window on the token grid, as one op.

    The specification is :func:`difa_compile.ops.reference.local_attention`.

    Args:
        query: (B, H, L, D) of a floating-point dtype, any strides; L = ``layout.tokens``, or fewer, those of
            ``layout.rows``: the image's, with or without the tokens after it.
        key, value: (B, K, S, D) and (B, K, S, E) of the same dtype, K a divisor of H, S = ``layout.tokens + pooled``.
        layout: where image and other tokens stand. ``window``: the neighbourhood. ``scale``: default 1 / sqrt(D).
        mask: on top of the window, broadcast to (B, H, L, S): bool, True = visible, or added to the scores.
        pooled: how many keys at the end stand for the image at a coarser scale (CLEAR, arXiv 2412.16112): image queries
            see all of them, other queries none.

    Returns:
        (B, H, L, E), laid out in memory as (B, L, H, E). Gradients for query, key and value follow from the reference
        formula, in memory linear in tokens (:mod:`difa_compile.ops.gradient`); a mask gets none. Under ``torch.autocast``
        query, key, value and mask are cast as ``scaled_dot_product_attention``'s are.

    Raises:
        LayoutError: tokens do not add up with the layout, or no kernel serves the call.
        OperandError: the tensors do not go together, or are none that a kernel can read
            (:mod:`difa_compile.ops.operands`).
        DecisionError: no such window.
    """
    where = (list(layout.grid), layout.before, layout.after, str(window.shape), window.radius)
    out: Tensor = torch.ops.difa.local_attention(query, key, value, *where, scale, mask, pooled)
    return out


def _local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: list[int],
    before: int,
    after: int,
    shape: str,
    radius: int,
    scale: float | None = None,
    mask: Tensor | None = None,
    pooled: int = 0,
) -> Tensor:
    layout = Layout(tuple(grid), before, after)
    check_kinds(query, key, value, mask)
    check_sizes(query, key, value, mask, layout, pooled, scale)
    call = LocalCall(
        layout,
        Window(shape, radius),
        scale,
        tuple(query.shape),
        query.dtype,
        query.device,
        mask is not None,
        key.shape[1],
        value.shape[3],
        pooled,
    )
    if 0 in (*query.shape[:3], value.shape[3]):
        return _local_attention_fake(query, key, value)
    out = choose_kernel(call).run(query, key, value, mask, call)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _cast_rule(key: str, device_type: str) -> Callable[..., Tensor]:
    """What the op does under autocast for a device type: what autocast does to ``scaled_dot_product_attention``."""
    keys = torch._C.DispatchKeySet(torch._C._dispatch_key_parse(key))

    def run(*args: Any, **kwargs: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)

        def cast(value: Any) -> Any:
            eligible = isinstance(value, Tensor) and value.is_floating_point() and value.device.type == device_type
            return value.to(dtype) if eligible and value.dtype != torch.float64 else value

        with torch._C._ExcludeDispatchKeyGuard(keys):
            out: Tensor = torch.ops.difa.local_attention(
                *map(cast, args), **{name: cast(value) for name, value in kwargs.items()}
            )
            return out

    return run


def _register_autocast() -> None:
    """Give the op an autocast rule on every device where ``scaled_dot_product_attention`` has one.

    ``torch.library.register_autocast`` is no use: it casts to one dtype, whatever autocast's is.
    """
    for device_type in torch._C._autocast_supported_devices():
        key = "Autocast" + torch._C._dispatch_key_for_device(device_type)
        if torch._C._dispatch_has_kernel_for_dispatch_key("aten::scaled_dot_product_attention", key):
            LIBRARY.impl("local_attention", _cast_rule(key, device_type), key)


def _local_attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: object = None,
    before: object = None,
    after: object = None,
    shape: object = None,
    radius: object = None,
    scale: object = None,
    mask: Tensor | None = None,
    pooled: object = 0,
) -> Tensor:
    check_kinds(query, key, value, mask)
    batch, heads, tokens = query.shape[:3]
    return query.new_empty((batch, tokens, heads, value.shape[-1])).transpose(1, 2)


LIBRARY.impl("local_attention", _local_attention, "CompositeExplicitAutograd")
_register_autocast()
torch.library.register_fake("difa::local_attention", _local_attention_fake, lib=LIBRARY)
torch.library.register_autograd("difa::local_attention", gradient.backward, setup_context=gradient.save, lib=LIBRARY)

LOCAL_ATTENTION = torch.ops.difa.local_attention.default
"""The overload that passes insert."""


def _sized(value: Tensor, shape: list[int]) -> Tensor:
    if list(value.shape) != shape:
        raise RuntimeError(f"a value of shape {list(value.shape)} where {shape} was captured")
    return value.clone(memory_format=torch.contiguous_format)


def _sized_fake(value: Tensor, shape: list[int]) -> Tensor:
    return value.new_empty(shape)


LIBRARY.impl("sized", _sized, "CompositeExplicitAutograd")
torch.library.register_fake("difa::sized", _sized_fake, lib=LIBRARY)

SIZED = torch.ops.difa.sized.default
"""``sized(value, shape)``: the value itself, laid out row by row, of a size that only its values determine but that is
known; for the compiler a plain size. Raises ``RuntimeError`` if it is another."""
