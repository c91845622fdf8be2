"""What guards the reading of every file: what stands under a name, how large it is, and what its text holds."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from difa_compile.calibration.state import STATE, CalibrationState
from difa_compile.comparison.kept import TRIALS, read_trials
from difa_compile.demo.judge import load_judge
from difa_compile.errors import (
    CalibrationStateError,
    ComparisonFormatError,
    DifaError,
    ErrorTableError,
    ModelLoadError,
    PlanFormatError,
    ProfileError,
)
from difa_compile.files import documents
from difa_compile.files.documents import Format, open_plain, parse_json, read_at_most
from difa_compile.machine.profile import PROFILE, Profile
from difa_compile.plan.json_form import PLAN
from difa_compile.plan.plan import Plan
from difa_compile.planner.table import TABLE, ErrorTable
from difa_compile.report.stored import COMPARISON, StoredComparison

FORMATS = [PLAN, STATE, PROFILE, COMPARISON, TABLE, TRIALS]


def comparison_at(path: Path) -> StoredComparison:
    """The comparison whose ``comparison.json`` is what ``path`` is, under that name."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "comparison.json").symlink_to(path)
        return StoredComparison.load(folder)


READERS: dict[str, tuple[Callable[[Path], object], type[DifaError]]] = {
    "plan": (Plan.load, PlanFormatError),
    "state": (lambda path: CalibrationState.open(path, {}), CalibrationStateError),
    "profile": (Profile.load, ProfileError),
    "comparison": (comparison_at, ComparisonFormatError),
    "table": (ErrorTable.load, ErrorTableError),
    "trials": (read_trials, CalibrationStateError),
    "judge": (load_judge, ModelLoadError),
}


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def sock(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


def huge(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    return path


def binary(path: Path) -> Path:
    path.write_bytes(bytes(range(256)))
    return path


def empty(path: Path) -> Path:
    path.touch()
    return path


def deep(path: Path) -> Path:
    path.write_text("[" * 100_000)
    return path


def forbidden(path: Path) -> Path:
    path.touch()
    path.chmod(0)
    return path


PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a pipe nobody writes to": (pipe, "it is a pipe; save what comes out of it to a file"),
    "a device without end": (lambda path: Path("/dev/zero"), "it is a device"),
    "a device without content": (lambda path: Path("/dev/null"), "it is a device"),
    "a socket": (sock, "No such device or address"),
    "a folder": (folder, "it is a folder"),
    "a link to itself": (loop, "Too many levels of symbolic links"),
    "more than memory holds": (huge, "it is larger than"),
    "no text": (binary, "not text|cannot be read"),
    "nested": (deep, "nested too deeply|cannot be read"),
    "empty": (empty, "not valid JSON|cannot be read"),
    "a name that is too long": (lambda path: path.with_name("n" * 300), "File name too long"),
    "a name that holds a zero byte": (lambda path: path.with_name("a\0b"), "null byte"),
    "a name that is no text": (lambda path: path.with_name("a\ud800b"), "surrogates not allowed"),
    "a file below a file": (lambda path: Path(__file__) / "plan.json", "Not a directory"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", READERS)
def test_no_reader_waits_or_fails_for_another_reason_than_its_own(kind: str, place: str, tmp_path: Path) -> None:
    read, expected = READERS[kind]
    make, message = PLACES[place]
    path = make(tmp_path / "file")
    if kind == "comparison" and place in ("a name that holds a zero byte", "a name that is no text"):
        pytest.skip(reason="no link can point to such a name")
    if kind == "state" and place == "a file below a file":
        pytest.skip(reason="for a state this is a place that cannot be written: see its own tests")
    with pytest.raises(expected, match=message) as caught:
        read(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 800


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_may_not_be_read(kind: str, tmp_path: Path) -> None:
    read, expected = READERS[kind]
    with pytest.raises(expected, match="Permission denied"):
        read(forbidden(tmp_path / "file"))


def test_a_file_that_grows_while_it_is_read_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10))
    with open_plain(path, 10) as file:
        with path.open("ab") as more:
            more.write(bytes(10))
        with pytest.raises(OSError, match="larger than"):
            read_at_most(file, 10)


def test_standard_input_can_be_named_where_it_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with open_plain(f"/dev/fd/{descriptor}", 100) as file:
            assert read_at_most(file, 100) == b"content"
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
        ("[NaN]", "NaN.*must be finite"),
        ("[-Infinity]", "must be finite"),
        ("[1e999]", "must be finite"),
        ("[" + "1" * 400 + ".0]", "must be finite"),
        ("[0." + "1" * 5000 + "]", "must be finite, and of 400 characters"),
        ("[" + "1" * 61 + "]", "whole number of 61 characters"),
        ("[" + "1" * 5000 + "]", "whole number of 5000 characters"),
        ("[\u0661]", "Expecting value"),
        ("\ufeff[]", "BOM"),
    ],
)
def test_what_json_must_not_hold(text: str, message: str) -> None:
    for data in (text, text.encode()):
        with pytest.raises(ValueError, match=message):
            parse_json(data)


def test_documents_of_too_many_parts_are_refused_before_they_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_CONTAINERS", 100)
    monkeypatch.setattr(documents, "MOST_VALUES", 1000)
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was built"))
    for text in ("[" * 101, "[" + "1," * 1001):
        with pytest.raises(ValueError, match="more than 100 lists and objects"):
            parse_json(text)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("version", [0, 99, True, 1.0, 2.0, 3.0, "1", None, [], 10**40, "x" * 10_000, "\x1b"])
def test_other_versions_are_refused_before_anything_else(form: Format, version: object) -> None:
    text = json.dumps({form.version_key: version, "new": 1})
    with pytest.raises(form.other_version, match=f"this release reads version {form.version}") as caught:
        form.parse(text, "file")
    assert len(str(caught.value)) < 800
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_frame_is_read_back_and_guards_every_member(form: Format) -> None:
    content: dict[str, Any] = {key: {"value": [1, 0.1, "text"]} for key in form.keys}
    document = form.frame(content)
    fields = form.parse(json.dumps(document), "file")
    form.check_digest(fields, {key: fields[key] for key in form.keys}, "file")
    for key in form.keys:
        with pytest.raises(form.edited, match="changed after it was written"):
            form.check_digest(fields, {**content, key: 1}, "file")
        lacking = {name: value for name, value in document.items() if name != key}
        with pytest.raises(form.damaged, match=f"without the key '{key}'"):
            form.parse(json.dumps(lacking), "file")
    later = replace(form, version=form.version + 1)
    with pytest.raises(form.edited, match="changed after it was written"):
        later.check_digest(fields, content, "file")  # the version is guarded, too
