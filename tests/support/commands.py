"""Commands run as tests run them: at a width that breaks no line."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from difa_compile.cli.app import app

pytest.importorskip("diffusers")  # before streams are replaced, for its log keeps the stream that it begins with

WIDTH = 400


def run(*arguments, **env):
    """The result of ``difa ARGUMENTS``."""
    runner = CliRunner(env={"COLUMNS": str(WIDTH), "TERM": "dumb", "NO_COLOR": "1", **env})
    return runner.invoke(app, list(map(str, arguments)))


def refused(*arguments, code=None, **env):
    """What a command that fails says, as one line; its form is checked."""
    result = run(*arguments, **env)
    said = result.stderr
    assert result.exit_code in ((1, 2) if code is None else (code,)), (result.exit_code, result.output)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    assert "unexpected error" not in said, said
    assert said.count("╭") == 1
    assert said.count("╰") == 1
    assert all(character.isprintable() or character == "\n" for character in said)
    assert len(said) < 12 * WIDTH
    return re.sub(r"[\s│╭╮╰╯─]+", " ", said).strip()


def explode(error):
    """A function that raises ``error``, whatever it is given."""

    def load(*args):
        raise error

    return load


def fails(*arguments, code=1):
    """What the command, which fails, says on stderr: one panel, as one line."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    assert result.stderr.count("╭") == 1
    return re.sub(r"[\s│╭╮╰╯─]+", " ", result.stderr).strip()


class Loaded:
    """Stands in for a pipeline."""

    def to(self, device):
        return self
