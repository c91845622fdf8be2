"""Gradients of local attention, against those of the reference formula."""

import pytest
import torch

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops import gradient, reference
from difa_compile.ops.local_attention import local_attention
from tests.support.operands import operands


@pytest.mark.parametrize("form", ["disc:3", "box:1", "band:4"])
@pytest.mark.parametrize("queries", ["all", "image", "image and after"])
def test_gradients_are_those_of_the_reference_formula(form, queries, monkeypatch):
    monkeypatch.setattr(gradient, "PAIRS_AT_ONCE", 100)  # several pieces
    layout, window, pooled = Layout((4, 6), before=2, after=1), Window.parse(form), 3
    query, _, _ = operands(layout, 4, 8, torch.float64)
    key, value = torch.randn(2, 2, 2, layout.tokens + pooled, 8, dtype=torch.float64).unbind(0)
    query = query[:, :, {"all": slice(None), "image": slice(2, -1), "image and after": slice(2, None)}[queries]]
    mask = torch.rand(2, 1, 1, key.shape[2]) > 0.2
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    found, wanted = (
        attention(*inputs, layout, window, None, mask, pooled)
        for attention in (local_attention, reference.local_attention)
    )
    upstream = torch.randn_like(found)
    for one, two in zip(*(torch.autograd.grad(out, inputs, upstream) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(one, two)


def test_a_row_that_an_additive_mask_hides_has_no_gradient_and_spoils_none():
    layout = Layout((4, 4))
    query, key, value = (x.clone().requires_grad_() for x in operands(layout, 2, 8, torch.float32))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 3, :] = -torch.inf
    out = local_attention(query, key, value, layout, Window("box", 1), mask=mask)
    gradients = torch.autograd.grad(out.square().sum(), (query, key, value))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][:, :, 3].any()
    assert gradients[0][:, :, 4].any()


def test_a_second_derivative_is_refused():
    layout = Layout((2, 2))
    query, key, value = (x.clone().requires_grad_() for x in operands(layout, 1, 4, torch.float32))
    out = local_attention(query, key, value, layout, Window("box", 1))
    (first,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_the_backward_holds_few_pairs_at_a_time():
    """Memory linear in tokens: a piece's pairs are bounded, whatever the number of tokens."""
    device = torch.device("cpu")
    for form in ("disc:8", "band:64", "box:8"):
        for side in (32, 64, 128):
            layout = Layout((side, side), before=77)
            parts = list(gradient.pieces(layout, Window.parse(form), layout.tokens, 0, device))
            assert max(len(queries) * len(keys) for queries, keys in parts) <= gradient.PAIRS_AT_ONCE
            assert torch.cat([queries for queries, _ in parts]).unique().numel() == layout.tokens
