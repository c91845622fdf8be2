"""Where a graph says which positions of a grid its tokens stand at, whatever the tokens are made of.

Three things in a graph enumerate positions:

1. *position ids* among the inputs: one row of coordinates per token (:func:`grids_among`);
2. *tables of angles* among the inputs: one row per token, each column a function of one coordinate
   (:func:`grid_of_table`);
3. *meshes of coordinates* that the graph itself builds.

Each is followed to where it meets the tokens, as the noisy sample's own axes are
(:mod:`difa_compile.passes.analyse.axes`). So it is known for which tokens a grid holds, also where those of several
images and texts stand in one sequence.

The values of the example inputs are read. So a layout holds for these values: :class:`HeldPositions` tells a later call
that has others in tensors of equal shapes.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from difa_compile.errors import InputValuesError
from difa_compile.passes.analyse.axes import Axis, Extents, Stretch, follow_axes, other
from difa_compile.passes.analyse.dimensions import DimensionTable
from difa_compile.passes.graph import is_parameter, op_name, shape_of

LINE = -9
"""Axis index of numbers in a row, of which it is not told whether they count along a line of tokens or a grid."""

COORDINATE = -1
"""Axis index of the first coordinate of a position; those that follow count down."""


def follow_positions(
    graph: fx.Graph,
    latents: Sequence[fx.Node],
    values: Sequence[Any] | None,
    ranges: Mapping[fx.Node, range],
    table: DimensionTable,
) -> dict[fx.Node, Extents]:
    """Extents, in coordinates of positions, of every value that shows some; ``values``: the graph's real inputs."""
    sources: dict[fx.Node, Extents | tuple[Extents, ...]] = {}
    for node in graph.nodes:
        if op_name(node) == "meshgrid":
            elements = node.meta.get("example_value", node.meta.get("val")) or ()
            extents = coordinates(elements[0].shape) if elements else ()
            sources[node] = tuple(extents for _ in elements)
    for node, value in inputs_of(graph, values):
        if node not in latents and isinstance(value, Tensor) and (found := positions_given(value)) is not None:
            sources[node] = found
    return follow_axes(graph, sources, ranges, table=table)


def follow_lines(graph: fx.Graph, ranges: Mapping[fx.Node, range], table: DimensionTable) -> dict[fx.Node, Extents]:
    """Extents of every value that depends on the numbers of an ``arange`` or a ``linspace``, along :data:`LINE`."""
    sources: dict[fx.Node, Extents | tuple[Extents, ...]] = {}
    for node in graph.nodes:
        if op_name(node) in ("arange", "linspace") and len(shape_of(node)) == 1 and shape_of(node)[0] > 1:
            sources[node] = ((Stretch((Axis(LINE, shape_of(node)[0]),)),),)
    return follow_axes(graph, sources, ranges, table=table)


def inputs_of(graph: fx.Graph, values: Sequence[Any] | None) -> Iterator[tuple[fx.Node, Any]]:
    """The graph's inputs with their values, without the model's parameters and buffers."""
    for node, value in zip(graph.find_nodes(op="placeholder"), values or (), strict=values is not None):
        if not is_parameter(node):
            yield node, value


class HeldPositions:
    """Inputs of a graph whose values tell where tokens stand, as they were when the graph was captured.

    ``layouts(values)`` finds the layouts with the values of some inputs unknown (None). Held are only inputs without
    which they are not found, a smallest set of them: a mask or a timestep may look like positions and be none.

    A tensor that was found equal is not compared again as long as nobody writes to it, so the steps of a run, which
    pass the same ids, cost nothing and a device is not waited for.
    """

    def __init__(self, graph: fx.Graph, values: Sequence[Any], layouts: Callable[[Sequence[Any]], object]) -> None:
        known = list(values)
        where = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
        may_tell = [where[node] for node, value in inputs_of(graph, values) if may_tell_positions(value)]
        found = layouts(known) if may_tell else None
        self._held: dict[int, Tensor] = {}
        for i in may_tell:
            value, known[i] = known[i], None
            if layouts(known) != found:
                known[i] = value
                self._held[i] = value.detach().clone()
        self._seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    @property
    def inputs(self) -> frozenset[int]:
        """The places of the held inputs among the graph's."""
        return frozenset(self._held)

    def check(self, args: Sequence[Any]) -> None:
        """Raise :class:`InputValuesError` if inputs hold other positions than those the graph was captured with."""
        for i, held in self._held.items():
            value: Tensor = args[i]
            seen, version = self._seen.get(i, (None, -1))
            if seen is not None and seen() is value and value._version == version:
                continue
            if not torch.equal(held, value):
                raise InputValuesError(
                    "the positions of the tokens among the inputs (such as img_ids) differ from those the model was "
                    "captured with, in tensors of equal shapes: an image of another form with as many tokens. Use "
                    "difa_compile.apply, which captures the model anew, or call torch._dynamo.reset() first"
                )
            if not value.is_inference():  # such tensors count no versions
                self._seen[i] = weakref.ref(value), value._version


