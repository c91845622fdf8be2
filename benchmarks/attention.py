"""How fast is local attention, against dense attention and every other way to compute it?

    python -m benchmarks.attention            # about a quarter of an hour on two cores
    python -m benchmarks.attention --quick    # a few small cases, a minute

All implementations of a case run in one process, interleaved, on the same tensors: (1, H, L, D) as views of
(1, L, H, D), which is how projections leave them. Plans of blocks (FlexAttention's masks, gathering indices, masks for
SDPA) and compilation fall outside the timed rounds; so does the permutation of tokens that "FlexAttention, tiles"
needs. The output of every implementation is compared with dense attention under a mask, in float64, at some queries.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from difa_compile.decision import Window, WindowShape
from difa_compile.layout import Layout
from difa_compile.ops import reference
from difa_compile.ops.kernels import LocalCall
from difa_compile.ops.pairs import visible_pairs
from difa_compile.plugins import cpu, flex, masked_sdpa, token_order

from . import natten_rival
from ._common import RESULTS, Row, interleave, write_result

DENSE = "SDPA, dense"
OURS = "difa CPU kernel"
PRODUCT = "matrix product"
SLOW = 2.0
"""Seconds from which a single timed round has to do."""
Call = Callable[[], Tensor]

compiled_flex = torch.compile(flex_attention, dynamic=False)


@dataclass(frozen=True)
class Setting:
    """One sequence of tokens, and the windows that are tried on it."""

    side: int
    heads: int
    windows: tuple[Window, ...]
    dtype: torch.dtype
    head_dim: int = 64
    text: int = 0

    @property
    def layout(self) -> Layout:
        return Layout((self.side, self.side), before=self.text)

    def flops(self, window: Window) -> int:
        """Operations of q k^T and p v over the visible pairs."""
        return 4 * visible_pairs(self.layout, window, self.layout.tokens) * self.heads * self.head_dim


def settings(quick: bool) -> Iterator[Setting]:
    discs = tuple(Window("disc", radius) for radius in (8, 16, 32))
    if quick:
        yield Setting(32, 2, (discs[0], Window("box", 4)), torch.float32)
        yield Setting(32, 2, (Window("band", 128),), torch.bfloat16, text=64)
        return
    yield Setting(64, 4, (Window("box", 8),), torch.float32)  # the one kind of window that NATTEN computes
    for dtype in (torch.float32, torch.bfloat16):
        for side in (32, 64, 128, 256, 512):  # 1 Ki to 256 Ki tokens
            band = (Window("band", side * side // 8),) if side <= 128 else ()
            yield Setting(side, 4 if side <= 128 else 1, (*discs, *band), dtype)
        for side in (64, 128):  # FLUX's heads at 1024 and 2048 pixels, two of them
            yield Setting(side, 2, discs[1:2], dtype, 128, text=512)


def operands(case: Setting) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, case.layout.tokens, case.heads, case.head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(case.dtype).transpose(1, 2) for _ in range(3))
    return q, k, v


def implementations(case: Setting, window: Window, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """What can compute a window here, by name."""
    layout = case.layout
    call = LocalCall(layout, window, None, tuple(q.shape), q.dtype, q.device)
    found: dict[str, Call] = {}
    if cpu.why_not(call) is None:
        found[OURS] = lambda: cpu.run(q, k, v, None, call)
    if layout.tokens <= 16384 + 512:
        if layout.tokens <= 4096 + 512:
            found["SDPA, masked"] = lambda: masked_sdpa.run(q, k, v, None, call)
        blocks = flex.block_mask(layout, window, q.device)
        found["FlexAttention, row-major"] = lambda: compiled_flex(q, k, v, block_mask=blocks)
    if window.shape is not WindowShape.BAND and layout.tokens <= 65536:
        if token_order.best(layout, window, layout.tokens)[0] is not None:
            found["FlexAttention, tiles"] = flex_in_tiles(case, window, q, k, v)
        if layout.tokens <= 16384 and not case.text:
            found["gathered tiles, SDPA"] = gathered(case, window, q, k, v)
    if natten_rival.why_not(window, case.side, case.text, case.dtype) is None:
        found[natten_rival.name()] = natten_rival.implementation(window, case.side, q, k, v)
    return found


def shifts(name: str) -> bool:
    """Whether an implementation moves windows at the borders, instead of cutting them off."""
    return name.startswith("NATTEN")


def flex_in_tiles(case: Setting, window: Window, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """FlexAttention on tokens in the order that our kernel for it would put them in."""
    layout = case.layout
    strips, _ = token_order.best(layout, window, layout.tokens)
    if strips is None:
        raise ValueError(f"{window} on {layout} takes no fewer blocks in another order")
    keys, queries, back = flex.orders(layout, strips, q.device, layout.tokens, 0)
    blocks = flex.block_mask(layout, window, q.device, strips=strips)
    one, two, three = q.index_select(2, queries), k.index_select(2, keys), v.index_select(2, keys)

    def run() -> Tensor:
        out: Tensor = compiled_flex(one, two, three, block_mask=blocks)
        return out

    run.back = back  # type: ignore[attr-defined]
    return run


def gathered(case: Setting, window: Window, q: Tensor, k: Tensor, v: Tensor, tile: int = 8) -> Call:
    """Plain PyTorch: the keys around each tile of queries gathered, tiles as a batch, a mask per distinct tile."""
    side = case.side
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


def error(
    case: Setting, window: Window, name: str, out: Tensor, q: Tensor, k: Tensor, v: Tensor, picks: int = 64
) -> float:
    """Largest difference to masked dense attention in float64, over the largest value, at some queries.

    The mask is that of the implementation's own definition of the window.
    """
    layout = case.layout
    at = torch.linspace(0, layout.tokens - 1, picks).long()
    keys = torch.arange(layout.tokens)[None]
    if shifts(name):
        seen = natten_rival.sees(case.side, window.radius, at[:, None], keys)
    else:
        seen = reference.visible_pairs(layout, window, at[:, None], keys)
    exact = reference.attention(q[:, :, at].double(), k.double(), v.double(), seen)
    return ((out[:, :, at].double() - exact).abs().max() / exact.abs().max()).item()


def flops(case: Setting, window: Window, name: str) -> int:
    """Operations over the pairs that an implementation's window holds."""
    if not shifts(name):
        return case.flops(window)
    return 4 * case.layout.tokens * (2 * window.radius + 1) ** 2 * case.heads * case.head_dim


