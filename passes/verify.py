"""Let a region prove itself: with its own output as the cache, reuse must give what full attention gives.

The graph is run eagerly on real values, so the comparison is exact (bitwise). Where the batch holds CFG halves, sharing
them on a batch whose halves are equal must give the same as not sharing, up to what another batch size does to
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from difa_compile.decision import FULL, REUSE, Decision, Kind
from difa_compile.passes.graph import alias_root, is_attention, is_parameter, mutated_argument
from difa_compile.passes.pipeline import rewrite
from difa_compile.passes.share_cfg import why_not_shared
from difa_compile.passes.site import Site
from difa_compile.passes.variant import Context
from difa_compile.schedule import FULL_ROLE, Role

SHARING_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative to the largest value; another batch size may choose another matrix kernel."""


def why_not_proved(
    module: fx.GraphModule, sites: Sequence[Site], index: int, inputs: Sequence[Any], context: Context
) -> str | None:
    """The reason why site ``index`` of a graph must be left full, or None. ``inputs``: real values of the graph."""
    roles = [FULL_ROLE] * len(sites)

    def run(role: Role, values: Sequence[Any], caches: dict[str, Tensor]) -> tuple[list[Any], dict[str, Tensor]]:
        row = [*roles[:index], role, *roles[index + 1 :]]
        variant = rewrite(module, sites, row, context)
        results = variant.module(*fresh(module, values), *[caches[name] for name in variant.cache_inputs])
        cut = len(results) - len(variant.cache_outputs)
        return list(results[:cut]), dict(zip(variant.cache_outputs, results[cut:], strict=True))

    try:
        expected, caches = run(Role(FULL, emit_output=True), inputs, {})
        found, _ = run(Role(REUSE), inputs, caches)
        left = rewrite(module, sites, [*roles[:index], Role(REUSE), *roles[index + 1 :]], context).module
    except Exception as error:  # whatever a model's ops raise is the reason, shown to the user
        return f"the rewritten region does not run: {type(error).__name__}: {first_line(error)}"
    if not all(same(a, b) for a, b in zip(expected, found, strict=True)):
        return "reusing the region's own output does not reproduce the full output"
    if sum(map(is_attention, left.graph.nodes)) >= sum(map(is_attention, module.graph.nodes)):
        return "reuse would save nothing: the attention's result is written to in place and then used"
    shared = Role(Decision(Kind.FULL, cfg_shared=True))
    if context.conditional_half is None or why_not_shared(module, sites[index], shared, context) is not None:
        return None
    equal_halves = [
        double_half(value, node.meta.get("batch_dim")) if not is_parameter(node) else value
        for node, value in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True)
    ]
    try:
        expected, _ = run(FULL_ROLE, equal_halves, {})
        found, _ = run(shared, equal_halves, {})
    except Exception as error:  # as above
        return f"the rewritten region does not run: {type(error).__name__}: {first_line(error)}"
    if not all(close(a, b) for a, b in zip(expected, found, strict=True)):
        return "sharing the CFG halves of a batch with equal halves does not reproduce the full output"
    return None


def fresh(module: fx.GraphModule, values: Sequence[Any]) -> list[Any]:
    """The values, with a copy in place of each that the graph writes to."""
    written = {alias_root(node) for node in module.graph.nodes if mutated_argument(node) is not None}
    placeholders = module.graph.find_nodes(op="placeholder")
    return [
        value.clone() if node in written and isinstance(value, Tensor) else value
        for node, value in zip(placeholders, values, strict=True)
    ]


def double_half(value: Any, dim: int | None) -> Any:
    """A value whose first half of the batch stands in both halves."""
    if dim is None or not isinstance(value, Tensor) or value.shape[dim] % 2:
        return value
    half = value.narrow(dim, 0, value.shape[dim] // 2)
    return torch.cat([half, half], dim)


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return bool(one == other)
    return one.shape == other.shape and bool(torch.eq(one, other).logical_or(one.isnan() & other.isnan()).all())


def close(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not one.is_floating_point():
        return same(one, other)
    tolerance = SHARING_TOLERANCE.get(one.dtype, 5e-2)
    scale = one.abs().amax().clamp_min(1e-6) if one.numel() else 1.0
    return one.shape == other.shape and bool(((one - other).abs() <= tolerance * scale).all())


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else ""
