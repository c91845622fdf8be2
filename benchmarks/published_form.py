"""The same plan, run the published way: is compiling it worth it?

    python -m benchmarks.published_form

DiTFastAttn (arXiv 2406.08552) carries a plan out eagerly, through one attention processor per block that counts steps
and keeps the block's caches. Those processors are written here from the paper's definitions, with masked SDPA as the
window kernel, and run the plan of one threshold beside difa, eager full and inductor full, in one process, interleaved.
The images of the two planned cases must agree, else the benchmark stops.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import difa_compile
from difa_compile import Decision, Kind, Window, WindowShape
from difa_compile.comparison.metrics import psnr

from . import _demo
from ._common import RESULTS, Row, interleave, write_result

EAGER, INDUCTOR, PUBLISHED, DIFA = "eager, full", "inductor, full", "processors, planned", "difa, planned"
LEAST_PSNR = 60.0


class PlannedProcessor:
    """Self-attention of one block over a whole run, for diffusers' ``Attention.processor``.

    ``decisions[step]`` is what to do at each step. State: the step, the last computed output (after the output
    projection) and the residual of the last full step (per head, before it). The step wraps around at the end of a run.
    """

    def __init__(self, decisions: list[Decision], conditional_half: int, tokens: int) -> None:
        self.decisions = decisions
        self.conditional_half = conditional_half
        self.masks = {d.window: band_mask(d.window, tokens) for d in decisions if d.window is not None}
        self.residual_windows = residual_windows(decisions)
        self.step = 0
        self.output: Tensor | None = None
        self.residual: Tensor | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """``hidden_states`` (B, N, C), both CFG halves; returns (B, N, C)."""
        assert encoder_hidden_states is None
        assert attention_mask is None
        decision, residual_window = self.decisions[self.step], self.residual_windows[self.step]
        self.step = (self.step + 1) % len(self.decisions)
        half = slice(None)
        if decision.cfg_shared:
            rows = len(hidden_states) // 2
            half = slice(self.conditional_half * rows, (self.conditional_half + 1) * rows)
        if decision.kind is Kind.REUSE:
            assert self.output is not None
            return torch.cat([self.output[half]] * 2) if decision.cfg_shared else self.output
        x = hidden_states[half]
        q, k, v = (
            projection(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        if decision.window is None:
            heads = F.scaled_dot_product_attention(q, k, v)
            if residual_window is not None:
                residual = heads - F.scaled_dot_product_attention(q, k, v, attn_mask=self.masks[residual_window])
                self.residual = torch.cat([residual, residual]) if decision.cfg_shared else residual
        else:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=self.masks[decision.window])
            if decision.kind is Kind.WINDOW_RESIDUAL:
                assert self.residual is not None
                heads = heads + self.residual[half]
        output: Tensor = attn.to_out[1](attn.to_out[0](heads.transpose(1, 2).flatten(2)))
        self.output = torch.cat([output, output]) if decision.cfg_shared else output
        return self.output


def band_mask(window: Window, tokens: int) -> Tensor:
    """(N, N) bool, True where key j is visible to query i: ``|i - j| <= radius``. Only bands are published."""
    if window.shape is not WindowShape.BAND:
        raise ValueError(f"the published method has 1-D bands only, the plan has {window}")
    index = torch.arange(tokens)
    return (index[:, None] - index[None, :]).abs() <= window.radius


def residual_windows(decisions: list[Decision]) -> list[Window | None]:
    """For each full step the window its residual is needed for before the next full step, else None."""
    wanted: list[Window | None] = [None] * len(decisions)
    needed: Window | None = None
    for step in range(len(decisions) - 1, -1, -1):
        if decisions[step].kind is Kind.WINDOW_RESIDUAL:
            needed = decisions[step].window
        elif decisions[step].is_full:
            wanted[step], needed = needed, None
    return wanted


def install_processors(pipe: Any, plan: difa_compile.Plan, steps: int) -> None:
    """Give every site of the pipeline's transformer the processor that carries out its column of the plan."""
    resolved = plan.resolve(steps, pipe.scheduler)
    conditional_half = plan.settings.conditional_half
    assert conditional_half is not None
    for index, site in enumerate(plan.sites):
        decisions = [row[index] for row in resolved.rows]
        module = pipe.transformer.get_submodule(site.path)
        module.set_processor(PlannedProcessor(decisions, conditional_half, site.tokens))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="images per timed call")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument("--output", default=RESULTS, type=type(RESULTS), help="folder of the result file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    plan, _ = _demo.calibrated_plan(args.model, args.threshold, args.steps, rank="published")
    pipes = {name: _demo.load(args.model) for name in (EAGER, INDUCTOR, PUBLISHED, DIFA)}
    pipes[INDUCTOR].transformer.compile(dynamic=False)
    install_processors(pipes[PUBLISHED], plan, args.steps)
    difa_compile.apply(pipes[DIFA], plan, strict=True)

    rows: list[Row] = []
    for batch in args.batches:
        labels = _demo.labels_of(batch)
        agreement = float(psnr(*(_demo.sample(pipes[name], labels, args.steps) for name in (PUBLISHED, DIFA))).min())
        if not agreement >= LEAST_PSNR:
            raise SystemExit(f"the two planned cases differ: PSNR {agreement:.1f} dB, expected at least {LEAST_PSNR}")
        cases = {name: partial(_demo.sample, pipe, labels, args.steps) for name, pipe in pipes.items()}
        timings = interleave(cases, args.repeats, warmup=2)
        for name, timing in timings.items():
            row: Row = {"case": name, "steps": args.steps, "batch": batch, **timing.row()}
            row["ratio_to_processors"] = round(timing.ratio_to(timings[PUBLISHED]), 4)
            row["ratio_to_inductor"] = round(timing.ratio_to(timings[INDUCTOR]), 4)
            if name in (PUBLISHED, DIFA):
                row |= _demo.plan_row(plan, args.steps, pipes[name].scheduler)
                row["threshold"] = args.threshold
                row["least_psnr_between_planned_db"] = round(min(agreement, 999.0), 1)
            rows.append(row)
    write_result("published_form", rows, folder=args.output)


if __name__ == "__main__":
    main()
