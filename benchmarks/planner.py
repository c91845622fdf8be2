"""At equal time, what is left of the images: our plans, and the recipes of other tools?

    python -m benchmarks.planner            # long
    python -m benchmarks.planner --quick    # fewer recipes, rounds and images

Every recipe of ``benchmarks.peers`` on the demo model, and the plans given. Cases run in groups: all of a group and
plain inductor in one process, interleaved. ``ratio_to_inductor`` is a case's time over plain inductor's, each the sum
over the steps of the least of a step's times in all rounds: on a machine with company, the median over the rounds of
whole calls' ratios (``ratio_of_calls``) differs more from run to run. Our plans are the first
group. The others are put in order of time, by one eager call each, and every group has beside it the two plans of ours
that are nearest to it in time, so that each recipe is compared with ours in the same rounds:
``ours_at_equal_time_db`` is our PSNR at its time, interpolated between plans. ``promised_ratio`` is what a plan of ours
says of its time, measured when it was made. Quality compares images of the same seeds with plain inductor's. A second
result, ``planner_budgets``, has for each share of inductor's time the best row of each tool within it.

It can be run in parts: rows of cases that are not asked for (``--cases``) stay as an earlier run left them, each with
the number of its group; what an interrupted run has left out is done with ``--missing``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import difa_compile
from difa_compile import Plan
from difa_compile.comparison.compare import Call, Caller, undisturbed
from difa_compile.comparison.metrics import psnr
from difa_compile.demo.digits import load_split, sample_batch
from difa_compile.demo.judge import load_judge

from . import _demo, peers
from ._common import RESULTS, Row, commit, interleave, write_result
from .demo_end_to_end import generate, quality_row
from .peers import Case

INDUCTOR = "inductor, full"
OURS = "difa"
BUDGETS = (0.7, 0.5, 0.4, 0.3, 0.2)
UNEVEN = 0.03
"""By how much, as a share of it, a time may be over a budget: no machine measures it more exactly."""
WARMUP = 1
"""Untimed rounds."""
BESIDE = 2
"""Plans of ours in each group of others."""
OTHER_METHODS = ("flops-threshold-0.1-steps-50.json", "published-code-threshold-0.1-steps-50.json")
"""Plans of ``--method weighed`` and ``published``."""
QUICK = {"repeats": 3, "images": 16}
FULL_RUN = {"repeats": 7, "images": 100}
QUICK_CASES = re.compile(
    r"^difa|^uniform (reuse|forecast of order [12]), every [2-6]$|^uniform forecast of order 1, every [346] and"
    r"|cache-dit DBCache \+ TaylorSeer (1, threshold 0\.0[48]|2, mask every [2347])$"
    r"|FirstBlockCache, threshold 0\.(05|1)$|TaylorSeerCache, lite, order (1, every [68]|2, every [234])$"
    r"|MagCache, threshold 0\.12|SeaCache, threshold 0\.(1|25|5),|PyramidAttentionBroadcast, every 4|every 5$"
)
"""All tools and techniques, each at the settings that are its best at some time."""


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8, help="images per call")
    parser.add_argument("--quick", action="store_true", help="fewer recipes, and unless given, fewer rounds and images")
    parser.add_argument("--repeats", type=int)
    ours = [*sorted(_demo.PLANS.glob("planner-*")), *(_demo.PLANS / name for name in OTHER_METHODS)]
    parser.add_argument("--plans", nargs="*", default=ours, type=Path, help="plan files of ours, each a case")
    parser.add_argument("--cases", default="", help="only the cases whose name this regular expression is found in")
    parser.add_argument("--missing", action="store_true", help="only the cases that have no row yet")
    parser.add_argument("--eager", action="store_true", help="each recipe also without torch.compile")
    parser.add_argument("--group", type=int, default=8, help="recipes that are timed together")
    parser.add_argument("--images", type=int, help="images for quality; 0 leaves it out")
    parser.add_argument("--output", default=RESULTS, type=type(RESULTS), help="folder of the result files")
    args = parser.parse_args(given)
    for name, value in (QUICK if args.quick else FULL_RUN).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def our_cases(paths: Sequence[Path]) -> Iterator[Case]:
    """Plans of ours as cases, named after their files; those that were not planned are a tool of their own."""
    for path in paths:
        plan = Plan.load(path)

        def prepare(pipe: Any, steps: int, plan: Plan = plan) -> None:
            difa_compile.apply(pipe, plan, strict=True)

        yield Case(f"difa, {path.stem}", tool_of(plan), {"plan": path.name}, prepare)


def tool_of(plan: Plan) -> str:
    promise = plan.settings.promise
    if promise is None:
        return f"{OURS}, {plan.settings.method}"
    return f"{OURS}, attention alone" if "attention alone" in promise.limit else OURS


def shares_of_ours(paths: Sequence[Path]) -> dict[str, float]:
    """By case, the time of our plans of all blocks as a share of the full model's, as the plans say it."""
    found = {}
    for path in paths:
        plan = Plan.load(path)
        promise = plan.settings.promise
        if promise is not None and tool_of(plan) == OURS:
            found[f"difa, {path.stem}"] = promise.measured_share or promise.predicted_share
    return found


