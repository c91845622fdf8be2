"""At equal time, what is left of the images: our plans, and the recipes of other tools?

    python -m benchmarks.planner --plans benchmarks/plans/flops-threshold-0.1-steps-50.json

Every recipe of ``benchmarks.peers`` on the demo model, and the plans given. Cases run in groups: all of a group and
plain inductor in one process, interleaved; ``ratio_to_inductor`` is the median over the rounds of a case's time over
plain inductor's in the same round. Quality compares images of the same seeds with plain inductor's. A second result,
``planner_budgets``, has for each share of inductor's time the best row of each tool within it.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import difa_compile
from difa_compile import Plan
from difa_compile.comparison.metrics import psnr
from difa_compile.demo.digits import load_split, sample_batch
from difa_compile.demo.judge import load_judge

from . import _demo, peers
from ._common import RESULTS, Row, interleave, write_result
from .demo_end_to_end import generate, quality_row
from .peers import Case

INDUCTOR = "inductor, full"
OURS = "difa"
BUDGETS = (0.7, 0.5, 0.4, 0.3, 0.2)
UNEVEN = 0.03
"""By how much, as a share of it, a time may be over a budget: no machine measures it more exactly."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8, help="images per call")
    parser.add_argument("--repeats", type=int, default=7)
    ours = sorted(_demo.PLANS.glob("planner-budget-*"))
    parser.add_argument("--plans", nargs="*", default=ours, type=Path, help="plan files of ours, each a case")
    parser.add_argument("--cases", default="", help="only the cases whose name this regular expression is found in")
    parser.add_argument("--eager", action="store_true", help="each recipe also without torch.compile")
    parser.add_argument("--group", type=int, default=8, help="cases that are timed together with plain inductor")
    parser.add_argument("--images", type=int, default=100, help="images for quality; 0 leaves it out")
    parser.add_argument("--output", default=RESULTS, type=type(RESULTS), help="folder of the result files")
    return parser.parse_args()


def our_cases(paths: Sequence[Path]) -> Iterator[Case]:
    """Plans of ours as cases, named after their files."""
    for path in paths:
        plan = Plan.load(path)

        def prepare(pipe: Any, steps: int, plan: Plan = plan) -> None:
            difa_compile.apply(pipe, plan, strict=True)

        yield Case(f"difa, {path.stem}", OURS, {"plan": path.name}, prepare)


def wanted_cases(args: argparse.Namespace) -> list[Case]:
    found = [*our_cases(args.plans), *peers.cases()]
    if args.eager:
        found += [peers.eager(case) for case in found if case.compile is not None]
    return [case for case in found if re.search(args.cases, case.name)]


def notes_of_missing() -> list[Row]:
    return [{"case": tool, "tool": tool, "note": "not installed"} for tool in peers.missing()]


def loaded(cases: Iterable[Case], args: argparse.Namespace, rows: list[Row]) -> dict[str, tuple[Case, Any]]:
    """The cases that a first call goes well with; of another the row tells why not."""
    ready = {}
    for case in cases:
        try:
            pipe = case.load("demo", args.steps)
            _demo.sample(pipe, _demo.labels_of(args.batch), args.steps)
        except Exception as error:  # whatever another tool raises
            print(f"{case.name}: {error}", file=sys.stderr)
            rows.append(described(case) | {"note": f"{type(error).__name__}: {str(error)[:300]}"})
        else:
            ready[case.name] = (case, pipe)
    return ready


def described(case: Case) -> Row:
    settings = ", ".join(f"{key}={value}" for key, value in case.settings.items())
    return {"case": case.name, "tool": case.tool, "version": peers.version(case.tool), "settings": settings}


def measure(cases: Sequence[Case], args: argparse.Namespace, quality: Quality | None) -> list[Row]:
    """Rows of one group. Nothing compiled outlives it: guards of a hundred pipelines would slow every call."""
    torch._dynamo.reset()
    rows: list[Row] = []
    plain = _demo.load("demo")
    plain.transformer.compile(dynamic=False)
    ready = loaded(cases, args, rows)
    pipes = {INDUCTOR: plain, **{name: pipe for name, (_, pipe) in ready.items()}}
    labels = _demo.labels_of(args.batch)
    timings = interleave({name: partial(_demo.sample, pipe, labels, args.steps) for name, pipe in pipes.items()},
                         args.repeats)  # fmt: skip
    for name, timing in timings.items():
        row: Row = described(ready[name][0]) if name in ready else {"case": name}
        row |= {"steps": args.steps, "batch": args.batch, **timing.row()}
        row["ratio_to_inductor"] = round(timing.ratio_to(timings[INDUCTOR]), 4)
        if quality is not None:
            row |= quality.of(pipes[name])
        rows.append(row)
    return rows


class Quality:
    """What a pipeline's images are worth, against plain inductor's of the same seeds.

    They are made in batches as large as those timed: other sizes would be compiled anew.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.judge = load_judge()
        self.real = sample_batch(load_split(held_out=True), args.images, torch.Generator().manual_seed(0))[0] / 2 + 0.5
        plain = _demo.load("demo")
        plain.transformer.compile(dynamic=False)
        self.reference, self.labels = self.images(plain)

    def images(self, pipe: Any) -> tuple[Tensor, Tensor]:
        return generate(pipe, self.args.images, self.args.batch, self.args.steps)

    def of(self, pipe: Any) -> Row:
        images, _ = self.images(pipe)
        mean = float(psnr(images, self.reference).mean())
        row = quality_row(images, self.reference, self.real, self.labels, self.judge)
        return row | {"psnr_mean_db": round(mean, 2) if math.isfinite(mean) else None}


def best(rows: Sequence[Row], budgets: Sequence[float] = BUDGETS) -> list[Row]:
    """For each budget the row of each tool with the highest median PSNR among those within it."""
    found: list[Row] = []
    tools = dict.fromkeys(row["tool"] for row in rows if "tool" in row)
    for budget in budgets:
        for tool in tools:
            within = [row for row in rows if row.get("tool") == tool and _within(row, budget)]
            if within:
                found.append({"budget": budget} | max(within, key=lambda row: row["psnr_db"]))  # type: ignore[arg-type,return-value]
            else:
                found.append({"budget": budget, "tool": tool, "case": "none is as quick"})
    return found


def _within(row: Row, budget: float) -> bool:
    share = row.get("ratio_to_inductor")
    return isinstance(share, float) and share <= budget * (1 + UNEVEN) and row.get("psnr_db") is not None


def main() -> None:
    args = parse_arguments()
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 8192
    cases = wanted_cases(args)
    quality = Quality(args) if args.images else None
    rows = notes_of_missing()
    for start in range(0, len(cases), args.group):
        fresh = measure(cases[start : start + args.group], args, quality)
        rows += [row for row in fresh if not (start and row["case"] == INDUCTOR)]
        write_result("planner", rows, folder=args.output)
    if quality is not None:
        write_result("planner_budgets", best(rows), folder=args.output, script="planner")


if __name__ == "__main__":
    main()
