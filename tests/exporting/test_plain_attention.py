"""Local attention in plain operations is that of the reference, in both forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_compile.decision import Window
from difa_compile.exporting.plain_attention import FEW_TOKENS, PlainLocalAttention, form_for, tiling
from difa_compile.layout import Layout
from difa_compile.ops import reference

windows = st.builds(Window, st.sampled_from(["band", "disc", "box"]), st.integers(1, 9))
layouts = st.builds(
    Layout,
    st.one_of(
        st.tuples(st.integers(1, 90)),
        st.tuples(st.integers(1, 19), st.integers(1, 19)),
        st.tuples(st.integers(1, 5), st.integers(1, 10), st.integers(1, 10)),
    ),
    st.integers(0, 3),
    st.integers(0, 3),
)


def operands(layout, queries, pooled=0, heads=2, sharing=1):
    generator = torch.Generator().manual_seed(0)
    keys = layout.tokens + pooled
    sizes = ((heads, queries), (heads // sharing, keys), (heads // sharing, keys))
    return [torch.randn(2, h, n, 4, generator=generator, dtype=torch.float64) for h, n in sizes]


@settings(max_examples=60, deadline=None)
@given(layouts, windows, st.sampled_from(["masked", "tiled"]), st.integers(0, 2))
def test_both_forms_are_exact(layout, window, form, which):
    """For all tokens, the image's alone, and the image's with those after it."""
    queries = (layout.tokens, layout.image_tokens, layout.image_tokens + layout.after)[which]
    query, key, value = operands(layout, queries)
    plain = PlainLocalAttention(layout, window, queries, form=form)
    wanted = reference.local_attention(query, key, value, layout, window)
    torch.testing.assert_close(plain(query, key, value), wanted, atol=1e-12, rtol=0)


@settings(max_examples=40, deadline=None)
@given(layouts, windows)
def test_tiles_cover_the_image_and_their_patches_what_it_sees(layout, window):
    found = tiling(layout, window)
    flat = found.queries.flatten()
    assert torch.equal(flat[found.place], torch.arange(layout.image_tokens))
    image = Layout(layout.grid)
    seen = reference.visible(image, window)
    within = torch.zeros_like(seen)
    for tile in range(len(found.queries)):
        patch = torch.zeros(image.tokens, dtype=torch.bool)
        patch[found.keys[tile]] = True
        assert patch.sum() == found.keys.shape[1], "no key stands twice in a patch"
        within[found.queries[tile]] |= patch
    assert not (seen & ~within).any()


def test_grouped_keys_scale_masks_and_pooled_keys():
    layout, window = Layout((4, 4), 1, 2), Window("box", 1)
    query, key, value = operands(layout, layout.tokens, pooled=3, sharing=2)
    wanted = reference.local_attention(query, key, value, layout, window, scale=0.3, pooled=3)
    plain = PlainLocalAttention(layout, window, layout.tokens, scale=0.3, pooled=3)
    torch.testing.assert_close(plain(query, key, value), wanted, atol=1e-12, rtol=0)
    query, key, value = operands(layout, layout.tokens)
    mask = torch.rand(2, 1, layout.tokens, layout.tokens, generator=torch.Generator().manual_seed(1)) > 0.3
    mask |= torch.eye(layout.tokens, dtype=torch.bool)
    for own in (mask, torch.where(mask, 0.5, -torch.inf).double()):
        wanted = reference.local_attention(query, key, value, layout, window, mask=own)
        plain = PlainLocalAttention(layout, window, layout.tokens, masked=True)
        torch.testing.assert_close(plain(query, key, value, own), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("grid", "window", "masked", "pooled", "form"),
    [
        ((64, 64), Window("box", 4), False, 0, "tiled"),
        ((64, 64), Window("box", 4), True, 0, "masked"),
        ((64, 64), Window("box", 4), False, 16, "masked"),
        ((64, 64), Window("box", 40), False, 0, "masked"),
        ((16, 16), Window("box", 1), False, 0, "tiled"),
        ((8, 16), Window("box", 1), False, 0, "masked"),
        ((4096,), Window("band", 64), False, 0, "tiled"),
    ],
)
def test_the_form_is_chosen_by_what_is_left_to_do(grid, window, masked, pooled, form):
    layout = Layout(grid)
    assert 128 <= FEW_TOKENS < 256
    assert form_for(layout, window, layout.tokens, masked, pooled) == form


def test_tiles_refuse_what_they_cannot_hide():
    with pytest.raises(ValueError, match="no masks and no pooled keys"):
        PlainLocalAttention(Layout((64, 64)), Window("box", 2), 4096, masked=True, form="tiled")
