"""What the commands print: tables of measurements, sites and records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from difa_compile.report.view import flops, percent, seconds, size
from difa_compile.wording import shown, visible

if TYPE_CHECKING:
    from difa_compile.backend.verdicts import Record
    from difa_compile.comparison.compare import Comparison
    from difa_compile.machine.profile import Profile
    from difa_compile.plan.data import SiteInfo
    from difa_compile.plan.plan import Plan
    from difa_compile.planner.table import ErrorTable


CELL = 400
"""Characters of a table's cell."""


def foreign(text: str) -> Text:
    """Text that is not ours, for a table: printable, not too long, and not read as markup."""
    return Text(shown(text, CELL))


def print_comparison(console: Console, comparison: Comparison) -> None:
    """The measurements in short: full, planned, and what lies between."""
    quality, full, planned = comparison.quality, comparison.full, comparison.planned
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    for name in ("full", "planned", ""):
        table.add_column(name, justify="right")
    ratio = f"[bold]{comparison.speedup:.2f}×[/]"
    images = f"a call of {comparison.images_per_call} image{'s' if comparison.images_per_call > 1 else ''}"
    table.add_row(images, seconds(full.call_seconds), seconds(planned.call_seconds), ratio)
    table.add_row(
        "a step",
        seconds(full.seconds_per_step),
        seconds(planned.seconds_per_step),
        f"{full.seconds_per_step / planned.seconds_per_step:.2f}×",
    )
    table.add_row("first call, with compilation", seconds(full.first_call), seconds(planned.first_call))
    for name, operations in (
        ("attention FLOPs, with projections", comparison.with_projections),
        ("attention FLOPs, without", comparison.attention),
    ):
        steps = len(operations.planned_per_step)
        total = flops(operations.full_per_step * steps), flops(sum(operations.planned_per_step))
        table.add_row(name, *total, percent(operations.share))
    table.add_row("cache memory", "", size(comparison.cache_bytes))
    if quality.psnr is None:
        table.add_row("images", "", "", "all equal")
    else:
        table.add_row("PSNR", "", "", f"{quality.psnr:.1f} dB")
    if quality.ssim is not None:
        table.add_row("SSIM", "", "", f"{quality.ssim:.3f}")
    if quality.frechet is not None:
        table.add_row("Fréchet distance", "", "", f"{quality.frechet:.2f}")
    if quality.frechet_full is not None and quality.frechet_planned is not None:
        table.add_row(
            "Fréchet distance to real images", f"{quality.frechet_full:.2f}", f"{quality.frechet_planned:.2f}"
        )
    if quality.agreement is not None:
        table.add_row("classifier agreement", "", "", percent(quality.agreement))
    if quality.judged_right_full is not None and quality.judged_right_planned is not None:
        table.add_row(
            "read as the class asked for", percent(quality.judged_right_full), percent(quality.judged_right_planned)
        )
    console.print(table)
    skipped = len(set(comparison.skips))
    if skipped:
        console.print(f"{skipped} decision{'s' if skipped > 1 else ''} skipped; the report gives the reasons.")


def print_front(console: Console, table: ErrorTable) -> None:
    """What each budget buys, by a table of errors."""
    from difa_compile.planner.make import front_of
    from difa_compile.planner.rows import distinct

    shown_table = Table(
        "budget", "predicted PSNR", "distinct rows", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    table.tell_machine()
    for found in front_of(table.problem()):
        decibels = "the same images" if found.error <= 0 else f"{found.psnr:.1f} dB"
        shown_table.add_row(f"{found.share:.2f} of full's time", decibels, str(distinct(found.columns)))
    console.print(shown_table)
    spreads = [f"{100 * unit.typical_spread:.0f} % for {unit.name}" for unit in table.units if unit.typical_spread]
    if spreads:
        console.print(
            Text(f"From image to image squared errors differ by {' and '.join(spreads)} (standard deviation).")
        )


def print_plan(console: Console, plan: Plan, profile: Profile | None = None) -> None:
    """A plan's summary, with predicted times if a profile is given, and the candidates that were not tried, and why."""
    console.print(Text(visible(plan.summary(profile))), soft_wrap=True)
    reasons = not_applicable(plan)
    if not reasons:
        return
    table = Table("site", "candidate", "why it was not tried", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for line in reasons:
        table.add_row(*map(foreign, line))
    console.print(table)


def not_applicable(plan: Plan) -> tuple[tuple[str, str, str], ...]:
    """(site, candidate, reason) of each candidate that calibration could not try, once each."""
    found = [
        (plan.sites[index].path, str(trial.decision), trial.reason)
        for row in plan.rows
        for index, cell in enumerate(row)
        for trial in cell.trials
        if trial.loss is None
    ]
    return tuple(dict.fromkeys(found))


def print_sites(console: Console, title: str, sites: Iterable[Any]) -> None:
    """One line per attention call of a model, cross-attention included."""
    table = Table(title=foreign(title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("site", "kind"):
        table.add_column(name)
    for name in ("heads", "tokens"):
        table.add_column(name, justify="right")
    for name in ("layout", "mask"):
        table.add_column(name)
    for site in sites:
        heads = f"{site.query_shape[1]}×{site.query_shape[3]}"
        layout = str(site.layout) if site.layout is not None else f"unknown: {site.layout_reason}"
        table.add_row(*map(foreign, (site.path, str(site.kind), heads, str(site.tokens), layout, site.mask)))
    console.print(table)


def print_blocks(console: Console, blocks: Sequence[SiteInfo], records: Iterable[Record]) -> None:
    """One line per block, and span of blocks, that a plan can leave out as a whole, and why it cannot leave out
    others."""
    spans = sum(bool(block.blocks) for block in blocks)
    console.print(f"\nBlocks that a plan can leave out: {len(blocks) - spans}; spans of blocks: {spans}")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("block", "kind"):
        table.add_column(name)
    for name in ("tokens", "width"):
        table.add_column(name, justify="right")
    for block in blocks:
        kind = f"span of {len(block.blocks)} blocks" if block.blocks else "block"
        table.add_row(*map(foreign, (block.path, kind, str(block.tokens), str(block.width))))
    if blocks:
        console.print(table)
    print_records(console, records, "block")


def print_records(console: Console, records: Iterable[Record], what: str = "site") -> None:
    """What became of each decision, where there is something to say; ``what`` the decisions are of."""
    lines = dict.fromkeys((r.site, str(r.decision), str(r.outcome), r.reason) for r in records if r.reason)
    if not lines:
        return
    table = Table(what, "decision", "outcome", "reason", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for line in lines:
        table.add_row(*map(foreign, line))
    console.print(table)