def measure(case: Setting, repeats: int) -> list[Row]:
    q, k, v = operands(case)
    dense: dict[tuple[Window | None, str], Call] = {(None, DENSE): lambda: F.scaled_dot_product_attention(q, k, v)}
    calls: dict[tuple[Window | None, str], Call] = {}
    errors: dict[tuple[Window | None, str], float] = {}
    with torch.no_grad():
        for window in case.windows:
            for name, run in implementations(case, window, q, k, v).items():
                out, back = run(), getattr(run, "back", None)
                calls[window, name] = run
                out = out if back is None else out.index_select(2, back)
                errors[window, name] = error(case, window, name, out, q, k, v)
        slow = 4 * case.layout.tokens**2 * case.heads * case.head_dim / 1.5e11 > SLOW
        if slow:  # the dense side, up to minutes, once; the others as often as ever
            timings = interleave(dense, 1, warmup=0) | interleave(calls, repeats)
        else:
            timings = interleave(dense | calls, repeats)
    base = timings[None, DENSE]
    common: Row = {
        "device": "cpu",
        "dtype": str(case.dtype).removeprefix("torch."),
        "heads": case.heads,
        "head_dim": case.head_dim,
        "grid": f"{case.side}x{case.side}",
        "tokens": case.layout.tokens,
        "text_tokens": case.text,
    }
    rows: list[Row] = []
    for (window_, name), timing in timings.items():
        seconds = timing.median
        speedup = base.median / seconds if slow or name == DENSE else 1 / timing.ratio_to(base)
        rows.append(
            common
            | {
                "window": None if window_ is None else str(window_),
                "implementation": name,
                "definition": natten_rival.DEFINITION if shifts(name) else "as the plan's",
                "seconds": float(f"{seconds:.4g}"),
                "speedup_over_dense": round(speedup, 3),
                "visible_gflops": None if window_ is None else round(flops(case, window_, name) / seconds / 1e9, 1),
                "forward_error": float(f"{errors[window_, name]:.2g}") if window_ is not None else None,
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
                "implementation": PRODUCT,
                "seconds": float(f"{seconds:.4g}"),
                "visible_gflops": round(2 * 2048**3 / seconds / 1e9, 1),
                "repeats": 9,
            }
        )
    return rows


def memory_rate(mebibytes: int = 512) -> Row:
    """What the machine's memory reaches, for comparison: a copy, bytes read and bytes written."""
    source = torch.ones(mebibytes * 2**18)
    target = torch.empty_like(source)
    seconds = interleave({"copy": functools.partial(target.copy_, source)}, 9)["copy"].median
    return {
        "device": "cpu",
        "dtype": "float32",
        "implementation": "memory copy",
        "seconds": float(f"{seconds:.4g}"),
        "gigabytes_per_second": round(2 * source.nbytes / seconds / 1e9, 1),
        "repeats": 9,
    }


def with_shares(rows: list[Row]) -> list[Row]:
    """Also the rate on visible pairs as a share of the matrix product's rate in the same dtype."""
    rates = {row["dtype"]: row["visible_gflops"] for row in rows if row["implementation"] == PRODUCT}

    def share(row: Row) -> Row:
        mine, product = row.get("visible_gflops"), rates[row["dtype"]]
        if row["implementation"] == PRODUCT or not isinstance(mine, float) or not isinstance(product, float):
            return row
        return row | {"share_of_product": round(mine / product, 4)}

    return [share(row) for row in rows]


def linearity(rows: list[Row]) -> list[Row]:
    """The kernel's time for each length over that for a quarter of the tokens, per head, and likewise visible pairs."""
    found = {
        (row["dtype"], row["window"], row["tokens"]): (row["seconds"] / row["heads"], row["visible_gflops"])  # type: ignore[operator]
        for row in rows
        if row["implementation"] == OURS and row["head_dim"] == 64
    }
    growth: list[Row] = []
    for (dtype, window, tokens), (seconds, rate) in found.items():
        quarter = found.get((dtype, window, tokens // 4))  # type: ignore[operator]
        if quarter is not None:
            times, rates = seconds / quarter[0], rate / quarter[1]  # type: ignore[operator]
            growth.append(
                {
                    "dtype": dtype,
                    "window": window,
                    "tokens": tokens,
                    "time_over_a_quarter": round(times, 2),
                    "pairs_over_a_quarter": round(times * rates, 2),
                }
            )
    return growth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a few small cases")
    parser.add_argument("--output", default=RESULTS, type=type(RESULTS), help="folder of the result file")
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    rows = [*gemm_rates(), memory_rate()]
    for case in settings(args.quick):
        print(f"{case.dtype}, {case.layout}, {case.heads} heads", flush=True)
        torch._dynamo.reset()  # FlexAttention is compiled per window and shape, and Dynamo counts
        rows += measure(case, args.repeats)
    write_result("attention", with_shares(rows), folder=args.output)
    write_result("attention_linearity", linearity(rows), folder=args.output, script="attention")


if __name__ == "__main__":
    main()
