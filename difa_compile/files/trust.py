"""Who else could change a file or folder: asked before code that lies there is loaded, as ssh asks about its keys.

Trusted are this user and root. A file or folder of code must belong to one of them and be writable by nobody else. The
folders above must not let others put another folder in its place: theirs are refused, and so are those that others may
write to, unless they are sticky (like ``/tmp``, where only an entry's owner can rename it) or the group is the owner's
own.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path

REMEDY = "set DIFA_CACHE_DIR to a folder that only you can write to"


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for this user alone, whatever the umask. Raises OSError."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_private(folder.parent)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if not folder.is_dir():  # another process may have made it meanwhile
            raise NotADirectoryError(f"{folder} is not a folder") from None
    else:
        folder.chmod(0o700)


def why_untrusted(status: os.stat_result) -> str | None:
    """Why code in this file or folder is not to be loaded, as what follows its name in a sentence, else None."""
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to {_user(status.st_uid)}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def why_untrusted_folder(folder: Path) -> str | None:
    """Why code in ``folder``, which is there and free of symbolic links, is not to be loaded, with the remedy."""
    status = folder.stat()
    if not stat.S_ISDIR(status.st_mode):
        return f"{folder} is not a folder; {REMEDY}"
    reason = why_untrusted(status)
    if reason is not None:
        return f"{folder} {reason}; {_remedy(folder, status)}"
    above = Path("/").stat().st_uid  # root, or who stands for root in a sandbox: all programs are theirs
    for parent in folder.parents:
        status = parent.stat()
        if status.st_uid not in (0, os.geteuid(), above):
            return f"{parent}, above {folder}, belongs to {_user(status.st_uid)}; {REMEDY}"
        loose = status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _own_group(status))
        if loose and not status.st_mode & stat.S_ISVTX:
            mode = f"{stat.S_IMODE(status.st_mode):04o}"
            return f"{parent}, above {folder}, can be written by others (mode {mode}); {_remedy(parent, status)}"
    return None


def _own_group(status: os.stat_result) -> bool:
    """Whether the group is its owner's own, as many systems give one to every user: of one name, with no members.

    Never group 0, in which containers run users of any number.
    """
    try:
        owner, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    own = owner.pw_gid == status.st_gid != 0 and owner.pw_name == group.gr_name
    return own and set(group.gr_mem) <= {owner.pw_name}


def _remedy(place: Path, status: os.stat_result) -> str:
    return f"chmod go-w {place}, or {REMEDY}" if status.st_uid == os.geteuid() else REMEDY


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
