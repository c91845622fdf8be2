"""Local attention as scaled dot product attention under an additive mask: serves everywhere, skips no work."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops.kernels import LocalCall, LocalKernel
from difa_compile.ops.reference import visible_pairs

MAX_TOKENS = 16384
"""Beyond this the mask alone takes more than 1 GiB in float32."""


def why_not(call: LocalCall) -> str | None:
    if call.layout.tokens > MAX_TOKENS:
        size = call.layout.tokens**2 * call.dtype.itemsize / 2**20
        return f"{call.layout.tokens} tokens: the mask would take {size:.0f} MiB"
    return None


@lru_cache(maxsize=8)
def window_mask(
    layout: Layout, window: Window, device: torch.device, dtype: torch.dtype, count: int | None = None, pooled: int = 0
) -> Tensor:
    """The mask (queries, keys) of a window, 0 where visible and -inf elsewhere, kept for the next call.

    Additive in the query's dtype, because the CPU kernel would convert a boolean one at every call.
    """
    rows = layout.rows(layout.tokens if count is None else count)
    queries = torch.arange(rows.start, rows.stop, device=device)
    keys = torch.arange(layout.tokens + pooled, device=device)
    hidden = ~visible_pairs(layout, window, queries[:, None], keys[None, :])
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: LocalCall) -> Tensor:
    bias = window_mask(call.layout, call.window, call.device, call.dtype, call.shape[2], call.pooled)
    if mask is not None:
        bias = bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
        if bias.dtype != call.dtype:  # SDPA takes its own dtype or float32
            bias = bias.float()
    grouped = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=call.scale, enable_gqa=grouped)


def work(call: LocalCall) -> tuple[int, int]:
    keys = call.layout.tokens + call.pooled
    return call.shape[2] * keys, keys


KERNEL = LocalKernel("masked SDPA", why_not, run, work)
