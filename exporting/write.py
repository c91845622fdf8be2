"""Exporting a pipeline with its plans: from a pipeline in memory to a bundle on the disk.

    export(pipe, {"fast": plan}, "digits/", inputs={"class_labels": [3]}, steps=[20, 50])

What is long is kept (:mod:`difa_compile.exporting.pieces`): an export which was interrupted, or is repeated with more
tiers, makes only the engines that are missing. Files are named by their content and the manifest is written last, so
that the folder holds a whole bundle at any time: the old one, then the new one.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import inspect
import json
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import UNSET
from torch import Tensor, nn

from difa_compile.bundle.manifest import (
    DECODES,
    ENCODES,
    MANIFEST,
    Decode,
    Engine,
    EngineCall,
    File,
    Library,
    Manifest,
    Port,
    Prompts,
    Schedule,
    Size,
    Slot,
    Source,
)
from difa_compile.bundle.program import Program
from difa_compile.bundle.runner import Bundle, seeded
from difa_compile.bundle.sessions import ELSEWHERE
from difa_compile.bundle.tensorrt import library
from difa_compile.bundle.weights import Place, write_weights
from difa_compile.errors import (
    AfterLoopError,
    BeforeLoopError,
    BundleInputError,
    DifaError,
    ExportError,
    KernelBuildError,
    OutputError,
    TargetError,
)
from difa_compile.exporting import engines as engines_module
from difa_compile.exporting.after_loop import after_loop, first_result, in_bytes
from difa_compile.exporting.before_loop import BeforeLoop, before_loop
from difa_compile.exporting.buckets import EngineCall as PlannedCall
from difa_compile.exporting.buckets import EngineRow, Limited, engines_for, limited
from difa_compile.exporting.buckets import Schedule as PlannedSchedule
from difa_compile.exporting.captured import CapturedCall, captured, more_images, owned_names, progress_of
from difa_compile.exporting.engines import IMAGES, held_tensors
from difa_compile.exporting.lowered import Piece
from difa_compile.exporting.origin import CARD, origin_of
from difa_compile.exporting.pieces import UNWRITABLE, Draft, Made, Pieces, Told, digest_of, form_of
from difa_compile.exporting.probing import Probed, probe
from difa_compile.exporting.targets import TARGETS, target_of
from difa_compile.exporting.targets.tensorrt import capabilities
from difa_compile.exporting.watching import first_tensor
from difa_compile.files.writing import check_writable, write_whole
from difa_compile.passes.prepare.arguments import input_name
from difa_compile.pipeline.apply import apply, remove
from difa_compile.pipeline.transformers import find_transformers
from difa_compile.plan.data import model_digest
from difa_compile.plan.plan import Plan
from difa_compile.plugins.cpu import build
from difa_compile.wording import quoted, shown

OURS = re.compile(
    r"(row-[0-9]+(-[0-9]+)?|decode(-[0-9]+x[0-9]+)?(-[0-9]+)?|encode(-uncond)?|kernel|weights|self-test)-[0-9a-f]{12}"
    r"\.(onnx|pt2|plan|so|safetensors)|(plans|programs|tokenizers)/[\w.-]+-[0-9a-f]{12}\.json"
    r"|about/[\w.-]+-[0-9a-f]{12}(\.\w+)?"
    r"|((about|plans|programs|tokenizers)/)?\.(difa-[0-9a-f]+|weights|self-test)\.tmp"
)
"""Names that exports give: nothing else in their folder is theirs to delete."""
COMPARED = (1, 2, 3)
"""Numbers of images at which a model is captured, to see what grows with them."""
TEST_SEED = 0
OPEN = ("onnx",)
"""Targets whose engines may hold tensors of a size that only values determine."""


@dataclass(frozen=True)
class Exported:
    """What came of an export. ``engines``: how many rows of roles. ``made``: how many engines were built now, and
    ``kept``: how many were there. ``bytes``: of the whole folder. ``cost``: what all steps cost with the limit on
    engines, as a share of what they cost without, at the size where that is most, in ``weighed``: ``"predicted time"``
    or ``"operations"``."""

    folder: Path
    manifest: Manifest
    engines: int
    made: int
    kept: int
    bytes: int
    cost: float
    weighed: str


def export(
    pipe: Any,
    plans: Plan | Mapping[str, Plan],
    out: str | Path,
    *,
    inputs: Mapping[str, Any],
    steps: Sequence[int],
    targets: Sequence[str] = ("onnx",),
    sizes: Sequence[tuple[int, int]] = (),
    most_images: int = 8,
    usual_images: int | None = None,
    max_engines: int | None = None,
    portable: bool = False,
    gpus: Sequence[str] = (),
    name: str = "",
    told: Told = lambda text: None,
) -> Exported:
    """Write a bundle of ``pipe`` with its plans into the folder ``out``.

    ``plans``: by tier (``"fast"``, ``"balanced"``); one alone is the tier ``"planned"``. ``inputs``: arguments of a
    call of the pipeline that makes one image, its size and guidance among them. ``steps``: the numbers of steps that
    callers will be able to choose. ``targets``: of ``"onnx"``, ``"aoti"``, ``"tensorrt"``. ``sizes``: heights and
    widths of images in pixels that callers will be able to choose, each with engines of its own; by default that of
    ``inputs``. Windows of plans made at another size grow with the image. ``most_images``: per call; engines serve any
    number up to it where the model's graph allows. ``usual_images``: the number that TensorRT's engines are to be
    quickest for, by default half the most. ``max_engines``: rows of the plans are merged until so many engines
    run them all at each size, which makes them compute more (:mod:`difa_compile.exporting.merging`). ``portable``:
    AOTInductor for more than this processor. ``gpus``: for tensorrt the compute capabilities to build for,
    ``["8.9"]``; by default all that TensorRT-RTX serves, and with TensorRT the GPU that is here. ``told`` is given a
    line for each thing that is done.

    Raises :class:`BundleInputError` for arguments that make no sense, :class:`ExportError` and its subclasses,
    :class:`SamplingLoopError` for a sampling loop that cannot be written down, :class:`TargetError` for a target that
    is not installed, :class:`OutputError`, and what :func:`difa_compile.apply` raises.
    """
    given = {"planned": plans} if isinstance(plans, Plan) else dict(plans)
    check_request(given, steps, targets, most_images, usual_images, gpus, portable)
    folder = check_writable(out)
    with _alone(folder), _writing(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*treespec.*", FutureWarning)  # of torch's exporter, about itself
        return _Exporting(
            pipe, given, folder, _sized(pipe, inputs, sizes), "fraction" if sizes else None,
            tuple(dict.fromkeys(steps)), tuple(dict.fromkeys(targets)), most_images, max_engines,
            Made(usual_images, portable, tuple(dict.fromkeys(gpus))), name, told,
        ).exported()  # fmt: skip


def check_request(
    plans: Mapping[str, Plan],
    steps: Sequence[int],
    targets: Sequence[str],
    most_images: int,
    usual_images: int | None = None,
    gpus: Sequence[str] = (),
    portable: bool = False,
) -> None:
    """Raise :class:`BundleInputError` for arguments of :func:`export` that make no sense, and
    :class:`TargetError` for engines that cannot be made here: before the work, not after."""
    for tier in plans:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,60}", tier, re.ASCII):
            raise BundleInputError(f"the tier {quoted(tier)} is no name; use letters, digits, points and dashes")
    if not plans or not steps or not targets:
        raise BundleInputError("an export needs at least one plan, one number of steps and one target")
    for target in targets:
        if target not in TARGETS:
            raise BundleInputError(f"the target {quoted(target)} is unknown; known are {', '.join(TARGETS)}")
    for count in (*steps, most_images, most_images if usual_images is None else usual_images):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise BundleInputError(f"{quoted(count)} is no number of steps or images; give whole numbers from 1 on")
    if usual_images is not None and usual_images > most_images:
        raise BundleInputError(f"{usual_images} images are not usual where {most_images} are the most")
    if "tensorrt" in targets:
        capabilities(library(), gpus)
    elif gpus:
        raise BundleInputError(
            f"gpus are {quoted(tuple(gpus))}, which engines of the target tensorrt alone are built for"
        )
    for target in targets:
        target_of(target).check(portable)


def _sized(
    pipe: Any, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], dict[str, Any]]:
    """By height and width (0, 0 where the pipeline is told none) the arguments of a call."""
    names = ("height", "width")
    if not sizes:
        height, width = (inputs.get(name) for name in names)
        return {(height, width) if height and width else (0, 0): dict(inputs)}
    for size in sizes:
        if len(size) != 2 or any(isinstance(each, bool) or not isinstance(each, int) or each < 1 for each in size):
            raise BundleInputError(f"{quoted(size)} is no height and width; give two whole numbers of pixels")
    parameters = inspect.signature(type(pipe).__call__).parameters
    if not parameters.keys() >= set(names):
        raise BundleInputError(f"{type(pipe).__name__} makes images of one size alone; leave the sizes out")
    return {(height, width): {**inputs, "height": height, "width": width} for height, width in sizes}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder for this export; another one is told so. The lock goes with its process."""
    path = folder / ".lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise OutputError(f"the folder {shown(folder)} cannot be written to: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ExportError(
                f"another export is writing into {shown(folder)}; wait for it, or name another folder"
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What a disk has against being written to in mid-export as an :class:`OutputError`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DifaError) or error.errno not in UNWRITABLE:
            raise
        where = "" if error.filename is None else f" ({shown(error.filename, 200)})"
        raise OutputError(
            f"the export into {shown(folder)} was stopped: {error.strerror}{where}; a bundle that was there is whole, "
            "and the engines that are done are kept: mend that, and export again"
        ) from error


