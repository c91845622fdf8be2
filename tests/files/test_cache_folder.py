"""Which folder the cache is: settings that name none, users without a home, folders of others."""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import sys
import tempfile
import warnings

import pytest

from difa_compile.errors import CacheFolderError
from difa_compile.files import cache_folder as folders
from difa_compile.files.cache_folder import cache_folder, code_folder, private_code_folder
from tests.support.places import ROOT
from tests.support.strangers import STRANGER, as_root, as_stranger, open_folder


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    """A home and a temporary folder of the test's own, no settings, every warning anew."""
    for name in ("DIFA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir(mode=0o700)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    folders._warn_once.cache_clear()
    folders._folder_of_this_process.cache_clear()
    yield
    folders._warn_once.cache_clear()
    folders._folder_of_this_process.cache_clear()


@pytest.fixture
def nameless(monkeypatch):
    """No HOME, and no name for the user's number, as ``docker run --user 54321`` may leave it."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def mode_of(path):
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("told", ["", "  ", None])
@pytest.mark.parametrize("xdg", ["", "relative", "~/cache", "./x", None])
def test_empty_settings_and_relative_xdg_are_ignored(tmp_path, monkeypatch, told, xdg):
    for name, value in (("DIFA_CACHE_DIR", told), ("XDG_CACHE_HOME", xdg)):
        if value is not None:
            monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache_folder() == code_folder() == tmp_path / "home" / ".cache" / "difa_compile"
    assert mode_of(cache_folder()) == mode_of(cache_folder().parent) == 0o700
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "temporary"]


def test_settings_name_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "difa_compile"
    for told, wanted in {
        str(tmp_path / "own"): tmp_path / "own",
        "relative/to/here": tmp_path / "relative/to/here",
        "~/kernels": tmp_path / "home" / "kernels",
        "with space": tmp_path / "with space",
    }.items():
        monkeypatch.setenv("DIFA_CACHE_DIR", told)
        assert cache_folder() == wanted
        assert wanted.is_dir()
        assert mode_of(wanted) == 0o700


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_a_home_that_there_is_not_is_told(monkeypatch, nameless, home):
    if home is not None:
        monkeypatch.setenv("HOME", home)
    for told in ("~/kernels", "~nobody-of-this-name/kernels"):
        monkeypatch.setenv("DIFA_CACHE_DIR", told)
        with pytest.raises(CacheFolderError, match=f"DIFA_CACHE_DIR is {told}.* give the folder's whole path"):
            cache_folder()


@pytest.mark.parametrize("home", [None, "", ".", "no/root", "/proc/nothing", "/dev/null"])
def test_without_a_home_the_cache_is_a_private_folder_that_is_named_once(tmp_path, monkeypatch, nameless, home):
    if home is not None:
        monkeypatch.setenv("HOME", home)
    with pytest.warns(UserWarning, match="difa_compile-.* is used instead. DIFA_CACHE_DIR sets the folder") as told:
        folder = cache_folder()
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache_folder() == code_folder() == folder
    assert folder == tmp_path / "temporary" / f"difa_compile-{os.geteuid()}"
    assert mode_of(folder) == 0o700


@pytest.mark.parametrize("taken", ["file", "link", "dangling link", "loose folder"])
def test_a_private_folder_whose_name_is_taken_gives_way_to_one_of_this_process(tmp_path, nameless, taken):
    place = tmp_path / "temporary" / f"difa_compile-{os.geteuid()}"
    if taken == "file":
        place.write_text("")
    elif taken == "loose folder":
        place.mkdir()
        place.chmod(0o777)
    else:
        place.symlink_to(tmp_path / ("home" if taken == "link" else "nowhere"))
    with pytest.warns(UserWarning, match="no home"):
        folder = code_folder()
    assert folder != place
    assert folder.parent == place.parent
    assert mode_of(folder) == 0o700
    assert not (tmp_path / "nowhere").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert code_folder() == folder


def test_the_folder_of_a_process_goes_with_it(tmp_path):
    """And not with its forks."""
    code = """
import os
from difa_compile.files import cache_folder as folders
folder = folders._folder_of_this_process()
child = os.fork()
if not child:
    raise SystemExit
os.waitpid(child, 0)
assert folder.is_dir()
print(folder)
"""
    env = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path / "temporary"))
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_default_folder_that_cannot_be_made_is_replaced_and_one_that_was_asked_for_is_not(tmp_path, monkeypatch):
    (tmp_path / "home" / ".cache").write_text("a file")
    with pytest.warns(UserWarning, match="home/.cache/difa_compile cannot be used"):
        assert cache_folder().parent == tmp_path / "temporary"
    asked = tmp_path / "home" / ".cache" / "own"
    monkeypatch.setenv("DIFA_CACHE_DIR", str(asked))
    assert cache_folder() == asked  # what writes there says that it cannot
    with pytest.raises(OSError, match=r"\.cache"):
        code_folder()


@pytest.mark.parametrize("setting", ["DIFA_CACHE_DIR", "HOME"])
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_no_code_is_taken_from_a_folder_that_others_can_write(tmp_path, monkeypatch, setting, mode):
    monkeypatch.setenv(setting, str(tmp_path / "told"))
    folder = cache_folder()
    folder.chmod(mode)
    with pytest.warns(UserWarning, match=f"can be written by others .mode {mode:04o}.; chmod go-w {folder}"):
        assert code_folder() == tmp_path / "temporary" / f"difa_compile-{os.geteuid()}"
    assert cache_folder() == folder  # for what is only read as data


def test_code_is_found_behind_a_link(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("DIFA_CACHE_DIR", str(tmp_path / "link"))
    assert cache_folder() == tmp_path / "link"
    assert code_folder() == tmp_path / "real"


def test_where_no_folder_is_safe_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFA_CACHE_DIR", str(tmp_path / "told"))
    cache_folder().chmod(0o777)
    (tmp_path / "temporary").chmod(0o777)  # without the sticky bit others can rename what is in it
    told = r"told can be written by others.*no safer.*temporary, above.*chmod go-w"
    with pytest.raises(CacheFolderError, match=told):
        code_folder()
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
    with pytest.raises(CacheFolderError, match=r"no temporary folder can be made.*set DIFA_CACHE_DIR"):
        private_code_folder("because")


@as_root
def test_folders_of_others(monkeypatch):
    """Root's are used, even if they can only be read; a stranger's are not, not even by root."""
    with open_folder() as base:
        monkeypatch.setattr(tempfile, "tempdir", str(base / "temporary"))
        (base / "temporary").mkdir()
        (base / "temporary").chmod(0o1777)
        told = base / "told"
        told.mkdir(mode=0o755)
        monkeypatch.setenv("DIFA_CACHE_DIR", str(told))
        assert as_stranger(code_folder) == told
        told.chmod(0o700)
        private = base / "temporary" / f"difa_compile-{STRANGER}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert as_stranger(code_folder) == private
            assert private.stat().st_uid == STRANGER
            private.rmdir()
            private.mkdir(mode=0o755)  # somebody else has the name
            assert as_stranger(code_folder) != private
        os.chown(told, STRANGER, STRANGER)
        with pytest.warns(UserWarning, match=f"told belongs to user {STRANGER}; set DIFA_CACHE_DIR"):
            assert code_folder() == base / "temporary" / "difa_compile-0"
