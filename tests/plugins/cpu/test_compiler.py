"""The compiler of the CPU kernel: which one, one that fails or hangs, and its time limit."""

from __future__ import annotations

import os
import shutil
import signal
import threading

import pytest

from difa_compile.errors import KernelBuildError
from difa_compile.plugins.cpu import build, compiler
from tests.support.fake_compiler import HANGS, is_alive, wait_for


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