@dataclass(frozen=True)
class _Part:
    """What is exported of one size of images. ``first``: number of its first row. ``schedules``: by tier and steps.
    ``fixed``: conditions that are the same for all calls, by their names in the file of weights."""

    size: Size
    inputs: dict[str, Any]
    first: int
    limited: Limited
    schedules: Mapping[tuple[str, int], PlannedSchedule]
    probed: Mapping[int, Probed]
    calls: Sequence[CapturedCall]
    pieces: Sequence[Piece]
    fixed: Mapping[str, Tensor]

    @property
    def rows(self) -> tuple[EngineRow, ...]:
        return self.limited.buckets.rows


@dataclass
class _Exporting:
    """One export, from the arguments of :func:`export`."""

    pipe: Any
    plans: Mapping[str, Plan]
    folder: Path
    sizes: dict[tuple[int, int], dict[str, Any]]
    resize: str | None
    steps: tuple[int, ...]
    targets: tuple[str, ...]
    most_images: int
    max_engines: int | None
    how: Made
    name: str
    told: Told

    def __post_init__(self) -> None:
        self.own: dict[str, Tensor] = {}
        first_names: dict[str, str] = {}
        for name, component in self.pipe.components.items():
            if isinstance(component, nn.Module):
                first = owned_names(component)
                named = (component.named_parameters, component.named_buffers)
                for fqn, tensor in (pair for each in named for pair in each(remove_duplicate=False)):
                    self.own[f"{name}.{fqn}"] = tensor
                    first_names[f"{name}.{fqn}"] = f"{name}.{first[id(tensor)]}"
        self.models = {self._component(model): model for model in find_transformers(self.pipe)}
        self.pieces = Pieces(self.folder, first_names, self.how, self.told)

    def _component(self, model: nn.Module) -> str:
        return str(next(name for name, value in self.pipe.components.items() if value is model))

    # --- all of it ---------------------------------------------------------------------------------------------------

    def exported(self) -> Exported:
        parts: list[_Part] = []
        for place, ((height, width), inputs) in enumerate(self.sizes.items()):
            if len(self.sizes) > 1:
                self.told(f"images of {height}x{width}")
            parts.append(self._part(place, Size(height, width), inputs, sum(len(part.rows) for part in parts)))
        prompts, tokenizers, encoding = self._prompts(parts)
        manifest = self._written(parts, prompts, tokenizers, encoding)
        manifest = msgspec.structs.replace(manifest, compared=self._compare(manifest))
        write_whole(self.folder / MANIFEST, json.dumps(manifest.to_json(), indent=1) + "\n", "the manifest")
        self._clean(manifest)
        dearest = max((part.limited for part in parts), key=lambda each: each.after / each.before if each.before else 1)
        return Exported(
            self.folder,
            manifest,
            sum(len(part.rows) for part in parts),
            self.pieces.made,
            self.pieces.kept,
            sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()),
            dearest.after / dearest.before if dearest.before else 1.0,
            dearest.weighed,
        )

    def _part(self, place: int, size: Size, inputs: dict[str, Any], first: int) -> _Part:
        """All that is exported of one size: the ``place``-th. ``first``: number of its first row."""
        calls = self._captured(inputs)
        capture = calls[1][0].capture
        plans = {tier: capture.carried_over(plan, self.resize) for tier, plan in self.plans.items()}
        probed = {steps: self._probed(inputs, steps) for steps in self.steps}
        keys = [(tier, steps) for tier in plans for steps in self.steps]
        planned = [
            PlannedSchedule(plans[tier], progress_of(self.pipe, inputs, steps), self._order(probed[steps]))
            for tier, steps in keys
        ]
        found = limited(calls[1], planned, self.max_engines)
        rows = found.buckets.rows
        self.told(f"{len(rows)} engines for {', '.join(f'{tier} at {steps} steps' for tier, steps in keys)}")
        pieces = [piece for i, row in enumerate(rows) for piece in self._row(first + i, row, calls)]
        shape, decoding = self._decode(inputs, probed[self.steps[0]], DECODES - place, size.name)
        conditions, fixed = _fixed(next(iter(probed.values())), place)
        asked, held = _asked(calls[1], next(iter(probed.values())), place, self._component)
        decode = None if shape is None else Decode(DECODES - place, shape)
        return _Part(
            Size(size.height, size.width, conditions, decode, asked, _layouts(calls[1])), inputs, first, found,
            dict(zip(keys, found.schedules, strict=True)), probed, calls[1], [*pieces, *decoding], fixed | held,
        )  # fmt: skip

    def _captured(self, inputs: Mapping[str, Any]) -> dict[int, tuple[CapturedCall, ...]]:
        """Calls of the transformers for several numbers of images."""
        plan = next(iter(self.plans.values()))
        found = {1: captured(self.pipe, inputs, plan, resize=self.resize)}
        if found[1][0].images != 1:
            raise BundleInputError(
                f"the inputs make {found[1][0].images} images; give those of a call that makes one: engines for more "
                "follow from most_images"
            )
        for count in COMPARED[1:]:
            if count <= self.most_images:
                found[count] = captured(self.pipe, more_images(self.pipe, inputs, count), plan, resize=self.resize)
        return found

    def _probed(self, inputs: Mapping[str, Any], steps: int) -> Probed:
        count = min(2, self.most_images)
        found = probe(self.pipe, more_images(self.pipe, inputs, count) if count > 1 else inputs, steps)
        self.told(
            f"the sampling loop of {steps} steps: {len(found.program.calls)} calls, off by {found.program.error:.1e}"
        )
        return found

    def _order(self, probed: Probed) -> tuple[tuple[tuple[int, str | None], ...], ...]:
        """By step the transformers and branches that the pipeline calls."""
        program, names = probed.program, list(self.models)
        calls: list[list[tuple[int, str | None]]] = [[] for _ in range(program.steps)]
        for call in program.calls:
            form = program.forms[call.form]
            calls[call.step].append((names.index(form.model), form.branch))
        return tuple(map(tuple, calls))

    # --- engines -----------------------------------------------------------------------------------------------------

    def _row(self, number: int, row: EngineRow, calls: Mapping[int, Sequence[CapturedCall]]) -> list[Piece]:
        """The engines of a row of roles, for every target."""
        of_row = [each[row.call] for each in calls.values()]
        first = of_row[0]
        model = first.capture.model
        others = [target for target in self.targets if target not in OPEN]
        if model.questions.program is not None and others:
            raise TargetError(
                f"the sizes of {type(first.model).__name__}'s graph depend on values of its inputs (how many tokens a "
                f"mask shows), which engines of {', '.join(others)} cannot hold; export it for {', '.join(OPEN)} alone"
            )
        component = self._component(first.model)
        described = {
            "component": component,
            "branch": first.branch,
            "graph": hashlib.sha256(model.module.code.encode()).hexdigest(),
            "context": str(model.context),
            "layouts": [str(unit.info.layout) for unit in model.units],
            "model": model_digest(first.model).config_digest,
            "roles": [[str(role), *map(str, role.head_reads)] for role in row.roles],
            "calls": [[form_of(value) for value in call.args] for call in of_row],
            "values": [digest_of(held_tensors(call)) for call in of_row],
            "images": self.most_images,
        }

        @functools.cache
        def drafts() -> list[Draft]:
            engines = engines_for(row, list(calls.values()), self.most_images)
            if (most := max(each.images[1] for each in engines)) < self.most_images:
                self.told(
                    f"row-{number:02d} serves up to {most} images a call, not {self.most_images}: "
                    f"{engines[-1].why_static}"
                )
            return [
                Draft(
                    f"row-{number:02d}" + (f"-{each.images[1]}" if len(engines) > 1 else ""),
                    each.program, tuple(each.constants), tuple(map(_port, each.inputs)),
                    tuple(map(_port, each.outputs)), each.images, each.why_static, component,
                )
                for each in engines
            ]  # fmt: skip

        return [piece for target in self.targets for piece in self.pieces.of(target, number, described, drafts)]

    def _decode(
        self, inputs: Mapping[str, Any], probed: Probed, row: int, size: str
    ) -> tuple[tuple[int, ...] | None, list[Piece]]:
        """The shape of a picture, and the engines of what comes after the loop."""
        program = probed.program
        try:
            ranges: list[Any] = []
            if self.most_images > 1:
                ranges.append(after_loop(self.pipe, more_images(self.pipe, inputs, 2), program, 2, as_bytes=True))
            if not ranges or ranges[0].least > 1:
                ranges.append(after_loop(self.pipe, inputs, program, 1, as_bytes=True))
        except AfterLoopError as error:
            self.told(f"latents are not decoded in the bundle: {error}")
            return None, []
        found: list[Piece] = []
        for each in ranges:
            serves = (each.least, min(each.most or self.most_images, self.most_images))
            images: int | str = IMAGES if serves[0] < serves[1] or each.most is None else serves[0]
            label = "decode" + (f"-{size}" if len(self.sizes) > 1 else "") + (f"-{serves[1]}" * (len(ranges) > 1))
            latents = Port("latents", "float32", (images, *program.shape))
            pictures = Port("images", _name(each.dtype), (images, *each.shape))
            draft = Draft(label, each.program, tuple(each.constants), (latents,), (pictures,), serves)
            found += self._one(draft, row)
        return tuple(ranges[0].shape), found

    def _one(self, draft: Draft, row: int) -> list[Piece]:
        """An engine that is no row of roles, for every target."""
        described = draft.described()
        found = (self.pieces.of(target, row, described, lambda: [draft]) for target in self.targets)
        return [piece for each in found for piece in each]

    def _prompts(self, parts: Sequence[_Part]) -> tuple[Prompts | None, Mapping[str, bytes], list[Piece]]:
        """The engines of what comes before the loop, the same for all sizes: of text encoders."""
        if "prompt" not in inspect.signature(type(self.pipe).__call__).parameters:
            return None, {}, []
        try:
            part = parts[0]
            if asking := [
                each for part in parts for each in part.calls if each.capture.model.questions.program is not None
            ]:
                raise BeforeLoopError(
                    f"the sizes of {type(asking[0].model).__name__}'s graph depend on values of its inputs (how many "
                    "tokens a mask shows), and its engines are for those of the export's prompt"
                )
            before = before_loop(self.pipe, part.inputs, part.probed[self.steps[0]].program)
            self._check_at_all_sizes(before, parts)
            return before.prompts, before.tokenizers, self._encoders(before)
        except BeforeLoopError as error:  # embeddings can be given all the same
            self.told(f"the bundle is given embeddings, not prompts: {shown(error, 600)}")
            return None, {}, []

    def _check_at_all_sizes(self, before: BeforeLoop, parts: Sequence[_Part]) -> None:
        """Raise :class:`BeforeLoopError` if what prompts are encoded to depends on the size of the images."""
        first, *others = (part.probed[self.steps[0]].conditioning for part in parts)
        for encoder in before.prompts.encoders:
            encoding = next(each for each in before.encodings if ENCODES[each.half] == encoder.row)
            for name in encoding.outputs:
                given = [each[encoder.half][name] for each in (first, *others)]
                if not all(torch.equal(given[0], each) for each in given):
                    raise BeforeLoopError(f"{name}, which follows the prompt, depends on the size of the images, too")

    def _encoders(self, before: BeforeLoop) -> list[Piece]:
        found: list[Piece] = []
        for each in before.encodings:
            row = ENCODES[each.half]
            label = "encode" if row == ENCODES["cond"] else f"encode-{each.half}"
            inputs, outputs = (
                tuple(Port(name, _name(value.dtype), tuple(value.shape)) for name, value in ports)
                for ports in (each.inputs.items(), each.outputs.items())
            )
            why = "a prompt is encoded by itself, once for all its images"
            draft = Draft(label, each.program, tuple(each.constants), inputs, outputs, (1, 1), why)
            try:
                found += self._one(draft, row)
            except TargetError as error:
                raise BeforeLoopError(f"a text encoder is refused: {shown(error, 500)}") from error
        return found

    # --- files -------------------------------------------------------------------------------------------------------

    def _written(
        self,
        parts: Sequence[_Part],
        prompts: Prompts | None,
        tokenizers: Mapping[str, bytes],
        encoding: Sequence[Piece],
    ) -> Manifest:
        """Write everything but the manifest, which makes a bundle of it."""
        files: dict[str, File] = {}
        pieces = [piece for part in parts for piece in part.pieces] + [*encoding]
        fixed = {name: tensor for part in parts for name, tensor in part.fixed.items()}
        weights, places = self._weights(pieces, fixed, files)
        library = self._library(files) if any(piece.lowered.kernel for piece in pieces) else None
        engines = []
        for piece in pieces:
            own = {name: places[stored] for name, stored in piece.lowered.weights.items()}
            content = target_of(piece.target).finished(piece.lowered.file, weights, own)
            name = f"{piece.label}-{_digest(content)[:12]}{piece.lowered.file.suffix}"
            self._write(name, content, files)
            engines.append(
                Engine(
                    piece.target, name, piece.row, piece.images, piece.inputs, piece.outputs, piece.lowered.weights,
                    piece.lowered.instruction_set, piece.lowered.kernel, piece.lowered.versions, piece.why_static,
                    piece.key, piece.lowered.memory, piece.lowered.unchecked, library if piece.lowered.kernel else None,
                )
            )  # fmt: skip
        plans = {}
        for tier, plan in self.plans.items():
            content = plan.to_json().encode()
            plans[tier] = f"plans/{tier}-{_digest(content)[:12]}.json"
            self._write(plans[tier], content, files)
        slots: list[Slot] = []
        schedules: list[Schedule] = []
        for place, part in enumerate(parts):
            programs = {}
            for steps, each in part.probed.items():
                content = json.dumps(each.program.to_json()).encode()
                programs[steps] = f"programs/{steps}-{_digest(content)[:12]}.json"
                self._write(programs[steps], content, files)
            for (tier, steps), course in zip(part.schedules, part.limited.buckets.courses, strict=True):
                calls = tuple(_call(call, part.first, len(slots)) for call in course)
                schedules.append(Schedule(tier, steps, programs[steps], calls, place))
            slots += [
                Slot(str(slot.dtype).removeprefix("torch."), tuple(slot.shape)) for slot in part.limited.buckets.slots
            ]
        for name, content in tokenizers.items():
            self._write(name, content, files)
        self_test = self._self_test(parts, files)
        manifest = Manifest(
            made_with=_made_with(),
            source=self._source(files),
            files=dict(sorted(files.items())),
            weights=weights,
            engines=tuple(engines),
            slots=tuple(slots),
            schedules=tuple(schedules),
            sizes=tuple(part.size for part in parts),
            plans=plans,
            self_test=self_test,
            prompts=prompts,
        )
        return Manifest.from_json(json.dumps(manifest.to_json(), allow_nan=False), "that was made")

    def _library(self, files: dict[str, File]) -> Library:
        """Write our CPU kernel, which engines call. Raises :class:`TargetError`."""
        try:
            file, needs = build.for_bundle(self.how.portable)
        except KernelBuildError as error:
            raise TargetError(
                f"AOTInductor engines with windows need our kernel for local attention: {error}"
            ) from error
        content = file.read_bytes()
        name = f"kernel-{_digest(content)[:12]}.so"
        self._write(name, content, files)
        self.told(f"kernel: {name}, for processors with {needs or 'nothing in particular'}")
        return Library(name, needs)

    def _weights(
        self, pieces: Sequence[Piece], fixed: Mapping[str, Tensor], files: dict[str, File]
    ) -> tuple[str, Mapping[str, Place]]:
        """Write the file of weights: what any engine reads, each once, and conditions that are always the same. Its
        name, and where tensors lie in it."""
        tables = {name: tensor for piece in pieces for name, tensor in piece.lowered.tables.items()}
        read = {stored for piece in pieces for stored in piece.lowered.weights.values()}
        missing = sorted(name for name in read if name not in self.own and name not in tables)
        if missing:
            raise ExportError(
                f"engines read {quoted(missing[0])}, which is no parameter of the pipeline's components "
                f"({', '.join(self.models)}); this is a fault of difa-compile: please report the model"
            )
        tensors = {name: tables[name] if name in tables else self.own[name] for name in read} | dict(fixed)
        name, places = self._tensors("weights", tensors, files)
        self.told(f"weights: {len(tensors)} tensors, {files[name].bytes / 2**20:.1f} MiB")
        return name, places

    def _tensors(
        self, label: str, tensors: Mapping[str, Tensor], files: dict[str, File]
    ) -> tuple[str, Mapping[str, Place]]:
        """Write a file of tensors, named by its content."""
        fresh = self.folder / f".{label}.tmp"
        try:
            places = write_weights(fresh, tensors)
            with fresh.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            name = f"{label}-{digest[:12]}.safetensors"
            files[name] = File(fresh.stat().st_size, digest)
            os.replace(fresh, self.folder / name)
        finally:
            fresh.unlink(missing_ok=True)
        return name, places

    def _write(self, name: str, content: bytes, files: dict[str, File]) -> None:
        write_whole(self.folder / name, content, f"{name} of the bundle")
        files[name] = File(len(content), hashlib.sha256(content).hexdigest())

    def _self_test(self, parts: Sequence[_Part], files: dict[str, File]) -> str:
        """Latents that the pipeline itself makes with the plans applied, of the fewest steps of each tier, and the
        first tier's decoded; a file."""
        fewest = min(self.steps)
        tensors = {"seed": torch.tensor(TEST_SEED)}
        for place, part in enumerate(parts):
            program = part.probed[fewest].program
            batched = {each.argument.name: each.argument.batched for form in program.forms for each in form.conditions}
            for half, values in part.probed[fewest].conditioning.items():
                for name, value in values.items():
                    tensors[f"condition.{place}.{half}.{name}"] = value[:1] if batched.get(name) else value
            for number, tier in enumerate(self.plans):
                plan, pictured = part.schedules[tier, fewest].plan, not number and part.size.decode is not None
                output = "pt" if pictured else "latent"
                latents, result = run_of(self.pipe, part.inputs, plan, fewest, program, output=output)
                tensors[f"latents.{place}.{tier}.{fewest}"] = latents[-1].clone()
                if pictured:
                    tensors[f"images.{place}.{tier}.{fewest}"] = in_bytes(result)
        name, _ = self._tensors("self-test", tensors, files)
        return name

    def _compare(self, manifest: Manifest) -> dict[str, float]:
        """Make the short run on each target: what is exported is compared with the pipeline. By target how far it is
        off; those that cannot run here are not among them, which is told. Raises :class:`ExportError`."""
        found = {}
        for target in manifest.targets:
            try:
                tested = Bundle(self.folder.absolute(), target, manifest=manifest).tested()
            except TargetError as error:
                here = [engine for engine in manifest.engines if engine.target == target]
                if target not in ELSEWHERE and not any(engine.unchecked for engine in here):
                    raise
                self.told(f"{target}: not compared with the pipeline: {error}")
                continue
            self.told(f"{target}: beside the pipeline's, a short run's {tested.told}")
            if not tested.passed:
                raise ExportError(
                    f"the bundle's engines of {target} do not make what the pipeline makes: their {tested.told}; this "
                    f"is a fault of difa-compile or of {target}: please report it"
                )
            found[target] = tested.latents
        return found

    def _source(self, files: dict[str, File]) -> Source:
        """Where the model comes from; its card and licences are written."""
        model = next(iter(self.models.values()))
        digest = model_digest(model)
        name = self.name or str(getattr(self.pipe, "name_or_path", "") or "")
        if Path(name).is_absolute():
            name = Path(name).name  # where it lay on this machine is nobody's business
        origin = origin_of(self.pipe, self.told)
        card = self._about(CARD, origin.card, files) if origin.card is not None else ""
        notices = tuple(self._about(each, content, files) for each, content in origin.notices.items())
        self.told(f"licence: {origin.licence or 'not known'}, {len(notices) + bool(card)} files of it")
        return Source(
            type(self.pipe).__name__, name, digest.class_name, digest.config_digest, origin.licence, card,
            notices or UNSET,
        )  # fmt: skip

    def _about(self, name: str, content: bytes, files: dict[str, File]) -> str:
        """Write a card or licence, under a name by its own and its content, which it returns."""
        path = Path(re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100])
        ending = path.suffix if re.fullmatch(r"\.\w{1,8}", path.suffix) else ""
        written = f"about/{path.name.removesuffix(ending)}-{_digest(content)[:12]}{ending}"
        self._write(written, content, files)
        return written

    def _clean(self, manifest: Manifest) -> None:
        """Delete what earlier exports and interrupted ones have left."""
        self.pieces.clear()
        named = {MANIFEST, *manifest.files}
        mine = [path for path in self.folder.rglob("*") if OURS.fullmatch(path.relative_to(self.folder).as_posix())]
        for path in mine:
            if path.is_file() and path.relative_to(self.folder).as_posix() not in named:
                path.unlink(missing_ok=True)


