"""Figures in the documents are those of the committed result files."""

from __future__ import annotations

import json

import pytest

from benchmarks import tables


@pytest.mark.parametrize("path", tables.DOCUMENTS, ids=lambda path: str(path.relative_to(tables.ROOT)))
def test_documents_show_the_committed_results(path):
    """Stale after a benchmark was run again: ``python -m benchmarks.tables``."""
    text = path.read_text()
    assert {match[2] for match in tables.SECTION.finditer(text)} == set(tables.DOCUMENTS[path])
    assert tables.filled(text, tables.DOCUMENTS[path]) == text


def result(*rows: dict[str, object]) -> str:
    return json.dumps(
        {
            "command": "python -m benchmarks.compile_time",
            "date": "2030-01-02T03:04:05+00:00",
            "commit": "0123456789abcdef",
            "machine": {"cores": 2, "cpu": "CPU"},
            "versions": {"torch": "2.13.0"},
            "rows": rows,
        }
    )


def test_a_section_is_replaced_whole_and_missing_values_are_dashes(tmp_path):
    row = {"case": "plain", "compile_seconds": 1.26, "ratio_to_inductor": 1.0, "distinct_rows": None}
    (tmp_path / "compile_time.json").write_text(result(row))
    text = "before\n<!-- table:compile_time -->\nold\n<!-- /table -->\nafter\n"
    once = tables.filled(text, tables.DETAILS, tmp_path)
    assert "| plain | – | 1.3 | 1.000 | – | – |" in once
    assert "old" not in once
    assert once.startswith("before\n<!-- table:compile_time -->\n")
    assert once.endswith("<!-- /table -->\nafter\n")
    assert tables.filled(once, tables.DETAILS, tmp_path) == once


def test_a_missing_result_is_said(tmp_path):
    text = tables.filled("<!-- table:compile_time -->\n3 s\n<!-- /table -->", tables.DETAILS, tmp_path)
    assert "Not measured yet: `python -m benchmarks.compile_time`" in text
    assert "3 s" not in text


def test_a_gain_sets_two_rows_of_one_result_against_each_other(tmp_path):
    gains = tables.Gains(
        (
            tables.Gain("one", "model", "plain", {"case": "plain"}, {"case": "planned", "batch": 2}),
            tables.Gain("other", "step", "processors", {"case": "p"}, {"case": "d"}, "ratio_to_processors"),
        )
    )
    text = "<!-- table:gains -->\n<!-- /table -->"
    plain, small = {"case": "plain", "seconds": 4.0}, {"case": "planned", "batch": 1, "seconds": 1.0}
    large = {"case": "planned", "batch": 2, "seconds": 2.0, "ratio_to_inductor": 0.4, "psnr_db": 33.33}
    (tmp_path / "one.json").write_text(result(plain, small, large))
    assert "*Not measured yet: `python -m benchmarks.other`.*" in tables.filled(text, {"gains": gains}, tmp_path)
    planned = {"case": "d", "seconds": 2.0, "ratio_to_processors": 0.5}
    (tmp_path / "other.json").write_text(result({"case": "p", "seconds": 3.0}, planned))
    filled = tables.filled(text, {"gains": gains}, tmp_path)
    assert "| model | plain | 4.00 | 2.00 | 2.50 | 33.3 | – |" in filled
    assert "| step | processors | 3.00 | 2.00 | 2.00 | – | – |" in filled
    assert "From `one`, `other`: torch 2.13.0, 2 cores of CPU." in filled


def test_aims_are_read_from_results(tmp_path):
    budgets = [
        {"budget": 0.5, "tool": "difa", "case": "ours", "psnr_db": 54.0, "judged_right": 0.97},
        {"budget": 0.5, "tool": "difa, weighed", "case": "weighed", "psnr_db": 60.0},
        {"budget": 0.5, "tool": "x", "case": "worse", "psnr_db": 40.0},
        {"budget": 0.5, "tool": "y", "case": "theirs", "psnr_db": 49.0, "ours_over_it_db": 2.5},
        {"budget": 0.2, "tool": "difa", "case": "quick", "psnr_db": 34.0, "judged_right": 0.97},
        {"budget": 0.2, "tool": "x", "case": "none is as quick"},
    ]
    (tmp_path / "planner_budgets.json").write_text(result(*budgets))
    (tmp_path / "planner.json").write_text(result({"case": "full"}))
    thresholds = [
        {"case": f"threshold {n}", "psnr_db": db, "attention_flops_share": share}
        for n, db, share in ((1, 40.0, 0.4), (2, 33.5, 0.3), (3, 30.0, 0.1))
    ]
    (tmp_path / "demo_end_to_end.json").write_text(result(*thresholds))
    text = "<!-- table:aims -->\n<!-- /table -->"
    filled = tables.filled(text, tables.DETAILS, tmp_path)
    for line in (
        "| dB over the best other tool within 0.5 of the time | 3 | 2.5 | 0.5 | theirs |",
        "| dB over the best other tool within 0.2 of the time | 3 | – | – | no other tool is as quick |",
        "| PSNR in dB within 0.5 of the time | 55 | 54 | 1 | ours |",
        "| PSNR in dB within 0.2 of the time | 33 | 34 | – | quick |",
        "| PSNR in dB within 0.3 of the time | 42 | – | – | none of ours is as quick |",
        "| judged right within 0.2 of the time | 0.98 | 0.97 | 0.01 | quick |",
        "| attention alone: its operations at 33 dB | 0.15 | 0.3 | 0.15 | threshold 2 |",
    ):
        assert line in filled
    assert "not measured yet: `python -m benchmarks.planning`" in filled
    (tmp_path / "planning.json").write_text(result({"case": "measure", "seconds": 9.0, "generations": 3.2}))
    filled = tables.filled(text, tables.DETAILS, tmp_path)
    assert "| measuring, generations | 5 | 3.2 | – | – |" in filled
    (tmp_path / "planner.json").unlink()
    assert "Not measured yet: `python -m benchmarks.planner`" in tables.filled(text, tables.DETAILS, tmp_path)


def test_a_gain_is_of_one_group(tmp_path):
    gains = tables.Gains((tables.Gain("one", "model", "plain", {"case": "plain"}, {"case": "planned"}),))
    rows = [{"case": "plain", "seconds": float(group), "group": group} for group in (1, 2)]
    (tmp_path / "one.json").write_text(
        result(*rows, {"case": "planned", "seconds": 1.0, "ratio_to_inductor": 0.5, "group": 2})
    )
    filled = tables.filled("<!-- table:gains -->\n<!-- /table -->", {"gains": gains}, tmp_path)
    assert "| model | plain | 2.00 | 1.00 | 2.00 | – | – |" in filled