def may_tell_positions(value: object) -> bool:
    """Whether an input's values can be read as positions: as ids, as angles, or as the numbers of a range."""
    if not isinstance(value, Tensor):
        return False
    line = value.ndim == 1 and value.dtype in (torch.int32, torch.int64)
    return line or next(tables_of(value), None) is not None or positions_given(value) is not None


def coordinates(sizes: Sequence[int]) -> Extents:
    """Dimensions that are one coordinate each."""
    return tuple((Stretch((Axis(COORDINATE - i, int(size)),) if size != 1 else ()),) for i, size in enumerate(sizes))


def ranges_known(graph: fx.Graph, values: Sequence[Any] | None) -> dict[fx.Node, range]:
    """Nodes that hold the numbers of a range: an ``arange`` of constants, or an input that does in the example."""
    found = {}
    for node in graph.nodes:
        if op_name(node) == "arange" and all(isinstance(each, int) for each in node.args) and node.args:
            found[node] = range(*node.args)
    for node, value in inputs_of(graph, values):
        if isinstance(value, Tensor) and value.ndim == 1 and len(value) and value.dtype in (torch.int32, torch.int64):
            start = int(value[0])
            if start >= 0 and torch.equal(value, torch.arange(start, start + len(value)).to(value)):
                found[node] = range(start, start + len(value))
    return found


# --- position ids -----------------------------------------------------------------------------------------------------

MOST_ROWS = 1 << 20


def positions_given(value: Tensor) -> Extents | None:
    """What the dimensions of an input enumerate, if it holds position ids or angles of a grid."""
    if value.dtype == torch.bool or value.ndim < 2 or 0 in value.shape:
        return None
    for rows, table in tables_of(value):
        parts = grids_among(table)
        if any(part.known for part in parts):
            return tuple(parts if i == rows else other(size) for i, size in enumerate(value.shape))
    if not value.is_floating_point() and not value.is_complex():
        return None
    wide = torch.view_as_real(value) if value.is_complex() else value
    for rows in range(value.ndim - 1):
        table = wide.detach().movedim(rows, 0).flatten(1)
        grid = grid_of_table(table) if len(table) > 3 and table.shape[1] > 3 else None
        if grid is not None:
            part = Stretch(tuple(Axis(COORDINATE - i, size) for i, size in enumerate(grid)))
            return tuple((part,) if i == rows else other(size) for i, size in enumerate(value.shape))
    return None


