"""Cut a graph into segments, so that a variant is compiled once per unique (block, decision).

Finds :class:`Split`; the graph itself stays whole.

A segment is a run of consecutive nodes: either all nodes of one repeated block that holds sites (``blocks.3``), or
the nodes between two such blocks. Segments run one after the other on a list of numbered values, so equal blocks that
take equal decisions share one compiled function and differ in the values they are given.

A span of blocks (:mod:`difa_compile.passes.analyse.find_blocks`) is many segments. Behind the last of them stands a
*gate*, a segment made for it: it is given the span's streams as they were before it and after it, and hands on the
latter. What a role makes of a span, it makes of the gate, and where the span is left out its segments are not run.

Values that cross a cut are laid out row by row. A cut that would part a region, or part an in-place write from the
value it writes, is not made. A cut inside an autocast region of the graph is: the segment before it leaves the region
at its end, the one after it enters it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from difa_compile.passes.analyse.find_attention import Sites
from difa_compile.passes.analyse.find_blocks import Blocks
from difa_compile.passes.autocast import EXIT, is_enter, is_exit, open_at
from difa_compile.passes.facts import Facts
from difa_compile.passes.graph import (
    alias_root,
    block_path,
    keep_origin,
    module_path,
    mutated_argument,
    operation,
    tensor_of,
)
from difa_compile.passes.prepare.specialize import check_sizes
from difa_compile.passes.site import Block, Region, Unit
from difa_compile.passes.variant import move_site

UNCUT = "it begins or ends where the graph cannot be cut: in the midst of an attention, or of a value written in place"
"""Why a span has no gate."""


@dataclass(frozen=True)
class Segment:
    """A piece of a graph as a graph of its own.

    ``inputs`` and ``outputs`` are value numbers, in the order of the module's placeholders and results. ``sites`` are
    the attention sites and blocks inside, bound to the module's nodes; ``site_indices`` are their numbers among all
    that a plan can act on.
    ``structure`` is equal for segments that compute the same function of their inputs. ``last_use``: the inputs that no
    later segment reads. ``spanned``: of a gate, the segments (by number, one after the other) of its span; its inputs
    are the streams before the span, then those behind it.
    """

    module: fx.GraphModule
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    sites: tuple[Unit, ...]
    site_indices: tuple[int, ...]
    structure: str
    last_use: tuple[int, ...]
    spanned: tuple[int, ...] = ()


@dataclass(frozen=True)
class Split:
    """A graph cut into segments. Values are numbered: the placeholders first, in order, then segment outputs.

    ``module``: the whole. ``results`` gives the graph's outputs as value numbers, or None where the graph returns None.
    ``spans``: those of the whole that have a gate: that begin and end where segments do.
    """

    module: fx.GraphModule
    segments: tuple[Segment, ...]
    values: int
    results: tuple[int | None, ...]
    spans: tuple[Block, ...] = ()


def cut_segments(module: fx.GraphModule, facts: Facts) -> Split:
    """Cut the graph around its blocks. Raises :class:`UnsupportedModelError` if a value of open size would cross."""
    split = split_at_blocks(module, (*facts[Sites].rewritable, *facts[Blocks].found), facts[Blocks].spans)
    for segment in split.segments:
        check_sizes(segment.module.graph.find_nodes(op="placeholder"))
    return split


def split_at_blocks(module: fx.GraphModule, sites: Sequence[Unit], spans: Sequence[Block] = ()) -> Split:
    """Cut ``module`` around the repeated blocks that hold ``sites``, with a gate behind each of ``spans``."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    body = [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]
    place = {node: i for i, node in enumerate(body)}
    starts = cut_points(body, place, sites)
    number = {node: i for i, node in enumerate(placeholders)}
    output = next(node for node in module.graph.nodes if node.op == "output")
    returned = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    pieces = [body[start:end] for start, end in zip(starts, [*starts[1:], len(body)], strict=True)]
    ends = {piece[-1] for piece in pieces}, {piece[0] for piece in pieces}
    cut = tuple(s for s in spans if s.region.interior[-1] in ends[0] and s.region.interior[0] in ends[1])
    segments: list[Segment] = []
    begun: dict[fx.Node, int] = {}
    for piece in pieces:
        begun[piece[0]] = len(segments)
        segments.append(build_segment(module, piece, sites, number, set(returned)))
        for i, span in enumerate(cut, start=len(sites)):
            if piece[-1] is span.region.interior[-1]:
                spanned = tuple(range(begun[span.region.interior[0]], len(segments)))
                segments.append(build_gate(module, span, i, number, spanned))
    last_read = {value: i for i, segment in enumerate(segments) for value in segment.inputs}
    kept = {number[node] for node in returned if isinstance(node, fx.Node)} | set(range(len(placeholders)))
    finished = tuple(
        replace(segment, last_use=tuple(v for v in segment.inputs if last_read[v] == i and v not in kept))
        for i, segment in enumerate(segments)
    )
    results = tuple(number[node] if isinstance(node, fx.Node) else None for node in returned)
    return Split(module, finished, 1 + max(number.values(), default=-1), results, cut)


