"""Engines of an export, each made once.

A piece is stored under a digest of all that it is made from as soon as it is done, in the bundle's own folder: an
export that was interrupted, or is repeated with more tiers, makes only what is missing.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from difa_compile.bundle.manifest import Manifest, Port, check_file, read_manifest
from difa_compile.bundle.sessions import processor_flags
from difa_compile.bundle.tensorrt import library
from difa_compile.bundle.weights import TABLE, WeightFile, bytes_of
from difa_compile.errors import BundleFormatError, DifaError, TargetError, is_out_of_memory
from difa_compile.exporting.lowered import Lowered, Piece, Wanted, keep, kept_in, renumbered
from difa_compile.exporting.targets import target_of
from difa_compile.wording import shown

PIECES = ".pieces"
"""Folder of what is finished before the bundle is."""
UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG})
"""What keeps a folder from being written to: full, read-only, somebody else's, broken."""
Told = Callable[[str], None]


@dataclass(frozen=True)
class Draft:
    """An engine that no target has yet. ``label``: how its file's name begins. ``component``: of the pipeline, where
    the program names weights as that does, and ``""`` where it names them as the pipeline does. The others as in
    :class:`difa_compile.exporting.lowered.Wanted` and :class:`difa_compile.bundle.manifest.Engine`."""

    label: str
    program: ExportedProgram
    constants: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    images: tuple[int, int]
    why_static: str = ""
    component: str = ""

    def described(self) -> dict[str, object]:
        """All that it depends on, but for the numbers in weights, to be digested."""
        state = self.program.state_dict
        held = [value for value in self.program.constants.values() if isinstance(value, Tensor)]
        return {
            "graph": hashlib.sha256(self.program.graph_module.code.encode()).hexdigest(),
            "ports": [[port.name, port.dtype, list(port.shape)] for port in (*self.inputs, *self.outputs)],
            "images": self.images,
            "weights": [[name, form_of(value)] for name, value in sorted(state.items())],
            "values": digest_of([*held, *(state[name] for name in self.constants)]),
        }


