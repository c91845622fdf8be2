"""The ``difa`` command. This module needs only the standard library, so that a missing typer is a clear message."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Entry point of the console script ``difa``."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"difa: the command line needs {' and '.join(missing)}, not installed here; "
            'run: pip install "difa-compile[report]"',
            file=sys.stderr,
        )
        raise SystemExit(1)
    from difa_compile.cli.app import app

    app(prog_name="difa")
