"""What each op does to dimensions: how the dimensions of its result follow from those of its operands.

This is the one place that knows. For each op :data:`RULES` has a function that describes the result's dimensions, one
by one, in the terms below; what can be concluded from that is left to who asks: which positions of the noisy sample a
dimension enumerates (:mod:`difa_compile.passes.analyse.axes`), or which dimension is the batch
(:mod:`difa_compile.passes.analyse.batch_dims`).

====================  ================================================================================================
:class:`Kept`         position for position that of an operand, or of several that stand against each other
:class:`Mixed`        as kept, but every entry depends on the whole dimension: softmax, norms
:class:`Beside`       position for position that of one of several, told apart by another dimension: cat, stack
:class:`Regrouped`    a row-major group of dimensions dealt out to other sizes: reshapes
:class:`Joined`       stretches one after the other: cat, constant padding
:class:`Cut`          a stretch of it, or every so many-th position: slices, split
:class:`Convolved`    in order, each position from a neighbourhood, with any stride
:class:`Picked`       positions in an order that a value of the graph says
:class:`Placed`       its own positions, some of which were written
:class:`LookedUp`     what a table holds at the entries of the operand
:class:`Sized`        a new one, as long as that of the operand, of which nothing else is used
:class:`New`          anything else: of other origin, summed over, or not told apart
====================  ================================================================================================

A description is true of the op whatever the sizes are, save that dimensions which are broadcast or cut are told from
whole ones by their sizes. An op without a rule, and a form of an op that its rule does not read, is :class:`Unknown`,
with the reason: rules raise :class:`UnknownForm` for it. Any other exception is an error in a rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from difa_compile.passes.graph import (
    argument,
    is_attention,
    is_flex,
    is_linear,
    module_path,
    mutated_argument,
    op_name,
    plain_shape,
    shape_of,
    tensor_of,
)

Place = tuple[fx.Node, int]
"""A dimension of a node's value."""


@dataclass(frozen=True)
class New:
    """Not a dimension of an operand."""


@dataclass(frozen=True)
class Sized:
    """A new dimension that is as long as ``place``."""

    place: Place


@dataclass(frozen=True)
class LookedUp:
    """Each position holds what a table has at the entry of ``place`` there."""

    place: Place


@dataclass(frozen=True)
class Kept:
    """Each position comes from the same position of every one of ``places``, which are all as long."""

    places: tuple[Place, ...]


@dataclass(frozen=True)
class Mixed:
    """As :class:`Kept`, but what stands at a position depends on all positions."""

    place: Place


@dataclass(frozen=True)
class Joined:
    """Stretches one after the other: a dimension of an operand, or so many positions that come from none."""

    pieces: tuple[Place | int, ...]


@dataclass(frozen=True)
class Beside:
    """Each position is that of one of ``choices``; of which one, the position along dimension ``along`` says."""

    choices: tuple[Kept | Joined, ...]
    along: int


@dataclass(frozen=True)
class Regrouped:
    """Number ``index`` of the ``sizes`` to which the row-major product of the dimensions ``sources`` is dealt out.

    None of them is of size 1, and no smaller part of ``sources`` makes some of ``sizes``.
    """

    sources: tuple[Place, ...]
    sizes: tuple[int, ...]
    index: int


@dataclass(frozen=True)
class Cut:
    """Positions ``start``, ``start + step`` and so on before ``stop``, plain and in range; never all of them."""

    place: Place
    start: int
    stop: int
    step: int = 1


@dataclass(frozen=True)
class Convolved:
    """Positions in the order of ``place``, each made of a neighbourhood there, any number of them."""

    place: Place


@dataclass(frozen=True)
class Picked:
    """Positions of ``place`` in the order of the numbers in the one-dimensional value of ``index``."""

    place: Place
    index: fx.Node


@dataclass(frozen=True)
class Placed:
    """The positions of ``whole`` after a write. ``at``: which were written; a number: that one; a node: those its value
    says; None: a stretch that the graph computes. ``part``: what the written positions come from, where that lines up.
    """

    whole: Place
    part: Place | None
    at: range | int | fx.Node | None


Dimension = New | Sized | LookedUp | Kept | Mixed | Joined | Beside | Regrouped | Cut | Convolved | Picked | Placed
Dimensions = tuple[Dimension, ...]


@dataclass(frozen=True)
class Value:
    """Of an op with one value."""

    dimensions: Dimensions


@dataclass(frozen=True)
class Several:
    """Of an op whose value is a tuple."""

    elements: tuple[Dimensions, ...]


@dataclass(frozen=True)
class Element:
    """An element of a tuple-valued node."""

    source: fx.Node
    number: int


