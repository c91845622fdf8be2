"""Follow the axes of the noisy sample through a graph: what each dimension of each value enumerates.

The sample's own dimensions are its axes: (batch, channels, H, W) or (batch, channels, T, H, W) or, where it comes in
packed, (batch, tokens, channels). A reshape splits an axis into patches and offsets within a patch, or merges axes; a
convolution keeps the order along an axis; permutes move axes, concatenations put other tokens beside them. So at an
attention the dimension of the tokens reads, say, ``7 others, then H x W``, and where spatial and temporal attention
alternate, ``H x W`` at one site and ``T`` at the next, with the rest in the batch.

The same is done from position ids, meshes of coordinates and tables of angles
(:mod:`difa_compile.passes.analyse.positions`), whose rows enumerate a grid: where they meet the tokens, they tell what
grid those are.

Only what an op is known to do to positions is followed. Behind any other op a dimension is *other*: of known length, of
unknown order. Nothing is concluded from sizes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from difa_compile.passes.graph import (
    CONVERSIONS,
    ELEMENTWISE,
    ORDER_KEEPING,
    REDUCTIONS,
    SHUFFLING,
    alias_root,
    argument,
    is_attention,
    is_flex,
    is_linear,
    op_name,
    reduced,
    shape_of,
    tensor_of,
)


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
class Part:
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


Extent = tuple[Part, ...]
"""What a dimension enumerates: one part, or several where tokens of other origin were put beside the sample's."""

Extents = tuple[Extent, ...]
"""One extent per dimension of a value."""


def other(size: int) -> Extent:
    """A dimension of which only the length is known."""
    return (Part((Axis(None, size),) if size != 1 else ()),)


def sample_axes(latents: Sequence[fx.Node]) -> dict[fx.Node, Extents]:
    """What the noisy sample's own placeholders enumerate: their dimensions. Several where a model takes a list."""
    return {
        latent: tuple((Part((Axis(i, size),) if size != 1 else ()),) for i, size in enumerate(shape_of(latent)))
        for latent in latents
    }


def follow_axes(
    graph: fx.Graph,
    sources: Mapping[fx.Node, Extents | tuple[Extents, ...]],
    ranges: Mapping[fx.Node, range] | None = None,
    *,
    sample: int | None = None,
) -> dict[fx.Node, Extents]:
    """Extents of every value that shows an axis of ``sources``; other values are left out.

    ``sources``: nodes with the extents of their values, of a tuple-valued node one per element. ``ranges``: nodes
    that are known to hold the numbers of a range, so that indexing with them is a slice. ``sample``: values that are
    written one entry of the first dimension at a time enumerate what this one does, whatever the others do; by default
    what all of them do.
    """
    known: dict[fx.Node, Extents] = {}
    entries: dict[fx.Node, list[Extents]] = {}
    several: dict[fx.Node, tuple[Extents, ...]] = {}
    """Of tuple-valued nodes: extents per element."""
    for source, extents in sources.items():
        if tensor_of(source) is None:
            several[source] = extents  # type: ignore[assignment]
        else:
            known[source] = extents  # type: ignore[assignment]
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method") or node in sources:
            continue
        if op_name(node) == "setitem":
            _written(node, known, entries, ranges or {}, sample)
            continue
        if not any(source in known or source in several for source in node.all_input_nodes):
            continue
        try:
            found = _of(node, known, several, ranges or {})
        except (IndexError, TypeError, ValueError, KeyError, AttributeError):
            continue  # an op form that is not read here: its value is other
        if isinstance(found, list):
            several[node] = tuple(found)
        elif found is not None and tensor_of(node) is not None:
            fits = tuple(_length(extent) for extent in found) == shape_of(node)
            if fits and any(_informed(extent) for extent in found):
                known[node] = tuple(found)
    return known


def _as_slices(items: Sequence[Any], ranges: Mapping[fx.Node, range]) -> list[Any]:
    """Items of an index, with slices in place of tensors that hold the numbers of a range.

    Only where there is one such tensor: several index together, not each its own dimension.
    """
    tensors = [item for item in items if isinstance(item, fx.Node)]
    if len(tensors) != 1 or tensors[0] not in ranges:
        return list(items)
    numbers = ranges[tensors[0]]
    return [slice(numbers.start, numbers.stop, numbers.step) if item is tensors[0] else item for item in items]


