"""What a rewriting pass works on: a copy of a graph, its sites with their roles, the caches it reads and writes.

A variant is a pure function: inputs and caches in, outputs and caches out. A rewriting pass is a function
``(variant, target) -> None``, called for each site whose role concerns it; :mod:`difa_compile.passes.order` says which
come in what order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from difa_compile.passes.autocast import autocast_of
from difa_compile.passes.caches import CacheName
from difa_compile.passes.graph import copy_module, tensor_of
from difa_compile.passes.site import Block, Region, Site, Unit
from difa_compile.plan.schedule import Role


@dataclass(frozen=True)
class Context:
    """What passes may know beside the graph: how the halves of classifier-free guidance come.

    ``conditional_half``: which half of the batch is conditional, 0 or 1; None where the batch holds no halves, or it is
    not known. ``two_call``: the halves are two calls of a step, so that sharing them is reuse within the step.
    """

    conditional_half: int | None = None
    two_call: bool = False


Operands = tuple[fx.Node, fx.Node, fx.Node, fx.Node | None]
"""Query, key, value and mask of an attention."""


@dataclass
class Target:
    """A site in a variant while it is rewritten: the nodes that stand for its attention, outputs and streams now.

    ``operands``: of its attention, where that is no longer one call that has them.
    """

    site: Unit
    role: Role
    attention: fx.Node
    outputs: list[fx.Node]
    streams: list[fx.Node]
    halved: bool = False
    operands: Operands | None = None


@dataclass
class Variant:
    """A graph being rewritten. ``cache_inputs`` and ``cache_outputs`` are in placeholder and output order.

    ``latest``: the node that was inserted or computed anew last, which an error of a pass names.
    """

    module: fx.GraphModule
    targets: list[Target]
    context: Context = Context()
    cache_inputs: dict[CacheName, fx.Node] = field(default_factory=dict)
    cache_outputs: dict[CacheName, fx.Node] = field(default_factory=dict)
    latest: fx.Node | None = None

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def read_cache(
        self,
        name: CacheName,
        like: fx.Node,
        *,
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> fx.Node:
        """A placeholder for cache ``name``, contiguous and like ``like``, where no other shape or dtype is given."""
        if name not in self.cache_inputs:
            last = [node for node in self.graph.nodes if node.op == "placeholder"]
            first_op = next(node for node in self.graph.nodes if node.op != "placeholder")
            with self.graph.inserting_after(last[-1]) if last else self.graph.inserting_before(first_op):
                node = self.graph.placeholder(f"cache_{len(self.cache_inputs)}")
            value = tensor_of(like)
            assert value is not None
            with value.fake_mode if hasattr(value, "fake_mode") else torch.no_grad():
                sizes = value.shape if shape is None else shape
                node.meta["example_value"] = torch.empty(sizes, dtype=dtype or value.dtype, device=value.device)
            node._dynamo_source = None
            node.meta["difa_cache"] = name
            self.cache_inputs[name] = node
        return self.cache_inputs[name]

    def write_cache(self, name: CacheName, value: fx.Node) -> None:
        """Return ``value`` as cache ``name``, contiguous."""
        self.cache_outputs[name] = self.call_after(value, "contiguous", (value,))

    def call_after(
        self,
        place: fx.Node,
        target: str | Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
    ) -> fx.Node:
        """Insert a call behind ``place`` with its fake value; a string names a method."""
        with self.graph.inserting_after(place):
            if isinstance(target, str):
                node = self.graph.call_method(target, args, kwargs or {})
            else:
                node = self.graph.call_function(target, args, kwargs or {})
        for key in ("nn_module_stack", "stack_trace"):
            if key in place.meta:
                node.meta[key] = place.meta[key]
        self.refresh(node)
        return node

    def exchanged(self, old: fx.Node, new: fx.Node) -> None:
        """``new`` stands in the place of ``old``, a site's output, which may be a block's output or stream as well."""
        for target in self.targets:
            for nodes in (target.outputs, target.streams):
                nodes[:] = [new if node is old else node for node in nodes]

    def refresh(self, node: fx.Node) -> None:
        """:func:`refresh` a node of this graph."""
        self.latest = node
        refresh(node)

    def finish(self) -> fx.GraphModule:
        """Append the written caches to the outputs and check the graph."""
        output = next(node for node in self.graph.nodes if node.op == "output")
        values = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
        output.args = ((*values, *self.cache_outputs.values()),)
        self.graph.lint()
        self.module.recompile()
        return self.module


@dataclass(frozen=True)
class Rewritten:
    """A finished variant: its graph takes the original inputs, then ``cache_inputs``; it returns the original outputs,
    then ``cache_outputs`` (names, in order). ``sites``: those of the copied graph, as they were before the passes."""

    module: fx.GraphModule
    cache_inputs: tuple[CacheName, ...]
    cache_outputs: tuple[CacheName, ...]
    sites: tuple[Unit, ...]


@dataclass(frozen=True)
class Rewrite:
    """A rewriting pass as it stands in the order: what it does to a site, and the roles that it concerns.

    ``limited``: whether a limit on rewrites (:mod:`difa_compile.passes.limit`) may leave it out.
    """

    apply: Callable[[Variant, Target], None]
    concerns: Callable[[Role], bool]
    limited: bool = True

    @property
    def name(self) -> str:
        return self.apply.__name__


def start_variant(
    module: fx.GraphModule, sites: Sequence[Unit], roles: Sequence[Role], context: Context = Context()
) -> Variant:
    """Copy a graph and bind each site, in order, to its role."""
    fresh, mapping = copy_module(module)
    targets = []
    for site, role in zip(sites, roles, strict=True):
        moved = move_site(site, mapping)
        region = moved.region
        targets.append(Target(moved, role, region.attention, list(region.outputs), list(region.streams)))
    return Variant(fresh, targets, context)


U = TypeVar("U", bound=Site | Block)


def move_site(site: U, mapping: dict[fx.Node, fx.Node]) -> U:
    """The same site in a copied graph."""
    region = site.region
    moved = Region(
        mapping[region.attention],
        *(
            tuple(mapping[node] for node in nodes)
            for nodes in (region.interior, region.inputs, region.outputs, region.streams)
        ),
    )
    return replace(site, region=moved)


def refresh(node: fx.Node) -> None:
    """Recompute a node's fake value from its arguments' fake values, cast as autocast casts where the node stands.

    Raises what the op raises on a wrong shape.
    """

    def value_of(argument: fx.Node) -> object:
        return argument.meta.get("example_value", argument.meta.get("val"))

    args: Any = fx.map_arg(node.args, value_of)  # type: ignore[arg-type]
    kwargs: Any = fx.map_arg(node.kwargs, value_of)  # type: ignore[arg-type]
    fake_mode = next((v.fake_mode for v in _tensors((args, kwargs)) if hasattr(v, "fake_mode")), None)
    with torch.no_grad(), autocast_of(node), fake_mode if fake_mode is not None else torch.no_grad():
        if node.op == "call_method":
            value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        elif node.target is operator.setitem:
            args[0].clone()[args[1]] = args[2]
            value = None
        else:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
    node.meta["example_value"] = value


def _tensors(value: object) -> list[Any]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return []
