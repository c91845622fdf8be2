"""Decide which dimension of each value carries the batch.

The first dimension of the noisy sample is the batch by definition. From there the property is propagated, forwards and
backwards, through the way each op lines up its dimensions: element-wise ops by broadcasting, linears over the leading
dimensions, reshapes by the first dimension of each group, and so on. An operand of size B that stands against a batch
dimension is indexed per sample and so carries the batch too; nothing is concluded from a size that merely happens to be
divisible.

What an op does not let through stays unlinked: sites behind it cannot share CFG halves and say so. If a value is left
half decided, halving gives a shape that does not fit, which :mod:`difa_compile.passes.rewrite.share_cfg` checks node by
node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import fx

from difa_compile.passes.analyse.find_attention import attention_inputs
from difa_compile.passes.analyse.sample import Sample
from difa_compile.passes.facts import Facts
from difa_compile.passes.graph import (
    CONVERSIONS,
    ELEMENTWISE,
    ORDER_KEEPING,
    REDUCTIONS,
    argument,
    influenced_by,
    is_attention,
    is_linear,
    mutated_argument,
    op_name,
    reduced,
    shape_of,
    tensor_of,
)

Place = tuple[fx.Node, int]
"""A dimension of a node's value; for a tuple-valued node (split, chunk), of each of its elements."""


class BatchUnknown(Exception):
    """An op form through which the batch dimension cannot be followed; the message says which."""


def follow_batch(module: fx.GraphModule, facts: Facts) -> None:
    """Note on every node which dimension of its value is the batch (:func:`annotate_batch`)."""
    annotate_batch(module.graph, facts[Sample].latents)


def annotate_batch(graph: fx.Graph, latents: Sequence[fx.Node]) -> None:
    """Write ``node.meta["batch_dim"]`` on every node whose value carries the samples of the latent (dimension 0).

    A value that would carry them in two dimensions gets none. Where the model takes a list of samples, they are carried
    from where one value of each is put into a batch (``stack``, ``pad_sequence``).
    """
    seeds = [(latents[0], 0)] if len(latents) == 1 else [(node, 0) for node in batches_of(graph, latents)]
    links: dict[Place, set[Place]] = {}
    for node in graph.nodes:
        try:
            pairs = list(dimension_links(node))
        except (IndexError, TypeError, ValueError, BatchUnknown):
            continue  # an op form this analysis does not read: it lets nothing through
        for dimension, source, source_dimension in pairs:
            here, there = (node, dimension), (source, source_dimension)
            links.setdefault(here, set()).add(there)
            links.setdefault(there, set()).add(here)
    seen: set[Place] = set(seeds)
    todo = list(seeds)
    while todo:
        for place in links.get(todo.pop(), ()):
            if place not in seen:
                seen.add(place)
                todo.append(place)
    found: dict[fx.Node, set[int]] = {}
    for node, dimension in seen:
        found.setdefault(node, set()).add(dimension)
    for node, dimensions in found.items():
        if len(dimensions) == 1:
            node.meta["batch_dim"] = next(iter(dimensions))


def batches_of(graph: fx.Graph, latents: Sequence[fx.Node]) -> list[fx.Node]:
    """Nodes that put one value of each of ``latents``, in order, into a batch."""
    reached = [influenced_by([latent]) for latent in latents]
    found = []
    for node in graph.nodes:
        name = op_name(node)
        first = name == "stack" and argument(node, 1, "dim", 0) == 0
        if not (first or (name == "pad_sequence" and argument(node, 1, "batch_first", False))):
            continue
        values = node.args[0] if node.args else ()
        if isinstance(values, (list, tuple)) and len(values) == len(latents) and len(latents) > 1:
            own = [value for value, nodes in zip(values, reached, strict=True) if value in nodes]
            if len(own) == len(values):
                found.append(node)
    return found


