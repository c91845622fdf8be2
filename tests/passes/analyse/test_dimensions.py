"""What the table says of an op against what the op does: values are changed at one position to see where it shows.

That needs no second description of the ops. A claim that a dimension of the result is that of an operand, say, is true
if an operand that is changed at position j makes a difference at position j only.
"""

import itertools
import math
import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from difa_compile.passes.analyse.dimensions import (
    RULES,
    Beside,
    Convolved,
    Cut,
    DimensionTable,
    Element,
    Joined,
    Kept,
    LookedUp,
    Mixed,
    New,
    Picked,
    Placed,
    Regrouped,
    Several,
    Sized,
    Unknown,
    UnknownForm,
    Value,
    Write,
    describe,
    groups,
)
from difa_compile.passes.graph import shape_of
from tests.support.tiny_models import graph_of

# --- ops on real tensors ----------------------------------------------------------------------------------------------


class Call:
    """A node that calls an op on tensors, which are placeholders of its graph."""

    def __init__(self, target, *args, **kwargs):
        self.graph = fx.Graph()
        self.operands = {}
        args, kwargs = (fx.node.map_aggregate(each, self.placed) for each in (args, kwargs))
        create = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        self.node = create(target, args, kwargs)
        self.node.meta["example_value"] = self.run(self.operands)
        self.description = describe(self.node)

    def placed(self, value):
        if not isinstance(value, torch.Tensor):
            return value
        node = self.graph.placeholder(f"x{len(self.operands)}")
        node.meta["example_value"] = value
        self.operands[node] = value
        return node

    def run(self, operands):
        """The result, or what was written to, with these operands."""
        given = {node: value.clone() for node, value in operands.items()}
        args, kwargs = (fx.node.map_arg(each, given.get) for each in (self.node.args, self.node.kwargs))
        target = self.node.target
        found = getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)
        return args[0] if target is operator.setitem else found

    def written(self, source):
        """As :meth:`run`, in the form of a list with one result, or several."""
        found = self.run(source)
        return list(found) if isinstance(found, (tuple, list)) else [found]

    @property
    def dimensions(self):
        """What is said of each element of the result."""
        if isinstance(self.description, Several):
            return list(self.description.elements)
        assert isinstance(self.description, (Value, Write)), self.description
        return [self.description.dimensions]


