"""Compiling the C++ kernels for the machine they run on, once, into a cache.

The library's name holds a digest of everything it depends on: sources, compiler, flags, torch. So another torch or
another machine on the same home directory gets a library of its own. Compiling takes some seconds.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from functools import lru_cache
from importlib import resources
from pathlib import Path

import torch

from difa_compile.errors import KernelBuildError
from difa_compile.folders import cache_folder

SOURCES = ("simd.h", "local_attention.h", "local_attention.cpp")
_log = logging.getLogger("difa_compile")
_lock = threading.Lock()


def instruction_flags() -> tuple[str, ...]:
    """Compiler flags of the instruction set that torch uses here; ``ATEN_CPU_CAPABILITY=avx2`` limits it."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        flags = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma", "-mf16c"]
        if torch.cpu._is_avx512_bf16_supported():
            flags.append("-mavx512bf16")
        return tuple(flags)
    if capability == "AVX2":
        return ("-mavx2", "-mfma", "-mf16c")
    return () if platform.machine() in ("x86_64", "AMD64") else ("-mcpu=native",)


def processor_lines() -> list[str]:
    """What tells one processor from another where the compiler is asked for the native one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return sorted({line for line in lines if line.startswith(("CPU implementer", "CPU part", "Features"))})


def build() -> Path:
    """The compiled library; compiles it unless the cache has it.

    The file is written to a temporary name and renamed, so processes that build at the same time do not meet. Raises
    :class:`KernelBuildError` if there is no compiler, it fails or the cache cannot be written.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise KernelBuildError(f"no C++ compiler: {compiler} is not on the path; install g++ or set CXX")
    folder = resources.files(__package__)
    texts = {name: folder.joinpath(name).read_bytes() for name in SOURCES}
    torch_folder = Path(torch.__file__).parent
    flags = [
        *("-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-w"),
        *(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", *instruction_flags()),
    ]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [torch.__version__, platform.machine(), compiler, version, *flags]
    if "-mcpu=native" in flags:
        parts += processor_lines()
    digest = hashlib.sha256("\0".join(parts).encode())
    for name, text in texts.items():
        digest.update(name.encode() + text)
    library = cache_folder() / f"local_attention-{digest.hexdigest()[:20]}.so"
    if library.is_file():
        return library
    _log.info("compiling the CPU kernel of local attention, once for this machine, into %s", library)
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as work:
            for name, text in texts.items():
                Path(work, name).write_bytes(text)
            include, lib = torch_folder / "include", torch_folder / "lib"
            command = [compiler, *flags, f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
            command += [str(Path(work, SOURCES[-1])), "-o", str(Path(work, "built.so"))]
            command += [f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                raise KernelBuildError(
                    f"{compiler} could not compile the CPU kernel of local attention: {' '.join(lines[:2])}; use "
                    "another compiler (CXX), g++ 11 or newer"
                )
            os.replace(Path(work, "built.so"), library)
    except OSError as error:
        raise KernelBuildError(
            f"the CPU kernel of local attention cannot be kept in {library.parent}: {error}; set DIFA_CACHE_DIR to a "
            "folder that can be written"
        ) from error
    return library


@lru_cache(maxsize=1)
def _load() -> str | None:
    """Build and load the library; the reason if that fails."""
    try:
        torch.ops.load_library(str(build()))
    except (KernelBuildError, OSError) as error:
        warnings.warn(f"local attention runs without its CPU kernel, slower: {error}", stacklevel=4)
        return str(error)
    return None


def why_not_built() -> str | None:
    """Builds and loads the library the first time it is asked; the reason if there is none, else None."""
    with _lock:
        return _load()