@dataclass(frozen=True)
class Made:
    """How pieces are made. ``usual``, ``portable``, ``gpus``: as in :class:`difa_compile.exporting.lowered.Wanted`."""

    usual: int | None = None
    portable: bool = False
    gpus: tuple[str, ...] = ()

    def key(self, target: str, described: Mapping[str, object]) -> str:
        """A digest of all that a target's pieces depend on."""
        import diffusers

        versions = {
            "torch": str(torch.__version__),
            "diffusers": diffusers.__version__,
            "difa-compile": _sources(),
            "target": [metadata.version(name) for name in ("onnx", "onnxscript")] if target != "aoti" else [],
            "processor": "" if self.portable or target != "aoti" else " ".join(sorted(processor_flags())),
            "machine": platform.machine(),
        }
        if target == "tensorrt":
            builder = library()
            gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and builder.name == "tensorrt" else ""
            versions |= {"builder": f"{builder.name} {builder.version}", "gpus": [*self.gpus, gpu], "usual": self.usual}
        parts = json.dumps([target, self.portable and target == "aoti", versions, described], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()


class Pieces:
    """The pieces of an export into ``folder``. ``first``: of a tied weight's further names in the pipeline the first,
    under which checkpoints have it. ``told`` is given a line for each that is made. ``made`` and ``kept``: how many
    were made here, and were there."""

    def __init__(self, folder: Path, first: Mapping[str, str], how: Made, told: Told) -> None:
        self.folder, self.first, self.how, self.told = folder, first, how, told
        self.made = self.kept = 0
        try:
            self.old: Manifest | None = read_manifest(folder)
        except BundleFormatError:
            self.old = None
        self._weights: WeightFile | None = None
        self.place = folder / PIECES
        self.place.mkdir(exist_ok=True)

    def of(
        self,
        target: str,
        row: int,
        described: Mapping[str, object],
        drafts: Callable[[], Sequence[Draft]],
    ) -> list[Piece]:
        """The pieces of a row for a target. ``described``: all that they depend on. ``drafts`` are asked for only if
        they are not there. Raises :class:`TargetError` where the target does not take one; what is out of memory or
        disk passes."""
        key = self.how.key(target, described)
        known = self._known(key, row, target)
        if known:
            self.kept += len(known)
            return known
        folder = self.place / f"{key}.part"
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted export has left of it is not whole
        folder.mkdir()
        for place, draft in enumerate(drafts()):
            low, high = draft.images
            images = str(low) if low == high else f"{low} to {high}"
            self.told(f"{target}: {draft.label}, {len(draft.program.state_dict)} weights, images a call: {images}")
            lowered = self._lowered(target, draft, folder / str(place))
            piece = Piece(key, row, target, draft.label, lowered, draft.inputs, draft.outputs, draft.images,
                          draft.why_static)  # fmt: skip
            keep(piece, folder / f"{place}.json")
            self.made += 1
        whole = self.place / key
        os.replace(folder, whole)  # from now on they are found again
        return kept_in(whole, row)

    def _lowered(self, target: str, draft: Draft, path: Path) -> Lowered:
        wanted = Wanted(
            draft.program, draft.inputs, draft.outputs, draft.images, draft.constants, self.how.usual,
            self.how.portable, self.how.gpus,
        )  # fmt: skip
        with torch.no_grad(), _refusals(target, draft.label):  # what attention is decomposed to depends on grad mode
            made = target_of(target).lowered(wanted, path)
        if made.unchecked:
            self.told(f"{target}: {draft.label}: its model was not compared with the program: {made.unchecked}")
        prefix = f"{draft.component}." if draft.component else ""
        named = {
            own: name if name in made.tables else self.first.get(prefix + name, prefix + name)
            for own, name in made.weights.items()
        }
        return replace(made, weights=named)

    def _known(self, key: str, row: int, target: str) -> list[Piece]:
        """The pieces of a key that are there: left by an export that was interrupted, or engines of the bundle."""
        whole = self.place / key
        if whole.is_dir():
            try:
                return kept_in(whole, row)
            except (OSError, ValueError, KeyError, TypeError):  # damaged, by a loss of power say: made anew
                shutil.rmtree(whole)
        if self.old is None:
            return []
        engines = [engine for engine in self.old.engines if (engine.key, engine.target) == (key, target)]
        if not engines:
            return []
        engines = [engine for engine in engines if engine.row == engines[0].row]  # rows of two sizes may be equal
        try:
            files = [check_file(self.folder, engine.file, self.old.files) for engine in engines]
            weights = self._old_weights(self.old)
        except BundleFormatError:
            return []  # damaged: made anew
        return [
            Piece(
                key, row, target, renumbered(engine.file.rsplit("-", 1)[0], row),
                Lowered(
                    file, dict(engine.weights),
                    {name: weights[name] for name in engine.weights.values() if name.startswith(TABLE)},
                    dict(engine.versions), engine.instruction_set, engine.kernel, dict(engine.memory), engine.unchecked,
                ),
                engine.inputs, engine.outputs, engine.images, engine.why_static,
            )
            for engine, file in zip(engines, files, strict=True)
        ]  # fmt: skip

    def _old_weights(self, old: Manifest) -> WeightFile:
        """The weights of the bundle that is there, compared once. Raises :class:`BundleFormatError`."""
        if self._weights is None:
            self._weights = WeightFile(check_file(self.folder, old.weights, old.files))
        return self._weights

    def clear(self) -> None:
        """Delete what was kept: the bundle has it."""
        shutil.rmtree(self.place, ignore_errors=True)


@contextmanager
def _refusals(target: str, label: str) -> Iterator[None]:
    """Whatever a target's exporter and compiler have against an engine as a :class:`TargetError`."""
    try:
        yield
    except DifaError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in UNWRITABLE):
            raise
        raise TargetError(f"{target} does not take {label}: {type(error).__name__}: {shown(error, 500)}") from error


@functools.cache
def _sources() -> str:
    """A digest of this package's code: of a checkout the version says too little."""
    digest = hashlib.sha256()
    root = Path(str(sys.modules["difa_compile"].__file__)).parent
    for path in sorted(Path(folder) / name for folder, _, names in os.walk(root, followlinks=True) for name in names):
        if path.suffix == ".py":
            digest.update(f"{path.relative_to(root).as_posix()} ".encode() + path.read_bytes())
    return digest.hexdigest()


def form_of(value: object) -> object:
    """Of an input of a graph what an engine depends on: a number itself, of a tensor dtype, sizes and strides."""
    return [str(value.dtype), list(value.shape), list(value.stride())] if isinstance(value, Tensor) else repr(value)


def digest_of(tensors: Sequence[Tensor]) -> str:
    """Of their dtypes, shapes and numbers."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()
