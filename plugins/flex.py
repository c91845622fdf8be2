"""Local attention through FlexAttention, which skips 128 x 128 blocks that no window touches.

The tokens are put into an order in which 128 in a row are a patch of the grid (:mod:`.token_order`), where that leaves
fewer blocks; the result is put back.

It has to be compiled by inductor, so it serves where that pays: many tokens. On the CPU it does so from 16384 tokens
in float32 (in bfloat16 the dense kernel stays ahead); on CUDA from 4096 tokens (not measured on a GPU yet).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops.kernels import LocalCall, LocalKernel
from difa_compile.ops.reference import visible_pairs
from difa_compile.plugins.token_order import BLOCK, Strips, best

MIN_TOKENS = {"cpu": 16384, "cuda": 4096}


def why_not(call: LocalCall) -> str | None:
    least = MIN_TOKENS.get(call.device.type)
    if least is None:
        return f"not tried on {call.device.type}"
    if call.masked:
        return "the model's own mask comes on top of the window"
    if call.layout.tokens < least:
        return f"{call.layout.tokens} tokens: pays from {least}"
    if call.device.type == "cpu" and call.dtype is not torch.float32:
        return f"slower than dense attention in {call.dtype} on the CPU"
    if call.shape[-1] & (call.shape[-1] - 1) or not call.shape[-1]:
        return f"head dimension {call.shape[-1]} is not a power of two"
    return None


def mask_mod(
    layout: Layout, window: Window, first: int = 0, order: Tensor | None = None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's function of a window, for queries that begin at token ``first``.

    ``order``: which token stands where, (keys,), if not in the layout's own order.
    """

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if order is None:
            return visible_pairs(layout, window, query + first, key)
        return visible_pairs(layout, window, order[query + first], order[key])

    return visible


MOST_GRAPHS = 1024
"""Graphs of FlexAttention per process: one for each layout, window, shape and dtype. Beyond Dynamo's own limit it would
run uncompiled, with all scores in memory."""
compiled_create_block_mask = torch.compile(create_block_mask, dynamic=False)
compiled_flex_attention = torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=16)
def orders(
    layout: Layout, strips: Strips, device: torch.device, queries: int, pooled: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which key, which query stands where, and where each query went: (keys,), (queries,), (queries,) int64."""
    tokens, rows = strips.order(layout), layout.rows(queries)
    keys = torch.cat([tokens, torch.arange(layout.tokens, layout.tokens + pooled)])
    mine = tokens[rows] - rows.start  # image and other tokens keep to themselves, so these are the same queries
    return keys.to(device), mine.to(device), mine.argsort().to(device)


@lru_cache(maxsize=16)
def block_mask(
    layout: Layout,
    window: Window,
    device: torch.device,
    queries: int | None = None,
    pooled: int = 0,
    strips: Strips | None = None,
) -> BlockMask:
    """The block mask of a window, made once per layout, order and device without an N x N intermediate."""
    queries = layout.tokens if queries is None else queries
    order = None if strips is None else orders(layout, strips, device, queries, pooled)[0]
    visible = mask_mod(layout, window, layout.rows(queries).start, order)
    with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
        return compiled_create_block_mask(visible, None, None, queries, layout.tokens + pooled, device=device)


def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: LocalCall) -> Tensor:
    assert mask is None, "why_not refuses masked calls"
    layout, queries = call.layout, call.shape[2]
    strips, _ = best(layout, call.window, queries, call.pooled)
    blocks = block_mask(layout, call.window, call.device, queries, call.pooled, strips)
    back: Tensor | None = None
    if strips is not None:
        keys, mine, back = orders(layout, strips, call.device, queries, call.pooled)
        query, key, value = query.index_select(2, mine), key.index_select(2, keys), value.index_select(2, keys)
    spoilt: Tensor | None = None
    if call.device.type == "cpu":  # whose FlexAttention makes numbers of scores that are NaN, but not of values
        spoilt = query.isnan().any(-1, keepdim=True)
        value = value.masked_fill(key.isnan().any(-1, keepdim=True), math.nan)
    grouped = key.shape[1] != query.shape[1]
    with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
        out = compiled_flex_attention(query, key, value, block_mask=blocks, scale=call.scale, enable_gqa=grouped)
    if spoilt is not None:
        out = out.masked_fill(spoilt, math.nan)
    return out if back is None else out.index_select(2, back)


def work(call: LocalCall) -> tuple[int, int]:
    """Pairs in the blocks that are gone through, and keys read for them;
    :class:`~difa_compile.ops.kernels.LocalKernel`."""
    _, blocks = best(call.layout, call.window, call.shape[2], call.pooled)
    return blocks * BLOCK * BLOCK, blocks * BLOCK


KERNEL = LocalKernel("FlexAttention", why_not, run, work)