def _written(
    node: fx.Node,
    known: dict[fx.Node, Extents],
    entries: dict[fx.Node, list[Extents]],
    ranges: Mapping[fx.Node, range],
    sample: int | None,
) -> None:
    """Take note of ``target[index] = value``: what the target enumerates after it.

    Dimensions that the index leaves whole are the value's; along one that it cuts, the value stands in its place; a
    target that was something else before, or is written by an index that is not a slice between plain numbers, is other
    from then on.

    A number in front of the slices names one entry of the first dimension: one sample of a batch, which a loop fills
    with its own text and image. ``entries`` keeps what those of a target enumerate, each for itself; the target
    enumerates what all of them do (or number ``sample`` does).
    """
    target, index, value = node.args[:3]
    if not isinstance(target, fx.Node):
        return
    root = alias_root(target)
    items = _as_slices(index if isinstance(index, tuple) else [index], ranges)
    sizes = shape_of(target)
    theirs = known.get(value) if isinstance(value, fx.Node) else None
    mine = known.get(target)
    entry = items.pop(0) if items and type(items[0]) is int else None
    if any(item is not Ellipsis and not _is_known_slice(item) for item in items):
        found = None
    elif entry is None:
        found = _overwritten(sizes, items, mine, theirs)
        entries.pop(target, None)
    else:
        each = entries.setdefault(target, [mine[1:] if mine else tuple(map(other, sizes[1:]))] * sizes[0])
        each[entry] = _overwritten(sizes[1:], items, each[entry], theirs)
        chosen = each if sample is None else [each[min(sample, sizes[0] - 1)]]
        found = (other(sizes[0]), *(_common([one[i] for one in chosen]) for i in range(len(sizes) - 1)))
    if found is None:
        entries.pop(target, None)
        known.pop(target, None)
        known.pop(root, None)
    elif found != mine:
        known[target] = found
        if root is not target:  # what else sees that memory is not told apart
            entries.pop(root, None)
            known.pop(root, None)


def _is_known_slice(item: object) -> bool:
    """Whether an item of an index is a slice between plain numbers, not between values that the graph computes."""
    return isinstance(item, slice) and all(
        each is None or type(each) is int for each in (item.start, item.stop, item.step)
    )


def _overwritten(sizes: Sequence[int], items: Sequence[Any], mine: Extents | None, theirs: Extents | None) -> Extents:
    """What a value of these ``sizes`` enumerates once another was written to a part of it.

    ``items``: the index, slices and Ellipsis alone. ``mine``, ``theirs``: what the two enumerate before.
    """
    rank = len(sizes)
    place = items.index(Ellipsis) if Ellipsis in items else len(items)
    slices = [item for item in items if item is not Ellipsis]
    slices = [*slices[:place], *[slice(None)] * (rank - len(slices)), *slices[place:]]
    covers = [range(size)[item] for item, size in zip(slices, sizes, strict=True)]
    cut = [i for i, (covered, size) in enumerate(zip(covers, sizes, strict=True)) if len(covered) != size]
    found = []
    for i, (covered, size) in enumerate(zip(covers, sizes, strict=True)):
        position = i - rank + len(theirs) if theirs is not None else -1
        given = theirs[position] if theirs is not None and position >= 0 else None
        before = mine[i] if mine is not None else None
        if i not in cut:
            found.append(given if given is not None and before in (None, given, other(size)) else other(size))
        elif cut == [i] and covered.step == 1:
            found.append(_placed(before or other(size), given or other(len(covered)), covered.start))
        else:
            found.append(other(size))
    return tuple(found)


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


