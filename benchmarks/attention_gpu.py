"""How fast is local attention on a GPU, next to dense attention and FlexAttention?

    python -m benchmarks.attention_gpu              # on a machine with a CUDA device, torch and triton; about 5 minutes
    python -m benchmarks.attention_gpu --tune       # also tries other blocks first and uses the best

First the Triton kernel is compared with the reference on the device, then everything is timed on FLUX.1's attention: 24
heads of 128, 512 text tokens, bfloat16, 1024 to 8192 pixels (64^2 to 512^2 image tokens), windows of CLEAR.

Implementations:

* ``sdpa flash``, ``sdpa cudnn``, ``sdpa efficient``: dense attention, one backend each;
* ``flex, row-major``: FlexAttention with a block mask over tokens as the model has them, CLEAR's published form;
* ``flex, tiles``: the same with image tokens in the order of 8 x 16 tiles, put so beforehand;
* ``flex, tiles, permuting``: the same with the permutation of q, k, v and back in the timed region;
* ``triton``: this project's kernel; ``triton, full with ...``: window and full attention in one launch;
* ``flash-attn band``: flash-attn's sliding window, next to ``triton`` on the same image without text, for plain bands
  (case ``band``), which is all that it serves; where the package is missing, a row says so.

Times are medians by CUDA events, implementations in turns; ``heads`` fewer than 24 were run where 24 would take too
long, and ``seconds_all_heads`` scales them up. ``tflops_visible`` counts the pairs that the window lets through, so
that it compares useful work. ``forward_error``: the largest difference from attention in float32 on sampled queries.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops import reference
from difa_compile.ops.kernels import LocalCall
from difa_compile.ops.pairs import visible_pairs
from difa_compile.plugins import flash
from difa_compile.plugins.triton import configs
from difa_compile.plugins.triton.configs import Config
from difa_compile.plugins.triton.local_attention import architecture, attend, local_and_full, padded

from ._common import RESULTS, Row, write_result

HEADS, HEAD_DIM, TEXT = 24, 128, 512
BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TILE = (8, 16)
Run = Callable[[], Tensor]
Operands = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    """Attention of one layer."""

    side: int
    heads: int = HEADS
    head_dim: int = HEAD_DIM
    text: int = TEXT
    dtype: torch.dtype = torch.bfloat16

    @property
    def layout(self) -> Layout:
        return Layout((self.side, self.side), self.text)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 128, 256, 512], help="image tokens along one side")
    parser.add_argument("--radii", type=int, nargs="+", default=[8, 16, 32], help="of the disc")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tune", action="store_true", help="search block sizes and write the best table")
    parser.add_argument("--configs", type=Path, help="where --tune writes its table (default: OUTPUT/configs.json)")
    parser.add_argument("--seconds", type=float, default=400, help="start no further measurement after this time")
    parser.add_argument("--output", default=RESULTS, type=type(RESULTS), help="folder of the result file")
    args = parser.parse_args(arguments)
    if any(side % TILE[1] for side in args.sides):
        parser.error(f"--sides must be multiples of {TILE[1]}, for the order of tiles")
    return args


# --- numerics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A small call whose result is compared with the reference in float64."""

    layout: Layout
    window: str
    dtype: torch.dtype = torch.bfloat16
    heads: int = 4
    groups: int = 4
    head_dim: int = 128
    image_only: bool = False
    with_full: bool = False
    mask: str = "none"
    config: Config | None = None

    def __str__(self) -> str:
        name = f"{self.window} on {self.layout}, {str(self.dtype).removeprefix('torch.')}, d {self.head_dim}"
        name += f", {self.heads} heads on {self.groups}" if self.heads != self.groups else ""
        name += f", {self.mask} mask" if self.mask != "none" else ""
        return name + (", image alone" if self.image_only else "") + (", with full" if self.with_full else "")


