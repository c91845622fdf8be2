"""Decide which dimension of each value carries the batch.

Notes ``node.meta["batch_dim"]``; nothing on a node that carries no samples, or in a way that was not followed.

The first dimension of the noisy sample is the batch by definition. From there the property is propagated, forwards
and backwards, through dimensions of which :mod:`difa_compile.passes.analyse.dimensions` says that they index the same
thing: operands of element-wise ops, leading dimensions of linears, the first dimension of each group of a reshape, and
so on. An operand of size B that stands against a batch dimension is indexed per sample and so carries the batch too;
nothing is concluded from a size that merely happens to be divisible.

What an op does not let through stays unlinked: sites behind it cannot share CFG halves and say so, and
:func:`why_not_followed` says behind which op. If a value is left half decided, halving gives a shape that does not
fit, which :mod:`difa_compile.passes.rewrite.share_cfg` checks node by node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import fx

from difa_compile.passes.analyse.dimensions import (
    Beside,
    Cut,
    Description,
    Dimension,
    DimensionTable,
    Element,
    Joined,
    Kept,
    LookedUp,
    Place,
    Placed,
    Regrouped,
    Several,
    Sized,
    Unknown,
    Value,
    Write,
    place_of,
    rearranged,
)
from difa_compile.passes.analyse.sample import Sample
from difa_compile.passes.facts import Facts
from difa_compile.passes.graph import argument, influenced_by, mutated_argument, op_name, shape_of


def follow_batch(module: fx.GraphModule, facts: Facts) -> None:
    """Note on every node which dimension of its value is the batch (:func:`annotate_batch`)."""
    annotate_batch(module.graph, facts[Sample].latents)


def annotate_batch(graph: fx.Graph, latents: Sequence[fx.Node]) -> None:
    """Write ``node.meta["batch_dim"]`` on every node whose value carries the samples of the latent (dimension 0).

    A value that would carry them in two dimensions gets none. Where the model takes a list of samples, they are carried
    from where one value of each is put into a batch (``stack``, ``pad_sequence``).
    """
    table = DimensionTable()
    seeds = [(latents[0], 0)] if len(latents) == 1 else [(node, 0) for node in batches_of(graph, latents)]
    links: dict[Place, set[Place]] = {}
    for node in graph.nodes:
        for here, there in dimension_links(node, table[node]):
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


def dimension_links(node: fx.Node, description: Description | None) -> Iterator[tuple[Place, Place]]:
    """Pairs of dimensions that index the same thing: one of ``node``, one of an operand.

    The dimensions of a tuple-valued node are those of each of its elements. An in-place write stands for its target.
    """
    target = mutated_argument(node)
    if target is not None and description is not None and not isinstance(description, Unknown):
        yield from (((node, i), (target, i)) for i in range(len(shape_of(target))))
    if isinstance(description, Element):
        yield from (((node, i), (description.source, i)) for i in range(len(shape_of(node))))
    elif isinstance(description, (Value, Write)):
        yield from (((node, i), there) for i, each in enumerate(description.dimensions) for there in linked(each))
    elif isinstance(description, Several):
        for element in description.elements:
            yield from (((node, i), there) for i, each in enumerate(element) for there in linked(each))


def linked(dimension: Dimension) -> Iterator[Place]:
    """The operands' dimensions whose entries a dimension indexes too: all of them, one by one, each for itself.

    Not so where only a stretch is taken, where every entry depends on all, or along which values were joined. Of
    dimensions that are merged or split the outermost goes on: samples lie one after the other.
    """
    match dimension:
        case Kept(places):
            yield from places
        case Beside(choices, _):
            for choice in choices:
                yield from linked(choice)
        case Regrouped(sources, _, 0):
            yield sources[0]
        case Sized(place) | LookedUp(place):
            yield place
        case Placed(whole, part, _):
            yield whole
            if part is not None and shape_of(part[0])[part[1]] == shape_of(whole[0])[whole[1]]:
                yield part


def why_not_followed(values: Iterable[fx.Node]) -> str:
    """Behind which op these values no longer carry the batch, as the end of a sentence; "" where that can't be told.

    After :func:`annotate_batch`. That is the first op with an operand that carries it, of those whose effect on
    dimensions is not known and that lead to the values; or else the only one that takes samples in another order or
    number.
    """
    left = [value for value in values if "batch_dim" not in value.meta]
    table = DimensionTable()
    ends = []
    for node in left[0].graph.nodes if left else ():
        description = table[node]
        if "batch_dim" in node.meta:
            continue
        if isinstance(description, Unknown) and any("batch_dim" in source.meta for source in node.all_input_nodes):
            ends.append(node)
        elif isinstance(description, Value):
            taken = [place for each in description.dimensions for place in taken_from(each)]
            if any(source.meta.get("batch_dim") == i for source, i in taken):
                ends.append(node)
    ends = [node for node in ends if not influenced_by([node]).isdisjoint(left)]
    unknown = [found for node in ends if isinstance(found := table[node], Unknown)]
    if unknown:
        return f": not behind {unknown[0]}"
    return f": not behind {place_of(ends[0])}, which takes, orders or joins samples otherwise" if len(ends) == 1 else ""


def taken_from(dimension: Dimension) -> tuple[Place, ...]:
    """The operands' dimensions of which a dimension takes some positions, or all in another order or among others."""
    match dimension:
        case Cut(place):
            return (place,)
        case Joined(pieces):
            return tuple(piece for piece in pieces if not isinstance(piece, int))
    return rearranged(dimension)
