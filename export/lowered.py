"""Pieces: engines whose file of weights is not there yet."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from difa_compile.bundle.weights import bytes_of

TABLE = "table."


@dataclass(frozen=True)
class Lowered:
    """A piece. ``file``: where it lies. ``weights``: by the engine's own name for a tensor that in the file of weights.
    ``tables``: of these the ones that are no weights of the model, whose numbers go with the piece. ``versions``: what
    reads it. The others as in :class:`difa_compile.bundle.manifest.Engine`."""

    file: Path
    weights: dict[str, str]
    tables: Mapping[str, Tensor] = field(repr=False)
    versions: dict[str, str]
    instruction_set: str = ""
    kernel: bool = False


def table_name(tensor: Tensor) -> str:
    """The name of a tensor that is no weight, by its content: whatever has the same numbers shares it."""
    described = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return TABLE + hashlib.sha256(described + bytes_of(tensor)).hexdigest()[:32]
