"""Follow the axes of the noisy sample through a graph: what each dimension of each value enumerates.

The sample's own dimensions are its axes: (batch, channels, H, W) or (batch, channels, T, H, W) or, where it comes in
packed, (batch, tokens, channels). A reshape splits an axis into patches and offsets within a patch, or merges axes; a
convolution keeps the order along an axis; permutes move axes, concatenations put other tokens beside them. So at an
attention the dimension of the tokens reads, say, ``7 others, then H x W``, and where spatial and temporal attention
alternate, ``H x W`` at one site and ``T`` at the next, with the rest in the batch.

The same is done from position ids, meshes of coordinates and tables of angles
(:mod:`difa_compile.passes.analyse.positions`), whose rows enumerate a grid: where they meet the tokens, they tell what
grid those are.

What an op does to dimensions is told by :mod:`difa_compile.passes.analyse.dimensions`; here it is only read off what
follows for positions. Behind an op that is not known there, a dimension is *other*: of known length, of unknown order.
Nothing is concluded from sizes alone.

Two descriptions carry the batch (:mod:`difa_compile.passes.analyse.batch_dims`) and no positions. A new value in the
shape of another holds nothing of it; what is written into it says what it enumerates. What a table holds at numbers in
a row, as learned positions do, does not show whether these count along a line of tokens or a grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from difa_compile.passes.analyse.dimensions import (
    Beside,
    Convolved,
    Cut,
    Description,
    Dimension,
    DimensionTable,
    Element,
    Joined,
    Kept,
    LookedUp,
    Mixed,
    New,
    Picked,
    Place,
    Placed,
    Regrouped,
    Several,
    Sized,
    Value,
    Write,
    elements_of,
)
from difa_compile.passes.graph import alias_root, mutated_argument, plain_shape, shape_of, tensor_of


@dataclass(frozen=True)
class Axis:
    """``size`` positions along dimension ``index`` of the noisy sample, in order; None where it is not known.

    ``within``: offsets inside a patch rather than patches. ``first``: where a stretch cut out of the dimension begins.
    """

    index: int | None
    size: int
    within: bool = False
    first: int = 0


@dataclass(frozen=True)
class Stretch:
    """A stretch of a dimension: the row-major product of ``axes``, outermost first; ``()`` is one position."""

    axes: tuple[Axis, ...]

    @property
    def length(self) -> int:
        return math.prod(axis.size for axis in self.axes)

    @property
    def known(self) -> bool:
        return bool(self.axes) and all(axis.index is not None for axis in self.axes)

    @property
    def partly_known(self) -> bool:
        return any(axis.index is not None for axis in self.axes)


Extent = tuple[Stretch, ...]
"""What a dimension enumerates: one part, or several where tokens of other origin were put beside the sample's."""

Extents = tuple[Extent, ...]
"""One extent per dimension of a value."""


def other(size: int) -> Extent:
    """A dimension of which only the length is known."""
    return (Stretch((Axis(None, size),) if size != 1 else ()),)


def sample_axes(latents: Sequence[fx.Node]) -> dict[fx.Node, Extents]:
    """What the noisy sample's own placeholders enumerate: their dimensions. Several where a model takes a list."""
    return {
        latent: tuple((Stretch((Axis(i, size),) if size != 1 else ()),) for i, size in enumerate(shape_of(latent)))
        for latent in latents
    }


def follow_axes(
    graph: fx.Graph,
    sources: Mapping[fx.Node, Extents | tuple[Extents, ...]],
    ranges: Mapping[fx.Node, range] | None = None,
    *,
    sample: int | None = None,
    table: DimensionTable | None = None,
) -> dict[fx.Node, Extents]:
    """Extents of every value that shows an axis of ``sources``; other values are left out.

    ``sources``: nodes with the extents of their values, of a tuple-valued node one per element. ``ranges``: nodes
    that are known to hold the numbers of a range, so that indexing with them is a slice. ``sample``: values that are
    written one entry of the first dimension at a time enumerate what this one does, whatever the others do; by default
    what all of them do. ``table``: of the graph, if there is one already.
    """
    followed = _Followed(ranges or {}, sample)
    table = table or DimensionTable()
    for source, extents in sources.items():
        if tensor_of(source) is None:
            followed.several[source] = extents  # type: ignore[assignment]
        else:
            followed.known[source] = extents  # type: ignore[assignment]
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method") or node in sources:
            continue
        if mutated_argument(node) is not None or any(followed.shows(source) for source in node.all_input_nodes):
            followed.through(node, table[node])
    return followed.known


