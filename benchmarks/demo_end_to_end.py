"""How long does the demo model take with a plan, against plain inductor, and what does it cost in quality?

    python -m benchmarks.demo_end_to_end

All cases run in one process, one after the other in every round: eager, plain inductor, difa with an all-full plan
(its overhead), difa with the plan of each threshold, weighed by FLOPs and as the published program chooses.
``ratio_to_inductor`` is the median over the rounds of a case's time over plain inductor's in the same round. Quality
compares images of the same seeds with plain inductor's, and the sets of images with held-out real digits.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

import difa_compile
from difa_compile.comparison.metrics import frechet_distance, judge_agreement, judged_right, psnr, ssim
from difa_compile.demo.digits import load_split, sample_batch
from difa_compile.demo.judge import DigitJudge, load_judge

from . import _demo
from ._common import RESULTS, Row, interleave, write_result

EAGER, INDUCTOR, OVERHEAD = "eager, full", "inductor, full", "difa, full plan"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8, help="images per timed call")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.05, 0.1, 0.15])
    parser.add_argument("--images", type=int, default=500, help="images for quality; 0 leaves it out")
    parser.add_argument("--quality-batch", type=int, default=50)
    parser.add_argument("--output", default=RESULTS, type=type(RESULTS), help="folder of the result file")
    return parser.parse_args()


def generate(pipe: Any, count: int, batch: int, steps: int) -> tuple[Tensor, Tensor]:
    """``count`` images in batches of equal size, class after class, seed after seed, and their labels."""
    images, labels = [], []
    for seed, start in enumerate(range(0, count, batch)):
        wanted = _demo.labels_of(batch, start)
        images.append(_demo.sample(pipe, wanted, steps, seed))
        labels.extend(wanted)
    return torch.cat(images)[:count], torch.tensor(labels[:count])


def quality_row(images: Tensor, reference: Tensor, real: Tensor, labels: Tensor, judge: DigitJudge) -> Row:
    """Medians over pairs (infinite PSNR, equal images, is null); distances of sets; the judge's word."""
    closeness = float(psnr(images, reference).median())
    return {
        "images": len(images),
        "psnr_db": round(closeness, 2) if math.isfinite(closeness) else None,
        "ssim": round(float(ssim(images, reference).median()), 4),
        "frechet_to_real": round(frechet_distance(real, images, judge), 3),
        "frechet_to_full": round(frechet_distance(reference, images, judge), 3),
        "judged_right": round(judged_right(images, labels, judge), 4),
        "judge_agrees_with_full": round(judge_agreement(images, reference, judge), 4),
    }


def main() -> None:
    args = parse_arguments()
    torch._dynamo.config.recompile_limit = 64  # one for every case and batch size
    plans = {
        f"difa, threshold {value:g}{note}": _demo.calibrated_plan(args.model, value, args.steps, rank)[0]
        for rank, note in (("flops", ""), ("published", ", published choice"))
        for value in args.thresholds
    }
    pipes = {name: _demo.load(args.model) for name in (EAGER, INDUCTOR, OVERHEAD, *plans)}
    pipes[INDUCTOR].transformer.compile(dynamic=False)
    plans = {OVERHEAD: _demo.full_plan(pipes[OVERHEAD], args.steps), **plans}
    applied = {name: difa_compile.apply(pipes[name], plan, strict=True) for name, plan in plans.items()}

    labels = _demo.labels_of(args.batch)
    cases = {name: partial(_demo.sample, pipe, labels, args.steps) for name, pipe in pipes.items()}
    timings = interleave(cases, args.repeats, warmup=2)

    rows: list[Row] = []
    for name, timing in timings.items():
        row: Row = {"case": name, "steps": args.steps, "batch": args.batch, **timing.row()}
        row["ratio_to_inductor"] = round(timing.ratio_to(timings[INDUCTOR]), 4)
        if name in plans:
            row |= _demo.plan_row(plans[name], args.steps, pipes[name].scheduler)
            last_run = applied[name].last_run
            assert last_run is not None
            row["cache_peak_bytes"] = last_run.peak_cache_bytes
        rows.append(row)

    write_result("demo_end_to_end", rows, folder=args.output)  # the images below take long
    if args.images:
        judge = load_judge()
        real = sample_batch(load_split(held_out=True), args.images, torch.Generator().manual_seed(0))[0] / 2 + 0.5
        reference, wanted = generate(pipes[INDUCTOR], args.images, args.quality_batch, args.steps)
        for row in rows:
            images, _ = generate(pipes[str(row["case"])], args.images, args.quality_batch, args.steps)
            row |= quality_row(images, reference, real, wanted, judge)
        write_result("demo_end_to_end", rows, folder=args.output)


if __name__ == "__main__":
    main()
