"""Eager references: the specification of every op and decision, in plain PyTorch.

Kernels, rewritten graphs and engines are tested against these functions; nothing here is meant to be fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difa_compile.decision import Decision, Kind, Window, WindowShape
from difa_compile.layout import Layout


def visible(layout: Layout, window: Window, device: torch.device | str = "cpu") -> Tensor:
    """Which keys each query sees: bool (tokens, tokens), True = visible. :func:`visible_pairs` of all tokens."""
    token = torch.arange(layout.tokens, device=device)
    return visible_pairs(layout, window, token[:, None], token[None, :])


def visible_pairs(layout: Layout, window: Window, query: Tensor, key: Tensor) -> Tensor:
    """Which pairs of tokens see each other: bool, of the shape that the token numbers ``query`` and ``key`` make.

    Image tokens see image tokens inside the window (see :class:`~difa_compile.decision.WindowShape` for the three
    forms; arXiv 2406.08552 for the band, arXiv 2412.16112 for the disc). All other tokens see and are seen by
    everything (arrow attention, arXiv 2503.22796). Tokens beyond the layout's are pooled keys, which the image's
    queries see and others do not.
    """
    window = window.within(layout.grid)
    first, last = layout.before, layout.before + layout.image_tokens
    pooled = key >= layout.tokens
    image_query = (query >= first) & (query < last)
    other = ~image_query | (key < first) | (key >= last)
    one, two = query - first, key - first
    if window.shape is WindowShape.BAND:
        near = (one - two).abs() <= window.radius
    else:
        near = one == one
        squared = (one - one) * 0
        for size in reversed(layout.grid):
            distance = (one % size - two % size).abs()
            squared = squared + distance * distance
            near = near & (distance <= window.radius)
            one, two = one // size, two // size
        if window.shape is WindowShape.DISC:
            near = squared < window.radius * window.radius
    return ((other | near) & ~pooled) | (image_query & pooled)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention. query (B, H, L, D), key and value (B, K, S, D), K a divisor of H; returns (B, H, L, D).

    Half precision is computed in float32 and rounded once, as kernels do.

    ``mask`` broadcasts to (B, H, L, S): bool, True = visible, or a number added to each score, -inf hiding it whatever
    it is. A query that sees no key gives 0. ``scale`` defaults to 1 / sqrt(D).

    A NaN in a query or key makes those queries NaN that see it, and no others. One in a value makes those NaN that see
    it, and may make others so: hidden values are multiplied by 0, as all kernels do.
    """
    dtype, factor = query.dtype, default_scale(query.shape[-1]) if scale is None else scale
    if dtype in (torch.float16, torch.bfloat16):  # their scores, before the scale, may be over float16's largest number
        query, key, value = query.float(), key.float(), value.float()
    groups = query.shape[1] // key.shape[1] if key.shape[1] else 1
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(-2, -1)) * factor
    if mask is not None:
        hidden = ~mask if mask.dtype == torch.bool else mask == float("-inf")
        scores = (scores if mask.dtype == torch.bool else scores + mask).masked_fill(hidden, float("-inf"))
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    return (scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0) @ value).to(dtype)


def default_scale(head_dim: int) -> float:
    """1 / sqrt(D); 1 for a head without channels, whose scores are all 0."""
    return float(max(head_dim, 1) ** -0.5)


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
    """Attention limited to ``window`` on ``layout``'s grid. Shapes as :func:`attention`, S = layout.tokens + pooled.

    Queries are all tokens or those of ``layout.rows(L)``. A ``mask`` of the model's own hides pairs on top of the
    window.
    """
    rows = layout.rows(query.shape[2])
    queries = torch.arange(rows.start, rows.stop, device=query.device)
    keys = torch.arange(layout.tokens + pooled, device=query.device)
    near = visible_pairs(layout, window, queries[:, None], keys[None, :])
    return attention(query, key, value, combined(near, mask), scale)


def by_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decision: Decision,
    layout: Layout | None = None,
    *,
    reused: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention in which every head does what ``decision`` says of it (DiTFastAttnV2, arXiv 2503.22796).

    Shapes as :func:`attention`. ``reused``: the output of the latest step that computed a head, ``residual``: full -
    window of the latest step in which it was full, both (B, H, L, D), read at the heads that want them. ``mask`` (B or
    1, H or 1, L, S) hides pairs on top of windows.
    """
    sharing = query.shape[1] // key.shape[1]
    heads = []
    for head, form in enumerate(decision.forms):
        one = slice(head, head + 1)
        if form.kind is Kind.REUSE:
            assert reused is not None
            heads.append(reused[:, one])
            continue
        keys = slice(head // sharing, head // sharing + 1)
        own = mask[:, one] if mask is not None and mask.shape[1] > 1 else mask
        operands = query[:, one], key[:, keys], value[:, keys]
        if form.window is None:
            heads.append(attention(*operands, own, scale))
            continue
        assert layout is not None
        near = local_attention(*operands, layout, form.window, scale, own)
        if form.kind is Kind.WINDOW_RESIDUAL:
            assert residual is not None
            near = near + residual[:, one]
        heads.append(near)
    return torch.cat(heads, 1)


def combined(near: Tensor, mask: Tensor | None) -> Tensor:
    """What a window leaves visible (bool) and a model's own mask, as one mask."""
    if mask is None:
        return near
    return near & mask if mask.dtype == torch.bool else mask.masked_fill(~near, float("-inf"))


def residual(full: Tensor, local: Tensor) -> Tensor:
    """What a full step leaves for later window steps: ``full - local``, per head, before the output projection."""
    return full - local


def extrapolate(outputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """A region's output, forecast from its last computed ones, the newest first: their sum, weighted.

    ``outputs``: k + 1 tensors of one shape and floating-point dtype. ``weights``: (k + 1,), in
    :func:`extrapolation_dtype`, in which the sum is taken; it is rounded once. TaylorSeer, arXiv 2503.06923; the
    weights are those of the polynomial through the outputs (:func:`difa_compile.plan.schedule.forecast_weights`).
    """
    total = outputs[0].to(weights.dtype) * weights[0]
    for output, weight in zip(outputs[1:], weights[1:], strict=True):
        total = total + output.to(weights.dtype) * weight
    return total.to(outputs[0].dtype)


def extrapolation_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype outputs of a dtype are extrapolated: float32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def share_halves(value: Tensor, conditional_half: int, dim: int = 0) -> Tensor:
    """Copy the conditional half of a classifier-free-guidance batch to the other half (ASC, arXiv 2406.08552)."""
    half = value.chunk(2, dim)[conditional_half]
    return torch.cat([half, half], dim)
