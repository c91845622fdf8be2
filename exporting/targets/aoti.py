"""Engines as AOTInductor packages that hold no weights: code for C++ and Python without a compiler at hand.

Weights and constants are handed over when a package is loaded, as views of the one file of weights (``user_managed``),
so that all engines and threads share them. Local attention is a call of ``difa::local_attention_cpu``, whose library
lies beside the packages (:func:`difa_compile.plugins.cpu.build.for_bundle`) and is loaded first
(:func:`difa_compile.bundle.sessions.load_kernel`); C++ programs load it with ``dlopen``.

Code asks for the number of threads when it runs; how many this process has only guides how loops are cut into parts. It
is written without its sources and without paths of this machine.
"""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx.experimental import _config as symbolic

from difa_compile.bundle.sessions import hand_over, load_package
from difa_compile.bundle.weights import Place
from difa_compile.decision import Window, WindowShape
from difa_compile.errors import TargetError
from difa_compile.exporting.checking import first_other
from difa_compile.exporting.lowered import Lowered, Wanted, table_name
from difa_compile.exporting.targets.onnx import joined_plainly
from difa_compile.layout import Layout
from difa_compile.ops.local_attention import LOCAL_ATTENTION
from difa_compile.ops.reference import default_scale
from difa_compile.plugins.cpu import DTYPES, KERNEL, build
from difa_compile.wording import shown

PORTABLE = {"x86_64": ("x86-64-v3", 256)}
"""By machine: the instruction set that a portable package is compiled for (AVX2), and its vectors' bits."""
SOURCES = (".cpp", ".h")


def check(portable: bool) -> None:
    """Raise :class:`TargetError` without a C++ compiler, and where nothing ``portable`` can be compiled."""
    from torch._inductor import config, exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        named = config.cpp.cxx[-1] if isinstance(config.cpp.cxx, (list, tuple)) else config.cpp.cxx
        raise TargetError(
            f"AOTInductor engines are compiled with a C++ compiler, and {shown(named)} cannot be run; install g++, or "
            "let CXX name another"
        ) from error
    if portable:
        _portable()


def lowered(wanted: Wanted, path: Path) -> Lowered:
    """A piece: the package ``path`` with the ending ``.pt2``. Compiling it takes some ten seconds or more.

    Where it is to be portable it is for any processor of this kind from the last ten years, rather than for this one.
    The package is run beside the program for the two least numbers of images that it is to serve, for code can be
    special to the number that it was compiled with.
    Raises :class:`TargetError` where a compiler or what ``portable`` asks for is missing, where local attention is
    none that the CPU kernel serves, and for a package that gives something else than the program; what inductor raises
    passes.
    """
    from torch._inductor import aoti_compile_and_package

    program = wanted.program
    kernel = any(node.target is LOCAL_ATTENTION for node in program.graph.nodes)
    if kernel and (reason := build.why_not_built()) is not None:
        raise TargetError(f"AOTInductor engines with windows need our kernel for local attention: {reason}")
    program = joined_plainly(program)
    if kernel:
        program = program.run_decompositions({LOCAL_ATTENTION: _on_cpu})
    program = _contiguous(program)
    configs = _configs(wanted.portable)
    file = path.with_suffix(".pt2")
    # A size of 1 among those that are open is no special case, or code would be compiled for all others alone.
    with torch.no_grad(), _lookups_called(), symbolic.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        aoti_compile_and_package(program, package_path=str(file), inductor_configs=configs)
    file.write_bytes(repacked(file.read_bytes(), machine_paths()))
    names: dict[str, str] = {}
    tables: dict[str, Tensor] = {}
    model = load_package(file)
    held = {**program.state_dict, **program.constants}
    hand_over(model, {own: held[own] for own in model.get_constant_fqns()})
    check_package(model, wanted)
    for own in model.get_constant_fqns():
        if own in program.state_dict and own not in wanted.constants:
            names[own] = own
            continue
        tensor = program.state_dict[own] if own in program.state_dict else program.constants[own]
        names[own] = table_name(tensor)
        tables[names[own]] = tensor
    return Lowered(file, names, tables, {"torch": str(torch.__version__)}, instruction_set_of(file), kernel)


def finished(piece: Path, file: str, places: Mapping[str, Place]) -> bytes:
    """The content of a package, which knows its weights by their names."""
    del file, places
    return piece.read_bytes()


# --- the package as a file -------------------------------------------------------------------------------------------


def repacked(content: bytes, paths: Sequence[bytes]) -> bytes:
    """A package without its sources, whose names alone its reader asks for, deflated, and with points in the place of
    ``paths``: code has those of headers in its messages."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            data = b"" if name.endswith(SOURCES) else old.read(name)
            for path in paths:
                data = data.replace(path, b"." * len(path))
            new.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return made.getvalue()


def machine_paths() -> list[bytes]:
    """Folders of this machine that compiled code can name, longest first: torch's, and that of the code itself."""
    import os

    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folders = {str(Path(torch.__file__).parent), str(Path(torch.__file__).resolve().parent), cache_dir()}
    return sorted(map(os.fsencode, folders), key=len, reverse=True)


