"""What engines are lowered to, one module a target.

A lowering makes a piece (:class:`difa_compile.export.lowered.Lowered`) of an exported program. Where weights lie is
known when all pieces are there; an ONNX model is finished then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch.export import ExportedProgram

from difa_compile.bundle.weights import Place
from difa_compile.export.lowered import Lowered, Wanted

Lowering = Callable[[ExportedProgram, Sequence[str], Sequence[str], Sequence[str], Path, bool, Wanted], Lowered]
"""Of a program, the names of its inputs and outputs, and of what is no weight among its parameters and buffers, the
path (without an ending) of the piece, whether it is to be portable, and what else is known of the engine."""
Finish = Callable[[Path, str, Mapping[str, Place]], bytes]
"""The content of the engine: of a piece, the name of the file of weights, and where tensors lie in it."""


def _onnx(
    program: ExportedProgram,
    inputs: Sequence[str],
    outputs: Sequence[str],
    constants: Sequence[str],
    path: Path,
    portable: bool,
    wanted: Wanted,
) -> Lowered:
    from difa_compile.export.targets.onnx import lowered

    del portable, wanted  # it always is
    return lowered(program, inputs, outputs, path, constants)


def _aoti(
    program: ExportedProgram,
    inputs: Sequence[str],
    outputs: Sequence[str],
    constants: Sequence[str],
    path: Path,
    portable: bool,
    wanted: Wanted,
) -> Lowered:
    from difa_compile.export.targets.aoti import lowered

    del inputs, outputs  # packages know places, not names
    return lowered(program, path, portable, constants, wanted)


def _tensorrt(
    program: ExportedProgram,
    inputs: Sequence[str],
    outputs: Sequence[str],
    constants: Sequence[str],
    path: Path,
    portable: bool,
    wanted: Wanted,
) -> Lowered:
    from difa_compile.export.targets.tensorrt import lowered

    del portable  # which GPUs is said by what is wanted
    return lowered(program, inputs, outputs, path, wanted, constants)


def _finish_onnx(piece: Path, weights: str, places: Mapping[str, Place]) -> bytes:
    from difa_compile.export.targets.onnx import finished

    return finished(piece, weights, places)


def _finish_whole(piece: Path, weights: str, places: Mapping[str, Place]) -> bytes:
    del weights, places
    return piece.read_bytes()


LOWERINGS: dict[str, tuple[Lowering, Finish]] = {
    "onnx": (_onnx, _finish_onnx),
    "aoti": (_aoti, _finish_whole),
    "tensorrt": (_tensorrt, _finish_whole),
}
"""By target."""
