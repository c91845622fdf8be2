"""The kernel compiled ahead of time: PTX and cubin for any architecture, with no GPU in the machine."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from difa_compile.plugins.geometry import Geometry
from difa_compile.plugins.triton.configs import Config
from difa_compile.plugins.triton.local_attention import kernel_constants
from difa_compile.plugins.triton.tiling import choose

POINTERS = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "full_ptr", "mask_ptr")
STRIDES = tuple(f"{name}_{axis}" for name in ("q", "k", "v", "out", "full") for axis in ("batch", "head", "token"))
MASK_STRIDES = ("mask_batch", "mask_head", "mask_query", "mask_key")
ELEMENTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Resources:
    """What one program takes: registers of a thread, bytes of local memory (spills) and of shared memory."""

    registers: int
    local_bytes: int
    shared_bytes: int


def compile_ahead(
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    geometry: Geometry,
    config: Config,
    *,
    with_full: bool = False,
    mask: str = "none",
    mask_rows: bool = True,
    wide_strides: bool = False,
    max_registers: int | None = None,
    fixed: Mapping[str, int | float] | None = None,
) -> Any:
    """Compile for ``arch`` (compute capability times ten) and return Triton's compiled kernel, ``asm["cubin"]`` in it.

    Pointers and strides have to be multiples of 16 (bytes and elements) at launch, as those of packed tensors with a
    ``head_dim`` that is a multiple of 16 are, and those of a mask whose number of keys is. Sizes stay launch
    arguments, so one cubin serves all grids of the rank and tiling of ``geometry``; unused axes are fixed at 1.

    ``with_full``: full attention is stored too. ``mask``: of the model, "none", "bool" or "added" (in ``dtype``), its
    keys side by side in memory; without ``mask_rows`` it is the same for all queries. ``wide_strides``: strides are
    passed as 64-bit numbers.
    ``max_registers``: of a thread, to make room for more programs on a multiprocessor. ``fixed``: launch arguments that
    are compiled in, by name; a launcher that cannot pass floats fixes ``scale``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from difa_compile.plugins.triton.kernels import local_attention_kernel

    tiling = choose(geometry, config.block_m, config.block_n)
    constants = kernel_constants(geometry, tiling, head_dim, head_dim)
    constants |= {"WITH_FULL": with_full, "RESIDUAL": False, "WIDE": False, "DOT": "ieee", "ADD_MASK": config.add_mask}
    constants |= {"MASK": mask, "MASK_ROWS": mask != "none" and mask_rows}
    constants |= {"mask_key": 1} if mask != "none" else {"mask_ptr": None, **dict.fromkeys(MASK_STRIDES, 0)}
    constants |= dict.fromkeys(("frames", "height")[: 3 - geometry.rank], 1) | dict(fixed or {})
    signature = {}
    for name in local_attention_kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = "*u8" if name == "mask_ptr" and mask == "bool" else "*" + ELEMENTS[dtype]
        elif name in STRIDES + MASK_STRIDES:
            signature[name] = "i64" if wide_strides else "i32"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(local_attention_kernel.arg_names)
        if name in POINTERS + STRIDES + MASK_STRIDES and name not in constants
    }
    source = ASTSource(fn=local_attention_kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": max_registers}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled: Any) -> Resources:
    """Read off the cubin with the ``cuobjdump`` that triton brings along."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(\w+):(\d+)", text))
    # STACK holds what was spilled; LOCAL is 0 for spills on newer tools.
    return Resources(int(found["REG"]), int(found["LOCAL"]) + int(found["STACK"]), compiled.metadata.shared)