@dataclass(frozen=True)
class Write:
    """Of an op that writes into ``target``, what that holds afterwards; so does the op's own value, if it has one."""

    target: fx.Node
    dimensions: Dimensions


@dataclass(frozen=True)
class Unknown:
    """Of an op that lets nothing through, and why not."""

    node: fx.Node
    reason: str

    def __str__(self) -> str:
        return f"{place_of(self.node)}, {self.reason}"


Description = Value | Several | Element | Write | Unknown


class UnknownForm(Exception):
    """An op is written in a form that a rule does not read; the message says which, as ``"whose ... is ..."``."""


def rearranged(dimension: Dimension) -> tuple[Place, ...]:
    """The operands' dimensions of which a dimension takes positions that are neither all nor neighbours in order."""
    match dimension:
        case Cut(place, _, _, step) if step != 1:
            return (place,)
        case Picked(place, _):
            return (place,)
        case Regrouped(sources, _, _):
            return sources
    return ()


class DimensionTable:
    """The descriptions of a graph's nodes, each made when it is first asked for. The graph must not change."""

    def __init__(self) -> None:
        self._found: dict[fx.Node, Description | None] = {}

    def __getitem__(self, node: fx.Node) -> Description | None:
        """What a node does to dimensions; None where it has none: inputs, sizes, numbers."""
        if node not in self._found:
            self._found[node] = describe(node)
        return self._found[node]


def describe(node: fx.Node) -> Description | None:
    """What a node does to dimensions; None where it has none."""
    if node.op not in ("call_function", "call_method") or not (has_tensors(node) or mutated_argument(node)):
        return None
    rule = rule_of(node)
    if rule is None:
        return Unknown(node, "whose effect on dimensions is not known")
    try:
        found = rule(node)
    except UnknownForm as form:
        return Unknown(node, str(form))
    value = tensor_of(node)
    if isinstance(found, Value) and value is not None and len(found.dimensions) != value.ndim:
        return Unknown(node, "whose operands come in another form than is read here")
    return found


def place_of(node: fx.Node) -> str:
    """Which op of the graph a node is, for messages: ``roll (node roll_3, in blocks.0.attn)``."""
    path = module_path(node)
    return f"{op_name(node)} (node {node.name}{', in ' + path if path else ''})"


Rule = Callable[[fx.Node], Description]


def rule_of(node: fx.Node) -> Rule | None:
    name = op_name(node)
    if is_attention(node):
        return attention
    if is_linear(node):
        return linear
    if name in RULES:
        return RULES[name]
    if mutated_argument(node) is not None and name.removesuffix("_") in POINTWISE | FIRST_ALONE:
        return RULES[name.removesuffix("_")]  # x.add_(y)
    return None


# --- what rules are written with --------------------------------------------------------------------------------------


def has_tensors(node: fx.Node) -> bool:
    """Whether a node's value is a tensor or a tuple of such."""
    return tensor_of(node) is not None or bool(elements_of(node))


def elements_of(node: fx.Node) -> list[torch.Tensor]:
    """The elements of a tuple-valued node; empty for any other."""
    value = node.meta.get("example_value", node.meta.get("val"))
    tensors = list(value) if isinstance(value, (list, tuple)) else []
    return tensors if all(isinstance(each, torch.Tensor) for each in tensors) else []


def operand(node: fx.Node, index: int, name: str) -> fx.Node:
    """An argument that must be a tensor."""
    found = argument(node, index, name)
    if not isinstance(found, fx.Node) or tensor_of(found) is None:
        raise UnknownForm(f"whose argument {name} is not one value of the graph")
    return found


def operands(node: fx.Node, index: int, name: str) -> list[fx.Node]:
    """An argument that must be a list of tensors."""
    found = argument(node, index, name)
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(each, fx.Node) for each in found):
        raise UnknownForm(f"whose argument {name} is not a list of values")
    return [each for each in found if isinstance(each, fx.Node)]


def tensors_of(node: fx.Node) -> list[fx.Node]:
    """All inputs of a node that are tensors, but for one that is only written."""
    out = node.kwargs.get("out")
    return [each for each in node.all_input_nodes if tensor_of(each) is not None and each is not out]


def whole(value: object, name: str) -> int:
    """An argument that must be a plain whole number."""
    if type(value) is not int:
        raise UnknownForm(f"whose argument {name} is not a plain number")
    return value


def dimension(value: object, rank: int, name: str = "dim") -> int:
    """An argument that must be a dimension of a value with ``rank`` dimensions, counted from the front."""
    found = whole(value, name)
    if not -rank <= found < rank:
        raise UnknownForm(f"whose argument {name} is no dimension")
    return found % rank


