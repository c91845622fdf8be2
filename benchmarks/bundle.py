"""What do bundles cost and gain: time per call, export, load and memory, by runtime and number of engines?

    python -m benchmarks.bundle

The demo model as engines, with two plans: its blocks forecast but for every third step, and attention decided site by
site (``weighed``), whose many rows are merged to 1, 4 and 8 engines. Beside them inductor, full and with the plan; the
same runtime's engine of the unmodified model; and ``plain``, the model as torch exports it, nothing of ours in it,
called by the pipeline in Python, with each runtime's own settings. All sides are timed in one process, interleaved;
memory is that of a process of its own, which loads the bundle and makes one call. ``switching``: by how much the same
calls of the two engines that are called most take longer in turns than one engine's after the other's. ``outside``:
share of a call's time that is spent in no engine, for the sampling loop and caches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import difa_compile
from difa_compile import FULL, Plan
from difa_compile.bundle.manifest import sizes_of
from difa_compile.bundle.runner import Bundle, load_bundle
from difa_compile.decision import Decision
from difa_compile.exporting.write import Exported, export
from difa_compile.pipeline.rules import plan_from_rule

from . import _demo
from ._common import RESULTS, Row, interleave, write_result

STEPS = 50
EVERY = 3
IMAGES = (1, 8)
LIMITS = {"planned": (1, None), "weighed": (1, 4, 8, None)}
"""By plan: at most so many engines; None: as many as it asks for."""
WEIGHED = "flops-threshold-0.15-steps-50.json"
TURNS = 10
"""Calls of each engine where switching is timed."""

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
loaded = time.perf_counter() - began
bundle(class_labels=[3], seed=0)
took = time.perf_counter() - began
sizes = {"rss": kib("Rss") - before[0], "anonymous": kib("Anonymous") - before[1]}
print(json.dumps({"load": loaded, "first_call": took, **sizes}))
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


def plainly(target: str, folder: Path) -> tuple[Any, float]:
    """The pipeline with the model that torch exports in its model's place, for any number of images up to eight."""
    pipe = _demo.load("demo")
    model, config = pipe.transformer, pipe.transformer.config
    began = time.perf_counter()
    rows = torch.export.Dim("rows", min=2, max=2 * max(IMAGES))
    inputs = {
        "hidden_states": torch.randn(4, config.in_channels, config.sample_size, config.sample_size),
        "timestep": torch.full((4,), 999),
        "class_labels": torch.tensor([3, 3, 10, 10]),
    }
    sizes: dict[str, Any] = {name: {0: rows} for name in inputs}
    program = torch.export.export(
        model, (), {**inputs, "return_dict": False}, dynamic_shapes={**sizes, "return_dict": None}
    )
    call = _on_onnx(program, folder) if target == "onnx" else _on_aoti(program, folder)
    seconds = time.perf_counter() - began

    def forward(hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=call(hidden_states, timestep, class_labels))

    model.forward = forward
    return pipe, seconds


