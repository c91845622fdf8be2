"""What is a plan worth where it was not made: other step counts, schedulers, inputs, batches and dtypes?

    python -m benchmarks.travel

One plan of the demo model is made at 50 steps of its own scheduler, for a budget, and carried elsewhere; beside it
stand a plan for so few steps from the same table (``from_table``), and one that was measured and made there, for the
same budget. All are the planner's first choice: nothing was run to better any. Quality is against the full model in the
same place, with classes and seeds that none was measured with, unless the name says so. Rows of places that are not
asked for stay as an earlier run left them; each says of which commit it is.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import difa_compile
from difa_compile import Plan
from difa_compile.comparison.planned import psnr_of
from difa_compile.planner.table import ErrorTable

from . import _demo
from ._common import RESULTS, Row, commit, write_result

BUDGETS = (0.5, 0.3)
MEASURED = (0, 1, 2, 3, 4, 0, 1, 2)
"""The classes that are measured; the others are judged."""
OTHERS = (5, 6, 7, 8, 9, 5, 6, 7)
MEASURED_SEED = 1234
SEEDS = (0, 1)
INNER = "eager"
"""Images are the same to rounding, and nothing has to be compiled for each place."""


@dataclass(frozen=True)
class Place:
    """Where a plan is used. ``labels``: by call. ``again``: whether a plan is made there too, from its own labels."""

    name: str
    steps: int = 50
    scheduler: str | None = None
    dtype: torch.dtype = torch.float32
    labels: tuple[tuple[int, ...], ...] = (OTHERS,)
    guidance: float = _demo.GUIDANCE
    again: bool = True


HOME = Place("where it was made")


def places() -> Iterator[Place]:
    yield HOME
    yield from (Place(f"{steps} steps", steps=steps) for steps in (100, 30, 20))
    names = ("DDIMScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")
    yield from (Place(name.removesuffix("Scheduler"), scheduler=name) for name in names)
    yield Place("DDIM, 20 steps", steps=20, scheduler="DDIMScheduler")
    yield from (Place(f"guidance {scale:g}", guidance=scale) for scale in (1.5, 8.0))
    yield Place("bfloat16", dtype=torch.bfloat16)
    yield Place("the classes measured, other seeds", labels=(MEASURED,), again=False)
    yield Place("images one by one", labels=tuple((label,) for label in OTHERS), again=False)
    yield Place("16 images at once", labels=((*OTHERS, *OTHERS),), again=False)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", default="", help="only those whose name this regular expression is found in")
    parser.add_argument("--output", default=RESULTS, type=type(RESULTS), help="folder of the result file")
    return parser.parse_args()


def pipeline(place: Place) -> Any:
    import diffusers

    pipe = _demo.load("demo")
    if place.scheduler is not None:
        config = dict(pipe.scheduler.config)
        pipe.scheduler = getattr(diffusers, place.scheduler).from_config(config)
    return pipe.to(place.dtype)


def measured(place: Place) -> ErrorTable:
    inputs = {
        "class_labels": list(MEASURED),
        "guidance_scale": place.guidance,
        "generator": torch.Generator().manual_seed(MEASURED_SEED),
    }
    return difa_compile.measure(pipeline(place), inputs, place.steps, progress=False, inner=INNER)


def images(pipe: Any, place: Place) -> list[Tensor]:
    """Images of all labels, with each seed; one call's noise is its own, but the same for all sides."""
    return [
        _demo.sample(pipe, list(labels), place.steps, seed=100 * seed + number, guidance=place.guidance)
        for seed in SEEDS
        for number, labels in enumerate(place.labels)
    ]


def under(plan: Plan, place: Place, full: list[Tensor]) -> tuple[float, float]:
    """PSNR in dB, and the share of the model's calls in which blocks were computed."""
    pipe = pipeline(place)
    difa_compile.apply(pipe, plan, inner=INNER)
    found = images(pipe, place)
    resolved = plan.resolve(place.steps, pipe.scheduler)
    computed = [row[-1].decision.is_full for row in resolved.roles]
    return psnr_of(list(zip(full, found, strict=True))), sum(computed) / len(computed)


def decibels(psnr: float) -> float | None:
    """None for equal images: everything is computed there."""
    return round(psnr, 2) if math.isfinite(psnr) else None


def rows_of(place: Place, home: ErrorTable) -> Iterator[Row]:
    """One for each budget. ``home``: the table of the place where plans are made."""
    full = images(pipeline(place), place)
    own = (home if place == HOME else measured(place)) if place.again else None
    for budget in BUDGETS:
        psnr, computed = under(difa_compile.plan_from_table(home, budget=budget), place, full)
        row: Row = {"case": place.name, "budget": budget, "images": sum(map(len, full)), "commit": commit()[:12]}
        row |= {"psnr_db": decibels(psnr), "computed": round(computed, 3)}
        tables = {"made_there": own, "from_table": home if place.steps < HOME.steps else None}
        for name, table in tables.items():
            if table is not None:
                plan = difa_compile.plan_from_table(table, budget=budget, steps=min(place.steps, len(table.progress)))
                psnr, computed = under(plan, place, full)
                row |= {f"psnr_{name}_db": decibels(psnr), f"computed_{name}": round(computed, 3)}
        yield row


def main() -> None:
    args = parse_arguments()
    earlier = args.output / "travel.json"
    rows: dict[object, list[Row]] = {}
    for row in json.loads(earlier.read_text())["rows"] if earlier.exists() else []:
        rows.setdefault(row["case"], []).append(row)
    home = measured(HOME)
    for place in places():
        if re.search(args.places, place.name):
            print(place.name, file=sys.stderr)
            rows[place.name] = list(rows_of(place, home))
            in_order = [row for each in places() for row in rows.get(each.name, [])]
            write_result("travel", in_order, folder=args.output)


if __name__ == "__main__":
    main()
