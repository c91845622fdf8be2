"""The commands. Each reads its options, calls the library and prints; what they do lives in the library."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text

import difa_compile
from difa_compile.cli.bundles import bundle_app, export, run
from difa_compile.cli.demo import DemoOptions, require, run_demo
from difa_compile.cli.failures import GuardedGroup, interruptible, make_console, state_kept
from difa_compile.cli.inputs import (
    MOST_IMAGES,
    MOST_STEPS,
    call_inputs,
    check_device,
    command_line,
    dtype_named,
    hush_diffusers,
    image_captions,
    images_per_call,
    open_pipeline,
    seeds_for,
    tried_decisions,
)
from difa_compile.cli.methods import (
    DEFAULT_BUDGET,
    DEFAULT_THRESHOLD,
    DEMO_BUDGET,
    MOST_RUNS,
    RUNS,
    Method,
    check_options_of,
)
from difa_compile.cli.options import (
    AllowedError,
    Attention,
    Budget,
    Device,
    Guidance,
    HeadWindows,
    Inputs,
    Labels,
    MaxRows,
    Model,
    NoBlocks,
    PlanFile,
    Prompt,
    Psnr,
    Seed,
    Steps,
    Table,
    TableToTry,
    Tried,
    Windows,
)
from difa_compile.cli.tables import (
    not_applicable,
    print_blocks,
    print_comparison,
    print_front,
    print_plan,
    print_records,
    print_sites,
)
from difa_compile.files.writing import check_target, check_writable
from difa_compile.pipeline.loading import DEMO
from difa_compile.wording import shown, visible

if TYPE_CHECKING:
    from difa_compile.planner.make import Limit

app = typer.Typer(
    name="difa",
    cls=GuardedGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Plan, compile and compare the attention of diffusion transformers. Begin with [bold]difa demo[/].",
)


app.command()(export)
app.command()(run)
app.add_typer(bundle_app, name="bundle")


def _print_place(console: Console, label: str, place: str) -> None:
    """Where something was written, on one line and in full."""
    console.print(Text.assemble(label, (visible(place).replace("\n", "\\n"), "bold")), soft_wrap=True)


def _version(asked: bool) -> None:
    if asked:
        print(f"difa-compile {difa_compile.__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.", envvar="DIFA_DEBUG")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print versions.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options of every command; :class:`GuardedGroup` reads ``debug``."""


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(help="Folder of the page, plan.json, errors.json and comparison.json.")
    ] = Path("difa-report"),
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps.", min=1, max=MOST_STEPS, show_default="50; quick: 20")
    ] = None,
    budget: Annotated[float, typer.Option(help="Share of the full model's time to plan for.")] = DEMO_BUDGET,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Images to compare, rounded up to tens.", min=1, max=MOST_IMAGES, show_default="100; quick: 40"
        ),
    ] = None,
    seed: Seed = 0,
    plan: Annotated[Path | None, typer.Option(help="Use this plan; make none.", show_default=False)] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer steps and images, and no search as DiTFastAttn's, for a first look.")
    ] = False,
) -> None:
    """Measure the built-in model, plan it, sample it in full and as planned, and write a page that shows both, and what
    other budgets buy.

    What was measured stays in the folder: the same command goes on where it was interrupted.
    """
    options = DemoOptions(
        output=output,
        steps=steps if steps is not None else 20 if quick else 50,
        budget=budget,
        samples=samples if samples is not None else 40 if quick else 100,
        seed=seed,
        search=not quick,
        plan=plan,
        command=command_line(),
    )
    console = make_console()
    page = run_demo(options, console)
    _print_place(console, "\nThe page: ", page.resolve().as_uri())


