"""The README's picture is drawn from what ``difa demo`` leaves behind."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib")

from benchmarks import picture
from difa_compile.report.heatmap import heat_map
from difa_compile.report.stored import StoredComparison
from tests.support.report_sample import POINTS, make_comparison, make_plan


@pytest.fixture(scope="module")
def stored():
    plan = make_plan(steps=20, sites=3)
    return StoredComparison(plan, make_comparison(plan, images=20), "title", "difa demo", {}, {})


def test_it_shows_every_cell_the_legend_and_the_first_images(stored):
    figure = picture.picture(stored)
    panel, *images = figure.axes
    plan = heat_map(stored.plan)
    assert len(panel.patches) == 20 * 3
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [f"{colour.name}  {colour.count}" for colour in plan.colours]
    assert len(images) == 3 * picture.IMAGES
    full = stored.comparison.images_full[1].squeeze(-1) / 255
    assert abs(images[1].images[0].get_array() - full).max() < 1e-6


def test_it_shows_what_a_budget_buys_where_that_was_run(stored):
    figure = picture.picture(replace(stored, front=POINTS))
    panel, *images = figure.axes
    drawn = sorted(tuple(map(float, at)) for each in panel.collections for at in each.get_offsets())
    assert drawn == sorted((point.share, point.psnr) for point in POINTS if point.psnr is not None)
    assert list(panel.lines[0].get_xdata()) == [0.19, 0.29]
    assert "DiTFastAttn's search" in [text.get_text() for text in panel.get_legend().get_texts()]
    assert len(images) == 3 * picture.IMAGES


def test_the_same_comparison_gives_the_same_small_file(stored, tmp_path, monkeypatch):
    stored.save(tmp_path / "compared")
    target = tmp_path / "made" / "plan.png"
    written = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["picture", str(tmp_path / "compared"), "--output", str(target)])
        picture.main()
        written.append(target.read_bytes())
    assert written[0] == written[1]
    assert written[0].startswith(b"\x89PNG")
    assert len(written[0]) < 150_000