def _call(call: PlannedCall, row: int, slot: int) -> EngineCall:
    """As it stands in the manifest, its rows and slots counted from these on."""
    return EngineCall(
        row + call.engine,
        {str(name): slot + place for name, place in call.reads},
        {str(name): None if place is None else slot + place for name, place in call.writes},
        {str(name): numbers for name, numbers in call.weights},
    )


def _fixed(probed: Probed, size: int) -> tuple[dict[str, dict[str, str]], dict[str, Tensor]]:
    """Conditions that do not change with the prompt and are too large to stand in the program (positions, an empty
    negative prompt): by half and name the tensor's name in the file of weights, and the tensors, one row each."""
    names: dict[str, dict[str, str]] = {}
    tensors: dict[str, Tensor] = {}
    for form in probed.program.forms:
        for condition in form.conditions:
            argument = condition.argument
            for row in condition.rows:
                given = probed.conditioning.get(row.half, {})
                if row.fixed and row.numbers is None and argument.name in given:
                    stored = f"condition.{size}.{row.half}.{argument.name}"
                    names.setdefault(row.half, {})[argument.name] = stored
                    value = given[argument.name]
                    tensors[stored] = (value[:1] if argument.batched else value).detach().clone()
    return names, tensors


def _layouts(calls: Sequence[CapturedCall]) -> tuple[str, ...]:
    """Of the tokens in attention, as text, each once."""
    infos = [unit.info for call in calls for unit in call.capture.model.units]
    return tuple(dict.fromkeys(str(info.layout) for info in infos if info.layout is not None))


