"""The processors of the comparison carry out what a plan says: each decision against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers", reason="the processors are for diffusers' Attention")
from diffusers.models.attention_processor import Attention

from benchmarks.published_form import PlannedProcessor, band_mask, residual_windows
from difa_compile import Decision, Window

WINDOW = Window("band", 2)
TOKENS, WIDTH = 12, 16


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return Attention(query_dim=WIDTH, heads=2, dim_head=8, bias=True).eval()


def run(attention, decisions, inputs, conditional_half=0):
    """The attention's outputs step by step, for ``inputs[step]`` (4, 12, 16)."""
    attention.set_processor(PlannedProcessor([Decision.parse(text) for text in decisions], conditional_half, TOKENS))
    with torch.no_grad():
        return [attention(x) for x in inputs]


def inputs(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, TOKENS, WIDTH, generator=generator) for _ in range(count)]


def windowed(attention, x):
    """Window attention spelled out, before the output projection: (B, H, N, D)."""
    q, k, v = (
        layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    scores = q @ k.transpose(-1, -2) / 8**0.5
    i = torch.arange(TOKENS)
    scores = scores.masked_fill((i[:, None] - i).abs() > 2, float("-inf"))
    return scores.softmax(-1) @ v, F.scaled_dot_product_attention(q, k, v)


def project(attention, heads):
    return attention.to_out[0](heads.transpose(1, 2).flatten(2))


def test_full_is_the_unmodified_attention(attention):
    (x,) = inputs(1)
    with torch.no_grad():
        expected = attention(x)
    torch.testing.assert_close(run(attention, ["full"], [x])[0], expected)


def test_reuse_repeats_the_last_computed_output(attention):
    outputs = run(attention, ["full", "reuse", "window(band:2)", "reuse"], inputs(4))
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[3], outputs[2])
    assert not torch.equal(outputs[2], outputs[0])


@pytest.mark.parametrize("half", [0, 1])
def test_sharing_copies_the_conditional_half(attention, half):
    (x,) = inputs(1)
    with torch.no_grad():
        expected = attention(x)[2 * half : 2 * half + 2]
    (output,) = run(attention, ["full+cfg"], [x], half)
    torch.testing.assert_close(output, torch.cat([expected, expected]))


def test_residual_is_that_of_the_last_full_step_and_each_half_has_its_own(attention):
    first, second, third = inputs(3)
    outputs = run(
        attention, ["full", "window(band:2)+residual", "window(band:2)+residual+cfg"], [first, second, third], 1
    )
    with torch.no_grad():
        near, full = windowed(attention, first)
        residual = full - near
        torch.testing.assert_close(outputs[1], project(attention, windowed(attention, second)[0] + residual))
        half = project(attention, windowed(attention, third[2:])[0] + residual[2:])
    torch.testing.assert_close(outputs[2], torch.cat([half, half]))


def test_window_and_residual_on_the_same_input_is_full(attention):
    (x,) = inputs(1)
    first, second = run(attention, ["full", "window(band:2)+residual"], [x, x])
    torch.testing.assert_close(first, second)


def test_the_step_wraps_around_at_the_end_of_a_run(attention):
    x, y = inputs(2)
    once = run(attention, ["full", "reuse"], [x, y])
    twice = run(attention, ["full", "reuse"], [x, y, x, y])
    assert all(torch.equal(a, b) for a, b in zip(twice, once * 2, strict=True))


def test_residuals_are_taken_only_where_a_later_step_reads_them():
    decisions = [
        Decision.parse(t) for t in ("full", "full", "reuse", "window(band:2)+residual", "full", "window(band:2)")
    ]
    assert residual_windows(decisions) == [None, WINDOW, None, None, None, None]


def test_only_bands_are_published():
    assert int(band_mask(Window("band", 1), 4).sum()) == 10
    with pytest.raises(ValueError, match="1-D bands"):
        band_mask(Window("disc", 3), 16)
