"""Plans as plain text for people: summaries, differences, and the map of sites by steps."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from difa_compile.decision import Decision, Kind
from difa_compile.machine.profile import Profile
from difa_compile.plan.cost import Costed, cost_breakdown
from difa_compile.plan.data import Cell, Difference, ModelInfo, Settings, SiteInfo, blocks_of
from difa_compile.plan.engines import engines_of, what_is_counted
from difa_compile.plan.schedule import Bucket, Promotion, Role, in_effect
from difa_compile.wording import shown


class PlanView(Costed, Protocol):
    """What is told of a plan."""

    @property
    def model(self) -> ModelInfo: ...
    @property
    def settings(self) -> Settings: ...
    @property
    def progress(self) -> tuple[float, ...]: ...
    @property
    def rows(self) -> tuple[tuple[Cell, ...], ...]: ...
    @property
    def decisions(self) -> tuple[tuple[Decision, ...], ...]: ...
    @property
    def buckets(self) -> tuple[Bucket, ...]: ...
    @property
    def digest(self) -> str: ...
    @property
    def steps(self) -> int: ...


class ResolvedView(Costed, Protocol):
    """What is told of a plan that was carried onto another schedule."""

    @property
    def plan(self) -> PlanView: ...
    @property
    def progress(self) -> tuple[float, ...]: ...
    @property
    def rows(self) -> tuple[tuple[Decision, ...], ...]: ...
    @property
    def buckets(self) -> tuple[Bucket, ...]: ...
    @property
    def promotions(self) -> tuple[Promotion, ...]: ...
    @property
    def goes_as_planned(self) -> bool: ...
    @property
    def steps(self) -> int: ...


_LETTERS = {
    Kind.FULL: "F",
    Kind.WINDOW: "W",
    Kind.WINDOW_RESIDUAL: "R",
    Kind.REUSE: ".",
    Kind.FORECAST: "P",
    Kind.HEADS: "H",
}
_SHARED = {
    Kind.FULL: "f",
    Kind.WINDOW: "w",
    Kind.WINDOW_RESIDUAL: "r",
    Kind.REUSE: ",",
    Kind.FORECAST: "p",
    Kind.HEADS: "h",
}
_PATH = 100  # characters of a site's path, and of other texts that stand in every line of a table
_SHAPES = 8  # different shapes of sites that are told
_GROUPINGS = 8  # different decisions by heads that are told one by one
_ENGINES = 24  # engines that are told one by one
_COVERED = "-"
_LEGEND = (
    "F full  W window  R window+residual  H by heads  . reuse  P forecast; f w r h , p the same with the CFG halves "
    "shared"
)


def letter(decision: Decision) -> str:
    """One character for a decision, as in the map: lower case (a comma for reuse) where the CFG halves are shared."""
    return (_SHARED if decision.cfg_shared else _LETTERS)[decision.kind]


def summary(plan: PlanView, profile: Profile | None = None) -> str:
    """The text of :meth:`Plan.summary`."""
    model, settings = plan.model, plan.settings
    made = [settings.method]
    if settings.threshold is not None:
        made.append(f"threshold {settings.threshold:g}")
    if settings.loss is not None:
        made.append(f"loss of the {settings.loss}")
    if settings.window is not None:
        made.append(f"window {shown(settings.window)}")
    half = "" if settings.conditional_half is None else f" (conditional half {settings.conditional_half})"
    made.append(f"guidance {settings.guidance}{half}")
    versions = (("torch", settings.torch), ("diffusers", settings.diffusers))
    made += [f"{name} {shown(version)}" for name, version in versions if version is not None]
    config = f"config {shown(model.config_digest[:12])}, {model.parameters:,} parameters"
    lines = [
        f"plan {plan.digest[:12]} for {shown(model.class_name)} ({config})",
        f"made: {', '.join(made)}",
    ]
    if settings.promise is not None:
        lines.append(str(settings.promise))
    if settings.candidates:
        lines.append(f"candidates: {shown(', '.join(settings.candidates), 1000)}")
    lines += [
        f"{plan.steps} steps, progress {plan.progress[0]:.3f} to {plan.progress[-1]:.3f}; {_sites(plan.sites)}",
        "",
    ]
    lines += _counts(in_effect(plan.decisions, blocks_of(plan.sites)))
    batch = 1 if settings.guidance == "none" else 2
    lines += ["", *cost_breakdown(plan, profile, batch).lines(), _distinct(len(plan.buckets), plan.steps)]
    lines += [text for text in (_fitted(plan.rows), _measured(plan.rows, plan.sites)) if text]
    lines += ["", *_engines(plan, settings.guidance)]
    return "\n".join([*lines, "", *_map(plan.roles, plan.sites)]) + "\n"


def resolved_summary(resolved: ResolvedView) -> str:
    """The text of :meth:`ResolvedPlan.summary`."""
    plan = resolved.plan
    lines = [
        f"plan {plan.digest[:12]} of {plan.steps} steps on a schedule of {resolved.steps}, progress "
        f"{resolved.progress[0]:.3f} to {resolved.progress[-1]:.3f}; {_sites(plan.sites)}",
        "",
        *_counts(in_effect(resolved.rows, blocks_of(plan.sites))),
        "",
        *cost_breakdown(resolved).lines(),
        _distinct(len(resolved.buckets), resolved.steps),
        f"promoted to full, because the step that fills the cache fell out: {len(resolved.promotions)}",
    ]
    if _fitted(plan.rows) and not resolved.goes_as_planned:
        lines.insert(-1, f"{_fitted(plan.rows)}, used on the plan's own schedule alone, so not here")
    lines += [
        f"  step {promotion.step}, {_path(plan.sites[promotion.site])}: {promotion.wanted}; {promotion.reason}"
        for promotion in resolved.promotions
    ]
    return "\n".join([*lines, "", *_map(resolved.roles, plan.sites)]) + "\n"


def difference(mine: PlanView, theirs: PlanView, differences: Sequence[Difference], weights: int) -> str:
    """The text of :meth:`Plan.diff_text`; ``weights``: how many forecasts have others."""
    lines = [f"plan {mine.digest[:12]} (mine) and plan {theirs.digest[:12]} (theirs)"]
    lines += _fields("model", mine.model.__dict__, theirs.model.__dict__)
    lines += _fields("settings", mine.settings.__dict__, theirs.settings.__dict__)
    lines += [
        f"site {_path(a)}: {a.shape} -> {b.shape}" for a, b in zip(mine.sites, theirs.sites, strict=True) if a != b
    ]
    if mine.progress != theirs.progress:
        first = next(step for step in range(mine.steps) if mine.progress[step] != theirs.progress[step])
        lines.append(f"progress differs from step {first} on: {mine.progress[first]:g} -> {theirs.progress[first]:g}")
    cells = mine.steps * len(mine.sites)
    lines.append(f"{len(differences)} of {cells} cells differ")
    if weights:
        lines.append(f"forecasts with other weights: {weights}")
    if not differences:
        return "\n".join(lines) + "\n"
    for name, a, b in zip(
        ("attention FLOPs", "with projections"),
        (cost_breakdown(mine).attention, cost_breakdown(mine).with_projections),
        (cost_breakdown(theirs).attention, cost_breakdown(theirs).with_projections),
        strict=True,
    ):
        lines.append(f"{name}: {100 * a.share:.1f} % -> {100 * b.share:.1f} % of full")
    changes = Counter((str(item.mine), str(item.theirs)) for item in differences)
    lines += ["", "changes, mine -> theirs"]
    lines += [
        f"{count:6}  {a} -> {b}" for (a, b), count in sorted(changes.items(), key=lambda item: (-item[1], item[0]))
    ]
    lines += ["", "where"]
    lines += _where(differences, mine.sites)
    return "\n".join(lines) + "\n"


def _fields(name: str, mine: dict[str, object], theirs: dict[str, object]) -> list[str]:
    return [
        f"{name}.{key}: {shown(value)} -> {shown(theirs[key])}" for key, value in mine.items() if value != theirs[key]
    ]


def _where(differences: Sequence[Difference], sites: Sequence[SiteInfo]) -> list[str]:
    """One line per site and change, with its steps as ranges."""
    steps: dict[tuple[int, str], list[int]] = {}
    for item in differences:
        steps.setdefault((item.site, f"{item.mine} -> {item.theirs}"), []).append(item.step)
    width = max(len(_path(sites[site])) for site in {item.site for item in differences})
    return [
        f"  {_path(sites[site]):<{width}}  steps {_ranges(at)}: {change}"
        for (site, change), at in sorted(steps.items())
    ]


def _ranges(steps: Sequence[int]) -> str:
    """``[1, 2, 3, 7]`` as ``1-3, 7``."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1].append(step)
        else:
            parts.append([step])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _sites(sites: Sequence[SiteInfo]) -> str:
    """``6 sites, self, 6 heads x 64, ...``, or one entry per distinct shape."""
    shapes = Counter(site.shape for site in sites)
    count = f"{len(sites)} site" + ("s" if len(sites) > 1 else "")
    if len(shapes) == 1:
        return f"{count}, {next(iter(shapes))}"
    told = [f"{number} x ({shape})" for shape, number in list(shapes.items())[:_SHAPES]]
    more = [f"and {len(shapes) - len(told)} other shapes"] if len(shapes) > len(told) else []
    return f"{count}: " + "; ".join(told + more)