CHECKS = (
    Check(Layout((32, 32), 77), "disc:8"),
    Check(Layout((64, 64), 512), "disc:16"),
    Check(Layout((64, 64), 512), "band:512"),
    Check(Layout((37, 51), 20, 33), "disc:9"),
    Check(Layout((37, 51), 20, 33), "box:7", torch.float16, head_dim=64),
    Check(Layout((5, 24, 20), 64), "box:4", head_dim=64),
    Check(Layout((5, 24, 20), 64), "disc:6", torch.float16),
    Check(Layout((1000,)), "band:100", head_dim=64),
    Check(Layout((40, 40), 0, 154), "disc:8", heads=8, groups=2),
    Check(Layout((40, 40), 100), "disc:8", image_only=True, head_dim=72),
    Check(Layout((33, 20), 7), "box:3", torch.float32, head_dim=64),
    Check(Layout((30, 30), 50), "disc:99", torch.float16, head_dim=96),
    Check(Layout((48, 48), 60), "disc:12", with_full=True),
    Check(Layout((28, 28), 9), "disc:5", head_dim=256),
    Check(Layout((32, 32), 77), "disc:8", mask="bool"),
    Check(Layout((37, 51), 20, 33), "disc:9", torch.float16, head_dim=64, mask="added"),
    Check(Layout((48, 48), 60), "disc:12", with_full=True, mask="added"),
)
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def operands(layout: Layout, heads: int, groups: int, dim: int, dtype: torch.dtype, device: str) -> Operands:
    """Query, key, value (1, H or G, L, D), in memory as (1, L, H, D), the way projections leave them."""
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn((1, layout.tokens, count, dim), generator=generator, device=device).to(dtype).transpose(1, 2)
        for count in (heads, groups, groups)
    )
    return query, key, value


def check(case: Check, device: str) -> Row:
    """The kernel's error next to that of the reference in the same precision, both against float64."""
    query, key, value = operands(case.layout, case.heads, case.groups, case.head_dim, case.dtype, device)
    window = Window.parse(case.window)
    if case.image_only:
        query = query[:, :, case.layout.before : case.layout.before + case.layout.image_tokens]
    mask = model_mask(case.mask, query.shape[2], case.layout.tokens, device)
    if case.with_full:
        found = list(local_and_full(query, key, value, case.layout, window, mask=mask, config=case.config))
    else:
        found = [attend(query, key, value, case.layout, window, mask=mask, config=case.config)]
    exact = _references((query.double(), key.double(), value.double()), case, window, mask)
    own = _references((query, key, value), case, window, mask)
    error = max(_largest(one, right) for one, right in zip(found, exact, strict=True))
    reference_error = max(_largest(one, right) for one, right in zip(own, exact, strict=True))
    return {
        "case": f"check: {case}",
        "forward_error": error,
        "reference_error": reference_error,
        "passed": error <= 2 * reference_error + FLOOR[case.dtype],
    }


def model_mask(kind: str, queries: int, keys: int, device: str) -> Tensor | None:
    """A mask that another third of the keys is hidden by for each query: "bool", "added", or None for "none"."""
    if kind == "none":
        return None
    places = torch.arange(queries, device=device)[:, None] + torch.arange(keys, device=device)
    seen = places % 3 != 0
    bias = (places % 7).to(torch.float32).masked_fill(~seen, -math.inf)
    return seen if kind == "bool" else bias


def _references(made: Operands, case: Check, window: Window, mask: Tensor | None) -> list[Tensor]:
    query, key, value = made
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    local = reference.local_attention(query, key, value, case.layout, window, mask=mask)
    return [local, reference.attention(query, key, value, mask)] if case.with_full else [local]


def _largest(one: Tensor, two: Tensor) -> float:
    return float((one.double() - two.double()).abs().max())


def sampled_error(found: Tensor, made: Operands, layout: Layout, window: Window | None, count: int = 64) -> float:
    """Largest difference from float32 attention at evenly spread queries of the first head."""
    query, key, value = (each[0, 0].float() for each in made)
    places = torch.linspace(0, layout.tokens - 1, count, device=query.device).long()
    scores = query[places] @ key.T * query.shape[-1] ** -0.5
    if window is not None:
        everything = torch.arange(layout.tokens, device=query.device)
        seen = reference.visible_pairs(layout, window, places[:, None], everything[None, :])
        scores = scores.masked_fill(~seen, -math.inf)
    return float((found[0, 0][places].float() - scores.softmax(-1) @ value).abs().max())


