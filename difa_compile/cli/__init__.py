"""The ``difa`` command. This module needs only the standard library, so that a missing typer is a clear message."""

from __future__ import annotations

import importlib.util
import os
import signal


def main() -> None:
    """Entry point of the console script ``difa``. Ends the process in any case."""
    stoppable = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if stoppable:  # not where the shell has it ignored, as for jobs in the background
        signal.signal(signal.SIGINT, _stop)
    from difa_compile.cli.terminal import keep_traceback, prepare_streams, said

    prepare_streams()
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        said(
            f"difa: the command line needs {' and '.join(missing)}, not installed here; "
            'run: pip install "difa-compile[report]"'
        )
        raise SystemExit(1)
    try:
        from typer.main import get_command

        from difa_compile.cli.app import app

        command = get_command(app)
    except Exception as error:  # a broken installation of torch, say
        kept = keep_traceback(error)
        said(f"difa: cannot start: {type(error).__name__}: {error}; the traceback is in {kept}")
        raise SystemExit(1) from None
    try:
        if stoppable:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command.main(prog_name="difa")
    except KeyboardInterrupt:
        _stop()


def _stop(*_: object) -> None:
    """End at once: importing torch takes seconds, there is nothing to save yet, and imports may swallow exceptions."""
    try:
        os.write(2, b"difa: stopped by Ctrl-C\n")
    finally:
        os._exit(130)  # 128 + SIGINT, as shells have it