def wanted_cases(args: argparse.Namespace) -> list[Case]:
    found = [*our_cases(args.plans), *peers.cases()]
    if args.quick:
        found = [case for case in found if QUICK_CASES.search(case.name)]
    if args.eager:
        found += [peers.eager(case) for case in found if case.compile is not None]
    return [case for case in found if re.search(args.cases, case.name)]


def notes_of_missing() -> list[Row]:
    return [{"case": tool, "tool": tool, "note": "not installed"} for tool in peers.missing()]


# Groups


def seconds_of(case: Case, steps: int) -> float:
    """About how long a case takes: one eager call for one image."""
    pipe = peers.eager(case).load("demo", steps)
    began = time.perf_counter()
    _demo.sample(pipe, [0], steps)
    return time.perf_counter() - began


def shares_of(cases: Sequence[Case], steps: int, rows: list[Row]) -> dict[str, float]:
    """About which share of the full model's time each case takes; of one that fails the row tells why."""
    plain = Case("full", "", {}, lambda pipe, steps: None)
    full = min(seconds_of(plain, steps) for _ in range(3))
    shares = {}
    for case in cases:
        try:
            shares[case.name] = seconds_of(case, steps) / full
        except Exception as error:  # whatever another tool raises
            rows.append(noted(case, error))
    return shares