def _of(
    node: fx.Node,
    known: Mapping[fx.Node, Extents],
    several: Mapping[fx.Node, tuple[Extents, ...]],
    ranges: Mapping[fx.Node, range],
) -> Extents | list[Extents] | None:
    name = op_name(node)
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None

    def of(value: fx.Node) -> Extents:
        return known.get(value) or tuple(other(size) for size in shape_of(value))

    if name == "getitem" and first in several:
        return several[first][node.args[1]]  # type: ignore[index]
    if is_attention(node):
        query, value = of(argument(node, 0, "query")), of(argument(node, 2, "value"))
        result = (*query[:-1], value[-1])
        return [result, query[:-1], query[:-1]] if is_flex(node) else result
    if is_linear(node) and first is not None:
        return (*of(first)[:-1], other(shape_of(node)[-1]))
    if name in ("matmul", "__matmul__", "bmm", "baddbmm"):
        left, right = (of(each) for each in (node.args[-2:] if name == "baddbmm" else node.args[:2]))  # type: ignore[arg-type]
        if len(left) < 2 or len(right) < 2:
            return None
        return (*_broadcast([left[:-2], right[:-2]], shape_of(node)[:-2]), left[-2], right[-1])
    if name == "outer":
        return (of(first)[0], of(argument(node, 1, "vec2"))[0])  # type: ignore[arg-type]
    if name == "einsum":
        return _einsum(node, of)
    if name in ("conv1d", "conv2d", "conv3d") and first is not None:
        return _convolved(of(first), shape_of(node))
    if name in ("cat", "concat", "concatenate"):
        return _concatenated(node, of)
    if name == "pad_sequence" and argument(node, 1, "batch_first", False):
        rows = [of(value) for value in argument(node, 0, "sequences")]
        return _broadcast([(other(len(rows)), *row) for row in rows], shape_of(node))
    if name == "stack":
        parts = [of(value) for value in argument(node, 0, "tensors")]
        axis = argument(node, 1, "dim", 0) % (len(parts[0]) + 1)
        merged = [_common([part[i] for part in parts]) for i in range(len(parts[0]))]
        return (*merged[:axis], other(len(parts)), *merged[axis:])
    if name == "pad":
        return _padded(node, of)
    if first is None:
        return (
            _broadcast([of(value) for value in node.all_input_nodes], shape_of(node)) if name in ELEMENTWISE else None
        )
    if name in ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"):
        return reshaped(of(first), shape_of(node))
    if name in ("empty_like", "zeros_like", "ones_like"):
        return None  # new values; what is written into them says what they enumerate
    if name == "getattr" and node.args[1] in ("mT", "mH"):
        return (*of(first)[:-2], of(first)[-1], of(first)[-2])
    if name == "getattr" and node.args[1] == "T":
        return tuple(reversed(of(first)))
    if name in ("transpose", "swapaxes", "swapdims", "t", "adjoint"):
        rank = len(shape_of(first))
        one, two = (argument(node, i, f"dim{i - 1}", i - 3) % rank for i in (1, 2))
        swap = {one: two, two: one}
        return tuple(of(first)[swap.get(i, i)] for i in range(rank))
    if name == "permute":
        order = argument(node, 1, "dims")
        order = order if isinstance(order, (list, tuple)) else node.args[1:]
        return tuple(of(first)[int(i)] for i in order)  # type: ignore[arg-type]
    if name in ("movedim", "moveaxis"):
        return _moved(node, of(first))
    if name in ("split", "split_with_sizes", "chunk", "tensor_split", "unbind"):
        return _taken_apart(node, name, of(first))
    if name == "getitem":
        return _indexed(node, of(first), ranges)
    if name == "view_as_complex":
        return of(first)[:-1]
    if name == "view_as_real":
        return (*of(first), other(2))
    if name == "narrow":
        rank = len(shape_of(first))
        axis, start, length = (argument(node, i, n) for i, n in ((1, "dim"), (2, "start"), (3, "length")))
        axis %= rank
        return tuple(_cut(e, start, start + length) if i == axis else e for i, e in enumerate(of(first)))
    if name in ("expand", "expand_as", "repeat", "repeat_interleave", "tile"):
        return _broadcast([of(first)], shape_of(node))
    if name in ("index_copy", "index_copy_"):
        return _index_copied(node, of, ranges)
    if name in ("scatter_add", "scatter_add_"):
        return of(first)  # what is added elsewhere comes from elsewhere; the first operand's positions stay
    if name in SHUFFLING:
        return None
    if name in CONVERSIONS:
        return _broadcast([of(first)], shape_of(node))
    if name in REDUCTIONS:
        kept = dict(reduced(node))
        return tuple(of(first)[kept[i]] if i in kept else other(size) for i, size in enumerate(shape_of(node)))
    if name in ELEMENTWISE or (name in ORDER_KEEPING and shape_of(node) == shape_of(first)):
        return _broadcast([of(value) for value in node.all_input_nodes if tensor_of(value) is not None], shape_of(node))
    return None


def _best(extents: Sequence[Extent]) -> Extent:
    """Of extents that enumerate the same thing, the one that is known, or else known in part."""
    known = [extent for extent in extents if any(part.known for part in extent)]
    return next(iter([*known, *(extent for extent in extents if _informed(extent))]), extents[0])


