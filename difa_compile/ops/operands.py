"""What tensors a local-attention kernel may be given: checked once, before any of them is read.

Kernels read memory by the query's dtype and by sizes that follow from the layout, so whatever does not go together has
to be found here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from difa_compile.errors import LayoutError, OperandError
from difa_compile.layout import Layout


def check_kinds(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """Raise :class:`OperandError` unless dtypes, devices, storage and ranks go together; looks at no size.

    Query, key and value are dense tensors of four dimensions, of one floating-point dtype, on one device. A mask is
    there too, bool or of a floating-point dtype.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value), ("mask", mask)):
        if tensor is None:
            continue
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else tensor.layout
            raise OperandError(f"local attention: the {name} is {kind}; give a dense tensor")
        if tensor.device != query.device:
            raise OperandError(
                f"local attention: the {name} is on {tensor.device}, the query on {query.device}; move one of them"
            )
        if name == "mask":
            if not (tensor.dtype == torch.bool or tensor.is_floating_point()):
                raise OperandError(
                    f"local attention: the mask is {tensor.dtype}; give bool, True = visible, or floating-point "
                    "numbers to add to the scores"
                )
            continue
        if tensor.dim() != 4:
            raise OperandError(
                f"local attention: the {name} has {tensor.dim()} dimensions; give (batch, heads, tokens, channels)"
            )
        if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            raise OperandError(
                f"local attention: the {name} is {tensor.dtype}; give float32, float64 or a half precision"
            )
        if tensor.dtype != query.dtype:
            raise OperandError(
                f"local attention: the {name} is {tensor.dtype}, the query {query.dtype}; cast them to one dtype"
            )


def check_sizes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    layout: Layout,
    pooled: int = 0,
    scale: float | None = None,
) -> None:
    """Raise unless the sizes go with the layout (:class:`LayoutError`) and each other (:class:`OperandError`).

    Query (B, H, L, D), key (B, K, S, D), value (B, K, S, E), K a divisor of H, L as ``layout.rows`` takes it,
    S = ``layout.tokens + pooled``. A mask broadcasts to (B, H, L, S).
    """
    if pooled < 0:
        raise LayoutError(f"local attention: {pooled} pooled keys; their number must not be negative")
    layout.check(key.shape[2] - pooled, "local attention")
    layout.rows(query.shape[2])  # raises for another number of queries
    batch, heads, tokens, channels = query.shape
    same = key.shape[:3] == value.shape[:3] and key.shape[0] == batch and key.shape[3] == channels
    if not same or (heads % key.shape[1] if key.shape[1] else heads):
        raise OperandError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not go together; "
            "give (B, H, L, D), (B, G, S, D) and (B, G, S, DV) with H a multiple of G"
        )
    if scale is not None and not math.isfinite(scale):
        raise OperandError(f"local attention: the scale is {scale}; give a finite number")
    shape = (batch, heads, tokens, key.shape[2])
    if mask is not None and not _broadcasts(tuple(mask.shape), shape):
        raise OperandError(
            f"a mask of shape {tuple(mask.shape)} does not broadcast to {shape}, which is (batch, heads, queries, keys)"
        )
    for name, tensor in (("query", query), ("key", key), ("value", value), ("mask", mask)):
        if tensor is not None and not _in_memory(tensor):
            raise OperandError(f"local attention: the {name}'s memory was freed or is smaller than its sizes say")


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether ``expand`` takes one to the other."""
    return len(shape) <= len(target) and all(
        own in (1, wanted) for own, wanted in zip(reversed(shape), reversed(target), strict=False)
    )


def _in_memory(tensor: Tensor) -> bool:
    """Whether all that sizes and strides reach lies in the tensor's storage, which may have been resized below it."""
    if tensor.numel() == 0:
        return True
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize <= tensor.untyped_storage().nbytes()