def grouped(
    ours: Sequence[Case], others: Sequence[Case], shares: Mapping[str, float], beside: Sequence[Case], size: int
) -> list[tuple[list[Case], list[Case]]]:
    """Groups, each with the plans of ours beside it: ours first, then the others, the quickest first, in even parts of
    at most ``size``. ``shares``: of the full model's time, about, by case, of all but ``ours``."""
    groups: list[tuple[list[Case], list[Case]]] = [(list(ours), [])] if ours else []
    ordered = sorted(others, key=lambda case: shares[case.name])
    parts = math.ceil(len(ordered) / size)
    for part in range(parts):
        group = ordered[len(ordered) * part // parts : len(ordered) * (part + 1) // parts]
        middle = statistics.median(shares[case.name] for case in group)
        near = sorted(beside, key=lambda case: abs(math.log(shares[case.name] / middle)))[:BESIDE]
        groups.append((group, near))
    return groups


def loaded(cases: Iterable[Case], args: argparse.Namespace, rows: list[Row]) -> dict[str, tuple[Case, Any]]:
    """The cases that a first call goes well with; of another the row tells why not."""
    ready = {}
    for case in cases:
        try:
            pipe = case.load("demo", args.steps)
            _demo.sample(pipe, _demo.labels_of(args.batch), args.steps)
        except Exception as error:  # whatever another tool raises
            rows.append(noted(case, error))
        else:
            ready[case.name] = (case, pipe)
    return ready


def noted(case: Case, error: Exception) -> Row:
    print(f"{case.name}: {error}", file=sys.stderr)
    return described(case) | {"note": f"{type(error).__name__}: {str(error)[:300]}"}


def described(case: Case) -> Row:
    settings = ", ".join(f"{key}={value}" for key, value in case.settings.items())
    return {"case": case.name, "tool": case.tool, "version": peers.version(case.tool), "settings": settings}


def measure(
    cases: Sequence[Case], beside: Sequence[Case], group: int, args: argparse.Namespace, quality: Quality | None
) -> list[Row]:
    """Rows of one group. Nothing compiled outlives it: guards of a hundred pipelines would slow every call."""
    torch._dynamo.reset()
    rows: list[Row] = []
    plain = peers.with_own_code(_demo.load("demo"))
    plain.transformer.compile(dynamic=False)
    labels = _demo.labels_of(args.batch)
    ready = loaded([*beside, *cases], args, rows)
    pipes = {INDUCTOR: plain, **{name: pipe for name, (_, pipe) in ready.items()}}
    calls: dict[str, list[Call]] = {name: [] for name in pipes}
    timings = interleave({name: partial(called, pipe, labels, args.steps, calls[name]) for name, pipe in pipes.items()},
                         args.repeats, WARMUP)  # fmt: skip
    least = {name: undisturbed(each[WARMUP:]) for name, each in calls.items()}
    for name, timing in timings.items():
        row: Row = described(ready[name][0]) if name in ready else {"case": name}
        row |= {"group": group, "beside": name in {case.name for case in beside}, "commit": commit()[:12]}
        row |= {"steps": args.steps, "batch": args.batch, **timing.row()}
        row["ratio_to_inductor"] = round(least[name] / least[INDUCTOR], 4)
        row["ratio_of_calls"] = round(timing.ratio_to(timings[INDUCTOR]), 4)
        if row.get("tool", "").startswith(OURS):  # type: ignore[union-attr]
            plan = Plan.load(next(path for path in args.plans if name.startswith(f"difa, {path.stem}")))
            row |= _demo.plan_row(plan, args.steps, pipes[name].scheduler)
            if plan.settings.promise is not None:
                row["promised_ratio"] = plan.settings.promise.measured_share
        if quality is not None:
            row |= quality.of(name, pipes[name])
        rows.append(row)
    return rows


def called(pipe: Any, labels: list[int], steps: int, calls: list[Call]) -> None:
    """Call a pipeline, and note the call."""
    calls.append(Caller(pipe, {"class_labels": labels, "guidance_scale": _demo.GUIDANCE}, steps)(0))


class Quality:
    """What a pipeline's images are worth, against plain inductor's of the same seeds.

    They are made in batches as large as those timed: other sizes would be compiled anew. Of a case that is in several
    groups they are made once.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.judge = load_judge()
        self.real = sample_batch(load_split(held_out=True), args.images, torch.Generator().manual_seed(0))[0] / 2 + 0.5
        plain = _demo.load("demo")
        plain.transformer.compile(dynamic=False)
        self.reference, self.labels = self.images(plain)
        self.known: dict[str, Row] = {}

    def images(self, pipe: Any) -> tuple[Tensor, Tensor]:
        return generate(pipe, self.args.images, self.args.batch, self.args.steps)

    def of(self, case: str, pipe: Any) -> Row:
        if case not in self.known:
            images, _ = self.images(pipe)
            mean = float(psnr(images, self.reference).mean())
            row = quality_row(images, self.reference, self.real, self.labels, self.judge)
            self.known[case] = row | {"psnr_mean_db": round(mean, 2) if math.isfinite(mean) else None}
        return self.known[case]


# Rows


def earlier(folder: Path, args: argparse.Namespace) -> list[Row]:
    """The timed rows of the result that is there; none of a result whose cases were not compared in their groups, or
    whose ratios are of whole calls.

    Raises ``SystemExit`` for a result of other step counts or batches.
    """
    path = folder / "planner.json"
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in rows if "group" in row and "ratio_of_calls" in row]
    other = [row for row in rows if (row["steps"], row["batch"]) != (args.steps, args.batch)]
    if other:
        raise SystemExit(
            f"{path} is of {other[0]['steps']} steps and batches of {other[0]['batch']}; give another --output"
        )
    return rows


def without(rows: Sequence[Row], cases: Iterable[str]) -> list[Row]:
    """The rows but those of these cases, and of groups nothing of which is left but what stood beside them."""
    gone = set(cases)
    left = [row for row in rows if row.get("beside") or row["case"] not in gone]
    alive = {row["group"] for row in left if not row.get("beside") and row["case"] != INDUCTOR}
    return [row for row in left if row["group"] in alive]


def share_of(rows: Sequence[Row], case: object) -> float:
    """The median over its groups of a case's share of inductor's time."""
    return statistics.median(float(str(row["ratio_to_inductor"])) for row in rows if row["case"] == case)


def ours_beside(rows: Sequence[Row], group: object) -> list[tuple[float, float]]:
    """Our plans' (share of inductor's time, PSNR in dB), the quickest first: timed in this group, or else in others."""
    ours = {str(row["case"]): row for row in rows if row.get("tool") == OURS and row.get("psnr_db") is not None}
    here = {str(row["case"]): row["ratio_to_inductor"] for row in rows if row.get("group") == group}
    return sorted((float(str(here.get(case, share_of(rows, case)))), float(str(row["psnr_db"])))
                  for case, row in ours.items())  # fmt: skip


def at_equal_time(points: Sequence[tuple[float, float]], share: float) -> float | None:
    """The PSNR in dB of ``points`` at a share of the time: a straight line between two of them, that of the slowest
    beyond it, which more time does not worsen; None where none is as quick."""
    if not points or share < points[0][0]:
        return None
    for (before, low), (after, high) in pairwise(points):
        if share < after:
            return low + (high - low) * (share - before) / (after - before)
    return points[-1][1]


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows in order of their groups, those of others with what ours come to in the same time."""
    done = []
    for row in sorted(rows, key=lambda row: int(str(row.get("group", 0)))):
        if row.get("tool") not in (None, OURS) and row.get("psnr_db") is not None:
            ours = at_equal_time(ours_beside(rows, row.get("group")), float(str(row["ratio_to_inductor"])))
            if ours is not None:
                gain = round(ours - float(str(row["psnr_db"])), 2)
                row = row | {"ours_at_equal_time_db": round(ours, 2), "ours_over_it_db": gain}
        done.append(row)
    return done


