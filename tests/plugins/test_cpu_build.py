"""The cache of the compiled kernel: damage, other users, compilers that fail or hang, processes that meet or die.

The compiler is a script that copies a tiny library, so nothing here compiles the kernel but the last test, which takes
it from the user's cache.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_compile.errors import KernelBuildError
from difa_compile.files import cache_folder as folders
from difa_compile.plugins.cpu import build, compiler, kept
from tests.support.places import ROOT
from tests.support.strangers import STRANGER, as_root, as_stranger, open_folder

SOURCE = """
#include <stdio.h>
#include <stdlib.h>
const char name[] = "%s";
__attribute__((constructor)) static void loaded(void) {
  const char* told = getenv("DIFA_TEST_LOADED");
  if (told) fclose(fopen(told, "w"));
}
"""
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder with ``good.so``, which names the kernel's op, and ``foreign.so``, which does not."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc to make a library of a few lines")
    folder = tmp_path_factory.mktemp("tiny")
    for name, text in (("good", build.OP), ("foreign", "something else")):
        (folder / f"{name}.c").write_text(SOURCE % text)
        command = ["gcc", "-shared", "-fPIC", f"{name}.c", "-o", f"{name}.so"]
        subprocess.run(command, cwd=folder, check=True)
    return folder


@dataclass
class Fake:
    """A compiler that copies a library; ``cache`` is where the libraries are kept."""

    script: Path
    good: Path
    cache: Path

    def write(self, before: str = "", library: Path | None = None, version: str = "fake 1") -> None:
        """``before``: shell code that runs instead of compiling, up to the copy."""
        self.script.write_text(
            f"#!/bin/sh\ncase \" $* \" in *' --version '*) echo '{version}'; exit 0;; esac\n"
            f'echo "$@" >> "{self.log}"\n'
            'while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done\n'
            f'{before}\ncp "{library or self.good}" "$out"\n'
        )
        self.script.chmod(0o755)

    @property
    def log(self) -> Path:
        return self.script.with_suffix(".log")

    @property
    def compiled(self) -> int:
        """How often it was asked to compile."""
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def assert_good(self, library: Path) -> None:
        """What is handed out to be loaded is the very library that was compiled, and nobody else's to change."""
        status = library.lstat()
        assert stat.S_ISREG(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o700
        assert library.read_bytes() == self.good.read_bytes()

    def assert_tidy(self, libraries: int = 1) -> None:
        """Nothing is left but libraries and the lock."""
        names = sorted(path.name for path in self.cache.iterdir())
        assert len([name for name in names if name.endswith(".so")]) == libraries, names
        assert {name for name in names if not name.endswith(".so")} <= {"local_attention-building.lock"}, names


@pytest.fixture
def fake(tiny, tmp_path, monkeypatch):
    made = Fake(tmp_path / "compiler", tiny / "good.so", tmp_path / "cache")
    made.write()
    monkeypatch.setenv("CXX", str(made.script))
    monkeypatch.setenv("DIFA_CACHE_DIR", str(made.cache))
    monkeypatch.delenv("DIFA_COMPILE_TIMEOUT", raising=False)
    return made


@pytest.fixture
def no_compiler(monkeypatch):
    return lambda: monkeypatch.setenv("CXX", "/nowhere/c++")


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
def test_a_library_of_another_user_is_built_again(fake):
    library = build.build()
    os.chown(library, STRANGER, STRANGER)
    assert kept.why_wrong(library) == f"belongs to user {STRANGER}"
    fake.assert_good(build.build())
    assert library.stat().st_uid == 0


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


# --- the compiler ----------------------------------------------------------------------------------------------------


def test_a_compiler_may_have_arguments_and_blanks_in_its_path(fake, tmp_path, monkeypatch):
    wrapper = tmp_path / "wrap"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    spaced = tmp_path / "my tools"
    spaced.mkdir()
    shutil.copy(fake.script, spaced / "c++")
    commands = f"{wrapper} {fake.script}", f"{spaced}/c++", f" {wrapper} '{spaced}/c++' -O0 "
    for number, told in enumerate(commands):
        monkeypatch.setenv("CXX", told)
        monkeypatch.setenv("DIFA_CACHE_DIR", str(tmp_path / f"cache {number}"))
        fake.assert_good(build.build())
    assert "-O0" in fake.log.read_text()


@pytest.mark.parametrize("told", ["", "   "])
def test_an_empty_compiler_is_the_usual_one(monkeypatch, tmp_path, told):
    usual = tmp_path / "bin" / "g++"
    usual.parent.mkdir()
    usual.write_text("#!/bin/sh\necho usual 7\n")
    usual.chmod(0o755)
    monkeypatch.setenv("PATH", f"{usual.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", told)
    assert compiler.find_compiler() == compiler.CxxCompiler(("g++",), "usual 7\n")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("/nowhere/c++", r"no C\+\+ compiler: /nowhere/c\+\+ is not on the path; install g\+\+ or set CXX"),
        ("nothing-of-that-name -O3", "nothing-of-that-name -O3 is not on the path"),
        ("'g++", "cannot be read as a command"),
        ("/dev/null", "/dev/null is not on the path"),
        ("false", "false --version fails .exit status 1, with no message.; install"),
        ("EXEC", "EXEC cannot be run"),
    ],
)
def test_a_compiler_that_is_none_is_told(fake, monkeypatch, tmp_path, told, message):
    (tmp_path / "EXEC").write_bytes(b"\x7fELF nothing")
    (tmp_path / "EXEC").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", told)
    with pytest.raises(KernelBuildError, match=message):
        build.build()


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


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'x.cpp:1: fatal error: no such thing' >&2; exit 1", "fatal error: no such thing; use another compiler"),
        ("exit 7", "exit status 7, with no message"),
        ("kill -11 $$", "ended by SIGSEGV"),
        ("exit 0", "but the library is empty or missing"),
        (': > "$out"; exit 0', "but the library is empty or missing"),
        ('mkdir "$out"; exit 0', "but the library is empty or missing"),
        ('head -c 9000 "$GOOD" > "$out"; exit 0', "but the library is cut off"),
        ('echo no library > "$out"; exit 0', "but the library is not a library"),
        ('cp "$FOREIGN" "$out"; exit 0', f"but the library does not hold {build.OP}"),
    ],
)
def test_a_compiler_that_fails_is_told_and_leaves_nothing(fake, tiny, monkeypatch, script, message):
    monkeypatch.setenv("GOOD", str(fake.good))
    monkeypatch.setenv("FOREIGN", str(tiny / "foreign.so"))
    fake.write(script)
    with pytest.raises(KernelBuildError, match=message):
        build.build()
    fake.assert_tidy(0)
    fake.write()
    fake.assert_good(build.build())


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, what):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, f"waited in vain: {what}"
        time.sleep(0.01)