def several_dimensions(value: object, rank: int, name: str = "dim") -> list[int]:
    return [dimension(each, rank, name) for each in (value if isinstance(value, (list, tuple)) else [value])]


def kept(source: fx.Node, i: int) -> Kept:
    return Kept(((source, i),))


def all_kept(source: fx.Node) -> list[Dimension]:
    return [kept(source, i) for i in range(len(shape_of(source)))]


def broadcast(sources: Sequence[fx.Node], shape: Sequence[int], behind: int = 0) -> Dimensions:
    """Dimensions of ``shape`` against which those of ``sources`` stand; those that are broadcast are left out.

    They are aligned at the end, but for the last ``behind`` dimensions of the sources.
    """
    found: list[Dimension] = []
    for i, size in enumerate(shape):
        aligned = [(source, i - len(shape) + len(shape_of(source)) - behind) for source in sources]
        places = tuple((source, j) for source, j in aligned if j >= 0 and shape_of(source)[j] == size)
        found.append(Kept(places) if places else New())
    return tuple(found)


def cut(place: Place, start: int, stop: int, step: int = 1) -> Dimension:
    """Positions of a dimension; the dimension itself where these are all."""
    source, i = place
    return Kept((place,)) if len(range(start, stop, step)) == shape_of(source)[i] else Cut(place, start, stop, step)


# --- rules ------------------------------------------------------------------------------------------------------------


def attention(node: fx.Node) -> Description:
    """Samples stand against each other; heads and positions are the query's, channels the value's.

    A mask of fewer dimensions is the same for all samples.
    """
    query, key, value = (operand(node, i, name) for i, name in enumerate(("query", "key", "value")))
    mask = None if is_flex(node) else argument(node, 3, "attn_mask")
    sources = [query, key, value, *([mask] if isinstance(mask, fx.Node) else [])]
    samples = tuple((each, 0) for each in sources if aligned_at_front(each, query))
    rank = len(shape_of(query))
    result: Dimensions = (
        Kept(samples),
        *(kept(query, i) for i in range(1, rank - 1)),
        kept(value, rank - 1),
    )
    if not is_flex(node):
        return Value(result)
    return Several((result, *[result[:-1]] * (len(elements_of(node)) - 1)))


def aligned_at_front(one: fx.Node, two: fx.Node) -> bool:
    return len(shape_of(one)) == len(shape_of(two)) and shape_of(one)[0] == shape_of(two)[0]


def linear(node: fx.Node) -> Description:
    source = operand(node, 0, "input")
    return Value((*all_kept(source)[:-1], New()))


def matrix_product(node: fx.Node) -> Description:
    """Batches stand against each other; rows are the left factor's, columns the right one's."""
    name = op_name(node)
    if name == "baddbmm":
        left, right = operand(node, 1, "batch1"), operand(node, 2, "batch2")
    else:
        left, right = operand(node, 0, "input"), operand(node, 1, "mat2" if name in ("bmm", "mm") else "other")
    one, two = len(shape_of(left)), len(shape_of(right))
    if min(one, two) < 2:
        raise UnknownForm("whose factors are not both matrices")
    batches = broadcast([left, right], shape_of(node)[:-2], behind=2)
    return Value((*batches, kept(left, one - 2), kept(right, two - 1)))


def outer(node: fx.Node) -> Description:
    return Value((kept(operand(node, 0, "input"), 0), kept(operand(node, 1, "vec2"), 0)))


