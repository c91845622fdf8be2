"""Do engines make what the pipeline makes? Final latents and the worst step, by model, dtype and runtime.

    python -m benchmarks.parity

The reference is the pipeline itself with the plan applied, its graphs run eagerly, in the same dtype; beside it the
same plan compiled by ``backend="difa"``, and a bundle on each runtime. The demo, and tiny models with random weights;
20 steps: the first three computed, then in turn computed, forecast, in a window, reused. Differences are relative to
the largest latent of the end, or of the step. Rows of models and dtypes that are not asked for stay as an earlier run
left them; each says of which commit it is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difa_compile import FULL, Plan
from difa_compile.bundle.program import Program
from difa_compile.bundle.runner import load_bundle, seeded
from difa_compile.decision import Decision
from difa_compile.exporting.probing import probe
from difa_compile.exporting.write import TEST_SEED, export, latents_of
from difa_compile.pipeline.rules import plan_from_rule
from tests.support.one_image import one_image

from . import _demo
from ._common import RESULTS, Row, commit, write_result

STEPS = 20
TURNS = tuple(map(Decision.parse, ("full", "forecast:1", "window(band:3)", "reuse")))
MODELS = ("demo", "pixart_sigma", "sd3", "flux", "flux_true_cfg", "wan")
DTYPES = ("float32", "float16", "bfloat16")
TARGETS = {"float32": ("onnx", "aoti"), "float16": ("onnx", "aoti"), "bfloat16": ("aoti",)}
"""ONNX Runtime's CPU provider has no kernels for bfloat16."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--output", default=RESULTS, type=type(RESULTS), help="folder of the result file")
    return parser.parse_args()


def opened(name: str, dtype: torch.dtype, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A pipeline, and the arguments of a call that makes one image."""
    if name == "demo":
        return _demo.load("demo").to(dtype), {"class_labels": [3], "guidance_scale": _demo.GUIDANCE}
    pipe, inputs = one_image(name, folder)
    return pipe.to(dtype), inputs


def plan_of(pipe: Any, inputs: dict[str, Any]) -> Plan:
    return plan_from_rule(
        pipe, STEPS, lambda step, _: FULL if step < 3 else TURNS[(step - 3) % len(TURNS)], inputs=inputs
    )


def distances(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Row:
    each = [float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, wanted, strict=True)]
    return {"final": float(f"{each[-1]:.2g}"), "worst_step": float(f"{max(each):.2g}")}


def of_bundle(folder: Path, target: str, conditions: Any, program: Program) -> list[Tensor]:
    """The latents after each step."""
    found: list[Tensor] = []

    def note(step: int, steps: int, latents: Tensor) -> None:
        found.append(latents.float().clone())

    with seeded(TEST_SEED):
        load_bundle(folder, target)(seed=TEST_SEED, conditions=conditions, decode=False, images=1, callback=note)
    return found


def earlier(folder: Path) -> dict[tuple[str, str], list[Row]]:
    """By model and dtype the rows of the result that is there."""
    path = folder / "parity.json"
    found: dict[tuple[str, str], list[Row]] = {}
    for row in json.loads(path.read_text())["rows"] if path.exists() else []:
        found.setdefault((row["model"], row["dtype"]), []).append(row)
    return found


def measured(name: str, dtype: str) -> list[Row]:
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as scratch:
        pipe, inputs = opened(name, getattr(torch, dtype), Path(scratch))
        plan = plan_of(pipe, inputs)
        probed = probe(pipe, inputs, STEPS)
        program = probed.program
        wanted = latents_of(pipe, inputs, plan, STEPS, program)
        common: Row = {"model": name, "dtype": dtype, "commit": commit()[:12]}
        made = latents_of(pipe, inputs, plan, STEPS, program, "inductor")
        rows = [{**common, "runtime": 'backend="difa"', **distances(made, wanted)}]
        folder = Path(scratch) / "bundle"
        for target in TARGETS[dtype]:
            export(pipe, plan, folder, inputs=inputs, steps=[STEPS], targets=[target], most_images=1)
            made = of_bundle(folder, target, probed.conditioning, program)
            rows.append({**common, "runtime": target, **distances(made, wanted)})
    return rows


def main() -> None:
    args = parse_arguments()
    rows = earlier(args.output)
    for name in args.models.split(","):
        for dtype in args.dtypes.split(","):
            rows[name, dtype] = measured(name, dtype)
            in_order = sorted(rows, key=lambda each: (MODELS.index(each[0]), DTYPES.index(each[1])))
            write_result("parity", [row for each in in_order for row in rows[each]], folder=args.output)


if __name__ == "__main__":
    with torch.no_grad():
        main()
