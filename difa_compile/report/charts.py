"""Charts as inline SVG: bars, full behind and planned in front, one pair per step; a front, quality over time. Colours
come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 520.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 6.0, 12.0, 34.0


@dataclass(frozen=True)
class Chart:
    """A chart and the numbers it shows as text: ``heads`` and, under each, ``lines``. ``key``: CSS classes and what
    they stand for."""

    title: str
    svg: str
    note: str
    lines: tuple[tuple[str, str, str], ...]
    heads: tuple[str, str, str] = ("step", "full", "planned")
    key: tuple[tuple[str, str], ...] = ()


def step_chart(
    title: str, note: str, full: Sequence[float], planned: Sequence[float], form: Callable[[float], str]
) -> Chart:
    """Chart two series of non-negative numbers over the steps; ``form`` writes a number with its unit."""
    if not full or len(full) != len(planned):
        raise ValueError(f"{title}: {len(full)} and {len(planned)} numbers; give one of each for every step")
    lines = tuple((str(step), form(a), form(b)) for step, (a, b) in enumerate(zip(full, planned, strict=True)))
    return Chart(title, _svg(title, full, planned, form), note, lines)


def _svg(title: str, full: Sequence[float], planned: Sequence[float], form: Callable[[float], str]) -> str:
    unit = nice_step(max(*full, *planned) / 4)
    top = unit * max(1, math.ceil(max(*full, *planned) / unit - 1e-9))
    inner, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    slot = inner / len(full)

    def y(value: float) -> float:
        return _TOP + height * (1 - value / top)

    def bar(name: str, x: float, width: float, value: float) -> str:
        place = f'x="{x:.2f}" y="{y(value):.2f}" width="{width:.2f}" height="{y(0) - y(value):.2f}"'
        return f'<rect class="{name}" {place}/>'

    summary = f"{title}: full {form(sum(full))} in total, planned {form(sum(planned))}, over {len(full)} steps"
    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(summary)}">']
    for line in range(round(top / unit) + 1):
        at = y(line * unit)
        parts.append(f'<line class="grid" x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{at:.1f}" y2="{at:.1f}"/>')
        label = escape(form(line * unit)) if line else "0"
        parts.append(f'<text x="{_LEFT - 7:g}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    for step, (a, b) in enumerate(zip(full, planned, strict=True)):
        x = _LEFT + slot * step
        tip = escape(f"step {step}: full {form(a)}, planned {form(b)}")
        parts.append(
            f"<g><title>{tip}</title>"
            f'<rect fill="transparent" x="{x:.2f}" y="{_TOP:g}" width="{slot:.2f}" height="{height:g}"/>'
            f"{bar('full', x + slot * 0.08, slot * 0.84, a)}{bar('plan', x + slot * 0.24, slot * 0.52, b)}</g>"
        )
    every = max(1, int(nice_step(len(full) / 10)))
    parts += [
        f'<text x="{_LEFT + slot * (step + 0.5):.1f}" y="{_HEIGHT - 18:g}" text-anchor="middle">{step}</text>'
        for step in range(0, len(full), every)
    ]
    parts.append(
        f'<text x="{_LEFT + inner / 2:.1f}" y="{_HEIGHT - 2:g}" text-anchor="middle">sampling step</text></svg>'
    )
    return "".join(parts)


def nice_step(value: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, 50, ... (also below one) that is at least ``value``; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= value * (1 - 1e-9))


@dataclass(frozen=True)
class Mark:
    """A point of a front. ``kind``: its CSS class. ``share``: of the full model's time. ``decibels``: PSNR."""

    name: str
    kind: str
    share: float
    decibels: float


_MARKS = {"recipe": 4.0, "search": 5.0, "planner": 4.5, "plan": 7.0}
"""Radii by kind, in the order they are drawn."""
_LINE = 13.0
"""The height of a label."""


def front_chart(title: str, marks: Sequence[Mark], named: Sequence[str]) -> str:
    """An SVG of quality over time; marks of the kinds ``planner`` and ``plan`` are joined. ``named``: kinds whose marks
    are labelled, where there is room."""
    worst, best = (pick(m.decibels for m in marks) for pick in (min, max))
    unit = max(5.0, nice_step((best - worst) / 8))
    lowest = math.floor(worst / unit) * unit
    highest = max(lowest + unit, math.ceil(best / unit) * unit)
    furthest = max(0.2, *(m.share for m in marks))
    part = nice_step(furthest / 10)
    right = part * math.ceil(furthest / part - 1e-9)
    width, height = 720.0, 330.0
    inner, tall = width - _LEFT - 14, height - _TOP - 44

    def x(share: float) -> float:
        return _LEFT + inner * share / right

    def y(decibels: float) -> float:
        return _TOP + tall * (highest - decibels) / (highest - lowest)

    told = f"{title}: " + "; ".join(f"{m.name} {m.share:.2f} of the time {m.decibels:.1f} dB" for m in marks)
    parts = [f'<svg class="chart front" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(told)}">']
    for line in range(round((highest - lowest) / unit) + 1):
        level = lowest + line * unit
        at = y(level)
        parts.append(f'<line class="grid" x1="{_LEFT:g}" x2="{width - 14:g}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7:g}" y="{at + 4:.1f}" text-anchor="end">{level:g} dB</text>')
    for tick in range(round(right / part) + 1):
        place = f'x="{x(tick * part):.1f}" y="{height - 26:g}"'
        parts.append(f'<text {place} text-anchor="middle">{tick * part:.3g}</text>')
    middle = _LEFT + inner / 2
    parts.append(f'<text x="{middle:.1f}" y="{height - 6:g}" text-anchor="middle">share of full\'s time</text>')
    joined = sorted((m for m in marks if m.kind in ("planner", "plan")), key=lambda m: m.share)
    path = " ".join(f"{x(m.share):.1f},{y(m.decibels):.1f}" for m in joined)
    parts.append(f'<polyline class="joined" points="{path}"/>')
    drawn = sorted(marks, key=lambda m: list(_MARKS).index(m.kind))
    taken = [(x(m.share) - 6, y(m.decibels) - 6, 12.0, 12.0) for m in marks]
    for mark in drawn:
        place = f'cx="{x(mark.share):.1f}" cy="{y(mark.decibels):.1f}" r="{_MARKS[mark.kind]:g}"'
        tip = escape(f"{mark.name}: {mark.share:.2f} of the time, {mark.decibels:.1f} dB")
        parts.append(f'<circle class="{mark.kind}" {place}><title>{tip}</title></circle>')
    for mark in reversed(drawn):
        if mark.kind in named:
            parts += _label(mark, x(mark.share), y(mark.decibels), width, taken)
    return "".join([*parts, "</svg>"])


def _label(mark: Mark, x: float, y: float, width: float, taken: list[tuple[float, float, float, float]]) -> list[str]:
    """The mark's name beside it, where nothing stands yet: to the right, the left, above or below; else nothing."""
    long = 6.1 * len(mark.name)
    for left, top in ((x + 9, y - 7), (x - 9 - long, y - 7), (x + 5, y + 7), (x - 5 - long, y - 22), (x + 5, y - 22)):
        free = all(
            left > a + wide or left + long < a or top > b + high or top + _LINE < b for a, b, wide, high in taken
        )
        if free and left >= _LEFT and left + long <= width:
            taken.append((left, top, long, _LINE))
            return [f'<text class="{mark.kind}" x="{left:.1f}" y="{top + 10.5:.1f}">{escape(mark.name)}</text>']
    return []
