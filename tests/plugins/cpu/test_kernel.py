"""The CPU kernel of local attention against the reference in float64."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops import reference
from difa_compile.ops.kernels import LocalCall
from difa_compile.plugins import cpu
from tests.support.places import ROOT

UNIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Distance from 1 to the next number."""


def operands(layout, heads=2, dim=16, dtype=torch.float32, key_heads=None, pooled=0, batch=1, memory="BHLD", seed=0):
    """Query, key and value; ``memory`` names the order of the dimensions in memory, ``fused`` one tensor for all."""
    generator = torch.Generator().manual_seed(seed)
    key_heads = key_heads or heads

    def made(count, tokens):
        values = torch.randn(batch, count, tokens, dim, generator=generator).to(dtype)
        if memory == "BHLD":
            return values
        order = {"BLHD": (0, 2, 1, 3), "BHDL": (0, 1, 3, 2), "LBHD": (2, 0, 1, 3)}[memory]
        back = sorted(range(4), key=order.__getitem__)
        return values.permute(order).contiguous().permute(back)

    keys = layout.tokens + pooled
    return made(heads, layout.tokens), made(key_heads, keys), made(key_heads, keys)


def kernel(query, key, value, layout, window, scale=None, mask=None, pooled=0, tile=0):
    shape, masked = tuple(query.shape), mask is not None
    call = LocalCall(
        layout, window, scale, shape, query.dtype, query.device, masked, key.shape[1], value.shape[3], pooled
    )
    assert cpu.why_not(call) is None
    return cpu.run(query, key, value, mask, call, tile)


def exact(query, key, value, layout, window, scale=None, mask=None, pooled=0):
    wide = None if mask is None or mask.dtype == torch.bool else mask.double()
    wide = mask if mask is not None and mask.dtype == torch.bool else wide
    return reference.local_attention(query.double(), key.double(), value.double(), layout, window, scale, wide, pooled)


def assert_close(found, wanted, value, dtype, dim):
    """The output is a mean of values: its error is the rounding of the output and of the probabilities (bfloat16 and
    float16 store them rounded), and what the scores' rounding, over ``dim`` products in float32, makes of them."""
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    largest = value.double().abs().max().item()
    bound = largest * (2 * UNIT[dtype] + 32 * dim**0.5 * UNIT[torch.float32])
    error = (found.double() - wanted).abs().max().item() if found.numel() else 0.0
    assert error <= bound, f"error {error:.2e}, at most {bound:.2e} was expected"


cases = st.fixed_dictionaries(
    {
        "grid": st.one_of(
            st.tuples(st.integers(1, 200)),
            st.tuples(st.integers(1, 21), st.integers(1, 21)),
            st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
        ),
        "before": st.sampled_from([0, 1, 7, 70]),
        "after": st.sampled_from([0, 3, 40]),
        "shape": st.sampled_from(["band", "disc", "box"]),
        "radius": st.one_of(st.integers(1, 9), st.just(300)),
        "dtype": st.sampled_from(list(UNIT)),
        "dim": st.sampled_from([1, 7, 16, 32, 40, 64, 72, 128, 256]),
        "groups": st.sampled_from([1, 2]),
        "memory": st.sampled_from(["BHLD", "BLHD", "BHDL", "LBHD"]),
        "pooled": st.sampled_from([0, 0, 5]),
        "mask": st.sampled_from([None, None, "keys", "pairs", "bias", "row bias"]),
        "queries": st.sampled_from(["all", "image", "image and after"]),
        "tile": st.sampled_from([0, 16, 32, 64]),
        "scale": st.sampled_from([None, 0.3]),
        "seed": st.integers(0, 1000),
    }
)