@app.command()
def calibrate(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Plan file to write.")] = Path("plan.json"),
    method: Annotated[
        Method,
        typer.Option(
            help="planner: the best plan under a limit, whole blocks among its decisions, from one measurement, run "
            "and held to its word. weighed: attention alone, what saves most for its loss. published: as DiTFastAttn "
            "chooses, the first candidate below the threshold."
        ),
    ] = Method.PLANNER,
    table: TableToTry = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Sampling steps.", min=1, max=MOST_STEPS, show_default="50, or those of --table"),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Planner: share of the full model's time to plan for.", show_default="0.5, without a limit"),
    ] = None,
    psnr: Psnr = None,
    error: AllowedError = None,
    max_rows: MaxRows = None,
    no_blocks: NoBlocks = False,
    runs: Annotated[
        int | None, typer.Option(help="Planner: plans to try at most.", min=1, max=MOST_RUNS, show_default=str(RUNS))
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Weighed, published: largest loss admitted, scaled with depth; published: 0.025 to 0.15.",
            show_default="0.05",
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            help="SHAPE:RADIUS, e.g. band:32, disc:8.", show_default="planner: none; else a band of N/8 tokens per side"
        ),
    ] = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            help="Weighed, published: decisions to try.", show_default="those of DiTFastAttn, comma-separated"
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="Weighed, published: form of the loss, as DiTFastAttn's paper states it, or as its program (code) has "
            "it; by the paper's more candidates pass.",
            show_default="paper",
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            help="Weighed: by what is saved, time (as predicted here), flops, or auto: time where this machine is "
            "measured.",
            show_default="auto",
        ),
    ] = None,
    labels: Labels = None,
    prompt: Prompt = None,
    inputs: Inputs = None,
    guidance: Guidance = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="File that keeps an interrupted search, and stays. Planner: the table of errors; beside it, with "
            ".trials, what came of plans.",
            show_default="OUTPUT.state, deleted in the end",
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Find a plan for a model: what it may leave out at each step, and what that costs in quality."""
    limits: dict[str, object] = {"--budget": budget, "--psnr": psnr, "--error": error}
    planned: dict[str, object] = {
        "--table": table,
        "--max-rows": max_rows,
        "--no-blocks": no_blocks or None,
        "--runs": runs,
    }
    check_options_of(method, limits | planned, Method.PLANNER)
    searched = {"--threshold": threshold, "--candidates": candidates, "--loss": loss}
    check_options_of(method, searched, Method.WEIGHED, Method.PUBLISHED)
    check_options_of(method, {"--rank": rank}, Method.WEIGHED)
    if method is Method.PLANNER:
        from difa_compile.planner.make import Limit

        if all(given is None for given in limits.values()):
            budget = DEFAULT_BUDGET
        limit = Limit(budget, psnr, error, max_rows, blocks=not no_blocks)
        if table is not None and window is not None:
            raise typer.BadParameter(
                "what --table holds is measured; leave one of them out, or give --window to difa measure",
                param_hint="--window",
            )
        call = call_inputs(model, inputs, labels, prompt, guidance)
        decisions = tried_decisions([] if window is None else [window], None)
        _calibrate_within(model, output, table, steps, limit, call, decisions, state, runs or RUNS, seed, device)
        return
    steps = 50 if steps is None else steps
    kept = _state_file(state, output)
    require("diffusers", "tqdm")
    from difa_compile.calibration.calibrate import calibrate as search
    from difa_compile.calibration.calibrate import check_settings
    from difa_compile.cli.tune import measure_if_unknown, profile_for

    names = [name.strip() for name in candidates.split(",")] if candidates is not None else None
    threshold = DEFAULT_THRESHOLD if threshold is None else threshold
    loss = "paper" if loss is None else loss
    if rank == Method.PUBLISHED:
        raise typer.BadParameter("that is a method: --method published", param_hint="--rank")
    order = "published" if method is Method.PUBLISHED else "auto" if rank is None else rank
    check_settings(steps, threshold, window, names, loss, order)
    call = call_inputs(model, inputs, labels, prompt, guidance)
    check_device(device)
    console = make_console()
    pipe = open_pipeline(model, device, call)
    check_target(output, "the plan")
    check_target(kept, "the state of the search")
    if order in ("auto", "time"):
        measure_if_unknown(console, pipe)
    with interruptible(lambda: state_kept(kept)):
        plan = search(
            pipe,
            call | {"generator": torch.Generator().manual_seed(seed)},
            steps=steps,
            threshold=threshold,
            window=window,
            candidates=names,
            loss=loss,
            state=kept,
            rank=order,
            keep_state=True,
        )
    plan.save(output)
    if state is None:
        with suppress(OSError):  # the plan is stored; a state left behind harms nobody
            kept.unlink(missing_ok=True)
    print_plan(console, plan, profile_for(pipe))
    _print_place(console, "The plan: ", str(output))


def _state_file(state: Path | None, output: Path) -> Path:
    """Where an interrupted search is kept: the file that the user names, or one beside the plan."""
    return state if state is not None else output.parent / f"{output.name}.state"


def _calibrate_within(
    model: str,
    output: Path,
    table: Path | None,
    steps: int | None,
    limit: Limit,
    call: dict[str, Any],
    decisions: list[str] | None,
    state: Path | None,
    runs: int,
    seed: int,
    device: str | None,
) -> None:
    require("diffusers", "tqdm", "numpy", "torchmetrics")
    from difa_compile.comparison.kept import trials_file
    from difa_compile.comparison.planned import plan_within
    from difa_compile.planner.table import ErrorTable

    measured = None if table is None else ErrorTable.load(table)
    if measured is not None:
        measured.check_complete(table)
    if steps is None:
        steps = 50 if measured is None else len(measured.progress)
    kept = _state_file(state, output)
    files = [kept, trials_file(kept)]
    check_device(device)
    console = make_console()
    pipe = open_pipeline(model, device, call)
    check_target(output, "the plan")
    for file in files:
        check_target(file, "the state of the search")
    with interruptible(lambda: state_kept(next((file for file in files if file.is_file()), kept))):
        plan = plan_within(
            pipe, call, limit, steps, table=measured, decisions=decisions, seeds=(seed, seed + 1),
            held_out=(seed + 2,), runs=runs, state=kept,
            told=lambda text: console.print(Text(f"tried: {visible(text)}")),
        )  # fmt: skip
    plan.save(output)
    if state is None:
        for file in files:
            with suppress(OSError):
                file.unlink(missing_ok=True)
    print_plan(console, plan)
    _print_place(console, "The plan: ", str(output))


@app.command()
def measure(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Table to write.")] = Path("errors.json"),
    steps: Steps = 50,
    windows: Windows = None,
    tried: Tried = None,
    heads: HeadWindows = None,
    attention: Attention = None,
    labels: Labels = None,
    prompt: Prompt = None,
    inputs: Inputs = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Measure once what leaving out work does to a model's output; difa plan makes plans for any budget from that.

    A measurement that was interrupted goes on where it was when the same command is given again.
    """
    require("diffusers", "tqdm", "numpy")
    from difa_compile.calibration.measure import measure as measure_errors
    from difa_compile.decision import Window

    decisions = tried_decisions(windows, tried)
    head_windows = [str(Window.parse(window)) for window in heads or ()]
    call = call_inputs(model, inputs, labels, prompt, guidance)
    check_device(device)
    console = make_console()
    pipe = open_pipeline(model, device, call)
    check_target(output, "the table of errors")
    with interruptible(lambda: state_kept(output)):
        table = measure_errors(
            pipe,
            call | {"generator": torch.Generator().manual_seed(seed)},
            steps,
            decisions=decisions,
            heads=head_windows,
            attention=attention,
            state=output,
        )
    print_front(console, table)
    _print_place(console, "The table: ", str(output))


