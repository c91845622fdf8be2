"""A bundle with other weights: a LoRA, or a distilled model's, put into a bundle's weights, and no engine made anew.

    adapt_bundle("digits/", "style.safetensors", "digits-style/", scale=0.8)

Engines hold no weights, so they stay as they are: AOTInductor packages are the same files, in ONNX models the places of
the tensors are entered anew. The sampling loops and plans are the same files, too. What a plan leaves out was measured
with the old weights, and may do more or less with others.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from difa_compile.bundle.adapters import ENCODER, LORA, Changes, changes, open_adapter
from difa_compile.bundle.manifest import (
    MANIFEST,
    Adapter,
    Engine,
    File,
    Manifest,
    check_file,
    checked_bytes,
    read_manifest,
)
from difa_compile.bundle.program import Program
from difa_compile.bundle.runner import Bundle
from difa_compile.bundle.weights import TABLE, Place, WeightFile, write_weights
from difa_compile.errors import AdapterError, BundleIntegrityError, MissingDependencyError, OutputError, TargetError
from difa_compile.files.documents import parse_json
from difa_compile.files.writing import check_new, link_or_copy, new_folder, write_whole
from difa_compile.wording import quoted, shown

Told = Callable[[str], None]
LARGEST_SCALE = 1e30
"""Beyond it nothing is finite that is multiplied by it in single precision."""


@dataclass(frozen=True)
class Adapted:
    """What came of it. ``changed``: by the name of a weight by how much it changed, the norm of the difference as a
    share of its own (infinite for one that was 0). ``target``: whose engines made the latents of the new self-test.
    """

    folder: Path
    manifest: Manifest
    changed: Mapping[str, float]
    target: str


def adapt_bundle(
    folder: str | Path,
    lora: str | Path,
    out: str | Path,
    scale: float = 1.0,
    *,
    without: Collection[str] = (),
    told: Told = lambda text: None,
) -> Adapted:
    """Write the bundle in ``folder`` with other weights into the new folder ``out``.

    ``lora``: a safetensors file, or a folder with one: a LoRA, of which ``scale`` times what it adds goes into the
    weights, or whole weights under the model's own names (:mod:`difa_compile.bundle.adapters`). Sums are made in
    float32 and rounded to the bundle's dtype once. ``without``: parts whose tensors are left out (``text_encoder``,
    ``transformer.proj_out``); all others must fit. ``told`` is given a line for each thing that is done.

    The bundle makes its self-test before, and the new one's latents are those of the same target's engines, as the
    manifest then says; the engines of other targets that are installed are compared with them. Files that are the same
    are further names of the bundle's own where the file system has such, else copies.

    Raises :class:`AdapterError` for a file that is damaged, in a form that is not read, or does not fit,
    :class:`BundleFormatError` and its subclasses for the bundle, :class:`TargetError` where none of its engines run
    here, :class:`MissingDependencyError` and :class:`OutputError`.
    """
    folder, out = Path(folder).absolute(), Path(out)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) < LARGEST_SCALE:
        raise AdapterError(f"the scale {quoted(scale)} is no finite number; give one such as 0.8")
    without = (without,) if isinstance(without, str) else tuple(without)
    manifest = read_manifest(folder)
    _check_elsewhere(folder, out)
    check_new(out, "the bundle")
    weights = WeightFile(check_file(folder, manifest.weights, manifest.files))
    file = open_adapter(lora)
    what = changes(file, _adaptable(manifest, weights), _components(manifest), without, manifest.source.pipeline)
    if what.kind != LORA and scale != 1.0:
        raise AdapterError(f"{shown(file.path)} holds whole weights, which have no scale; leave {scale:g} out")
    _check_apart(manifest, weights, what)
    _check_targets(manifest)
    target = _tested(folder, manifest, told)
    manifest = _encoded_anew(folder, manifest, what)
    if any(part.startswith(ENCODER) for part in without):
        held = sorted({f"{half}.{name}" for size in manifest.sizes for half in size.conditions
                       for name in size.conditions[half]})  # fmt: skip
        if held:
            told(f"left as the old text encoder made it, if it did: {', '.join(held)}; give it in calls, too")
    changed = _amounts(weights, what, scale)
    told(f"{len(changed)} of {len(weights.places)} tensors change, by {_largest(changed)} at most")
    with new_folder(out, "the bundle") as fresh:
        made = _written(folder, fresh, manifest, _Changed(weights, what, scale))
        entry = Adapter(file.name, file.sha256, what.kind, float(scale), without, target)
        source = msgspec.structs.replace(manifest.source, adapters=(*manifest.adapters, entry))
        made = _tried(folder, fresh, msgspec.structs.replace(made, source=source), target, told)
        made = Manifest.from_json(json.dumps(made.to_json(), allow_nan=False), "that was made")
        write_whole(fresh / MANIFEST, json.dumps(made.to_json(), indent=1) + "\n", "the manifest")
    return Adapted(out, made, changed, target)


# --- what is refused before anything is written ----------------------------------------------------------------------


def _check_elsewhere(folder: Path, out: Path) -> None:
    here, there = Path(os.path.realpath(folder)), Path(os.path.realpath(out))
    if there == here or here in there.parents:
        raise OutputError(
            f"the bundle with other weights cannot be written to {shown(out)}, the bundle itself or a part of it; name "
            "another folder"
        )


def _adaptable(manifest: Manifest, weights: WeightFile) -> dict[str, Place]:
    """The weights that engines read, without what is none: tables of an engine's own."""
    names = {name for engine in manifest.engines for name in engine.weights.values() if not name.startswith(TABLE)}
    return {name: weights.places[name] for name in sorted(names) if name in weights}


