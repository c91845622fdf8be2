"""From a plan and a comparison to what the page says: every number already a text, every section a small dataclass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from difa_compile.comparison import metrics
from difa_compile.plan.cost import block_flops, contributions, counts_blocks
from difa_compile.plan.plan import Plan
from difa_compile.report.charts import Chart, Mark, front_chart, step_chart
from difa_compile.report.heatmap import HeatMap, heat_map
from difa_compile.report.pictures import SMALL, Panel, Picture, amplification, data_uri, difference
from difa_compile.wording import shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from difa_compile.backend.verdicts import Record
    from difa_compile.comparison.compare import Comparison, Quality
    from difa_compile.comparison.front import Point

EMBEDDED = 48
"""At most so many seeds are shown; the figures always cover all of them."""
_NONE = "–"
_SPACE = "\u00a0"
"""Between a number and its unit, so that a line never ends there."""


@dataclass(frozen=True)
class Headline:
    """One large figure. ``tone``: ``good``, ``warn`` or empty."""

    label: str
    value: str
    unit: str
    note: str
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a line is its header. ``code``: the values are set in a fixed-width face."""

    caption: str
    lines: tuple[tuple[str, ...], ...]
    heads: tuple[str, ...] = ()
    code: bool = False


@dataclass(frozen=True)
class Skip:
    """A decision that was not carried out."""

    site: str
    decision: str
    reason: str


@dataclass(frozen=True)
class Page:
    """Everything the template prints. ``shown``: how many pictures stand outside the fold; tables stand in columns."""

    title: str
    lead: str
    headlines: tuple[Headline, ...]
    pictures: tuple[Picture, ...]
    pictures_note: str
    shown: int
    aspect: float
    amplification: int
    front: Chart | None
    map: HeatMap
    contributions: Table
    summary: str
    charts: tuple[Chart, ...]
    tables: tuple[tuple[Table, ...], ...]
    skips: tuple[Skip, ...]
    no_skips: str
    command: str
    origin: tuple[tuple[Table, ...], ...]


def build_page(
    plan: Plan,
    comparison: Comparison,
    records: Sequence[Record],
    title: str,
    machine: Mapping[str, str],
    versions: Mapping[str, str],
    command: str,
    captions: Sequence[str],
    front: Sequence[Point] = (),
) -> Page:
    """The page's content. ``captions``: one per image in the order of the comparison, or none. ``front``: other plans
    that were run beside the full model."""
    full, planned = _tensor(comparison.images_full), _tensor(comparison.images_planned)
    factor = amplification(full, planned)
    pictures = _pictures(full[:EMBEDDED], planned[:EMBEDDED], factor, _captions(comparison, captions))
    return Page(
        title=title,
        lead=_lead(plan, comparison),
        headlines=_headlines(plan, comparison),
        pictures=pictures,
        pictures_note=f"{len(pictures)} of the {len(full)} compared." if len(full) > len(pictures) else "",
        shown=12 if max(full.shape[2:]) <= SMALL else 6,
        aspect=round(full.shape[3] / full.shape[2], 4),
        amplification=factor,
        front=_front(front),
        map=heat_map(plan),
        contributions=_contributions(plan),
        summary=plan.summary().rstrip(),
        charts=_charts(comparison),
        tables=(
            (_quality_table(comparison.quality, len(full)),),
            (_time_table(comparison), _cost_table(plan, comparison)),
        ),
        skips=_skips(records),
        no_skips=f"None: all {len(records)} decisions on record were carried out or were full to begin with.",
        command=command,
        origin=_origin(plan, comparison, machine, versions),
    )


