"""The Triton kernel compiled for GPUs that are not here: what it takes of them."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.plugins.geometry import Geometry
from difa_compile.plugins.triton import configs
from difa_compile.plugins.triton.configs import Config, Form
from tests.support.places import ROOT

SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that a program may take."""


@pytest.mark.parametrize(("with_full", "mask"), [(False, "none"), (True, "none"), (False, "bool"), (True, "added")])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_compiled_ahead_nothing_is_spilled(arch, dim, with_full, mask):
    pytest.importorskip("triton", reason="triton is not installed")
    from difa_compile.plugins.triton.ahead import compile_ahead, resources

    geometry = Geometry.of(Layout((64, 64), 512), Window("disc", 16))
    config = configs.config(arch, torch.bfloat16, dim, Form.of(with_full, mask != "none"))
    compiled = compile_ahead(arch, torch.bfloat16, dim, geometry, config, with_full=with_full, mask=mask)
    used = resources(compiled)
    assert used.local_bytes == 0
    assert used.registers <= 65536 // (32 * config.warps)
    assert 0 < used.shared_bytes <= (SHARED[arch] - 1) * 1024
    if arch == 90:  # tensor cores of this architecture; loads that run ahead of them
        assert "wgmma.mma_async" in compiled.asm["ptx"]
        assert "cp.async.cg.shared.global" in compiled.asm["ptx"]


def test_the_published_resources_are_of_these_blocks_and_show_no_spills():
    """``benchmarks/results/triton_aot.json``: every form, window and mask that the benchmark compiles."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "triton_aot.json").read_text())["rows"]
    wanted = set(
        itertools.product((80, 89, 90, 100), (64, 128), (Form.WINDOW, Form.FULL, Form.MASKED, Form.MASKED_FULL))
    )
    for row in rows:
        arch, dim, dtype = int(row["arch"].removeprefix("sm_")), row["head_dim"], getattr(torch, row["dtype"])
        form = Form.of(row["form"] == "window and full", row["mask"] != "none")
        config = configs.config(arch, dtype, dim, form)
        blocks = [math.prod(map(int, row[name].split("x"))) for name in ("tile", "patch")]
        assert [*blocks, row["warps"], row["stages"]] == [config.block_m, config.block_n, config.warps, config.stages]
        assert row["local_bytes"] == 0, row
        wanted.discard((arch, dim, form))
    assert not wanted


def test_compiled_ahead_for_consumers_blackwell():
    pytest.importorskip("triton", reason="triton is not installed")
    from difa_compile.plugins.triton.ahead import compile_ahead, resources

    geometry = Geometry.of(Layout((64, 64), 512), Window("disc", 16))
    config = configs.config(120, torch.bfloat16, 64)
    compiled = compile_ahead(120, torch.bfloat16, 64, geometry, config)
    assert len(compiled.asm["cubin"]) > 1000
    assert 0 < resources(compiled).shared_bytes <= SHARED[120] * 1024


@pytest.mark.parametrize("window", ["disc", "box"])
def test_launch_arguments_of_one_compile(window):
    """A launch turns every whole number that is 1 into a constant; a launcher without floats fixes the scale."""
    pytest.importorskip("triton", reason="triton is not installed")
    from difa_compile.plugins.triton.ahead import compile_ahead

    ones = (
        "batch",
        "heads",
        "group",
        "before",
        "others",
        "pooled",
        "text_before",
        "text_queries",
        "radius",
        "slabs",
        "rows",
    )
    geometry = Geometry.of(Layout((3, 16, 16), 1), Window(window, 2))
    config = Config(16, 16, 1, 1)
    fixed = {**dict.fromkeys(ones, 1), "scale": 0.25}
    compiled = compile_ahead(90, torch.float16, 16, geometry, config, with_full=True, fixed=fixed)
    assert ".param .f32" not in compiled.asm["ptx"]