def _path(site: SiteInfo) -> str:
    return shown(site.path, _PATH)


def _counts(rows: Iterable[Sequence[Decision]]) -> list[str]:
    """A table of decisions, most frequent first; those by heads together where they are many."""
    found = Counter(decision for row in rows for decision in row)
    total = found.total()
    groupings = sum(bool(decision.groups) for decision in found)
    counts: Counter[tuple[str, str]] = Counter()
    for decision, count in found.items():
        several = f"heads(...){'+cfg' if decision.cfg_shared else ''}"
        name = several if decision.groups and groupings > _GROUPINGS else str(decision)
        counts[letter(decision), name] += count
    width = max(len("decision"), *(len(name) for _, name in counts))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0][1]))
    return [f"   {'decision':<{width}}  cells   share"] + [
        f"{mark}  {name:<{width}}  {count:5}  {100 * count / total:5.1f} %" for (mark, name), count in ordered
    ]


def _distinct(variants: int, steps: int) -> str:
    return f"distinct rows: {variants} of {steps} (each is one variant of the graph, one engine of an export)"


def _engines(plan: PlanView, guidance: str) -> list[str]:
    """A table of the engines that an export needs."""
    engines = engines_of(plan)
    lines = ["   engine  steps  one call  of the run   reads  writes  at its sites"]
    for number, each in enumerate(engines[:_ENGINES]):
        shares = f"{100 * each.call:6.1f} %  {100 * each.share:8.1f} %"
        caches = f"{each.reads.caches:>6}  {each.writes.caches:>6}"
        lines.append(f"{engine_letter(number)}  {number:>6}  {len(each.steps):>5}  {shares}  {caches}  {each}")
    if len(engines) > _ENGINES:
        rest = engines[_ENGINES:]
        lines.append(f"   and {len(rest)} more for {sum(len(each.steps) for each in rest)} steps")
    counted = what_is_counted(plan, guidance)
    return [*lines, *([counted] if counted else [])]


