"""Runs the Triton kernel in Triton's interpreter and prints what it found as JSON, for tests of its numbers.

The interpreter has to be switched on before triton is imported, hence a process of its own.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import torch

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops import reference


@dataclass(frozen=True)
class Case:
    """One call; ``heads`` and ``groups``: of queries and of keys. ``mode``: what is called (see ``run``)."""

    grid: tuple[int, ...]
    window: str
    before: int = 0
    after: int = 0
    dtype: torch.dtype = torch.float32
    dim: int = 16
    value_dim: int = 16
    batch: int = 1
    heads: int = 1
    groups: int = 1
    pooled: int = 0
    queries: str = "all"
    strides: str = "heads first"
    scale: float | None = None
    mode: str = "attend"
    blocks: tuple[int, int] = (16, 16)
    add_mask: bool = False
    mask: str = "none"

    @property
    def layout(self) -> Layout:
        return Layout(self.grid, self.before, self.after)


BF16, F16 = torch.bfloat16, torch.float16

CASES = {
    "disc, odd grid": Case((7, 9), "disc:3", 2, 3),
    "disc, mask added": Case((7, 9), "disc:3", 2, 3, add_mask=True),
    "disc of radius 1": Case((5, 6), "disc:1"),
    "disc, larger than any row's rest": Case((11, 13), "disc:6", blocks=(32, 16)),
    "box": Case((7, 9), "box:2", 2, 3),
    "box, mask added": Case((7, 9), "box:2", 2, 3, add_mask=True),
    "box, patches larger than tiles": Case((9, 10), "box:2", blocks=(16, 32)),
    "band on an image": Case((7, 9), "band:10", 2, 3),
    "band of radius 1, mask added": Case((41,), "band:1", 1, 0, add_mask=True),
    "disc on a sequence": Case((37,), "disc:4", 1, 2),
    "box on a sequence": Case((37,), "box:4", 0, 2),
    "disc on a video": Case((3, 5, 6), "disc:3", 2, 1),
    "box on a video": Case((4, 5, 3), "box:1", 1),
    "disc on one frame": Case((1, 6, 7), "disc:3"),
    "a column of tokens": Case((19, 1), "disc:3"),
    "one token": Case((1, 1), "disc:2", 1),
    "window larger than the grid, disc": Case((5, 6), "disc:40", 3),
    "window larger than the grid, box": Case((5, 6), "box:9", 0, 3),
    "window larger than the grid, band": Case((5, 6), "band:99"),
    "box as high as the grid, not as wide": Case((4, 12), "box:5"),
    "more text than one block": Case((4, 5), "box:1", 21, 18),
    "no text": Case((8, 8), "disc:2"),
    "grouped queries": Case((5, 6), "disc:2", 3, dtype=F16, heads=4, groups=2, batch=2),
    "one key head": Case((5, 6), "disc:2", 3, heads=3, groups=1),
    "bfloat16": Case((6, 6), "disc:3", 3, dtype=BF16, dim=32, value_dim=32),
    "bfloat16, head dimension 72": Case((5, 5), "box:1", 3, dtype=BF16, dim=72, value_dim=72),
    "float16, head dimension 20": Case((5, 5), "box:1", 3, dtype=F16, dim=20, value_dim=20),
    "values of another dimension": Case((5, 5), "box:1", 3, dim=24, value_dim=40),
    "scale given": Case((5, 5), "box:1", 3, scale=0.9),
    "tokens first": Case((5, 6), "disc:2", 3, strides="tokens first", heads=2, batch=2),
    "cut out of one projection": Case((5, 6), "disc:2", 3, strides="fused", heads=2, batch=2),
    "last axis not contiguous": Case((5, 6), "disc:2", 3, strides="channels first", heads=2),
    "queries of the image alone": Case((5, 6), "disc:2", 3, 4, queries="image"),
    "queries of the image and the text after it": Case((5, 6), "disc:2", 3, 20, queries="image and after", pooled=2),
    "history before the image, queries of the rest": Case((2, 4, 4), "box:1", 32, 4, queries="image and after"),
    "pooled keys": Case((6, 6), "disc:2", 3, 2, pooled=9, heads=2),
    "pooled keys, queries of the image alone": Case((6, 6), "disc:2", 3, 2, pooled=9, queries="image"),
    "pooled keys, no text": Case((6, 6), "disc:2", pooled=9),
    "with full, disc": Case((7, 9), "disc:3", 2, 3, mode="with full"),
    "with full, disc, mask added": Case((7, 9), "disc:3", 2, 3, mode="with full", add_mask=True),
    "with full, box on a video": Case((3, 5, 4), "box:1", 2, 3, mode="with full"),
    "with full, band": Case((7, 9), "band:5", 2, 3, mode="with full", heads=2, groups=1),
    "with full, window larger than the grid": Case((4, 5), "disc:9", 2, mode="with full"),
    "with full, queries of the image alone": Case((4, 5), "disc:2", 2, mode="with full", queries="image"),
    "residual, float16": Case((7, 6), "disc:3", 2, mode="residual", dtype=F16),
    "residual, float32": Case((7, 6), "disc:3", 2, mode="residual"),
    "mask, bool, of each query": Case((7, 9), "disc:3", 2, 3, heads=2, batch=2, mask="bool, queries"),
    "mask, bool, of the keys alone": Case((5, 6), "disc:2", 3, 20, heads=2, batch=2, mask="bool, keys"),
    "mask, bool, masks added": Case((5, 6), "box:2", 3, add_mask=True, mask="bool, queries"),
    "mask, bool, of each head, grouped queries": Case((5, 6), "box:2", 3, heads=4, groups=2, mask="bool, heads"),
    "mask, added, of each query": Case((7, 9), "disc:3", 2, 3, heads=2, batch=2, mask="added, queries"),
    "mask, added, of the keys alone": Case((3, 5, 6), "disc:3", 3, 2, heads=2, mask="added, keys"),
    "mask, added, masks added": Case((5, 6), "box:2", 3, add_mask=True, mask="added, queries"),
    "mask, added, with the lowest number": Case((5, 6), "box:1", 3, 2, mask="added, lowest"),
    "mask, added, float16": Case((5, 6), "disc:2", 3, dtype=F16, mask="added, queries"),
    "mask, added, bfloat16": Case((5, 6), "disc:2", 3, dtype=BF16, mask="added, queries"),
    "mask, added, in float64": Case((5, 6), "disc:2", 3, mask="added, float64"),
    "mask, transposed in memory": Case((5, 6), "band:4", 3, mask="added, transposed"),
    "mask, pooled keys, queries of the image alone": Case(
        (6, 6), "disc:2", 3, 2, pooled=9, queries="image", mask="bool, queries"
    ),
    "mask, with full, bool": Case((7, 9), "disc:3", 2, 3, mode="with full", mask="bool, queries"),
    "mask, with full, added": Case((3, 5, 4), "box:1", 2, 3, mode="with full", mask="added, queries"),
    "mask, with full, keys of the rest alone": Case((5, 6), "disc:2", mode="with full", mask="bool, far"),
    "mask, residual, bool": Case((7, 6), "disc:3", 2, mode="residual", mask="bool, queries"),
    "64-bit offsets": Case((5, 6), "disc:2", 3, strides="tokens first", mode="wide"),
}


def operands(case: Case) -> list[torch.Tensor]:
    """Query, key and value (B, H, L, D) in the memory order asked for."""
    generator = torch.Generator().manual_seed(0)
    tokens = case.layout.tokens
    if case.strides == "fused":
        fused = torch.randn(case.batch, tokens, 3, case.heads, case.dim, generator=generator)
        return [(each * 1.5).to(case.dtype) for each in fused.permute(2, 0, 3, 1, 4).unbind(0)]
    made = []
    for heads, count, dim in (
        (case.heads, tokens, case.dim),
        (case.groups, tokens + case.pooled, case.dim),
        (case.groups, tokens + case.pooled, case.value_dim),
    ):
        order = {"heads first": (0, 1, 2, 3), "tokens first": (0, 2, 1, 3), "channels first": (0, 1, 3, 2)}[
            case.strides
        ]
        sizes = (case.batch, heads, count, dim)
        tensor = torch.randn([sizes[axis] for axis in order], generator=generator) * 1.5
        made.append(tensor.to(case.dtype).permute(*order))  # each of these orders is its own inverse
    if case.queries != "all":
        end = case.before + case.layout.image_tokens + (case.after if case.queries == "image and after" else 0)
        made[0] = made[0][:, :, case.before : end]
    return made


def model_mask(case: Case) -> torch.Tensor | None:
    """The model's own mask: its kind, and what it depends on or holds. Some queries see nothing under it."""
    if case.mask == "none":
        return None
    kind, form = case.mask.split(", ")
    queries, keys = operands(case)[0].shape[2], case.layout.tokens + case.pooled
    sizes = {"keys": (case.batch, 1, 1, keys), "heads": (case.heads, queries, keys)}.get(form, (queries, keys))
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(sizes, generator=generator) < 0.7
    if form == "far":
        seen = ~reference.visible(case.layout, Window.parse(case.window))
    if form != "keys":
        seen[..., 1, :] = False
        seen[..., -2, :] = False
    if kind == "bool":
        return seen
    bias = torch.randn(sizes, generator=generator, dtype=torch.float64)
    hidden = torch.finfo(case.dtype).min if form == "lowest" else float("-inf")
    added = bias.masked_fill(~seen, hidden).to(torch.float64 if form == "float64" else case.dtype)
    return added.mT.contiguous().mT if form == "transposed" else added


