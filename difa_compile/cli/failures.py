"""How the command line fails: one panel on stderr and an exit code, a traceback only with ``--debug``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from typer.core import TyperGroup

from difa_compile.errors import DifaError

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""


def show_failure(title: str, message: str, hint: str = "") -> None:
    """Print one panel to stderr; ``hint`` stands below the message."""
    body = Text(message)
    if hint:
        body.append(f"\n\n{hint}", style="dim")
    console = Console(stderr=True, highlight=False)
    console.print(Panel(body, title=Text(title), title_align="left", border_style="red", padding=(0, 1)))


def readable_name(error: BaseException) -> str:
    """``PlanDigestError`` as ``plan digest error``."""
    words = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in type(error).__name__)
    return words.strip()


class GuardedGroup(TyperGroup):
    """A command group whose commands end in a panel and an exit code when they fail for a known reason."""

    def invoke(self, ctx: Any) -> Any:
        debug = bool(ctx.params.get("debug"))
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if debug:
                raise
            show_failure("stopped", "Stopped by Ctrl-C.")
            raise typer.Exit(INTERRUPTED) from None
        except DifaError as error:
            if debug:
                raise
            command = ctx.invoked_subcommand or ""
            show_failure(readable_name(error), str(error), f"difa --debug {command} … shows where it was raised")
            raise typer.Exit(1) from None


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
        return f"What was measured so far is in {state}; the same command goes on from there."
    return "Nothing was measured yet; the same command starts anew."
