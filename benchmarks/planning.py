"""How long does it take from a model to a plan? And the plans of ours that ``benchmarks.planner`` compares.

    python -m benchmarks.planning
    python -m benchmarks.planning --make   # makes plans/planner-* anew, then goes on as without

*Measuring* is timed in generations: what plain inductor takes for the same images, in the same process. It includes
compiling the variants that measuring runs, once with no compiled code on the machine (``cold``), and once with what the
first has left in inductor's cache. *Planning* is timed by the clock and by the processors' time.

Plans are made by ``plan_within``: measured with 8 labels and the first of two seeds, run with both. What it finds is
kept in ``--state``, so that it goes on where it was when it is interrupted, and all budgets share one measurement.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

import difa_compile
from difa_compile.comparison.planned import plan_within
from difa_compile.planner.make import FRONT, Limit, front_of
from difa_compile.planner.table import ErrorTable

from . import _demo
from ._common import RESULTS, ROOT, Row, interleave, write_result

BUDGETS = (0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
MARGIN = 0.97
"""Of a budget what a plan for it is made within: what is found may be over that by a twentieth."""
ATTENTION_DB = 33.0
SEEDS = (1234, 1235)
HELD_OUT = (2,)


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--make", action="store_true", help="make the plans first")
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS, help="of the plans to be made")
    parser.add_argument("--attention", action="store_true", help="with --make: also the plan of attention alone")
    parser.add_argument("--plans", type=Path, default=_demo.PLANS, help="folder of the plans that are made")
    parser.add_argument("--state", type=Path, default=ROOT / "runs" / "planning", help="folder of what --make keeps")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that a generation and a choice are timed")
    parser.add_argument("--output", default=RESULTS, type=type(RESULTS), help="folder of the result file")
    return parser.parse_args(given)


def inputs() -> dict[str, Any]:
    return {"class_labels": list(_demo.CALIBRATION_LABELS), "guidance_scale": _demo.GUIDANCE}


def call() -> dict[str, Any]:
    return inputs() | {"generator": torch.Generator().manual_seed(SEEDS[0])}


def make(args: argparse.Namespace) -> None:
    """Make the plans of the budgets asked for, and that of attention alone."""
    args.state.mkdir(parents=True, exist_ok=True)
    limits = {f"planner-budget-{budget:g}": Limit(budget=round(MARGIN * budget, 4)) for budget in args.budgets}
    if args.attention:
        limits[f"planner-attention-{ATTENTION_DB:g}-db"] = Limit(psnr=ATTENTION_DB, blocks=False)
    for name, limit in limits.items():
        state = args.state / f"errors{'' if limit.blocks else '-attention'}-steps-{args.steps}.json"
        plan = plan_within(
            _demo.load("demo"), inputs(), limit, args.steps, seeds=SEEDS, held_out=HELD_OUT, state=state, told=tell
        )
        path = args.plans / f"{name}-steps-{args.steps}.json"
        args.plans.mkdir(parents=True, exist_ok=True)
        plan.save(path)
        tell(f"written to {path}: {plan.settings.promise}")


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def generation(args: argparse.Namespace) -> float:
    """Seconds that plain inductor takes for the images that are measured with."""
    pipe = _demo.load("demo")
    pipe.transformer.compile(dynamic=False)
    labels = list(_demo.CALIBRATION_LABELS)
    return interleave({"": lambda: _demo.sample(pipe, labels, args.steps)}, args.repeats, warmup=2)[""].median


def measuring(args: argparse.Namespace, attention: bool) -> tuple[ErrorTable, float]:
    torch._dynamo.reset()
    pipe = _demo.load("demo")
    began = time.perf_counter()
    table = difa_compile.measure(pipe, call(), args.steps, attention=attention, progress=False)
    return table, time.perf_counter() - began


def timed(case: str, choice: Callable[[], object], repeats: int) -> Row:
    seconds, processors = [], []
    for _ in range(repeats):
        began, worked = time.perf_counter(), time.process_time()
        choice()
        seconds.append(time.perf_counter() - began)
        processors.append(time.process_time() - worked)
    return {
        "case": case,
        "seconds": round(min(seconds), 3),
        "cpu_seconds": round(min(processors), 3),
        "repeats": repeats,
    }


def main() -> None:
    args = parse_arguments()
    if args.make:
        make(args)
    one = generation(args)
    rows: list[Row] = [{"case": "generation", "seconds": round(one, 3), "generations": 1.0, "repeats": args.repeats}]
    with fresh_cache():
        table, cold = measuring(args, attention=False)
        _, warm = measuring(args, attention=False)
        _, both = measuring(args, attention=True)
    for case, seconds in (("measure, cold", cold), ("measure", warm), ("measure, with attention", both)):
        rows.append({"case": case, "seconds": round(seconds, 3), "generations": round(seconds / one, 2), "repeats": 1})
    problem = table.problem()
    for budget in BUDGETS:
        plan = lambda budget=budget: difa_compile.plan_from_table(table, budget=budget)  # noqa: E731
        rows.append(timed(f"plan, budget {budget:g}", plan, args.repeats))
    few = lambda: difa_compile.plan_from_table(table, budget=0.3, max_rows=2)  # noqa: E731
    rows.append(timed("plan, budget 0.3, at most 2 rows", few, args.repeats))
    rows.append(timed(f"front of {len(FRONT)} budgets", lambda: front_of(problem), 1))
    write_result("planning", rows, folder=args.output)


if __name__ == "__main__":
    main()
