"""difa::local_attention and its kernels, against the reference in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_compile.decision import Window
from difa_compile.errors import LayoutError
from difa_compile.layout import Layout
from difa_compile.ops import reference
from difa_compile.ops.kernels import LocalCall
from difa_compile.ops.local_attention import LOCAL_ATTENTION, local_attention
from difa_compile.passes.autocast import Autocast
from difa_compile.plugins import flex
from tests.support.operands import operands
from tests.support.tolerances import assert_as_good_as_the_reference

cases = st.tuples(
    st.builds(
        Layout,
        st.one_of(
            st.tuples(st.integers(1, 40)),
            st.tuples(st.integers(1, 7), st.integers(1, 7)),
            st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
        ),
        st.integers(0, 5),
        st.integers(0, 5),
    ),
    st.builds(Window, st.sampled_from(["band", "disc", "box"]), st.integers(1, 8)),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from(["heads first", "tokens first", "fused"]),
    st.integers(1, 3),
    st.sampled_from([4, 8, 20]),
    st.sampled_from([None, 0.1, 1.0]),
)


@settings(max_examples=60)
@given(cases)
def test_masked_attention_is_the_reference(case):
    layout, window, dtype, strides, heads, dim, scale = case
    query, key, value = operands(layout, heads, dim, dtype, strides=strides)
    found = local_attention(query, key, value, layout, window, scale)
    assert_as_good_as_the_reference(found, query, key, value, layout, window, scale)
    assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("strides", ["heads first", "tokens first", "fused"])
def test_opcheck(strides):
    layout = Layout((3, 4), before=2)
    query, key, value = operands(layout, 2, 8, torch.float32, strides=strides)
    for scale, mask in ((None, None), (0.3, None), (None, torch.ones(14, 14, dtype=torch.bool))):
        torch.library.opcheck(
            LOCAL_ATTENTION,
            (query, key, value, [3, 4], 2, 0, "disc", 2, scale, mask),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static"),
        )


def test_the_fake_kernel_gives_the_strides_of_the_real_one():
    from torch._subclasses.fake_tensor import FakeTensorMode

    layout = Layout((3, 4))
    query, key, value = operands(layout, 2, 8, torch.float32, batch=3)
    real = local_attention(query, key, value, layout, Window("box", 1))
    with FakeTensorMode() as mode:
        fake = local_attention(*(mode.from_tensor(x) for x in (query, key, value)), layout, Window("box", 1))
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_operands_are_not_changed():
    layout = Layout((4, 4))
    made = operands(layout, 2, 8, torch.float32)
    kept = [x.clone() for x in made]
    local_attention(*made, layout, Window("band", 2))
    assert all(torch.equal(one, two) for one, two in zip(made, kept, strict=True))


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_comes_on_top_and_a_query_that_sees_nothing_gives_zero(kind):
    layout = Layout((4, 4))
    query, key, value = operands(layout, 2, 8, torch.float32)
    window = Window("box", 1)
    seen = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    seen[..., :8] = False  # the upper half is hidden: the first row's tokens see nothing
    mask = seen if kind == "bool" else torch.zeros(1, 1, 16, 16).masked_fill(~seen, -torch.inf)
    found = local_attention(query, key, value, layout, window, mask=mask)
    wanted = reference.local_attention(query, key, value, layout, window, mask=mask)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert not found[:, :, :4].any()
    assert found[:, :, 4:].any()
    assert "mask comes on top" in flex.why_not(
        LocalCall(Layout((256, 256)), window, None, (1, 2, 65536, 64), torch.float32, torch.device("cpu"), masked=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["disc:3", "box:1", "band:4"])
def test_pooled_keys_are_seen_by_the_image_alone_and_key_heads_serve_several_query_heads(form, dtype):
    layout, window, pooled = Layout((4, 6), before=2, after=1), Window.parse(form), 6
    query, _, _ = operands(layout, 4, 8, dtype)
    key, value = torch.randn(2, 2, 2, layout.tokens + pooled, 8, dtype=dtype).unbind(0)
    found = local_attention(query, key, value, layout, window, pooled=pooled)
    wanted = reference.local_attention(query, key, value, layout, window, pooled=pooled)
    torch.testing.assert_close(found, wanted)
    changed = local_attention(
        query, key, value.index_fill(2, torch.tensor([layout.tokens + 2]), 9.0), layout, window, pooled=pooled
    )
    moved = (changed - found).abs().amax((0, 1, 3)) > 0
    assert moved.tolist() == [False] * 2 + [True] * 24 + [False]


def test_queries_of_the_image_alone():
    layout = Layout((4, 5), before=3, after=2)
    query, key, value = operands(layout, 2, 8, torch.float32)
    for window in (Window("disc", 2), Window("band", 3)):
        whole = local_attention(query, key, value, layout, window)
        found = local_attention(query[:, :, 3:23], key, value, layout, window)
        torch.testing.assert_close(found, whole[:, :, 3:23], atol=1e-6, rtol=0)
        wanted = reference.local_attention(query[:, :, 3:23], key, value, layout, window)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
        behind = local_attention(query[:, :, 3:], key, value, layout, window)  # and the tokens after it
        torch.testing.assert_close(behind, whole[:, :, 3:], atol=1e-6, rtol=0)
        wanted = reference.local_attention(query[:, :, 3:], key, value, layout, window)
        torch.testing.assert_close(behind, wanted, atol=1e-6, rtol=0)
    with pytest.raises(LayoutError, match=r"7 queries are neither all tokens of the layout 3\+4x5\+2 \(25\)"):
        local_attention(query[:, :, :7], key, value, layout, window)


def test_text_tokens_are_exempt():
    """A text query attends to all keys, and every image query attends to text."""
    layout = Layout((4, 4), before=2, after=1)
    query, key, value = operands(layout, 2, 8, torch.float64)
    window = Window("box", 1)
    local = local_attention(query, key, value, layout, window)
    full = reference.attention(query, key, value)
    text = [0, 1, layout.tokens - 1]
    torch.testing.assert_close(local[:, :, text], full[:, :, text])
    assert not torch.allclose(local[:, :, 2:-1], full[:, :, 2:-1])
    for token in text:
        changed = value.clone()
        changed[:, :, token] += 1
        moved = (local_attention(query, key, changed, layout, window) - local).abs().amax((0, 1, 3))
        assert (moved > 0).all(), f"some token does not see text token {token}"


@pytest.mark.parametrize("tokens", [15, 17])
def test_a_layout_that_does_not_add_up_is_refused(tokens):
    query = torch.randn(1, 1, tokens, 4)
    with pytest.raises(LayoutError, match=f"the attention sequence has {tokens}"):
        local_attention(query, query, query, Layout((4, 4)), Window("band", 1))
    whole = torch.randn(1, 1, 16, 4)
    with pytest.raises(LayoutError, match=f"the attention sequence has {tokens}"):
        local_attention(whole, query, query, Layout((4, 4)), Window("band", 1))


# --- autocast ---------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMALL, NEAR, WIDE = Layout((3, 4), before=2), Window("disc", 2), Window("box", 4)


def cast_by_hand(layout, window, mask, *streams, dtype):
    """Local attention outside of autocast on values that are cast here; float64 is left alone, as autocast does."""
    streams, mask = [
        [x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x for x in each]
        for each in (streams, (mask,))
    ]
    with torch.autocast("cpu", enabled=False):
        return local_attention(*streams, layout, window, mask=mask[0])


@pytest.mark.parametrize("cast_to", [torch.bfloat16, torch.float16])
def test_autocast_casts_what_it_casts_for_scaled_dot_product_attention(cast_to):
    """Every mixture of dtypes that it serves: the same dtype, to the bit the values cast by hand, near dense ones."""
    made = operands(SMALL, 2, 8, torch.float64)
    seen = torch.rand(14, 14, generator=torch.Generator().manual_seed(0)) > 0.2
    bias = torch.randn(14, 14, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    masks = (None, seen, *(bias.to(dtype) for dtype in DTYPES))
    served = 0
    with torch.autocast("cpu", cast_to):
        for dtypes in itertools.product(DTYPES, repeat=3):
            query, key, value = (x.to(dtype) for x, dtype in zip(made, dtypes, strict=True))
            for mask in masks:
                try:
                    dense = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
                except RuntimeError:
                    continue
                served += 1
                found = local_attention(query, key, value, SMALL, NEAR, mask=mask)
                assert found.dtype == dense.dtype
                assert torch.equal(found, cast_by_hand(SMALL, NEAR, mask, query, key, value, dtype=cast_to))
                everything = local_attention(query, key, value, SMALL, WIDE, mask=mask)
                exact = F.scaled_dot_product_attention(*made, attn_mask=bias if mask is not None else None)
                if mask is not None and mask.dtype != torch.bool:
                    rounding = (dense - exact).abs().max()
                    assert (everything - exact).abs().max() <= 2 * rounding + torch.finfo(dense.dtype).eps
    assert served >= 27 * 5 + 2, "float32, bfloat16 and float16 in any mixture, and float64 alone"


def test_autocast_of_another_device_or_turned_off_casts_nothing():
    made = operands(SMALL, 2, 8, torch.float32)
    plain = local_attention(*made, SMALL, NEAR)
    with torch.autocast("cpu", torch.bfloat16):
        assert local_attention(*made, SMALL, NEAR).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(local_attention(*made, SMALL, NEAR), plain)
        with torch.autocast("cpu", torch.float16):
            assert local_attention(*made, SMALL, NEAR).dtype == torch.float16
        assert local_attention(*made, SMALL, NEAR).dtype == torch.bfloat16
    assert torch.equal(local_attention(*made, SMALL, NEAR), plain)


def test_autocast_has_a_rule_wherever_scaled_dot_product_attention_has_one():
    for device in torch._C._autocast_supported_devices():
        key = "Autocast" + torch._C._dispatch_key_for_device(device)
        theirs, ours = (
            torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
            for name in ("aten::scaled_dot_product_attention", "difa::local_attention")
        )
        assert theirs == ours, device


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_values_are_cast_as_real_ones(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = Autocast.now()
    torch.set_autocast_enabled(device, True)  # torch.autocast would ask for the device
    torch.set_autocast_dtype(device, torch.bfloat16)
    try:
        with FakeTensorMode():
            query, key, value = (torch.empty(2, 2, 14, 8, device=device) for _ in range(3))
            found = local_attention(query, key, value.bfloat16(), SMALL, NEAR)
            assert found.dtype == F.scaled_dot_product_attention(query, key, value.bfloat16()).dtype == torch.bfloat16
    finally:
        before.set()


@pytest.mark.parametrize("backward_under_autocast", [False, True])
def test_gradients_under_autocast_are_those_of_the_values_cast_by_hand(backward_under_autocast):
    query, key, value = operands(SMALL, 2, 8, torch.float32)
    mixed = (query, key, value.bfloat16())
    ours, by_hand = ([x.clone().requires_grad_() for x in mixed] for _ in range(2))
    wanted = cast_by_hand(SMALL, NEAR, None, *by_hand, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = local_attention(*ours, SMALL, NEAR)
        if backward_under_autocast:
            found.sum().backward()
    if not backward_under_autocast:
        found.sum().backward()
    wanted.sum().backward()
    for one, two, operand in zip(ours, by_hand, mixed, strict=True):
        assert one.grad.dtype == operand.dtype
        assert torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", ["around", "inside"])
def test_compiled_it_is_cast_as_eagerly(backend, place):
    def inner(query, key, value):
        return local_attention(query, key, value, SMALL, NEAR) * 2

    def region(*streams):
        with torch.autocast("cpu", torch.float16):
            return inner(*streams)

    query, key, value = operands(SMALL, 2, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        function = inner if place == "around" else region
        wanted = function(query, key, value.bfloat16())
        found = torch.compile(function, backend=backend, fullgraph=True)(query, key, value.bfloat16())
    assert found.dtype == (torch.bfloat16 if place == "around" else torch.float16)
    assert torch.equal(found, wanted)
