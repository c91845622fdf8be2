"""The CPU kernel being built: where it is kept, other users' folders, full disks, the recipe.

The compiler is a script that copies a tiny library, so nothing here compiles the kernel but the last test, which takes
it from the user's cache.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from difa_compile.errors import KernelBuildError
from difa_compile.files import cache_folder as folders
from difa_compile.plugins.cpu import build, kept
from tests.support.fake_compiler import FORK, Fake
from tests.support.places import ROOT
from tests.support.strangers import STRANGER, as_root, as_stranger, open_folder


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077, 0o277, 0o777], ids=oct)
def test_what_is_kept_is_for_its_user_alone_whatever_the_umask(fake, umask):
    fake.write('[ "$(stat -c %a simd.h "$TMPDIR")" = "$(printf "600\\n700")" ] || exit 9')
    before = os.umask(umask)
    try:
        library = build.build()
        lock = fake.cache / "local_attention-building.lock"
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600
        library.unlink()
        fake.assert_good(build.build())
    finally:
        os.umask(before)
    assert stat.S_IMODE(fake.cache.stat().st_mode) == 0o700


@pytest.mark.parametrize("place", ["file", "file/under", "/proc/nothing"])
def test_a_cache_that_cannot_be_made_is_told(fake, tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFA_CACHE_DIR", str(tmp_path / place))
    with pytest.raises(KernelBuildError, match=r"cannot be kept in .*(file|proc).*; set DIFA_CACHE_DIR to a folder"):
        build.build()


# --- other users -----------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The temporary folder that stands in for a cache that cannot be used."""
    import tempfile

    (tmp_path / "temporary").mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    folders._warn_once.cache_clear()
    folders._folder_of_this_process.cache_clear()
    yield tmp_path / "temporary" / f"difa_compile-{os.geteuid()}"
    folders._warn_once.cache_clear()
    folders._folder_of_this_process.cache_clear()


def test_a_library_in_a_folder_that_others_can_write_is_left_there(fake, elsewhere):
    library = build.build()
    fake.cache.chmod(0o775)
    with pytest.warns(UserWarning, match=f"chmod go-w {fake.cache}, or set DIFA_CACHE_DIR"):
        other = build.build()
    assert other.parent == elsewhere
    fake.assert_good(other)
    assert build.build() == other
    assert fake.compiled == 2
    fake.cache.chmod(0o700)
    assert build.build() == library


@as_root
def test_a_cache_that_can_only_be_read_is_used_and_one_that_lacks_the_library_is_replaced(tiny, monkeypatch):
    """Root's folder, as in an image of a container, and a user who has no right to write there."""
    recipe = build.Recipe.here()
    monkeypatch.setattr(build.Recipe, "here", lambda: recipe)  # the user may not be able to read the sources
    with open_folder() as base:
        shutil.copy(tiny / "good.so", base)
        made = Fake(base / "compiler", base / "good.so", base / "cache")
        made.write()
        made.log.touch()
        made.log.chmod(0o666)
        (base / "temporary").mkdir()
        (base / "temporary").chmod(0o1777)
        monkeypatch.setattr("tempfile.tempdir", str(base / "temporary"))
        monkeypatch.setenv("CXX", str(made.script))
        monkeypatch.setenv("DIFA_CACHE_DIR", str(made.cache))
        folders._warn_once.cache_clear()
        library = build.build()
        made.cache.chmod(0o755)
        library.chmod(0o755)
        assert as_stranger(build.build) == library
        assert made.compiled == 1
        os.truncate(library, 1000)
        other = as_stranger(build.build)
        assert other.parent == base / "temporary" / f"difa_compile-{STRANGER}"
        assert as_stranger(build.build) == other  # where it stays for the next process
        assert made.compiled == 2
        monkeypatch.setenv("CXX", "/nowhere/c++")
        assert as_stranger(build.build) == other


# --- the compiler ----------------------------------------------------------------------------------------------------


def test_without_a_compiler_the_newest_library_serves_whoever_made_it(fake, no_compiler):
    first = build.build()
    fake.write(version="fake 2")
    second = build.build()
    assert first != second
    assert fake.compiled == 2
    os.utime(first, (time.time() - 9000,) * 2)
    no_compiler()
    assert build.build() == second
    os.truncate(second, 100)
    assert build.build() == first


# --- full disks ------------------------------------------------------------------------------------------------------

FULL = r"the disk is full: .* cannot be built in .*cache .*; free some space there or set DIFA_CACHE_DIR"


