"""``difa demo``: measure, plan, show what other budgets buy, sample full and planned, write the page."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from difa_compile.cli.failures import interruptible, state_kept
from difa_compile.cli.inputs import DEMO_GUIDANCE, DEMO_LABELS, image_captions, open_pipeline, seeds_for
from difa_compile.cli.tables import print_comparison
from difa_compile.errors import MissingDependencyError
from difa_compile.files.writing import check_writable
from difa_compile.plan.plan import Plan
from difa_compile.report import describe_machine, describe_versions
from difa_compile.report.stored import PLAN_NAME, StoredComparison
from difa_compile.wording import shown

if TYPE_CHECKING:
    from torch import Tensor

    from difa_compile.comparison.front import Point
    from difa_compile.planner.make import Limit

TABLE_NAME = "errors.json"
STATE_NAME, SEARCH_NAME, TRIALS_NAME = "measuring", "searching", "trying"
"""How the names of files begin that are there while the demo is under way; each call for other images has its own."""
THRESHOLD = 0.1
"""Of the published search that the page has for comparison."""


@dataclass(frozen=True)
class DemoOptions:
    """What ``difa demo`` was asked for. ``budget``: share of the full model's time. ``plan``: use this one instead of
    planning. ``search``: also find the plan that DiTFastAttn would choose, for comparison."""

    output: Path
    steps: int
    budget: float
    samples: int
    seed: int
    search: bool
    plan: Path | None
    command: str


def run_demo(options: DemoOptions, console: Console) -> Path:
    """The whole demo; returns the path of the page. What can be known to fail is tried before the long work."""
    require("numpy", "torchmetrics", "jinja2", "PIL", "diffusers", "tqdm")
    from difa_compile.comparison.compare import compare
    from difa_compile.demo.judge import load_judge
    from difa_compile.planner.make import Limit

    limit = Limit(options.budget)
    plan = Plan.load(options.plan) if options.plan is not None else None
    pipe, judge = open_pipeline("demo", "cpu"), load_judge()
    output = check_writable(options.output)
    inputs = {"class_labels": list(DEMO_LABELS), "guidance_scale": DEMO_GUIDANCE}
    front: tuple[Point, ...] = ()
    if plan is None:
        plan, front = _planned(pipe, inputs, limit, options, output, console)
        plan.save(output / PLAN_NAME)
    else:
        console.print(f"[bold]1 of 2[/]  plan {plan.digest[:12]} from {escape(shown(str(options.plan), 500))}")
    parts = 2 if options.plan is not None else 4

    seeds = seeds_for(options.samples, len(DEMO_LABELS), options.seed)
    images = len(seeds) * len(DEMO_LABELS)
    console.print(f"[bold]{parts} of {parts}[/]  sampling {images} images in full and as planned, same seeds")
    kept = options.plan or output / PLAN_NAME
    with interruptible(lambda: f"The plan is in {kept}; difa demo --plan {shlex.quote(str(kept))} goes on from there."):
        comparison = compare(
            pipe, plan, inputs, steps=plan.steps, seeds=seeds, judge=judge, reference=_real_digits(images, console)
        )
    stored = StoredComparison(
        plan=plan,
        comparison=comparison,
        title="difa demo: handwritten digits, sampled faster",
        command=options.command,
        machine=describe_machine(),
        versions=describe_versions(),
        captions=image_captions(inputs, {label: f"digit {label}" for label in DEMO_LABELS}, images),
        front=front,
    )
    stored.save(output)
    page = stored.write_page(output)
    print_comparison(console, comparison)
    return page


def _planned(
    pipe: Any, inputs: dict[str, Any], limit: Limit, options: DemoOptions, output: Path, console: Console
) -> tuple[Plan, tuple[Point, ...]]:
    """The plan for the budget, and what came of plans of other budgets, of fixed recipes and of the published search.

    What was measured is in the folder, so that it goes on where it was interrupted, and the table stays there.
    """
    from difa_compile.calibration.calibrate import calibrate
    from difa_compile.calibration.measure import measure
    from difa_compile.comparison.front import measured_front
    from difa_compile.comparison.holding import held_to
    from difa_compile.comparison.kept import as_stored
    from difa_compile.comparison.planned import trials

    def seeded() -> dict[str, Any]:
        return inputs | {"generator": torch.Generator().manual_seed(options.seed)}

    def told(text: str) -> None:
        console.print(Text(f"        {text}"))

    def kept() -> str:
        return f"What was measured is in {table_file}; the same command goes on from there."

    table_file, search_file, trials_file = (
        output / f"{name}-{options.steps}-steps-seed-{options.seed}.json"
        for name in (STATE_NAME, SEARCH_NAME, TRIALS_NAME)
    )
    again = " (going on with what is there)" if table_file.is_file() else ""
    console.print(f"[bold]1 of 4[/]  measuring what may be left out at {options.steps} steps{again}")
    with interruptible(lambda: state_kept(table_file)):
        table = as_stored(measure(pipe, seeded(), options.steps, state=table_file))
    others = {}
    if options.search:
        console.print(f"        and searching as DiTFastAttn does, threshold {THRESHOLD:g}, for comparison")
        with interruptible(kept):
            searched = calibrate(
                pipe, seeded(), steps=options.steps, threshold=THRESHOLD, rank="published", loss="code",
                state=search_file, keep_state=True,
            )  # fmt: skip
        others["DiTFastAttn"] = searched
    console.print(f"[bold]2 of 4[/]  planning for {limit.budget:g} of the full model's time, and trying plans")
    seeds, held_out = (options.seed, options.seed + 1), (options.seed + 2,)
    with (
        interruptible(kept),
        trials(pipe, inputs, options.steps, seeds, held_out, table, trials_file) as run,
    ):
        plan = held_to(table, limit, run, told=told)
        console.print("[bold]3 of 4[/]  running plans for other budgets, and fixed recipes, beside the full model")
        front = measured_front(table, run, plan, others, told)
    table.save(output / TABLE_NAME)
    with suppress(OSError):  # the plan is made; a state left behind harms nobody
        for file in (search_file, trials_file, table_file):
            file.unlink(missing_ok=True)
    return plan, front


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


EXTRAS = {"diffusers": "diffusers", "msgspec": "export"} | dict.fromkeys(
    ("numpy", "tqdm", "torchmetrics", "jinja2", "PIL"), "report"
)


def require(*modules: str) -> None:
    """Raise :class:`MissingDependencyError` if one of the optional packages is missing, naming all and their extras."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(sorted({EXTRAS[name] for name in missing}))
        names = _listed(["Pillow" if name == "PIL" else name for name in missing])
        raise MissingDependencyError(f'{names} not installed; run: pip install "difa-compile[{extras}]"')


def _listed(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]} are"