# --- implementations ------------------------------------------------------------------------------------------------


def dense(made: Operands) -> dict[str, Run]:
    """Dense attention by each backend of SDPA."""

    def run(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*made)

    return {name: partial(run, backend) for name, backend in BACKENDS.items()}


def coordinates(place: Tensor, width: int, tile: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Row and column of the image token at each place of the sequence, row-major or tile by tile."""
    if tile is None:
        return place // width, place % width
    height, across = tile
    which, inside = place // (height * across), place % (height * across)
    tiles = width // across
    return which // tiles * height + inside // across, which % tiles * across + inside % across


def tile_order(layout: Layout, tile: tuple[int, int] = TILE) -> Tensor:
    """The row-major token at each place when image tokens stand tile by tile after the text, which stays."""
    width = layout.grid[1]
    row, column = coordinates(torch.arange(layout.image_tokens), width, tile)
    return torch.cat([torch.arange(layout.before), row * width + column + layout.before])


class Flex:
    """FlexAttention of one layout, on tokens as they are or in tile order, compiled once for all radii.

    The radius is a tensor that the mask reads, so that no radius costs another compilation.
    """

    def __init__(self, layout: Layout, device: str) -> None:
        self.layout, self.device = layout, device
        self.squared = torch.zeros((), dtype=torch.int32, device=device)
        self.order = tile_order(layout).to(device)
        self.back = torch.argsort(self.order)
        self.attention = torch.compile(flex_attention, dynamic=False)
        self.mods = [self._mod(None), self._mod(TILE)]

    def _mod(self, tile: tuple[int, int] | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        text, width, squared = self.layout.before, self.layout.grid[1], self.squared

        def mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            one, two = (coordinates(place - text, width, tile) for place in (query, key))
            near = (one[0] - two[0]) ** 2 + (one[1] - two[1]) ** 2 < squared
            return (query < text) | (key < text) | near

        return mod

    def runs(self, made: Operands, radius: int) -> dict[str, Run]:
        """One callable per form; they share the radius, so those of the last call are the valid ones."""
        self.squared.fill_(radius * radius)
        tokens = self.layout.tokens
        rows, tiles = (
            create_block_mask(mod, None, None, tokens, tokens, device=self.device, _compile=True) for mod in self.mods
        )

        def permuted() -> Operands:
            query, key, value = (each[:, :, self.order] for each in made)
            return query, key, value

        def permuting() -> Tensor:
            return self.attention(*permuted(), block_mask=tiles)[:, :, self.back]

        return {
            "flex, row-major": partial(self.attention, *made, block_mask=rows),
            "flex, tiles": partial(self.attention, *permuted(), block_mask=tiles),
            "flex, tiles, permuting": permuting,
        }


# --- timing ---------------------------------------------------------------------------------------------------------


def interleaved_events(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat by CUDA events, implementations in turns, after two rounds that are not counted."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for round_ in range(-2, repeats):
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            if round_ >= 0:
                events[name].append((start, end))
            else:
                end.synchronize()
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / 1000 for start, end in pairs] for name, pairs in events.items()}


def usable(runs: dict[str, Run]) -> tuple[dict[str, Run], dict[str, str], dict[str, Tensor]]:
    """What runs at all, the reasons of what does not, and one output of each that does."""
    good, reasons, outputs = {}, {}, {}
    for name, run in runs.items():
        try:
            outputs[name] = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            good[name] = run
        except Exception as error:  # a backend that does not serve the shape, or a compiler that fails: a row says so
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return good, reasons, outputs


def measure(
    shape: Shape, window: Window | None, runs: dict[str, Run], made: Operands, repeats: int, note: Row
) -> list[Row]:
    """A row per implementation: time, error, useful rate; or why there is none."""
    layout = shape.layout
    good, reasons, outputs = usable(runs)
    in_place = {name: out for name, out in outputs.items() if name != "flex, tiles"}  # tile order cannot be compared
    errors = {name: sampled_error(out, made, layout, window) for name, out in in_place.items()}
    del outputs, in_place
    flops = 4 * visible_pairs(layout, window, layout.tokens) * shape.head_dim
    base: Row = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "dtype": str(shape.dtype).removeprefix("torch."),
        "heads": made[0].shape[1],
        "head_dim": shape.head_dim,
        "grid": f"{shape.side}x{shape.side}",
        "text_tokens": shape.text,
        "window": str(window) if window else "none",
        **note,
    }
    rows: list[Row] = [{**base, "implementation": name, "reason": reason} for name, reason in reasons.items()]
    for name, seconds in interleaved_events(good, repeats).items() if good else ():
        middle = statistics.median(seconds)
        rows.append(
            {
                **base,
                "implementation": name,
                "seconds": middle,
                "seconds_min": min(seconds),
                "seconds_max": max(seconds),
                "seconds_all_heads": middle * shape.heads / made[0].shape[1],
                "repeats": len(seconds),
                "forward_error": errors.get(name),
                "tflops_visible": flops * made[0].shape[1] / middle / 1e12,
            }
        )
    for one in rows:
        print(
            "  ", {key: one.get(key) for key in ("grid", "window", "implementation", "seconds", "reason")}, flush=True
        )
    return rows


def dense_heads(shape: Shape) -> int:
    """All heads where dense attention of them takes about a second at most, else a few or one."""
    flops = 4 * shape.layout.tokens**2 * shape.head_dim
    return max(1, min(shape.heads, int(2e14 // flops)))


# --- tuning ---------------------------------------------------------------------------------------------------------

CANDIDATES = tuple(
    Config(block_m, block_n, warps, stages)
    for block_m, block_n, warps, stages in (
        (64, 32, 4, 3),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 128, 4, 2),
        (128, 32, 4, 3),
        (128, 64, 4, 2),
        (128, 64, 4, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 8, 4),
        (128, 128, 8, 2),
        (256, 64, 8, 2),
    )
)


def tune(head_dims: tuple[int, ...], deadline: float) -> tuple[dict[str, Config], list[Row]]:
    """The fastest candidate of each head dimension by table entry, and a row per candidate."""
    best: dict[str, Config] = {}
    rows: list[Row] = []
    for head_dim in head_dims:
        if time.monotonic() > deadline:
            break
        found, one = tune_one(Shape(128, head_dim=head_dim), Window("disc", 16))
        best |= found
        rows += one
    return best, rows


def tune_one(shape: Shape, window: Window, repeats: int = 7) -> tuple[dict[str, Config], list[Row]]:
    """The fastest candidate for one shape, by its table entry (none if none ran), and a row per candidate."""
    arch = architecture(torch.device("cuda"))
    made = operands(shape.layout, shape.heads, shape.heads, shape.head_dim, shape.dtype, "cuda")
    add_mask = configs.config(arch, shape.dtype, shape.head_dim).add_mask
    candidates = {str(config): replace(config, add_mask=add_mask) for config in CANDIDATES}
    runs: dict[str, Run] = {
        name: partial(attend, *made, shape.layout, window, config=config) for name, config in candidates.items()
    }
    rows = measure(shape, window, runs, made, repeats, {"case": "tune"})
    timed: dict[str, float] = {}
    for row in rows:
        seconds = row.get("seconds")
        if isinstance(seconds, float):
            timed[str(row["implementation"])] = seconds
    if not timed:
        return {}, rows
    fastest = candidates[min(timed, key=timed.__getitem__)]
    return {configs.name(arch, shape.dtype, padded(shape.head_dim)): fastest}, rows


def write_table(best: dict[str, Config], path: Path) -> None:
    """The committed table with the entries of ``best`` in place of its own."""
    table = {**configs.table(), **best}
    entries = ",\n".join(f" {json.dumps(name)}: {json.dumps(asdict(table[name]))}" for name in sorted(table))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + entries + "\n}\n")
    print(f"configurations written to {path}")


def main() -> None:
    args = parse_arguments()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.attention_gpu needs a CUDA device, torch sees none")
    deadline = time.monotonic() + args.seconds
    rows = []
    for case in CHECKS:
        rows.append(check(case, "cuda"))
        print("  ", rows[-1], flush=True)
    failed = [row["case"] for row in rows if not row["passed"]]
    write_result("attention_gpu", rows, folder=args.output)
    tuned: dict[str, Config] = {}
    if args.tune and not failed:
        tuned, found = tune((128, 64), deadline)
        rows += found
        write_table(tuned, args.configs or args.output / "configs.json")
    # Large grids last: if time runs out, the smaller ones are there. What is done is on disk after every grid.
    for side in args.sides:
        for found in measure_side(Shape(side), args, tuned, deadline):
            rows += found
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        write_result("attention_gpu", rows, folder=args.output)
    if failed:
        sys.exit(f"the kernel disagrees with the reference: {failed}")


def measure_side(
    shape: Shape, args: argparse.Namespace, tuned: dict[str, Config], deadline: float
) -> Iterator[list[Row]]:
    """Dense attention, window and full attention in one launch, and every window, at one size of the image."""
    layout = shape.layout
    repeats = args.repeats if shape.side <= 256 else min(args.repeats, 5)
    entry = configs.name(architecture(torch.device("cuda")), shape.dtype, padded(shape.head_dim))
    config = tuned.get(entry)
    heads = dense_heads(shape)
    made = operands(layout, heads, heads, shape.head_dim, shape.dtype, "cuda")
    first = Window("disc", args.radii[0])
    runs = dense(made)
    runs[f"triton, full with {first}"] = partial(full_beside, made, layout, first)
    yield measure(shape, None, runs, made, repeats, {"case": "dense"})
    del runs, made
    made = operands(layout, shape.heads, shape.heads, shape.head_dim, shape.dtype, "cuda")
    flex = Flex(layout, "cuda")
    for radius in args.radii:
        if time.monotonic() > deadline:
            yield [{"case": "not measured", "grid": f"{shape.side}x{shape.side}", "reason": "out of time"}]
            return
        window = Window("disc", radius)
        runs = {"triton": partial(attend, *made, layout, window, config=config), **flex_runs(flex, made, radius)}
        yield measure(shape, window, runs, made, repeats, {"case": "window"})

    yield measure_band(shape, repeats, config)


def measure_band(shape: Shape, repeats: int, config: Config | None) -> list[Row]:
    """A band that sees an eighth of the image, which has no text: all that flash-attn's sliding window serves."""
    layout = Layout(shape.layout.grid)
    window = Window("band", layout.tokens // 16)
    made = operands(layout, shape.heads, shape.heads, shape.head_dim, shape.dtype, "cuda")
    runs: dict[str, Run] = {
        "triton": partial(attend, *made, layout, window, config=config),
        "flash-attn band": partial(flash_band, made, layout, window),
    }
    return measure(replace(shape, text=0), window, runs, made, repeats, {"case": "band"})


def flash_band(made: Operands, layout: Layout, window: Window) -> Tensor:
    """Attention by flash-attn's sliding window. Raises ``RuntimeError`` with the reason where it cannot be had."""
    shape = (made[0].shape[0], made[0].shape[1], made[0].shape[2], made[0].shape[3])
    call = LocalCall(layout, window, None, shape, made[0].dtype, made[0].device, key_heads=made[1].shape[1])
    reason = flash.why_not(call)
    if reason is not None:
        raise RuntimeError(reason)
    return flash.KERNEL.run(*made, None, call)


def full_beside(made: Operands, layout: Layout, window: Window) -> Tensor:
    """Full attention of the launch that gives window attention too."""
    return local_and_full(*made, layout, window)[1]


def flex_runs(flex: Flex, made: Operands, radius: int) -> dict[str, Run]:
    """FlexAttention's forms, or, where its block mask cannot be made, callables that say why."""
    try:
        return flex.runs(made, radius)
    except Exception as error:  # out of memory at 8192 pixels must not end the measurements
        message = f"block mask: {type(error).__name__}: {error}"

        def fail() -> Tensor:
            raise RuntimeError(message)

        return {"flex": fail}


if __name__ == "__main__":
    main()
