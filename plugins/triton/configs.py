"""Block sizes, warps and pipeline stages by architecture, dtype, head dimension and form of the kernel.

``configs.json`` holds the table; ``python -m benchmarks.attention_gpu --tune`` writes a new one from measurements.
The committed one was chosen from registers and shared memory of kernels compiled ahead of time, not from timings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("configs.json")


class Form(StrEnum):
    """What one launch gives, and whether under a mask of the model's own: what takes registers beside the blocks."""

    WINDOW = "window"
    FULL = "full"
    MASKED = "masked"
    MASKED_FULL = "masked full"

    @classmethod
    def of(cls, with_full: bool, masked: bool) -> Form:
        """``with_full``: full attention beside window attention."""
        if masked:
            return cls.MASKED_FULL if with_full else cls.MASKED
        return cls.FULL if with_full else cls.WINDOW


@dataclass(frozen=True)
class Config:
    """``block_m`` queries of a program, ``block_n`` keys of a step (powers of two >= 16), warps, pipeline stages.

    ``add_mask``: masks are added, not branched to; for architectures before Hopper and for consumers' Blackwell, whose
    products are of the same kind (see ``kernels._limited``).
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    add_mask: bool = False


@lru_cache(maxsize=4)
def table(path: Path = TABLE) -> dict[str, Config]:
    """The configurations of a file, by ``"sm90/bfloat16/128"``: architecture, dtype, padded head dimension.

    Forms that take others than window attention does follow it: ``"sm90/bfloat16/128/full"``.
    """
    return {name: Config(**entry) for name, entry in json.loads(path.read_text()).items()}


def name(arch: int, dtype: torch.dtype, head_dim: int, form: Form = Form.WINDOW) -> str:
    """The name of a table entry. ``arch``: compute capability times ten, 90 for 9.0; ``head_dim``: a power of two."""
    base = f"sm{arch}/{str(dtype).removeprefix('torch.')}/{head_dim}"
    return base if form is Form.WINDOW else f"{base}/{form}"


def config(arch: int, dtype: torch.dtype, head_dim: int, form: Form = Form.WINDOW) -> Config:
    """The entry of the newest architecture that is not newer than ``arch``, for the next head dimension listed.

    An architecture older than all goes by the oldest, float16 goes by the entries of bfloat16 where it has none, and a
    form by that of window attention beside which it has none.
    """
    entries = table()
    archs = sorted({int(entry.split("/")[0].removeprefix("sm")) for entry in entries}, reverse=True)
    sizes = sorted({int(entry.split("/")[2]) for entry in entries})
    for known in [each for each in archs if each <= arch] or archs[-1:]:
        for listed in (dtype, torch.bfloat16) if dtype.itemsize == 2 else (dtype,):
            for size in (each for each in sizes if each >= head_dim):
                found = entries.get(name(known, listed, size))
                if found is not None:
                    return entries.get(name(known, listed, size, form), found)
    raise KeyError(f"no configuration for {name(arch, dtype, head_dim)} in {TABLE}")
