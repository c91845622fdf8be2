"""Orders of tokens for kernels that skip blocks, and FlexAttention in them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops import reference
from difa_compile.ops.kernels import LocalCall
from difa_compile.plugins import flex
from difa_compile.plugins.token_order import BLOCK, Strips, best, visited_blocks
from tests.support.tolerances import assert_as_good_as_the_reference

grids = (
    st.lists(st.integers(1, 24), min_size=1, max_size=3).map(tuple).filter(lambda g: 1 <= torch.Size(g).numel() < 900)
)
layouts = st.builds(Layout, grids, st.integers(0, 150), st.integers(0, 20))
windows = st.builds(Window, st.sampled_from(["band", "disc", "box"]), st.integers(1, 12))
strips = st.one_of(st.none(), st.builds(Strips, st.integers(1, 4), st.integers(1, 16)))


def in_order(layout, one):
    return torch.arange(layout.tokens) if one is None else one.order(layout)


def blocks_with_a_visible_pair(layout, window, one, queries, pooled):
    tokens = in_order(layout, one)
    keys = torch.cat([tokens, torch.arange(layout.tokens, layout.tokens + pooled)])
    seen = reference.visible_pairs(layout, window, tokens[layout.rows(queries)][:, None], keys)
    rows, columns = (-(-size // BLOCK) * BLOCK for size in seen.shape)
    padded = torch.zeros(rows, columns, dtype=torch.bool)
    padded[: seen.shape[0], : seen.shape[1]] = seen
    return int(padded.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK).any(3).any(1).sum())


@settings(max_examples=60)
@given(layouts, strips)
def test_an_order_keeps_every_token_and_other_tokens_in_their_places(layout, one):
    order = in_order(layout, one)
    first, last = layout.before, layout.before + layout.image_tokens
    assert torch.equal(order.sort().values, torch.arange(layout.tokens))
    assert torch.equal(order[:first], torch.arange(first))
    assert torch.equal(order[last:], torch.arange(last, layout.tokens))


@settings(max_examples=60)
@given(layouts, windows, strips, st.sampled_from(["all", "image", "image and after"]), st.integers(0, 40))
def test_every_block_with_a_visible_pair_is_counted(layout, window, one, asked, pooled):
    queries = {"all": layout.tokens, "image": layout.image_tokens}.get(asked, layout.image_tokens + layout.after)
    counted = visited_blocks(layout, window, one, queries, pooled)
    assert counted >= blocks_with_a_visible_pair(layout, window, one, queries, pooled)


@pytest.mark.parametrize("form", ["disc:8", "disc:5", "box:4"])
def test_on_a_grid_that_strips_divide_the_count_is_exact(form):
    layout, window, one = Layout((32, 48), before=128), Window.parse(form), Strips(1, 8)
    found = visited_blocks(layout, window, one, layout.tokens)
    assert found == blocks_with_a_visible_pair(layout, window, one, layout.tokens, 0)


def test_neighbours_in_the_order_are_neighbours_on_the_grid():
    """The snake: column by column, strip by strip back and forth, so only the end of a strip takes longer steps."""
    order = Strips(1, 4).order(Layout((12, 10)))
    assert order[:8].tolist() == [0, 10, 20, 30, 1, 11, 21, 31]
    assert order[40:48].tolist() == [49, 59, 69, 79, 48, 58, 68, 78]
    video = Strips(2, 2).order(Layout((2, 4, 3)))
    assert video[:8].tolist() == [0, 3, 12, 15, 1, 4, 13, 16]
    assert video[12:16].tolist() == [8, 11, 20, 23]


def test_the_order_with_the_fewest_blocks_is_taken():
    layout, window = Layout((128, 128)), Window("disc", 16)
    strips_, blocks = best(layout, window, layout.tokens)
    assert strips_ == Strips(1, 8)
    assert blocks < 0.5 * visited_blocks(layout, window, None, layout.tokens)


@pytest.mark.parametrize(
    ("layout", "window"),
    [
        (Layout((64, 64)), Window("band", 512)),  # near in the sequence already
        (Layout((4096,)), Window("disc", 64)),
        (Layout((64, 64)), Window("disc", 100)),  # everything is seen
        (Layout((8, 8)), Window("disc", 2)),  # one block
    ],
    ids=str,
)
def test_the_models_own_order_is_kept_where_none_is_better(layout, window):
    own = visited_blocks(layout, window, None, layout.tokens)
    assert best(layout, window, layout.tokens) == (None, own)


@settings(max_examples=30)
@given(layouts, windows, strips.filter(bool), st.integers(0, 9))
def test_flex_attentions_mask_in_another_order_is_the_window(layout, window, one, pooled):
    keys, mine, back = flex.orders(layout, one, torch.device("cpu"), layout.tokens, pooled)
    nothing, place = torch.tensor(0), torch.arange(layout.tokens + pooled)
    found = flex.mask_mod(layout, window, 0, keys)(nothing, nothing, place[: layout.tokens, None], place[None])
    wanted = reference.visible_pairs(layout, window, mine[:, None], keys)
    assert torch.equal(found, wanted)
    assert torch.equal(mine[back], torch.arange(layout.tokens))


@pytest.mark.slow
def test_flex_attention_in_strips_is_the_reference():
    """Text on both sides that is not asked for, a grid that nothing divides, pooled keys, grouped heads, strides."""
    layout, window, pooled = Layout((40, 90), before=10, after=3), Window("disc", 6), 20
    queries = layout.image_tokens
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, queries, 2, 16, generator=generator).transpose(1, 2)
    key, value = torch.randn(2, 1, layout.tokens + pooled, 1, 16, generator=generator).transpose(2, 3).unbind(0)
    call = LocalCall(layout, window, None, tuple(query.shape), query.dtype, query.device, False, 1, 16, pooled)
    strips_, blocks = best(layout, window, queries, pooled)
    assert strips_ is not None
    assert flex.work(call) == (blocks * 128 * 128, blocks * 128)
    found = flex.run(query, key, value, None, call)
    assert_as_good_as_the_reference(found, query, key, value, layout, window, pooled=pooled)
