"""How commands fail: one panel and an exit code; a mistake of ours keeps its traceback."""

from __future__ import annotations

import re
import tempfile

import pytest
import torch
import typer
from typer.main import get_command

from difa_compile.cli import terminal
from difa_compile.cli.app import app
from difa_compile.cli.failures import interruptible, readable_name, state_kept
from difa_compile.errors import PlanFormatError
from tests.support.commands import WIDTH, explode, refused, run


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("difa_compile.plan.plan.Plan.load", explode(AssertionError("never [red]\x1b[2J" + "x" * 9000)))
    result = run("inspect", __file__)
    assert result.exit_code == 1
    assert "unexpected error" in result.stderr
    assert "AssertionError: never" in result.stderr
    assert r"[red]\x1b[2Jxxx" in result.stderr
    (file,) = tmp_path.iterdir()
    assert str(file) in result.stderr
    assert "raise error" in file.read_text()
    assert "Traceback" not in result.stderr
    assert len(result.stderr) < 12 * WIDTH


def test_a_traceback_that_cannot_be_kept_is_shown(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/difa")
    monkeypatch.setattr("difa_compile.plan.plan.Plan.load", explode(KeyError("never")))
    assert "Traceback (most recent call last)" in run("inspect", __file__).stderr


@pytest.mark.parametrize("option", [("--debug",), ()], ids=["option", "environment"])
@pytest.mark.parametrize("error", [KeyError("x"), PlanFormatError("x"), KeyboardInterrupt(), MemoryError()])
def test_debug_raises_whatever_it_is(error, option, monkeypatch):
    monkeypatch.setattr("difa_compile.plan.plan.Plan.load", explode(error))
    assert get_raised(*option, "inspect", __file__, DIFA_DEBUG="" if option else "1") is error


def get_raised(*arguments, **env):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        try:
            get_command(app).main(list(arguments), prog_name="difa")
        except BaseException as error:
            return error


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce] can't allocate memory")],
)
def test_a_lack_of_memory_is_no_mistake_of_ours(error, monkeypatch):
    monkeypatch.setattr("difa_compile.plan.plan.Plan.load", explode(error))
    assert refused("inspect", __file__, code=1).startswith("out of memory")


def test_an_error_that_says_too_much_is_cut(monkeypatch):
    monkeypatch.setattr("difa_compile.plan.plan.Plan.load", explode(PlanFormatError("\x1b[2J" + "y" * 100_000)))
    assert "characters more" in refused("inspect", __file__, code=1)


def test_ctrl_c_at_any_point_of_a_command(monkeypatch, plan_file):
    """Wherever it arrives: while options are read, files loaded, tables printed, the plan saved."""
    for place in (
        "difa_compile.plan.plan.Plan.load",
        "difa_compile.cli.app.print_plan",
        "difa_compile.plan.plan.Plan.summary",
        "difa_compile.cli.failures.GuardedGroup.make_context",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, explode(KeyboardInterrupt()))
            assert "Stopped by Ctrl-C" in refused("inspect", plan_file, code=130)


@pytest.mark.parametrize(
    ("error", "name"),
    [(PlanFormatError(), "plan format error"), (KeyError(), "key error"), (OSError(), "o s error")],
)
def test_names_of_errors_as_words(error, name):
    assert readable_name(error) == name


def test_an_interruption_says_what_is_kept(capsys, tmp_path):
    def interrupted(state):
        with pytest.raises(typer.Exit) as stop, interruptible(lambda: state_kept(state)):
            raise KeyboardInterrupt
        assert stop.value.exit_code == terminal.INTERRUPTED
        return re.sub(r"[\s│╭╮╰╯─]+", "", capsys.readouterr().err)

    state = tmp_path / "state.json"
    assert "Nothingwasmeasuredyet;thesamecommandstartsanew." in interrupted(state)
    state.touch()
    assert "Whatwasmeasuredsofarisin" in interrupted(state)
    with pytest.raises(ZeroDivisionError), interruptible(lambda: "nothing"):
        raise ZeroDivisionError
    assert capsys.readouterr().err == "", "nothing else is said"