@app.command()
def plan(
    table: Table,
    output: Annotated[Path, typer.Option("--output", "-o", help="Plan file to write.")] = Path("plan.json"),
    budget: Budget = None,
    psnr: Psnr = None,
    error: AllowedError = None,
    max_rows: MaxRows = None,
    no_blocks: NoBlocks = False,
    steps: Annotated[
        int | None,
        typer.Option(help="Sampling steps of the plan, at most as many as were measured.", show_default="as measured"),
    ] = None,
) -> None:
    """Make the best plan that a table of errors shows under a budget, or for a quality; without either, show both.

    Nothing is run: difa calibrate --table also runs the plan and holds it to its word.
    """
    require("numpy")
    from difa_compile.planner.make import Limit, attention_alone, plan_from_table
    from difa_compile.planner.table import ErrorTable

    console = make_console()
    asked = [given is not None for given in (budget, psnr, error)]
    if max_rows is not None or any(asked):
        Limit(budget, psnr, error, max_rows, blocks=not no_blocks)
    found = ErrorTable.load(table)
    found.check_complete(table)
    if steps is not None:
        found = found.thinned(steps)
    if not any(asked):
        print_front(console, attention_alone(found) if no_blocks else found)
        return
    check_target(output, "the plan")
    made = plan_from_table(found, budget=budget, psnr=psnr, error=error, max_rows=max_rows, blocks=not no_blocks)
    made.save(output)
    print_plan(console, made)
    _print_place(console, "The plan: ", str(output))