def claims(dimension, sizes):
    """What a description means, as (places, function): entries of the operand at a position for each of the places
    make a difference at which positions of the result's dimension; None: this is not claimed."""
    match dimension:
        case Kept(places):
            return [((place,), lambda j: {j}) for place in places]
        case LookedUp(place):
            return [((place,), lambda j: {j})]
        case Beside(choices, _):
            return [claim for choice in choices for claim in claims(choice, sizes)]
        case Joined(pieces):
            found, start = [], 0
            for piece in pieces:
                if isinstance(piece, int):
                    start += piece
                    continue
                found.append(((piece,), lambda j, start=start: {start + j}))
                start += shape_of(piece[0])[piece[1]]
            assert start == sizes
            return found
        case Cut(place, start, stop, step):
            taken = range(start, stop, step)
            assert len(taken) == sizes
            return [((place,), lambda j: {taken.index(j)} if j in taken else set())]
        case Regrouped(sources, into, index):
            before = [shape_of(node)[i] for node, i in sources]

            def after(*position):
                flat = sum(j * math.prod(before[k + 1 :]) for k, j in enumerate(position))
                return {flat // math.prod(into[index + 1 :]) % into[index]}

            assert into[index] == sizes
            return [(sources, after)]
        case Picked(place, index):
            numbers = index.meta["example_value"].tolist()
            return [((place,), lambda j: {i for i, number in enumerate(numbers) if number == j})]
        case Placed(whole, part, at):
            found = [((whole,), lambda j: {j})]
            if part is not None and at is not None:
                numbers = at.meta["example_value"].tolist() if isinstance(at, fx.Node) else at
                found.append(((part,), lambda j: {numbers[j]}))
            return found
    return []


def differences(call, places, position):
    """Per result, a mask of the entries that differ if the operand does at ``position`` along each of ``places``."""
    node = places[0][0]
    value = call.operands[node].clone()
    index = [slice(None)] * value.ndim
    for (_, i), j in zip(places, position, strict=True):
        index[i] = j
    part = value[tuple(index)]
    if value.dtype == torch.bool:
        value[tuple(index)] = ~part
    elif value.is_floating_point() or value.is_complex():
        value[tuple(index)] = part + 1.0 + torch.rand(part.shape)
    else:
        value[tuple(index)] = (part + 1) % (value.max() + 1)
    before, after = call.written(call.operands), call.written({**call.operands, node: value})
    return [(one != two) & ~(one.isnan() & two.isnan()) for one, two in zip(before, after, strict=True)]


def assert_true(call):
    """Everything that the description claims holds for the real result, and nothing of it is idle."""
    results = call.written(call.operands)
    assert len(results) == len(call.dimensions)
    for number, (dimensions, result) in enumerate(zip(call.dimensions, results, strict=True)):
        assert len(dimensions) == result.ndim
        for i, dimension in enumerate(dimensions):
            shows, said = 0, claims(dimension, result.shape[i])
            for places, expected in said:
                sizes = [shape_of(node)[j] for node, j in places]
                for position in itertools.product(*map(range, sizes)):
                    differs = differences(call, places, position)[number]
                    where = set(differs.nonzero()[:, i].tolist())
                    assert where <= expected(*position), (call.node.target, dimension, position, where)
                    shows += len(where)
            written_over = isinstance(dimension, (Placed, Cut, Picked))
            constant = result.numel() < 9 or any(
                isinstance(each, Mixed) for each in dimensions
            )  # one value, normalised
            told = not said or written_over or constant or not result.is_floating_point()
            assert shows or told, (call.node.target, dimension)
            if isinstance(dimension, Mixed):
                assert_equivariant(call, dimension.place, i)
            if isinstance(dimension, Convolved):
                assert_in_order(call, dimension.place, i)
            if isinstance(dimension, Sized):
                assert result.shape[i] == shape_of(dimension.place[0])[dimension.place[1]]


def assert_equivariant(call, place, i):
    """Positions in another order give the same result in that order."""
    node, j = place
    order = torch.randperm(shape_of(node)[j])
    (before,), (after,) = (
        call.written(each)
        for each in (call.operands, {**call.operands, node: call.operands[node].index_select(j, order)})
    )
    if "norm" not in str(call.node.target):  # weights are per position
        torch.testing.assert_close(after, before.index_select(i, order))


def assert_in_order(call, place, i):
    last = -1
    for j in range(shape_of(place[0])[place[1]]):
        where = differences(call, (place,), (j,))[0].nonzero()[:, i]
        if len(where):
            assert int(where.min()) >= last
            last = int(where.min())
    assert last > 0 or call.written(call.operands)[0].shape[i] == 1


SIZES = st.integers(2, 4)


@st.composite
def calls(draw, share=0, of=1):
    """Any op of the table, or of a share of it, with arguments of random shapes."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    x, rank = torch.randn(shape), len(shape)
    axis = draw(st.integers(-rank, rank - 1))
    two = draw(st.integers(-rank, rank - 1))
    size = shape[axis]
    start = draw(st.integers(0, size - 1))
    length = draw(st.integers(1, size - start))
    y = torch.randn([draw(st.sampled_from((1, n))) for n in shape[draw(st.integers(0, rank - 1)) :]])
    index = torch.randint(0, size, (draw(SIZES),))
    places = torch.randperm(size)[:length]
    part = torch.randn([length if i == axis % rank else n for i, n in enumerate(shape)])
    order = draw(st.permutations(range(rank)))
    at = (slice(None),) * (axis % rank)
    whole = math.prod(shape)
    divisor = draw(st.sampled_from([n for n in range(1, whole + 1) if whole % n == 0]))
    keep = draw(st.booleans())
    step = draw(st.integers(1, 3))
    forms = [
        lambda: Call(torch.add, x, y),
        lambda: Call(operator.mul, 2.0, x),
        lambda: Call(torch.where, x > 0, x, y),
        lambda: Call("add_", x, y),
        lambda: Call("masked_fill", x, y > 4, 9.0),
        lambda: Call("type_as", x, y.double()),
        lambda: Call("copy_", x, y),
        lambda: Call("softmax", x, axis),
        lambda: Call(F.layer_norm, x, shape[axis % rank :]),
        lambda: Call(F.normalize, x, 2.0, axis),
        lambda: Call(F.linear, x, torch.randn(3, shape[-1])),
        lambda: Call(torch.matmul, x, torch.randn(*y.shape[-rank:-2], shape[-1], 3)),
        lambda: Call(torch.bmm, x.reshape(1, -1, divisor), torch.randn(1, divisor, 3)),
        lambda: Call(torch.outer, x.flatten(), y.flatten()),
        lambda: Call(torch.cat, [x, torch.randn(part.shape), x + 1], axis),
        lambda: Call(torch.cat, [x, torch.randn(part.shape)], dim=axis),
        lambda: Call(torch.stack, [x, x + 1], axis),
        lambda: Call(nn.utils.rnn.pad_sequence, [x, x[:1] + 1], True),
        lambda: Call(F.pad, x, (start, 1, 0, length)),
        lambda: Call(F.pad, x, (-1, 2) if shape[-1] > 1 else (0, 2)),
        lambda: Call("reshape", x, divisor, whole // divisor),
        lambda: Call("reshape", x, (-1, *shape[1:])),
        lambda: Call("flatten", x, axis % rank),
        lambda: Call("squeeze", x),
        lambda: Call("unsqueeze", x, axis),
        lambda: Call("transpose", x, axis, two),
        lambda: Call(torch.swapaxes, x, axis0=axis, axis1=two),
        lambda: Call("permute", x, *order),
        lambda: Call("permute", x, dims=[i - rank for i in order]),
        lambda: Call(torch.movedim, x, axis, two),
        lambda: Call(getattr, x, "mT"),
        lambda: Call("split", x, step, dim=axis),
        lambda: Call("chunk", x, step, axis),
        lambda: Call("tensor_split", x, step, axis),
        lambda: Call("unbind", x, axis),
        lambda: Call("select", x, axis, start),
        lambda: Call("narrow", x, axis, start - size if keep else start, length),
        lambda: Call("index_select", x, axis, index),
        lambda: Call(operator.getitem, x, (*at, slice(start, None if keep else start + length, step))),
        lambda: Call(operator.getitem, x, (*at, None, start)),
        lambda: Call(operator.getitem, x, (..., slice(-1, None), None)),
        lambda: Call(operator.getitem, x, (*at, index)),
        lambda: Call(operator.getitem, x, (*at, index[:, None])),
        lambda: Call(operator.getitem, x, (0, torch.zeros(2, dtype=torch.long)) if keep else index % shape[0]),
        lambda: Call(operator.setitem, x, (*at, slice(start, start + length)), part),
        lambda: Call(operator.setitem, x, (*at, places), part),
        lambda: Call(operator.setitem, x, (*at, start), torch.randn(x.select(axis, 0).shape)),
        lambda: Call(operator.setitem, x, (None, ..., slice(0, 1)), torch.randn(1, *shape[:-1], 1)),
        lambda: Call("index_copy", x, axis, places, part),
        lambda: Call("index_add", x, axis, places, part),
        lambda: Call("scatter_add", x, axis, torch.randint(0, size, part.shape), part),
        lambda: Call("expand", x[None], 3, *shape),
        lambda: Call("repeat", x, *[1 + (i == axis % rank) for i in range(rank)]),
        lambda: Call("repeat_interleave", x, 1 + keep, axis),
        lambda: Call("repeat_interleave", x, torch.full((size,), 2), dim=axis),
        lambda: Call(torch.view_as_real, torch.complex(x, x + 1)),
        lambda: Call(F.embedding, torch.randint(0, 5, shape), torch.randn(5, 3)),
        lambda: Call(torch.zeros_like, x),
        lambda: Call("new_zeros", x, shape),
        lambda: Call("sort", x, axis),
        lambda: Call("cumsum", x, axis),
        lambda: Call("topk", x, 1, axis),
        lambda: Call("sum", x, axis, keepdim=keep),
        lambda: Call("mean", x, [axis, two] if axis % rank != two % rank else [axis], keep),
        lambda: Call("norm", x, 2, axis),
        lambda: Call("std", x, False),
    ]  # fmt: skip
    return draw(st.sampled_from(forms[share::of]))()


@pytest.mark.parametrize("share", range(4))
@settings(max_examples=70)
@given(st.data())
def test_what_is_said_of_an_op_is_true_of_its_result(share, data):
    assert_true(data.draw(calls(share, 4)))


def places(call, *dims, operand=0):
    node = list(call.operands)[operand]
    return tuple((node, i) for i in dims)


def test_the_words_of_the_table():
    """What is not only true but is to be said: one example of each word."""
    x, y = torch.randn(2, 3, 4), torch.randn(3, 1)
    call = Call(torch.add, x, y)
    one, two = call.operands
    assert call.dimensions == [(Kept(((one, 0),)), Kept(((one, 1), (two, 0))), Kept(((one, 2),)))]
    call = Call("softmax", x, -1)
    assert call.dimensions[0][2] == Mixed(*places(call, 2))
    call = Call(torch.cat, [x, x[:, :1]], 1)
    assert call.dimensions[0][1] == Joined((*places(call, 1), *places(call, 1, operand=1)))
    assert call.dimensions[0][0] == Beside((Kept(places(call, 0)), Kept(places(call, 0, operand=1))), 1)
    call = Call(torch.stack, [x, x], 1)
    assert call.dimensions[0][1] == New()
    call = Call("reshape", x, 6, 4)
    assert call.dimensions == [(Regrouped(places(call, 0, 1), (6,), 0), Kept(places(call, 2)))]
    call = Call(operator.getitem, x, (slice(None), None, slice(1, None), 0))
    assert call.dimensions == [(Kept(places(call, 0)), New(), Cut(*places(call, 1), 1, 3))]
    call = Call(operator.getitem, x, (..., slice(None, None, 3)))
    assert call.dimensions[0][2] == Cut(*places(call, 2), 0, 4, 3)
    call = Call("narrow", x, 1, -2, 1)
    assert call.dimensions[0][1] == Cut(*places(call, 1), 1, 2)
    assert_true(call)
    call = Call("index_select", x, 1, torch.tensor([2, 0]))
    assert call.dimensions[0][1] == Picked(*places(call, 1), list(call.operands)[1])
    call = Call(operator.setitem, x, (slice(None), slice(1, 3)), x[:, :2])
    assert call.description.target is next(iter(call.operands))
    assert call.dimensions[0][1] == Placed(*places(call, 1), *places(call, 1, operand=1), range(1, 3))
    call = Call(operator.setitem, x, (slice(None), slice(1, 3)), torch.randn(2, 4))  # broadcast along the first
    assert [each.part for each in call.dimensions[0]] == [None, *places(call, 0, 1, operand=1)]
    assert_true(call)
    call = Call("copy_", x, y)
    assert call.dimensions[0][1] == Placed(*places(call, 1), *places(call, 0, operand=1), range(3))
    call = Call(F.conv2d, torch.randn(2, 3, 4, 4), torch.randn(5, 3, 2, 2))
    assert call.dimensions[0] == (Kept(places(call, 0)), New(), *map(Convolved, places(call, 2, 3)))
    call = Call(F.embedding, torch.arange(3), x[0])
    assert call.dimensions[0] == (LookedUp(*places(call, 0)), New())
    call = Call(torch.zeros_like, x)
    assert call.dimensions[0][1] == Sized(*places(call, 1))
    call = Call("sum", x, 1)
    assert call.dimensions[0] == (Kept(places(call, 0)), Kept(places(call, 2)))


def test_convolutions_with_and_without_samples():
    for shape in ((2, 3, 8, 6), (3, 8, 6)):
        for stride, dilation in ((1, 1), (2, 1), (3, 2)):
            call = Call(F.conv2d, torch.randn(shape), torch.randn(4, 3, 2, 2), None, stride, 1, dilation)
            assert [type(each) for each in call.dimensions[0]][-3:] == [New, Convolved, Convolved]
            assert_true(call)


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(heads, masked):
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, heads, 5, 8)
    mask = torch.randn(2, 4, 3, 5) if masked else None
    call = Call(F.scaled_dot_product_attention, query, key, key + 1, mask, enable_gqa=heads == 2)
    assert len(call.dimensions[0][0].places) == 3 + masked
    assert_true(call)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("b h i d, b j h d -> b i h j", [(2, 3, 4, 5), (2, 4, 3, 5)]),
        ("ij,jk->ik", [(2, 3), (3, 4)]),
        ("bi,bj->bij", [(2, 3), (1, 4)]),
    ],
)
def test_einsum(equation, shapes):
    call = Call(torch.einsum, equation, *map(torch.randn, shapes))
    assert not any(isinstance(each, New) for each in call.dimensions[0])
    assert_true(call)


@pytest.mark.parametrize(
    "call",
    [
        Call(F.group_norm, torch.randn(2, 4, 3), 2),
        Call(F.instance_norm, torch.randn(2, 4, 3)),
        Call(F.batch_norm, torch.randn(2, 4, 3), torch.zeros(4), torch.ones(4)),
        Call(F.batch_norm, torch.randn(2, 4, 3), None, None, None, None, True),
        Call(F.rms_norm, torch.randn(2, 4, 3), (3,)),
        Call(torch.baddbmm, torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(2, 5, 4)),
    ],
)
def test_norms_and_sums_of_products(call):
    assert_true(call)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (Call("roll", torch.randn(2, 3), 1, 0), "roll (node roll), whose effect on dimensions is not known"),
        (Call("flip", torch.randn(2, 3), (0,)), "flip (node flip), whose effect on dimensions is not known"),
        (Call(operator.getitem, torch.randn(3, 3), torch.ones(3) > 0), "getitem (node getitem), whose index is a mask"),
        (
            Call(operator.getitem, torch.randn(3, 3), (torch.arange(2), torch.arange(2))),
            "whose index is several tensors",
        ),
        (
            Call(operator.getitem, torch.randn(3, 4, 3), (0, slice(None), torch.arange(2))),
            "a tensor apart from numbers",
        ),
        (Call(operator.getitem, torch.randn(3, 3), [0, 2]), "whose index is a list"),
        (Call(operator.setitem, torch.randn(3, 3), torch.ones(3) > 0, 0.0), "whose index is a mask"),
        (Call(torch.einsum, "ij,jk", torch.randn(2, 3), torch.randn(3, 2)), "whose result is not written out"),
        (Call("view", torch.randn(2, 4), torch.float64), "whose sizes are not those of a reshape"),
        (Call(torch.matmul, torch.randn(2, 3), torch.randn(3)), "whose factors are not both matrices"),
        (Call(torch.where, torch.ones(2, 2)), "where (node where), whose value is not one tensor"),
        (Call("masked_scatter_", torch.zeros(2), torch.ones(2) > 0, torch.ones(2)), "masked_scatter_"),
    ],
)
def test_what_is_not_known_says_so(call, reason):
    assert isinstance(call.description, Unknown)
    assert reason in str(call.description)


def test_the_place_of_an_op_names_its_module():
    call = Call("roll", torch.randn(2, 3), 1, 0)
    call.node.meta["nn_module_stack"] = {"a": ("L['self'].blocks.0.attn", nn.Module)}
    assert str(call.description) == "roll (node roll, in blocks.0.attn), whose effect on dimensions is not known"


def test_an_error_in_a_rule_is_not_taken_for_an_unknown_form(monkeypatch):
    def broken(node):
        raise IndexError("tuple index out of range")

    monkeypatch.setitem(RULES, "roll", broken)
    with pytest.raises(IndexError):
        Call("roll", torch.randn(2, 3), 1, 0)


def test_elements_of_tuples_and_what_has_no_dimensions():
    call = Call("chunk", torch.randn(4, 2), 2)
    taken = call.graph.call_function(operator.getitem, (call.node, 1))
    taken.meta["example_value"] = torch.randn(2, 2)
    sizes = call.graph.call_method("size", (call.node,))
    sizes.meta["example_value"] = torch.Size((4, 2))
    table = DimensionTable()
    assert table[taken] == Element(call.node, 1)
    assert table[sizes] is None
    assert table[next(iter(call.operands))] is None
    assert table[taken] is table[taken]


class Moved(nn.Module):
    """The slices are between numbers that the mask's values give."""

    def forward(self, x, mask):
        begin = mask.sum().item()
        torch._check(begin <= 2)
        return x[:, begin:] + 1, x[:, :3]


def test_a_slice_between_values_that_the_graph_computes():
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        module, _ = graph_of(Moved(), {"x": torch.randn(2, 6), "mask": torch.ones(2, dtype=torch.long)})
    table = DimensionTable()
    found = [
        table[node]
        for node in module.graph.nodes
        if str(node.target).endswith("getitem>") or node.target is operator.getitem
    ]
    assert [type(each.dimensions[1]) for each in found if isinstance(each, Value)] == [New, Cut]


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ((2, 6, 8), (12, 8), [([0, 1], [0]), ([2], [1])]),
        ((12, 8), (2, 6, 8), [([0], [0, 1]), ([1], [2])]),
        ((2, 6, 8), (2, 6, 2, 4), [([0], [0]), ([1], [1]), ([2], [2, 3])]),
        ((2, 1, 8), (2, 8, 1), [([0], [0]), ([2], [1])]),
        ((4, 3), (3, 4), [([0, 1], [0, 1])]),
        ((2, -1, 8), (2, -1, 2, 4), [([0], [0]), ([1], [1]), ([2], [2, 3])]),
        ((1, 1), (), []),
    ],
)
def test_groups_of_a_reshape(before, after, found):
    assert list(groups(before, after)) == found


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 3), (7,)), ((-1, 2), (2, -1)), ((-1, 2), (-1, 4)), ((-1, -1), (-1, -1)), ((2, 0), (0, 3))],
)
def test_a_reshape_between_sizes_that_are_not_known_is_not_read(before, after):
    with pytest.raises(UnknownForm):
        list(groups(before, after))
