"""The CPU kernel's C++ under AddressSanitizer and UndefinedBehaviorSanitizer, without torch (``sanitized.cpp``)."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from difa_compile.plugins import cpu
from difa_compile.plugins.cpu import build

SANITIZE = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
SOURCE = Path(__file__).with_name("sanitized.cpp")


def instructions(name):
    if name == "this machine's":
        return build.instruction_flags()
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("this processor's own instructions cannot be left out")
    return ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["this machine's", "none"])
def test_random_and_hostile_calls_stay_in_bounds(name, tmp_path):
    """Random calls in blocks of memory without a byte to spare, checked against the definition; numbers from the edges
    of 64 bits, which are refused or kept in bounds."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler: {compiler} is not on the path")
    flags = ["-std=c++20", "-O1", "-g1", "-w", "-ffp-contract=fast", "-fno-math-errno", *instructions(name)]
    program, include = tmp_path / "sanitized", Path(cpu.__file__).parent
    command = [compiler, *flags, *SANITIZE, f"-I{include}", str(SOURCE), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode and "cannot find" in built.stderr:
        pytest.skip(f"{compiler} has no sanitizers: {built.stderr.strip().splitlines()[-1]}")
    assert built.returncode == 0, built.stderr[:2000]
    env = os.environ | {"ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0"}
    run = subprocess.run([program, "1", "400", "5000"], env=env, capture_output=True, text=True, check=False)
    assert run.stdout == "ok\n", run.stderr[:4000]
