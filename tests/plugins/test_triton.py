"""The Triton kernel of local attention: numbers from the interpreter, code for GPUs that are not here, and dispatch."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_compile.decision import Window
from difa_compile.errors import LayoutError, OperandError
from difa_compile.layout import Layout
from difa_compile.ops import reference
from difa_compile.ops.kernels import LocalCall
from difa_compile.plugins.geometry import Geometry
from difa_compile.plugins.triton import configs
from difa_compile.plugins.triton import local_attention as kernel
from difa_compile.plugins.triton.configs import Config, Form
from difa_compile.plugins.triton.tiling import choose
from tests.support.places import ROOT
from tests.support.triton_cases import CASES, operands

CPU = torch.device("cpu")
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


grids = st.one_of(
    st.tuples(st.integers(1, 200)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
)
windows = st.builds(Window, st.sampled_from(["band", "disc", "box"]), st.integers(1, 30))


@given(grids, windows)
@settings(max_examples=200)
def test_geometry_keeps_the_window(grid, window):
    """The kernel's terms describe the same neighbourhoods, whatever axes were merged or left out."""
    layout = Layout(grid)
    geometry = Geometry.of(layout, window)
    assert math.prod(geometry.sizes) == layout.image_tokens
    assert all(size == 1 for size in geometry.sizes[: 3 - geometry.rank])
    flat = torch.arange(layout.image_tokens)
    squared, most, rest = 0, 0, flat
    for size in reversed(geometry.sizes):
        distance = (rest % size)[:, None] - (rest % size)[None, :]
        squared, most = squared + distance**2, torch.maximum(torch.as_tensor(most), distance.abs())
        rest = rest // size
    near = squared < geometry.radius**2 if geometry.disc else most <= geometry.radius
    assert torch.equal(near, reference.visible(layout, window))


@given(grids, windows, st.sampled_from([(16, 16), (64, 32), (128, 64)]))
@settings(max_examples=100)
def test_tilings_have_the_block_sizes_asked_for_and_keep_to_axes_in_use(grid, window, blocks):
    geometry = Geometry.of(Layout(grid), window)
    tiling = choose(geometry, *blocks)
    assert (math.prod(tiling.tile), math.prod(tiling.patch)) == blocks
    for side, size in zip(tiling.tile + tiling.patch, geometry.sizes * 2, strict=True):
        assert side & (side - 1) == 0
        assert side == 1 or size > 1 or geometry.rank == 1
    # No tile spans more rows of patches than the kernel is told.
    slabs, rows = tiling.rows(geometry)
    for axis, bound in ((0, slabs), (1, rows)):
        size, tile, patch = geometry.sizes[axis], tiling.tile[axis], tiling.patch[axis]
        for corner in range(0, size, tile):
            first = max(corner - geometry.reach, 0)
            end = min(min(corner + tile, size) - 1 + geometry.reach + 1, size)
            assert math.ceil((end - first) / patch) <= bound


@given(grids, windows, st.sampled_from([(16, 16), (64, 32), (128, 64)]))
@settings(max_examples=100)
def test_visits_are_those_of_a_walk_over_all_tiles(grid, window, blocks):
    """Key by key: a tile reads a row of a row of patches as far as the nearest key of these patches lets it see."""
    geometry = Geometry.of(Layout(grid), window)
    tiling = choose(geometry, *blocks)

    def walk(corners, axis, budget):
        if axis == 3:
            return 1, 1
        size, reach = geometry.sizes[axis], math.isqrt(budget) if geometry.disc else geometry.radius
        queries = range(corners[axis], min(corners[axis] + tiling.tile[axis], size))
        near = [key for key in range(size) if any(abs(key - query) <= reach for query in queries)]
        patches = keys = 0
        for place in range(0, len(near), tiling.patch[axis]):
            patch = near[place : place + tiling.patch[axis]]
            nearest = min(abs(key - query) for key in (patch[0], patch[-1]) for query in queries)
            nearest = 0 if set(patch) & set(queries) else nearest
            more, read = walk(corners, axis + 1, budget - nearest**2)
            patches, keys = patches + more, keys + len(patch) * read
        return patches, keys

    tiles = itertools.product(*(range(0, size, tile) for size, tile in zip(geometry.sizes, tiling.tile, strict=True)))
    walked = [walk(corners, 0, geometry.radius**2 - 1) for corners in tiles]
    assert tiling.visits(geometry) == tuple(map(sum, zip(*walked, strict=True)))


def test_work_takes_no_time_that_grows_with_the_tiles():
    """The places of tiles that differ are few, however large the grid."""
    from difa_compile.plugins.triton.tiling import _places

    assert len(_places(512, 8, 32)) == len(_places(2**20, 8, 32)) == 9
    layout = Layout((512, 512), 512)
    call = LocalCall(layout, Window("disc", 32), None, (1, 24, layout.tokens, 128), torch.bfloat16, CPU)
    config = configs.config(90, torch.bfloat16, 128)
    assert kernel.KERNEL.work(call) == kernel.counted_work(layout, call.window, layout.tokens, 0, config)


def test_flux_tiles_are_square_patches_and_bands_are_runs():
    square = choose(Geometry.of(Layout((64, 64), 512), Window("disc", 8)), 128, 64)
    assert (square.tile, square.patch) == ((1, 8, 16), (1, 8, 8))
    run = choose(Geometry.of(Layout((64, 64), 512), Window("band", 512)), 128, 64)
    assert (run.tile, run.patch) == ((1, 1, 128), (1, 1, 64))


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


def test_every_architecture_dtype_and_head_dimension_has_a_configuration():
    for arch, dtype, dim in itertools.product((80, 86, 89, 90, 100, 120), kernel.DTYPES, (16, 32, 64, 128, 256)):
        found = configs.config(arch, dtype, dim)
        assert found.block_m >= 16 <= found.block_n


def test_the_configuration_of_the_nearest_older_architecture_and_next_head_dimension_is_taken(monkeypatch):
    """float16 goes by bfloat16 where it has no entry; an architecture older than all listed by the oldest."""
    entries = {
        name: Config(16 * place, 16, 4, 2)
        for place, name in enumerate(
            (
                "sm80/bfloat16/64",
                "sm80/bfloat16/128",
                "sm90/bfloat16/128",
                "sm90/float16/64",
                "sm80/bfloat16/128/masked",
            ),
            1,
        )
    }
    monkeypatch.setattr(configs, "table", lambda: entries)
    for wanted, asked in (
        ("sm80/bfloat16/64", (89, torch.bfloat16, 32)),
        ("sm80/bfloat16/128", (86, torch.float16, 80)),
        ("sm90/bfloat16/128", (90, torch.bfloat16, 64)),
        ("sm90/float16/64", (120, torch.float16, 64)),
        ("sm80/bfloat16/128", (75, torch.bfloat16, 128)),
        ("sm80/bfloat16/128/masked", (86, torch.float16, 80, Form.MASKED)),
        ("sm80/bfloat16/128", (86, torch.float16, 80, Form.MASKED_FULL)),
        ("sm90/bfloat16/128", (90, torch.bfloat16, 128, Form.MASKED)),
    ):
        assert configs.config(*asked) == entries[wanted], asked
    with pytest.raises(KeyError, match="no configuration for sm90/bfloat16/512"):
        configs.config(90, torch.bfloat16, 512)


def test_importing_the_kernel_module_does_not_import_triton():
    code = "import sys, difa_compile.plugins.triton.local_attention; assert 'triton' not in sys.modules"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


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
