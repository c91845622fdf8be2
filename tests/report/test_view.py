"""What a page says: headlines, tables, skips, where it comes from."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from difa_compile.decision import FULL, REUSE
from difa_compile.plan.cost import contributions
from difa_compile.plan.data import Cell, SiteInfo
from difa_compile.report.view import flops, seconds, size
from tests.support.pages import write
from tests.support.report_sample import POINTS, make_comparison, make_plan


def test_headlines_state_what_was_measured(page, comparison):
    assert comparison.speedup == pytest.approx(1.62 / 1.05)
    assert "Speed-up over full attention 1.54×" in page.text
    assert f"Attention FLOPs computed {100 * comparison.with_projections.share:.0f} % of full" in page.text
    assert "Images against full, PSNR 33.9 dB" in page.text
    assert "Classifier agreement 95.7 %" in page.text


def test_a_slower_plan_is_called_slower(plan, comparison, tmp_path):
    slow = replace(comparison, planned=replace(comparison.planned, calls=(2.0, 2.0, 2.0)))
    text = write(tmp_path, plan, slow).text
    assert "Speed against full attention 0.81×" in text
    assert "Speed-up" not in text


def test_tables_hold_every_metric(page):
    for words in (
        "PSNR, worst – – 27.20 dB",
        "SSIM, mean – – 0.9720",
        "Fréchet distance – – 0.840",
        "to real images 5.310 5.620",
        "classifier reads the same – – 95.7 %",
        "classifier reads the class asked for 98.4 % 97.6 %",
        "first call, compilation included 31.2 s 48.7 s",
        "cache memory, at most 0 B 1.88 MiB",
    ):
        assert words in page.text


def test_origin_names_machine_versions_and_command(page, plan):
    for words in ("difa demo --steps 50", "A CPU @ 2.00 GHz", "2.13.0", plan.digest[:16], "window(band:32)+residual"):
        assert words in page.text


def test_summary_of_the_plan_is_there(page, plan):
    assert re.sub(r"\s+", " ", plan.summary().strip()) in page.text


def test_skip_is_listed_once_with_its_reason(plan, comparison, tmp_path):
    skips = [record for record in comparison.records if record.outcome == "skipped"]
    text = write(tmp_path, plan, comparison, records=[*comparison.records, *skips]).text
    assert text.count(skips[0].reason) == 1


def test_no_skips_is_said(plan, comparison, tmp_path):
    carried_out = [record for record in comparison.records if record.outcome != "skipped"]
    assert f"None: all {len(carried_out)} decisions" in write(tmp_path, plan, comparison, records=carried_out).text


def test_psnr_of_each_image(page, comparison):
    full, planned = comparison.images_full[1] / 255, comparison.images_planned[1] / 255
    expected = -10 * np.log10(((full - planned) ** 2).mean())
    assert f"digit 1 · seed 0, image 1 PSNR {expected:.1f} dB" in page.text
    assert "digit 0 · seed 0, image 0 equal" in page.text
    assert "digit 1 · seed 1, image 1" in page.text


def test_equal_images_are_said_to_be_equal(plan, comparison, tmp_path):
    quality = replace(comparison.quality, identical=20, psnr=None, psnr_worst=None)
    same = replace(comparison, images_planned=comparison.images_full, quality=quality)
    assert "all 20 images are equal to the last bit" in write(tmp_path, plan, same).text


def test_captions_must_fit(plan, comparison, tmp_path):
    with pytest.raises(ValueError, match="3 captions for 20 images"):
        write(tmp_path, plan, comparison, captions=["a", "b", "c"])
    assert list(tmp_path.iterdir()) == []


def test_without_a_judge_the_cache_stands_in_front(plan, comparison, tmp_path):
    bare = replace(
        comparison,
        quality=replace(
            comparison.quality,
            frechet=None,
            frechet_full=None,
            frechet_planned=None,
            judged_right_full=None,
            judged_right_planned=None,
            agreement=None,
        ),
    )
    text = write(tmp_path, plan, bare).text
    assert "Cache memory 1.88 MiB" in text
    assert "classifier" not in text.lower()


def test_other_step_count_than_the_plan_is_said(plan, tmp_path):
    made = replace(make_comparison(make_plan(20), images=10), plan_digest=plan.digest)
    assert "The plan was made for 50 steps and carried onto 20." in write(tmp_path, plan, made).text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (seconds(0.0316), "31.6 ms"),
        (seconds(0.9999), "1 s"),
        (seconds(1.234), "1.23 s"),
        (seconds(125), "2 min 05 s"),
        (flops(999.9e9), "1 TFLOP"),
        (flops(2.415e9), "2.42 GFLOP"),
        (flops(0), "0 FLOP"),
        (size(0), "0 B"),
        (size(1536), "1.5 KiB"),
        (size(1020 * 1024), "0.996 MiB"),
    ],
)
def test_numbers_are_written_with_three_digits(text, expected):
    assert text.replace("\u00a0", " ") == expected


def test_what_a_budget_buys_is_drawn_and_listed(plan, comparison, tmp_path):
    without = write(tmp_path / "without", plan, comparison)
    assert "What a budget buys" not in without.text
    page = write(tmp_path / "with", plan, comparison, front=POINTS)
    assert "What a budget buys" in page.text
    assert len(page.all("circle")) == sum(point.psnr is not None for point in POINTS)
    for words in (
        "budget 0.3 (this plan) 0.29 45.1 dB",
        "reuse every <4> (recipe) 0.34 31.2 dB",
        "DiTFastAttn (search by threshold) 0.71 28.4 dB",
        "budget 1 1.00 the same images",
    ):
        assert words in page.text
    assert "searches by threshold" in page.text
    planned = [point for point in POINTS if str(point.origin) != "search"]
    assert "searches by threshold" not in write(tmp_path / "planned", plan, comparison, front=planned).text
    same = [point for point in POINTS if point.psnr is None]
    assert "What a budget buys" not in write(tmp_path / "same", plan, comparison, front=same).text


def test_work_of_a_plan_of_blocks_is_that_of_the_blocks(plan, comparison, tmp_path):
    blocks = tuple(f"transformer_blocks.{index}" for index in range(6))
    span = SiteInfo("all", "block", 1, 384, 256, 384, None, 10**9, blocks)
    half = [Cell(FULL if step % 2 == 0 else REUSE) for step in range(plan.steps)]
    rows = tuple((*(Cell(FULL) for _ in row), cell) for row, cell in zip(plan.rows, half, strict=True))
    made = replace(plan, sites=(*plan.sites, span), rows=rows)
    assert "FLOPs of the blocks computed 50 % of full" in write(tmp_path, made, comparison).text
    other = replace(comparison, steps=plan.steps + 1)
    assert "FLOPs of the blocks computed" not in write(tmp_path, made, other).text


def test_what_each_decision_leaves_out(plan, page):
    assert "Operations left out, as a share of the full run's (of attention, projections counted in)" in page.text
    most = contributions(plan)[0]
    assert f"{most.decision} {most.cells} {100 * most.share:.1f} %" in page.text