def _encoded_anew(folder: Path, manifest: Manifest, what: Changes) -> Manifest:
    """The manifest without the conditions in the file of weights (an empty negative prompt's) that encoders made whose
    weights change: from now on they are encoded at each call, from the text of the export. Raises
    :class:`AdapterError` where such conditions stand in a program."""
    if manifest.prompts is None:
        return manifest
    stale: dict[str, set[str]] = {}
    for encoder in manifest.prompts.encoders:
        engines = [engine for engine in manifest.engines if engine.row == encoder.row]
        if any(name in what.by_weight for engine in engines for name in engine.weights.values()):
            stale[encoder.half] = {port.name for engine in engines for port in engine.outputs}
    for name in sorted({schedule.program for schedule in manifest.schedules}) if stale else ():
        program = Program.from_json(parse_json(checked_bytes(folder, name, manifest.files)), name)
        for each in (each for form in program.forms for each in form.conditions):
            whole = not getattr(torch, each.argument.dtype).is_floating_point  # of a mask: it follows tokens alone
            for row in each.rows:
                if row.numbers is not None and not whole and each.argument.name in stale.get(row.half, ()):
                    raise AdapterError(
                        f"{shown(name)} holds {shown(each.argument.name)} of the {row.half} half, which the old text "
                        "encoder made; put the adapter into the pipeline and export it"
                    )
    sizes = []
    for size in manifest.sizes:
        kept = {
            half: {name: stored for name, stored in given.items() if name not in stale.get(half, ())}
            for half, given in size.conditions.items()
        }
        sizes.append(msgspec.structs.replace(size, conditions={half: given for half, given in kept.items() if given}))
    return msgspec.structs.replace(manifest, sizes=tuple(sizes))


def _components(manifest: Manifest) -> list[str]:
    """The components whose weights engines of the sampling loop read."""
    read = {name for engine in manifest.engines if engine.row >= 0 for name in engine.weights.values()}
    return sorted({name.split(".")[0] for name in read if not name.startswith(TABLE)})


