"""The plan as a heat map: one row per site, one column per step, one colour per decision."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from difa_compile.decision import Decision, Kind, Window, heads_text
from difa_compile.plan.engines import CacheUse, EngineUse, engine_of_steps, engines_of, what_is_counted
from difa_compile.plan.plan import Cell, Plan, Trial
from difa_compile.plan.schedule import in_effect
from difa_compile.wording import shown

_LIGHT = {
    (Kind.FULL, False): "#d3d7de",
    (Kind.FULL, True): "#b5a2d4",
    (Kind.WINDOW_RESIDUAL, False): "#ecb765",
    (Kind.WINDOW_RESIDUAL, True): "#cb7444",
    (Kind.HEADS, False): "#e3d27a",
    (Kind.HEADS, True): "#b39a35",
    (Kind.WINDOW, False): "#85c2a0",
    (Kind.WINDOW, True): "#45936f",
    (Kind.REUSE, False): "#3d73b4",
    (Kind.REUSE, True): "#244a7a",
    (Kind.FORECAST, False): "#7cc4dd",
    (Kind.FORECAST, True): "#3c93b4",
}
_DARK = {
    (Kind.FULL, False): "#3b434f",
    (Kind.FULL, True): "#7463a0",
    (Kind.WINDOW_RESIDUAL, False): "#c08a3a",
    (Kind.WINDOW_RESIDUAL, True): "#d77f4c",
    (Kind.HEADS, False): "#8f8136",
    (Kind.HEADS, True): "#cdb955",
    (Kind.WINDOW, False): "#4f9a74",
    (Kind.WINDOW, True): "#7ccaa3",
    (Kind.REUSE, False): "#5b97de",
    (Kind.REUSE, True): "#9cc5f5",
    (Kind.FORECAST, False): "#2f7f99",
    (Kind.FORECAST, True): "#62b9d3",
}
_MEANING = {
    Kind.FULL: "The attention as the model computes it.",
    Kind.HEADS: "Groups of heads, each full, windowed or reused by itself; a cell tells which.",
    Kind.WINDOW: "Each image token sees only its neighbourhood; text sees and is seen by everything.",
    Kind.WINDOW_RESIDUAL: "Window attention plus what the window left out at the last full step.",
    Kind.REUSE: "The output of an earlier step; nothing is computed, not even the projections.",
    Kind.FORECAST: "What the outputs of the last computed steps lead to; nothing else is computed.",
}
_SHARED = " Only the conditional half of the batch is computed; the other half gets a copy."
_ORDER = (Kind.FULL, Kind.WINDOW_RESIDUAL, Kind.HEADS, Kind.WINDOW, Kind.FORECAST, Kind.REUSE)


@dataclass(frozen=True)
class Colour:
    """One decision in the legend: CSS class ``key``, its colour in light and dark mode, how many cells have it."""

    key: str
    name: str
    light: str
    dark: str
    shared: bool
    count: int
    meaning: str


@dataclass(frozen=True)
class MapCell:
    """CSS classes of a cell, and its explanation: lines, a candidate's line with tabs between its columns."""

    classes: str
    text: str


@dataclass(frozen=True)
class MapRow:
    """A site: short name, full path with sizes, one cell per step."""

    name: str
    title: str
    cells: tuple[MapCell, ...]


@dataclass(frozen=True)
class Engine:
    """An engine of an export: CSS class ``key``, its colour in light and dark mode, its number, and the cells of its
    line in the table."""

    key: str
    light: str
    dark: str
    number: int
    line: tuple[str, ...]


_ENGINE_HEADS = ("engine", "steps", "one call", "of the run", "caches read", "written", "at its sites")


@dataclass(frozen=True)
class HeatMap:
    """All that the template draws; ``tick``: every how many steps a column is numbered. ``run``: by step its engine."""

    intro: str
    colours: tuple[Colour, ...]
    steps: range
    tick: int
    rows: tuple[MapRow, ...]
    cell_height: int
    site_width: str
    engines: tuple[Engine, ...]
    engine_heads: tuple[str, ...]
    engines_note: str
    run: tuple[Engine, ...]