def _on_onnx(program: torch.export.ExportedProgram, folder: Path) -> Callable[..., Tensor]:
    import onnxruntime

    made = torch.onnx.export(program, dynamo=True, verbose=False)
    assert made is not None
    made.save(folder / "plain.onnx", external_data=True)
    session = onnxruntime.InferenceSession(folder / "plain.onnx", providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def call(*values: Tensor) -> Tensor:
        (found,) = session.run(None, dict(zip(names, (value.numpy() for value in values), strict=True)))
        return torch.from_numpy(found)

    return call


def _on_aoti(program: torch.export.ExportedProgram, folder: Path) -> Callable[..., Tensor]:
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "plain.pt2"))
    model = torch._inductor.aoti_load_package(path)

    def call(hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        inputs = {"hidden_states": hidden_states, "timestep": timestep, "class_labels": class_labels}
        laid_out = {name: value.contiguous() for name, value in inputs.items()}  # packages do not look at strides
        found = model(**laid_out, return_dict=False)[0]
        assert isinstance(found, Tensor)
        return found

    return call


def exported(plan: Plan, folder: Path, target: str, limit: int | None) -> tuple[Exported, float]:
    began = time.perf_counter()
    found = export(
        _demo.load("demo"), plan, folder, inputs={"class_labels": [3], "guidance_scale": _demo.GUIDANCE},
        steps=[STEPS], targets=[target], most_images=max(IMAGES), max_engines=limit,
    )  # fmt: skip
    return found, time.perf_counter() - began


def sampled(pipe: Any, images: int) -> object:
    return _demo.sample(pipe, [3] * images, STEPS)


def run(bundle: Bundle, images: int) -> object:
    return bundle(class_labels=[3] * images, seed=0)


def switching(bundle: Bundle, repeats: int) -> float | None:
    """What alternating between two engines costs, as a share of their calls' time; None of a single one."""
    (schedule, *_) = bundle.manifest.schedules
    most = Counter(call.row for call in schedule.calls).most_common(2)
    if len(most) < 2:
        return None
    calls = []
    for row, _ in most:
        engine = bundle._serving(row, 1)
        assert engine is not None
        inputs = [torch.rand(sizes_of(port.shape, 1)).to(getattr(torch, port.dtype)) for port in engine.inputs]
        into = [torch.empty(sizes_of(port.shape, 1), dtype=getattr(torch, port.dtype)) for port in engine.outputs]
        calls.append(partial(bundle._session(engine).run, inputs, into, 1))
    orders = {"in turn": calls * TURNS, "one by one": [call for call in calls for _ in range(TURNS)]}

    def made(order: Sequence[Callable[[], object]]) -> None:
        for call in order:
            call()

    times = interleave({name: partial(made, order) for name, order in orders.items()}, 4 * repeats)
    return times["in turn"].ratio_to(times["one by one"]) - 1


def outside(bundle: Bundle) -> float:
    """The share of a call's time that no engine takes."""
    inside = 0.0
    for session in bundle._sessions.values():
        plainly = session.run

        def timed(*arguments: Any, plainly: Callable[..., Any] = plainly) -> Any:
            nonlocal inside
            began = time.perf_counter()
            made = plainly(*arguments)
            inside += time.perf_counter() - began
            return made

        session.run = timed  # type: ignore[assignment, method-assign]
    began = time.perf_counter()
    run(bundle, 1)
    took = time.perf_counter() - began
    for session in bundle._sessions.values():
        del session.run
    return 1 - inside / took


def memory(folder: Path) -> dict[str, float]:
    """Of a process that loads a bundle and makes a call."""
    found = subprocess.run([sys.executable, "-c", MEMORY, str(folder)], capture_output=True, text=True, check=True)
    told: dict[str, float] = json.loads(found.stdout)
    return told


def main() -> None:
    args = parse_arguments()
    plans = {
        "full": _demo.full_plan(_demo.load("demo"), STEPS),
        "planned": recipe(_demo.load("demo")),
        "weighed": Plan.load(_demo.PLANS / WEIGHED),
    }
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[int], object]] = {}
    for name, own in plans.items():
        runtime = "inductor" if name == "full" else "difa"
        pipe = _demo.load("demo")
        difa_compile.apply(pipe, own)
        calls[f"{runtime}, {name}"] = partial(sampled, pipe)
        rows[f"{runtime}, {name}"] = {"case": f"{runtime}, {name}"}
    bundles: dict[str, Bundle] = {}
    with tempfile.TemporaryDirectory() as scratch:
        wanted: list[tuple[str, str, int | None]] = [
            (target, which, limit)
            for target in args.targets.split(",")
            for which in plans
            for limit in LIMITS.get(which, (None,))
        ]
        for target in args.targets.split(","):
            pipe, seconds = plainly(target, Path(scratch))
            calls[f"{target}, plain"] = partial(sampled, pipe)
            rows[f"{target}, plain"] = {"case": f"{target}, plain", "export_seconds": round(seconds, 1)}
        for number, (target, which, limit) in enumerate(wanted):
            folder = Path(scratch) / str(number)
            made, seconds = exported(plans[which], folder, target, limit)
            name = f"{target}, {which}" + ("" if which == "full" else f", {made.engines} engines")
            used = memory(folder)
            rows[name] = {
                "case": name,
                "engines": made.engines,
                "work": round(made.cost, 4),
                "export_seconds": round(seconds, 1),
                "bytes": sum(file.bytes for file in made.manifest.files.values()),
                "weights_bytes": made.manifest.files[made.manifest.weights].bytes,
                "load_seconds": round(used["load"], 3),
                "first_call_seconds": round(used["first_call"], 3),
                "rss_bytes": int(used["rss"] * 1024),
                "anonymous_bytes": int(used["anonymous"] * 1024),
            }
            bundles[name] = load_bundle(folder)
            calls[name] = partial(run, bundles[name])
            print(f"{name}: exported in {seconds:.0f} s", file=sys.stderr, flush=True)
        for images in IMAGES:
            times = interleave({name: partial(call, images) for name, call in calls.items()}, args.repeats)
            for name, timing in times.items():
                rows[name] |= {f"seconds_{images}": round(timing.median, 4)}
                runtime = name.split(",")[0]
                base = f"{'inductor' if runtime == 'difa' else runtime}, full"
                if base in times and base != name:
                    rows[name] |= {f"times_full_{images}": round(timing.ratio_to(times[base]), 4)}
        for name, bundle in bundles.items():
            share = switching(bundle, args.repeats)
            rows[name] |= {
                "switching": None if share is None else round(share, 4),
                "outside": round(statistics.median(outside(bundle) for _ in range(args.repeats)), 4),
            }
        write_result("bundle", list(rows.values()), folder=args.output)


if __name__ == "__main__":
    with torch.no_grad():
        main()