class _Followed:
    """What is known so far of the values of a graph, node by node in the order of execution."""

    def __init__(self, ranges: Mapping[fx.Node, range], sample: int | None) -> None:
        self.ranges = ranges
        self.sample = sample
        self.known: dict[fx.Node, Extents] = {}
        self.several: dict[fx.Node, tuple[Extents, ...]] = {}
        """Of tuple-valued nodes: extents per element."""
        self.entries: dict[fx.Node, list[Extents]] = {}
        """Of values that are written one entry of the first dimension at a time: what each enumerates, for itself."""

    def shows(self, node: fx.Node) -> bool:
        return node in self.known or node in self.several

    def at(self, place: Place) -> Extent:
        """What a dimension of a value enumerates."""
        node, i = place
        return self.known[node][i] if node in self.known else other(shape_of(node)[i])

    def through(self, node: fx.Node, description: Description | None) -> None:
        """Take note of what a node's value enumerates, and what it writes into others."""
        found: Extents | None = None
        if isinstance(description, Write):
            self.write(description)
            found = self.known.get(description.target)
        elif isinstance(description, Value):
            found = self.read(description.dimensions, shape_of(node))
        elif isinstance(description, Several):
            shapes = [plain_shape(each) for each in elements_of(node)]
            self.several[node] = tuple(map(self.read, description.elements, shapes))
        elif isinstance(description, Element) and description.source in self.several:
            found = self.several[description.source][description.number]
        target = mutated_argument(node)
        if target is not None and not isinstance(description, Write) and not _stays(description, target):
            self.overwrite(target, found)
        if found is not None and tensor_of(node) is not None and any(_informed(extent) for extent in found):
            self.known[node] = found

    def read(self, dimensions: Sequence[Dimension], shape: Sequence[int]) -> Extents:
        """What a value of this shape enumerates."""
        found: list[Extent | None] = [None] * len(shape)
        for i, dimension in enumerate(dimensions):
            if not isinstance(dimension, Beside):
                found[i] = self.extent(dimension, shape[i])
        for i, dimension in enumerate(dimensions):
            if isinstance(dimension, Beside):
                along = dimensions[dimension.along], found[dimension.along] or ()
                found[i] = self.beside(dimension, *along, shape[i])
        return tuple(extent for extent in found if extent is not None)

    def extent(self, dimension: Dimension, size: int) -> Extent:
        """What a dimension of a result enumerates, whatever its other dimensions do."""
        match dimension:
            case Kept(places):
                return _best([self.at(place) for place in places])
            case Mixed(place):
                return self.at(place)
            case Joined(pieces):
                parts = [other(piece) if isinstance(piece, int) else self.at(piece) for piece in pieces]
                return _joined([part for extent in parts for part in extent])
            case Regrouped(sources, sizes, index):
                return _regrouped([self.at(source) for source in sources], sizes)[index]
            case Cut(place, start, stop, 1):
                return _cut(self.at(place), start, stop)
            case Picked(place, index) if index in self.ranges:
                numbers = self.ranges[index]
                if numbers.step == 1 and numbers.start >= 0:
                    return _cut(self.at(place), numbers.start, numbers.stop)
            case Convolved(place):
                return _convolved(self.at(place), size)
            case Placed(whole, part, at):
                numbers_written = self.written(at)
                if numbers_written is not None and numbers_written.step == 1:
                    given = other(len(numbers_written)) if part is None else self.at(part)
                    return _placed(self.at(whole), given, numbers_written.start)
            case Cut() | Picked() | Sized() | LookedUp() | New() | Beside():
                pass
        return other(size)

    def beside(self, dimension: Beside, along: Dimension, extent: Extent, size: int) -> Extent:
        """Of values that stand side by side along a dimension with this description and extent.

        Side by side in the batch, or in a dimension of their own, values may be in different orders; as channels or
        tokens of one sample they can't be.
        """
        apart = isinstance(along, New) or any(axis.index == 0 for part in extent for axis in part.axes)
        return (_common if apart else _best)([self.extent(choice, size) for choice in dimension.choices])

    def written(self, at: range | int | fx.Node | None) -> range | None:
        """The positions that a write covers, or None if they are not known or a single one."""
        return at if isinstance(at, range) else self.ranges.get(at) if isinstance(at, fx.Node) else None

    def write(self, description: Write) -> None:
        """Take note of ``target[index] = value``: what the target enumerates after it.

        Dimensions that the index leaves whole are the value's; along one that it cuts, the value stands in its place; a
        target that was something else before, or is written where it is not known, is other from then on.

        A number in front of the slices names one entry of the first dimension: one sample of a batch, which a loop
        fills with its own text and image. The target enumerates what all entries do (or number ``sample`` does).
        """
        target, dimensions = description.target, description.dimensions
        sizes, mine = shape_of(target), self.known.get(target)
        places = [each for each in dimensions if isinstance(each, Placed)]
        one = places[0].at if places and isinstance(places[0].at, int) else None
        rest = places if one is None else places[1:]
        found: Extents | None
        if any(self.written(each.at) is None for each in rest):
            found = None
        elif one is None:
            found = self.overwritten(rest, sizes, mine)
            self.entries.pop(target, None)
        else:
            start = mine[1:] if mine else tuple(map(other, sizes[1:]))
            each = self.entries.setdefault(target, [start] * sizes[0])
            each[one] = self.overwritten(rest, sizes[1:], each[one])
            chosen = each if self.sample is None else [each[min(self.sample, sizes[0] - 1)]]
            found = (other(sizes[0]), *(_common([entry[i] for entry in chosen]) for i in range(len(sizes) - 1)))
        self.overwrite(target, found)

    def overwrite(self, target: fx.Node, found: Extents | None) -> None:
        """From now on ``target`` holds values that enumerate this; None: nothing known."""
        root = alias_root(target)
        if found is None:
            self.entries.pop(target, None)
            self.known.pop(target, None)
            self.known.pop(root, None)
        elif found != self.known.get(target):
            self.known[target] = found
            if root is not target:  # what else sees that memory is not told apart
                self.entries.pop(root, None)
                self.known.pop(root, None)

    def overwritten(self, places: Sequence[Placed], sizes: Sequence[int], mine: Extents | None) -> Extents:
        """What a value of these ``sizes``, or an entry of one, enumerates once another was written to a part of it.

        ``mine``: what it enumerates before.
        """
        covers = [self.written(place.at) or range(0) for place in places]
        cut = [i for i, (covered, size) in enumerate(zip(covers, sizes, strict=True)) if covered != range(size)]
        found = []
        for i, (place, covered, size) in enumerate(zip(places, covers, sizes, strict=True)):
            given = None if place.part is None or place.part[0] not in self.known else self.at(place.part)
            before = mine[i] if mine is not None else None
            if i not in cut:
                found.append(given if given is not None and before in (None, given, other(size)) else other(size))
            elif cut == [i] and covered.step == 1:
                found.append(_placed(before or other(size), given or other(len(covered)), covered.start))
            else:
                found.append(other(size))
        return tuple(found)


