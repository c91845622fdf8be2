"""Heads in groups: each full, windowed, or reused by itself (DiTFastAttnV2, arXiv 2503.22796).

Before: ``o = sdpa(q, k, v)``. After: ``o = difa::join_heads([a, b, c, ...])``, one value for each slice of heads
(:mod:`difa_compile.ops.heads`), whose operands are slices of q, k and v:

1. full: ``a = sdpa(q[:, heads], k[:, heads], v[:, heads])``.
2. window: ``b = difa::local_attention(q[:, heads], k[:, heads], v[:, heads])``.
3. window + residual: the same, to which ``difa::join_heads`` adds ``cache.<site>.heads_residual.<heads>``.
4. reuse: ``c = cache.<site>.heads.<heads>``, what the attention gave for these heads in an earlier step.
5. on half a batch: q, k and v are of the half, and so is what is taken of the caches.

What goes before the attention (projections, norms, rotary embedding) and after it stays as it is, for reused heads too:
the rows of their projections are part of weights that are inputs of the graph. A mask of the model's own goes with it
and hides pairs on top of the windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from difa_compile.decision import Decision, Window, heads_text
from difa_compile.ops.heads import JOIN_HEADS, HeadSlice, slices_of
from difa_compile.ops.local_attention import LOCAL_ATTENTION
from difa_compile.passes.analyse.find_attention import attention_inputs
from difa_compile.passes.caches import CacheName
from difa_compile.passes.graph import argument, is_flex, shape_of
from difa_compile.passes.rewrite.share_cfg import narrow_to_half, twice
from difa_compile.passes.rewrite.window import why_not_window
from difa_compile.passes.site import Site
from difa_compile.passes.variant import Operands, Target, Variant
from difa_compile.plan.schedule import HeadCache


def heads(variant: Variant, target: Target) -> None:
    """Replace a site's attention by that of its groups of heads."""
    full = target.attention
    parts = Parts(variant, target, full)
    for group in target.role.decision.groups:
        window = group.form.window
        caches = [cache for cache in target.role.head_reads if cache.window == window]
        if not group.form.reads_caches:
            for cut in parts.cuts(group.heads):
                parts.add(cut, parts.attended(cut, window))
            continue
        for cache in caches:
            kept = parts.cached(cache)
            for cut in slices_of(cache.heads) if window is None else parts.cuts(cache.heads):
                whole = cut.count == len(cache.heads)
                of_cut = kept if whole else parts.then(torch.narrow, (kept, 1, cut.place, cut.count))
                if window is None:
                    parts.add(cut, of_cut)
                else:
                    parts.add(cut, parts.attended(cut, window), of_cut)
    value = parts.joined(shape_of(full)[1])
    full.replace_all_uses_with(value)
    target.operands = parts.operands
    variant.graph.erase_node(full)
    target.attention = value


def write_heads(variant: Variant, target: Target, cache: HeadCache) -> None:
    """Return what ``cache`` holds of a site's attention: (batch, tokens, heads, channels), contiguous.

    A copy always: the attention's own value may be written to behind it.
    """
    attention = target.attention
    parts = Parts(variant, target, attention)
    cuts = slices_of(cache.heads) if cache.window is None else parts.cuts(cache.heads)
    for cut in cuts:
        value = parts.sliced(attention, cut)
        if cache.window is not None:
            value = parts.then(torch.sub, (value, parts.attended(cut, cache.window)))
        parts.add(HeadSlice(cut.place, cut.count), value)
    if cache.window is None or len(cuts) > 1:
        value = parts.joined(len(cache.heads))
    value = parts.then(torch.transpose, (value, 1, 2))
    if target.halved:
        value = twice(variant, value, value, 0)
    variant.write_cache(CacheName.heads(target.site.path, cache.heads, residual=cache.window is not None), value)


@dataclass
class Part:
    """What is computed of a slice of heads, and what is added to it."""

    cut: HeadSlice
    value: fx.Node
    added: fx.Node | None


