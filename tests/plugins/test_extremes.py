"""Numbers from the edges of their dtypes, in every kernel that runs on a CPU: NaN stays NaN, the finite finite."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops import reference
from difa_compile.ops.kernels import LocalCall
from difa_compile.plugins import cpu, flex, masked_sdpa
from tests.support.extremes import EXPONENTS, Extreme, assert_right, extremes
from tests.support.places import ROOT

many = settings(max_examples=200, deadline=None, derandomize=True)


def through(kernel, case, *options):
    query, key, value, mask = case.operands()
    shape, masked = tuple(query.shape), mask is not None
    call = LocalCall(case.layout, Window.parse(case.window), case.scale, shape, case.dtype, query.device, masked)
    assert kernel is flex or kernel.why_not(call) is None
    return kernel.run(query, key, value, mask, call, *options)


@many
@given(extremes(), st.sampled_from([0, 16, 32, 64]))
def test_the_cpu_kernel(case, tile):
    assert_right(through(cpu, case, tile), case)


@many
@given(extremes())
def test_masked_sdpa(case):
    assert_right(through(masked_sdpa, case), case)


@many
@given(extremes())
def test_the_reference(case):
    query, key, value, mask = case.operands()
    found = reference.local_attention(query, key, value, case.layout, Window.parse(case.window), case.scale, mask)
    assert_right(found, case)


@pytest.mark.parametrize("dtype", list(EXPONENTS), ids=str)
def test_a_nan_in_a_key_or_query_reaches_nobody_else(dtype):
    """In the reference and the CPU kernel, masks of -inf and the window hide it; masked SDPA gives NaN to all."""
    for into in ("key", "query"):
        for mask in (None, "bool", "infinite"):
            case = Extreme("box:1", dtype, (0.0, 0.0, 0.0), mask=mask, into=into, poison=1)
            query, key, value, mask = case.operands()
            window = Window.parse(case.window)
            wanted = reference.local_attention(query, key, value, case.layout, window, None, mask)
            assert wanted.isnan().any()
            assert wanted.isfinite().any()
            assert torch.equal(through(cpu, case).isnan(), wanted.isnan())


@pytest.mark.slow
def test_flex_attention():
    """One compile, many operands; it serves float32 without a mask on the CPU."""
    layout = Layout((12, 16), 5, 3)
    for power in (-38.0, -19.0, 0.0, 4.5, 9.0, 18.0, 38.0):
        for value in (-38.0, 0.0, 36.0):
            case = Extreme("disc:3", torch.float32, (power, power, value), layout=layout, dim=16)
            assert_right(through(flex, case), case)
    for into in ("query", "key", "value"):
        for poison in range(6):
            case = Extreme("disc:3", torch.float32, (0.0, 0.0, 0.0), layout=layout, dim=16, into=into, poison=poison)
            assert_right(through(flex, case), case)


@pytest.mark.slow
def test_the_triton_kernel_interpreted():
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-m", "tests.support.extremes"]
    root = ROOT
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("done"), done.stderr[-2000:]
