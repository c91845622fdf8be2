"""Engines as AOTInductor packages that hold no weights: code for C++ and Python without a compiler at hand.

Weights and constants are handed over when a package is loaded, as views of the one file of weights (``user_managed``),
so that all engines and threads share them. Local attention is a call of ``difa::local_attention_cpu``, whose library
(:func:`kernel_library`) is loaded first; C++ programs load it with ``dlopen``.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from difa_compile.decision import Window, WindowShape
from difa_compile.errors import TargetError
from difa_compile.export.targets.onnx import joined_plainly
from difa_compile.export.weights import bytes_of
from difa_compile.layout import Layout
from difa_compile.ops.local_attention import LOCAL_ATTENTION
from difa_compile.ops.reference import default_scale
from difa_compile.plugins.cpu import DTYPES, KERNEL, build

PORTABLE = {"x86_64": ("x86-64-v3", 256)}
"""By machine: the instruction set that a portable package is compiled for (AVX2), and its vectors' bits."""


@dataclass(frozen=True)
class AotiEngine:
    """A package. ``tensors``: what it is handed when loaded, by the name that it has in the file of weights, and
    ``names``: by the package's own name for it that name. ``weights``: those that are the model's own.
    ``instruction_set``: what its code needs, as torch names it. ``kernel``: whether it calls our CPU kernel."""

    tensors: Mapping[str, Tensor] = field(repr=False)
    names: Mapping[str, str]
    weights: tuple[str, ...]
    instruction_set: str
    kernel: bool


def to_aoti(program: ExportedProgram, path: Path, portable: bool = False) -> AotiEngine:
    """Compile ``program`` into the package ``path``, which must end in ``.pt2``. Takes some ten seconds.

    ``portable``: for any processor of this kind from the last ten years, rather than for this one.
    Raises :class:`TargetError` where a compiler or what ``portable`` asks for is missing, and where local attention is
    none that the CPU kernel serves; what inductor raises passes.
    """
    from torch._inductor import aoti_compile_and_package

    kernel = any(node.target is LOCAL_ATTENTION for node in program.graph.nodes)
    if kernel and (reason := build.why_not_built()) is not None:
        raise TargetError(f"AOTInductor engines with windows need our kernel for local attention: {reason}")
    program = joined_plainly(program)
    if kernel:
        program = program.run_decompositions({LOCAL_ATTENTION: _on_cpu})
    configs = {"aot_inductor.package_constants_in_so": False, **(_portable() if portable else {})}
    with torch.no_grad():
        made = aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
    assert Path(made) == path
    names, tensors, weights = {}, {}, []
    own = {**program.state_dict, **program.constants}
    for fqn in loaded(path).get_constant_fqns():
        tensor = own[fqn]
        if fqn in program.state_dict:
            name = fqn
            weights.append(fqn)
        else:
            name = f"table.{hashlib.sha256(bytes_of(tensor)).hexdigest()[:32]}"
        names[fqn], tensors[name] = name, tensor
    return AotiEngine(tensors, names, tuple(weights), instruction_set_of(path), kernel)


def loaded(path: Path) -> Any:
    """A package as a function of its inputs, with ``load_constants`` and ``get_constant_fqns``.

    Of a package that calls our kernel :func:`kernel_library` must be loaded first.
    """
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path))


def hand_over(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give a loaded package its weights, by its own names, which stay the caller's: they must outlive it, and what is
    written into them is what it computes with."""
    model.load_constants(dict(tensors), check_full_update=True, user_managed=True)


def kernel_library() -> Path:
    """The library with ``difa::local_attention_cpu``, built if need be. Raises :class:`TargetError`."""
    if (reason := build.why_not_built()) is not None:
        raise TargetError(f"our kernel for local attention cannot be had: {reason}")
    return build.build()


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