def _check_apart(manifest: Manifest, weights: WeightFile, what: Changes) -> None:
    """Tables belong to engines' programs, and an exporter could have made one of a weight, turned or reshaped: one that
    has a weight's numbers in any order would not follow it. Raises :class:`AdapterError`."""
    tables = [name for name in weights.places if name.startswith(TABLE)]
    held: dict[int, list[str]] = {}
    for table in tables:
        if weights.places[table].dtype.is_floating_point:
            held.setdefault(math.prod(weights.places[table].shape), []).append(table)
    for name in what.by_weight:
        weight = weights[name]
        for table in held.get(weight.numel(), ()):
            if weight.any() and torch.equal(_in_order(weight), _in_order(weights[table])):
                reading = next(engine.file for engine in manifest.engines if table in engine.weights.values())
                raise AdapterError(
                    f"{shown(reading)} reads the numbers of {shown(name)} as a constant of its own, which would not "
                    "change with the weight; put the adapter into the pipeline and export it"
                )


def _in_order(tensor: Tensor) -> Tensor:
    return tensor.flatten().double().sort().values


def _check_targets(manifest: Manifest) -> None:
    for engine in manifest.engines:
        if engine.target not in MOVED:
            raise AdapterError(
                f"{shown(engine.file)} is of the target {shown(engine.target)}, and other weights go into bundles of "
                f"{', '.join(MOVED)}; put the adapter into the pipeline and export it"
            )


def _tested(folder: Path, manifest: Manifest, told: Told) -> str:
    """The first target that runs here, once its self-test has gone well. Raises :class:`TargetError` and
    :class:`BundleIntegrityError`."""
    reasons = []
    for target in manifest.targets:
        try:
            tested = Bundle(folder, target, manifest=manifest).tested()
        except TargetError as error:
            reasons.append(f"{target}: {error}")
            continue
        if not tested.passed:
            raise BundleIntegrityError(
                f"the engines of {target} do not make what {manifest.tested_by} made when the bundle was written: "
                f"{tested.told}; export again before other weights go into it"
            )
        told(f"{target}: in the bundle's own self-test {tested.told}")
        return target
    raise TargetError(f"no engines of {shown(folder)} run here, so that other weights cannot be tried: "
                      f"{'; '.join(reasons)}")  # fmt: skip


# --- weights ---------------------------------------------------------------------------------------------------------


class _Changed(Mapping[str, Tensor]):
    """The tensors of a file of weights, some of them changed; each made when it is asked for, and not kept."""

    def __init__(self, weights: WeightFile, what: Changes, scale: float) -> None:
        self._weights, self._what, self._scale = weights, what, scale

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._weights[name]
        return self._what.of(name, tensor, self._scale) if name in self._what.by_weight else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights.places)

    def __len__(self) -> int:
        return len(self._weights.places)


def _amounts(weights: WeightFile, what: Changes, scale: float) -> dict[str, float]:
    """By how much each weight changes. Raises :class:`AdapterError` for numbers that are not finite."""
    return {name: relative_change(weights[name], what.of(name, weights[name], scale)) for name in what.by_weight}


def relative_change(before: Tensor, after: Tensor) -> float:
    """The norm of the difference of two tensors of one shape as a share of the first's; infinite if that is 0."""
    difference = float((after.double() - before.double()).norm())
    norm = float(before.double().norm())
    return difference / norm if norm else 0.0 if not difference else math.inf


def _largest(changed: Mapping[str, float]) -> str:
    return f"{max(changed.values()):.2g} of their norm"


# --- files -----------------------------------------------------------------------------------------------------------


