"""What stands between the commands and the terminal: closed, full and narrow streams. Standard library only.

A stream may be closed (``2>&-``), full (``> /dev/full``), a pipe whose reader has gone (``| head -1``), or take only
some characters (a Latin-1 or ASCII locale). None of these ends in a traceback.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
import tempfile
import traceback
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from difa_compile.wording import visible

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""

PIPE_CLOSED = 141
"""Exit code when the reader of our output has gone: 128 + SIGPIPE, as shells have it."""

_PLAIN = {"×": "x", "–": "-", "—": "-", "·": "-", "…": "...", "→": "->", "↔": "<->", "−": "-", "≤": "<=", "≥": ">="}


def plain(error: UnicodeError) -> tuple[str, int]:
    """For characters that an output's encoding lacks: the nearest in ASCII, else their escape (a codecs handler)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_nearest, error.object[error.start : error.end])), error.end


def _nearest(character: str) -> str:
    if character in _PLAIN:
        return _PLAIN[character]
    bare = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return bare or character.encode("ascii", "backslashreplace").decode()


codecs.register_error("difa.plain", plain)


def prepare_streams() -> None:
    """Open what is closed of the three standard streams, and make all characters writable.

    Left closed, the next file opened would take the stream's number, and what libraries say on stderr would go into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # Opening takes the lowest free number, this one. Not for writing: output that nobody gets is a failure.
            os.open(os.devnull, os.O_RDONLY if number < 2 else os.O_WRONLY)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="difa.plain")  # type: ignore[union-attr]


def said(text: str) -> None:
    """One line on stderr, as far as that can be written to."""
    with contextlib.suppress(OSError, ValueError):
        print(visible(text).replace("\n", " "), file=sys.stderr, flush=True)


class Watched:
    """A stream that remembers why it could not be written to: an ``OSError`` that arrives from afar does not say it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._noting():
            return self.stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        with self._noting():
            self.stream.writelines(lines)

    def flush(self) -> None:
        with self._noting():
            self.stream.flush()

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error
            raise


@contextlib.contextmanager
def watched_output() -> Iterator[Watched]:
    """Standard output as a :class:`Watched`, inside."""
    stream = sys.stdout
    watched = Watched(stream)
    sys.stdout = watched
    try:
        yield watched
    finally:
        sys.stdout = stream


def finished(code: int, output: Watched) -> int:
    """The exit code, given that of the command: also a failure if its output could not be written.

    A reader that has gone has what it wanted, so nothing is said; anything else is one line on stderr.
    """
    with contextlib.suppress(OSError, ValueError):  # noted, or closed by whoever runs us
        output.flush()
    failure = output.failure
    if failure is None:
        return code
    if not isinstance(failure, BrokenPipeError):
        said(f"difa: the output cannot be written: {failure.strerror or failure}")
    # Python writes the buffer out once more when it ends, and would complain.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        output.flush()
    return code or (PIPE_CLOSED if isinstance(failure, BrokenPipeError) else 1)


def keep_traceback(error: BaseException) -> str:
    """Write the traceback of an error that nobody expected to a file; its path. On stderr if there is no room."""
    text = "".join(traceback.format_exception(error))
    try:
        handle, path = tempfile.mkstemp(prefix="difa-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
        return "the lines above"
    return path
