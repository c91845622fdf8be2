"""Reuse: take a region's outputs from an earlier step (AST, arXiv 2406.08552).

Before: ``y = region(x); out = x0 + gate * y``. After: ``y = cache.<site>.output.<i>``; the region is gone.

1. Every output is replaced by a cache input; with +cfg by two copies of the cache's conditional half.
2. The region is erased, projections included. What fed it (norms, modulation) is left to the compiler, which drops
   what became unused.
"""

from __future__ import annotations

from difa_compile.passes.caches import CacheName
from difa_compile.passes.rewrite.erase import erase_region
from difa_compile.passes.rewrite.share_cfg import narrow_to_half, twice
from difa_compile.passes.variant import Target, Variant


def reuse(variant: Variant, target: Target) -> None:
    """Replace a site's outputs by caches and erase its region."""
    region = target.site.region
    inside = set(region.interior)
    for i, output in enumerate(region.outputs):
        cached = variant.read_cache(CacheName.output(target.site.path, i), output)
        value = cached
        if target.role.decision.cfg_shared:
            dim = output.meta["batch_dim"]
            half = narrow_to_half(variant, cached, cached, dim)
            value = twice(variant, half, half, dim)
        for user in [user for user in output.users if user not in inside]:
            user.replace_input_with(output, value)
        target.outputs[i] = value
    erase_region(region.interior)
