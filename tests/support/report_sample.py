"""A plan and a comparison such as the demo makes, without running a model."""

from __future__ import annotations

import numpy as np
import torch

from difa_compile.backend.verdicts import Record
from difa_compile.comparison.compare import Comparison, Operations, Quality, Timing
from difa_compile.comparison.front import Origin, Point
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.demo.digits import DigitSplit, render
from difa_compile.layout import Layout
from difa_compile.plan.cost import flops_saved, plan_flops
from difa_compile.plan.plan import Cell, ModelInfo, Plan, Settings, SiteInfo, Trial

CANDIDATES = ("reuse", "window(band:32)+residual+cfg", "window(band:32)+residual", "full+cfg")


def make_plan(steps: int = 50, sites: int = 6, threshold: float = 0.05, seed: int = 0) -> Plan:
    """A greedy plan with losses that rise towards the end of the run and fall with depth."""
    random = np.random.default_rng(seed)
    candidates = [Decision.parse(text) for text in CANDIDATES]
    infos = tuple(
        SiteInfo(f"transformer_blocks.{i}.attn1", "self", 6, 64, 256, 384, Layout((16, 16))) for i in range(sites)
    )
    rows = []
    for step in range(steps):
        row = []
        for index, info in enumerate(infos):
            limit = (index + 1) / sites * threshold
            trials, chosen = [], FULL
            if step:
                level = 0.01 + 0.09 * abs(step / steps - 0.45)
                for rank, candidate in enumerate(candidates):
                    if index == 2 and candidate.window is not None:
                        trials.append(Trial(candidate, None, limit, "a mask stands on this attention"))
                        continue
                    loss = float(level * (1.5 - rank * 0.4) * random.lognormal(0, 0.25))
                    trials.append(Trial(candidate, loss, limit))
                    if loss < limit:
                        chosen = candidate
                        break
            row.append(Cell(chosen, tuple(trials), flops_saved(chosen, info)))
        rows.append(tuple(row))
    settings = Settings("greedy", threshold, "paper", "band:32", CANDIDATES, "batched", 0, "2.13.0", "0.42.1")
    progress = tuple((steps - step) / steps for step in range(steps))
    return Plan(ModelInfo("DiTTransformer2DModel", "ab" * 32, 6_412_032), settings, infos, progress, tuple(rows))


def make_comparison(plan: Plan, images: int = 20, size: int = 32, channels: int = 1, seed: int = 0) -> Comparison:
    """Rendered digits and a slightly disturbed copy, with times that follow the plan's FLOPs."""
    random = np.random.default_rng(seed)
    digits = torch.rand(images, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    pixels = render(DigitSplit(digits, torch.zeros(images)).digits, torch.Generator().manual_seed(seed)) / 2 + 0.5
    scaled = torch.nn.functional.interpolate(pixels.clamp(0, 1), size=(size, size)).repeat(1, channels, 1, 1)
    full = (scaled.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    noise = random.normal(0, 5, full.shape)
    planned = np.clip(full + noise, 0, 255).round().astype(np.uint8)
    planned[0] = full[0]
    costs = [plan_flops(plan, counted) for counted in (False, True)]
    operations = [Operations(cost.full_per_step, cost.planned_per_step) for cost in costs]
    slow = tuple(0.031 + random.random() * 0.002 for _ in range(plan.steps))
    shares = [flops / costs[1].full_per_step for flops in costs[1].planned_per_step]
    quick = tuple(0.016 + 0.015 * share + random.random() * 0.002 for share in shares)
    quality = Quality(1, 0.087, 33.9, 27.2, 0.972, 0.911, 0.84, 5.31, 5.62, 0.984, 0.976, 0.957)
    return Comparison(
        plan_digest=plan.digest,
        pipeline="DiTPipeline",
        device="cpu",
        dtype="float32",
        backend_full="inductor",
        steps=plan.steps,
        seeds=tuple(range(images // 10)),
        images_per_call=10,
        full=Timing((1.62, 1.60, 1.63), 31.2, slow),
        planned=Timing((1.05, 1.06, 1.03), 48.7, quick),
        quality=quality,
        cache_bytes=1_966_080,
        attention=operations[0],
        with_projections=operations[1],
        records=make_records(plan),
        images_full=full,
        images_planned=planned,
    )


def make_records(plan: Plan) -> tuple[Record, ...]:
    """One record per site and decision; one site could not be windowed."""
    records = [
        Record(site.path, str(decision), "full" if decision.is_full else "rewritten", "")
        for site in plan.sites
        for decision in (FULL, REUSE)
    ]
    reason = "the attention carries a mask, and a window under a mask is not defined"
    return (*records, Record(plan.sites[-1].path, "window(band:32)+residual", "skipped", reason))


POINTS = (
    Point("budget 0.2", Origin.PLANNER, 0.19, 35.2),
    Point("budget 0.3", Origin.PLAN, 0.29, 45.1),
    Point("reuse every <4>", Origin.RECIPE, 0.34, 31.2),
    Point("DiTFastAttn", Origin.SEARCH, 0.71, 28.4),
    Point("budget 1", Origin.PLANNER, 1.0, None),
)
"""A front, the same images among it."""
MACHINE = {"processor": "A CPU @ 2.00 GHz", "cores": "2 available, 2 used by torch", "memory": "8 GiB"}
