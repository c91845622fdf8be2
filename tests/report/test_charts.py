"""Charts of a page: bars as high as their numbers."""

from __future__ import annotations

import re

import pytest

from difa_compile.report.charts import nice_step, step_chart


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
