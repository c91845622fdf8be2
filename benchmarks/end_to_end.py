"""How much faster is a denoising step with local attention, on shapes of real models from 1024 to 4096 pixels?

    python -m benchmarks.end_to_end --sides 64 128                              # a quarter of an hour on two cores
    python -m benchmarks.end_to_end --sides 256 --result end_to_end_4096px      # longer: dense attention over 65536
    python -m benchmarks.end_to_end --quick                                     # the smallest size only, two repeats

Random weights, two blocks of FLUX, PixArt and Wan with their head sizes and four heads, a batch of one: speed, not
quality. A case is a schedule of four steps (one at 65536 tokens, where dense attention takes minutes);
``seconds`` is per step, the median over interleaved rounds, compilation outside. Plans:

- ``window``: every step and site sees a disc of radius 16 (CLEAR's r = 16).
- ``band + residual``: DiTFastAttn's window of an eighth of the tokens per side; the first step full, the others add its
  residual.
- ``disc + residual, reuse``: a full step, then disc with residual, reuse, disc with residual.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import difa_compile
from difa_compile import FULL, REUSE, Decision, Plan
from difa_compile.pipeline.rules import plan_from_rule
from difa_compile.plan.cost import cost_breakdown
from difa_compile.plan.plan import SiteInfo

from ._common import RESULTS, Row, interleave, write_result

PLAIN = "inductor, full"
SIDES = (64, 128, 256)
HEADS = 4


@dataclass(frozen=True)
class Shaped:
    """A model, its call and how many pixels of a side its tokens stand for."""

    model: nn.Module
    inputs: dict[str, Any]
    tokens: int
    size: str


def flux(side: int, dtype: torch.dtype) -> Shaped:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=128,
        num_attention_heads=HEADS, joint_attention_dim=256, pooled_projection_dim=64, axes_dims_rope=(16, 56, 56),
        guidance_embeds=True,
    )  # fmt: skip
    text = 512
    rows, columns = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    inputs = {
        "hidden_states": torch.randn(1, side * side, 64, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, text, 256, dtype=dtype),
        "pooled_projections": torch.randn(1, 64, dtype=dtype),
        "timestep": torch.full((1,), 0.5, dtype=dtype),
        "img_ids": torch.stack([torch.zeros(side * side), rows.flatten(), columns.flatten()], 1),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((1,), 3.5, dtype=dtype),
        "return_dict": False,
    }
    return Shaped(model.to(dtype).eval(), inputs, side * side + text, f"{16 * side} px")


def pixart(side: int, dtype: torch.dtype) -> Shaped:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=72 * HEADS, sample_size=2 * side, patch_size=2, caption_channels=256,
        use_additional_conditions=False,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 2 * side, 2 * side, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 300, 256, dtype=dtype),
        "timestep": torch.full((1,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    return Shaped(model.to(dtype).eval(), inputs, side * side, f"{16 * side} px")


def wan(side: int, dtype: torch.dtype) -> Shaped:
    from diffusers import WanTransformer3DModel

    frames, height, width = {64: (4, 32, 32), 128: (4, 64, 64), 256: (16, 64, 64)}[side]
    model = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=256, freq_dim=256,
        ffn_dim=2048, num_layers=2,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width, dtype=dtype),
        "timestep": torch.full((1,), 500),
        "encoder_hidden_states": torch.randn(1, 512, 256, dtype=dtype),
        "return_dict": False,
    }
    size = f"{4 * (frames - 1) + 1} frames of {16 * height} x {16 * width}"
    return Shaped(model.to(dtype).eval(), inputs, frames * height * width, size)


MODELS: dict[str, Callable[[int, torch.dtype], Shaped]] = {"FLUX": flux, "PixArt": pixart, "Wan": wan}


def plans(shaped: Shaped, steps: int) -> dict[str, Plan]:
    band = f"window(band:{shaped.tokens // 8})"
    disc = "window(disc:16)"

    def rows(*decisions: str) -> Callable[[int, SiteInfo], Decision]:
        return lambda step, site: Decision.parse(decisions[step % len(decisions)])

    rules = {"window": rows(disc)}
    if steps > 1:
        rules["band + residual"] = lambda step, site: Decision.parse(f"{band}+residual") if step else FULL
        rules["disc + residual, reuse"] = lambda step, site: [
            FULL,
            Decision.parse(f"{disc}+residual"),
            REUSE,
            Decision.parse(f"{disc}+residual"),
        ][step % 4]
    return {name: plan_from_rule(shaped.model, steps, rule, inputs=shaped.inputs) for name, rule in rules.items()}


def measure(name: str, side: int, dtype: torch.dtype, repeats: int) -> list[Row]:
    torch.manual_seed(0)
    shaped = MODELS[name](side, dtype)
    steps = 1 if side == SIDES[-1] else 4
    torch._dynamo.reset()
    compiled: dict[str, Any] = {PLAIN: torch.compile(shaped.model, dynamic=False)}
    shares: dict[str, float | None] = {PLAIN: None}
    with torch.no_grad():
        made = plans(shaped, steps)
        if side == SIDES[0]:
            made = {"difa, full plan": plan_from_rule(shaped.model, steps, lambda *_: FULL, inputs=shaped.inputs)} | {
                f"difa, {key}": plan for key, plan in made.items()
            }
        else:
            made = {f"difa, {key}": plan for key, plan in made.items()}
        for key, plan in made.items():
            options: dict[str, Any] = {"plan": plan, "strict": True}
            compiled[key] = torch.compile(shaped.model, backend="difa", options=options, dynamic=False)
            shares[key] = cost_breakdown(plan).attention.share

        def schedule(model: Any, planned: bool) -> None:
            if not planned:
                for _ in range(steps):
                    model(**shaped.inputs)
                return
            with difa_compile.sampling(model, steps) as run:
                for step in range(steps):
                    run.step(step)
                    model(**shaped.inputs)

        cases = {
            key: (lambda model=model, planned=key != PLAIN: schedule(model, planned)) for key, model in compiled.items()
        }
        timings = interleave(cases, repeats if steps > 1 else 1)
    return [
        {
            "model": name,
            "size": shaped.size,
            "tokens": shaped.tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "case": key,
            "steps": steps,
            "seconds": round(timing.median / steps, 4),
            "ratio_to_inductor": round(timing.ratio_to(timings[PLAIN]), 4),
            "speedup": round(1 / timing.ratio_to(timings[PLAIN]), 2),
            "attention_flops_share": shares[key],
            "repeats": len(timing.seconds),
        }
        for key, timing in timings.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--sides", nargs="+", type=int, default=list(SIDES), choices=SIDES, help="tokens per side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the smallest size only, two repeats")
    parser.add_argument("--result", default="end_to_end", help="name of the result file")
    parser.add_argument("--output", default=RESULTS, type=type(RESULTS), help="folder of the result file")
    args = parser.parse_args()
    rows: list[Row] = []
    for dtype in args.dtypes:
        for name in args.models:
            for side in args.sides[:1] if args.quick else args.sides:
                print(f"{name}, {side} tokens a side, {dtype}", file=sys.stderr, flush=True)
                rows += measure(name, side, getattr(torch, dtype), 2 if args.quick else args.repeats)
    write_result(args.result, rows, folder=args.output, script="end_to_end")


if __name__ == "__main__":
    main()
