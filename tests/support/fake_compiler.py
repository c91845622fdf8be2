"""A compiler that copies a tiny library, for tests of how the CPU kernel is built and kept."""

from __future__ import annotations

import multiprocessing
import stat
import time
from dataclasses import dataclass
from pathlib import Path

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