HANGS = 'sleep 1000 & echo $! > "{}"; touch "$TMPDIR/cc.s"; wait'


def test_a_compiler_that_hangs_is_ended_with_its_children(fake, tmp_path, monkeypatch):
    fake.write(HANGS.format(tmp_path / "child"))
    monkeypatch.setattr(compiler, "time_limit", lambda: 1.0)
    with pytest.raises(KernelBuildError, match=r"was ended after 1 s; DIFA_COMPILE_TIMEOUT gives it another"):
        build.build()
    child = int((tmp_path / "child").read_text())
    wait_for(lambda: not is_alive(child), "the compiler's child ends")
    fake.assert_tidy(0)


def test_a_compiler_that_hangs_when_asked_for_its_version_is_none(fake, no_compiler, monkeypatch):
    library = build.build()
    fake.script.write_text("#!/bin/sh\nsleep 1000\n")
    monkeypatch.setattr(compiler, "time_limit", lambda: 0.3)
    assert build.build() == library
    library.unlink()
    with pytest.raises(KernelBuildError, match=r"was ended after 0\.3 s"):
        build.build()


@pytest.mark.usefixtures("interruptible")
def test_the_compiler_can_be_interrupted(fake, tmp_path):
    fake.write(HANGS.format(tmp_path / "child"))

    def interrupt():
        wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text().strip(), "it starts")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        build.build()
    thread.join()
    child = int((tmp_path / "child").read_text())
    wait_for(lambda: not is_alive(child), "the compiler's child ends")
    fake.assert_tidy(0)
    fake.write()
    fake.assert_good(build.build())  # the lock is free


@pytest.mark.parametrize("told", ["0", "-1", "nan", "soon"])
def test_a_time_limit_that_is_none_is_told(fake, monkeypatch, told):
    monkeypatch.setenv("DIFA_COMPILE_TIMEOUT", told)
    with pytest.raises(KernelBuildError, match=f"DIFA_COMPILE_TIMEOUT is {told}; give a number of seconds above 0"):
        build.build()


@pytest.mark.parametrize(("told", "seconds"), [("", 900), (" 5 ", 5), ("inf", float("inf")), ("0.5", 0.5)])
def test_the_time_limit_is_set(monkeypatch, told, seconds):
    monkeypatch.setenv("DIFA_COMPILE_TIMEOUT", told)
    assert compiler.time_limit() == seconds
    if seconds > 1:
        assert compiler.run(["echo", "done"], None, seconds).stdout == "done\n"


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
