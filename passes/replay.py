"""Run a graph on real values, node by node where need be, and compare what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from difa_compile.passes.autocast import autocast_kept
from difa_compile.passes.graph import alias_root, is_attention, mutated_argument, tensor_of

SHARING_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative to the largest value; another batch size may choose another matrix kernel. By the coarsest dtype that a
graph computes in: under autocast a result in float32 is no closer than the bfloat16 it was made from."""


class Replay(fx.Interpreter):
    """Runs a graph node by node, keeping the attentions' values.

    Values of nodes in ``given`` are taken instead of computed; those of nodes in ``changed`` go through its function.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        given: Mapping[fx.Node, Any] | None = None,
        changed: Mapping[fx.Node, Callable[[Any], Any]] | None = None,
    ) -> None:
        super().__init__(module)
        self.given = given or {}
        self.changed = changed or {}
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = self.given[n] if n in self.given else super().run_node(n)
        if n in self.changed:
            value = self.changed[n](value)
        if is_attention(n):
            self.values[n] = value
        return value


def fresh(module: fx.GraphModule, values: Sequence[Any]) -> list[Any]:
    """The values, with a copy in place of each that the graph writes to."""
    written = {alias_root(node) for node in module.graph.nodes if mutated_argument(node) is not None}
    placeholders = module.graph.find_nodes(op="placeholder")
    return [
        value.clone() if node in written and isinstance(value, Tensor) else value
        for node, value in zip(placeholders, values, strict=True)
    ]


def computes_the_same(one: fx.GraphModule, other: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether two graphs give the same on real values, up to the rounding of another kernel."""
    with torch.no_grad(), autocast_kept():
        left, right = one(*fresh(one, inputs)), other(*fresh(other, inputs))
    dtype = coarsest(one)
    return all(close(a, b, dtype) for a, b in zip(left, right, strict=True))


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return bool(one == other)
    return one.shape == other.shape and bool(torch.eq(one, other).logical_or(one.isnan() & other.isnan()).all())


def close(one: Any, other: Any, dtype: torch.dtype) -> bool:
    """Whether two values are equal up to rounding in ``dtype`` or in their own, whichever is coarser."""
    if not isinstance(one, Tensor) or not one.is_floating_point():
        return same(one, other)
    if one.dtype != other.dtype:
        return False
    tolerance = max(SHARING_TOLERANCE.get(each, 5e-2) for each in (one.dtype, dtype))
    scale = one.abs().amax().clamp_min(1e-6) if one.numel() else 1.0
    return one.shape == other.shape and bool(((one - other).abs() <= tolerance * scale).all())


def coarsest(module: fx.GraphModule) -> torch.dtype:
    """Of the floating-point dtypes that a graph's operations give, the one with the fewest digits; float64 if none."""
    values = [tensor_of(node) for node in module.graph.nodes if node.op != "placeholder"]
    found = {value.dtype for value in values if value is not None and value.dtype.is_floating_point}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)
