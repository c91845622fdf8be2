"""Bar charts as inline SVG: full behind, planned in front, one pair per step. Colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 520.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 6.0, 12.0, 34.0


@dataclass(frozen=True)
class Chart:
    """A chart and the numbers it shows as text, (step, full, planned) each."""

    title: str
    svg: str
    note: str
    lines: tuple[tuple[str, str, str], ...]


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
