"""Charts of a page: bars as high as their numbers."""

from __future__ import annotations

import re

import pytest

from difa_compile.report.charts import Mark, front_chart, nice_step, step_chart


def test_chart_bars_are_as_high_as_the_numbers():
    made = step_chart("Time <ms>", "", [4.0, 4.0], [1.0, 2.0], lambda value: f"{value:g} ms")
    bars = re.findall(r'<rect class="(\w+)"[^>]* height="([\d.]+)"', made.svg)
    heights = [float(height) for _, height in bars]
    assert [name for name, _ in bars] == ["full", "plan"] * 2
    assert heights == pytest.approx([heights[0], heights[0] / 4, heights[0], heights[0] / 2], abs=0.02)
    assert "Time &lt;ms&gt;" in made.svg
    assert made.lines == (("0", "4 ms", "1 ms"), ("1", "4 ms", "2 ms"))


def test_chart_wants_pairs():
    with pytest.raises(ValueError, match="2 and 1 numbers"):
        step_chart("t", "", [1.0, 2.0], [1.0], str)


def test_chart_of_zeros():
    assert "NaN" not in step_chart("t", "", [0.0], [0.0], str).svg


@pytest.mark.parametrize(("value", "expected"), [(0, 1), (1, 1), (1.2, 2), (3, 5), (7, 10), (30, 50), (0.03, 0.05)])
def test_nice_step(value, expected):
    assert nice_step(value) == pytest.approx(expected)


MARKS = [
    Mark("reuse every 2", "recipe", 0.55, 31.0),
    Mark("budget 0.3", "plan", 0.3, 45.0),
    Mark("budget 0.5", "planner", 0.5, 52.5),
    Mark("a <search>", "search", 1.05, 28.0),
]


def test_front_puts_marks_by_time_and_quality():
    svg = front_chart("front", MARKS, ("plan", "search", "recipe"))
    found = {
        kind: (float(x), float(y))
        for kind, x, y in re.findall(r'<circle class="(\w+)" cx="([\d.]+)" cy="([\d.]+)"', svg)
    }
    assert found["plan"][0] < found["planner"][0] < found["recipe"][0] < found["search"][0]
    assert found["planner"][1] < found["plan"][1] < found["recipe"][1] < found["search"][1]
    per_share = (found["recipe"][0] - found["plan"][0]) / 0.25
    assert found["search"][0] - found["plan"][0] == pytest.approx(0.75 * per_share, rel=1e-3)
    assert svg.count("<polyline") == 1
    assert len(re.search(r'points="([^"]*)"', svg)[1].split()) == 2
    assert "a &lt;search&gt;" in svg
    assert "<search>" not in svg
    labels = re.findall(r'<text class="(\w+)"', svg)
    assert sorted(labels) == ["plan", "recipe", "search"]


def test_front_of_one_mark_and_marks_on_top_of_one_another():
    alone = front_chart("front", MARKS[1:2], ("plan",))
    assert alone.count("<circle") == 1
    crowd = front_chart("front", [MARKS[0]] * 9, ("recipe",))
    assert crowd.count("<circle") == 9
    assert 1 <= crowd.count('<text class="recipe"') <= 5