def engine_letter(number: int) -> str:
    """One character for an engine in the map, by its number: a digit, then letters, then ``*`` for all others."""
    names = string.digits + string.ascii_lowercase + string.ascii_uppercase
    return names[number] if number < len(names) else "*"


def _fitted(rows: Sequence[Sequence[Cell]]) -> str:
    """Of how many forecasts the weights were fitted; nothing where of none."""
    forecasts = [cell for row in rows for cell in row if cell.decision.order]
    count = sum(bool(cell.weights) for cell in forecasts)
    return f"weights fitted: of {count} of {len(forecasts)} forecasts" if count else ""


def _measured(rows: Sequence[Sequence[Cell]], sites: Sequence[SiteInfo]) -> str | None:
    """How many candidates were measured, and the largest loss that was accepted."""
    trials = sum(trial.loss is not None for row in rows for cell in row for trial in cell.trials)
    chosen = [
        (trial.loss, step, site)
        for step, row in enumerate(rows)
        for site, cell in enumerate(row)
        for trial in cell.trials
        if trial.loss is not None and trial.decision == cell.decision
    ]
    if not trials:
        return None
    text = f"candidates measured: {trials}"
    if chosen:
        loss, step, site = max(chosen)
        text += f", accepted: {len(chosen)}, largest accepted loss {loss:.4g} (step {step}, {_path(sites[site])})"
    return text


def _map(roles: Sequence[tuple[Role, ...]], sites: Sequence[SiteInfo]) -> list[str]:
    """One line per site, one character per step, under a ruler that marks every tenth step; then each step's engine."""
    paths = [_path(site) for site in sites]
    width = max(len("engine"), *map(len, paths))
    ruler = "".join(f"{step:<10}" for step in range(0, len(roles), 10)).rstrip()
    lines = [f"{'step':<{width}}  {ruler}"]
    for index, path in enumerate(paths):
        line = "".join(_COVERED if row[index].covered else letter(row[index].decision) for row in roles)
        lines.append(f"{path:<{width}}  {line}")
    covered = any(role.covered for row in roles for role in row)
    of = {row: number for number, row in enumerate(dict.fromkeys(roles))}
    lines.append(f"{'engine':<{width}}  {''.join(engine_letter(of[row]) for row in roles)}")
    return [*lines, _LEGEND + (f"  {_COVERED} its block is left out" if covered else "")]