def _common(extents: Sequence[Extent]) -> Extent:
    """What several extents all enumerate; other if they differ."""
    return extents[0] if all(extent == extents[0] for extent in extents) else other(_length(extents[0]))


def _broadcast(operands: Sequence[Extents], shape: tuple[int, ...]) -> Extents:
    found = []
    for i, size in enumerate(shape):
        aligned = [e[i - len(shape) + len(e)] for e in operands if i - len(shape) + len(e) >= 0]
        found.append(_best([e for e in aligned if _length(e) == size] or [other(size)]))
    return tuple(found)


def reshaped(extents: Extents, shape: tuple[int, ...]) -> Extents:
    """Extents after a reshape to ``shape``: merged axes stand outermost first, a split axis is patches and offsets."""
    old = [extent for extent in extents if _length(extent) != 1]
    new = [size for size in shape if size != 1]
    found: list[Extent] = []
    while old or new:
        group, sizes = [old.pop(0)], [new.pop(0)]
        while (left := math.prod(map(_length, group))) != (right := math.prod(sizes)):
            if left < right:
                group.append(old.pop(0))
            else:
                sizes.append(new.pop(0))
        if len(group) == len(sizes) == 1:
            found.append(group[0])
        elif all(len(extent) == 1 for extent in group):
            found.extend(_dealt([axis for extent in group for axis in extent[0].axes], sizes))
        else:
            found.extend(other(size) for size in sizes)
    filled = iter(found)
    return tuple(other(1) if size == 1 else next(filled) for size in shape)


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
        found.append((Part(tuple(taken)),))
    return found


def _convolved(extents: Extents, shape: tuple[int, ...]) -> Extents:
    """Along a convolved dimension the order of positions stays, whatever the stride."""
    found = [extents[0], other(shape[1])]
    for extent, size in zip(extents[2:], shape[2:], strict=True):
        single = len(extent) == 1 and len(extent[0].axes) == 1
        axis = extent[0].axes[0] if single else Axis(None, size)
        found.append((Part((Axis(axis.index, size, axis.within),) if size != 1 else ()),))
    return tuple(found)


def _concatenated(node: fx.Node, of: Callable[[fx.Node], Extents]) -> Extents:
    operands = [of(value) for value in argument(node, 0, "tensors")]
    operands = [extents for extents in operands if len(extents) == len(shape_of(node))]
    axis = argument(node, 1, "dim", argument(node, 1, "axis", 0)) % len(shape_of(node))
    joined = _joined([part for extents in operands for part in extents[axis]])
    # Side by side in the batch, values may be in different orders; as channels of one position they can't be.
    samples = any(found.index == 0 for part in joined for found in part.axes)
    merge = _common if samples else _best
    return tuple(
        joined if i == axis else merge([extents[i] for extents in operands]) for i in range(len(shape_of(node)))
    )


def _joined(parts: Sequence[Part]) -> Extent:
    """Parts one after the other; neighbouring unknown ones as one, and stretches of an axis that follow each other."""
    found: list[Part] = []
    for part in parts:
        if found and not part.partly_known and not found[-1].partly_known:
            found[-1] = Part((Axis(None, found[-1].length + part.length),))
        elif found and _continues(found[-1], part):
            (one,), (two,) = found[-1].axes, part.axes
            found[-1] = Part((Axis(one.index, one.size + two.size, one.within, one.first),))
        else:
            found.append(part)
    return tuple(found)


def _continues(one: Part, two: Part) -> bool:
    """Whether a part is the stretch of an axis that comes after another part, a stretch of the same axis."""
    if len(one.axes) != 1 or len(two.axes) != 1:
        return False
    (before,), (after,) = one.axes, two.axes
    same = before.index == after.index is not None and before.within == after.within
    return same and before.first + before.size == after.first