def heat_map(plan: Plan) -> HeatMap:
    """Lay out ``plan``; rows get lower as there are more sites, so that 57 sites still fit a screen."""
    names = _names(plan)
    colours = _colours(plan, names)
    keys = {colour.name: colour for colour in colours}
    paths = [shown(site.path) for site in plan.sites]
    common = _common_parts([path for path, site in zip(paths, plan.sites, strict=True) if not site.is_block])
    rows = []
    done = in_effect(plan.decisions, plan.blocks)
    for index, site in enumerate(plan.sites):
        cells = []
        for step in range(plan.steps):
            cell = plan.rows[step][index]
            colour = keys[names[done[step][index]]]
            classes = colour.key + (" shared" if colour.shared else "")
            covered = plan.roles[step][index].covered
            text = _covered_text(step, paths[index], done[step][index]) if covered else _text(step, paths[index], cell)
            cells.append(MapCell(classes, text))
        name = _span(site.blocks) if site.blocks else _short(paths[index], common)
        rows.append(MapRow(name, f"{paths[index]}: {site.shape}", tuple(cells)))
    longest = max(len(row.name) for row in rows)
    used = engines_of(plan)
    engines = tuple(_engine(number, each, len(used)) for number, each in enumerate(used))
    return HeatMap(
        intro=_intro(plan),
        colours=colours,
        steps=range(plan.steps),
        tick=1 if plan.steps <= 20 else 5 if plan.steps <= 60 else 10,
        rows=tuple(rows),
        cell_height=28 if len(rows) <= 12 else 18 if len(rows) <= 30 else 12,
        site_width=f"{min(28, longest) * 0.46 + 1.2:.1f}rem",
        engines=engines,
        engine_heads=_ENGINE_HEADS,
        engines_note=_engines_note(plan, len(engines)),
        run=tuple(engines[number] for number in engine_of_steps(used)),
    )


def _engine(number: int, use: EngineUse, count: int) -> Engine:
    line = (
        str(number),
        str(len(use.steps)),
        f"{100 * use.call:.1f}\u00a0%",
        f"{100 * use.share:.1f}\u00a0%",
        _caches(use.reads),
        _caches(use.writes),
        shown(str(use), 400),
    )
    hue = 360 * number / count + 210
    return Engine(f"e{number}", _hsl(hue, 0.82, 0.62), _hsl(hue, 0.33, 0.36), number, line)


def _hsl(hue: float, lightness: float, saturation: float) -> str:
    parts = colorsys.hls_to_rgb(hue % 360 / 360, lightness, saturation)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def _caches(use: CacheUse) -> str:
    """``3 (98k values)``, of one element of the batch."""
    if not use.caches:
        return "–"
    values = use.values
    size = f"{values / 1e6:.3g}M" if values >= 999_500 else f"{values / 1e3:.3g}k" if values >= 1000 else str(values)
    return f"{use.caches} ({size}\u00a0values)"


def _engines_note(plan: Plan, count: int) -> str:
    counted = what_is_counted(plan, plan.settings.guidance)
    return (
        f"Exported for its own steps the plan needs {count} engine{'s' if count > 1 else ''}, one for each distinct "
        "row; the last line of the map says which step runs which. With --max-engines there are fewer, which compute "
        "more. "
        "Operations of a call are a share of one in full; values of caches are those of one element of the batch."
        + (f" {counted[0].upper()}{counted[1:]}." if counted else "")
    )


def _intro(plan: Plan) -> str:
    settings = plan.settings
    attention = sum(not site.is_block for site in plan.sites)
    blocks = "" if attention == len(plan.sites) else f" and {len(plan.sites) - attention} of blocks"
    size = f"{attention} attention sites{blocks} (rows) at {plan.steps} sampling steps (columns)."
    if settings.method == "rule":
        return f"{size} Written by a rule: nothing was measured for it."
    if settings.method == "planned":
        promise = "" if settings.promise is None else f" {settings.promise}."
        return f"{size} Chosen under a limit, from one measurement.{promise}"
    limit = f", limit {settings.threshold:g} scaled with depth" if settings.threshold is not None else ""
    if settings.method == "weighed":
        choice = "candidate with the lowest sum of cost, as a share of full attention's, and of loss, as a share of"
    else:
        choice = "first candidate, in the order tried, whose loss stayed below"
    return (
        f"{size} Each cell is the {choice} the limit of its site "
        f"({shown(settings.loss or 'unnamed')} loss{limit}). Point at a cell, or go there with the arrow keys, for all "
        "losses."
    )


def _names(plan: Plan) -> Mapping[Decision, str]:
    """What the legend calls each decision: groups of heads by one name where there are several groupings."""
    found = {decision for row in plan.decisions for decision in row}
    names = {}
    for decision in found:
        alike = [other for other in found if other.groups and other.cfg_shared == decision.cfg_shared]
        several = bool(decision.groups) and len(alike) > 1
        names[decision] = f"heads(...){'+cfg' if decision.cfg_shared else ''}" if several else str(decision)
    return names