def run_case(case):
    layout = Layout(case["grid"], case["before"], case["after"])
    window = Window(case["shape"], case["radius"])
    dtype, pooled = case["dtype"], case["pooled"]
    query, key, value = operands(
        layout, 4, case["dim"], dtype, 4 // case["groups"], pooled, 2, case["memory"], case["seed"]
    )
    if case["queries"] != "all":
        end = layout.tokens - (layout.after if case["queries"] == "image" else 0)
        query = query[:, :, layout.before : end]
    generator = torch.Generator().manual_seed(case["seed"])
    rows, keys = query.shape[2], key.shape[2]
    mask = {
        None: None,
        "keys": torch.rand(2, 1, 1, keys, generator=generator) > 0.3,
        "pairs": torch.rand(1, 4, rows, keys, generator=generator) > 0.3,
        "bias": torch.randn(2, 1, rows, keys, generator=generator).to(dtype),
        "row bias": torch.randn(1, 1, 1, keys, generator=generator),
    }[case["mask"]]
    found = kernel(query, key, value, layout, window, case["scale"], mask, pooled, case["tile"])
    wanted = exact(query, key, value, layout, window, case["scale"], mask, pooled)
    assert_close(found, wanted, value, dtype, case["dim"])


@settings(max_examples=250)
@given(cases)
def test_it_computes_the_reference(case):
    run_case(case)


@pytest.mark.slow
def test_it_computes_the_reference_with_avx2_alone():
    """The same source for processors without AVX-512, in a process of its own."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("not an x86 processor with AVX2")
    code = """
import itertools, torch
from tests.plugins.cpu import test_kernel as t
assert torch.backends.cpu.get_cpu_capability() == "AVX2", torch.backends.cpu.get_cpu_capability()
assert "-mavx512f" not in t.cpu.build.instruction_flags()
common = dict(before=3, after=2, radius=3, groups=2, memory="BLHD", pooled=4, mask="bias", queries="all")
common |= dict(scale=None, seed=1)
for grid, shape, dtype, dim, tile in itertools.product(
    [(50,), (9, 14), (3, 5, 6)], ["band", "disc", "box"], list(t.UNIT), [7, 64], [0, 16, 32, 64]
):
    t.run_case(common | dict(grid=grid, shape=shape, dtype=dtype, dim=dim, tile=tile))
