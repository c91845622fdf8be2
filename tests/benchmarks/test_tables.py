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