def _colours(plan: Plan, names: Mapping[Decision, str]) -> tuple[Colour, ...]:
    counts = Counter(names[decision] for row in in_effect(plan.decisions, plan.blocks) for decision in row)
    found = {names[decision]: decision for row in plan.decisions for decision in row}
    windows = sorted({decision.window for decision in names if decision.window is not None})
    ordered = sorted(found.values(), key=lambda d: (_ORDER.index(d.kind), d.window or Window("band", 1), names[d]))
    forecasts = list(dict.fromkeys((d.order, d.basis) for d in ordered if d.order))
    colours = []
    for number, decision in enumerate(ordered):
        shade = windows.index(decision.window) / len(windows) if decision.window is not None else 0.0
        if decision.order:
            shade = forecasts.index((decision.order, decision.basis)) / len(forecasts)
        family = (decision.kind, decision.cfg_shared)
        meaning = _MEANING[decision.kind] + (_SHARED if decision.cfg_shared else "")
        light, dark = _mix(_LIGHT[family], "#000000", 0.45 * shade), _mix(_DARK[family], "#ffffff", 0.45 * shade)
        name = names[decision]
        colours.append(Colour(f"d{number}", name, light, dark, decision.cfg_shared, counts[name], meaning))
    return tuple(colours)


def _mix(colour: str, other: str, share: float) -> str:
    pairs = [(int(colour[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(mine * (1 - share) + theirs * share):02x}" for mine, theirs in pairs)


def _text(step: int, path: str, cell: Cell) -> str:
    saved = (
        f"saves {100 * cell.flops_saved:.0f}\u00a0% of the attention FLOPs here"
        if cell.flops_saved
        else "saves nothing here"
    )
    lines = [f"step {step} · {path}", str(cell.decision), saved]
    lines += [f"{group.form}\theads {heads_text(group.heads)}" for group in cell.decision.groups]
    if cell.weights:
        lines.append("weights fitted\t" + ", ".join(f"{weight:.3g}" for weight in cell.weights) + ", the newest first")
    lines += [_trial(trial, cell.decision) for trial in cell.trials]
    if not cell.trials:
        lines[2] += "; no candidate was tried"
    return "\n".join(lines)


def _covered_text(step: int, path: str, decision: Decision) -> str:
    return f"step {step} · {path}\n{decision}, with the block that holds it\nnothing is computed here"


def _trial(trial: Trial, chosen: Decision) -> str:
    if trial.loss is None:
        return f"{trial.decision}\t{shown(trial.reason or 'does not apply', 400)}\t\tnot tried"
    if trial.decision == chosen:
        verdict = "chosen"
    elif trial.loss >= trial.threshold:
        verdict = "over the limit"
    else:
        verdict = "below" if trial.cost is None else "saves too little for it"
    cost = "" if trial.cost is None else f", takes {100 * trial.cost:.0f}\u00a0%"
    return f"{trial.decision}\tloss {trial.loss:.3g}\tlimit {trial.threshold:.3g}{cost}\t{verdict}"


def _common_parts(paths: list[str]) -> Mapping[str, str]:
    """The first and the last part of the paths where all of them share it: they add nothing to a row's name."""
    split = [path.split(".") for path in paths]
    common = {}
    if len(paths) > 1 and min(map(len, split)) > 2:
        if len({parts[0] for parts in split}) == 1:
            common["first"] = split[0][0]
        if len({parts[-1] for parts in split}) == 1:
            common["last"] = split[0][-1]
    return common


def _span(blocks: Sequence[str]) -> str:
    """A span's row: ``blocks 0 to 5`` for ``transformer_blocks.0`` and so on; else the first and the last of them."""
    first, last = (shown(path).split(".") for path in (blocks[0], blocks[-1]))
    if first[:-1] == last[:-1] and first[-1].isdigit() and last[-1].isdigit():
        return f"blocks {first[-1]} to {last[-1]}"
    return f"{'.'.join(first)} to {'.'.join(last)}"


def _short(path: str, common: Mapping[str, str]) -> str:
    """A row's name. With ``transformer_blocks.0.attn1``, ``.1.attn1``, ... that is ``block 0``, ``block 1``."""
    short = path
    if "last" in common:
        short = short.removesuffix("." + common["last"])
    if "first" in common:
        short = short.removeprefix(common["first"] + ".")
    return f"block {short}" if short.isdigit() else short