def dimension_links(node: fx.Node) -> Iterator[tuple[int, fx.Node, int]]:
    """Pairs of dimensions that index the same thing: (dimension of ``node``, source, dimension of the source)."""
    name = op_name(node)
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if is_attention(node):
        for operand in (*attention_inputs(node), argument(node, 3, "attn_mask")):
            shape = shape_of(attention_inputs(node)[0])
            if not isinstance(operand, fx.Node) or len(shape_of(operand)) != len(shape):
                continue  # a mask of fewer dimensions is the same for all samples
            if shape_of(operand)[0] == shape[0]:
                yield 0, operand, 0
    elif is_linear(node) and first is not None:
        yield from ((i, first, i) for i in range(len(shape_of(first)) - 1))
    elif name in ("conv1d", "conv2d", "conv3d"):
        if first is not None:
            yield 0, first, 0
    elif name == "embedding":
        if first is not None:
            yield from ((i, first, i) for i in range(len(shape_of(first))))
    elif name in ("layer_norm", "rms_norm") and first is not None:
        normalised = len(argument(node, 1, "normalized_shape"))
        yield from ((i, first, i) for i in range(len(shape_of(first)) - normalised))
    elif name == "einsum":
        yield from einsum_links(node)
    elif name in ("index_copy", "index_copy_", "index_add", "index_add_"):
        rank = len(shape_of(node))
        axis = argument(node, 1, "dim") % rank
        yield from ((i, node.args[0], i) for i in range(rank))  # type: ignore[misc]
        yield from ((i, argument(node, 3, "source"), i) for i in range(rank) if i != axis)
    elif name == "setitem" or mutated_argument(node) is not None:
        yield from written_links(node)
    elif name in CONVERSIONS and first is not None:
        yield from aligned(shape_of(node), node, [first])
    elif name in ELEMENTWISE:
        yield from aligned(shape_of(node), node, node.all_input_nodes)
    elif name in ("cat", "concat", "concatenate"):
        shape = shape_of(node)
        axis = argument(node, 1, "dim", 0) % len(shape)
        for operand in argument(node, 0, "tensors"):
            yield from ((i, operand, i) for i in range(len(shape)) if i != axis)
    elif name == "pad_sequence" and argument(node, 1, "batch_first", False):
        for operand in argument(node, 0, "sequences"):
            yield from ((i + 1, operand, i) for i in range(1, len(shape_of(operand))))
    elif name == "stack":
        axis = argument(node, 1, "dim", 0) % len(shape_of(node))
        for operand in argument(node, 0, "tensors"):
            yield from ((i + (i >= axis), operand, i) for i in range(len(shape_of(operand))))
    elif first is None:
        return
    elif name in ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"):
        yield from ((out, first, into) for out, into in regrouped(shape_of(first), shape_of(node)))
    elif name in ("transpose", "swapaxes", "swapdims"):
        rank = len(shape_of(first))
        one, two = (argument(node, i, f"dim{i - 1}") % rank for i in (1, 2))
        swap = {one: two, two: one}
        yield from ((i, first, swap.get(i, i)) for i in range(rank))
    elif name == "permute":
        order = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
        rank = len(shape_of(first))
        yield from ((i, first, int(source) % rank) for i, source in enumerate(order))
    elif name in ("split", "split_with_sizes", "chunk", "tensor_split"):
        rank = len(shape_of(first))
        axis = argument(node, 2, "dim", 0) % rank
        yield from ((i, first, i) for i in range(rank) if i != axis)
    elif name == "unbind":
        rank = len(shape_of(first))
        axis = argument(node, 1, "dim", 0) % rank
        yield from ((i - (i > axis), first, i) for i in range(rank) if i != axis)
    elif name == "getitem":
        yield from taken(node, first)
    elif name in ("expand", "expand_as", "repeat", "repeat_interleave", "tile", "pad"):
        yield from aligned(shape_of(node), node, [first])
    elif name in ("view_as_complex", "view_as_real"):
        yield from ((i, first, i) for i in range(min(len(shape_of(first)), len(shape_of(node)))))
    elif name in ("matmul", "bmm", "baddbmm"):
        operands = [operand for operand in node.args[-2:] if isinstance(operand, fx.Node)]
        shape = shape_of(node)
        for operand in operands:
            theirs = shape_of(operand)
            for i in range(min(len(theirs), len(shape)) - 2):
                out, into = len(shape) - 3 - i, len(theirs) - 3 - i
                if shape[out] == theirs[into]:
                    yield out, operand, into
    elif name in ("sort", "argsort", "topk", "cumsum", "cumprod"):
        axis = argument(node, 2 if name == "topk" else 1, "dim", -1) % len(shape_of(first))
        yield from ((i, first, i) for i in range(len(shape_of(first))) if i != axis)
    elif name in REDUCTIONS:
        yield from ((out, first, into) for out, into in reduced(node))
    elif name == "narrow" or (name in ORDER_KEEPING and shape_of(node) == shape_of(first)):
        yield from aligned(shape_of(node), node, [first])


