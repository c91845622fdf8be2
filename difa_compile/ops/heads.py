"""Groups of heads as kernels are given them: slices of the head dimension; and ``difa::join_heads``, which puts the
results of such slices into one tensor.

A slice is every ``step``-th head from a first one on: query, key and value are not copied, kernels read them through
their strides. Heads that make no slice take several calls: on a CPU that costs less than copying the heads together, so
it is not worth a kernel with a window per head. Permuting the rows of the
projections' weights would make every group one slice of
neighbours, but weights are inputs of a captured graph (a LoRA may change them from call to call): that is for export,
which owns its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadSlice:
    """Heads ``first``, ``first + step``, ...: ``count`` of them. ``place``: which of the listed heads the first one is;
    the others follow it in the list."""

    first: int
    count: int
    step: int = 1
    place: int = 0

    def keys(self, group: int) -> HeadSlice:
        """The heads of keys and values that these heads of queries see, ``group`` of which share one."""
        if group == 1:
            return self
        return HeadSlice(self.first // group, max(1, self.count // group))


def slices_of(heads: Sequence[int], group: int = 1) -> tuple[HeadSlice, ...]:
    """Rising numbers of heads as few slices, neighbours in the list staying together.

    ``group``: how many query heads share a head of keys and values (grouped-query attention). Where that is more than
    one, a slice is of neighbouring heads, whole groups or part of a single one, so that its keys are a slice too.
    """
    slices: list[HeadSlice] = []
    place = 0
    while place < len(heads):
        first, count, step = heads[place], 1, 1
        if place + 1 < len(heads) and (group == 1 or heads[place + 1] == first + 1):
            step = heads[place + 1] - first
            while place + count < len(heads) and heads[place + count] == first + count * step:
                count += 1
        if group > 1:
            inside = group - first % group  # as far as the keys of the first head serve
            count = min(count, inside) if first % group or count < group else count // group * group
        slices.append(HeadSlice(first, count, step if count > 1 else 1, place))
        place += count
    return tuple(slices)


LIBRARY = torch.library.Library("difa", "FRAGMENT")
LIBRARY.define("join_heads(Tensor[] values, int[] first, int[] step, Tensor[] added, int[] to, int heads) -> Tensor")


def _join_heads(
    values: Sequence[Tensor],
    first: Sequence[int],
    step: Sequence[int],
    added: Sequence[Tensor],
    to: Sequence[int],
    heads: int,
) -> Tensor:
    out = _join_heads_fake(values, first, step, added, to, heads)
    more = dict(zip(to, added, strict=True))
    for i, (value, *place) in enumerate(zip(values, first, step, strict=True)):
        part = _slice(out, value.shape[1], *place)
        if i in more:
            torch.add(value, more[i], out=part)
        else:
            part.copy_(value)
    return out


def _join_heads_fake(
    values: Sequence[Tensor], first: object, step: object, added: object, to: object, heads: int
) -> Tensor:
    batch, _, tokens, channels = values[0].shape
    return values[0].new_empty((batch, tokens, heads, channels)).transpose(1, 2)


def _slice(value: Tensor, count: int, first: int, step: int) -> Tensor:
    return value[:, first : first + (count - 1) * step + 1 : step]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, ctx.first, ctx.step, _, ctx.to, _ = inputs
    ctx.counts = [value.shape[1] for value in values]


def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    parts = [_slice(upstream, *place) for place in zip(ctx.counts, ctx.first, ctx.step, strict=True)]
    return parts, None, None, [parts[i] for i in ctx.to], None, None


LIBRARY.impl("join_heads", _join_heads, "CompositeExplicitAutograd")
torch.library.register_fake("difa::join_heads", _join_heads_fake, lib=LIBRARY)
torch.library.register_autograd("difa::join_heads", _backward, setup_context=_save, lib=LIBRARY)

JOIN_HEADS = torch.ops.difa.join_heads.default
"""``join_heads(values, first, step, added, to, heads)``: one tensor (B, heads, L, E), laid out in memory as (B, L,
heads, E), written once: the ``i``-th of ``values``, (B, H, L, E) of any strides, stands at heads ``first[i]``,
``first[i] + step[i]``, ...; the ``j``-th of ``added`` is added to the value ``to[j]``, whose shape it has. The values
are of one dtype and together are every head once. An op of its own and not ``cat``, which autocast casts, for which
heads that stand in each other's gaps have to be cut up, and before which a sum would be written once more."""