def _tensor(images: NDArray[np.uint8]) -> Tensor:
    """(N, H, W, C) uint8 as (N, C, H, W) float32 in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def _lead(plan: Plan, comparison: Comparison) -> str:
    images = _count(len(comparison.images_full), "image")
    text = (
        f"{shown(comparison.pipeline)} with its attention in full against the same model under a plan: "
        f"{comparison.steps} steps, {images} from {_count(len(comparison.seeds), 'seed')}, "
        f"{shown(comparison.dtype)} on {shown(comparison.device)}."
    )
    if comparison.steps != plan.steps:
        text += f" The plan was made for {plan.steps} steps and carried onto {comparison.steps}."
    return text


def _headlines(plan: Plan, comparison: Comparison) -> tuple[Headline, ...]:
    quality, speedup = comparison.quality, comparison.speedup
    batch = f"{_count(comparison.images_per_call, 'image')} per call"
    times = f"{seconds(comparison.full.call_seconds)} → {seconds(comparison.planned.call_seconds)}, {batch}"
    headlines = [
        Headline(
            "Speed-up over full attention" if speedup >= 1 else "Speed against full attention",
            f"{speedup:.2f}×",
            "",
            times,
            "good" if speedup >= 1.02 else "warn" if speedup < 0.98 else "",
        ),
        _work(plan, comparison),
        _closeness(quality, len(comparison.images_full)),
    ]
    if quality.agreement is not None:
        right = ""
        if quality.judged_right_full is not None and quality.judged_right_planned is not None:
            sides = percent(quality.judged_right_full), percent(quality.judged_right_planned)
            right = f"class asked for: {sides[0]} full, {sides[1]} planned"
        headlines.append(Headline("Classifier agreement", f"{100 * quality.agreement:.1f}", "%", right))
    else:
        headlines.append(_cache_headline(comparison.cache_bytes))
    return tuple(headlines)


def _work(plan: Plan, comparison: Comparison) -> Headline:
    """What is computed: of the blocks, where the plan leaves out whole ones and has its own steps, else of attention
    alone."""
    attention = 100 * comparison.with_projections.share
    blocks = block_flops(plan) if comparison.steps == plan.steps else None
    if blocks is not None:
        note = f"linears and attention; {attention:.0f}{_SPACE}% of attention alone"
        return Headline("FLOPs of the blocks computed", f"{100 * blocks.share:.0f}", "% of full", note)
    note = f"projections counted in; {100 * comparison.attention.share:.0f}{_SPACE}% without them"
    return Headline("Attention FLOPs computed", f"{attention:.0f}", "% of full", note)


def _closeness(quality: Quality, count: int) -> Headline:
    label = "Images against full, PSNR"
    if quality.psnr is None:
        return Headline(label, "equal", "", f"all {count} images are equal to the last bit", "good")
    notes = [] if quality.ssim is None else [f"SSIM {quality.ssim:.3f}"]
    if quality.identical:
        notes.append(f"{quality.identical} of {count} equal")
    if quality.psnr_worst is not None:
        notes.append(f"worst {quality.psnr_worst:.1f}{_SPACE}dB")
    return Headline(label, f"{quality.psnr:.1f}", "dB", ", ".join(notes))


def _cache_headline(cache_bytes: int) -> Headline:
    value, unit = size(cache_bytes).split(_SPACE)
    return Headline("Cache memory", value, unit, "the most held at once between steps")


def _captions(comparison: Comparison, captions: Sequence[str]) -> list[str]:
    count = len(comparison.images_full)
    if captions and len(captions) != count:
        raise ValueError(f"{len(captions)} captions for {count} images; give one per image, or none")
    per_call = comparison.images_per_call
    texts = []
    for index in range(count):
        seed, place = comparison.seeds[index // per_call], index % per_call
        origin = f"seed {seed}" + (f", image {place}" if per_call > 1 else "")
        texts.append(f"{shown(captions[index])} · {origin}" if captions else origin)
    return texts


def _pictures(full: Tensor, planned: Tensor, factor: int, captions: Sequence[str]) -> tuple[Picture, ...]:
    ratios = metrics.psnr(full, planned).tolist()
    pictures = []
    for a, b, ratio, caption in zip(full, planned, ratios, captions, strict=False):
        panels = (
            Panel("full", f"{caption}, full attention", data_uri(a)),
            Panel("planned", f"{caption}, under the plan", data_uri(b)),
            Panel(f"difference ×{factor}", f"{caption}, absolute difference", data_uri(difference(a, b, factor))),
        )
        measure = f"PSNR {ratio:.1f}{_SPACE}dB" if math.isfinite(ratio) else "equal"
        height, width = a.shape[1:]
        pictures.append(Picture(panels, caption, measure, width, height, max(width, height) <= SMALL))
    return tuple(pictures)


def _front(points: Sequence[Point]) -> Chart | None:
    """Quality over time; None without a point to draw."""
    marks = [Mark(shown(p.name), str(p.origin), p.share, p.psnr) for p in points if p.psnr is not None]
    if not marks:
        return None
    lines = tuple(
        (
            f"{shown(p.name)}{_SAID[str(p.origin)]}",
            f"{p.share:.2f}",
            "the same images" if p.psnr is None else f"{p.psnr:.1f}{_SPACE}dB",
        )
        for p in points
    )
    title = "What a budget buys"
    note = (
        "Each point is a plan that was run beside the full model: the share of its time, and the PSNR against its "
        "images. Those on the line are planned from one measurement; recipes compute every n-th step, come what may."
    )
    svg = front_chart(title, marks, ("plan", "search", "recipe", "planner"))
    key = tuple((kind, text) for kind, text in _KEY.items() if any(mark.kind == kind for mark in marks))
    return Chart(title, svg, note, lines, ("plan", "share of full's time", "PSNR"), key)


_KEY = {
    "plan": "this plan",
    "planner": "planned for other budgets",
    "recipe": "fixed recipes",
    "search": "searches by threshold",
}
_SAID = {"planner": "", "plan": " (this plan)", "recipe": " (recipe)", "search": " (search by threshold)"}


def _contributions(plan: Plan) -> Table:
    """What each decision of the plan leaves out."""
    lines = tuple((shown(str(each.decision)), str(each.cells), percent(each.share)) for each in contributions(plan))
    of = "of the blocks" if counts_blocks(plan) else "of attention, projections counted in"
    return Table(f"Operations left out, as a share of the full run's ({of}).", lines, ("", "cells", "left out"))


def _charts(comparison: Comparison) -> tuple[Chart, ...]:
    times = comparison.full.step_seconds, comparison.planned.step_seconds
    operations = comparison.with_projections
    steps = len(operations.planned_per_step)
    return (
        step_chart(
            "Time per step",
            "Median over the timed calls. Model and scheduler; prompt encoding and decoding come on top.",
            times[0],
            times[1],
            seconds,
        ),
        step_chart(
            "Attention FLOPs per step",
            "Projections counted in, for one image of the batch. Taking a residual costs a window on top.",
            [float(operations.full_per_step)] * steps,
            [float(value) for value in operations.planned_per_step],
            flops,
        ),
    )


def _quality_table(quality: Quality, count: int) -> Table:
    def line(name: str, between: str = _NONE, full: str = _NONE, planned: str = _NONE) -> tuple[str, ...]:
        return (name, full, planned, between)

    psnr = _NONE if quality.psnr is None else f"{quality.psnr:.2f}{_SPACE}dB"
    worst = _NONE if quality.psnr_worst is None else f"{quality.psnr_worst:.2f}{_SPACE}dB"
    lines = [
        line("PSNR, mean" + (" of those that differ" if quality.identical else ""), psnr),
        line("PSNR, worst", worst),
    ]
    if quality.ssim is not None and quality.ssim_worst is not None:
        lines += [line("SSIM, mean", f"{quality.ssim:.4f}"), line("SSIM, worst", f"{quality.ssim_worst:.4f}")]
    if quality.frechet is not None:
        lines.append(line("Fréchet distance", f"{quality.frechet:.3f}"))
    if quality.frechet_full is not None and quality.frechet_planned is not None:
        lines.append(
            line("… to real images", full=f"{quality.frechet_full:.3f}", planned=f"{quality.frechet_planned:.3f}")
        )
    if quality.agreement is not None:
        lines.append(line("classifier reads the same", percent(quality.agreement)))
    if quality.judged_right_full is not None and quality.judged_right_planned is not None:
        right = percent(quality.judged_right_full), percent(quality.judged_right_planned)
        lines.append(line("classifier reads the class asked for", full=right[0], planned=right[1]))
    lines.append(line("equal to the last bit", f"{quality.identical} of {count}"))
    lines.append(line("largest difference of a pixel", f"{255 * quality.max_difference:.0f} of 255"))
    caption = (
        f"Quality, over {_count(count, 'image')}. PSNR and SSIM: higher is closer; Fréchet distance: lower is closer."
    )
    return Table(caption, tuple(lines), ("", "full", "planned", "full ↔ planned"))


def _time_table(comparison: Comparison) -> Table:
    full, planned = comparison.full, comparison.planned

    def line(name: str, a: float, b: float) -> tuple[str, ...]:
        return (name, seconds(a), seconds(b), f"{a / b:.2f}×")

    per_image = comparison.images_per_call
    lines = (
        line("one call, median", full.call_seconds, planned.call_seconds),
        line("one image", full.call_seconds / per_image, planned.call_seconds / per_image),
        line("one step, mean", full.seconds_per_step, planned.seconds_per_step),
        line("first call, compilation included", full.first_call, planned.first_call),
    )
    side = "plain inductor" if comparison.backend_full == "inductor" else shown(comparison.backend_full)
    caption = (
        f"Time. {len(full.calls)} and {len(planned.calls)} timed calls of {_count(per_image, 'image')}; the full "
        f"side runs through {side}."
    )
    return Table(caption, lines, ("", "full", "planned", "ratio"))


def _cost_table(plan: Plan, comparison: Comparison) -> Table:
    lines = []
    for name, operations in (
        ("attention FLOPs of a run, projections counted in", comparison.with_projections),
        ("attention FLOPs of a run, QKᵀ and PV alone", comparison.attention),
    ):
        total = operations.full_per_step * len(operations.planned_per_step)
        lines.append((name, flops(total), flops(sum(operations.planned_per_step)), percent(operations.share)))
    lines.append(("cache memory, at most", "0 B", size(comparison.cache_bytes), _NONE))
    lines.append(("variants of the graph, of the plan as made", "1", str(len(plan.buckets)), _NONE))
    return Table("Arithmetic, for one image of the batch, and memory.", tuple(lines), ("", "full", "planned", "share"))


def _skips(records: Sequence[Record]) -> tuple[Skip, ...]:
    """Each skip once: variants of several steps repeat them."""
    found = [
        Skip(shown(r.site), shown(str(r.decision)), shown(r.reason, 400)) for r in records if r.outcome == "skipped"
    ]
    return tuple(dict.fromkeys(found))


def _origin(
    plan: Plan, comparison: Comparison, machine: Mapping[str, str], versions: Mapping[str, str]
) -> tuple[tuple[Table, ...], ...]:
    settings = plan.settings
    seeds = ", ".join(map(str, comparison.seeds[:12])) + (" …" if len(comparison.seeds) > 12 else "")
    made = {
        "plan": plan.digest[:16],
        "model": f"{shown(plan.model.class_name)}, {plan.model.parameters:,} parameters",
        "method": settings.method,
        "threshold": None if settings.threshold is None else f"{settings.threshold:g}",
        "loss": settings.loss,
        "window": settings.window,
        "candidates": ", ".join(settings.candidates) or None,
        "guidance": settings.guidance,
        "calibrated with": ", ".join(
            f"{name} {version}"
            for name, version in (("torch", settings.torch), ("diffusers", settings.diffusers))
            if version
        ),
        "seeds": seeds,
        "full side": comparison.backend_full,
    }
    columns = (
        (
            Table(
                "Plan and comparison", tuple((name, shown(value)) for name, value in made.items() if value), code=True
            ),
        ),
        (Table("Machine", _listed(machine)), Table("Versions", _listed(versions))),
    )
    return tuple(tuple(table for table in column if table.lines) for column in columns)


def _listed(values: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((shown(name), shown(value)) for name, value in values.items())


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def percent(share: float) -> str:
    """A share as ``41.3 %``."""
    return f"{100 * share:.1f}{_SPACE}%"


def seconds(value: float) -> str:
    """A time as ``1.23 s``, ``45.6 ms`` or ``2 min 05 s``."""
    if value >= 99.95:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes} min {rest:02}{_SPACE}s"
    if value >= 0.9995:
        return f"{value:.3g}{_SPACE}s"
    return f"{value * 1000:.3g}{_SPACE}ms"


def flops(value: float) -> str:
    """Operations as ``12.3 GFLOP``."""
    return _scaled(value, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def size(value: float) -> str:
    """Bytes as ``1.5 MiB``."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if value < (1000 if base == 1024 else 999.5):
            return f"{value:.3g}{_SPACE}{unit}"
        value /= base
    return f"{value:.3g}{_SPACE}{units[-1]}"