def _asked(
    calls: Sequence[CapturedCall], probed: Probed, size: int, component: Callable[[nn.Module], str]
) -> tuple[dict[str, dict[str, str]], dict[str, Tensor]]:
    """Conditions whose values the captured graphs follow from (questions, and positions of tokens): by half and name
    the tensor's name in the file of weights, and the tensors, one row each.

    Raises :class:`ExportError` where it is something else that a graph follows from.
    """
    names: dict[str, dict[str, str]] = {}
    tensors: dict[str, Tensor] = {}
    for call in calls:
        model, owned = call.capture.model, owned_names(call.model)
        placeholders = model.module.graph.find_nodes(op="placeholder")
        form = next(
            each for each in probed.program.forms if (each.model, each.branch) == (component(call.model), call.branch)
        )
        conditions = {each.argument.name: each for each in form.conditions}
        for i in sorted({*model.questions.positions, *model.positions.inputs}):
            name = input_name(placeholders[i])
            if name in conditions:
                for row in conditions[name].rows:
                    value = probed.conditioning[row.half][name]
                    stored = names.setdefault(row.half, {})[name] = f"asked.{size}.{row.half}.{name}"
                    tensors[stored] = (value[:1] if conditions[name].argument.batched else value).detach().clone()
            elif name in {form.sample.name, *(each.name for each in form.values)} and id(call.args[i]) not in owned:
                raise ExportError(
                    f"the graph of {type(call.model).__name__} follows from values of {quoted(name)}, which change "
                    "from call to call, so that no engine holds for a whole run; it cannot be exported"
                )
    return names, tensors