def expected(case: Case, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """What the reference gives in the operands' precision."""
    mask = model_mask(case)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    settings = (case.layout, Window.parse(case.window), case.scale, mask)
    local = reference.local_attention(query, key, value, *settings, pooled=case.pooled)
    if case.mode not in ("with full", "residual"):
        return [local]
    full = reference.attention(query, key, value, mask, case.scale)
    return [reference.residual(full, local) if case.mode == "residual" else local, full]


class Counted:
    """Counts, while in force, what the interpreted kernel multiplies and reads."""

    def __init__(self) -> None:
        self.products = 0
        self.rows = 0

    def __enter__(self) -> Counted:
        from triton.runtime.interpreter import InterpreterBuilder

        self.builder = InterpreterBuilder
        self.own = InterpreterBuilder.create_dot, InterpreterBuilder.create_masked_load

        def create_dot(builder, one, two, *others):
            self.products += one.data.shape[0] * two.data.shape[1] * one.data.shape[1]
            return self.own[0](builder, one, two, *others)

        def create_masked_load(builder, pointers, mask, *others):
            self.rows += int(mask.data.any(-1).sum())
            return self.own[1](builder, pointers, mask, *others)

        InterpreterBuilder.create_dot, InterpreterBuilder.create_masked_load = create_dot, create_masked_load
        return self

    def __exit__(self, *_: object) -> None:
        self.builder.create_dot, self.builder.create_masked_load = self.own


def work(case: Case, counted: Counted, made: list[torch.Tensor]) -> dict[str, list[int]]:
    """Pairs and keys of one head: those that were counted in a launch, and those that the kernel's module says."""
    from difa_compile.plugins.triton.configs import Config
    from difa_compile.plugins.triton.local_attention import counted_work, padded

    query, _, value = made
    heads = case.batch * case.heads
    pairs = counted.products // (padded(query.shape[3]) + padded(value.shape[3]))
    keys = counted.rows // heads - query.shape[2]  # each query is read once, a key as key and as value
    said = counted_work(
        case.layout, Window.parse(case.window), query.shape[2], case.pooled, Config(*case.blocks, warps=1, stages=1)
    )
    return {"counted": [pairs / heads, keys / 2], "said": list(said)}


def run(case: Case, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    from difa_compile.plugins.triton import local_attention as kernel
    from difa_compile.plugins.triton.configs import Config

    config = Config(*case.blocks, warps=1, stages=1, add_mask=case.add_mask)
    settings = (case.layout, Window.parse(case.window), case.scale, model_mask(case))
    if case.mode in ("with full", "residual"):
        residual = case.mode == "residual"
        return list(kernel.local_and_full(query, key, value, *settings, residual=residual, config=config))
    kernel.WIDE_FROM = 0 if case.mode == "wide" else 2**31
    return [kernel.attend(query, key, value, *settings, config=config)]


def largest(one: torch.Tensor, two: torch.Tensor) -> float:
    return (one.double() - two.double()).abs().max().item()


def compare(case: Case) -> dict[str, object]:
    """Largest errors against float64, of the kernel and of the reference in the same precision, for each output."""
    made = operands(case)
    exact = expected(case, *(each.double() for each in made))
    own = expected(case, *made)
    with Counted() as counted:
        found = run(case, *made)
    return {
        "work": work(case, counted, made) if case.mode == "attend" and case.mask == "none" else None,
        "errors": [largest(one, two) for one, two in zip(found, exact, strict=True)],
        "own": [largest(one, two) for one, two in zip(own, exact, strict=True)],
        "shapes": [list(each.shape) for each in found],
        "wanted": [list(each.shape) for each in own],
        "tokens_first": all(each.transpose(1, 2).is_contiguous() for each in found),
        "dtype": str(found[0].dtype),
    }


def reached(layout: Layout, window: str, token: int, blocks: tuple[int, int]) -> list[int]:
    """Queries whose output is NaN when the key and value of ``token`` are."""
    case = Case(layout.grid, window, layout.before, layout.after, blocks=blocks)
    query, key, value = operands(case)
    key[:, :, token] = float("nan")
    value[:, :, token] = float("nan")
    return run(case, query, key, value)[0].isnan().any(-1)[0, 0].nonzero().flatten().tolist()


def main() -> None:
    torch.set_num_threads(1)
    results = {name: compare(case) for name, case in CASES.items()}
    poisoned = reached(Layout((16, 16), 2), "disc:2", 2 + 5 * 16 + 5, (16, 16))
    print(json.dumps({"cases": results, "poisoned": poisoned}))


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"
    main()