def tables_of(value: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The ways to read a tensor as a table of position ids: (which dimension is the rows, float64 (rows, 1 to 4)).

    A batch of tables counts as one if they are equal; of tables of (begin, end), the beginnings are read.
    """
    if value.is_complex() or 0 in value.shape:
        return
    plain = value.detach()
    if plain.ndim == 4 and plain.shape[-1] == 2:
        plain = plain[..., 0]
    if not 2 <= plain.ndim <= 3:
        return
    for rows, columns in sorted(itertools.permutations(range(plain.ndim), 2), key=lambda each: each[0] > each[1]):
        if 1 <= plain.shape[columns] <= 4 < plain.shape[rows] <= MOST_ROWS:
            tables = plain.movedim((rows, columns), (0, 1)).flatten(2) if plain.ndim == 3 else plain.movedim(rows, 0)
            tables = tables.reshape(*tables.shape[:2], -1)
            if bool((tables == tables[..., :1]).all()):
                yield rows, tables[..., 0].to("cpu", torch.float64)


def grids_among(table: Tensor) -> tuple[Stretch, ...]:
    """The grids of two and more axes that rows of position ids enumerate one after the other, with what is between.

    ``table``: (rows, columns). A grid's rows come in the order of its columns, row-major, each coordinate rising; they
    may start anywhere and need not be neighbours.
    """
    rows = table.shape[0]
    changes = table[1:] - table[:-1]
    one = (changes != 0).sum(1) == 1
    column = (changes != 0).to(torch.int64).argmax(1)
    rises = torch.where(one & (changes.gather(1, column[:, None])[:, 0] > 0), column, -1).tolist()
    parts: list[Stretch] = []
    start = free = 0
    while start < rows - 1:
        if rises[start] < 0:
            start += 1
            continue
        run = 1
        while start + run < rows and rises[start + run - 1] == rises[start]:
            run += 1
        sizes = [run]
        axis = rises[start]
        while axis > 0 and (found := repeats(table[start:], math.prod(sizes), axis)) is not None:
            count, axis = found
            sizes.insert(0, count)
        if len(sizes) < 2:
            start += max(1, run - 1)  # the run's last row may be a grid's first
            continue
        if start > free:
            parts.extend(other(start - free))
        parts.append(Stretch(tuple(Axis(COORDINATE - i, size) for i, size in enumerate(sizes))))
        start = free = start + math.prod(sizes)
    if free < rows:
        parts.extend(other(rows - free))
    return tuple(parts)


def repeats(table: Tensor, length: int, axis: int) -> tuple[int, int] | None:
    """How often the first ``length`` rows come again with one column before ``axis`` raised, and which; or None."""
    count = len(table) // length
    if count < 2:
        return None
    blocks = table[: count * length].reshape(count, length, -1)
    moved = blocks - blocks[:1]
    shift = moved[:, 0]
    changed = [i for i in range(table.shape[1]) if bool(shift[1, i] != 0)]
    if len(changed) != 1 or changed[0] >= axis:
        return None
    outer = changed[0]
    alone = shift.clone()
    alone[:, outer] = 0
    rising = torch.ones(count, dtype=torch.bool)
    rising[1:] = shift[1:, outer] > shift[:-1, outer]
    fits = (moved == shift[:, None]).all(2).all(1) & (alone == 0).all(1) & rising
    good = int(fits.to(torch.int64).cumprod(0).sum())
    return (good, outer) if good > 1 else None


# --- tables of angles -------------------------------------------------------------------------------------------------


def grid_of_table(table: Tensor) -> tuple[int, ...] | None:
    """The finest grid of two or three axes whose rows a table describes, each column by one axis alone, or None.

    ``table``: (rows, columns). Every axis must be told by some columns: no two of its positions may look alike there.
    """
    rows = table.shape[0]
    if not bool((table != table[:1]).any()):
        return None
    for count in (3, 2):
        found = [sizes for sizes in factorisations(rows, count) if is_separable(table, sizes)]
        if len(found) == 1:
            return found[0]
        if found:
            return None
    return None


def factorisations(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of ``count`` factors of at least two, in order."""
    if count == 1:
        if number > 1:
            yield (number,)
        return
    for first in range(2, number // 2 + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in factorisations(number // first, count - 1))


def is_separable(table: Tensor, sizes: tuple[int, ...]) -> bool:
    """Whether each column depends on one axis of a grid alone, and each axis is told by the columns that it has."""
    cube = table.reshape(*sizes, -1)
    free = torch.zeros(cube.shape[-1], dtype=torch.bool, device=table.device)
    for axis, size in enumerate(sizes):
        line = cube.movedim(axis, 0).reshape(size, -1, cube.shape[-1])
        alone = (line == line[:, :1]).all(1).all(0) & (line != line[:1]).any(1).any(0)
        mine = line[:, 0, alone]
        if not bool(alone.any()) or len(torch.unique(mine, dim=0)) != size:
            return False
        free |= alone
    constant = (table == table[:1]).all(0)
    return bool((free | constant).all())