def _stays(description: Description | None, target: fx.Node) -> bool:
    """Whether an op that writes into ``target`` leaves every position in its place."""
    if not isinstance(description, Value):
        return False
    return all(
        (isinstance(each, Kept) and (target, i) in each.places) or each == Mixed((target, i))
        for i, each in enumerate(description.dimensions)
    )


def _placed(whole: Extent, part: Extent, start: int) -> Extent:
    """An extent with ``part`` in place of what stood from ``start`` on."""
    stop = start + _length(part)
    if part == _cut(whole, start, stop):
        return whole
    return _joined([*_cut(whole, 0, start), *part, *_cut(whole, stop, _length(whole))])


def _length(extent: Extent) -> int:
    return sum(part.length for part in extent)


def _informed(extent: Extent) -> bool:
    return any(part.partly_known for part in extent)


def _best(extents: Sequence[Extent]) -> Extent:
    """Of extents that enumerate the same thing, the one that is known, or else known in part."""
    known = [extent for extent in extents if any(part.known for part in extent)]
    return next(iter([*known, *(extent for extent in extents if _informed(extent))]), extents[0])


def _common(extents: Sequence[Extent]) -> Extent:
    """What several extents all enumerate; other if they differ."""
    return extents[0] if all(extent == extents[0] for extent in extents) else other(_length(extents[0]))


