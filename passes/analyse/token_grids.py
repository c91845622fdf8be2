"""Read token layouts off a graph: the image grid of a site, and where other tokens stand beside it.

What a site's sequence enumerates comes from following the axes of the noisy sample
(:mod:`difa_compile.passes.analyse.axes`). Where the sample comes in packed, as (batch, tokens, channels), its tokens
are one axis, and what grid they are is looked for, in this order, in

1. positions that meet the tokens (:mod:`difa_compile.passes.analyse.positions`), for all of them or for some: text or
   further images may be packed with them;
2. position ids among the inputs that enumerate a grid row by row (:func:`packed_grid`);
3. the sizes that the graph itself lays positions out with (:func:`grids_built`): a mesh of coordinates, or tables of
   angles whose leading dimensions are merged into as many rows as there are tokens;
4. numbers in a row that meet just these tokens, as the angles of a one-dimensional rotary embedding do.

Where several grids stand in a sequence (a reference beside the noisy image), the layout is that of the largest, of
equal ones the first; the others are other tokens, which see everything and are seen by everything.

Where these contradict each other or show nothing there is no layout, and the reason says so; windows are then refused
at that site, or the user tells the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from difa_compile.layout import Layout
from difa_compile.passes.analyse.axes import Axis, Extent, Extents, Stretch, follow_axes, sample_axes
from difa_compile.passes.analyse.dimensions import DimensionTable, Unknown, Value, place_of, rearranged
from difa_compile.passes.analyse.positions import (
    LINE,
    follow_lines,
    follow_positions,
    inputs_of,
    ranges_known,
    tables_of,
)
from difa_compile.passes.graph import influenced_by, is_parameter, op_name, shape_of
from difa_compile.passes.prepare.arguments import argument_name


class LayoutFinder:
    """Finds layouts of one graph's sites.

    ``latents``: the placeholders of the noisy sample. ``values``: the real inputs of the graph, in order, or None.
    """

    def __init__(
        self,
        graph: fx.Graph,
        latents: Sequence[fx.Node],
        *,
        told: Layout | None,
        values: Sequence[Any] | None,
    ) -> None:
        self.told = told
        self.graph = graph
        self.latents = latents
        self.table = DimensionTable()
        self.ranges = ranges_known(graph, values)
        self.extents = self.follow(latents)
        self.positions = follow_positions(graph, latents, values, self.ranges, self.table)
        self.tables = position_tables(graph, values)
        given = [node for node in graph.find_nodes(op="placeholder") if not is_of_model(node)]
        self.unrelated = set(graph.nodes) - influenced_by(given)

    def follow(self, inputs: Sequence[fx.Node], sample: int | None = None) -> dict[fx.Node, Extents]:
        """What every value that shows an axis of these inputs enumerates."""
        return follow_axes(self.graph, sample_axes(inputs), self.ranges, sample=sample, table=self.table)

    def of(self, sequence: fx.Node, tokens: int) -> tuple[Layout | None, str]:
        """The layout of a sequence (B, H, tokens, D), or None and the reason."""
        if self.told is not None:
            if self.told.tokens == tokens:
                return self.told, ""
            if self.told.image_tokens == tokens:
                return Layout(self.told.grid), ""
            if self.told.holds(tokens):
                return Layout(self.told.grid, after=self.told.after), ""
            return None, f"the given layout {self.told} has {self.told.tokens} tokens, the sequence has {tokens}"
        extents = self.extents.get(sequence)
        if extents is None or not any(part.known or repeated(part) for part in extents[2]):
            return None, self.why_not_followed(sequence)
        return self.read(sequence, extents[2], extents[0])

    def why_not_followed(self, sequence: fx.Node) -> str:
        """The reason where a sequence shows no axis of the noisy sample."""
        if apart := self.samples_apart(sequence):
            return apart
        given = [node for node in self.graph.find_nodes(op="placeholder") if not is_of_model(node)]
        others = [node for node in given if node not in self.latents and len(shape_of(node)) >= 3]
        for node in sorted(others, key=lambda each: -math.prod(shape_of(each))):
            extents = self.follow([node]).get(sequence)
            if extents is not None and any(axis.index not in (0, None) for part in extents[2] for axis in part.axes):
                return f"the tokens are those of the input {argument_name(node)}, not of the noisy sample; give layout="
        reason = "the graph does not show how the tokens follow from the noisy sample; give layout="
        return reason + self.ended(sequence)

    def ended(self, sequence: fx.Node) -> str:
        """Behind which op the tokens are not followed, as the end of a sentence; "" where that can't be told.

        That is the first op on tokens of the noisy sample, of those whose effect on dimensions is not known and that
        lead to the sequence; or else the only one that takes tokens in an order that is not followed.
        """
        ends = [node for node in self.ends if sequence in influenced_by([node])]
        unknown = [found for node in ends if isinstance(found := self.table[node], Unknown)]
        if unknown:
            return f"; they are not followed behind {unknown[0]}"
        return f"; they are not followed behind {place_of(ends[0])}, which rearranges them" if len(ends) == 1 else ""

    @cached_property
    def ends(self) -> list[fx.Node]:
        """The ops on tokens of the noisy sample whose value shows none although it has some, in order."""
        found = []
        for node in self.graph.nodes:
            description = self.table[node]
            if self.shows_tokens(node):
                continue
            if isinstance(description, Unknown) and any(map(self.shows_tokens, node.all_input_nodes)):
                found.append(node)
            elif isinstance(description, Value):
                taken = [place for each in description.dimensions for place in rearranged(each)]
                if any(self.tokens_among(self.extents[source][i]) for source, i in taken if source in self.extents):
                    found.append(node)
        return found

    def shows_tokens(self, node: fx.Node) -> bool:
        return any(map(self.tokens_among, self.extents.get(node, ())))

    def tokens_among(self, extent: Extent) -> bool:
        """Whether a dimension shows an axis of the noisy sample other than samples and, of an image, channels."""
        first = 2 if max(len(shape_of(latent)) for latent in self.latents) > 3 else 1
        return any(axis.index is not None and axis.index >= first for part in extent for axis in part.axes)

    def samples_apart(self, sequence: fx.Node) -> str:
        """The reason where samples are put into a sequence one by one, each at places of its own; else ""."""
        if not any(op_name(node) == "setitem" and begins_with_number(node.args[1]) for node in self.graph.nodes):
            return ""
        found: dict[Layout, None] = {}
        for sample in range(shape_of(sequence)[0]):
            extents = self.follow(self.latents, sample).get(sequence)
            layout = None if extents is None else self.read(sequence, extents[2], extents[0])[0]
            if layout is None:
                return ""
            found[layout] = None
            if len(found) > 1:
                places = " and ".join(map(str, found))
                return f"the samples of the batch stand differently in the sequence ({places}): texts of other lengths"
        return ""

    @cached_property
    def lines(self) -> dict[fx.Node, Extents]:
        return follow_lines(self.graph, self.ranges, self.table)

    def read(self, sequence: fx.Node, extent: Extent, batch: Extent) -> tuple[Layout | None, str]:
        """The layout of the tokens of a sequence.

        ``extent``: what they enumerate. ``batch``: what the dimension of the samples does.
        """
        total = sum(part.length for part in extent)
        found: list[Layout] = []
        reasons: list[str] = []
        start = 0
        for part in extent:
            if part.known:
                grids, reason = self.grids_of(sequence, part, start, batch)
                found += [Layout(grid, at, total - at - math.prod(grid)) for at, grid in grids]
                reasons.append(reason)
            else:
                found += [Layout(grid, start + at, total - start - at - math.prod(grid)) for at, grid in repeated(part)]
            start += part.length
        if found:
            return max(found, key=lambda layout: layout.image_tokens), ""  # the first of the largest
        return None, reasons[0] if reasons else "no grid is repeated"

    def grids_of(
        self, sequence: fx.Node, part: Stretch, start: int, batch: Extent
    ) -> tuple[list[tuple[int, tuple[int, ...]]], str]:
        """The grids that stand in a part of the sequence: where in the sequence each begins; or the reason.

        ``start``: where the part begins.
        """
        packed = self.is_packed(part, batch)
        if packed and sequence in self.positions:
            met = grids_within(self.positions[sequence][2])
            met = [(at, grid) for at, grid in met if start <= at < start + part.length]
            if met:
                return met, ""
        grid, reason = self.grid_of(part, start, batch)
        if packed and grid is None and is_line(self.lines.get(sequence, ((),) * 4)[2], start, part.length):
            return [(start, (part.length,))], ""
        return ([] if grid is None else [(start, grid)]), reason

    @staticmethod
    def is_packed(part: Stretch, batch: Extent) -> bool:
        """Whether a part is the second axis of the sample, which may be all tokens of an image or video."""
        folded = any(axis.index not in (0, None) for each in batch for axis in each.axes)
        return len(part.axes) == 1 and part.axes[0].index == 1 and not folded

    def grid_of(self, part: Stretch, before: int, batch: Extent) -> tuple[tuple[int, ...] | None, str]:
        """The grid of the image tokens; ``before`` other tokens stand in front of them."""
        axes = part.axes
        if any(axis.within and axis.index != 0 for axis in axes):  # in the batch's own axis: frames of a sample
            return None, f"the tokens stand tile by tile ({tiles(axes)}), not row by row"
        if any(axis.index == 0 and not axis.within for axis in axes) and len(self.latents) == 1:
            return None, "the tokens are samples of the batch"
        if self.is_packed(part, batch):
            return self.packed(axes[0].size, before)
        if len(axes) > 3:
            return None, f"the tokens have {len(axes)} axes"
        return tuple(axis.size for axis in axes), ""

    def packed(self, tokens: int, before: int) -> tuple[tuple[int, ...] | None, str]:
        """The grid of ``tokens`` that come in as one axis, which may be a whole image or video."""
        grids = list(dict.fromkeys(packed_grid(table, tokens, before) for table in self.tables))
        found = [grid for grid in grids if grid is not None]
        if not found:
            found = list(dict.fromkeys(grids_built(self.graph, self.unrelated, tokens)))
        if len(found) == 1:
            return found[0], ""
        if found:
            return None, f"the {tokens} tokens may be a grid {' or '.join(map(str, found))}; give layout="
        return None, f"the graph does not show which grid the {tokens} packed tokens are; give layout="


def is_of_model(node: fx.Node) -> bool:
    """Whether a placeholder is a parameter, a buffer or a tensor attribute of the model."""
    return is_parameter(node) or node.name.strip("_").startswith("l_self_")


def begins_with_number(index: Any) -> bool:
    """Whether an index picks one entry of the first dimension."""
    first = index[0] if isinstance(index, tuple) and index else index
    return type(first) is int


def repeated(part: Stretch) -> list[tuple[int, tuple[int, ...]]]:
    """Grids of two and more axes that come again and again along axes of unknown order, as (begin, grid).

    Frames in an order that was not followed are an image each.
    """
    unknown = 0
    while unknown < len(part.axes) and part.axes[unknown].index is None:
        unknown += 1
    inner = Stretch(part.axes[unknown:])
    if not unknown or len(inner.axes) not in (2, 3) or not inner.known or any(axis.within for axis in inner.axes):
        return []
    if any(axis.index == 0 for axis in inner.axes):
        return []
    grid = tuple(axis.size for axis in inner.axes)
    return [(start, grid) for start in range(0, part.length, inner.length)]


def grids_within(extent: Extent) -> list[tuple[int, tuple[int, ...]]]:
    """Grids of two and three axes among what a dimension enumerates, as (begin, grid)."""
    found, start = [], 0
    for part in extent:
        grid = tuple(axis.size for axis in part.axes)
        if part.known and 2 <= len(grid) <= 3 and not any(axis.within for axis in part.axes):
            found.append((start, grid))
        start += part.length
    return found


def is_line(extent: Extent, start: int, length: int) -> bool:
    """Whether just these positions of a dimension count along one line."""
    at = 0
    for part in extent:
        if at == start and part.length == length:
            return len(part.axes) == 1 and part.axes[0].index == LINE and not part.axes[0].within
        at += part.length
    return False


def tiles(axes: Sequence[Axis]) -> str:
    """Sizes of a tiled dimension, those within tiles in brackets."""
    return " x ".join(f"[{axis.size}]" if axis.within else str(axis.size) for axis in axes)


def position_tables(graph: fx.Graph, values: Sequence[Any] | None) -> list[Tensor]:
    """Inputs that may hold position ids: tables (rows, 1 to 4 columns) in float64, one sample's if all agree."""
    found = []
    for _, value in inputs_of(graph, values):
        if isinstance(value, Tensor):
            found += [table for _, table in tables_of(value)][:1]
    return found


