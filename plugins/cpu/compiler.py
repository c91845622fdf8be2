"""Running the C++ compiler: which one it is, in how much time, and what it means that it failed."""

from __future__ import annotations

import errno
import math
import os
import shlex
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from difa_compile.errors import KernelBuildError

SECONDS = 900.0
"""Time a compiler has unless ``DIFA_COMPILE_TIMEOUT`` says otherwise; it takes about 20 s on one core."""
VERSION_SECONDS = 60.0
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_FULL_TEXTS = ("No space left on device", "Disk quota exceeded")
LITTLE = 2**20
"""Bytes: a compiler that fails with less than that left fails for want of space, whatever it says."""


@dataclass(frozen=True)
class CxxCompiler:
    """The words of the command, and what it says of its version."""

    command: tuple[str, ...]
    version: str

    def __str__(self) -> str:
        return shlex.join(self.command)


def find_compiler() -> CxxCompiler:
    """The compiler that ``CXX`` names, with its arguments (``ccache g++``), else g++.

    Raises :class:`KernelBuildError` if there is none or it does not tell its version.
    """
    told = os.environ.get("CXX", "").strip() or "g++"
    try:
        words = [told] if shutil.which(told) else shlex.split(told)
    except ValueError as error:
        raise KernelBuildError(f"CXX is {told}, which cannot be read as a command ({error}); correct it") from error
    if not words or shutil.which(words[0]) is None:
        raise KernelBuildError(f"no C++ compiler: {told} is not on the path; install g++ or set CXX")
    try:
        done = run([*words, "--version"], None, min(VERSION_SECONDS, time_limit()))
    except OSError as error:
        raise KernelBuildError(f"no C++ compiler: {told} cannot be run ({error}); install g++ or set CXX") from error
    if done.returncode:
        raise KernelBuildError(
            f"no C++ compiler: {told} --version fails ({_first_lines(done)}); install g++ or set CXX"
        )
    return CxxCompiler(tuple(words), done.stdout)


def compile_library(compiler: CxxCompiler, arguments: list[str], folder: Path) -> None:
    """Compile in ``folder``, where the compiler's temporary files go as well, so that all of them go with it.

    Raises :class:`KernelBuildError`, or ``OSError`` with ``ENOSPC`` where the disk is full.
    """
    done = run([*compiler.command, *arguments], folder, time_limit())
    if not done.returncode:
        return
    if any(text in done.stderr for text in DISK_FULL_TEXTS) or shutil.disk_usage(folder).free < LITTLE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise KernelBuildError(
        f"{compiler} could not compile the CPU kernel of local attention: {_first_lines(done)}; use another compiler "
        "(CXX), g++ 11 or newer"
    )


def run(command: list[str], folder: Path | None, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a compiler in ``folder``, in English, for at most so many seconds.

    Whatever ends the waiting, Ctrl-C too, ends the compiler and all that it started. Raises :class:`KernelBuildError`
    if the time is over, ``OSError`` if the command cannot be run.
    """
    environment = os.environ | {"LC_ALL": "C"} | ({} if folder is None else {"TMPDIR": str(folder)})
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        umask=0o077,
        start_new_session=True,  # a process group of its own, to end the compiler's own children with it
    ) as process:
        try:
            out, errors = process.communicate(timeout=None if math.isinf(seconds) else seconds)
        except BaseException as error:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            for pipe in (process.stdout, process.stderr):  # who left the group may hold the other ends open
                if pipe is not None:
                    pipe.close()
            if isinstance(error, subprocess.TimeoutExpired):
                raise KernelBuildError(
                    f"{shlex.join(command[:2])} … was ended after {seconds:g} s; DIFA_COMPILE_TIMEOUT gives it another "
                    "time in seconds, CXX names another compiler"
                ) from error
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def time_limit() -> float:
    """Seconds that compiling may take: ``DIFA_COMPILE_TIMEOUT``; ``inf`` is no limit."""
    told = os.environ.get("DIFA_COMPILE_TIMEOUT", "").strip()
    try:
        seconds = float(told) if told else SECONDS
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise KernelBuildError(f"DIFA_COMPILE_TIMEOUT is {told}; give a number of seconds above 0, or leave it out")
    return seconds


def _first_lines(done: subprocess.CompletedProcess[str]) -> str:
    """The first errors of a compiler, or what else it said, or how it ended."""
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
    if lines:
        return " ".join(lines[:2])
    code = done.returncode
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}, with no message"
