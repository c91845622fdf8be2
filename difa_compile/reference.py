"""Eager references: the specification of every op and decision, in plain PyTorch.

Kernels, rewritten graphs and engines are tested against these functions; nothing here is meant to be fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from difa_compile.decision import Window, WindowShape
from difa_compile.layout import Layout


def visible(layout: Layout, window: Window, device: torch.device | str = "cpu") -> Tensor:
    """Which keys each query sees: bool (tokens, tokens), True = visible.

    Image tokens see image tokens inside the window (see :class:`~difa_compile.decision.WindowShape` for the three
    forms; arXiv 2406.08552 for the band, arXiv 2412.16112 for the disc). All other tokens see and are seen by
    everything (arrow attention, arXiv 2503.22796).
    """
    count = layout.image_tokens
    flat = torch.arange(count, device=device)
    if window.shape is WindowShape.BAND:
        near = (flat[:, None] - flat[None, :]).abs() <= window.radius
    else:
        near = torch.full((count, count), window.shape is WindowShape.BOX, device=device)
        squared = torch.zeros((count, count), dtype=torch.int64, device=device)
        rest = flat
        for size in reversed(layout.grid):
            place, rest = rest % size, rest // size
            distance = (place[:, None] - place[None, :]).abs()
            squared += distance * distance
            near &= distance <= window.radius
        if window.shape is WindowShape.DISC:
            near = squared < window.radius * window.radius
    mask = torch.ones((layout.tokens, layout.tokens), dtype=torch.bool, device=device)
    image = slice(layout.before, layout.before + count)
    mask[image, image] = near
    return mask


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention. query (B, H, L, D), key and value (B, H, S, D); returns (B, H, L, D).

    ``mask`` broadcasts to (B, H, L, S): bool, True = visible, or a number added to each score. A query that sees no key
    gives 0. ``scale`` defaults to 1 / sqrt(D).
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(-2, -1)) * factor
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill(blind, 0.0) @ value


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    window: Window,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention limited to ``window`` on ``layout``'s grid. Shapes as :func:`attention` with S = layout.tokens.

    Queries are all tokens, or the image's alone (L = layout.image_tokens). A ``mask`` of the model's own hides pairs on
    top of the window.
    """
    near = visible(layout, window, query.device)
    if query.shape[2] != layout.tokens:
        near = near[layout.before : layout.before + layout.image_tokens]
    if mask is None:
        return attention(query, key, value, near, scale)
    both = near & mask if mask.dtype == torch.bool else mask.masked_fill(~near, float("-inf"))
    return attention(query, key, value, both, scale)


def residual(full: Tensor, local: Tensor) -> Tensor:
    """What a full step leaves for later window steps: ``full - local``, per head, before the output projection."""
    return full - local


def share_halves(value: Tensor, conditional_half: int, dim: int = 0) -> Tensor:
    """Copy the conditional half of a classifier-free-guidance batch to the other half (ASC, arXiv 2406.08552)."""
    half = value.chunk(2, dim)[conditional_half]
    return torch.cat([half, half], dim)
