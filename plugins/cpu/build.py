"""Compiling the C++ kernels for the machine they run on, once, into a cache.

The library's name holds digests of everything it depends on: sources, flags, torch, and the compiler. So another torch
or another machine on the same home directory gets a library of its own. Compiling takes some seconds
(:mod:`difa_compile.plugins.cpu.compiler`); what comes out is kept and checked before it is loaded
(:mod:`difa_compile.plugins.cpu.kept`). Libraries name no path of this machine, for they travel in bundles, too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from difa_compile.errors import CacheFolderError, KernelBuildError
from difa_compile.files.cache_folder import code_folder, private_code_folder
from difa_compile.plugins.cpu.compiler import DISK_FULL, CxxCompiler, compile_library, find_compiler, time_limit
from difa_compile.plugins.cpu.kept import Found, discard, find, keep, locked, sweep, why_no_library, work_folder

OP = "local_attention_cpu"
"""Its library travels in bundles, whose packages call the op by this name: another signature needs another name."""
SOURCES = ("simd.h", "local_attention.h", "local_attention.cpp")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
X86 = ("x86_64", "AMD64")
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
        return AVX2
    return () if platform.machine() in X86 else ("-mcpu=native",)


def bundle_flags(portable: bool) -> tuple[str, ...]:
    """Compiler flags of the instruction set of a library for other machines: that of this one, AVX2 if it is to be
    portable. Of processors that are no x86 the least that the compiler knows: what the native one needs has no name."""
    if platform.machine() not in X86:
        return ()
    return AVX2 if portable else instruction_flags()


def needs(flags: Sequence[str]) -> str:
    """What a processor must have for code that is compiled with these flags, by torch's names; "" for nothing."""
    if "-mavx512f" in flags:
        return "AVX512 AVX512_BF16" if "-mavx512bf16" in flags else "AVX512"
    return "AVX2" if "-mavx2" in flags else ""


