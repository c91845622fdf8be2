"""Where the package keeps what it can make again: compiled kernels, measured profiles, calibrations begun."""

from __future__ import annotations

import atexit
import os
import pwd
import shutil
import stat
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

from difa_compile.errors import CacheFolderError
from difa_compile.files.trust import REMEDY, make_private, why_untrusted, why_untrusted_folder


def cache_folder() -> Path:
    """Where compiled kernels, measured profiles and states are kept: ``DIFA_CACHE_DIR``, else the user's cache folder.

    An absolute path. A relative ``DIFA_CACHE_DIR`` starts at the current folder, ``~`` in it is the home; a relative
    ``XDG_CACHE_HOME`` is ignored, as its specification has it. A user without a home that can be written to gets
    :func:`private_folder`, with a warning. The folder is made, for this user alone, where that is possible; what
    writes to it says if it is not. Raises :class:`CacheFolderError` for a ``~`` that stands for no folder.
    """
    told = os.environ.get("DIFA_CACHE_DIR", "")
    if told.strip():
        folder = _expanded(Path(told)).absolute()
        with suppress(OSError):
            make_private(folder)
        return folder
    base = _users_cache()
    if base is None:
        return private_folder("this user has no home folder")
    folder = base / "difa_compile"
    try:
        make_private(folder)
        os.listdir(folder)
    except OSError as error:
        return private_folder(f"{folder} cannot be used ({error.strerror or error})")
    return folder


def code_folder() -> Path:
    """The cache folder, with no symbolic links in its path, if nobody else can change it and this user can read it,
    else :func:`private_folder`.

    Raises :class:`CacheFolderError` if there is none that others cannot change, ``OSError`` if the cache folder cannot
    be made.
    """
    folder = cache_folder()
    make_private(folder)
    folder = folder.resolve()
    reason = why_untrusted_folder(folder)
    if reason is not None:
        return private_code_folder(f"code is not loaded from the cache: {reason}")
    if not os.access(folder, os.R_OK | os.X_OK):
        return private_code_folder(f"{folder} cannot be read")
    return folder


def private_code_folder(reason: str) -> Path:
    """:func:`private_folder`, which here must be one that nobody else can change: else :class:`CacheFolderError`."""
    folder = _private_folder(reason).resolve()
    untrusted = why_untrusted_folder(folder)
    if untrusted is not None:
        raise CacheFolderError(f"{reason}; and the temporary folder is no safer: {untrusted}")
    _warn_once(reason, folder)
    return folder


def private_folder(reason: str) -> Path:
    """A folder under the temporary one that only this user can read, with a warning that names it and the ``reason``.

    It is kept for later processes, unless somebody else has taken its name: then it goes when the process ends. Raises
    :class:`CacheFolderError` if none can be made.
    """
    folder = _private_folder(reason)
    _warn_once(reason, folder)
    return folder


def _private_folder(reason: str) -> Path:
    try:
        folder = Path(tempfile.gettempdir()).absolute() / f"difa_compile-{os.geteuid()}"
        with suppress(OSError):
            make_private(folder)
        return folder if _is_own(folder) else _folder_of_this_process()
    except OSError as error:
        raise CacheFolderError(f"{reason}, and no temporary folder can be made ({error}); {REMEDY}") from error


@cache
def _warn_once(reason: str, folder: Path) -> None:
    """Once per process, even where the record of warnings is emptied meanwhile, as torch does."""
    warnings.warn(f"{reason}; {folder} is used instead. DIFA_CACHE_DIR sets the folder", stacklevel=4)


def _users_cache() -> Path | None:
    """``XDG_CACHE_HOME``, else ``~/.cache``; None for a user without a home."""
    told = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(told):
        return Path(told)
    home = _home()
    return None if home is None else home / ".cache"


def _home() -> Path | None:
    """``HOME`` if it is a whole path, else what the system has of this user; None if it has nothing."""
    told = os.environ.get("HOME", "")
    try:
        home = told if os.path.isabs(told) else pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return None
    return Path(home) if os.path.isabs(home) else None


def _expanded(folder: Path) -> Path:
    """``folder`` with the home of this or another user in place of a ``~`` at its start."""
    first, *rest = folder.parts or (".",)
    if first.startswith("~"):
        try:
            home = _home() if first == "~" else Path(pwd.getpwnam(first[1:]).pw_dir)
        except KeyError:
            home = None
        if home is None:
            raise CacheFolderError(
                f"DIFA_CACHE_DIR is {folder}, and {first} is no user's home here; give the folder's whole path"
            )
        folder = home.joinpath(*rest)
    return folder


def _is_own(folder: Path) -> bool:
    """Whether this is a folder, not a link to one, of this very user, that nobody else can write to."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and why_untrusted(status) is None


@cache
def _folder_of_this_process() -> Path:
    folder = tempfile.mkdtemp(prefix=f"difa_compile-{os.geteuid()}-")
    os.chmod(folder, 0o700)
    atexit.register(_remove_unless_forked, folder, os.getpid())
    return Path(folder)


def _remove_unless_forked(folder: str, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
