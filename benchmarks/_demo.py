"""The demo model as the benchmarks use it: loading, sampling with fixed seeds, calibrated plans kept on disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import difa_compile
from difa_compile import FULL, Plan
from difa_compile.demo.digits import NUM_CLASSES
from difa_compile.pipeline.rules import plan_from_rule
from difa_compile.plan.cost import plan_flops
from difa_compile.plan.schedule import buckets

from ._common import ROOT, Row

PLANS = ROOT / "benchmarks" / "plans"
GUIDANCE = 4.0
CALIBRATION_LABELS = tuple(range(8))
LOSS = {"flops": "paper", "published": "code"}
"""Which loss each way of choosing calibrates with."""


def load(model: str) -> Any:
    """A quiet pipeline in float32; each call loads its own, so that several can be compiled side by side."""
    pipe = difa_compile.load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, labels: list[int], steps: int, seed: int = 0, guidance: float = GUIDANCE) -> Tensor:
    """Images (N, 1, 32, 32) float32 in [0, 1] of ``labels``; equal seeds start from equal noise."""
    images = pipe(
        class_labels=labels,
        guidance_scale=guidance,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)[:, :1].contiguous()


def labels_of(count: int, start: int = 0) -> list[int]:
    return [(start + index) % NUM_CLASSES for index in range(count)]


def full_plan(pipe: Any, steps: int) -> Plan:
    return plan_from_rule(pipe, steps, lambda step, site: FULL)


def plan_path(model: str, threshold: float, steps: int, rank: str) -> Path:
    """Where the plan is kept: its name says how it was chosen, the loss too where it is not the paper's."""
    prefix = "" if model == "demo" else Path(model).name + "-"
    chosen = rank if LOSS[rank] == "paper" else f"{rank}-{LOSS[rank]}"
    return PLANS / f"{prefix}{chosen}-threshold-{threshold:g}-steps-{steps}.json"


def calibrated_plan(model: str, threshold: float, steps: int, rank: str = "flops") -> tuple[Plan, Path]:
    """The plan of ``threshold`` from ``benchmarks/plans``; calibrated and saved there if it is not yet.

    ``rank`` as in :func:`difa_compile.calibrate`; not by time, since that would bind the plan to a machine.
    ``"published"`` goes with the loss of the published program, since only the two together choose as it does.
    A plan on disk for another model is refused (``PlanMismatchError``): delete it to have it made anew.
    """
    pipe = load(model)
    path = plan_path(model, threshold, steps, rank)
    if path.exists():
        plan = Plan.load(path)
        plan.validate(pipe.transformer)
        return plan, path
    print(f"calibrating threshold {threshold:g}", file=sys.stderr)
    inputs = {
        "class_labels": list(CALIBRATION_LABELS),
        "guidance_scale": GUIDANCE,
        "generator": torch.Generator().manual_seed(1234),
    }
    plan = difa_compile.calibrate(pipe, inputs, steps=steps, threshold=threshold, rank=rank, loss=LOSS[rank])
    PLANS.mkdir(parents=True, exist_ok=True)
    plan.save(path)
    return plan, path


def plan_row(plan: Plan, steps: int, scheduler: object) -> Row:
    """What a plan computes of the attention FLOPs, both conventions, and how many distinct rows it has."""
    resolved = plan.resolve(steps, scheduler)
    return {
        "attention_flops_share": round(plan_flops(resolved, False).share, 4),
        "attention_flops_share_with_projections": round(plan_flops(resolved, True).share, 4),
        "distinct_rows": len(buckets(resolved.roles)),
    }
