"""Who may change what: checked against what another user can in fact do."""

from __future__ import annotations

import itertools
import os
import stat
from pathlib import Path

import pytest

from difa_compile.files.trust import make_private, why_untrusted, why_untrusted_folder
from tests.support.strangers import STRANGER, as_root, as_stranger, open_folder


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077, 0o277, 0o777], ids=oct)
def test_folders_are_made_for_their_user_alone_whatever_the_umask(tmp_path, umask):
    (tmp_path / "there").mkdir(mode=0o755)
    folder = tmp_path / "there" / "a" / "b"
    before = os.umask(umask)
    try:
        make_private(folder)
        make_private(folder)
    finally:
        os.umask(before)
    assert [mode_of(path) for path in (folder, folder.parent, folder.parent.parent)] == [0o700, 0o700, 0o755]


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_what_is_no_folder_is_told(tmp_path, kind):
    if kind == "file":
        (tmp_path / "cache").write_text("")
    else:
        (tmp_path / "cache").symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="cache is not a folder"):
        make_private(tmp_path / "cache")


def test_what_others_can_write_is_not_trusted_whoever_owns_it():
    def status(uid: int, mode: int) -> os.stat_result:
        return os.stat_result((stat.S_IFREG | mode, 0, 0, 1, uid, uid, 0, 0, 0, 0))

    for mode in range(0o10000):
        assert "belongs to user" in str(why_untrusted(status(STRANGER, mode)))
        for uid in {0, os.geteuid()}:
            reason = why_untrusted(status(uid, mode))
            assert (reason is not None) == bool(mode & 0o022)
            assert reason is None or f"mode {mode:04o}" in reason


MODES = (0o700, 0o755, 0o770, 0o775, 0o777, 0o1775, 0o1777)


@as_root
def test_a_folder_that_another_user_can_change_or_replace_is_never_trusted():
    """Every owner and mode of a folder and of the one above it, and what a stranger manages to do there."""
    with open_folder() as base:
        cases: dict[Path, bool] = {}
        users = (0, STRANGER)
        for number, (above, own, above_owner, own_owner) in enumerate(itertools.product(MODES, MODES, users, users)):
            folder = base / str(number) / "folder"
            folder.mkdir(parents=True)
            for path, mode, owner in ((folder, own, own_owner), (folder.parent, above, above_owner)):
                os.chown(path, owner, owner if owner else 0)
                path.chmod(mode)
            cases[folder] = why_untrusted_folder(folder) is None

        def changed() -> set[str]:
            done = set()
            for folder in cases:
                try:
                    (folder / "planted").write_text("")
                    done.add(str(folder))
                except OSError:
                    pass
                try:
                    folder.rename(folder.parent / "away")
                    done.add(str(folder))
                except OSError:
                    pass
            return done

        harmed = as_stranger(changed)
        assert len(harmed) > 100
        assert [str(folder) for folder, trusted in cases.items() if trusted and str(folder) in harmed] == []
        # What is only root's is trusted: not everything is refused.
        kept = [folder for folder, trusted in cases.items() if trusted]
        assert len(kept) == 2 * 4  # folder 0700 or 0755, under 0700, 0755 or sticky


def test_a_loose_folder_above_is_named_with_the_remedy(tmp_path):
    folder = tmp_path.resolve() / "above" / "cache"
    make_private(folder)
    assert why_untrusted_folder(folder) is None
    folder.parent.chmod(0o777)
    reason = why_untrusted_folder(folder)
    assert (
        f"{folder.parent}, above {folder}, can be written by others (mode 0777); chmod go-w {folder.parent}" in reason
    )
    assert "DIFA_CACHE_DIR" in reason
    folder.parent.chmod(0o1777)
    assert why_untrusted_folder(folder) is None
    folder.chmod(0o1777)  # here others could leave files of any name
    assert f"chmod go-w {folder}" in why_untrusted_folder(folder)


@pytest.mark.parametrize(
    ("members", "group_name", "gid", "trusted"),
    [
        ([], "ann", 1000, True),
        (["ann"], "ann", 1000, True),
        (["ann", "bob"], "ann", 1000, False),
        ([], "staff", 1000, False),
        ([], "ann", 0, False),
    ],
)
def test_a_group_of_ones_own_may_write_above(tmp_path, monkeypatch, members, group_name, gid, trusted):
    """Many systems give each user a group and the umask 002, so ``~/.cache`` is writable by that group."""
    import grp
    import pwd

    folder = tmp_path.resolve() / "home" / "cache"
    make_private(folder)
    folder.parent.chmod(0o775)
    real = Path.stat

    def stat_of(path: Path, **options: bool) -> os.stat_result:
        status = list(real(path, **options))
        if path == folder.parent:
            status[stat.ST_GID] = gid
        return os.stat_result(status)

    uid = os.geteuid()
    monkeypatch.setattr(Path, "stat", stat_of)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: pwd.struct_passwd(("ann", "x", uid, gid, "", "/", "")))
    monkeypatch.setattr(grp, "getgrgid", lambda _: grp.struct_group((group_name, "x", gid, members)))
    assert (why_untrusted_folder(folder) is None) == trusted
