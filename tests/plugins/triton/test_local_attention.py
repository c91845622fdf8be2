"""Calls of the Triton kernel: which it serves, what it is handed, what it says of its work."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from difa_compile.decision import Window
from difa_compile.errors import LayoutError, OperandError
from difa_compile.layout import Layout
from difa_compile.ops.kernels import LocalCall
from difa_compile.plugins.triton import configs
from difa_compile.plugins.triton import local_attention as kernel
from tests.support.places import ROOT

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_work_takes_no_time_that_grows_with_the_tiles():
    """The places of tiles that differ are few, however large the grid."""
    from difa_compile.plugins.triton.tiling import _places

    assert len(_places(512, 8, 32)) == len(_places(2**20, 8, 32)) == 9
    layout = Layout((512, 512), 512)
    call = LocalCall(layout, Window("disc", 32), None, (1, 24, layout.tokens, 128), torch.bfloat16, CPU)
    config = configs.config(90, torch.bfloat16, 128)
    assert kernel.KERNEL.work(call) == kernel.counted_work(layout, call.window, layout.tokens, 0, config)


def call_of(device=CUDA, dtype=torch.bfloat16, dim=128, grid=(64, 64), window="disc:8", scale=None):
    layout = Layout(grid, 512)
    shape = (1, 24, layout.tokens, dim)
    return LocalCall(layout, Window.parse(window), scale, shape, dtype, device)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (call_of(CPU), "serves CUDA devices, not cpu"),
        (call_of(dtype=torch.float64), "float64 is not"),
        (call_of(dim=264), "head dimension 264 is over 256"),
        (call_of(scale=0.0), "scale 0.0 is not positive"),
        (call_of(scale=-1.0), "scale -1.0 is not positive"),
        (call_of(grid=(4097, 4096)), "masks are exact below"),
        (call_of(grid=(4000, 4000), window="disc:2400"), "a disc of radius 2400"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reasons(call, reason):
    assert reason in kernel.why_not(call)


def test_a_missing_toolchain_and_an_old_device_are_reasons(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernel.importlib.util, "find_spec", lambda name: None)
    assert kernel.why_not(call_of()) == "triton is not installed"
    monkeypatch.setattr(kernel.importlib.util, "find_spec", lambda name: object())
    assert kernel.why_not(call_of()) == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert kernel.why_not(call_of()) == "compute capability 7.5, at least 8.0 is needed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("DIFA_TRITON", raising=False)
    assert kernel.why_not(call_of()) == "not measured on a GPU yet; set DIFA_TRITON=1 to use it"
    monkeypatch.setenv("DIFA_TRITON", "1")
    assert kernel.why_not(call_of()) is None


def test_operands_that_do_not_go_together_are_refused():
    layout, window = Layout((4, 4), 1), Window("disc", 2)
    query = torch.zeros(1, 3, 17, 16)
    with pytest.raises(OperandError, match="H a multiple of G"):
        kernel.attend(query, torch.zeros(1, 2, 17, 16), torch.zeros(1, 2, 17, 16), layout, window)
    with pytest.raises(OperandError, match="H a multiple of G"):
        kernel.attend(query, query, torch.zeros(1, 3, 18, 16), layout, window)
    with pytest.raises(OperandError, match=r"the value is torch.bfloat16, the query torch.float32"):
        kernel.attend(query, query, query.bfloat16(), layout, window)
    with pytest.raises(LayoutError, match=r"scale -1\.0 is not positive"):
        kernel.attend(query, query, query, layout, window, -1.0)
    with pytest.raises(LayoutError, match="the attention sequence has 15"):
        kernel.attend(query, query[:, :, :15], query[:, :, :15], layout, window)
    with pytest.raises(LayoutError, match="15 queries are neither"):
        kernel.attend(query[:, :, :15], query, query, layout, window)
    with pytest.raises(OperandError, match=r"a mask of shape \(5, 17\) does not broadcast to \(1, 3, 17, 17\)"):
        kernel.attend(query, query, query, layout, window, mask=torch.zeros(5, 17))
    with pytest.raises(LayoutError, match="full attention beside"):
        kernel.local_and_full(query, torch.zeros(1, 3, 20, 16), torch.zeros(1, 3, 20, 16), layout, window)


def test_masks_are_read_in_place_by_their_strides():
    """Nothing is expanded: axes that a mask broadcasts along have stride 0, and so the same memory is read again."""
    shape = (2, 3, 17, 20)
    keys = torch.rand(2, 1, 1, 20)
    kind, (given, *strides) = kernel._mask_arguments(keys, shape)
    assert (kind, strides) == ("added", [20, 0, 0, 1])
    assert given.data_ptr() == keys.data_ptr()
    pairs = torch.rand(20, 17).T < 0.5
    kind, (given, *strides) = kernel._mask_arguments(pairs, shape)
    assert (kind, strides) == ("bool", [0, 0, 1, 17])
    assert given.dtype is torch.uint8
    assert given.data_ptr() == pairs.data_ptr()
    assert kernel._mask_arguments(keys.double(), shape)[1][0].dtype is torch.float32
    assert kernel._mask_arguments(None, shape) == ("none", (None, 0, 0, 0, 0))


def test_a_masked_call_is_served():
    layout = Layout((64, 64), 512)
    shape = (1, 24, layout.tokens, 128)
    call = LocalCall(layout, Window("disc", 8), None, shape, torch.bfloat16, CUDA, masked=True)
    assert kernel._unserved(call) is None


def test_importing_the_kernel_module_does_not_import_triton():
    code = "import sys, difa_compile.plugins.triton.local_attention; assert 'triton' not in sys.modules"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