print("done")
"""
    env = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("done"), done.stderr[-2000:]


@pytest.mark.parametrize("shape", ["band", "disc", "box"])
def test_a_window_larger_than_the_grid_is_full_attention(shape):
    layout = Layout((9, 13), before=5)
    query, key, value = operands(layout)
    found = kernel(query, key, value, layout, Window(shape, 1000))
    assert_close(found, reference.attention(query.double(), key.double(), value.double()), value, torch.float32, 16)


def test_a_query_that_sees_one_key_gives_its_value():
    layout = Layout((6, 7))
    query, key, value = operands(layout)
    torch.testing.assert_close(kernel(query, key, value, layout, Window("disc", 1)), value, rtol=1e-6, atol=0)


def test_large_scores_do_not_overflow():
    layout = Layout((8, 8))
    query, key, value = operands(layout)
    found = kernel(query * 300, key * 300, value, layout, Window("disc", 3))
    wanted = exact(query * 300, key * 300, value, layout, Window("disc", 3))
    torch.testing.assert_close(found.double(), wanted, atol=1e-2, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_a_bad_number_spoils_the_queries_that_see_it_and_none_far_away(dtype, bad):
    layout, window = Layout((20, 20)), Window("box", 2)
    at = 10 * 20 + 10
    sees = reference.visible(layout, window)[:, at]
    far = ~reference.visible(layout, Window("box", 20 - 9))[:, at]
    query, key, value = operands(layout, 1, 16, dtype)
    clean = kernel(query, key, value, layout, window)
    value[:, :, at] = bad
    found = kernel(query, key, value, layout, window)
    assert not found[0, 0, sees].isfinite().any()
    spoilt = query.clone()
    spoilt[:, :, at] = bad
    alone = kernel(spoilt, key, operands(layout, 1, 16, dtype)[2], layout, window)[0, 0]
    assert alone[at].isnan().all()
    assert torch.equal(alone[torch.arange(400) != at], clean[0, 0, torch.arange(400) != at])
    value = operands(layout, 1, 16, dtype)[2]
    key[:, :, at] = float("nan")
    found = kernel(query, key, value, layout, window)
    assert found[0, 0, sees].isnan().all()
    assert torch.equal(found[0, 0, ~sees], clean[0, 0, ~sees])
    assert far.sum() == 0 or found[0, 0, far].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_hidden_by_the_least_finite_number_is_the_mean_of_what_it_sees(dtype):
    layout, window = Layout((4, 5)), Window("box", 1)
    query, key, value = operands(layout, 2, 8, dtype)
    mask = torch.zeros(1, 1, 20, 20, dtype=dtype)
    mask[..., 7, :] = torch.finfo(dtype).min
    found = kernel(query, key, value, layout, window, mask=mask)
    seen = reference.visible(layout, window)[7]
    torch.testing.assert_close(found[:, :, 7].float(), value[:, :, seen].float().mean(2), atol=2e-2, rtol=0)


def test_no_batch_gives_no_output():
    layout = Layout((4, 4))
    query = torch.empty(0, 2, 16, 8)
    assert kernel(query, query, query, layout, Window("disc", 2)).shape == (0, 2, 16, 8)


def test_runs_repeat_to_the_bit_with_any_number_of_threads_and_callers():
    layout, window = Layout((17, 23), before=9), Window("disc", 4)
    inputs = operands(layout, 3, 40, torch.bfloat16, batch=2)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(kernel(*inputs, layout, window))
        with ThreadPoolExecutor(4) as pool:
            results += pool.map(lambda _: kernel(*inputs, layout, window), range(8))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_output_lies_as_the_next_projection_reads_it():
    layout = Layout((5, 5))
    found = kernel(*operands(layout, 2, 8), layout, Window("disc", 2))
    assert found.transpose(1, 2).is_contiguous()


def test_offsets_beyond_32_bits_are_right():
    """The last tokens of a tensor of more than 2**31 elements; only the pages that are touched take memory."""
    layout, window = Layout((2**17,)), Window("band", 1)
    dim, heads = 4, 2**12 + 1
    try:
        whole = torch.empty(1, layout.tokens, heads, dim, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("address space is limited")
    assert whole.numel() > 2**31
    last = whole.transpose(1, 2)[:, -1:]
    last.copy_(torch.randn(1, 1, layout.tokens, dim))
    found = kernel(last, last, last, layout, window)
    tail = last[:, :, -50:].contiguous()
    wanted = exact(tail, tail, tail, Layout((50,)), window)
    assert_close(found[:, :, -40:], wanted[:, :, -40:], tail, torch.bfloat16, dim)


def call_of(grid=(16, 16), dtype=torch.float32, dim=64, device="cpu", window="disc:8"):
    layout = Layout(grid)
    shape = (1, 2, layout.tokens, dim)
    return LocalCall(layout, Window.parse(window), None, shape, dtype, torch.device(device))


def test_what_it_does_not_serve_it_says():
    assert cpu.why_not(call_of()) is None
    assert cpu.why_not(call_of(device="cuda")) == "runs on the CPU"
    assert cpu.why_not(call_of(dtype=torch.float64)) == "not for torch.float64"
    assert "head dimension 2048" in cpu.why_not(call_of(dim=2048))
    assert "radius 5000" in cpu.why_not(call_of(grid=(2, 8192), window="disc:5000"))
    assert cpu.why_not(call_of(grid=(1, 8192), window="disc:5000")) is None  # a band, in truth
    assert cpu.why_not(call_of(window="disc:5000")) is None  # covers the grid
    assert cpu.why_not(call_of(window="band:5000")) is None
    assert "head dimension 0" in cpu.why_not(call_of(dim=0))
    assert "image tokens" in cpu.why_not(call_of(grid=(2**13, 2**13)))
