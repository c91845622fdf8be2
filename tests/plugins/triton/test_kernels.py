"""The Triton kernel's numbers: in the interpreter, and on a GPU where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops import reference
from difa_compile.plugins.geometry import Geometry
from difa_compile.plugins.triton import local_attention as kernel
from difa_compile.plugins.triton.tiling import choose
from tests.support.places import ROOT
from tests.support.triton_cases import CASES, operands

CUDA = torch.device("cuda")
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""About two units in the last place of values near one."""


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("triton", reason="triton is not installed")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.triton_cases"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_is_the_reference(interpreted, name):
    """At most twice the error of the reference in the same precision, weights being rounded where it rounds scores."""
    found, case = interpreted["cases"][name], CASES[name]
    assert found["shapes"] == found["wanted"]
    assert found["dtype"] == str(case.dtype)
    assert found["tokens_first"]
    for error, own in zip(found["errors"], found["own"], strict=True):
        assert error <= 2 * own + FLOOR[case.dtype], f"error {error}, the reference itself has {own}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.mode == "attend" and case.mask == "none"]
)
def test_the_work_that_the_kernel_says_is_what_it_multiplies_and_reads(interpreted, name):
    work = interpreted["cases"][name]["work"]
    assert work["said"] == work["counted"]


@pytest.mark.slow
def test_a_nan_reaches_those_who_see_it_or_share_a_tile_and_nobody_else(interpreted):
    """A tile reads the token if its rectangle of keys holds it; the others never touch it."""
    layout, window, side, token = Layout((16, 16), 2), Window("disc", 2), 16, 2 + 5 * 16 + 5
    geometry = Geometry.of(layout, window)
    sees = set(reference.visible(layout, window)[:, token].nonzero().flatten().tolist())
    sizes = choose(geometry, 16, 16).tile[1:]
    may = {0, 1}
    for query in range(side * side):
        corner = [place // size * size for place, size in zip(divmod(query, side), sizes, strict=True)]
        gaps = [max(5 - (first + size - 1), first - 5, 0) for first, size in zip(corner, sizes, strict=True)]
        if max(gaps) <= geometry.reach:
            may.add(2 + query)
    poisoned = set(interpreted["poisoned"])
    assert sees <= poisoned <= may
    assert len(may) < 100


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.mode != "wide"])
def test_on_a_gpu_the_kernel_is_the_reference(name):
    """The interpreter's cases with the table's configuration, on the device."""
    pytest.importorskip("triton", reason="triton is not installed")
    from tests.support.triton_cases import expected, largest, model_mask

    case = CASES[name]
    made = operands(case)
    exact = expected(case, *(each.double() for each in made))
    own = expected(case, *made)
    mask = model_mask(case)
    settings_ = (case.layout, Window.parse(case.window), case.scale, None if mask is None else mask.to(CUDA))
    on_device = [each.to(CUDA) for each in made]
    if case.mode == "attend":
        found = [kernel.attend(*on_device, *settings_)]
    else:
        found = list(kernel.local_and_full(*on_device, *settings_, residual=case.mode == "residual"))
    for one, right, reference_ in zip(found, exact, own, strict=True):
        assert largest(one.cpu(), right) <= 2 * largest(reference_, right) + FLOOR[case.dtype]