@app.command()
def tune(
    device: Device = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="May be repeated.", show_default="float32 and bfloat16")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Measure half the cases.")] = False,
) -> None:
    """Measure what attention costs on this machine, so that calibration and plans avoid what would be slower.

    The profile is kept for this machine, torch and number of threads; DIFA_PROFILE names another file, or is off.
    """
    from difa_compile.cli.tune import measure, print_profile
    from difa_compile.machine.profile import place
    from difa_compile.machine.tune import DTYPES

    dtypes = tuple(map(dtype_named, dtype)) if dtype else DTYPES
    check_device(device)
    console = make_console()
    profile = measure(console, device or ("cuda" if torch.cuda.is_available() else "cpu"), dtypes, quick)
    print_profile(console, profile)
    _print_place(console, "The profile: ", str(place(profile.machine)))


@app.command()
def inspect(
    target: Annotated[
        str, typer.Argument(metavar="MODEL|PLAN", help="A model as above, or a plan file.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write a model's graph after every pass into this folder."),
    ] = None,
) -> None:
    """Show the attention sites and blocks of a model, or the decisions of a plan, and why anything is left alone."""
    console = make_console()
    if os.path.lexists(target) and not os.path.isdir(target):
        if trace is not None:
            raise typer.BadParameter("a plan has no graph; name a model", param_hint="--trace")
        _inspect_plan(console, Path(target), as_json)
    else:
        _inspect_model(console, target, as_json, trace)


def _inspect_plan(console: Console, path: Path, as_json: bool) -> None:
    from difa_compile.machine.profile import current
    from difa_compile.plan.plan import Plan

    plan = Plan.load(path)
    if not as_json:
        print_plan(console, plan, current("cuda" if torch.cuda.is_available() else "cpu"))
        return
    reasons = [{"site": s, "decision": d, "reason": reason} for s, d, reason in not_applicable(plan)]
    print(json.dumps(json.loads(plan.to_json()) | {"not_applicable": reasons}, indent=1))


def _inspect_model(console: Console, name: str, as_json: bool, trace: Path | None) -> None:
    require("diffusers")
    from difa_compile.pipeline.inspection import inspect_model
    from difa_compile.pipeline.loading import load_model

    if trace is not None:
        check_writable(trace)
    hush_diffusers()
    model = load_model(name)
    if not isinstance(model, torch.nn.Module):
        model.set_progress_bar_config(disable=True)
    inspection = inspect_model(model, trace=trace)
    if as_json:
        print(json.dumps(_inspection_json(inspection), indent=1))
        return
    count = len(inspection.site_infos)
    title = f"{shown(type(inspection.model).__name__)}: {count} attention sites that a plan can act on"
    print_sites(console, title, inspection.sites)
    print_records(console, inspection.records)
    print_blocks(console, inspection.blocks, inspection.block_records)


