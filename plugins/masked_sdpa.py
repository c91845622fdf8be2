"""Local attention as PyTorch's scaled dot product attention under a boolean mask: serves everywhere, skips no work."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops import LocalCall, LocalKernel
from difa_compile.reference import visible

MAX_TOKENS = 16384
"""Beyond this the mask alone takes more than 256 MiB."""


def why_not(call: LocalCall) -> str | None:
    if call.layout.tokens > MAX_TOKENS:
        return f"{call.layout.tokens} tokens: the mask would take {call.layout.tokens**2 / 2**20:.0f} MiB"
    return None


@lru_cache(maxsize=8)
def mask(layout: Layout, window: Window, device: torch.device) -> Tensor:
    """The boolean mask (tokens, tokens) of a window, kept for the next call."""
    return visible(layout, window, device)


def run(query: Tensor, key: Tensor, value: Tensor, call: LocalCall) -> Tensor:
    allowed = mask(call.layout, call.window, call.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=call.scale)


KERNEL = LocalKernel("masked SDPA", why_not, run)
