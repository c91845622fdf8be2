"""Read token layouts off a graph: the image grid of a site, and where other tokens stand beside it.

What a site's sequence enumerates comes from following the axes of the noisy sample (:mod:`difa_compile.passes.axes`).
Where the sample comes in packed, as (batch, tokens, channels), its tokens are one axis, and what grid they are is
looked for, in this order, in

1. position ids among the inputs that enumerate a grid row by row (:func:`packed_grid`);
2. the sizes that the graph itself lays positions out with (:func:`grids_built`): a mesh of coordinates, or tables of
   angles whose leading dimensions are merged into as many rows as there are tokens.

Where these contradict each other or show nothing there is no layout, and the reason says so; windows are then refused
at that site, or the user tells the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from difa_compile.layout import Layout
from difa_compile.passes.axes import Extent, Part, follow_axes
from difa_compile.passes.graph import influenced_by, is_parameter, op_name, shape_of


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
        self.extents = follow_axes(graph, latents)
        self.tables = position_tables(graph, values)
        given = [node for node in graph.find_nodes(op="placeholder") if not is_of_model(node)]
        self.unrelated = set(graph.nodes) - influenced_by(given)

    def of(self, sequence: fx.Node, tokens: int) -> tuple[Layout | None, str]:
        """The layout of a sequence (B, H, tokens, D), or None and the reason."""
        if self.told is not None:
            if self.told.tokens == tokens:
                return self.told, ""
            if self.told.image_tokens == tokens:
                return Layout(self.told.grid), ""
            return None, f"the given layout {self.told} has {self.told.tokens} tokens, the sequence has {tokens}"
        extents = self.extents.get(sequence)
        if extents is None or not any(part.known for part in extents[2]):
            return None, "the graph does not show how the tokens follow from the noisy sample; give layout="
        return self.read(extents[2], extents[0])

    def read(self, extent: Extent, batch: Extent) -> tuple[Layout | None, str]:
        """The layout of a dimension of tokens; ``batch``: what the dimension of the samples enumerates."""
        images = [i for i, part in enumerate(extent) if part.known]
        if len(images) > 1:
            lengths = [extent[i].length for i in images]
            return None, f"{len(images)} parts of the sequence ({lengths} tokens) come from the noisy sample"
        before = sum(part.length for part in extent[: images[0]])
        after = sum(part.length for part in extent[images[0] + 1 :])
        grid, reason = self.grid_of(extent[images[0]], before, batch)
        return (None, reason) if grid is None else (Layout(grid, before, after), "")

    def grid_of(self, part: Part, before: int, batch: Extent) -> tuple[tuple[int, ...] | None, str]:
        """The grid of the image tokens; ``before`` other tokens stand in front of them."""
        axes = part.axes
        if any(axis.within and axis.index != 0 for axis in axes):  # in the batch's own axis: frames of a sample
            return None, "the tokens are offsets within patches"
        if any(axis.index == 0 and not axis.within for axis in axes) and len(self.latents) == 1:
            return None, "the tokens are samples of the batch"
        folded = any(axis.index not in (0, None) for each in batch for axis in each.axes)
        if len(axes) == 1 and axes[0].index == 1 and not folded:
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


def position_tables(graph: fx.Graph, values: Sequence[Any] | None) -> list[Tensor]:
    """Inputs that may hold position ids: tables (rows, 1 to 4 columns) in float64, one sample's if all agree."""
    if values is None:
        return []
    tables = []
    for node, value in zip(graph.find_nodes(op="placeholder"), values, strict=True):
        if not isinstance(value, Tensor) or is_parameter(node) or value.is_complex():
            continue
        if value.ndim == 4 and value.shape[-1] == 2:
            value = value[..., 0]  # where each token begins, of (begin, end)
        table = value[0] if value.ndim == 3 and (value.shape[0] == 1 or bool((value == value[:1]).all())) else value
        if table.ndim == 2 and table.shape[0] <= 4 < table.shape[1]:
            table = table.T  # one row per column of coordinates
        if table.ndim == 2 and 1 <= table.shape[1] <= 4 < table.shape[0]:
            tables.append(table.detach().to("cpu", torch.float64))
    return tables


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
