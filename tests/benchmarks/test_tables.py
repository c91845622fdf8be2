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


def test_a_section_is_replaced_whole_and_missing_values_are_dashes(tmp_path):
    result = {
        "command": "python -m benchmarks.compile_time",
        "date": "2030-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
        "machine": {"cores": 2, "cpu": "CPU"},
        "versions": {"torch": "2.13.0"},
        "rows": [{"case": "plain", "compile_seconds": 1.26, "ratio_to_inductor": 1.0, "distinct_rows": None}],
    }
    (tmp_path / "compile_time.json").write_text(json.dumps(result))
    text = "before\n<!-- table:compile_time -->\nold\n<!-- /table -->\nafter\n"
    once = tables.filled(text, tables.README, tmp_path)
    assert "| plain | – | 1.3 | 1.000 |" in once
    assert "old" not in once
    assert once.startswith("before\n<!-- table:compile_time -->\n")
    assert once.endswith("<!-- /table -->\nafter\n")
    assert tables.filled(once, tables.README, tmp_path) == once


def test_a_missing_result_is_said(tmp_path):
    text = tables.filled("<!-- table:compile_time -->\n3 s\n<!-- /table -->", tables.README, tmp_path)
    assert "Not measured yet: `python -m benchmarks.compile_time`" in text
    assert "3 s" not in text
