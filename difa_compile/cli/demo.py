"""``difa demo``: calibrate, compile, sample full and planned, write the page."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.markup import escape

from difa_compile.cli.failures import interruptible, state_kept
from difa_compile.cli.inputs import DEMO_GUIDANCE, DEMO_LABELS, image_captions, open_pipeline, seeds_for
from difa_compile.cli.tables import print_comparison
from difa_compile.cli.tune import measure_if_unknown
from difa_compile.errors import MissingDependencyError
from difa_compile.files.writing import check_writable
from difa_compile.plan.plan import Plan
from difa_compile.report import describe_machine, describe_versions
from difa_compile.report.stored import PLAN_NAME, StoredComparison
from difa_compile.wording import shown

if TYPE_CHECKING:
    from torch import Tensor

STATE_NAME = "calibration.json"


@dataclass(frozen=True)
class DemoOptions:
    """What ``difa demo`` was asked for. ``plan``: use this one instead of calibrating."""

    output: Path
    steps: int
    threshold: float
    samples: int
    seed: int
    window: str | None
    plan: Path | None
    command: str


def run_demo(options: DemoOptions, console: Console) -> Path:
    """The whole demo; returns the path of the page. What can be known to fail is tried before the long work."""
    require("torchmetrics", "jinja2", "PIL", "diffusers", "tqdm")
    from difa_compile.calibration.calibrate import calibrate, check_settings
    from difa_compile.comparison.compare import compare
    from difa_compile.demo.judge import load_judge

    check_settings(options.steps, options.threshold, options.window, None, "paper", "auto")
    plan = Plan.load(options.plan) if options.plan is not None else None
    pipe, judge = open_pipeline("demo", "cpu"), load_judge()
    output = check_writable(options.output)
    inputs = {"class_labels": list(DEMO_LABELS), "guidance_scale": DEMO_GUIDANCE}
    if plan is None:
        state = output / STATE_NAME
        again = " (going on where it was interrupted)" if state.is_file() else ""
        console.print(
            f"[bold]1 of 3[/]  calibrating over {options.steps} steps, threshold {options.threshold:g}{again}"
        )
        measure_if_unknown(console, pipe)
        with interruptible(lambda: state_kept(state)):
            plan = calibrate(
                pipe,
                inputs | {"generator": torch.Generator().manual_seed(options.seed)},
                steps=options.steps,
                threshold=options.threshold,
                window=options.window,
                state=state,
                keep_state=True,
            )
        plan.save(output / PLAN_NAME)
        with suppress(OSError):  # the plan is stored; a state left behind harms nobody
            state.unlink(missing_ok=True)
    else:
        console.print(f"[bold]1 of 3[/]  plan {plan.digest[:12]} from {escape(shown(str(options.plan), 500))}")
    cells = sum(map(len, plan.rows))
    acting = sum(not (d.is_full and not d.cfg_shared) for row in plan.decisions for d in row)
    console.print(f"        {acting} of {cells} attention calls will do less than the full work")

    seeds = seeds_for(options.samples, len(DEMO_LABELS), options.seed)
    images = len(seeds) * len(DEMO_LABELS)
    console.print(f"[bold]2 of 3[/]  compiling, then sampling {images} images in full and as planned, same seeds")
    kept = options.plan or output / PLAN_NAME
    with interruptible(lambda: f"The plan is in {kept}; difa demo --plan {shlex.quote(str(kept))} goes on from there."):
        comparison = compare(
            pipe, plan, inputs, steps=plan.steps, seeds=seeds, judge=judge, reference=_real_digits(images, console)
        )

    console.print("[bold]3 of 3[/]  writing the page\n")
    stored = StoredComparison(
        plan=plan,
        comparison=comparison,
        title="difa demo: handwritten digits, sampled faster",
        command=options.command,
        machine=describe_machine(),
        versions=describe_versions(),
        captions=image_captions(inputs, {label: f"digit {label}" for label in DEMO_LABELS}, images),
    )
    stored.save(output)
    page = stored.write_page(output)
    print_comparison(console, comparison)
    return page


def _real_digits(count: int, console: Console) -> Tensor | None:
    """``count`` unseen digits (N, 1, 32, 32) in [0, 1]; ``None``, saying so, without scikit-learn, which ships them."""
    if importlib.util.find_spec("sklearn") is None:
        console.print(
            '        no Fréchet distance to real digits without scikit-learn: pip install "difa-compile\\[train]"'
        )
        return None
    from difa_compile.demo.digits import load_split, sample_batch

    images, _ = sample_batch(load_split(held_out=True), count, torch.Generator().manual_seed(0))
    return images / 2 + 0.5


EXTRAS = {"diffusers": "diffusers"} | dict.fromkeys(("numpy", "tqdm", "torchmetrics", "jinja2", "PIL"), "report")


def require(*modules: str) -> None:
    """Raise :class:`MissingDependencyError` if one of the optional packages is missing, naming all and their extras."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(sorted({EXTRAS[name] for name in missing}))
        names = _listed(["Pillow" if name == "PIL" else name for name in missing])
        raise MissingDependencyError(f'{names} not installed; run: pip install "difa-compile[{extras}]"')


def _listed(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]} are"