@pytest.mark.parametrize("text", ["No space left on device", "Disk quota exceeded"])
def test_a_compiler_that_finds_the_disk_full(fake, text):
    fake.write(f"echo '/tmp/cc1.s: fatal error: error writing: {text}' >&2; exit 1")
    with pytest.raises(KernelBuildError, match=FULL):
        build.build()
    fake.assert_tidy(0)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("owner", "name"), [(os, "mkdir"), (Path, "write_bytes"), (os, "fchmod"), (os, "fsync"), (os, "replace")]
)
def test_a_disk_that_is_full_at_any_moment(fake, monkeypatch, owner, name, code):
    build.build().unlink()

    def full(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(KernelBuildError, match=FULL):
            build.build()
    fake.assert_tidy(0)
    fake.assert_good(build.build())


@pytest.mark.parametrize("kilobytes", [8, 96])
def test_a_small_disk(fake, kilobytes):
    """Too small for the sources, or for what is compiled from them."""
    fake.cache.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k,mode=0700", "none", str(fake.cache)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a disk of some kilobytes")
    try:
        fake.write('head -c 400000 /dev/zero > "$out" || { rm -f "$out"; exit 1; }')
        with pytest.raises(KernelBuildError, match=FULL):
            build.build()
        fake.assert_tidy(0)
    finally:
        subprocess.run(["umount", str(fake.cache)], check=True)


# --- processes that meet or die --------------------------------------------------------------------------------------


def test_a_process_that_never_ends_building_is_told(fake, monkeypatch):
    fake.cache.mkdir(mode=0o700)
    ours, theirs = FORK.Pipe()

    def hold():
        with kept.locked(fake.cache, 5):
            theirs.send("held")
            time.sleep(1000)

    process = FORK.Process(target=hold)
    process.start()
    assert ours.recv() == "held"
    monkeypatch.setattr(build, "time_limit", lambda: 0.3)
    with pytest.raises(KernelBuildError, match=r"another process has been compiling .* over 0.3 s .* end it"):
        build.build()
    process.kill()
    process.join()
    fake.assert_good(build.build())


# --- the recipe ------------------------------------------------------------------------------------------------------


def test_another_torch_source_or_flag_is_another_library(fake, monkeypatch):
    names = {build.build()}
    with monkeypatch.context() as patch:
        patch.setattr("torch.__version__", "99.0")
        names.add(build.build())
    with monkeypatch.context() as patch:
        patch.setattr(build, "instruction_flags", lambda: ("-DOTHER",))
        names.add(build.build())
    with monkeypatch.context() as patch:
        patch.setattr(build, "SOURCES", build.SOURCES[::-1])
        names.add(build.build())
    assert len(names) == 4
    assert build.build() in names
    assert fake.compiled == 4


def test_no_path_of_the_work_folder_reaches_the_compiler(fake):
    """So the same sources compile to the same bytes, and compiler caches know them again."""
    build.build()
    assert str(fake.cache) not in fake.log.read_text()


def test_the_kernel_itself_survives_a_damaged_cache(tmp_path, monkeypatch):
    """The library that the user's cache has, cut off: loading it would be a SIGBUS. A process of its own recovers."""
    real = build.build()
    made = Fake(tmp_path / "compiler", real, tmp_path / "cache")
    made.write()
    monkeypatch.setenv("CXX", str(made.script))
    monkeypatch.setenv("DIFA_CACHE_DIR", str(made.cache))
    library = build.build()
    os.truncate(library, real.stat().st_size // 2)
    code = "from difa_compile.plugins.cpu import build; print(build.why_not_built(), build.build())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["None", str(library)]
    assert made.compiled == 2
    made.assert_good(library)


# --- libraries that travel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "flags", "portable", "wanted"),
    [
        ("x86_64", ("-mavx512f", "-mavx2", "-mavx512bf16"), False, "AVX512 AVX512_BF16"),
        ("x86_64", ("-mavx512f", "-mavx2"), False, "AVX512"),
        ("x86_64", ("-mavx512f", "-mavx2"), True, "AVX2"),
        ("x86_64", (), False, ""),
        ("aarch64", ("-mcpu=native",), False, ""),
    ],
)
def test_what_a_library_needs_is_told(fake, monkeypatch, machine, flags, portable, wanted):
    """Of processors whose flags have no names, it is the least that the compiler knows."""
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    monkeypatch.setattr(build, "instruction_flags", lambda: flags)
    monkeypatch.setattr(build.platform, "libc_ver", lambda: ("glibc", "2.36"))
    library, needed = build.for_bundle(portable)
    assert needed == wanted
    assert "-mcpu=native" not in build.bundle_flags(portable)
    own = build.build()
    assert (library == own) == (build.bundle_flags(portable) == flags)


def test_libraries_name_no_path_of_this_machine():
    content = build.build().read_bytes()
    for path in (ROOT, Path(build.torch.__file__).parent, Path.home()):
        assert os.fsencode(path) not in content


def test_a_library_of_a_bundle_is_loaded_where_there_is_none(monkeypatch, tmp_path):
    loaded = []
    monkeypatch.setattr(build, "registered", lambda: bool(loaded))
    monkeypatch.setattr(build.torch.ops, "load_library", loaded.append)
    build.load(tmp_path / "one.so")
    build.load(tmp_path / "two.so")
    assert loaded == [str(tmp_path / "one.so")]