def einsum_links(node: fx.Node) -> Iterator[tuple[int, fx.Node, int]]:
    """Links of an einsum with an explicit output and no ellipsis: dimensions of one letter."""
    equation, operands = node.args[0], node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return
    inputs, output = equation.replace(" ", "").split("->")
    for names, operand in zip(inputs.split(","), operands, strict=True):
        if isinstance(operand, fx.Node):
            yield from ((output.index(letter), operand, i) for i, letter in enumerate(names) if letter in output)


def aligned(shape: tuple[int, ...], node: fx.Node, operands: Iterable[fx.Node]) -> Iterator[tuple[int, fx.Node, int]]:
    """Links of operands that broadcast to ``shape``."""
    for operand in operands:
        theirs = shape_of(operand)
        shift = len(shape) - len(theirs)
        for i, size in enumerate(theirs):
            if i + shift >= 0 and size == shape[i + shift]:
                yield i + shift, operand, i


def written_links(node: fx.Node) -> Iterator[tuple[int, fx.Node, int]]:
    """Links of an in-place write: the written value's dimensions line up with those of the slice it goes to.

    The write itself has no value of its own; its dimensions stand for the target's.
    """
    target = mutated_argument(node)
    if target is None:
        return
    rank = len(shape_of(target))
    yield from ((i, target, i) for i in range(rank))
    if op_name(node) != "setitem":
        operands = [each for each in node.all_input_nodes if each is not target]
        for out, operand, into in aligned(shape_of(target), node, operands):
            yield out, operand, into
        return
    value = node.args[-1]
    if isinstance(value, fx.Node) and value is not target:
        kept = [(out, into) for out, into in indexed(node.args[1], rank) if into is not None]
        slots = 1 + max((out for out, _ in kept), default=-1)
        shift = slots - len(shape_of(value))
        for out, into in kept:
            if 0 <= out - shift < len(shape_of(value)) and shape_of(value)[out - shift] == shape_of(target)[into]:
                yield into, value, out - shift


def regrouped(before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Pairs (new dimension, old dimension) that are outermost in the same group of a reshape.

    Dimensions of size one are left out: a batch that can be halved is never one of them.
    """
    old = [i for i, size in enumerate(before) if size != 1]
    new = [j for j, size in enumerate(after) if size != 1]
    while old and new:
        outer = new[0], old[0]
        left, right = before[old.pop(0)], after[new.pop(0)]
        while left != right:
            if left < right:
                left *= before[old.pop(0)]
            else:
                right *= after[new.pop(0)]
        yield outer


def indexed(index: object, rank: int) -> list[tuple[int, int | None]]:
    """Dimensions kept by basic indexing: (output dimension, source dimension or None for an added one).

    A dimension that a slice cuts is kept but no longer the same extent; the caller compares sizes. Raises
    :class:`BatchUnknown` for advanced indexing.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    named = sum(1 for item in items if item is not None and item is not Ellipsis)
    if Ellipsis not in [item for item in items if not isinstance(item, fx.Node)]:
        items.append(Ellipsis)
    kept: list[tuple[int, int | None]] = []
    out = source = 0
    for item in items:
        if item is None:
            kept.append((out, None))
            out += 1
        elif item is Ellipsis:
            for _ in range(rank - named):
                kept.append((out, source))
                out, source = out + 1, source + 1
        elif isinstance(item, slice):
            kept.append((out, source))
            out, source = out + 1, source + 1
        elif isinstance(item, int):
            source += 1
        else:
            raise BatchUnknown(f"indexing with {item!r} is not a slice")
    return kept


def taken(node: fx.Node, first: fx.Node) -> Iterator[tuple[int, fx.Node, int]]:
    """Links of ``getitem``: an element of a tuple-valued op, or a slice of a tensor."""
    if tensor_of(first) is None:
        yield from ((i, first, i) for i in range(len(shape_of(node))))
        return
    theirs, mine = shape_of(first), shape_of(node)
    for out, source in indexed(node.args[1], len(theirs)):
        if source is not None and out < len(mine) and theirs[source] == mine[out]:
            yield out, first, source
