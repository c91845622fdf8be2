"""What do bundles cost and gain: time per call, export, load and memory, by runtime and number of engines?

    python -m benchmarks.bundle

The demo model, its blocks forecast but for every third step, as engines: beside inductor, full and with the plan, and
beside the same runtime's engine of the unmodified model. All sides are timed in one process, interleaved; memory is
that of a process of its own, which loads the bundle and makes one call.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import difa_compile
from difa_compile import FULL, Plan
from difa_compile.bundle.runner import Bundle, load_bundle
from difa_compile.decision import Decision
from difa_compile.export.write import Exported, export_bundle
from difa_compile.pipeline.rules import plan_from_rule

from . import _demo
from ._common import RESULTS, Row, interleave, write_result

STEPS = 50
EVERY = 3
IMAGES = (1, 8)
LIMITS = (1, 4, None)
"""At most so many engines."""

MEMORY = """
import json, sys
from difa_compile.bundle.runner import load_bundle
import time
def kib(key):
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))
before = kib("Rss"), kib("Anonymous")
began = time.perf_counter()
bundle = load_bundle(sys.argv[1])
bundle(class_labels=[3], seed=0)
took = time.perf_counter() - began
print(json.dumps({"first_call": took, "rss": kib("Rss") - before[0], "anonymous": kib("Anonymous") - before[1]}))
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--targets", default="onnx,aoti")
    parser.add_argument("--output", default=RESULTS, type=type(RESULTS), help="folder of the result file")
    return parser.parse_args()


def recipe(pipe: Any) -> Plan:
    """The first three steps and then every third computed, all blocks forecast at the others."""
    forecast = Decision.parse("forecast:1")

    def blocks(step: int, _: object) -> Decision:
        return FULL if step < 3 or (step - 3) % EVERY == 0 else forecast

    return plan_from_rule(pipe, STEPS, lambda *_: FULL, spans=blocks)


def exported(plan: Plan, folder: Path, target: str, limit: int | None) -> tuple[Exported, float]:
    began = time.perf_counter()
    found = export_bundle(
        _demo.load("demo"), plan, folder, inputs={"class_labels": [3], "guidance_scale": _demo.GUIDANCE},
        steps=[STEPS], targets=[target], most_images=max(IMAGES), max_engines=limit,
    )  # fmt: skip
    return found, time.perf_counter() - began


def sampled(pipe: Any, images: int) -> object:
    return _demo.sample(pipe, [3] * images, STEPS)


def run(bundle: Bundle, images: int) -> object:
    return bundle(class_labels=[3] * images, seed=0)


def memory(folder: Path) -> dict[str, float]:
    """Of a process that loads a bundle and makes a call."""
    found = subprocess.run([sys.executable, "-c", MEMORY, str(folder)], capture_output=True, text=True, check=True)
    told: dict[str, float] = json.loads(found.stdout)
    return told


def main() -> None:
    args = parse_arguments()
    plan = recipe(_demo.load("demo"))
    full = _demo.full_plan(_demo.load("demo"), STEPS)
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[int], object]] = {}
    for name, own in (("inductor, full", full), ("difa, planned", plan)):
        pipe = _demo.load("demo")
        difa_compile.apply(pipe, own)
        calls[name] = partial(sampled, pipe)
        rows[name] = {"case": name}
    with tempfile.TemporaryDirectory() as scratch:
        for target in args.targets.split(","):
            for limit in (0, *LIMITS):
                name = f"{target}, full" if limit == 0 else f"{target}, {limit or 'all'} engines"
                folder = Path(scratch) / name.replace(" ", "")
                made, seconds = exported(full if limit == 0 else plan, folder, target, limit or None)
                weights = made.manifest.files[made.manifest.weights].bytes
                used = memory(folder)
                rows[name] = {
                    "case": name,
                    "engines": made.engines,
                    "export_seconds": round(seconds, 1),
                    "bytes": sum(file.bytes for file in made.manifest.files.values()),
                    "weights_bytes": weights,
                    "first_call_seconds": round(used["first_call"], 3),
                    "rss_bytes": int(used["rss"] * 1024),
                    "anonymous_bytes": int(used["anonymous"] * 1024),
                }
                bundle = load_bundle(folder)
                calls[name] = partial(run, bundle)
                print(f"{name}: exported in {seconds:.0f} s", file=sys.stderr, flush=True)
        for images in IMAGES:
            times = interleave({name: partial(call, images) for name, call in calls.items()}, args.repeats)
            for name, timing in times.items():
                rows[name] |= {f"seconds_{images}": round(timing.median, 4)}
                runtime = name.split(",")[0]
                base = f"{'inductor' if runtime == 'difa' else runtime}, full"
                if base in times and base != name:
                    rows[name] |= {f"times_full_{images}": round(timing.ratio_to(times[base]), 4)}
        write_result("bundle", list(rows.values()), folder=args.output)


if __name__ == "__main__":
    with torch.no_grad():
        main()