def packed_grid(table: Tensor, tokens: int, before: int = 0) -> tuple[int, ...] | None:
    """The grid that ``tokens`` consecutive rows of position ids enumerate row by row, or None.

    ``table``: float64 (rows, columns). Ids of other tokens may stand around the image's; where, is tried for: all rows,
    behind ``before`` others, at the end. Ids may start anywhere and need not be neighbours, but must rise.
    """
    for start in dict.fromkeys((0, before, len(table) - tokens)):
        rows = table[start : start + tokens]
        if start < 0 or len(rows) != tokens:
            continue
        ranks = [torch.unique(column, return_inverse=True) for column in rows.unbind(1)]
        sizes = [len(values) for values, _ in ranks]
        if math.prod(sizes) != tokens or tokens == 1:
            continue
        axes = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
        if all(torch.equal(axis.reshape(-1), rank) for axis, (_, rank) in zip(axes, ranks, strict=True)):
            return tuple(size for size in sizes if size > 1)
    return None


def grids_built(graph: fx.Graph, unrelated: set[fx.Node], tokens: int) -> Iterator[tuple[int, ...]]:
    """Grids of ``tokens`` positions that the graph lays out without looking at the sample's values."""
    lines = []
    for node in graph.nodes:
        if node not in unrelated:
            continue
        name = op_name(node)
        if name == "meshgrid":
            operands = node.args[0] if node.args and isinstance(node.args[0], (list, tuple)) else node.args
            sizes = [math.prod(shape_of(operand)) for operand in operands if isinstance(operand, fx.Node)]
            if math.prod(sizes) == tokens and node.kwargs.get("indexing", "ij") == "ij":
                yield tuple(size for size in sizes if size > 1)
        elif name in ("view", "reshape", "flatten") and isinstance(node.args[0], fx.Node):
            yield from merged(shape_of(node.args[0]), shape_of(node), tokens)
        elif name in ("arange", "linspace") and shape_of(node) == (tokens,):
            lines.append((tokens,))
    yield from lines if not any(is_mesh(node, tokens, unrelated) for node in graph.nodes) else ()


def is_mesh(node: fx.Node, tokens: int, unrelated: set[fx.Node]) -> bool:
    """Whether a node lays positions out in several dimensions, so that a line of numbers says nothing."""
    if node not in unrelated:
        return False
    return op_name(node) == "meshgrid" or (
        op_name(node) in ("view", "reshape", "flatten")
        and isinstance(node.args[0], fx.Node)
        and any(True for _ in merged(shape_of(node.args[0]), shape_of(node), tokens))
    )


def merged(before: tuple[int, ...], after: tuple[int, ...], tokens: int) -> Iterator[tuple[int, ...]]:
    """Two or three leading sizes that a reshape merges into ``tokens`` rows, what follows staying as it is."""
    if len(after) < 2:
        return
    for count in (2, 3, 4):
        sizes = before[:count]
        grid = tuple(size for size in sizes if size > 1)
        if len(sizes) == count < len(before) and math.prod(sizes) == tokens == after[0] and 2 <= len(grid) <= 3:
            yield grid
