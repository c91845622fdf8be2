"""The eager references against definitions written out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops import reference
from tests.support.altered import sees

layouts = st.builds(
    Layout,
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    st.integers(0, 3),
    st.integers(0, 3),
)
windows = st.builds(Window, st.sampled_from(["band", "disc", "box"]), st.integers(1, 7))


@settings(max_examples=60)
@given(layouts, windows)
def test_visibility_is_the_definition_pair_by_pair(layout, window):
    assert torch.equal(reference.visible(layout, window), sees(layout, window))


@pytest.mark.parametrize(("radius", "neighbours"), [(8, 193), (16, 793), (32, 3205)])
def test_a_disc_has_as_many_neighbours_as_published(radius, neighbours):
    side = 2 * radius + 1
    row = reference.visible(Layout((side, side)), Window("disc", radius))[side * radius + radius]
    assert int(row.sum()) == neighbours


def test_a_band_of_one_sees_both_neighbours_and_wraps_over_rows():
    mask = reference.visible(Layout((2, 3)), Window("band", 1))
    assert mask[2].tolist() == [False, True, True, True, False, False]


def test_other_tokens_see_and_are_seen_by_everything():
    mask = reference.visible(Layout((3, 3), before=2, after=1), Window("box", 1))
    for token in (0, 1, 11):
        assert mask[token].all()
        assert mask[:, token].all()
    assert mask[2].tolist() == [True] * 2 + [True, True, False, True, True, False, False, False, False] + [True]


def test_attention_by_hand():
    query = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    value = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]])
    out = reference.attention(query, query, value, scale=1.0)
    one, four = math.exp(1) / (math.exp(1) + 1), math.exp(4) / (math.exp(4) + 1)
    wanted = [
        [one * 1 + (1 - one) * 5, one * 3 + (1 - one) * 7],
        [(1 - four) * 1 + four * 5, (1 - four) * 3 + four * 7],
    ]
    torch.testing.assert_close(out[0, 0], torch.tensor(wanted))
    only = reference.attention(query, query, value, torch.eye(2, dtype=torch.bool))
    torch.testing.assert_close(only, value)


def test_scale_defaults_to_the_root_of_the_head_dimension():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    assert torch.equal(reference.attention(query, key, value), reference.attention(query, key, value, scale=0.5))
    torch.testing.assert_close(
        reference.attention(query, key, value), torch.nn.functional.scaled_dot_product_attention(query, key, value)
    )


def test_window_and_residual_add_up_to_full():
    torch.manual_seed(0)
    layout, window = Layout((4, 4), after=2), Window("disc", 2)
    query, key, value = torch.randn(3, 2, 2, 18, 4, dtype=torch.float64)
    full = reference.attention(query, key, value)
    local = reference.local_attention(query, key, value, layout, window)
    assert not torch.allclose(full, local)
    torch.testing.assert_close(local + reference.residual(full, local), full)
    wide = reference.local_attention(query, key, value, layout, Window("disc", 6))
    assert torch.equal(wide, full)


@pytest.mark.parametrize("half", [0, 1])
def test_sharing_copies_the_conditional_half(half):
    value = torch.arange(12.0).reshape(4, 3)
    wanted = value[[2 * half, 2 * half + 1] * 2]
    assert torch.equal(reference.share_halves(value, half), wanted)
    assert torch.equal(reference.share_halves(value.T.contiguous(), half, 1), wanted.T)


# --- forecasts -------------------------------------------------------------------------------------------------------


def test_a_forecast_by_hand():
    outputs = [torch.tensor([3.0, 5.0]), torch.tensor([1.0, 6.0]), torch.tensor([0.0, 2.0])]
    found = reference.extrapolate(outputs, torch.tensor([3.0, -3.0, 1.0]))
    assert found.tolist() == [6.0, -1.0]
    with pytest.raises(ValueError, match="zip"):
        reference.extrapolate(outputs, torch.tensor([2.0, -1.0]))


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_a_forecast_is_summed_in_a_wide_dtype_and_rounded_once(dtype, wide):
    """Half a unit in the last place of the result, and what a sum of three products loses in the wide dtype."""
    assert reference.extrapolation_dtype(dtype) == wide
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(2, 5, 7, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
    weights = torch.tensor([10.5, -14.0, 4.5], dtype=wide)
    found = reference.extrapolate(outputs, weights)
    assert found.dtype == dtype
    parts = [output.double() * float(weight) for output, weight in zip(outputs, weights, strict=True)]
    summed = 5 * torch.finfo(wide).eps * sum(part.abs() for part in parts)
    rounded = 0.0 if dtype == wide else torch.finfo(dtype).eps / 2 * sum(parts).abs()
    assert ((found.double() - sum(parts)).abs() <= summed + rounded).all()