def _regrouped(extents: Sequence[Extent], sizes: Sequence[int]) -> list[Extent]:
    """A group of dimensions dealt out to others: merged axes stand outermost first, a split one is patches and offsets.

    Where other tokens stand beside the sample's in one of them, what comes of it is other.
    """
    if any(len(extent) != 1 for extent in extents):
        return [other(size) for size in sizes]
    return _dealt([axis for extent in extents for axis in extent[0].axes], sizes)


def _dealt(axes: list[Axis], sizes: Sequence[int]) -> list[Extent]:
    """A row-major product of axes dealt out to dimensions of the given sizes."""
    queue = list(axes)
    found: list[Extent] = []
    for size in sizes:
        taken: list[Axis] = []
        while (left := size // math.prod(axis.size for axis in taken)) > 1:
            if not queue:
                return [other(s) for s in sizes]
            axis = queue.pop(0)
            if left % axis.size == 0:
                taken.append(axis)
            elif axis.size % left == 0:
                taken.append(Axis(axis.index, left, axis.within))
                queue.insert(0, Axis(axis.index, axis.size // left, within=True))
            else:
                return [other(s) for s in sizes]
        found.append((Stretch(tuple(taken)),))
    return found


def _convolved(extent: Extent, size: int) -> Extent:
    """Along a convolved dimension the order of positions stays, whatever the stride."""
    axes = extent[0].axes if len(extent) == 1 else ()
    axis = axes[0] if len(axes) == 1 else Axis(None, size)
    return (Stretch((Axis(axis.index, size, axis.within),) if size != 1 else ()),)


def _joined(parts: Sequence[Stretch]) -> Extent:
    """Parts one after the other; neighbouring unknown ones as one, and stretches of an axis that follow each other."""
    found: list[Stretch] = []
    for part in parts:
        if found and not part.partly_known and not found[-1].partly_known:
            found[-1] = Stretch((Axis(None, found[-1].length + part.length),))
        elif found and _continues(found[-1], part):
            (one,), (two,) = found[-1].axes, part.axes
            found[-1] = Stretch((Axis(one.index, one.size + two.size, one.within, one.first),))
        else:
            found.append(part)
    return tuple(found)


def _continues(one: Stretch, two: Stretch) -> bool:
    """Whether a part is the stretch of an axis that comes after another part, a stretch of the same axis."""
    if len(one.axes) != 1 or len(two.axes) != 1:
        return False
    (before,), (after,) = one.axes, two.axes
    same = before.index == after.index is not None and before.within == after.within
    return same and before.first + before.size == after.first


def _cut(extent: Extent, start: int, stop: int) -> Extent:
    """Positions ``start`` to ``stop`` of an extent: known where the cuts fall between parts or along a single axis."""
    total = _length(extent)
    start, stop = (min(max(i + total if i < 0 else i, 0), total) for i in (start, stop))
    position = 0
    kept: list[Stretch] = []
    for part in extent:
        first, last = position, position + part.length
        position = last
        if start <= first and last <= stop:
            kept.append(part)
        elif (overlap := min(last, stop) - max(first, start)) > 0:
            kept.append(_stretch(part, max(start - first, 0), overlap))
    return _joined(kept)


def _stretch(part: Stretch, start: int, length: int) -> Stretch:
    """``length`` positions of a part, from ``start`` on."""
    if len(part.axes) != 1 or not part.known:
        return Stretch((Axis(None, length),))
    (axis,) = part.axes
    return Stretch((Axis(axis.index, length, axis.within, axis.first + start),) if length != 1 else ())