def einsum(node: fx.Node) -> Description:
    equation, factors = node.args[0], node.args[1:]
    if len(factors) == 1 and isinstance(factors[0], (list, tuple)):
        factors = tuple(factors[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        raise UnknownForm("whose result is not written out")
    inputs, output = equation.replace(" ", "").split("->")
    letters: dict[str, list[Place]] = {}
    for names, factor in zip(inputs.split(","), factors, strict=True):
        if not isinstance(factor, fx.Node):
            raise UnknownForm("whose factors are not all values")
        for i, letter in enumerate(names):
            letters.setdefault(letter, []).append((factor, i))
    found: list[Dimension] = []
    for letter, size in zip(output, shape_of(node), strict=True):
        found.append(Kept(tuple((source, i) for source, i in letters[letter] if shape_of(source)[i] == size)))
    return Value(tuple(found))


def convolution(node: fx.Node) -> Description:
    source = operand(node, 0, "input")
    rank, space = len(shape_of(source)), int(op_name(node)[4])
    before: list[Dimension] = [kept(source, 0), New()] if rank == space + 2 else [New()]
    return Value((*before, *(Convolved((source, i)) for i in range(rank - space, rank))))


def concatenation(node: fx.Node) -> Description:
    rank = len(shape_of(node))
    sources = [each for each in operands(node, 0, "tensors") if len(shape_of(each)) == rank]  # (0,) counts as nothing
    axis = dimension(argument(node, 1, "dim", node.kwargs.get("axis", 0)), rank)
    return Value(
        tuple(
            joined([(source, i) for source in sources], shape_of(node)[i])
            if i == axis
            else Beside(tuple(kept(source, i) for source in sources), axis)
            for i in range(rank)
        )
    )


def joined(pieces: Sequence[Place | int], size: int) -> Dimension:
    """Stretches one after the other, empty ones left out."""
    left = [piece for piece in pieces if (piece if isinstance(piece, int) else shape_of(piece[0])[piece[1]]) != 0]
    if size == -1 or any(not isinstance(piece, int) and shape_of(piece[0])[piece[1]] == -1 for piece in left):
        return New()
    if len(left) == 1 and not isinstance(left[0], int):
        return Kept((left[0],))
    return Joined(tuple(left))


def stack(node: fx.Node) -> Description:
    sources = operands(node, 0, "tensors")
    rank = len(shape_of(node))
    axis = dimension(argument(node, 1, "dim", 0), rank)
    rest: list[Dimension] = [
        Beside(tuple(kept(source, i) for source in sources), axis) for i in range(len(shape_of(sources[0])))
    ]
    return Value((*rest[:axis], New(), *rest[axis:]))


def padded_sequences(node: fx.Node) -> Description:
    """Rows of different lengths, each padded at its end, become a batch."""
    if argument(node, 1, "batch_first", False) is not True:
        raise UnknownForm("whose batch is not in front")
    rows = operands(node, 0, "sequences")
    longest = shape_of(node)[1]
    lengths: list[Kept | Joined] = []
    for row in rows:
        missing = longest - shape_of(row)[0]
        lengths.append(Joined(((row, 0), missing)) if missing else kept(row, 0))
    rest = [Beside(tuple(kept(row, i) for row in rows), 0) for i in range(1, len(shape_of(rows[0])))]
    return Value((New(), Beside(tuple(lengths), 0), *rest))


def padding(node: fx.Node) -> Description:
    source = operand(node, 0, "input")
    amounts = argument(node, 1, "pad")
    if not isinstance(amounts, (list, tuple)):
        raise UnknownForm("whose amounts are not listed")
    found = all_kept(source)
    constant = argument(node, 2, "mode", "constant") == "constant"
    for i in range(len(amounts) // 2):
        before, after = (whole(each, "pad") for each in amounts[2 * i : 2 * i + 2])
        if before or after:
            place, size = (source, len(found) - 1 - i), shape_of(node)[-1 - i]
            added = constant and min(before, after) >= 0
            found[-1 - i] = joined([before, place, after], size) if added else New()
    return Value(tuple(found))


def reshape(node: fx.Node) -> Description:
    source = operand(node, 0, "input")
    found: dict[int, Dimension] = {}
    for old, new in groups(shape_of(source), shape_of(node)):
        sizes = tuple(shape_of(node)[j] for j in new)
        for index, j in enumerate(new):
            one = len(old) == len(new) == 1
            found[j] = kept(source, old[0]) if one else Regrouped(tuple((source, i) for i in old), sizes, index)
    return Value(tuple(found.get(j, New()) for j in range(len(shape_of(node)))))


def groups(before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest groups of dimensions that a reshape makes of each other, as (old dimensions, new ones).

    Dimensions of size one belong to none. Raises :class:`UnknownForm` where the numbers of elements differ or are not
    known.
    """
    if math.prod(before) != math.prod(after) or 0 in before or max(before.count(-1), after.count(-1)) > 1:
        raise UnknownForm("whose sizes are not those of a reshape")
    old = [i for i, size in enumerate(before) if size != 1]
    new = [j for j, size in enumerate(after) if size != 1]
    while old and new:
        sources, targets = [old.pop(0)], [new.pop(0)]
        left, right = before[sources[0]], after[targets[0]]
        while left != right:
            if not (old if left < right else new):
                raise UnknownForm("which moves a size that is only known when the model runs")
            if left < right:
                sources.append(old.pop(0))
                left *= before[sources[-1]]
            else:
                targets.append(new.pop(0))
                right *= after[targets[-1]]
        yield sources, targets


def transposition(node: fx.Node) -> Description:
    source = operand(node, 0, "input")
    rank = len(shape_of(source))
    name = op_name(node)
    one, two = (
        argument(node, i + 1, f"dim{i}", node.kwargs.get(f"axis{i}")) if name not in ("t", "adjoint") else i - 2
        for i in (0, 1)
    )
    if name == "t" and rank < 2:
        return Value(tuple(all_kept(source)))
    return swapped(source, dimension(one, rank), dimension(two, rank))


def swapped(source: fx.Node, one: int, two: int) -> Description:
    swap = {one: two, two: one}
    return Value(tuple(kept(source, swap.get(i, i)) for i in range(len(shape_of(source)))))


def permutation(node: fx.Node) -> Description:
    source = operand(node, 0, "input")
    order = argument(node, 1, "dims")
    order = order if isinstance(order, (list, tuple)) else node.args[1:]
    return Value(tuple(kept(source, i) for i in several_dimensions(order, len(shape_of(source)))))


def moved(node: fx.Node) -> Description:
    source = operand(node, 0, "input")
    rank = len(shape_of(source))
    origins = several_dimensions(argument(node, 1, "source"), rank, "source")
    targets = several_dimensions(argument(node, 2, "destination"), rank, "destination")
    rest = iter([i for i in range(rank) if i not in origins])
    placed = dict(zip(targets, origins, strict=True))
    return Value(tuple(kept(source, placed[i] if i in placed else next(rest)) for i in range(rank)))


def attribute(node: fx.Node) -> Description:
    source, name = operand(node, 0, "input"), argument(node, 1, "name")
    rank = len(shape_of(source))
    if name in ("mT", "mH"):
        return swapped(source, rank - 2, rank - 1)
    if name in ("T", "H"):
        return Value(tuple(reversed(all_kept(source))))
    if name in ("real", "imag", "data"):
        return Value(tuple(all_kept(source)))
    raise UnknownForm(f"whose attribute {name} is not read")


def parts(node: fx.Node) -> Description:
    """Stretches of a dimension, as ``split`` and ``chunk`` give."""
    source = operand(node, 0, "input")
    axis = dimension(argument(node, 2, "dim", 0), len(shape_of(source)))
    sizes = [plain_shape(each)[axis] for each in elements_of(node)]
    if sum(sizes) != shape_of(source)[axis] or -1 in sizes:
        raise UnknownForm("whose parts are not the whole")
    found, start = [], 0
    for size in sizes:
        stretch = cut((source, axis), start, start + size)
        found.append(tuple(stretch if i == axis else each for i, each in enumerate(all_kept(source))))
        start += size
    return Several(tuple(found))


def unbound(node: fx.Node) -> Description:
    source = operand(node, 0, "input")
    axis = dimension(argument(node, 1, "dim", 0), len(shape_of(source)))
    rest = tuple(each for i, each in enumerate(all_kept(source)) if i != axis)
    return Several((rest,) * len(elements_of(node)))


def selection(node: fx.Node) -> Description:
    """``x.select(dim, number)``."""
    source = operand(node, 0, "input")
    axis = dimension(argument(node, 1, "dim"), len(shape_of(source)))
    return Value(tuple(each for i, each in enumerate(all_kept(source)) if i != axis))


def picked_along(node: fx.Node) -> Description:
    """``x.index_select(dim, index)``."""
    source, index = operand(node, 0, "input"), operand(node, 2, "index")
    axis = dimension(argument(node, 1, "dim"), len(shape_of(source)))
    found = all_kept(source)
    found[axis] = Picked((source, axis), index) if len(shape_of(index)) == 1 else New()
    return Value(tuple(found))


def narrow(node: fx.Node) -> Description:
    source = operand(node, 0, "input")
    axis = dimension(argument(node, 1, "dim"), len(shape_of(source)))
    start, length = whole(argument(node, 2, "start"), "start"), whole(argument(node, 3, "length"), "length")
    found, size = all_kept(source), shape_of(source)[axis]
    start += size if start < 0 else 0
    found[axis] = cut((source, axis), start, start + length)
    return Value(tuple(found))


def item(node: fx.Node) -> Description:
    """An element of a tuple, or a part of a tensor: ``x[1]``, ``x[:, 2:5]``, ``x[:, index]``."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        raise UnknownForm("whose operand is not one value of the graph")
    if tensor_of(source) is None:
        return Element(source, whole(node.args[1], "index"))
    return Value(tuple(found for found, _ in indexed(node.args[1], source)))


def indexed(index: object, source: fx.Node) -> list[tuple[Dimension, int | None]]:
    """Dimensions of ``source[index]``, each with the dimension of the source that it is a part of, None if added.

    Raises :class:`UnknownForm` for what is more than numbers, slices, None, Ellipsis and one tensor of numbers.
    """
    shape = shape_of(source)
    found: list[tuple[Dimension, int | None]] = []
    position = 0
    for each in index_items(index, len(shape)):
        if each is None:
            found.append((New(), None))
            continue
        if isinstance(each, slice):
            found.append((stretch((source, position), each), position))
        elif isinstance(each, fx.Node):
            numbers = len(shape_of(each))
            one: Dimension = Picked((source, position), each) if numbers == 1 else New()
            found += [(one, position)] * numbers
        position += 1
    return found


def index_items(index: object, rank: int) -> list[Any]:
    """The items of an index: a number, slice or node per dimension of what is indexed, and None where one is added.

    Raises :class:`UnknownForm` for what is more than numbers, slices, None, Ellipsis and one tensor of numbers.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    named = sum(1 for each in items if each is not None and each is not Ellipsis)
    dots = [i for i, each in enumerate(items) if each is Ellipsis]
    if len(dots) > 1 or named > rank:
        raise UnknownForm("whose index is not that of a tensor")
    place = dots[0] if dots else len(items)
    items = [*items[:place], *[slice(None)] * (rank - named), *items[place + 1 :]]
    for each in items:
        if isinstance(each, fx.Node) and (value := tensor_of(each)) is not None and value.dtype == torch.bool:
            raise UnknownForm("whose index is a mask")
        if each is not None and type(each) is not int and not isinstance(each, (slice, fx.Node)):
            raise UnknownForm(f"whose index is a {'list' if isinstance(each, list) else type(each).__name__}")
    tensors = [i for i, each in enumerate(items) if isinstance(each, fx.Node) and tensor_of(each) is not None]
    if len(tensors) > 1:
        raise UnknownForm("whose index is several tensors")
    numbers = [i for i, each in enumerate(items) if type(each) is int or isinstance(each, fx.Node)]
    if tensors and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise UnknownForm("whose index has a tensor apart from numbers")  # which puts its dimension in front
    return items


def stretch(place: Place, taken: slice) -> Dimension:
    """What a slice takes of a dimension."""
    source, i = place
    size = shape_of(source)[i]
    if taken == slice(None):
        return Kept((place,))
    if not has_plain_bounds(taken) or size == -1:
        return New()
    return cut(place, *taken.indices(size))


def has_plain_bounds(taken: slice) -> bool:
    """Whether a slice is between plain numbers, not between values that the graph computes."""
    return all(each is None or type(each) is int for each in (taken.start, taken.stop, taken.step))


def item_written(node: fx.Node) -> Description:
    """``target[index] = value``: the value's dimensions line up with those of the part that the index names."""
    target, index, value = node.args[:3]
    if not isinstance(target, fx.Node) or tensor_of(target) is None:
        raise UnknownForm("whose target is not one value of the graph")
    shape = shape_of(target)
    items = index_items(index, len(shape))
    given = shape_of(value) if isinstance(value, fx.Node) else ()
    slots = sum(
        len(shape_of(each)) if isinstance(each, fx.Node) else type(each) is not int for each in items
    )  # dimensions of target[index]
    slot, found = 0, list[Dimension]()
    for each in items:
        if each is None:
            slot += 1
            continue
        i = len(found)
        if not isinstance(each, (slice, fx.Node)):
            found.append(Placed((target, i), None, each))
            continue
        at: range | fx.Node | None
        if isinstance(each, slice):
            at = range(shape[i])[each] if has_plain_bounds(each) and shape[i] >= 0 else None
            wide = 1
        else:
            at, wide = each, len(shape_of(each))
        j = slot - slots + len(given)
        covered = len(at) if isinstance(at, range) else shape_of(at)[0] if at is not None and wide == 1 else None
        lines_up = wide == 1 and 0 <= j < len(given) and isinstance(value, fx.Node)
        fits = lines_up and (given[j] == covered or (covered is None and given[j] == shape[i]))
        found.append(Placed((target, i), (value, j) if fits else None, at))  # type: ignore[arg-type]
        slot += wide
    return Write(target, tuple(found))


def copied_over(node: fx.Node) -> Description:
    """``target.copy_(value)``."""
    target, value = operand(node, 0, "input"), operand(node, 1, "src")
    found: list[Dimension] = []
    for i, one in enumerate(broadcast([value], shape_of(target))):
        part = one.places[0] if isinstance(one, Kept) else None
        found.append(Placed((target, i), part, range(max(shape_of(target)[i], 0))))
    return Write(target, tuple(found))


def index_written(node: fx.Node) -> Description:
    """``whole.index_copy(dim, index, part)``, or ``index_add``, to which the part's positions are added."""
    target, index, part = operand(node, 0, "input"), operand(node, 2, "index"), operand(node, 3, "source")
    axis = dimension(argument(node, 1, "dim"), len(shape_of(target)))
    if len(shape_of(part)) != len(shape_of(target)):
        raise UnknownForm("whose source has other dimensions")
    added = op_name(node).startswith("index_add")
    return Value(
        tuple(
            Kept(((target, i), (part, i)))
            if i != axis
            else kept(target, i)
            if added
            else Placed((target, i), (part, i), index)
            for i in range(len(shape_of(target)))
        )
    )


def scattered(node: fx.Node) -> Description:
    """``whole.scatter_add(dim, index, source)``: all positions stay; what is added along ``dim`` is from elsewhere."""
    target, index = operand(node, 0, "input"), operand(node, 2, "index")
    rank = len(shape_of(target))
    axis = dimension(argument(node, 1, "dim"), rank)
    given = argument(node, 3, "src")
    sources = [each for each in (target, index, given) if isinstance(each, fx.Node) and len(shape_of(each)) == rank]
    aligned = broadcast(sources, shape_of(target))
    return Value(tuple(kept(target, i) if i == axis else aligned[i] for i in range(rank)))


def expansion(node: fx.Node) -> Description:
    """Positions again and again; a dimension whose size stays is the operand's."""
    return Value(broadcast([operand(node, 0, "input")], shape_of(node)))


def repetition(node: fx.Node) -> Description:
    """``repeat_interleave``: the dimension that is not as long as before is new."""
    source, repeats = operand(node, 0, "input"), argument(node, 1, "repeats")
    axis = argument(node, 2, "dim")
    rank = len(shape_of(source))
    if axis is None and rank != 1:
        raise UnknownForm("which flattens")
    axis = dimension(0 if axis is None else axis, rank)
    found = all_kept(source)
    if repeats != 1:
        found[axis] = New()
    return Value(tuple(found))


def as_complex(node: fx.Node) -> Description:
    return Value(tuple(all_kept(operand(node, 0, "input"))[:-1]))


def as_real(node: fx.Node) -> Description:
    return Value((*all_kept(operand(node, 0, "input")), New()))


def embedding(node: fx.Node) -> Description:
    source = operand(node, 0, "input")
    return Value((*(LookedUp((source, i)) for i in range(len(shape_of(source)))), New()))


def new_alike(node: fx.Node) -> Description:
    """New values in the shape of another."""
    source = operand(node, 0, "input")
    return Value(tuple(Sized((source, i)) for i in range(len(shape_of(source)))))


def new_values(node: fx.Node) -> Description:
    return Value(tuple(New() for _ in shape_of(node)))


def pointwise(node: fx.Node) -> Description:
    if tensor_of(node) is None:
        raise UnknownForm("whose value is not one tensor")
    return Value(broadcast(tensors_of(node), shape_of(node)))


def first_alone(node: fx.Node) -> Description:
    source = operand(node, 0, "input")
    if tensor_of(node) is None or len(shape_of(node)) != len(shape_of(source)):
        raise UnknownForm("whose value has other dimensions")
    return Value(broadcast([source], shape_of(node)))


def mixing(node: fx.Node, axes: Sequence[int]) -> Description:
    """An op of one value that looks at the whole of some dimensions."""
    source = operand(node, 0, "input")
    if shape_of(node) != shape_of(source):
        raise UnknownForm("whose value has other dimensions")
    return Value(tuple(Mixed((source, i)) if i in axes else each for i, each in enumerate(all_kept(source))))


def softmax(node: fx.Node) -> Description:
    return mixing(node, [dimension(argument(node, 1, "dim"), len(shape_of(node)))])


def normalised(node: fx.Node) -> Description:
    return mixing(node, several_dimensions(argument(node, 2, "dim", 1), len(shape_of(node))))


def layer_norm(node: fx.Node) -> Description:
    sizes, rank = argument(node, 1, "normalized_shape"), len(shape_of(node))
    if not isinstance(sizes, (list, tuple)):
        raise UnknownForm("whose normalised sizes are not listed")
    return mixing(node, range(rank - len(sizes), rank))


def group_norm(node: fx.Node) -> Description:
    return mixing(node, range(1, len(shape_of(node))))


def instance_norm(node: fx.Node) -> Description:
    return mixing(node, range(2, len(shape_of(node))))


def batch_norm(node: fx.Node) -> Description:
    trains = argument(node, 5, "training", False)
    return mixing(node, [i for i in range(len(shape_of(node))) if trains and i != 1])


def sorting(node: fx.Node) -> Description:
    """Positions along one dimension in another order or number, or summed up to each; all others stay."""
    source = operand(node, 0, "input")
    rank = len(shape_of(source))
    axis = dimension(argument(node, 2 if op_name(node) == "topk" else 1, "dim", -1), rank)
    found = tuple(New() if i == axis else each for i, each in enumerate(all_kept(source)))
    return Value(found) if tensor_of(node) is not None else Several((found,) * len(elements_of(node)))


def reduction(node: fx.Node) -> Description:
    source = operand(node, 0, "input")
    rank, shape = len(shape_of(source)), shape_of(node)
    at = 2 if op_name(node) == "norm" else 1
    given = argument(node, at, "dim", node.kwargs.get("axis"))
    if tensor_of(node) is None:
        raise UnknownForm("whose value is not one tensor")
    if given is None or isinstance(given, bool):  # std(x, unbiased)
        gone = set(range(rank))
    else:
        gone = set(several_dimensions(given, rank)) or set(range(rank))
    if len(shape) == rank:
        return Value(tuple(New() if i in gone else each for i, each in enumerate(all_kept(source))))
    if len(shape) != rank - len(gone):
        raise UnknownForm("whose reduced dimensions are not told")
    return Value(tuple(each for i, each in enumerate(all_kept(source)) if i not in gone))


# --- the table --------------------------------------------------------------------------------------------------------

POINTWISE = {
    "add", "sub", "mul", "div", "truediv", "floordiv", "neg", "abs", "pow", "exp", "log", "sin", "cos", "tanh",
    "sigmoid", "silu", "gelu", "relu", "sqrt", "rsqrt", "reciprocal", "square", "clamp", "clip", "where", "maximum",
    "minimum", "masked_fill", "iadd", "isub", "imul", "itruediv", "radd", "rsub", "rmul", "lt", "le", "gt", "ge", "eq",
    "ne", "logical_not", "logical_and", "logical_or", "fill", "zero", "softplus", "leaky_relu", "mish", "hardswish",
    "elu", "identity", "invert", "and_", "or_", "xor", "bitwise_and", "bitwise_or", "bitwise_not", "logical_xor",
    "isnan", "isfinite", "isinf", "nan_to_num", "clamp_min", "clamp_max", "round", "floor", "ceil", "sign", "erf",
    "relu6", "celu", "selu", "hardtanh", "logsigmoid", "lerp", "addcmul", "addcdiv", "conj", "expm1", "log1p",
}  # fmt: skip
"""Ops whose entry at a position comes from the operands' entries at that position, which broadcast."""

FIRST_ALONE = {
    "to", "type_as", "type", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach", "dropout", "alias",
    "int", "long", "bool", "short", "prelu", "alpha_dropout", "feature_dropout",
}  # fmt: skip
"""Ops of one value, position for position; another operand (``x.type_as(y)``) lends dtype, device or weights."""

RULES: dict[str, Rule] = {
    **dict.fromkeys(POINTWISE, pointwise),
    **dict.fromkeys(FIRST_ALONE, first_alone),
    **dict.fromkeys(("softmax", "log_softmax"), softmax),
    "normalize": normalised,
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    "group_norm": group_norm,
    "instance_norm": instance_norm,
    "batch_norm": batch_norm,
    **dict.fromkeys(("matmul", "__matmul__", "bmm", "baddbmm"), matrix_product),
    "outer": outer,
    "einsum": einsum,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    "embedding": embedding,
    **dict.fromkeys(("cat", "concat", "concatenate"), concatenation),
    "stack": stack,
    "pad_sequence": padded_sequences,
    "pad": padding,
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), reshape),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "t", "adjoint"), transposition),
    "permute": permutation,
    **dict.fromkeys(("movedim", "moveaxis"), moved),
    "getattr": attribute,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), parts),
    "unbind": unbound,
    "select": selection,
    "index_select": picked_along,
    "narrow": narrow,
    "getitem": item,
    "setitem": item_written,
    "copy_": copied_over,
    **dict.fromkeys(("index_copy", "index_copy_", "index_add", "index_add_"), index_written),
    **dict.fromkeys(("scatter_add", "scatter_add_"), scattered),
    **dict.fromkeys(("expand", "expand_as", "repeat", "tile"), expansion),
    "repeat_interleave": repetition,
    "view_as_complex": as_complex,
    "view_as_real": as_real,
    **dict.fromkeys(("empty_like", "zeros_like", "ones_like", "full_like"), new_alike),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full"), new_values),
    **dict.fromkeys(("sort", "argsort", "topk", "cumsum", "cumprod", "cumsum_", "cumprod_"), sorting),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std", "norm", "prod", "logsumexp"), reduction),
}
