"""Local attention under a mask: it serves everywhere, and keeps the mask for the next call."""

import pytest
import torch

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops import reference
from difa_compile.ops.kernels import LocalCall
from difa_compile.plugins import masked_sdpa
from tests.support.operands import operands
from tests.support.tolerances import assert_as_good_as_the_reference

LAYOUT = Layout((4, 5), before=2, after=3)
CPU = torch.device("cpu")


def call_of(query, key, window, layout=LAYOUT, pooled=0):
    shape, heads = tuple(query.shape), key.shape[1]
    return LocalCall(layout, window, None, shape, query.dtype, query.device, key_heads=heads, pooled=pooled)


@pytest.mark.parametrize("form", ["band:3", "disc:2", "box:1"])
def test_the_mask_is_the_definition_added(form):
    window = Window.parse(form)
    mask = masked_sdpa.window_mask(LAYOUT, window, CPU, torch.float32)
    assert torch.equal(mask == 0, reference.visible(LAYOUT, window))
    assert set(mask.unique().tolist()) == {0.0, -torch.inf}
    image = masked_sdpa.window_mask(LAYOUT, window, CPU, torch.float32, LAYOUT.image_tokens, 4)
    assert torch.equal(image[:, :-4], mask[2:-3])
    assert not image[:, -4:].any(), "pooled keys are seen by the image"


def test_the_mask_is_made_once():
    window = Window("disc", 3)
    one = masked_sdpa.window_mask(LAYOUT, window, CPU, torch.float32)
    assert masked_sdpa.window_mask(Layout((4, 5), 2, 3), Window("disc", 3), CPU, torch.float32) is one
    assert masked_sdpa.window_mask(LAYOUT, window, CPU, torch.bfloat16) is not one


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["band:3", "disc:2", "box:1"])
def test_it_computes_the_reference(form, dtype):
    window = Window.parse(form)
    query, key, value = operands(LAYOUT, 4, 8, dtype)
    key, value = key[:, :2], value[:, :2]
    found = masked_sdpa.run(query, key, value, None, call_of(query, key, window))
    assert_as_good_as_the_reference(found, query, key, value, LAYOUT, window)


@pytest.mark.parametrize("kind", ["bool", "its own dtype", "float32"])
def test_a_mask_of_the_models_own_comes_on_top(kind):
    dtype = torch.bfloat16 if kind == "float32" else torch.float32
    window = Window("box", 1)
    query, key, value = operands(LAYOUT, 2, 8, dtype)
    seen = torch.rand(LAYOUT.tokens, LAYOUT.tokens, generator=torch.Generator().manual_seed(1)) > 0.3
    seen.fill_diagonal_(True)
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    found = masked_sdpa.run(query, key, value, mask, call_of(query, key, window))
    wanted = reference.local_attention(query.double(), key.double(), value.double(), LAYOUT, window, mask=seen)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)


def test_a_mask_that_would_fill_the_memory_is_a_reason():
    def why_not(side):
        layout = Layout((side, side))
        call = LocalCall(layout, Window("disc", 8), None, (1, 2, layout.tokens, 64), torch.float32, CPU)
        return masked_sdpa.why_not(call)

    assert why_not(128) is None
    assert why_not(129) == "16641 tokens: the mask would take 1056 MiB"


def test_the_work_is_that_of_full_attention():
    query, key, _ = operands(LAYOUT, 2, 8, torch.float32)
    call = call_of(query[:, :, 2:-3], key, Window("box", 1), pooled=4)
    assert masked_sdpa.work(call) == (20 * 29, 29)