def _configs(portable: bool) -> dict[str, Any]:
    """Of inductor: no weights inside, no lines of sources, and as many threads as there are when it runs."""
    from torch._inductor import config

    found = {
        "aot_inductor.package_constants_in_so": False,
        "cpp.dynamic_threads": True,
        "cpp.threads": max(2, torch.get_num_threads()),  # for one, what keeps threads apart would be left out
    }
    if hasattr(config.aot_inductor, "enable_line_tables"):  # older torch writes none
        found["aot_inductor.enable_line_tables"] = False
    return found | (_portable() if portable else {})


@contextmanager
def _lookups_called() -> Iterator[None]:
    """Within it rows of tables are looked up by a call of torch's own function. It raises for a row that there is not;
    loops that inductor writes would do so on one of several threads, which ends the process."""
    from torch._inductor.lowering import fallback_handler, lowerings

    lookup = torch.ops.aten.embedding.default
    own: Callable[..., Any] = lowerings[lookup]
    lowerings[lookup] = fallback_handler(lookup, add_to_fallback_set=False)
    log, told = logging.getLogger("torch._inductor.ir"), _other_than_lookups
    log.addFilter(told)
    try:
        yield
    finally:
        log.removeFilter(told)
        lowerings[lookup] = own


def _other_than_lookups(record: logging.LogRecord) -> bool:
    """Not that such a call takes some microseconds more than others."""
    return "aten.embedding.default is missing a c-shim" not in record.getMessage()


# --- the package beside the program ----------------------------------------------------------------------------------


def check_package(model: Any, wanted: Wanted) -> None:
    """Run a package beside its program. Raises :class:`TargetError` where it gives something else."""
    if (other := first_other(wanted, lambda inputs: model(*inputs))) is not None:
        port, images = other
        raise TargetError(
            f"AOTInductor of torch {torch.__version__} compiles code that makes another {port.name} of {images} images "
            "than the model; export for one image a call (--batch 1), or for another target"
        )


def _contiguous(program: ExportedProgram) -> ExportedProgram:
    """The program with its tensors row-major, as the file of weights has them: code is compiled for their strides."""
    for held in (program.state_dict, program.constants):
        for name, value in held.items():
            if isinstance(value, Tensor) and not value.is_contiguous():
                raise TargetError(
                    f"{name} is not laid out row by row in memory (channels_last, or a view), as the file of weights "
                    "has it; make the model's tensors contiguous before AOTInductor engines are made of it"
                )
    return program


def instruction_set_of(path: Path) -> str:
    """What the code of a package needs, as torch names it; "" where it needs nothing."""
    import json

    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("_metadata.json"):
                return str(json.loads(archive.read(name)).get("AOTI_CPU_ISA", ""))
    return ""


def _portable() -> dict[str, Any]:
    import platform

    from torch._inductor import config

    machine = platform.machine()
    if machine not in PORTABLE:
        raise TargetError(f"portable engines are for {', '.join(PORTABLE)}, and this is {machine}; leave portable out")
    if not hasattr(config.cpp, "march"):
        raise TargetError(f"torch {torch.__version__} compiles for this processor alone; portable engines need 2.13")
    march, bits = PORTABLE[machine]
    return {"cpp.march": march, "cpp.simdlen": bits}


def _on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Sequence[int],
    before: int,
    after: int,
    shape: str,
    radius: int,
    scale: float | None = None,
    mask: Tensor | None = None,
    pooled: int = 0,
) -> Tensor:
    """``difa::local_attention`` as a call of the CPU kernel."""
    from difa_compile.ops.kernels import LocalCall

    layout, window = Layout(tuple(grid), before, after), Window(shape, radius)
    call = LocalCall(
        layout, window, scale, tuple(query.shape), query.dtype, query.device, mask is not None, int(key.shape[1]),
        int(value.shape[3]), pooled,
    )  # fmt: skip
    if (reason := KERNEL.why_not(call)) is not None:
        raise TargetError(f"local attention in an AOTInductor engine is by our CPU kernel, which {reason}")
    if mask is not None and mask.dtype not in (torch.bool, *DTYPES):
        mask = mask.float()
    places = [layout.image_tokens] if window.shape is WindowShape.BAND else list(grid)
    factor = default_scale(int(query.shape[-1])) if scale is None else scale
    out: Tensor = torch.ops.difa.local_attention_cpu(
        query, key, value, places, before, after, pooled, window.shape is WindowShape.DISC, radius, factor, mask, 0
    )
    return out
