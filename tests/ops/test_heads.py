"""Runs of heads, and the op that joins what was computed of them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops.heads import JOIN_HEADS, HeadSlice, slices_of
from difa_compile.ops.local_attention import local_attention

groups_of_heads = st.sets(st.integers(0, 40), min_size=1).map(lambda heads: tuple(sorted(heads)))


def named(cut):
    return [cut.first + i * cut.step for i in range(cut.count)]


@pytest.mark.parametrize(
    ("heads", "cuts"),
    [
        ((0, 1, 2, 3), [HeadSlice(0, 4)]),
        ((5,), [HeadSlice(5, 1)]),
        ((4, 7), [HeadSlice(4, 2, 3)]),
        ((1, 3, 5, 7), [HeadSlice(1, 4, 2)]),
        ((0, 1, 4, 5), [HeadSlice(0, 2), HeadSlice(4, 2, 1, 2)]),
    ],
)
def test_heads_as_slices(heads, cuts):
    assert list(slices_of(heads)) == cuts


@given(groups_of_heads)
def test_slices_name_every_head_once_and_in_order(heads):
    cuts = slices_of(heads)
    assert [head for cut in cuts for head in named(cut)] == list(heads)
    for cut in cuts:
        assert list(heads[cut.place : cut.place + cut.count]) == named(cut)


@given(groups_of_heads, st.integers(2, 5))
def test_slices_of_grouped_queries_see_a_slice_of_keys(heads, sharing):
    cuts = slices_of(heads, sharing)
    assert [head for cut in cuts for head in named(cut)] == list(heads)
    for cut in cuts:
        keys = cut.keys(sharing)
        ratio = cut.count // keys.count
        assert cut.step == keys.step == 1
        assert ratio * keys.count == cut.count
        assert [head // sharing for head in named(cut)] == [keys.first + i // ratio for i in range(cut.count)]


def drawn(heads, dtype=torch.float32):
    return torch.randn(2, 5, heads, 4, dtype=dtype).transpose(1, 2)


def test_join_puts_every_part_where_it_belongs():
    one, two, three, more = drawn(2), drawn(3), drawn(1), drawn(3)
    found = JOIN_HEADS([one, two, three], [0, 1, 4], [5, 1, 1], [more], [1], 6)
    wanted = torch.empty(2, 6, 5, 4)
    wanted[:, [0, 5]], wanted[:, [1, 2, 3]], wanted[:, [4]] = one, two + more, three
    assert torch.equal(found, wanted)
    assert found.stride() == (6 * 5 * 4, 4, 6 * 4, 1), "as attention's outputs are"


def test_join_is_an_op_with_everything_that_belongs_to_one():
    parts = [drawn(2).requires_grad_(), drawn(1).requires_grad_()]
    more = drawn(2).requires_grad_()
    torch.library.opcheck(JOIN_HEADS, (parts, [0, 1], [2, 1], [more], [0], 3))
    upstream = torch.randn(2, 3, 5, 4)
    JOIN_HEADS(parts, [0, 1], [2, 1], [more], [0], 3).backward(upstream)
    assert torch.equal(parts[0].grad, upstream[:, ::2])
    assert torch.equal(more.grad, upstream[:, ::2])
    assert torch.equal(parts[1].grad, upstream[:, 1:2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_join_is_left_alone_by_autocast(dtype):
    parts = [drawn(2, dtype), drawn(1, dtype)]
    with torch.autocast("cpu", torch.bfloat16):
        assert JOIN_HEADS(parts, [0, 2], [1, 1], [], [], 3).dtype is dtype


@pytest.mark.parametrize("kernel", ["local", "full"])
@pytest.mark.parametrize("layout", ["tokens first", "heads first"])
def test_heads_are_read_where_they_lie(kernel, layout, monkeypatch):
    """What is handed to a kernel is a view of the whole query, key and value: their memory, no copy of it."""
    made = [torch.randn(1, 36, 6, 8).transpose(1, 2) for _ in range(3)]
    whole = made if layout == "tokens first" else [one.contiguous() for one in made]
    (cut,) = slices_of((0, 2, 4))
    parts = [one[:, cut.first :: cut.step][:, : cut.count] for one in whole]
    assert all(part.data_ptr() == one.data_ptr() for part, one in zip(parts, whole, strict=True))
    assert all(part.stride(1) == 2 * one.stride(1) for part, one in zip(parts, whole, strict=True))
    given = []
    if kernel == "local":
        from difa_compile.ops import local_attention as op

        choose = op.choose_kernel

        def watched(call):
            chosen = choose(call)

            class Watched:
                @staticmethod
                def run(query, key, value, mask, call):
                    given.extend((query, key, value))
                    return chosen.run(query, key, value, mask, call)

            return Watched

        monkeypatch.setattr(op, "choose_kernel", watched)
        window = Window("box", 1)
        found = local_attention(*parts, Layout((6, 6)), window)
        monkeypatch.undo()
        wanted = local_attention(*whole, Layout((6, 6)), window)
        assert [one.data_ptr() for one in given] == [one.data_ptr() for one in whole]
        assert [one.stride() for one in given] == [one.stride() for one in parts]
    else:
        found, wanted = F.scaled_dot_product_attention(*parts), F.scaled_dot_product_attention(*whole)
    assert torch.equal(found, wanted[:, [0, 2, 4]]), "and every head is computed as it is in the whole"
