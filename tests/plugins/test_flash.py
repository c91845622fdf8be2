"""flash-attn's sliding window, on a stand-in with the package's name and signature that computes the reference."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops import reference
from difa_compile.ops.kernels import LocalCall, choose_kernel
from difa_compile.plugins import flash

CUDA = torch.device("cuda")


class StandIn(ModuleType):
    """The package ``flash_attn``, in float32 and on any device; keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.given: dict[str, object] = {}

    def flash_attn_func(
        self,
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        self.given = {
            "shapes": [tuple(each.shape) for each in (q, k, v)],
            "softmax_scale": softmax_scale,
            "window_size": window_size,
            "plain": (dropout_p, causal, softcap, alibi_slopes, return_attn_probs) == (0.0, False, 0.0, None, False),
        }
        place = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])[None, :]
        seen = (place <= window_size[0]) & (place >= -window_size[1])
        heads_first = (each.transpose(1, 2) for each in (q, k, v))
        return reference.attention(*heads_first, seen, softmax_scale).transpose(1, 2).contiguous()


@pytest.fixture
def package(monkeypatch):
    found = StandIn()
    monkeypatch.setitem(sys.modules, "flash_attn", found)
    flash.attention_function.cache_clear()
    yield found
    flash.attention_function.cache_clear()


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def call_of(grid=(4096,), window="band:64", text=0, dtype=torch.bfloat16, dim=128, device=CUDA, scale=None, **options):
    layout = Layout(grid, text)
    shape = (2, 8, layout.tokens, dim)
    return LocalCall(layout, Window.parse(window), scale, shape, dtype, device, **options)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(
    ("grid", "window", "size"),
    [
        ((37,), "band:5", 5),
        ((37,), "box:5", 5),
        ((37,), "disc:5", 4),
        ((1, 37), "disc:5", 4),
        ((6, 7), "band:9", 9),
        ((6, 7), "disc:30", 42),
    ],
)
def test_it_is_handed_the_window_and_gives_the_reference(package, grid, window, size, scale):
    """A disc is strict, so that on a line it reaches one token less; a window over everything sees everything."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout(grid)
    query = torch.randn(2, 4, layout.tokens, 16, generator=generator)
    key, value = torch.randn(2, 2, 2, layout.tokens, 16, generator=generator)
    call = LocalCall(layout, Window.parse(window), scale, tuple(query.shape), query.dtype, query.device, key_heads=2)
    found = flash.KERNEL.run(query, key, value, None, call)
    wanted = reference.local_attention(query, key, value, layout, call.window, scale)
    torch.testing.assert_close(found, wanted)
    assert found.transpose(1, 2).is_contiguous()
    tokens = layout.tokens
    assert package.given == {
        "shapes": [(2, tokens, 4, 16), (2, tokens, 2, 16), (2, tokens, 2, 16)],
        "softmax_scale": scale,
        "window_size": (size, size),
        "plain": True,
    }


@pytest.mark.usefixtures("package", "hopper")
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (call_of(device=torch.device("cpu")), "serves CUDA devices, not cpu"),
        (call_of(masked=True), "the model's own mask"),
        (call_of(text=7), "seen by every query"),
        (call_of(pooled=4), "seen by every query"),
        (call_of((64, 64), "disc:8"), "window disc:8 on 64x64 is no band over the sequence"),
        (call_of(dtype=torch.float32), "float32 is not float16 or bfloat16"),
        (call_of(dim=264), "head dimension 264 is over 256"),
        (call_of(value_dim=64), "values have 64 channels, keys 128"),
        (call_of(scale=-1.0), "scale -1.0 is not positive"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reasons(call, reason):
    assert reason in flash.why_not(call)


def test_what_the_machine_lacks_is_a_reason(monkeypatch, package):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert flash.why_not(call_of()) == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert flash.why_not(call_of()) == "compute capability 7.5, at least 8.0 is needed"


@pytest.mark.usefixtures("hopper")
def test_a_package_that_is_absent_broken_or_old_is_a_reason(monkeypatch, package):
    def reason():
        flash.attention_function.cache_clear()
        return flash.why_not(call_of())

    assert reason() is None
    monkeypatch.setattr(StandIn, "flash_attn_func", lambda self, q, k, v, dropout_p=0.0: q)
    assert reason() == "flash-attn has no sliding window; version 2.3 or newer is needed"
    monkeypatch.delattr(StandIn, "flash_attn_func")
    assert reason().startswith("flash-attn does not load: cannot import name 'flash_attn_func'")
    monkeypatch.delitem(sys.modules, "flash_attn")

    class Absent:
        def find_spec(self, name, *_):
            if name == "flash_attn":
                raise ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn")

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    assert reason() == "flash-attn is not installed (pip install 'difa-compile[flash]')"


@pytest.mark.usefixtures("package", "hopper")
def test_the_triton_kernel_goes_first_only_where_it_was_asked_for(monkeypatch):
    monkeypatch.delenv("DIFA_TRITON", raising=False)
    assert choose_kernel(call_of()).name == "flash-attn"
    assert choose_kernel(call_of((64, 64), "disc:8")).name == "FlexAttention"
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("DIFA_TRITON", "1")
    assert choose_kernel(call_of()).name == "Triton"
