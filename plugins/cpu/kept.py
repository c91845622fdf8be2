"""Compiled libraries in a folder: named by their content, checked before they are handed out, written whole.

A name is ``local_attention-RECIPE-COMPILER-CONTENT.so``: digests of what the library is made from, of the compiler that
made it, and of its own bytes. A file whose bytes have another digest is damaged or something else, so nothing has to be
kept beside it, and one rename puts a library in place or leaves what was there.

Loading a damaged library ends the process (a truncated one by SIGBUS), which no caller can catch; hence the
check. What happens between the check and the load is up to those who may write to the folder, which others may not
(:mod:`difa_compile.files.trust`); who runs this package replaces files and never writes into them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from difa_compile.errors import KernelBuildError
from difa_compile.files.trust import why_untrusted

PREFIX = "local_attention-"
WORK_PREFIX = ".building-"
UNUSED_DAYS = 180
"""A library that nobody loaded for so long is deleted when another one is built."""
ABANDONED_DAYS = 1
"""Work of another machine, whose processes are not seen here, is taken for abandoned after so long."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_log = logging.getLogger("difa_compile")
_one_thread = threading.Lock()


@dataclass(frozen=True)
class Found:
    """The library that may be loaded, if there is one, and what is wrong with others of the same recipe."""

    library: Path | None
    wrong: dict[Path, str]


def find(folder: Path, recipe: str, compiler: str | None) -> Found:
    """The newest library of a recipe that is what its name says, made by ``compiler`` (by any if None)."""
    wrong: dict[Path, str] = {}
    prefix = f"{PREFIX}{recipe}-" + (f"{compiler}-" if compiler else "")
    files = [file for file in folder.iterdir() if file.name.startswith(prefix) and file.suffix == ".so"]
    for file in sorted(files, key=_age):
        reason = why_wrong(file)
        if reason is None:
            with suppress(OSError):  # a folder that can only be read
                os.utime(file)
            return Found(file, wrong)
        wrong[file] = reason
    return Found(None, wrong)


def why_wrong(file: Path) -> str | None:
    """Why a library is not to be loaded, as what follows its name in a sentence, else None.

    Owner, kind and content are those of one open file, whatever becomes of the name meanwhile.
    """
    try:
        # Without O_NONBLOCK a pipe of that name would be waited for.
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return "is a symbolic link" if error.errno == errno.ELOOP else f"cannot be read ({error.strerror})"
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return "is not a file"
        reason = why_untrusted(status)
        if reason is not None:
            return reason
        with open(descriptor, "rb", closefd=False) as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    finally:
        os.close(descriptor)
    return None if file.stem.rpartition("-")[2] == content else "is damaged: its content is not that of its name"


def keep(built: Path, folder: Path, recipe: str, compiler: str) -> Path:
    """Move a library that was built on the same disk to its name in ``folder``, on the disk before it has the name."""
    with open(built, "rb+") as opened:
        os.fchmod(opened.fileno(), 0o700)
        content = hashlib.file_digest(opened, "sha256").hexdigest()
        os.fsync(opened.fileno())
    library = folder / f"{PREFIX}{recipe}-{compiler}-{content}.so"
    if library.is_dir() and not library.is_symlink():
        discard(library)
    os.replace(built, library)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some file systems cannot do that with folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return library


def why_no_library(file: Path, symbol: bytes) -> str | None:
    """Why what a compiler left is not a whole library that names ``symbol``, else None."""
    content = file.read_bytes() if file.is_file() else b""
    if not content:
        return "is empty or missing"
    if len(content) < 64 or content[:5] != b"\x7fELF\x02":
        return "is not a library of 64 bits"
    order = "<" if content[5] == 1 else ">"
    (sections,) = struct.unpack_from(f"{order}Q", content, 0x28)
    size, count = struct.unpack_from(f"{order}HH", content, 0x3A)
    if sections + size * count > len(content):  # the table of sections is the last thing in a library
        return "is cut off"
    return None if symbol in content else f"does not hold {symbol.decode()}"


@contextmanager
def locked(folder: Path, seconds: float) -> Iterator[bool]:
    """Only one thread of one process builds in a folder at a time; gives False where the file system has no locks.

    A process that ends, in whatever way, lets go of it. Raises :class:`KernelBuildError` after so many seconds.
    """
    path = folder / f"{PREFIX}building.lock"
    until = time.monotonic() + seconds
    with _one_thread:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with suppress(PermissionError):  # root's file
                os.fchmod(descriptor, 0o600)
            yield _lock(descriptor, path, until, seconds)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, path: Path, until: float, seconds: float) -> bool:
    told = False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not shared with forks, unlike flock
            return True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        if not told:
            _log.info("another process compiles the CPU kernel of local attention; waiting for it")
            told = True
        if time.monotonic() > until:
            raise KernelBuildError(
                f"another process has been compiling the CPU kernel of local attention for over {seconds:g} s and "
                f"holds {path}; end it (fuser {path} names it), or set DIFA_CACHE_DIR to another folder"
            )
        time.sleep(0.1)


@contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """A folder on the same disk as ``folder``, gone afterwards."""
    work = Path(tempfile.mkdtemp(prefix=f"{WORK_PREFIX}{_machine()}-", dir=folder))
    try:
        work.chmod(0o700)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def sweep(folder: Path, have_lock: bool) -> None:
    """Delete what processes that were killed left behind, and libraries that nobody uses any more.

    Who holds the lock is the only one that builds, at least on this machine: some network disks lock on each machine
    alone.
    """
    for entry in folder.iterdir():
        days = _age(entry) / 86400
        if entry.name.startswith(WORK_PREFIX):
            ours = have_lock and entry.name.startswith(f"{WORK_PREFIX}{_machine()}-")
            if ours or days > ABANDONED_DAYS:
                discard(entry)
        elif entry.name.startswith(PREFIX) and entry.suffix == ".so" and days > UNUSED_DAYS:
            discard(entry)


def discard(path: Path) -> None:
    """Delete whatever it is, if that is possible."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _age(path: Path) -> float:
    """Seconds since it was written or last used."""
    try:
        return time.time() - path.lstat().st_mtime
    except OSError:
        return 0.0
