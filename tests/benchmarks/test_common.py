"""The timing and result-file code that every benchmark shares."""

from __future__ import annotations

import json

import pytest

from benchmarks import _common
from benchmarks._common import Timing, command_line, interleave, table, write_result


def test_interleave_runs_every_case_once_a_round_and_rotates_the_start():
    calls = []
    timings = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, repeats=3, warmup=1)
    rounds = ["".join(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert len(rounds) == 4
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds[1:])) == 3
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratio_is_taken_within_rounds():
    """The machine is ten times slower in the second round: paired ratios do not see it, a ratio of medians might."""
    mine, theirs = Timing((1.0, 10.0, 1.0, 10.0)), Timing((2.0, 20.0, 2.0, 20.0))
    assert mine.ratio_to(theirs) == 0.5
    with pytest.raises(ValueError, match="zip"):
        mine.ratio_to(Timing((1.0,)))


def test_result_file_has_the_agreed_keys_and_is_whole_or_absent(tmp_path):
    path = write_result("x", [{"case": "a", "seconds": 0.5}, {"case": "b", "share": None}], folder=tmp_path)
    record = json.loads(path.read_text())
    assert list(record) == ["benchmark", "commit", "date", "machine", "versions", "command", "rows"]
    assert record["rows"][1] == {"case": "b", "share": None}
    assert record["command"].startswith("python -m benchmarks.x")
    assert record["machine"]["cores"] >= 1
    assert {"python", "torch", "difa-compile"} <= set(record["versions"])
    with pytest.raises(ValueError, match="JSON"):
        write_result("x", [{"seconds": float("nan")}], folder=tmp_path)
    assert json.loads(path.read_text()) == record
    assert list(tmp_path.iterdir()) == [path]
    other = json.loads(write_result("y", [{"a": 1}], folder=tmp_path, script="x").read_text())
    assert other["benchmark"] == "y"
    assert other["command"] == record["command"]


def test_the_folder_of_a_result_is_no_part_of_its_command():
    given = ["--repeats", "3", "--output", "/somewhere", "--eager"]
    assert command_line("benchmarks.x", given) == "python -m benchmarks.x --repeats 3 --eager"
    assert command_line("benchmarks.x", []) == "python -m benchmarks.x"


def test_table_has_a_column_for_every_key_of_any_row():
    assert table([{"a": 1}, {"b": 0.123456, "a": None}]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| 1 |  |",
        "|  | 0.1235 |",
    ]


def test_commit_is_none_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(_common, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert _common.commit() == "none"