def _inspection_json(inspection: Any) -> dict[str, Any]:
    return {
        "model": type(inspection.model).__name__,
        "sites": [
            {
                "path": site.path,
                "kind": str(site.kind),
                "query_shape": list(site.query_shape),
                "key_shape": list(site.key_shape),
                "scale": site.scale,
                "mask": site.mask,
                "width": site.width,
                "layout": None if site.layout is None else str(site.layout),
                "layout_reason": site.layout_reason,
                "rewritable": site.rewritable,
            }
            for site in inspection.sites
        ],
        "records": _records_json(inspection.records),
        "blocks": [
            {"path": block.path, "tokens": block.tokens, "width": block.width, "blocks": list(block.blocks)}
            for block in inspection.blocks
        ],
        "block_records": _records_json(inspection.block_records),
    }


def _records_json(records: Iterable[Any]) -> list[dict[str, str]]:
    return [
        {"site": r.site, "decision": str(r.decision), "outcome": str(r.outcome), "reason": r.reason} for r in records
    ]


@app.command()
def compare(
    model: Model,
    plan: PlanFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = Path("difa-compare"),
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps.", min=1, max=MOST_STEPS, show_default="the plan's")
    ] = None,
    samples: Annotated[int, typer.Option(help="Images to compare, at least.", min=1, max=MOST_IMAGES)] = 20,
    repeats: Annotated[int, typer.Option(help="Timed calls of each side, at least.", min=1, max=MOST_IMAGES)] = 3,
    seed: Seed = 0,
    labels: Labels = None,
    prompt: Prompt = None,
    inputs: Inputs = None,
    guidance: Guidance = None,
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile the full side.")] = False,
    allow_slower: Annotated[
        bool,
        typer.Option("--allow-slower", help="Carry out windows that are predicted slower than full attention, too."),
    ] = False,
    device: Device = None,
) -> None:
    """Sample a model in full and under a plan, with the same seeds; measure, and write images, figures and the page."""
    require("diffusers", "torchmetrics", "tqdm", "jinja2", "PIL")
    from difa_compile.comparison.compare import compare as measure
    from difa_compile.demo.judge import load_judge
    from difa_compile.plan.plan import Plan
    from difa_compile.report import describe_machine, describe_versions
    from difa_compile.report.stored import StoredComparison

    call = call_inputs(model, inputs, labels, prompt, guidance)
    check_device(device)
    chosen = Plan.load(plan)
    pipe = open_pipeline(model, device, call)
    folder = check_writable(output)
    comparison = measure(
        pipe,
        chosen,
        call,
        steps=steps if steps is not None else chosen.steps,
        seeds=seeds_for(samples, images_per_call(call), seed),
        repeats=repeats,
        judge=load_judge() if model == DEMO else None,
        backend_full="eager" if eager else "inductor",
        allow_slower=allow_slower,
    )
    names = {label: f"digit {label}" for label in range(10)} if model == DEMO else {}
    stored = StoredComparison(
        plan=chosen,
        comparison=comparison,
        title=f"{shown(model)}: full attention and a plan",
        command=command_line(),
        machine=describe_machine(),
        versions=describe_versions(),
        captions=image_captions(call, names, len(comparison.images_full)),
    )
    stored.save(folder)
    page = stored.write_page(folder)
    console = make_console()
    print_comparison(console, comparison)
    _print_place(console, "\nThe page: ", page.resolve().as_uri())


@app.command()
def report(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A folder written by difa compare or difa demo.", show_default=False),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the page.", show_default="FOLDER")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Another title.", show_default=False)] = None,
) -> None:
    """Write the page of an earlier comparison again."""
    require("jinja2", "PIL", "torchmetrics")
    from dataclasses import replace

    from difa_compile.report.stored import StoredComparison

    stored = StoredComparison.load(folder)
    if title is not None:
        stored = replace(stored, title=visible(title))
    page = stored.write_page(output if output is not None else folder)
    _print_place(make_console(), "The page: ", page.resolve().as_uri())
