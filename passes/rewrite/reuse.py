"""Reuse and forecast: a region's outputs without the region (AST, arXiv 2406.08552; TaylorSeer, arXiv 2503.06923).

Before: ``y = region(x); out = x0 + gate * y``. After: the region is gone, and ``y`` is one of

1. reuse: ``y = cache.<site>.output.<i>``, the output of the last step that computed one.
2. forecast of order k: ``y = w[0] * cache.<site>.output.<i> + w[1] * cache.<site>.output.<i>.1 + ...``, a sum over the
   last k + 1 computed outputs, in at least float32; ``w = cache.<site>.weights`` are numbers of the run, so that one
   variant serves every distance between steps.

With +cfg two copies of the conditional half of that. Of a block these are what it adds: ``y = stream + that``. The
region is erased, projections included; what fed it (norms, modulation) is left to the compiler, which drops what became
unused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import fx

from difa_compile.ops.reference import extrapolation_dtype
from difa_compile.passes.caches import CacheName
from difa_compile.passes.graph import tensor_of
from difa_compile.passes.rewrite.erase import erase_region
from difa_compile.passes.rewrite.share_cfg import narrow_to_half, twice
from difa_compile.passes.site import Unit
from difa_compile.passes.variant import Target, Variant


def reuse(variant: Variant, target: Target) -> None:
    """Replace a site's outputs by caches and erase its region."""
    path = target.site.path
    _leave_out(variant, target, lambda i, output: variant.read_cache(CacheName.output(path, i), output))


def forecast(variant: Variant, target: Target) -> None:
    """Replace a site's outputs by what its last computed ones lead to, and erase its region."""
    path, order = target.site.path, target.role.decision.order

    def forecast_output(i: int, output: fx.Node) -> fx.Node:
        value = tensor_of(output)
        assert value is not None, "why_not_forecast admits no other outputs"
        wide = extrapolation_dtype(value.dtype)
        weights = variant.read_cache(CacheName.weights(path), output, shape=(order + 1,), dtype=wide)
        past = [variant.read_cache(CacheName.output(path, i, age), output) for age in range(order + 1)]
        last = variant.graph.find_nodes(op="placeholder")[-1]

        def then(target: str | Callable[..., Any], *args: Any) -> fx.Node:
            nonlocal last
            last = variant.call_after(last, target, args)
            return last

        def cast(node: fx.Node, dtype: torch.dtype) -> fx.Node:
            return node if value.dtype == wide else then("to", node, dtype)

        terms = [
            then(torch.mul, cast(each, wide), then(torch.select, weights, 0, age)) for age, each in enumerate(past)
        ]
        return cast(reduce(lambda total, term: then(torch.add, total, term), terms), value.dtype)

    _leave_out(variant, target, forecast_output)


def why_not_forecast(site: Unit) -> str | None:
    """The reason why a site's outputs can't be extrapolated, or None."""
    for output in site.region.outputs:
        value = tensor_of(output)
        if value is None or not value.is_floating_point():
            kind = "no tensor" if value is None else str(value.dtype).removeprefix("torch.")
            return f"{output.name}, which leaves the region, is {kind}: only floating-point numbers are extrapolated"
    return None


def behind(one: fx.Node, other: fx.Node) -> fx.Node:
    """The later of two nodes of a graph."""
    return other if one < other else one


def _leave_out(variant: Variant, target: Target, made: Callable[[int, fx.Node], fx.Node]) -> None:
    """Put what ``made`` gives for each output, by number, in its place, and erase the region."""
    region = target.site.region
    inside = set(region.interior)
    for i, output in enumerate(region.outputs):
        value = made(i, output)
        if target.role.decision.cfg_shared:
            dim = output.meta["batch_dim"]
            half = narrow_to_half(variant, value, value, dim)
            value = twice(variant, half, half, dim)
        if target.streams:
            value = variant.call_after(behind(value, target.streams[i]), torch.add, (target.streams[i], value))
        for user in [user for user in output.users if user not in inside]:
            user.replace_input_with(output, value)
        variant.exchanged(output, value)
    erase_region(region.interior)
