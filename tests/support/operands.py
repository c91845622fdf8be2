"""Queries, keys and values of one attention call."""

import torch


def operands(layout, heads, dim, dtype, batch=2, strides="heads first", seed=0):
    """Query, key, value (B, H, L, D), in memory as (B, H, L, D), (B, L, H, D), or cut out of one fused projection."""
    generator = torch.Generator().manual_seed(seed)
    if strides == "fused":
        fused = torch.randn(batch, layout.tokens, 3, heads, dim, generator=generator).to(dtype)
        return fused.permute(2, 0, 3, 1, 4).unbind(0)
    shape = (batch, heads, layout.tokens, dim) if strides == "heads first" else (batch, layout.tokens, heads, dim)
    made = [(torch.randn(shape, generator=generator) * 1.5).to(dtype) for _ in range(3)]
    return made if strides == "heads first" else [each.transpose(1, 2) for each in made]