def _padded(node: fx.Node, of: Callable[[fx.Node], Extents]) -> Extents | None:
    if argument(node, 2, "mode", "constant") != "constant":
        return None
    extents = list(of(node.args[0]))  # type: ignore[arg-type]
    amounts = argument(node, 1, "pad")
    for i in range(len(amounts) // 2):
        before, after = amounts[2 * i], amounts[2 * i + 1]
        parts = [p for p in (*other(before), *extents[-1 - i], *other(after)) if p.length]
        extents[-1 - i] = _joined(parts) if before >= 0 and after >= 0 else other(shape_of(node)[-1 - i])
    return tuple(extents)


def _cut(extent: Extent, start: int, stop: int) -> Extent:
    """Positions ``start`` to ``stop`` of an extent: known where the cuts fall between parts or along a single axis."""
    total = _length(extent)
    start, stop = (min(max(i + total if i < 0 else i, 0), total) for i in (start, stop))
    position = 0
    kept: list[Part] = []
    for part in extent:
        first, last = position, position + part.length
        position = last
        if start <= first and last <= stop:
            kept.append(part)
        elif (overlap := min(last, stop) - max(first, start)) > 0:
            kept.append(_stretch(part, max(start - first, 0), overlap))
    return _joined(kept)


def _stretch(part: Part, start: int, length: int) -> Part:
    """``length`` positions of a part, from ``start`` on."""
    if len(part.axes) != 1 or not part.known:
        return Part((Axis(None, length),))
    (axis,) = part.axes
    return Part((Axis(axis.index, length, axis.within, axis.first + start),) if length != 1 else ())


def _moved(node: fx.Node, extents: Extents) -> Extents:
    rank = len(extents)
    sources, targets = argument(node, 1, "source"), argument(node, 2, "destination")
    sources = [i % rank for i in (sources if isinstance(sources, (list, tuple)) else [sources])]
    targets = [i % rank for i in (targets if isinstance(targets, (list, tuple)) else [targets])]
    rest = iter([i for i in range(rank) if i not in sources])
    placed = dict(zip(targets, sources, strict=True))
    return tuple(extents[placed[i] if i in placed else next(rest)] for i in range(rank))


def _taken_apart(node: fx.Node, name: str, extents: Extents) -> list[Extents]:
    rank = len(extents)
    if name == "unbind":
        axis = argument(node, 1, "dim", 0) % rank
        rest = tuple(extent for i, extent in enumerate(extents) if i != axis)
        return [rest] * _length(extents[axis])
    axis = argument(node, 2, "dim", 0) % rank
    values: Sequence[Any] = node.meta.get("example_value", node.meta.get("val")) or ()
    found, start = [], 0
    for value in values:
        size = int(value.shape[axis])
        found.append(tuple(_cut(e, start, start + size) if i == axis else e for i, e in enumerate(extents)))
        start += size
    return found


def _index_copied(node: fx.Node, of: Callable[[fx.Node], Extents], ranges: Mapping[fx.Node, range]) -> Extents | None:
    """``whole.index_copy(dim, index, part)`` where the index is a range: the part stands in its place."""
    whole, part = of(node.args[0]), of(argument(node, 3, "source"))  # type: ignore[arg-type]
    numbers = ranges.get(argument(node, 2, "index"))
    if numbers is None or numbers.step != 1:
        return None
    axis = argument(node, 1, "dim") % len(whole)
    return tuple(
        _placed(one, two, numbers.start) if i == axis else _best([one, two])
        for i, (one, two) in enumerate(zip(whole, part, strict=True))
    )


def _indexed(node: fx.Node, extents: Extents, ranges: Mapping[fx.Node, range]) -> Extents | None:
    """Basic indexing: integers, slices, None and Ellipsis."""
    index = node.args[1]
    items = _as_slices(index if isinstance(index, tuple) else [index], ranges)
    named = sum(1 for item in items if item is not None and item is not Ellipsis)
    if not any(item is Ellipsis for item in items):
        items.append(Ellipsis)
    found: list[Extent] = []
    source = 0
    for item in items:
        if item is None:
            found.append(other(1))
        elif item is Ellipsis:
            found.extend(extents[source : source + len(extents) - named])
            source += len(extents) - named
        elif isinstance(item, int):
            source += 1
        elif isinstance(item, slice):
            extent = extents[source]
            source += 1
            if item == slice(None):
                found.append(extent)
            elif item.step in (None, 1):
                stop = item.stop if item.stop is not None else _length(extent)
                found.append(_cut(extent, item.start or 0, stop))
            else:
                found.append(other(len(range(*item.indices(_length(extent))))))
        else:
            return None
    return tuple(found)


def _einsum(node: fx.Node, of: Callable[[fx.Node], Extents]) -> Extents | None:
    equation, operands = node.args[0], node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    letters: dict[str, list[Extent]] = {}
    for names, operand in zip(inputs.split(","), operands, strict=True):
        for letter, extent in zip(names, of(operand), strict=True):  # type: ignore[arg-type]
            letters.setdefault(letter, []).append(extent)
    return tuple(_best(letters[letter]) for letter in output)
