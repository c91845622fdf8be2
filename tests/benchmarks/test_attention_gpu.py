"""What can be checked of the GPU benchmark without a GPU: arguments, cases, orders, errors, and its reference check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from benchmarks import attention_gpu
from benchmarks._common import ROOT
from benchmarks.triton_aot import parse_arguments as parse_ahead
from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops import reference
from difa_compile.plugins.triton import configs
from difa_compile.plugins.triton.configs import Config


def test_defaults_are_the_published_sizes():
    args = attention_gpu.parse_arguments([])
    assert (args.sides, args.radii, args.tune) == ([64, 128, 256, 512], [8, 16, 32], False)
    assert attention_gpu.Shape(64).layout == Layout((64, 64), 512)
    assert parse_ahead([]).archs == [80, 89, 90, 100]
    with pytest.raises(SystemExit):
        attention_gpu.parse_arguments(["--sides", "40"])


def test_it_says_what_it_needs():
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.attention_gpu"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs a CUDA device" in done.stderr


def test_it_runs_with_nothing_but_torch_and_triton():
    absent = ("diffusers", "transformers", "typer", "rich", "matplotlib", "torchmetrics")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import benchmarks.attention_gpu"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_cases_are_many_and_each_is_its_own():
    names = [str(case) for case in attention_gpu.CHECKS]
    assert len(set(names)) == len(names) >= 12
    assert {case.window.split(":")[0] for case in attention_gpu.CHECKS} == {"disc", "box", "band"}
    assert {case.mask for case in attention_gpu.CHECKS} == {"none", "bool", "added"}


def test_a_mask_of_the_checks_hides_some_keys_of_every_query():
    seen = attention_gpu.model_mask("bool", 9, 12, "cpu")
    assert seen.any(1).all()
    assert (~seen).any(1).all()
    assert torch.equal(attention_gpu.model_mask("added", 9, 12, "cpu") == -torch.inf, ~seen)
    assert attention_gpu.model_mask("none", 9, 12, "cpu") is None


def test_flash_attention_is_a_row_with_its_reason_where_it_cannot_be_had():
    layout = Layout((32,))
    made = attention_gpu.operands(layout, 2, 2, 16, torch.bfloat16, "cpu")
    band = {"flash-attn band": lambda: attention_gpu.flash_band(made, layout, Window("band", 4))}
    assert attention_gpu.usable(band)[1] == {"flash-attn band": "RuntimeError: serves CUDA devices, not cpu"}


def test_tile_order_is_a_permutation_of_tiles():
    layout = Layout((16, 32), 5)
    order = attention_gpu.tile_order(layout, (8, 16))
    assert torch.equal(order.sort().values, torch.arange(layout.tokens))
    assert order[:5].tolist() == [0, 1, 2, 3, 4]
    first = order[5 : 5 + 128] - 5
    assert set((first // 32).tolist()) == set(range(8))
    assert set((first % 32).tolist()) == set(range(16))


@pytest.mark.parametrize("tile", [None, (8, 16)])
def test_masks_of_flex_attention_are_the_window(tile):
    layout = Layout((16, 32), 5)
    flex = attention_gpu.Flex(layout, "cpu")
    flex.squared.fill_(25)
    token = torch.arange(layout.tokens)
    found = flex._mod(tile)(token, token, token[:, None], token[None, :])
    wanted = reference.visible(layout, Window("disc", 5))
    order = torch.arange(layout.tokens) if tile is None else attention_gpu.tile_order(layout, tile)
    assert torch.equal(found, wanted[order][:, order])


def test_the_sampled_error_sees_a_wrong_output_and_not_a_right_one():
    layout, window = Layout((8, 8), 3), Window("disc", 3)
    made = attention_gpu.operands(layout, 2, 2, 16, torch.float32, "cpu")
    right = reference.local_attention(*made, layout, window)
    assert attention_gpu.sampled_error(right, made, layout, window) < 1e-5
    assert attention_gpu.sampled_error(reference.attention(*made), made, layout, window) > 1e-2
    assert attention_gpu.sampled_error(reference.attention(*made), made, layout, None) < 1e-5


def test_dense_attention_is_cut_to_fewer_heads_only_where_it_is_long():
    shapes = [attention_gpu.Shape(side) for side in (64, 128, 256, 512)]
    assert [attention_gpu.dense_heads(shape) for shape in shapes] == [24, 24, 24, 5]


def test_what_does_not_run_is_a_row_with_its_reason():
    def fail():
        raise RuntimeError("no kernel\nfor this")

    good, reasons, outputs = attention_gpu.usable({"bad": fail, "good": lambda: torch.ones(1)})
    assert list(good) == list(outputs) == ["good"]
    assert reasons == {"bad": "RuntimeError: no kernel"}


def test_a_tuned_table_is_read_back(tmp_path):
    best = {"sm90/bfloat16/128": Config(64, 32, 4, 5)}
    path = tmp_path / "folder" / "configs.json"
    attention_gpu.write_table(best, path)
    table = configs.table(path)
    assert table == {**configs.table(), **best}
    assert asdict(table["sm90/bfloat16/128"]) == json.loads(path.read_text())["sm90/bfloat16/128"]


@pytest.mark.slow
def test_the_check_against_the_reference_runs_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    code = """
import torch
from benchmarks.attention_gpu import Check, check
from difa_compile.layout import Layout
from difa_compile.plugins.triton.configs import Config
small = Config(16, 16, 1, 1)
for case in (
    Check(Layout((5, 6), 3), "disc:2", head_dim=16, heads=4, groups=2, config=small),
    Check(Layout((5, 6), 3), "box:1", torch.float16, head_dim=16, image_only=True, config=small),
    Check(Layout((20,), 3), "band:4", torch.float32, head_dim=16, with_full=True, config=small),
    Check(Layout((5, 6), 3), "disc:2", torch.float32, head_dim=16, mask="bool", config=small),
    Check(Layout((5, 6), 3), "disc:2", torch.float16, head_dim=16, mask="added", with_full=True, config=small),
):
    row = check(case, "cpu")
    assert row["passed"], row
    assert 0 < row["forward_error"], row
"""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
