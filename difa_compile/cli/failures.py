"""How the command line fails: one panel on stderr and an exit code, a traceback only with ``--debug``.

Mistakes of the user's (``DifaError``, and what typer finds wrong in the arguments) are told as such. Anything else is a
mistake of ours or the model's: the panel says so, and the traceback is kept in a file, for the work of hours may have
gone before it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from typer.core import TyperGroup

from difa_compile.cli.terminal import INTERRUPTED, finished, keep_traceback, watched_output
from difa_compile.errors import DifaError, is_out_of_memory
from difa_compile.wording import shown, visible

LONGEST = 2000
"""Characters of a panel. Messages keep foreign text short; this is for those that do not."""

# typer had these of click's, and has had its own since it carries click inside; they are the same by name.
_ClickError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class Output(Console):
    """A console whose reader may go: what rich would make of that is left to whoever ends the command."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 - rich calls this while it handles the error


def make_console() -> Output:
    """What a command prints to."""
    return Output(highlight=False, emoji=False)  # a name with :smile: in it keeps that


def show_failure(title: str, message: str, hint: str = "") -> None:
    """Print one panel to stderr, if that can be written to; ``hint`` stands below the message."""
    text = visible(message)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}… ({len(text) - LONGEST:,} characters more)"
    body = Text(text)
    if hint:
        body.append(f"\n\n{visible(hint)}", style="dim")
    console = Console(stderr=True, highlight=False)
    with contextlib.suppress(OSError):
        console.print(Panel(body, title=Text(shown(title)), title_align="left", border_style="red", padding=(0, 1)))


def readable_name(error: BaseException) -> str:
    """``PlanDigestError`` as ``plan digest error``."""
    words = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in type(error).__name__)
    return words.strip()


class GuardedGroup(TyperGroup):
    """A command group that ends in an exit code whatever happens, and in one panel if that is not success."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command and end the process. With ``--debug`` errors are raised instead."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        arguments = list(sys.argv[1:] if args is None else args)
        context: Any = None
        with watched_output() as output:
            try:
                _check_characters(arguments)
                with self.make_context(prog_name or "difa", arguments, **extra) as context:
                    self.invoke(context)
                code = 0
            except BaseException as error:
                expected = isinstance(error, (typer.Exit, SystemExit, _ClickError))
                if not expected and context is not None and context.params.get("debug"):
                    raise
                command = (context and context.invoked_subcommand) or ""
                code = 0 if error is output.failure else _failed(error, command)  # that one is told at the end
            code = finished(code, output)
        sys.exit(code)


def _failed(error: BaseException, command: str) -> int:
    """Say what went wrong; the exit code."""
    if isinstance(error, (typer.Exit, SystemExit)):
        code = error.exit_code if isinstance(error, typer.Exit) else error.code
        return code if isinstance(code, int) else 0 if code is None else 1
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        show_failure("stopped", "Stopped by Ctrl-C.")
        return INTERRUPTED
    if isinstance(error, _ClickError):
        return _misused(error)
    if isinstance(error, DifaError):
        show_failure(readable_name(error), str(error), f"difa --debug {command} … shows where it was raised")
        return 1
    if is_out_of_memory(error):
        show_failure(
            "out of memory",
            f"The memory of this machine or device does not suffice: {shown(error)}\n"
            "Fewer or smaller images at once need less, a plan of fewer caches too.",
            f"difa --debug {command} … shows where",
        )
        return 1
    kept = keep_traceback(error)
    show_failure(
        "unexpected error",
        f"{type(error).__name__}: {shown(error, 500)}\n\n"
        "As far as can be told this is a mistake in difa-compile, in the model or in a library, not in what you typed. "
        f"The traceback is in {kept}; a report should have it.",
        f"difa --debug {command} … shows it here",
    )
    return 1


def _misused(error: Any) -> int:
    """Arguments that are none: what is wrong with them, and where the right ones are listed."""
    message = error.format_message()
    if message:  # none: no arguments at all, and the help has been shown
        path = error.ctx.command_path if getattr(error, "ctx", None) is not None else "difa"
        show_failure("usage error", _shortened(message), f"{path} --help lists the options")
    return int(error.exit_code)


def _shortened(message: str) -> str:
    """Typer repeats a bad value in full."""
    return shown(message, 600)


def _check_characters(arguments: Sequence[str]) -> None:
    """No argument that a file cannot be named by, or a message be made of."""
    for argument in arguments:
        if "\0" in argument:
            raise typer.BadParameter(f"the argument {shown(argument)} holds a NUL character; no name or value has one")


@contextmanager
def interruptible(what_is_kept: Callable[[], str]) -> Iterator[None]:
    """Around long work: Ctrl-C says what is kept and how to go on, and ends with :data:`INTERRUPTED`."""
    try:
        yield
    except KeyboardInterrupt:
        show_failure("stopped", f"Stopped by Ctrl-C. {what_is_kept()}")
        raise typer.Exit(INTERRUPTED) from None


def state_kept(state: Path) -> str:
    """What to say when a calibration that saves itself in ``state`` was interrupted."""
    if state.is_file():
        return f"What was measured so far is in {shown(state, 500)}; the same command goes on from there."
    return "Nothing was measured yet; the same command starts anew."