def cut_points(body: list[fx.Node], place: dict[fx.Node, int], sites: Sequence[Unit]) -> list[int]:
    """Where segments start: ascending positions in ``body``, the first of them 0."""
    starts = {0}
    for site in sites:
        block = block_path(site.path)
        first = last = place[site.region.attention]
        if isinstance(site, Block):
            starts |= {place[site.region.interior[0]], place[site.region.interior[-1]] + 1}
        elif block:
            while first > 0 and block_path(module_path(body[first - 1])) == block:
                first -= 1
            while last + 1 < len(body) and block_path(module_path(body[last + 1])) == block:
                last += 1
            starts |= {first, last + 1}
    forbidden = [(place[site.region.interior[0]], place[site.region.interior[-1]]) for site in sites]
    forbidden += [
        (place[alias_root(node)], place[node])
        for node in body
        if mutated_argument(node) is not None and alias_root(node) in place
    ]
    for node in body:
        users = [place[user] for user in node.users if user in place]
        # A tuple (split, chunk) stays with what takes it apart.
        if users and tensor_of(node) is None and not is_enter(node):
            forbidden.append((place[node], max(users)))
    return sorted(
        start for start in starts if start < len(body) and not any(first < start <= last for first, last in forbidden)
    )


def build_gate(
    module: fx.GraphModule, span: Block, index: int, number: dict[fx.Node, int], spanned: tuple[int, ...]
) -> Segment:
    """The gate behind a span, unit ``index``; later segments read what it hands on."""
    graph = fx.Graph()
    region = span.region
    inputs = (*region.streams, *region.outputs)
    mapping: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(inputs):
        placeholder = graph.placeholder(f"value_{i}")
        value = tensor_of(node)
        assert value is not None, "streams are tensors"
        placeholder.meta = {**node.meta, "example_value": value.contiguous()}
        placeholder._dynamo_source = getattr(node, "_dynamo_source", None)
        mapping[node] = placeholder
    handed = []
    for node in region.outputs:
        passed = graph.call_method("contiguous", (mapping[node],))
        passed.meta = dict(mapping[node].meta)
        handed.append(passed)
    graph.output(tuple(handed))
    built = fx.GraphModule(module, graph)
    keep_origin(built, module)
    streams = tuple(mapping[node] for node in region.streams)
    own = tuple(mapping[node] for node in region.outputs)
    gate = replace(span, region=Region(handed[0], tuple(handed), (*streams, *own), tuple(handed), streams))
    numbers = tuple(number[node] for node in inputs)
    for node in region.outputs:
        number[node] = 1 + max(number.values())
    outputs = tuple(number[node] for node in region.outputs)
    return Segment(built, numbers, outputs, (gate,), (index,), structure_of(built, (gate,)), (), spanned)


