"""Doing something as another user, which only root can arrange."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

STRANGER = 54321
"""A user's number that has no name."""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user or give files away")


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(dir="/tmp")).resolve()
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def as_stranger(function: Callable[[], Any], user: int = STRANGER) -> Any:
    """What ``function`` returns in a fork that belongs to ``user``; the exception it raises is raised here."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            os.umask(0o022)
            try:
                result = (function(), None)
            except BaseException as error:
                result = (None, error)
            with open(writing, "wb") as pipe:
                pickle.dump(result, pipe)
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    value, error = pickle.loads(content)
    if error is not None:
        raise error
    return value
