"""Find the blocks of a graph that hold attention sites, and the streams that each adds to.

Finds :class:`Blocks`.

A block is the run of consecutive nodes with attention that one repeated module (``blocks.3``) has made, and what no
module has made in between. What it has to do with the rest of the graph must be this and no more: it reads values, and
each value that it hands on is a *stream*, the sum of a value that came in and of what the block adds to it (one stream,
or two where image and text go side by side).

1. *Outputs*: the block's values that are used outside of it.
2. *Streams*: from each output back through sums, and through what only moves, cuts, joins and converts values, to a
   value from outside that has its shape; of several one that comes from the noisy sample, of these one that is all
   there in the output (joined values are cut apart again), of these the one that was computed last.
3. *Interior*: all its nodes. What leads to no output is dead, and goes with the rest.

A *span* is a run of blocks, with what lies between them, of which the same holds; its inner streams are nobody's
business. The longest there is is found, over all blocks or over those of one list, if no other blocks lie between them.

What can be left out is then the difference between output and stream. A block that does more (a value handed on that is
no such sum, a write into memory from outside, a module that attends several times) is refused with the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from difa_compile.passes.analyse.find_attention import Sites
from difa_compile.passes.analyse.sample import Sample
from difa_compile.passes.autocast import is_enter, is_exit
from difa_compile.passes.facts import Facts
from difa_compile.passes.graph import (
    REARRANGING,
    alias_root,
    block_path,
    influenced_by,
    is_attention,
    is_linear,
    is_parameter,
    module_path,
    mutated_argument,
    op_name,
    shape_of,
    tensor_of,
)
from difa_compile.passes.site import Block, Region

_SUMS = {"add", "iadd", "add_"}
_JOINS = {"cat", "concat", "concatenate"}
_PASSED = REARRANGING | {"dropout", "type_promote", "to_copy"}


@dataclass(frozen=True)
class Blocks:
    """The blocks of a graph in execution order, its spans, and the reasons why others (by path) are none."""

    found: tuple[Block, ...]
    spans: tuple[Block, ...]
    refused: tuple[tuple[str, str], ...]


def find_blocks(module: fx.GraphModule, facts: Facts) -> Blocks:
    """Find the blocks around the sites of a graph."""
    sites = facts[Sites].rewritable
    body = [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]
    runs = block_runs(body)
    from_sample = influenced_by(facts[Sample].latents)
    found, refused, ran = [], [], {}
    for path in dict.fromkeys(block_path(site.path) for site in sites):
        if not path:
            continue
        attending = [run for run in runs.get(path, []) if any(is_attention(node) for node in run)]
        if len(attending) != 1:
            refused.append((path, f"it attends in {len(attending)} parts, with other work between"))
            continue
        ran[path] = attending[0]
        described = describe(path, attending[0], from_sample)
        if isinstance(described, Block):
            found.append(described)
        else:
            refused.append((path, described))
    spans, without = find_spans(body, ran, from_sample)
    return Blocks(tuple(found), spans, (*refused, *without))


def find_spans(
    body: list[fx.Node], runs: dict[str, list[fx.Node]], from_sample: set[fx.Node]
) -> tuple[tuple[Block, ...], tuple[tuple[str, str], ...]]:
    """The span of all blocks (given by path with their nodes), or else of those of each list of blocks; why not."""
    place = {node: i for i, node in enumerate(body)}
    lists: dict[str, list[str]] = {}
    for path in runs:
        lists.setdefault(path.rpartition(".")[0], []).append(path)
    refused = []
    for groups in ([list(runs)], list(lists.values())):
        spans = []
        for paths in groups:
            if len(paths) < 2:
                continue
            name = f"{paths[0]}..{paths[-1]}"
            first, last = place[runs[paths[0]][0]], place[runs[paths[-1]][-1]]
            between = [path for path, run in runs.items() if path not in paths and first < place[run[0]] < last]
            described = describe(name, body[first : last + 1], from_sample, tuple(paths))
            if between:
                refused.append((name, f"other blocks lie between its own: {', '.join(between[:3])}"))
            elif isinstance(described, Block):
                spans.append(described)
            else:
                refused.append((name, described))
        if spans:
            return tuple(spans), ()
    return (), tuple(dict.fromkeys(refused))


def block_runs(body: list[fx.Node]) -> dict[str, list[list[fx.Node]]]:
    """By block the runs of consecutive nodes that it has made; nodes of no module, such as those that open or close an
    autocast, are no break."""
    runs: dict[str, list[list[fx.Node]]] = {}
    last = ""
    between: list[fx.Node] = []
    for node in body:
        path = block_path(module_path(node))
        if is_enter(node) or is_exit(node) or not module_path(node):
            between.append(node)
            continue
        if path and path == last:
            runs[path][-1] += [*between, node]
        elif path:
            runs.setdefault(path, []).append([node])
        last, between = path, []
    return runs


def describe(path: str, run: list[fx.Node], from_sample: set[fx.Node], blocks: tuple[str, ...] = ()) -> Block | str:
    """The block (or span of ``blocks``) that consists of a run of nodes, or the reason why it is none."""
    nodes = [node for node in run if not (is_enter(node) or is_exit(node))]
    inside = set(nodes)
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    for node in nodes:
        written = mutated_argument(node)
        if written is not None and alias_root(written) not in inside:
            return f"it writes in place into {alias_root(written).name}, which comes from outside"
    streams = []
    for output in outputs:
        stream = stream_of(output, inside, from_sample)
        if isinstance(stream, str):
            return stream
        streams.append(stream)
    if len(set(streams)) < len(streams):
        return "two of the values that it hands on are sums with the same value from outside"
    attention = next(node for node in nodes if is_attention(node))
    inputs = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    region = Region(attention, tuple(nodes), tuple(inputs), tuple(outputs), tuple(streams))
    return Block(path, region, sum(map(operations, nodes)) // max(1, shape_of(outputs[0])[0]), blocks)


def stream_of(output: fx.Node, inside: set[fx.Node], from_sample: set[fx.Node]) -> fx.Node | str:
    """The value from outside that a block adds to on the way to ``output``, or the reason why there is none."""
    value = tensor_of(output)
    if value is None or not value.is_floating_point():
        return f"{output.name}, which is used outside of it, is no tensor of floating-point numbers"
    if value.ndim < 2:
        return f"{output.name}, which is used outside of it, has shape {shape_of(output)}: no stream of tokens"
    seen, todo = {output}, [output]
    found: dict[fx.Node, None] = {}
    while todo:
        node = todo.pop()
        if node not in inside:
            there = tensor_of(node)
            if not is_parameter(node) and there is not None and there.is_floating_point():
                found[node] = None
            continue
        name = op_name(node)
        if name in _SUMS or name in _JOINS or name in _PASSED:
            sources = node.all_input_nodes
            for source in sources if name in _SUMS or name in _JOINS else sources[:1]:
                if source not in seen:
                    seen.add(source)
                    todo.append(source)
    alike = [node for node in found if shape_of(node) == shape_of(output) and tensor_of(node).dtype == value.dtype]  # type: ignore[union-attr]
    alike = [node for node in alike if node in from_sample] or alike  # text is mixed with it by a first block
    if len(alike) > 1:
        alike = [node for node in alike if carried(node, output, seen)] or alike
    if alike:
        return max(alike)
    return f"{output.name}, which is used outside of it, is no sum of a value that came in and of what the block adds"


def carried(source: fx.Node, output: fx.Node, through: set[fx.Node]) -> bool:
    """Whether ``output`` holds each element of ``source`` in its own place: ones that stand for it, and zeros for all
    other values, come through the nodes that :func:`stream_of` has followed as ones."""
    values: dict[fx.Node, Any] = {}

    def marker(node: fx.Node) -> Any:
        if node not in values:
            return torch.full(shape_of(node), node is source, dtype=torch.uint8)
        return values[node].clone() if isinstance(values[node], Tensor) else values[node]

    try:
        for node in sorted(each for each in through if each < output or each is output):
            if node is source or not set(node.all_input_nodes) & {source, *values}:
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), marker)
            if node.op == "call_method":
                values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return output in values and bool((values[output] == 1).all())
    except Exception:  # an op that takes no such values tells nothing
        return False


def operations(node: fx.Node) -> int:
    """Operations (two per multiply-add) of a linear, convolution, matrix product or attention; 0 for others."""
    made = math.prod(shape_of(node))
    name = op_name(node)
    if is_linear(node):
        return 2 * made * shape_of(node.all_input_nodes[0])[-1]
    if name in ("conv1d", "conv2d", "conv3d"):
        return 2 * made * math.prod(shape_of(node.all_input_nodes[1])[1:])
    if name in ("matmul", "bmm"):
        return 2 * made * shape_of(node.all_input_nodes[0])[-1]
    if is_attention(node):
        query, key = (shape_of(each) for each in node.all_input_nodes[:2])
        return 4 * math.prod(query) * key[-2]
    return 0
