"""Which kernel serves a call of local attention, and what the others say."""

import pytest
import torch

from difa_compile.decision import Window
from difa_compile.errors import LayoutError
from difa_compile.layout import Layout
from difa_compile.ops.kernels import LocalCall, choose_kernel, local_kernels
from difa_compile.plugins import flex, masked_sdpa


def call_of(side, dtype=torch.float32, dim=64, device="cpu"):
    layout = Layout((side, side))
    return LocalCall(layout, Window("disc", 8), None, (2, 4, layout.tokens, dim), dtype, torch.device(device))


def test_the_first_kernel_that_can_serve_is_taken():
    assert [kernel.name for kernel in local_kernels()] == [
        "Triton",
        "flash-attn",
        "CPU",
        "FlexAttention",
        "masked SDPA",
    ]
    assert choose_kernel(call_of(16)).name == "CPU"
    assert choose_kernel(call_of(128, torch.bfloat16)).name == "CPU"
    assert choose_kernel(call_of(16, torch.float64)).name == "masked SDPA"
    assert choose_kernel(call_of(64, device="cuda")).name == "FlexAttention"


def test_kernels_give_reasons():
    assert flex.why_not(call_of(16)) == "256 tokens: pays from 16384"
    assert "power of two" in flex.why_not(call_of(128, dim=72))
    assert "bfloat16" in flex.why_not(call_of(256, torch.bfloat16))
    assert "not tried on xpu" in flex.why_not(call_of(256, device="xpu"))
    assert masked_sdpa.why_not(call_of(128)) is None
    assert masked_sdpa.why_not(call_of(256)) == "65536 tokens: the mask would take 16384 MiB"


def test_no_kernel_names_every_reason():
    with pytest.raises(LayoutError, match=r"CPU: not for.*FlexAttention: .*float64.*masked SDPA: 65536 tokens"):
        choose_kernel(call_of(256, torch.float64))
