"""Compiled kernels that are kept: only what was compiled is loaded, processes take turns, leftovers are swept."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_compile.errors import KernelBuildError
from difa_compile.plugins.cpu import build, kept
from tests.support.fake_compiler import FORK, HANGS, wait_for
from tests.support.places import ROOT
from tests.support.strangers import STRANGER, as_root


def overwrite(path, start, content):
    with open(path, "rb+") as file:
        file.seek(start)
        file.write(content)


def replaced_by(make):
    def damage(path, tiny):
        path.unlink()
        make(path, tiny)

    return damage


def bound_socket(path, tiny):
    """A socket's address must be short."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("s")
        os.rename("s", path.name)
    finally:
        os.chdir(here)


def full_folder(path, tiny):
    (path / "in").mkdir(parents=True)
    (path / "in" / "it").write_text("x")


DAMAGE = {
    **{f"cut to {n}": lambda p, _, n=n: os.truncate(p, n) for n in (0, 1, 4, 63, 64, 4095, 4096, 4097, 8192, 12000)},
    "cut by 1": lambda p, _: os.truncate(p, p.stat().st_size - 1),
    "one byte more": lambda p, _: overwrite(p, p.stat().st_size, b"\0"),
    **{f"zeros at {n}": lambda p, _, n=n: overwrite(p, n, bytes(64)) for n in (0, 64, 4096, 8192)},
    "all zeros": lambda p, _: overwrite(p, 0, bytes(p.stat().st_size)),
    **{f"byte {n} flipped": lambda p, _, n=n: overwrite(p, n, bytes([p.read_bytes()[n] ^ 1])) for n in (0, 500, 9000)},
    "another library": lambda p, tiny: shutil.copyfile(tiny / "foreign.so", p),
    "a text": lambda p, _: p.write_text("<html>404</html>"),
    "an empty folder": replaced_by(lambda p, _: p.mkdir()),
    "a full folder": replaced_by(full_folder),
    "a link to a good library": replaced_by(lambda p, tiny: p.symlink_to(tiny / "good.so")),
    "a dangling link": replaced_by(lambda p, _: p.symlink_to("nowhere")),
    "a link to itself": replaced_by(lambda p, _: p.symlink_to(p.name)),
    "a pipe": replaced_by(lambda p, _: os.mkfifo(p)),
    "a socket": replaced_by(bound_socket),
    "a device": replaced_by(lambda p, _: p.symlink_to("/dev/zero")),
    "group may write": lambda p, _: p.chmod(0o720),
    "all may write": lambda p, _: p.chmod(0o702),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_library_that_is_not_what_was_compiled_is_never_loaded(fake, tiny, no_compiler, caplog, kind):
    library = build.build()
    fake.assert_good(library)
    DAMAGE[kind](library, tiny)
    assert kept.why_wrong(library) is not None
    rebuilt = build.build()
    fake.assert_good(rebuilt)
    assert rebuilt == library
    assert f"{library} " in caplog.text
    assert "it is built again" in caplog.text
    assert fake.compiled == 2
    fake.assert_tidy()
    DAMAGE[kind](library, tiny)
    no_compiler()
    with pytest.raises(KernelBuildError, match=f"no C.* compiler.*; {library} (is|can)"):
        build.build()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_change_of_a_librarys_bytes_is_seen(tiny, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bytes")
    work = folder / "built.so"
    shutil.copyfile(tiny / "good.so", work)
    library = kept.keep(work, folder, "recipe", "compiler")
    assert kept.find(folder, "recipe", "compiler").library == library
    content = bytearray(library.read_bytes())
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 5000)))
    content[start:end] = data.draw(st.binary(max_size=64) | st.just(bytes(end - start)))
    library.write_bytes(content)
    found = kept.find(folder, "recipe", "compiler")
    if content == (tiny / "good.so").read_bytes():
        assert found.library == library
    else:
        assert found.library is None
        assert "damaged" in found.wrong[library]


def test_a_library_under_another_ones_name_is_not_loaded(fake):
    """Names are of recipe, compiler and content; only all three together are right."""
    library = build.build()
    _, recipe, made_by, content = library.stem.split("-")
    for name in (f"{recipe[::-1]}-{made_by}-{content}", f"{recipe}-{made_by}-{content[::-1]}", f"{recipe}-{content}"):
        library.rename(library.with_name(f"local_attention-{name}.so"))
        again = build.build()
        assert again == library
    assert fake.compiled == 4


