"""What does the first call at each further batch size take, and is what serves all sizes slower in the end?

    python -m benchmarks.batch_sizes

The demo model with the plan of a threshold, sampled with one number of images after the other: plain
``torch.compile(dynamic=False)`` and ``torch.compile`` left to itself (dynamic from the second size on), each difa plan
with a compile per size and with ``dynamic=True``. Compiler caches are off. ``first_seconds`` is the first call at a
size, compilation included; ``seconds`` the median of interleaved later calls at that size.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial

import torch

import difa_compile

from . import _demo
from ._common import RESULTS, Row, interleave, write_result

STATIC, AUTOMATIC = "inductor, a compile per size", "inductor, dynamic"
PLANNED, DYNAMIC = "difa, a compile per size", "difa, dynamic"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 3, 6], help="images per call, in this order")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default=RESULTS, type=type(RESULTS), help="folder of the result file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    plan, _ = _demo.calibrated_plan(args.model, args.threshold, args.steps)
    pipes = {name: _demo.load(args.model) for name in (STATIC, AUTOMATIC, PLANNED, DYNAMIC)}
    pipes[STATIC].transformer.compile(dynamic=False)
    pipes[AUTOMATIC].transformer.compile()
    difa_compile.apply(pipes[PLANNED], plan, strict=True)
    difa_compile.apply(pipes[DYNAMIC], plan, strict=True, dynamic=True)

    rows: list[Row] = []
    with torch._inductor.config.patch(force_disable_caches=True), torch._dynamo.config.patch(recompile_limit=64):
        for size in args.sizes:
            labels = _demo.labels_of(size)
            first = {}
            for name, pipe in pipes.items():
                print(f"{size} images, {name}", file=sys.stderr, flush=True)
                began = time.perf_counter()
                _demo.sample(pipe, labels, args.steps)
                first[name] = time.perf_counter() - began
            cases = {name: partial(_demo.sample, pipe, labels, args.steps) for name, pipe in pipes.items()}
            timings = interleave(cases, args.repeats)
            rows += [
                {
                    "case": name,
                    "batch": size,
                    "steps": args.steps,
                    "first_seconds": round(first[name], 2),
                    **timing.row(),
                    "ratio_to_inductor": round(timing.ratio_to(timings[STATIC]), 4),
                    "ratio_to_planned": round(timing.ratio_to(timings[PLANNED]), 4),
                }
                for name, timing in timings.items()
            ]
    write_result("batch_sizes", rows, folder=args.output)


if __name__ == "__main__":
    main()