def build_segment(
    module: fx.GraphModule,
    piece: list[fx.Node],
    sites: Sequence[Unit],
    number: dict[fx.Node, int],
    returned: set[object],
) -> Segment:
    """Copy one piece into a graph of its own and number its outputs."""
    inside = set(piece)
    inputs = list(
        dict.fromkeys(
            source for node in piece for source in node.all_input_nodes if source not in inside and not is_enter(source)
        )
    )
    outputs = [
        node
        for node in piece
        if not is_enter(node) and (node in returned or any(user not in inside for user in node.users))
    ]
    outputs = [
        node for node in outputs if node in returned or any(u.op != "output" and u not in inside for u in node.users)
    ]
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(inputs):
        fresh = graph.placeholder(f"value_{i}")
        fresh.meta = dict(node.meta)
        value = tensor_of(node)
        if value is not None and node.op != "placeholder" and value.layout is torch.strided:
            fresh.meta["example_value"] = value.contiguous()
        fresh._dynamo_source = getattr(node, "_dynamo_source", None)
        mapping[node] = fresh
    regions = list(open_at(piece[0]))
    for node in regions:
        mapping[node] = graph.node_copy(node)
    for node in piece:
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
        if is_enter(node):
            regions.append(node)
        elif is_exit(node):
            regions.remove(node.args[0])  # type: ignore[arg-type]
    for node in reversed(regions):
        graph.call_function(EXIT, (mapping[node],)).meta = dict(node.meta)
    graph.output(tuple(contiguous(graph, mapping[node]) for node in outputs))
    built = fx.GraphModule(module, graph)
    keep_origin(built, module)
    for node in outputs:
        number[node] = 1 + max(number.values(), default=-1)
    here = [(i, site) for i, site in enumerate(sites) if site.region.attention in inside]
    moved = tuple(move_site(site, mapping) for _, site in here)
    return Segment(
        module=built,
        inputs=tuple(number[node] for node in inputs),
        outputs=tuple(number[node] for node in outputs),
        sites=moved,
        site_indices=tuple(i for i, _ in here),
        structure=structure_of(built, moved),
        last_use=(),
    )


def contiguous(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``node`` laid out row by row, so that the first block is not unlike all others for its input's strides alone."""
    value = tensor_of(node)
    if value is None or value.layout is not torch.strided or value.is_contiguous():
        return node
    fresh = graph.call_method("contiguous", (node,))
    fresh.meta = {**node.meta, "example_value": value.contiguous()}
    return fresh


def structure_of(module: fx.GraphModule, sites: Sequence[Unit] = ()) -> str:
    """A digest of what a graph computes and of its sites: ops, arguments and input shapes, without names or paths.

    Graphs with attributes of their own (constants) are only equal to themselves.
    """
    names: dict[fx.Node, str] = {}
    lines = []
    for i, node in enumerate(module.graph.nodes):
        names[node] = f"%{i}"
        value = tensor_of(node)
        args = fx.map_arg((node.args, node.kwargs), lambda n: fx.immutable_collections.immutable_list([names[n]]))
        text = f"{operation(node, module)} {args}"
        text += f" batch {node.meta.get('batch_dim')}"
        if value is not None:
            strides = tuple(value.stride()) if value.layout is torch.strided else ()
            text += f" {tuple(value.shape)} {strides} {value.dtype} {value.device} {value.requires_grad}"
        lines.append(text)
    for site in sites:
        nodes = (site.region.attention, *site.region.interior, *site.region.outputs)
        if isinstance(site, Block):
            nodes = (*site.region.interior, *site.region.outputs, *site.region.streams)
            lines.append(f"block {[names[node] for node in nodes]}")
            continue
        lines.append(f"site {site.kind} {site.mask} {site.layout} {[names[node] for node in nodes]}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
