"""How fast is local attention, against dense attention and every other way to compute it?

    python -m benchmarks.attention            # about twenty minutes on two cores
    python -m benchmarks.attention --quick    # a few small cases, a minute

All implementations of a case run in one process, interleaved, on the same tensors: (1, H, L, D) as views of
(1, L, H, D), which is how projections leave them. Plans of blocks (FlexAttention's masks, gathering indices, masks for
SDPA) and compilation fall outside the timed rounds; so does the permutation of tokens that "FlexAttention, tiles"
needs. The output of every implementation is compared with dense attention under a mask, in float64, at some queries.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from difa_compile import reference
from difa_compile.cost import visible_pairs
from difa_compile.decision import Window, WindowShape
from difa_compile.layout import Layout
from difa_compile.ops import LocalCall
from difa_compile.plugins import cpu, flex, masked_sdpa

from ._common import RESULTS, Row, interleave, write_result

DENSE = "SDPA, dense"
OURS = "difa CPU kernel"
TILE = (8, 16)
"""A FlexAttention block of 128 tokens as a patch of the grid."""
SLOW = 2.0
"""Seconds from which a single timed round has to do."""
Call = Callable[[], Tensor]

compiled_flex = torch.compile(flex_attention, dynamic=False)
compiled_mask = torch.compile(create_block_mask, dynamic=False)


@dataclass(frozen=True)
class Case:
    side: int
    heads: int
    window: Window
    dtype: torch.dtype
    head_dim: int = 64
    text: int = 0

    @property
    def layout(self) -> Layout:
        return Layout((self.side, self.side), before=self.text)

    @property
    def flops(self) -> int:
        """Operations of q k^T and p v over the visible pairs."""
        pairs = visible_pairs(self.layout, self.window, self.layout.tokens)
        return 4 * pairs * self.heads * self.head_dim


def cases(quick: bool) -> Iterator[Case]:
    if quick:
        yield Case(32, 2, Window("disc", 8), torch.float32)
        yield Case(32, 2, Window("band", 128), torch.bfloat16, text=64)
        return
    for dtype in (torch.float32, torch.bfloat16):
        for side in (32, 64, 128, 256, 512):  # 1 Ki to 256 Ki tokens
            heads = 4 if side <= 128 else 1
            for radius in (8, 16, 32):
                yield Case(side, heads, Window("disc", radius), dtype)
            if side <= 128:
                yield Case(side, heads, Window("band", side * side // 8), dtype)
        for side, text in ((64, 512), (128, 512)):  # FLUX's heads at 1024 and 2048 pixels, a few of them
            yield Case(side, 2, Window("disc", 16), dtype, 128, text)


def operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, case.layout.tokens, case.heads, case.head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(case.dtype).transpose(1, 2) for _ in range(3))
    return q, k, v


def implementations(case: Case, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """What can run the case, by name; dense attention computes something else and is there for the time."""
    layout, window = case.layout, case.window
    call = LocalCall(layout, window, None, tuple(q.shape), q.dtype, q.device)
    found: dict[str, Call] = {DENSE: lambda: F.scaled_dot_product_attention(q, k, v)}
    if cpu.why_not(call) is None:
        found[OURS] = lambda: cpu.run(q, k, v, None, call)
    if layout.tokens <= 16384 + 512:
        if layout.tokens <= 4096 + 512:
            found["SDPA, masked"] = lambda: masked_sdpa.run(q, k, v, None, call)
        blocks = flex.block_mask(layout, window, q.device)
        found["FlexAttention, row-major"] = lambda: compiled_flex(q, k, v, block_mask=blocks)
    if window.shape is not WindowShape.BAND and case.text == 0 and layout.tokens <= 65536:
        if not any(size % tile for size, tile in zip(layout.grid, TILE, strict=True)):
            found["FlexAttention, tiles"] = flex_in_tiles(case, q, k, v)
        if layout.tokens <= 16384:
            found["gathered tiles, SDPA"] = gathered(case, q, k, v)
    return found


def tile_order(side: int) -> Tensor:
    """Tokens of a grid in the order of its patches, row-major inside each."""
    height, width = TILE
    token = torch.arange(side * side).view(side // height, height, side // width, width)
    return token.permute(0, 2, 1, 3).reshape(-1)


def flex_in_tiles(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Call:
    order = tile_order(case.side)
    back = order.argsort()
    layout, window = case.layout, case.window

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return reference.visible_pairs(layout, window, order[query], order[key])

    blocks = compiled_mask(mask_mod, None, None, layout.tokens, layout.tokens, device=q.device)
    one, two, three = (x.index_select(2, order) for x in (q, k, v))

    def run() -> Tensor:
        out: Tensor = compiled_flex(one, two, three, block_mask=blocks)
        return out

    run.back = back  # type: ignore[attr-defined]
    return run


def gathered(case: Case, q: Tensor, k: Tensor, v: Tensor, tile: int = 8) -> Call:
    """Plain PyTorch: the keys around each tile of queries gathered, tiles as a batch, a mask per distinct tile."""
    side, window = case.side, case.window
    reach = window.radius - 1 if window.shape is WindowShape.DISC else window.radius
    span = min(side, tile + 2 * reach)
    order = torch.arange(side * side).view(side // tile, tile, side // tile, tile).permute(0, 2, 1, 3)
    queries = order.reshape(-1, tile * tile)
    starts = (torch.arange(0, side, tile) - reach).clamp(0, side - span)
    along = starts[:, None] + torch.arange(span)
    keys = (along[:, None, :, None] * side + along[None, :, None, :]).reshape(len(queries), -1)
    seen = reference.visible_pairs(case.layout, window, queries[:, :, None], keys[:, None, :])
    kinds, kind = torch.unique(seen.flatten(1), dim=0, return_inverse=True)
    masks = torch.zeros(kinds.shape, dtype=q.dtype).masked_fill_(~kinds, -torch.inf).view(-1, *seen.shape[1:])
    back = queries.flatten().argsort()

    def tiles(x: Tensor, at: Tensor) -> Tensor:
        picked = x[0].index_select(1, at.flatten())  # (H, tiles * tokens, D)
        return picked.view(x.shape[1], len(at), -1, x.shape[3]).transpose(0, 1)

    def run() -> Tensor:
        mask = masks.index_select(0, kind)[:, None]
        out = F.scaled_dot_product_attention(tiles(q, queries), tiles(k, keys), tiles(v, keys), attn_mask=mask)
        flat = out.transpose(0, 1).reshape(q.shape[1], -1, q.shape[3])
        return flat.index_select(1, back)[None]

    return run


def error(case: Case, out: Tensor, q: Tensor, k: Tensor, v: Tensor, picks: int = 64) -> float:
    """Largest difference to masked dense attention in float64, over the largest value, at some queries."""
    layout = case.layout
    at = torch.linspace(0, layout.tokens - 1, picks).long()
    seen = reference.visible_pairs(layout, case.window, at[:, None], torch.arange(layout.tokens)[None])
    exact = reference.attention(q[:, :, at].double(), k.double(), v.double(), seen)
    return ((out[:, :, at].double() - exact).abs().max() / exact.abs().max()).item()


def measure(case: Case, repeats: int) -> list[Row]:
    q, k, v = operands(case)
    with torch.no_grad():
        calls = implementations(case, q, k, v)
        errors: dict[str, float | None] = {DENSE: None}
        for name, run in calls.items():
            if name != DENSE:
                out = run()
                back = getattr(run, "back", None)
                errors[name] = error(case, out if back is None else out.index_select(2, back), q, k, v)
                del out
        dense_seconds = 4 * case.layout.tokens**2 * case.heads * case.head_dim / 1.5e11
        slow = dense_seconds > SLOW
        if slow:  # the dense side, minutes long at the most tokens, once; the others as often as ever
            dense = interleave({DENSE: calls.pop(DENSE)}, 1, warmup=0)
            timings = dense | interleave(calls, repeats)
        else:
            timings = interleave(calls, repeats)
    common: Row = {
        "device": "cpu",
        "dtype": str(case.dtype).removeprefix("torch."),
        "heads": case.heads,
        "head_dim": case.head_dim,
        "grid": f"{case.side}x{case.side}",
        "tokens": case.layout.tokens,
        "text_tokens": case.text,
        "window": str(case.window),
    }
    rows: list[Row] = []
    for name, timing in timings.items():
        seconds = timing.median
        speedup = timings[DENSE].median / seconds if slow or name == DENSE else 1 / timing.ratio_to(timings[DENSE])
        rows.append(
            common
            | {
                "implementation": name,
                "seconds": float(f"{seconds:.4g}"),
                "speedup_over_dense": round(speedup, 3),
                "visible_gflops": round(case.flops / seconds / 1e9, 1) if name != DENSE else None,
                "forward_error": None if errors[name] is None else float(f"{errors[name]:.2g}"),
                "repeats": len(timing.seconds),
            }
        )
    return rows


def gemm_rates() -> list[Row]:
    """What the machine's matrix products reach, for comparison: 2048 x 2048 x 2048."""
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(2048, 2048).to(dtype)
        seconds = interleave({"gemm": functools.partial(torch.mm, a, a)}, 9)["gemm"].median
        rows.append(
            {
                "device": "cpu",
                "dtype": str(dtype).removeprefix("torch."),
                "implementation": "matrix product",
                "seconds": float(f"{seconds:.4g}"),
                "visible_gflops": round(2 * 2048**3 / seconds / 1e9, 1),
                "repeats": 9,
            }
        )
    return rows


def linearity(rows: list[Row]) -> list[str]:
    """Time at four times the tokens over time, for the longest sequences, where 4 is linear."""
    lines = []
    times = {
        (row["dtype"], row["window"], row["grid"]): row["seconds"] for row in rows if row["implementation"] == OURS
    }
    for (dtype, window, grid), seconds in times.items():
        small = times.get((dtype, window, "128x128"))
        heads = 4  # the smaller case has four times the heads
        if grid == "256x256" and isinstance(small, float) and isinstance(seconds, float) and small:
            lines.append(f"{dtype} {window}: time(65536) / time(16384) = {seconds / (small / heads):.2f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a few small cases")
    parser.add_argument("--output", default=RESULTS, type=type(RESULTS), help="folder of the result file")
    args = parser.parse_args()
    rows = gemm_rates()
    for case in cases(args.quick):
        print(f"{case.dtype}, {case.layout}, {case.heads} heads, {case.window}", flush=True)
        rows += measure(case, args.repeats)
    write_result("attention", rows, folder=args.output)
    print("\n".join(linearity(rows)))
    assert math.isfinite(sum(float(row["seconds"] or 0) for row in rows))


if __name__ == "__main__":
    main()
