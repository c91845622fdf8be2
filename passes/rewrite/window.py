"""Window attention, with or without the cached residual (WA and WA-RS, arXiv 2406.08552; disc: arXiv 2412.16112).

Before: ``o = sdpa(q, k, v)``. After: one of

1. window: ``o = difa::local_attention(q, k, v)``.
2. window + residual: ``o = difa::local_attention(q, k, v) + cache.<site>.residual``; on half a batch, plus the same
   half of the residual. Each half has its own residual.

Everything around the attention (projections, norms, rotary embedding) stays as it is. A mask of the model's own goes
with it and hides pairs on top of the window.
"""

from __future__ import annotations

import torch
from torch import fx

from difa_compile.decision import Window
from difa_compile.ops.local_attention import LOCAL_ATTENTION
from difa_compile.passes.analyse.find_attention import attention_inputs
from difa_compile.passes.caches import CacheName
from difa_compile.passes.graph import argument
from difa_compile.passes.rewrite.share_cfg import narrow_to_half
from difa_compile.passes.site import Site
from difa_compile.passes.variant import Target, Variant


def window(variant: Variant, target: Target) -> None:
    """Replace a site's attention by its local form, plus the residual if the role reads one."""
    decision = target.role.decision
    assert decision.window is not None, "only windows concern this pass"
    full = target.attention
    value = local = insert_local(variant, target, decision.window)
    if target.role.reads_residual:
        whole = target.site.region.attention
        residual = variant.read_cache(CacheName.residual(target.site.path), unhalved(target, whole))
        if target.halved:
            residual = narrow_to_half(variant, local, residual, 0)
        value = variant.call_after(residual if target.halved else local, torch.add, (local, residual))
    full.replace_all_uses_with(value)
    variant.graph.erase_node(full)
    target.attention = value


def insert_local(variant: Variant, target: Target, neighbourhood: Window) -> fx.Node:
    """Insert the local form of a site's attention behind it."""
    site = target.site
    assert isinstance(site, Site), "a block has no window"
    layout = site.layout
    assert layout is not None, "why_not_window admits no site without a layout"
    query, key, value = attention_inputs(target.attention)
    where = (list(layout.grid), layout.before, layout.after, str(neighbourhood.shape), neighbourhood.radius)
    mask = argument(target.attention, 3, "attn_mask")
    return variant.call_after(target.attention, LOCAL_ATTENTION, (query, key, value, *where, site.scale, mask))


def unhalved(target: Target, node: fx.Node) -> fx.Node:
    """A node that has the attention output's shape on the whole batch, for the residual's placeholder."""
    if not target.halved:
        return node
    probe = fx.Node(node.graph, "probe", "placeholder", "probe", (), {})
    value = node.meta["example_value"]
    with value.fake_mode:
        probe.meta["example_value"] = value.new_empty((value.shape[0] * 2, *value.shape[1:]))
    return probe


def why_not_window(site: Site) -> str | None:
    """The reason why a site's attention can't be windowed, or None."""
    if site.mask == "causal":
        return "the attention is causal"
    if site.layout is None:
        return f"no token layout: {site.layout_reason}"
    if site.mask == "function":
        return "the attention is FlexAttention with a score or mask function of its own"
    return None