@as_root
def test_a_library_of_another_user_is_built_again(fake):
    library = build.build()
    os.chown(library, STRANGER, STRANGER)
    assert kept.why_wrong(library) == f"belongs to user {STRANGER}"
    fake.assert_good(build.build())
    assert library.stat().st_uid == 0


def test_a_planted_library_is_not_executed(fake, tiny, monkeypatch):
    """In a process that goes all the way: what is loaded leaves a file."""
    library = build.build()
    library.chmod(0o777)
    marker = fake.cache.parent / "executed"
    monkeypatch.setenv("DIFA_TEST_LOADED", str(marker))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    code = f"""
import os
from difa_compile.plugins.cpu import build
print(build.why_not_built(), os.path.exists({str(marker)!r}))
os.chmod({str(library)!r}, 0o700)  # the very library, now trusted: the marker is no idle test
build._load.cache_clear()
print(build.why_not_built(), os.path.exists({str(marker)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    refused, loaded = done.stdout.splitlines()
    assert "can be written by others (mode 0777)" in refused
    assert refused.endswith("False")
    assert loaded.endswith(f"{library} has no {build.OP}; delete it and it is built again True")
    assert "local attention runs without its CPU kernel, slower" in done.stderr


def in_processes(count, target):
    """What ``target`` returns in each of ``count`` forks."""

    def report(pipe):
        pipe.send(target())
        pipe.close()

    started = []
    for _ in range(count):
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=report, args=(theirs,))
        process.start()
        started.append((process, ours))
        theirs.close()
    found = [pipe.recv() for _, pipe in started]
    for process, _ in started:
        process.join()
    return found


def test_processes_and_threads_that_start_together_compile_once(fake):
    fake.write("sleep 0.5")
    assert len(set(in_processes(4, build.build))) == 1
    assert fake.compiled == 1
    build.build().unlink()
    found = []
    threads = [threading.Thread(target=lambda: found.append(build.build())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert fake.compiled == 2
    fake.assert_tidy()


def test_a_process_that_is_killed_while_it_builds_blocks_nobody_and_its_files_are_swept(fake, tmp_path):
    fake.write(HANGS.format(tmp_path / "child"))
    process = FORK.Process(target=build.build)
    process.start()
    wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text().strip(), "it starts")
    process.kill()
    process.join()
    assert [path for path in fake.cache.iterdir() if path.name.startswith(kept.WORK_PREFIX)]
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    fake.write()
    fake.assert_good(build.build())
    fake.assert_tidy()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_disk_without_locks_will_do(fake, monkeypatch, code):
    import fcntl

    def unsupported(*_):
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with kept.locked(fake.cache.parent, 5) as have:
        assert not have
    fake.assert_good(build.build())


def test_what_is_swept_and_what_is_not(tmp_path):
    day = 86400
    here = f"{kept.WORK_PREFIX}{kept._machine()}-"
    entries = {
        f"{here}young": (0, "lock"),
        f"{here}old": (2 * day, "always"),
        f"{kept.WORK_PREFIX}another-young": (0, "never"),
        f"{kept.WORK_PREFIX}another-old": (2 * day, "always"),
        "local_attention-used.so": (100 * day, "never"),
        "local_attention-unused.so": (200 * day, "always"),
        "local_attention-building.lock": (900 * day, "never"),
        "profile-cpu-0123.json": (900 * day, "never"),
        "calibration": (900 * day, "never"),
    }
    for have_lock in (False, True):
        folder = tmp_path / str(have_lock)
        folder.mkdir()
        for name, (age, _) in entries.items():
            (folder / name).mkdir() if name.startswith(kept.WORK_PREFIX) else (folder / name).touch()
            os.utime(folder / name, (time.time() - age,) * 2)
        kept.sweep(folder, have_lock)
        gone = {"always", "lock"} if have_lock else {"always"}
        wanted = {name for name, (_, when) in entries.items() if when not in gone}
        assert {path.name for path in folder.iterdir()} == wanted


def test_use_keeps_a_library_young(fake):
    library = build.build()
    os.utime(library, (0, 0))
    assert build.build() == library
    assert time.time() - library.stat().st_mtime < 1000


def test_a_library_is_on_the_disk_before_it_has_its_name(fake, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        done.append("fsync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        fsync(descriptor)

    def noted_replace(*names):
        done.append("replace")
        replace(*names)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    build.build()
    assert done == ["fsync file", "replace", "fsync folder"]
