"""Streams that are full, closed, narrow, or whose reader has gone: one line at most, never a traceback."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from typer.main import get_command

from difa_compile.cli import terminal
from difa_compile.cli.app import app
from tests.support.commands import WIDTH, run
from tests.support.places import ROOT
from tests.support.report_sample import make_plan


def ended(stdout, stderr, *arguments):
    """The exit code of a command with these streams, flushed as Python does at its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", stderr)
        patch.setenv("COLUMNS", str(WIDTH))
        with pytest.raises(SystemExit) as stop:
            get_command(app).main(list(map(str, arguments)), prog_name="difa")
        stdout.flush()
    return stop.value.code


def texts(encoding="utf-8"):
    """A stream in memory, as :func:`terminal.prepare_streams` leaves one."""
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="difa.plain", write_through=True)


def said(stream):
    return stream.buffer.getvalue().decode(stream.encoding)


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_output_onto_a_full_disk_is_one_line_and_a_failure(options, plan_file):
    errors = texts()
    with open("/dev/full", "w") as full:
        assert ended(full, errors, "inspect", plan_file, *options) == 1
    assert said(errors) == "difa: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_a_reader_that_goes_is_no_failure_to_speak_of(options, tmp_path):
    make_plan(50, 40).save(tmp_path / "plan.json")
    errors = texts()
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as gone:
        assert ended(gone, errors, "inspect", tmp_path / "plan.json", *options) == terminal.PIPE_CLOSED
    assert said(errors) == ""


def test_a_full_stderr_leaves_the_exit_code(plan_file):
    with open("/dev/full", "w") as full:
        assert ended(texts(), full, "inspect", "no/such/model") == 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_every_encoding_takes_what_is_printed(encoding, plan_file, kept):
    for arguments in (("inspect", plan_file), ("inspect", "日本/模型/×"), ("report", kept), ("--help",)):
        output, errors = texts(encoding), texts(encoding)
        ended(output, errors, *arguments)
        assert said(output) + said(errors)


def test_characters_that_an_encoding_lacks_become_near_ones():
    assert "1.54× – é…\u00a0→ 日 \udcff".encode("ascii", "difa.plain") == rb"1.54x - e... -> \u65e5 \udcff"


@pytest.mark.parametrize("columns", ["0", "1", "5", "20", "x", "-3", "1000000"])
def test_any_width_does(columns, plan_file):
    assert run("inspect", plan_file, COLUMNS=columns).exit_code == 0
    result = run("inspect", "no/such/model", COLUMNS=columns)
    assert result.exit_code == 1
    assert "Traceback" not in result.output


def test_closed_streams_are_opened(tmp_path):
    """What is opened next must not take the number of stderr, or warnings would end up inside it."""
    code = (
        "from difa_compile.cli.terminal import *; prepare_streams(); import sys\n"
        "out = sys.stdout = Watched(sys.stdout)\n"
        "with open('file', 'w') as file:\n"
        "    print('lost', file=sys.stderr, flush=True); file.write(str(file.fileno() > 2))\n"
        "print('lost'); sys.exit(finished(0, out))"
    )
    for closed in ("0<&-", "2>&-", "0<&- 2>&-"):
        shell = f'"{sys.executable}" -c "$code" > output {closed}'
        result = subprocess.run(
            ["bash", "-c", shell], cwd=tmp_path, env={**os.environ, "code": code, "PYTHONPATH": str(ROOT)}, check=False
        )
        assert result.returncode == 0
        assert (tmp_path / "file").read_text() == "True"
        assert (tmp_path / "output").read_text() == "lost\n"
    result = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "$code" 1>&-'],
        cwd=tmp_path,
        env={**os.environ, "code": code, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr == "lost\ndifa: the output cannot be written: Bad file descriptor\n"
