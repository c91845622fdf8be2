"""Writing files whole or not at all, and finding out beforehand whether that can be done."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from difa_compile.errors import OutputError
from difa_compile.wording import shown


def write_whole(path: Path, content: str | bytes, what: str) -> None:
    """Write ``content`` (text as UTF-8) to ``path``, whole or not at all; missing folders are made.

    It goes to a temporary name in the same folder and to the disk, and is then renamed: whoever reads ``path``, or
    loses power, finds the old file or the new one. A link is followed; a folder, device or pipe is refused, for
    renaming would replace it. ``what`` names it in messages. Raises :class:`OutputError`.
    """
    write_together({path: content}, what)


def write_together(contents: Mapping[Path, str | bytes], what: str) -> None:
    """:func:`write_whole` of files that belong together: all are on the disk before the first takes its name.

    They take their names in the order given.
    """
    fresh: dict[Path, tuple[Path, Path]] = {}  # by path: its temporary name and where it goes
    try:
        for path, content in contents.items():
            with _explained(what, path):
                data = content.encode() if isinstance(content, str) else content
                target = _target(path)
                target.parent.mkdir(parents=True, exist_ok=True)
                fresh[path] = _temporary(target.parent), target
                _write(fresh[path][0], data)
        for path, (temporary, target) in fresh.items():
            with _explained(what, path):
                os.replace(temporary, target)
        for folder in {target.parent for _, target in fresh.values()}:
            _flush_folder(folder)
    finally:
        for temporary, _ in fresh.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def open_whole(path: Path, what: str) -> Iterator[BinaryIO]:
    """A file to write into that takes the name ``path`` when the block is left, whole or not at all.

    For what does not fit into memory twice; else as :func:`write_whole`. The block does nothing but write. Raises
    :class:`OutputError`.
    """
    temporary = None
    try:
        with _explained(what, path):
            target = _target(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = _temporary(target.parent)
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            _flush_folder(target.parent)
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | Path, what: str) -> Iterator[Path]:
    """An empty folder to fill that takes the name ``path`` when the block is left, whole or not at all.

    It lies beside ``path``, where nothing may stand yet but an empty folder. Raises :class:`OutputError`.
    """
    path = Path(path)
    temporary = None
    try:
        check_new(path, what)
        with _explained(what, path):
            temporary = _temporary(path.absolute().parent)
            temporary.mkdir()
        yield temporary
        with _explained(what, path):
            _flush_folder(temporary)
            os.replace(temporary, path)
            _flush_folder(path.absolute().parent)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_new(path: str | Path, what: str) -> None:
    """Raise :class:`OutputError` if :func:`new_folder` could not make ``path``. No file is left behind."""
    path = Path(path)
    with _explained(what, path):
        if os.path.lexists(path):
            if path.is_symlink() or not path.is_dir() or any(path.iterdir()):
                raise ValueError("something stands there already; name a new folder")
        else:
            path.mkdir(parents=True)
            path.rmdir()
        _probe(path.absolute().parent)


def link_or_copy(source: Path, path: Path, what: str) -> None:
    """Let ``path`` be the same file as ``source``, or a copy where the file system has no second names for a file.

    For files that are never written into. Raises :class:`OutputError`.
    """
    with _explained(what, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, path, follow_symlinks=False)
            return
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EACCES):
                raise
        with source.open("rb") as given, path.open("xb") as file:
            shutil.copyfileobj(given, file, 2**20)
            file.flush()
            os.fsync(file.fileno())


def check_writable(folder: str | Path) -> Path:
    """Make ``folder`` and try it with a file that goes again, so that long work does not end in an error.

    Raises :class:`OutputError`.
    """
    folder = Path(folder)
    with _explained("files", folder):
        _probe(folder)
    return folder


def check_target(path: Path, what: str) -> None:
    """Raise :class:`OutputError` if :func:`write_whole` could not write ``path``. No file is left behind."""
    with _explained(what, path):
        _probe(_target(path).parent)


def kind_of(mode: int) -> str | None:
    """What a file's mode says it is, in words; None for a plain file."""
    if stat.S_ISREG(mode):
        return None
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "no plain file")


def _target(path: Path) -> Path:
    """Where ``path`` leads. Raises ``ValueError`` if something other than a file stands there."""
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    try:
        kind = kind_of(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):  # the latter is said when the folder is made
        return target
    if kind is not None:
        raise ValueError(f"{kind} stands there; give the name of a file")
    return target


def _temporary(folder: Path) -> Path:
    """A name that is not taken. It does not grow with the file's, which may be as long as the file system allows."""
    return folder / f".difa-{secrets.token_hex(6)}.tmp"


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _probe(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = _temporary(folder)
    try:
        _write(file, b"difa")  # something, for a full disk still takes empty files
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Have the new names written to the disk too, where the system can do that for folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _explained(what: str, path: Path) -> Iterator[None]:
    """What goes wrong inside as an :class:`OutputError` that says what, where and the remedy."""
    try:
        yield
    except OSError as error:
        reason = shown(error.strerror or error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"the disk is full ({reason}); free some space, or name a place on another disk"
        elif error.errno == errno.ENAMETOOLONG:
            reason += "; give a shorter name"
        else:
            reason += "; name a place in a folder you may write to"
        raise OutputError(f"{what} cannot be written to {shown(path)}: {reason}") from error
    except ValueError as error:  # not a file's name (a zero byte), or text that has no form in UTF-8
        raise OutputError(f"{what} cannot be written to {shown(path)}: {shown(error)}") from error
