"""``difa::local_attention``: attention limited to a window on the token grid, as one op.

A ``torch.library`` op with schema, fake kernel, gradients and an eager reference. Which kernel serves a call is decided
in :mod:`difa_compile.ops.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops import gradient
from difa_compile.ops.kernels import LocalCall, choose_kernel
from difa_compile.ops.operands import check_kinds, check_sizes

LIBRARY = torch.library.Library("difa", "DEF")
LIBRARY.define(
    "local_attention(Tensor query, Tensor key, Tensor value, int[] grid, int before, int after, str shape, int radius, "
    "float? scale=None, Tensor? mask=None, int pooled=0) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # kernels keep masks for the next call and may compile themselves
)


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
        formula, in memory linear in tokens (:mod:`difa_compile.ops.gradient`); a mask gets none. Under
        ``torch.autocast`` query, key, value and mask are cast as ``scaled_dot_product_attention``'s are.

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
