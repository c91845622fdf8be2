"""Pieces: engines whose file of weights is not there yet, and how they are kept until it is."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from torch import Tensor
from torch.export import ExportedProgram

from difa_compile.bundle.manifest import Port
from difa_compile.bundle.weights import TABLE, WeightFile, bytes_of, write_weights
from difa_compile.files.writing import write_whole


@dataclass(frozen=True)
class Wanted:
    """What an engine is to be, and for which machines. ``inputs``, ``outputs``, ``images``: as in
    :class:`difa_compile.bundle.manifest.Engine`. ``constants``: which of the program's parameters and buffers are no
    weights. ``usual``: the number of images that it is to be quickest for, where a target asks. ``portable``: for more
    processors than this one. ``gpus``: the compute capabilities that it is to run on, ``8.9``; none leaves them to the
    target."""

    program: ExportedProgram
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    images: tuple[int, int]
    constants: tuple[str, ...] = ()
    usual: int | None = None
    portable: bool = False
    gpus: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """Of inputs and of outputs."""
        return [port.name for port in self.inputs], [port.name for port in self.outputs]


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
    memory: dict[str, int] = field(default_factory=dict)
    unchecked: str = ""


@dataclass(frozen=True)
class Piece:
    """An engine of a target with what the manifest is going to say of it. ``key``: a digest of all that it was made
    from; ``label``: how its file's name begins."""

    key: str
    row: int
    target: str
    label: str
    lowered: Lowered
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    images: tuple[int, int]
    why_static: str


def table_name(tensor: Tensor) -> str:
    """The name of a tensor that is no weight, by its content: whatever has the same numbers shares it."""
    described = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return TABLE + hashlib.sha256(described + bytes_of(tensor)).hexdigest()[:32]


def keep(piece: Piece, path: Path) -> None:
    """Store what is known of a piece beside its file, in ``path`` (``.json``). Raises :class:`OutputError`."""
    tables = {name: tensor.contiguous() for name, tensor in piece.lowered.tables.items()}
    write_weights(path.with_suffix(".tables"), tables)
    described = {
        "key": piece.key,
        "target": piece.target,
        "label": piece.label,
        "file": piece.lowered.file.name,
        "sha256": hashlib.sha256(piece.lowered.file.read_bytes()).hexdigest(),
        "weights": piece.lowered.weights,
        "versions": piece.lowered.versions,
        "instruction_set": piece.lowered.instruction_set,
        "kernel": piece.lowered.kernel,
        "memory": piece.lowered.memory,
        "unchecked": piece.lowered.unchecked,
        "inputs": msgspec.to_builtins(piece.inputs),
        "outputs": msgspec.to_builtins(piece.outputs),
        "images": piece.images,
        "why_static": piece.why_static,
    }
    write_whole(path, json.dumps(described), "an engine")


def kept_in(folder: Path, row: int) -> list[Piece]:
    """The pieces in a folder, for a row of this number. Raises ``OSError``, ``ValueError``, ``KeyError`` and
    ``TypeError`` where they are damaged."""
    return [_kept(path, row) for path in sorted(folder.glob("*.json"))]


def _kept(path: Path, row: int) -> Piece:
    """What :func:`keep` has stored."""
    fields = json.loads(path.read_text())
    if hashlib.sha256((path.parent / fields["file"]).read_bytes()).hexdigest() != fields["sha256"]:
        raise ValueError("the engine is not what was kept")
    tables = WeightFile(path.with_suffix(".tables"))
    lowered = Lowered(
        path.parent / fields["file"], fields["weights"], {name: tables[name] for name in tables.places},
        fields["versions"], fields["instruction_set"], fields["kernel"], fields["memory"], fields["unchecked"],
    )  # fmt: skip
    inputs, outputs = (msgspec.convert(fields[each], tuple[Port, ...]) for each in ("inputs", "outputs"))
    low, high = fields["images"]
    label = renumbered(fields["label"], row)
    return Piece(
        fields["key"], row, fields["target"], label, lowered, inputs, outputs, (low, high), fields["why_static"]
    )


def renumbered(label: str, row: int) -> str:
    """The label of an engine that now carries out the row of this number."""
    return re.sub("^row-[0-9]+", f"row-{row:02d}", label)
