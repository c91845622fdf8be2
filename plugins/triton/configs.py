"""Block sizes, warps and pipeline stages by architecture, dtype and head dimension.

``configs.json`` holds the table; ``python -m benchmarks.attention_gpu --tune`` writes a new one from measurements.
The committed one was chosen from registers and shared memory of kernels compiled ahead of time, not from timings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("configs.json")


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
    """The configurations of a file, by ``"sm90/bfloat16/128"``: architecture, dtype, padded head dimension."""
    return {name: Config(**entry) for name, entry in json.loads(path.read_text()).items()}


def name(arch: int, dtype: torch.dtype, head_dim: int) -> str:
    """The name of a table entry. ``arch``: compute capability times ten, 90 for 9.0; ``head_dim``: a power of two."""
    return f"sm{arch}/{str(dtype).removeprefix('torch.')}/{head_dim}"


def config(arch: int, dtype: torch.dtype, head_dim: int) -> Config:
    """The entry of the newest architecture that is not newer than ``arch``, for the next head dimension listed.

    An architecture older than all goes by the oldest, float16 goes by the entries of bfloat16 where it has none.
    """
    entries = table()
    archs = sorted({int(entry.split("/")[0].removeprefix("sm")) for entry in entries}, reverse=True)
    sizes = sorted({int(entry.split("/")[2]) for entry in entries})
    for known in [each for each in archs if each <= arch] or archs[-1:]:
        for form in (dtype, torch.bfloat16) if dtype.itemsize == 2 else (dtype,):
            for size in (each for each in sizes if each >= head_dim):
                found = entries.get(name(known, form, size))
                if found is not None:
                    return found
    raise KeyError(f"no configuration for {name(arch, dtype, head_dim)} in {TABLE}")
