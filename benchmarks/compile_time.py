"""How much longer does a plan with k distinct rows take to compile than one plain torch.compile?

    python -m benchmarks.compile_time

Every case is a process of its own with empty compiler caches. Compile time is the first run of the schedule less the
second. Rows beyond the first (all full) hold random candidates per site, drawn from a fixed seed: the worst case, in
which neighbouring rows share nothing but single blocks. ``distinct_rows`` counts rows of roles, the caches they write
included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

import difa_compile
from difa_compile import FULL, Decision, Window, WindowShape
from difa_compile.pipeline.example_inputs import example_inputs
from difa_compile.pipeline.rules import plan_from_rule
from difa_compile.plan.schedule import buckets

from . import _demo
from ._common import RESULTS, ROOT, Row, write_result

WINDOW = Window(WindowShape.BAND, 32)
PLAIN = "inductor, full"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--batch", type=int, default=16, help="rows of the model's batch, both CFG halves")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default=RESULTS, type=type(RESULTS), help="folder of the result file")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def candidates() -> list[Decision]:
    return [
        Decision.parse(text)
        for text in (f"window({WINDOW})+residual", f"window({WINDOW})+residual+cfg", "reuse", "full+cfg", "full")
    ]


def draw_rows(count: int, sites: int) -> list[list[Decision]]:
    """``count`` rows of decisions, no two equal; the first is full everywhere."""
    generator = random.Random(0)
    rows = [[FULL] * sites]
    while len(rows) < count:
        row = [generator.choice(candidates()) for _ in range(sites)]
        if row not in rows:
            rows.append(row)
    return rows


def worker(model: str, rows: int, batch: int) -> None:
    """Print, as JSON, the seconds of the first and the second run; ``rows`` 0 is plain inductor."""
    transformer = _demo.load(model).transformer
    inputs = example_inputs(transformer, batch)
    result: dict[str, Any] = {}
    with torch.no_grad():
        if rows == 0:
            transformer.compile(dynamic=False)
            result["seconds"] = [timed(lambda: transformer(**inputs)) for _ in range(2)]
        else:
            paths = [info.path for info in difa_compile.inspect_model(transformer, inputs).site_infos]
            wanted = draw_rows(rows, len(paths))
            plan = plan_from_rule(
                transformer,
                rows,
                lambda step, site: wanted[step][paths.index(site.path)],
                inputs=inputs,
                conditional_half=0,
            )
            result["distinct_rows"] = len(buckets(plan.roles))
            transformer.compile(backend="difa", options={"plan": plan, "strict": True})

            def schedule() -> None:
                with difa_compile.sampling(transformer, rows) as run:
                    for step in range(rows):
                        run.step(step)
                        transformer(**inputs)

            result["seconds"] = [timed(schedule) for _ in range(2)]
    print(json.dumps(result))


def timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def run_case(args: argparse.Namespace, rows: int) -> dict[str, Any]:
    """One worker process with caches of its own."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}
        command = [sys.executable, "-m", "benchmarks.compile_time", "--model", args.model]
        command += ["--batch", str(args.batch), "--worker", str(rows)]
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    args = parse_arguments()
    if args.worker is not None:
        worker(args.model, args.worker, args.batch)
        return
    found: dict[int, list[dict[str, Any]]] = {}
    for repeat in range(args.repeats):
        for rows in (0, *args.rows):
            found.setdefault(rows, []).append(run_case(args, rows))
            print(f"  repeat {repeat + 1}: {rows} rows done", file=sys.stderr, flush=True)
    results: list[Row] = []
    plain = 0.0
    for rows, repeats in found.items():
        compile_times = sorted(first - second for first, second in (one["seconds"] for one in repeats))
        middle = compile_times[len(compile_times) // 2]
        plain = middle if rows == 0 else plain
        results.append(
            {
                "case": PLAIN if rows == 0 else "difa, plan",
                "steps": max(rows, 1),
                "distinct_rows": repeats[0].get("distinct_rows"),
                "compile_seconds": round(middle, 3),
                "compile_seconds_min": round(compile_times[0], 3),
                "compile_seconds_max": round(compile_times[-1], 3),
                "ratio_to_inductor": round(middle / plain, 3),
                "repeats": len(repeats),
            }
        )
    write_result("compile_time", results, folder=args.output)


if __name__ == "__main__":
    main()