def best(rows: Sequence[Row], budgets: Sequence[float] = BUDGETS) -> list[Row]:
    """For each budget the row of each tool with the highest median PSNR among those within it."""
    found: list[Row] = []
    tools = dict.fromkeys(row["tool"] for row in rows if "tool" in row)
    for budget in budgets:
        for tool in tools:
            within = [row for row in rows if row.get("tool") == tool and _within(rows, row, budget)]
            if within:
                found.append({"budget": budget} | max(within, key=lambda row: row["psnr_db"]))  # type: ignore[arg-type,return-value]
            else:
                found.append({"budget": budget, "tool": tool, "case": "none is as quick"})
    return found


def _within(rows: Sequence[Row], row: Row, budget: float) -> bool:
    if row.get("psnr_db") is None or "ratio_to_inductor" not in row:
        return False
    return share_of(rows, row["case"]) <= budget * (1 + UNEVEN)


def written(rows: Sequence[Row], args: argparse.Namespace) -> None:
    done = [*notes_of_missing(), *compared(rows)]
    write_result("planner", done, folder=args.output)
    if args.images:
        write_result("planner_budgets", best(done), folder=args.output, script="planner")


def main() -> None:
    args = parse_arguments()
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 8192
    cases = wanted_cases(args)
    rows = earlier(args.output, args)
    if args.missing:
        timed = {row["case"] for row in rows if not row.get("beside")}
        cases = [case for case in cases if case.name not in timed]
    rows = without(rows, [case.name for case in cases])
    mine = [case for case in cases if case.tool.startswith(OURS)]
    failed: list[Row] = []
    others = [case for case in cases if case not in mine]
    known = shares_of_ours(args.plans)
    beside = [case for case in our_cases(args.plans) if case.name in known]
    shares = shares_of(others, args.steps, failed) | known
    groups = grouped(mine, [case for case in others if case.name in shares], shares, beside, args.group)
    quality = Quality(args) if args.images and groups else None
    first = 1 + max([0, *(int(str(row["group"])) for row in rows)])
    for number, (group, near) in enumerate(groups, first):
        print(f"group {number - first + 1} of {len(groups)}", file=sys.stderr)
        rows += measure(group, near, number, args, quality)
        written([*rows, *failed], args)


if __name__ == "__main__":
    main()
