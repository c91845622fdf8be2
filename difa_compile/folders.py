"""Files: where the package keeps what it can make again, and writing them whole."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from difa_compile.errors import OutputError


def cache_folder() -> Path:
    """Where compiled kernels and measured profiles are kept: ``DIFA_CACHE_DIR``, else the user's cache folder."""
    told = os.environ.get("DIFA_CACHE_DIR")
    if told:
        return Path(told)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "difa_compile"


def write_whole(path: Path, text: str, what: str) -> None:
    """Write ``text`` to ``path``, whole or not at all: to a temporary name in the same folder, then renamed.

    Missing folders are made. ``what`` names it in messages. Raises :class:`OutputError`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(
            f"{what} cannot be written to {path}: {error.strerror or error}; give a file in a folder you may write to"
        ) from error
