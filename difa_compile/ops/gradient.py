"""Gradients of ``difa::local_attention``, from the reference formula, in memory linear in tokens.

Queries are taken a few at a time, with the keys that their windows reach; the attention of such a piece is computed
again and differentiated by autograd. Time is that of a dense kernel on those pieces, not that of a tuned backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from difa_compile.decision import Window, WindowShape
from difa_compile.layout import Layout
from difa_compile.ops import reference

PAIRS_AT_ONCE = 2**20
"""Query-key pairs per head that are held at a time."""


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """``setup_context`` of the op."""
    query, key, value, grid, before, after, shape, radius, scale, mask, pooled = inputs
    ctx.save_for_backward(query, key, value, mask)
    ctx.layout = Layout(tuple(grid), before, after)
    ctx.window = Window(shape, radius).within(ctx.layout.grid)
    ctx.scale, ctx.pooled = scale, pooled


@once_differentiable
def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of query, key and value; the mask and the numbers get none."""
    query, key, value, mask = ctx.saved_tensors
    layout, window = ctx.layout, ctx.window
    wide = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
    gradients = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (query, key, value)]
    first_token = layout.rows(query.shape[2]).start
    if mask is not None:
        mask = mask.detach().expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    for queries, keys in pieces(layout, window, query.shape[2], ctx.pooled, query.device):
        parts = [
            x.detach().index_select(2, at).to(wide).requires_grad_()
            for x, at in ((query, queries), (key, keys), (value, keys))
        ]
        seen = reference.visible_pairs(layout, window, queries[:, None] + first_token, keys[None, :])
        own = None if mask is None else mask.index_select(2, queries).index_select(3, keys)
        with torch.autocast(query.device.type, enabled=False):  # what was cast is; here all is as wide as it is
            with torch.enable_grad():
                q, k, v = parts
                out = reference.attention(q, k, v, reference.combined(seen, own), ctx.scale)
            found = torch.autograd.grad(out, parts, upstream.index_select(2, queries).to(wide))
        for total, part, at in zip(gradients, found, (queries, keys, keys), strict=True):
            total.index_add_(2, at, part)
    done = tuple(
        total.to(x.dtype) if needed else None
        for total, x, needed in zip(gradients, (query, key, value), ctx.needs_input_grad, strict=False)
    )
    return (*done, *[None] * 8)


def pieces(
    layout: Layout, window: Window, queries: int, pooled: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices of a few queries and of all keys that any of them may see, until every query had its turn."""
    rows = layout.rows(queries)
    start = layout.before - rows.start
    everything = torch.arange(layout.tokens, device=device)
    outside = torch.cat([everything[: layout.before], everything[layout.before + layout.image_tokens :]])
    extra = torch.arange(layout.tokens, layout.tokens + pooled, device=device)
    others = outside[(outside >= rows.start) & (outside < rows.stop)] - rows.start
    for part in others.split(max(1, PAIRS_AT_ONCE // layout.tokens)):
        yield part, everything
    line = 1 if window.shape is WindowShape.BAND else math.prod(layout.grid[1:])  # tokens per place on the first axis
    lines = layout.image_tokens // line
    many = PAIRS_AT_ONCE
    around = min(lines, 2 * window.radius + 2) * line + len(outside) + pooled
    while many > 1 and many * (many + around) > PAIRS_AT_ONCE:
        many //= 2
    first = 0
    while first < layout.image_tokens:
        last = min(first + many, layout.image_tokens)
        low = max(0, first // line - window.radius) * line
        high = min(lines, (last - 1) // line + window.radius + 1) * line
        image = torch.arange(layout.before + low, layout.before + high, device=device)
        yield torch.arange(start + first, start + last, device=device), torch.cat([outside, image, extra])
        first = last