def _written(folder: Path, fresh: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> Manifest:
    """Everything but manifest and self-test, in the folder ``fresh``."""
    files: dict[str, File] = {}
    weights, places = _stored(fresh, "weights", tensors, files)
    engines = []
    moved = {manifest.weights, manifest.self_test}
    for engine in manifest.engines:
        move = MOVED[engine.target]
        if move is not None:
            content = move(checked_bytes(folder, engine.file, manifest.files), engine, weights, places)
            moved.add(engine.file)
            digest = hashlib.sha256(content).hexdigest()
            name = f"{engine.file.rpartition('-')[0]}-{digest[:12]}{Path(engine.file).suffix}"
            write_whole(fresh / name, content, f"{name} of the bundle")
            files[name] = File(len(content), digest)
            engine = msgspec.structs.replace(engine, file=name)
        engines.append(engine)
    for name, entry in manifest.files.items():
        if name not in moved:
            link_or_copy(check_file(folder, name, manifest.files), fresh / name, f"{name} of the bundle")
            files[name] = entry
    return msgspec.structs.replace(manifest, files=dict(sorted(files.items())), weights=weights, engines=tuple(engines))


def _stored(
    fresh: Path, label: str, tensors: Mapping[str, Tensor], files: dict[str, File]
) -> tuple[str, dict[str, Place]]:
    """Write a file of tensors, named by its content; its name, and where they lie."""
    path = fresh / f".{label}.tmp"
    places = write_weights(path, tensors)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = f"{label}-{digest[:12]}.safetensors"
    files[name] = File(path.stat().st_size, digest)
    path.replace(fresh / name)
    return name, places


def _tried(folder: Path, fresh: Path, manifest: Manifest, target: str, told: Told) -> Manifest:
    """The manifest with a self-test whose latents the engines of ``target`` make; what others make is compared.

    ``folder``: of the bundle as it was, whose self-test has seed and conditions. Raises :class:`AdapterError` where
    latents are not finite, or targets make something else.
    """
    adapted = Bundle(fresh, target, manifest=manifest)
    data = Bundle(folder, target).self_test_data()
    for name, encoded in adapted.encoded_texts().items():  # text encoders may have been adapted, too
        for place in range(len(manifest.sizes)):
            data[f"condition.{place}.{name.removeprefix('condition.0.')}"] = encoded
    latents = adapted.short_runs(data)
    for name, found in latents.items():
        if not torch.isfinite(found).all():
            raise AdapterError(
                f"with these weights the engines make latents that are not finite ({shown(name)}); give a smaller "
                "scale, or an adapter of this model"
            )
    data |= latents
    files = dict(manifest.files)
    name, _ = _stored(fresh, "self-test", data | adapted.pictures_of(data), files)
    made = msgspec.structs.replace(manifest, files=dict(sorted(files.items())), self_test=name)
    compared = {target: 0.0}
    for other in manifest.targets:
        if other == target:
            continue
        try:
            tested = Bundle(fresh, other, manifest=made).tested()
        except TargetError as error:
            told(f"{other}: not compared: {shown(error)}")
            continue
        compared[other] = tested.latents
        told(f"{other}: beside those of {target}, a short run's {tested.told}")
        if not tested.passed:
            raise AdapterError(
                f"with these weights the engines of {other} make something else than those of {target}: their "
                f"{tested.told}; give a smaller scale, or put the adapter into the pipeline and export it"
            )
    return msgspec.structs.replace(made, compared=compared)


def _moved_onnx(content: bytes, engine: Engine, file: str, places: Mapping[str, Place]) -> bytes:
    """An ONNX model whose tensors lie in another file, or elsewhere in it; nothing else of it changes."""
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError(
            "ONNX engines are told of other weights with onnx, which is not installed; pip install onnx, or "
            "difa-compile[export]"
        ) from error
    model = onnx.load_model_from_string(content)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = places[engine.weights[tensor.name]]
            entries = {"location": file, "offset": str(place.offset), "length": str(place.length)}
            for entry in tensor.external_data:
                if entry.key in entries:
                    entry.value = entries[entry.key]
    moved: bytes = model.SerializeToString(deterministic=True)
    return moved


MOVED: dict[str, Callable[[bytes, Engine, str, Mapping[str, Place]], bytes] | None] = {
    "onnx": _moved_onnx,
    "aoti": None,
    "tensorrt": None,
}
"""By target how an engine learns of another file of weights; None if it is handed them by name."""
