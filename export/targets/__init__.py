"""What engines are lowered to, one module a target.

A lowering makes a *piece* of an exported program: a file that holds no weights, and the tensors it needs beside it.
Where they lie is known when all pieces are there; an ONNX model is finished then (:meth:`Lowered.finish`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from torch.export import ExportedProgram

from difa_compile.bundle.weights import Place


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


Lowering = Callable[[ExportedProgram, Sequence[str], Sequence[str], Path, bool], Lowered]
"""Of a program, the names of its inputs and outputs, the path (without an ending) of the piece, and whether it is to be
portable."""
Finish = Callable[[Path, str, Mapping[str, Place]], bytes]
"""The content of the engine: of a piece, the name of the file of weights, and where tensors lie in it."""


def _onnx(
    program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], path: Path, portable: bool
) -> Lowered:
    from difa_compile.export.targets.onnx import lowered

    del portable  # it always is
    return lowered(program, inputs, outputs, path)


def _aoti(
    program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], path: Path, portable: bool
) -> Lowered:
    from difa_compile.export.targets.aoti import lowered

    del inputs, outputs  # packages know places, not names
    return lowered(program, path, portable)


def _finish_onnx(piece: Path, weights: str, places: Mapping[str, Place]) -> bytes:
    from difa_compile.export.targets.onnx import finished

    return finished(piece, weights, places)


def _finish_aoti(piece: Path, weights: str, places: Mapping[str, Place]) -> bytes:
    del weights, places
    return piece.read_bytes()


LOWERINGS: dict[str, tuple[Lowering, Finish]] = {"onnx": (_onnx, _finish_onnx), "aoti": (_aoti, _finish_aoti)}
"""By target."""
