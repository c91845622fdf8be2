"""Write the caches that later steps read.

Before: ``return out``. After: ``return out, cache``, the cache being contiguous and one of

1. residual: on a step with full attention, ``cache.<site>.residual = o - difa::local_attention(q, k, v)``; on half a
   batch the conditional half's residual is stored for both.
2. heads: of some heads ``cache.<site>.heads.<heads>``, the attention's output before the projection, and
   ``cache.<site>.heads_residual.<heads>``, what it leaves out in a window (:func:`write_heads`).
3. output: the region's outputs as they leave it (after CFG sharing), so a window step feeds a later reuse; of a block
   what it has added to its streams, ``out - stream``.
"""

from __future__ import annotations

import torch

from difa_compile.passes.caches import CacheName
from difa_compile.passes.rewrite.heads import write_heads
from difa_compile.passes.rewrite.share_cfg import twice
from difa_compile.passes.rewrite.window import insert_local
from difa_compile.passes.variant import Target, Variant


def emit_caches(variant: Variant, target: Target) -> None:
    """Add the cache outputs that a site's role asks for."""
    if target.role.residual_window is not None:
        local = insert_local(variant, target, target.role.residual_window)
        residual = variant.call_after(local, torch.sub, (target.attention, local))
        if target.halved:
            residual = twice(variant, residual, residual, 0)
        variant.write_cache(CacheName.residual(target.site.path), residual)
    for cache in target.role.head_writes:
        write_heads(variant, target, cache)
    if target.role.emit_output:
        for i, output in enumerate(target.outputs):
            if target.streams:
                output = variant.call_after(output, torch.sub, (output, target.streams[i]))
            variant.write_cache(CacheName.output(target.site.path, i), output)