def processor_lines() -> list[str]:
    """What tells one processor from another where the compiler is asked for the native one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return sorted({line for line in lines if line.startswith(("CPU implementer", "CPU part", "Features"))})


@dataclass(frozen=True)
class Recipe:
    """What a library is made from, the compiler aside. ``sources``: texts by file name."""

    sources: dict[str, bytes]
    flags: tuple[str, ...]
    digest: str

    @classmethod
    def here(cls) -> Recipe:
        return cls.of(instruction_flags())

    @classmethod
    def of(cls, instructions: Sequence[str]) -> Recipe:
        """``instructions``: flags of an instruction set."""
        folder = resources.files(__package__)
        sources = {name: folder.joinpath(name).read_bytes() for name in SOURCES}
        flags = (
            *("-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-w", "-s"),
            *(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", *instructions),
        )
        parts = [torch.__version__, platform.machine(), *platform.libc_ver(), *flags]
        if "-mcpu=native" in flags:
            parts += processor_lines()
        digest = hashlib.sha256("\0".join(parts).encode())
        for name, text in sources.items():
            digest.update(f"\0{name}\0{len(text)}\0".encode() + text)
        return cls(sources, flags, digest.hexdigest()[:20])

    def arguments(self, output: str) -> list[str]:
        """Of the compiler, in a folder with the sources. No path of that folder is in them: the same sources give the
        same library, and compiler caches know it again. Nor does the library name torch's folder: whoever loads it has
        loaded torch."""
        torch_folder = Path(torch.__file__).parent
        include, lib = torch_folder / "include", torch_folder / "lib"
        found = [*self.flags, f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
        found.append(f"-ffile-prefix-map={torch_folder}=torch")
        return [*found, SOURCES[-1], "-o", output, f"-L{lib}", "-ltorch_cpu", "-lc10"]


def build(recipe: Recipe | None = None) -> Path:
    """The compiled library, checked; compiles it unless the cache has it. ``recipe``: by default for this machine.

    Without a compiler the newest library of the same sources, flags and torch serves, whichever compiler made it. A
    damaged library is built again. Processes that build at the same time wait for the first of them. Raises
    :class:`KernelBuildError` if there is no compiler, it fails or the library cannot be kept.
    """
    recipe = Recipe.here() if recipe is None else recipe
    compiler, reason = _compiler()
    made_by = hashlib.sha256(f"{compiler}\0{compiler.version}".encode()).hexdigest()[:12] if compiler else None
    folder: Path | None = None
    try:
        folder = code_folder()
        found = find(folder, recipe.digest, made_by)
        if found.library is None and not os.access(folder, os.W_OK | os.X_OK):
            folder = private_code_folder(f"the CPU kernel of local attention is not in {folder}, which is read-only")
            found = find(folder, recipe.digest, made_by)
        if found.library is not None:
            return found.library
        if compiler is None or made_by is None:
            raise KernelBuildError("; ".join([reason, *_told(found)]))
        with locked(folder, time_limit()) as have_lock:
            found = find(folder, recipe.digest, made_by)  # another process may have been building it
            if found.library is not None:
                return found.library
            for text, file in zip(_told(found), found.wrong, strict=True):
                _log.warning("%s; it is built again", text)
                discard(file)
            sweep(folder, have_lock)
            _log.info("compiling the CPU kernel of local attention, once for this machine, into %s", folder)
            return _compile(recipe, compiler, made_by, folder)
    except OSError as error:
        raise _not_kept(folder, error) from error


def for_bundle(portable: bool) -> tuple[Path, str]:
    """A library that travels with engines which call it, and what it needs of a processor, as :func:`needs` says.

    Raises :class:`KernelBuildError`.
    """
    flags = bundle_flags(portable)
    return build(Recipe.of(flags)), needs(flags)


def _compiler() -> tuple[CxxCompiler | None, str]:
    """The compiler, or the reason why there is none: a library that was built before needs none."""
    try:
        return find_compiler(), ""
    except KernelBuildError as error:
        return None, str(error)


def _compile(recipe: Recipe, compiler: CxxCompiler, made_by: str, folder: Path) -> Path:
    with work_folder(folder) as work:
        for name, text in recipe.sources.items():
            (work / name).write_bytes(text)
            (work / name).chmod(0o600)  # the umask may hide even one's own files
        built = work / "built.so"
        compile_library(compiler, recipe.arguments(built.name), work)
        bad = why_no_library(built, OP.encode())
        if bad is not None:
            raise KernelBuildError(
                f"{compiler} says it compiled the CPU kernel of local attention, but the library {bad}; use another "
                "compiler (CXX), g++ 11 or newer"
            )
        return keep(built, folder, recipe.digest, made_by)


def _told(found: Found) -> list[str]:
    return [f"{file} {reason}" for file, reason in found.wrong.items()]


def _not_kept(folder: Path | None, error: OSError) -> KernelBuildError:
    if isinstance(error, CacheFolderError):
        return KernelBuildError(f"the CPU kernel of local attention cannot be kept: {error}")
    where = folder or "the cache folder"
    if error.errno in DISK_FULL:
        return KernelBuildError(
            f"the disk is full: the CPU kernel of local attention cannot be built in {where} ({error.strerror}); free "
            "some space there or set DIFA_CACHE_DIR to a folder on another disk"
        )
    return KernelBuildError(
        f"the CPU kernel of local attention cannot be kept in {where}: {error}; set DIFA_CACHE_DIR to a folder that "
        "can be written"
    )


@lru_cache(maxsize=1)
def _load() -> str | None:
    """Build and load the library, unless the process has one; the reason if that fails."""
    try:
        if not registered():
            library = build()
            try:
                torch.ops.load_library(str(library))
            except OSError as error:
                raise KernelBuildError(
                    f"{library} cannot be loaded: {error}; if its disk is mounted noexec, set DIFA_CACHE_DIR to a "
                    "folder on another, else delete the file and it is built again"
                ) from error
            if not registered():
                raise KernelBuildError(f"{library} has no {OP}; delete it and it is built again")
        torch.library.register_fake(f"difa::{OP}", _fake, allow_override=True)
    except KernelBuildError as error:
        warnings.warn(f"local attention runs without its CPU kernel, slower: {error}", stacklevel=4)
        return str(error)
    return None


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    """What comes out, without numbers: compilers ask for it."""
    if any(value.device.type != "cpu" for value in (query, key, value, *rest) if isinstance(value, Tensor)):
        raise ValueError(f"query, key, value and mask of difa::{OP} must be on the CPU; one of them is not")
    batch, heads, tokens = query.shape[:3]
    return query.new_empty((batch, tokens, heads, value.shape[3])).transpose(1, 2)


def registered() -> bool:
    """Whether this process has the op, from its own library or from one of a bundle: a second one that has it, too,
    would end the process."""
    return hasattr(torch.ops.difa, OP)


def load(library: Path) -> None:
    """Load a library of a bundle, which was checked, unless this process has the op. Raises ``OSError``."""
    with _lock:
        if not registered():
            torch.ops.load_library(str(library))
            _load.cache_clear()  # what was missing for one of its own is no reason any more


def why_not_built() -> str | None:
    """Builds and loads the library the first time it is asked; the reason if there is none, else None."""
    with _lock:
        return _load()