class Parts:
    """The parts of an attention while they are inserted, one node after the other, behind ``attention``."""

    def __init__(self, variant: Variant, target: Target, attention: fx.Node) -> None:
        self._variant = variant
        self._target = target
        self._attention = attention
        self._place = attention
        self._parts: list[Part] = []

    @property
    def operands(self) -> Operands:
        """Query, key, value and mask of the attention."""
        own = self._attention
        return self._target.operands or (*attention_inputs(own), argument(own, 3, "attn_mask"))

    def then(
        self, operation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """Insert a call behind the one before."""
        self._place = self._variant.call_after(self._place, operation, args, kwargs)
        return self._place

    def cuts(self, heads: tuple[int, ...]) -> tuple[HeadSlice, ...]:
        """Heads as slices, of which queries, keys and values are views."""
        return slices_of(heads, self._sharing)

    @property
    def _sharing(self) -> int:
        """How many heads of queries share one of keys and values."""
        return shape_of(self.operands[0])[1] // shape_of(self.operands[1])[1]

    def sliced(self, value: fx.Node, cut: HeadSlice, dim: int = 1) -> fx.Node:
        """The heads of a slice of a tensor, a view."""
        if cut.step == 1:
            return self.then(torch.narrow, (value, dim, cut.first, cut.count))
        last = cut.first + (cut.count - 1) * cut.step
        return self.then(torch.ops.aten.slice.Tensor, (value, dim, cut.first, last + 1, cut.step))

    def attended(self, cut: HeadSlice, window: Window | None) -> fx.Node:
        """The attention of a slice of heads, to all keys or within a window."""
        query, key, value, mask = self.operands
        query = self.sliced(query, cut)
        key, value = (self.sliced(one, cut.keys(self._sharing)) for one in (key, value))
        if mask is not None and len(shape_of(mask)) >= 3 and shape_of(mask)[-3] > 1:
            mask = self.sliced(mask, cut, len(shape_of(mask)) - 3)
        if window is not None:
            site = self._target.site
            assert isinstance(site, Site), "a block has no heads"
            layout = site.layout
            assert layout is not None, "why_not_heads admits no windows without a layout"
            where = (list(layout.grid), layout.before, layout.after, str(window.shape), window.radius)
            return self.then(LOCAL_ATTENTION, (query, key, value, *where, site.scale, mask))
        names = ((4, "dropout_p"), (5, "is_causal"), (6, "scale"), (7, "enable_gqa"))
        given = {name: argument(self._attention, at, name) for at, name in names}
        options = {name: value for name, value in {"attn_mask": mask, **given}.items() if value is not None}
        assert callable(self._attention.target)
        return self.then(self._attention.target, (query, key, value), options)

    def cached(self, cache: HeadCache) -> fx.Node:
        """What an earlier step has left of some heads: (batch, heads, tokens, channels), of this batch or half."""
        name = CacheName.heads(self._target.site.path, cache.heads, residual=cache.window is not None)
        whole = self._target.site.region.attention
        batch, _, tokens, channels = shape_of(whole)
        shape = (batch * (2 if self._target.halved else 1), tokens, len(cache.heads), channels)
        kept = self._variant.read_cache(name, whole, shape=shape)
        if self._target.halved:
            kept = narrow_to_half(self._variant, self._place, kept, 0)
            self._place = kept
        return self.then(torch.transpose, (kept, 1, 2))

    def add(self, cut: HeadSlice, value: fx.Node, added: fx.Node | None = None) -> None:
        """The heads of ``cut`` are ``value``, plus ``added``."""
        self._parts.append(Part(cut, value, added))

    def joined(self, count: int) -> fx.Node:
        """All parts as one tensor of so many heads."""
        parts = sorted(self._parts, key=lambda part: part.cut.first)
        where = [part.cut.first for part in parts], [part.cut.step for part in parts]
        added = {i: part.added for i, part in enumerate(parts) if part.added is not None}
        values = [part.value for part in parts]
        return self.then(JOIN_HEADS, (values, *where, list(added.values()), list(added), count))


def why_not_heads(site: Site, decision: Decision) -> str | None:
    """The reason why the groups of heads of ``decision`` can't be carried out at a site, or None."""
    named, there = len(decision.forms), site.query_shape[1]
    if named != there:
        return f"{heads_text(range(named))} are named of {there} heads; name every head of the attention once"
    if is_flex(site.region.attention):
        return "the attention is FlexAttention with a score or mask function of its own"
    return why_not_window(site) if decision.windows else None