def latents_of(
    pipe: Any, inputs: Mapping[str, Any], plan: Plan, steps: int, program: Program, inner: str = "eager"
) -> list[Tensor]:
    """The latents (images, *shape) after each step of a call of the pipeline with a plan, with the noise of the
    self-tests' seed. ``inner``: what compiles its graphs, as of :func:`difa_compile.apply`."""
    return run_of(pipe, inputs, plan, steps, program, inner)[0]


def run_of(
    pipe: Any,
    inputs: Mapping[str, Any],
    plan: Plan,
    steps: int,
    program: Program,
    inner: str = "eager",
    output: str = "latent",
) -> tuple[list[Tensor], Any]:
    """:func:`latents_of`, and what the pipeline returns its images in. ``output``: the type that it is asked for, where
    it can be: ``"latent"``, by default, for which nothing is decoded, or ``"pt"``."""
    found: list[Tensor] = []
    apply(pipe, plan, inner=inner)
    scheduler = pipe.scheduler
    plainly = scheduler.step

    def step(*arguments: Any, **options: Any) -> Any:
        made = plainly(*arguments, **options)
        found.append(first_tensor(made, "prev_sample").clone())
        return made

    scheduler.step = step
    try:
        generator = torch.Generator().manual_seed(TEST_SEED)
        with torch.no_grad(), seeded(TEST_SEED):
            asked = (
                {"output_type": output} if "output_type" in inspect.signature(type(pipe).__call__).parameters else {}
            )
            made = pipe(**{**inputs, **asked, "num_inference_steps": steps, "generator": generator})
    finally:
        del scheduler.step
        remove(pipe)
    (term, *_) = program.final
    groups = program.operations[term.value].groups
    rows = len(found[0]) // groups
    latents = [
        each[term.group * rows : (term.group + 1) * rows].float().reshape(rows, *program.shape) for each in found
    ]
    return latents, first_result(made)


def _port(port: engines_module.Port) -> Port:
    return Port(port.name, _name(port.dtype), port.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _made_with() -> dict[str, str]:
    import diffusers

    return {
        "difa-compile": metadata.version("difa-compile"),
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
