"""A bundle that is run: called like a pipeline, without diffusers.

bundle = difa_compile.load_bundle("digits/")
images = bundle(class_labels=[3, 8], steps=50, seed=0).images
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difa_compile.bundle.agreement import LEVELS, LIMITS, Tested, coarsest, difference, levels_apart
from difa_compile.bundle.manifest import (
    ENCODES,
    Encoder,
    Engine,
    EngineCall,
    Manifest,
    Port,
    Schedule,
    check_file,
    checked_bytes,
    read_manifest,
    sizes_of,
)
from difa_compile.bundle.program import DTYPES, Call, Condition, Draw, Form, Noise, Program, replay
from difa_compile.bundle.prompts import Texts, default_of, texts_for, texts_of, tokenizer_from, tokens_of
from difa_compile.bundle.sessions import ELSEWHERE, SESSIONS, Session, device_of, open_session
from difa_compile.bundle.tensorrt import on_device
from difa_compile.bundle.weights import WeightFile
from difa_compile.errors import BundleInputError, BundleIntegrityError, ReplayError
from difa_compile.files.documents import parse_json
from difa_compile.wording import quoted, shown

HALVES = ("cond", "uncond")
SEEDS = (-(2**63), 2**64 - 1)
"""The least and the largest that a generator takes."""
ROUGH = frozenset({"tensorrt"})
"""Targets that multiply float32 in a form with float16's digits (TF32) where the GPU can."""
ENCODING = frozenset(ENCODES.values())


@dataclass(frozen=True)
class Sampled:
    """``latents`` (images, *shape), float32; ``images``: pictures (images, height, width, channels) in uint8, None
    where the bundle does not decode."""

    latents: Tensor
    images: Tensor | None


def load_bundle(folder: str | Path, target: str | None = None, *, prepack: bool = False) -> Bundle:
    """Open a bundle. The manifest is checked now, and each file before it is used for the first time.

    ``target``: which engines to run, ``"onnx"``, ``"aoti"`` or ``"tensorrt"``; by default the first that the bundle
    has, TensorRT's only where there is a GPU. ``prepack``: let ONNX Runtime copy weights into its favoured form;
    quicker, and each engine then has weights of its own.

    Raises :class:`BundleFormatError` and its subclasses for what is no bundle, a damaged one, or one of another
    release, and :class:`TargetError`.
    """
    return Bundle(Path(folder).absolute(), target, prepack)


class Bundle:
    """Engines, weights and sampling programs of one model. Several threads may call it; they share everything but
    caches.

    Attributes:
        folder: where it lies.
        manifest: what it says of itself; that of its folder, if none is given.
        target: whose engines are run.
    """

    def __init__(
        self, folder: Path, target: str | None = None, prepack: bool = False, manifest: Manifest | None = None
    ) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder) if manifest is None else manifest
        targets = self.manifest.targets
        if target is None:
            known = [each for each in targets if each in SESSIONS]
            elsewhere = () if torch.cuda.is_available() else ELSEWHERE
            target = next((each for each in known if each not in elsewhere), (known or targets)[0])
        if target not in targets:
            raise BundleInputError(
                f"the bundle {shown(folder)} has no engines for {quoted(target)}; it has them for {', '.join(targets)}"
            )
        self.target = target
        self._device = device_of(target)
        self._prepack = prepack
        self._weights = WeightFile(check_file(folder, self.manifest.weights, self.manifest.files))
        check_names(self.manifest, self._weights)
        self._sessions: dict[str, Session] = {}
        self._programs: dict[str, Program] = {}
        self._tokenizers: dict[str, Any] = {}
        self._lock = threading.Lock()

    @property
    def tiers(self) -> tuple[str, ...]:
        return self.manifest.tiers

    def steps(self, tier: str | None = None) -> tuple[int, ...]:
        """The numbers of steps that a tier (by default the first) was exported for."""
        tier = tier or self.tiers[0]
        return tuple(dict.fromkeys(each.steps for each in self.manifest.schedules if each.tier == tier))

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The heights and widths of images, in pixels, that it was exported for; none where the pipeline was not told
        any."""
        return tuple((size.height, size.width) for size in self.manifest.sizes if size.name)

    # --- sampling ----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        steps: int | None = None,
        tier: str | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        guidance: float | Mapping[str, float] | None = None,
        conditions: Mapping[str, Mapping[str, Tensor]] | None = None,
        images: int | None = None,
        height: int | None = None,
        width: int | None = None,
        callback: Callable[..., bool | None] | None = None,
        preview: bool | int = False,
        decode: bool = True,
        **named: Any,
    ) -> Sampled:
        """Sample images.

        ``prompt``, ``negative_prompt``: texts, one an image, or one for all, where the bundle has the text encoders;
        without a negative prompt it is that of the export. ``named``: what the model is conditioned on, by the name
        that it has for it, one entry an image: ``class_labels=[3, 8]``; also further prompts that the pipeline takes,
        ``prompt_2=...``, which are the prompt where they are not given. ``conditions``: the same by half, ``{"cond":
        {...}, "uncond": {...}}``, where the unconditional half needs something, too, or prompts are embedded elsewhere.
        ``images``: how many, where nothing tells it. ``steps``, ``tier``, ``height`` and ``width`` in pixels: the first
        that were exported by default. ``seed`` or ``generator``: the noise is torch's, number by number what the
        pipeline would draw; a list of generators has one for each image, as in diffusers. ``guidance``: the scale; that
        of the export by default.

        ``callback(step, steps, latents)`` after each step, from 1 on; sampling ends if it returns ``False``. With
        ``preview`` it is ``callback(step, steps, latents, pictures)``: the latents decoded as they are, (images,
        height, width, channels) in uint8, noise and all; ``preview=5`` decodes every fifth step and the last, and gives
        None at the others.

        Raises :class:`BundleInputError` for what was not exported or does not fit, :class:`ReplayError` for conditions
        and scales that the program cannot take, :class:`SamplingCancelledError`, and for prompts
        :class:`MissingDependencyError` without the library ``tokenizers``.
        """
        generators = _generators(seed, generator)
        size = self.size(height, width)
        schedule = self._schedule(tier, steps, size)
        program = self._program(schedule)
        callback = self._previewing(callback, preview, size)
        texts, named = self._texts({"prompt": prompt, "negative_prompt": negative_prompt, **named}, program)
        fixed = self.manifest.sizes[size].conditions
        if images is not None:
            self._check_images(schedule, images)
        conditions = {} if conditions is None else conditions
        _check_given(program, conditions, named)
        encoded, images = self._encoded(program, schedule, fixed, texts, conditions, named, images)
        given, count = self._conditions(program, fixed, encoded, named, images)
        self._check_asked(size, given, count)
        noise = _noise(program, generators, count)
        course = _Course(self, schedule, count)
        latents = replay(
            program, noise, given, course.call, images=count, scales=_scales(program, guidance), callback=callback
        )
        pictured = decode and self.manifest.sizes[size].decode is not None
        return Sampled(latents, self._decoded(latents, size) if pictured else None)

    def _previewing(
        self, callback: Callable[..., bool | None] | None, preview: bool | int, size: int
    ) -> Callable[..., bool | None] | None:
        """The callback, given pictures, too, where there are to be previews."""
        if preview is False:
            return callback
        if not isinstance(preview, int) or preview < 1:
            raise BundleInputError(f"preview is {quoted(preview)}; give True, or after how many steps each, such as 5")
        if callback is None:
            raise BundleInputError("previews are given to a callback, and there is none; give callback=, too")
        if self.manifest.sizes[size].decode is None:
            raise BundleInputError("the bundle has no engine that decodes, so there are no previews; leave preview out")
        given, every = callback, int(preview)

        def previewed(step: int, steps: int, latents: Tensor) -> bool | None:
            pictures = self._decoded(latents, size) if step % every == 0 or step == steps else None
            return given(step, steps, latents, pictures)

        return previewed

    def decode(self, latents: Tensor, *, height: int | None = None, width: int | None = None) -> Tensor:
        """Pictures (images, height, width, channels) in uint8 of final latents (images, *shape).

        ``height``, ``width``: which of the bundle's sizes, in pixels; by default the one whose latents these can be.
        Raises :class:`BundleInputError` where the bundle does not decode, or two sizes have such latents.
        """
        decoding = [place for place, size in enumerate(self.manifest.sizes) if size.decode is not None]
        if not decoding:
            raise BundleInputError("the bundle has no engine that decodes; decode its latents with the pipeline's VAE")
        if height is not None or width is not None:
            return self._decoded(latents, self.size(height, width))
        fitting = [place for place in decoding if self._decoder(latents, place) is not None]
        if len(fitting) > 1:
            names = ", ".join(self.manifest.sizes[place].name for place in fitting)
            raise BundleInputError(
                f"latents of the shape {tuple(latents.shape)} are those of several sizes, {names}; say which by height "
                "and width"
            )
        return self._decoded(latents, fitting[0] if fitting else decoding[0])

    def _decoder(self, latents: Tensor, size: int) -> Engine | None:
        """The engine that decodes latents of a size, all at once or one by one, if these can be such."""
        decode, count = self.manifest.sizes[size].decode, len(latents)
        if decode is None or not count:
            return None
        engine = self._serving(decode.row, count) or self._serving(decode.row, 1)
        fits = engine is not None and tuple(latents.shape[1:]) == sizes_of(engine.inputs[0].shape, 1)[1:]
        return engine if fits else None

    def _decoded(self, latents: Tensor, size: int) -> Tensor:
        engine = self._decoder(latents, size)
        if engine is None:
            raise BundleInputError(f"latents of the shape {tuple(latents.shape)} cannot be decoded by this bundle")
        each = len(latents) if len(latents) <= engine.images[1] else 1
        parts = [part.float().contiguous() for part in latents.split(each)]
        return torch.cat([self._session(engine).run([part], [None], each)[0] for part in parts])

    def self_test(self) -> float:
        """Make the short run that lies in the bundle; the largest difference of its latents from those that the
        pipeline made of the same noise (or what :attr:`Manifest.tested_by` says), relative to the largest of them, and
        of what its prompts are encoded to from what the pipeline's model was given.

        Raises :class:`BundleIntegrityError` for a self-test that is damaged.
        """
        data = self.self_test_data()
        return max(
            difference(found, wanted)
            for found, wanted in _paired({**self.short_runs(data), **self.encoded_texts()}, data)
        )

    def tested(self) -> Tested:
        """The self-test, that of decoding with it (what the pictures of its latents are off by), and what is still
        rounding in the dtypes that the engines compute in. Raises :class:`BundleIntegrityError`."""
        latents, data = self.self_test(), self.self_test_data()
        sampling = self._computed_in({call.row for each in self.manifest.schedules for call in each.calls} | ENCODING)
        decoding = self._computed_in({size.decode.row for size in self.manifest.sizes if size.decode is not None})
        pictures = [levels_apart(found, wanted, decoding) for found, wanted in _paired(self.pictures_of(data), data)]
        return Tested(latents, max(pictures, default=None), LIMITS[sampling], LEVELS[decoding])

    def _computed_in(self, rows: Collection[int]) -> torch.dtype:
        """The dtype that rounds most of what engines of some rows take, give and read."""
        engines = [each for each in self.manifest.engines if each.target == self.target and each.row in rows]
        found = {getattr(torch, port.dtype) for each in engines for port in (*each.inputs, *each.outputs)}
        found |= {self._weights.places[name].dtype for each in engines for name in each.weights.values()}
        coarse = coarsest(found)
        return torch.float16 if self.target in ROUGH and coarse is torch.float32 else coarse

    def self_test_data(self) -> dict[str, Tensor]:
        """Seed, conditions and latents of the short run, and pictures of latents, which bundles that do not decode and
        early ones have none of. Raises :class:`BundleIntegrityError`."""
        file = WeightFile(check_file(self.folder, self.manifest.self_test, self.manifest.files))
        found = {name: file[name] for name in file.places}
        for name, tensor in found.items():
            kind, *parts = name.split(".", 3)
            if not {"seed": not parts and tensor.numel() == 1, "condition": len(parts) == 3,
                    "latents": len(parts) == 3 and bool(tensor.ndim),
                    "images": len(parts) == 3 and tensor.dtype is torch.uint8 and bool(tensor.numel())
                    and ".".join(["latents", *parts]) in found}.get(kind, False):  # fmt: skip
                raise BundleIntegrityError(
                    f"the self-test of the bundle holds {shown(name)}, which it cannot; export again"
                )
        if "seed" not in found:
            raise BundleIntegrityError("the self-test of the bundle holds no seed; export again")
        return found

    def short_runs(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the engines make of ``data``, seed and conditions of a self-test: the latents, by the names that those
        to compare with have in it. Raises :class:`BundleIntegrityError`."""
        latents: dict[str, Tensor] = {}
        for schedule in self.manifest.schedules:
            name = f"latents.{schedule.size}.{schedule.tier}.{schedule.steps}"
            if name not in data:
                continue
            given: dict[str, dict[str, Tensor]] = {}
            prefix = f"condition.{schedule.size}."
            for key in data:
                if key.startswith(prefix):
                    half, argument = key.removeprefix(prefix).split(".", 1)
                    given.setdefault(half, {})[argument] = data[key]
            seed = int(data["seed"])
            size = self.manifest.sizes[schedule.size]
            with seeded(seed):
                latents[name] = self(
                    steps=schedule.steps, tier=schedule.tier, height=size.height or None, width=size.width or None,
                    seed=seed, conditions=given, images=len(data[name]), decode=False,
                ).latents  # fmt: skip
        if not latents:
            raise BundleIntegrityError("the self-test of the bundle holds no run; export again")
        return latents

    def pictures_of(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is decoded of the latents in ``data``, a self-test, wherever it has pictures; by their names there."""
        found = {}
        for schedule in self.manifest.schedules:
            run = f"{schedule.size}.{schedule.tier}.{schedule.steps}"
            if f"images.{run}" in data:
                if self.manifest.sizes[schedule.size].decode is None:
                    raise BundleIntegrityError(
                        "the self-test of the bundle holds pictures, and the bundle does not decode; export again"
                    )
                found[f"images.{run}"] = self._decoded(data[f"latents.{run}"], schedule.size)
        return found

    # --- what there is -----------------------------------------------------------------------------------------------

    def size(self, height: int | None, width: int | None) -> int:
        """The place of a size among those of the manifest; the first, if none is said. Raises
        :class:`BundleInputError` for one that was not exported."""
        if height is None and width is None:
            return 0
        for place, size in enumerate(self.manifest.sizes):
            if size.name and height in (None, size.height) and width in (None, size.width):
                return place
        known = [size.name for size in self.manifest.sizes if size.name]
        asked = f"height {quoted(height)} and width {quoted(width)}"
        raise BundleInputError(
            f"{asked}: the bundle was exported for {', '.join(known)}; choose one, or export again with --size"
            if known
            else f"{asked}: the bundle was exported for the pipeline's own size; leave height and width out"
        )

    def _schedule(self, tier: str | None, steps: int | None, size: int = 0) -> Schedule:
        tier = self.tiers[0] if tier is None else tier
        if tier not in self.tiers:
            raise BundleInputError(f"the bundle has no tier {quoted(tier)}; it has {', '.join(self.tiers)}")
        found = [each.steps for each in self.manifest.schedules if (each.tier, each.size) == (tier, size)]
        wanted = found[0] if steps is None and found else steps
        for schedule in self.manifest.schedules:
            if (schedule.tier, schedule.steps, schedule.size) == (tier, wanted, size):
                return schedule
        raise BundleInputError(
            f"tier {tier} was not exported for {quoted(steps)} steps; it was for {', '.join(map(str, found))}: choose "
            "one of them, or export again with --steps"
        )

    def _program(self, schedule: Schedule) -> Program:
        with self._lock:
            if schedule.program not in self._programs:
                data = checked_bytes(self.folder, schedule.program, self.manifest.files)
                program = Program.from_json(parse_json(data), schedule.program)
                if program.steps != schedule.steps or len(program.calls) != len(schedule.calls):
                    raise BundleIntegrityError(
                        f"{shown(schedule.program)} is not the program of {schedule.steps} steps that the manifest "
                        "speaks of; export again"
                    )
                self._programs[schedule.program] = program
            return self._programs[schedule.program]

    def _serving(self, row: int, images: int) -> Engine | None:
        """The engine of a row for so many images."""
        return next(
            (
                engine
                for engine in self.manifest.engines
                if engine.target == self.target and engine.row == row and engine.images[0] <= images <= engine.images[1]
            ),
            None,
        )

    def _session(self, engine: Engine) -> Session:
        with self._lock:
            if engine.file not in self._sessions:
                with on_device(self._device):  # of the thread that loaded the bundle, not of this one
                    self._sessions[engine.file] = open_session(
                        engine, self.folder, self.manifest.files, self._weights, self._prepack
                    )
            return self._sessions[engine.file]

    # --- prompts -----------------------------------------------------------------------------------------------------

    def _texts(self, named: Mapping[str, Any], program: Program) -> tuple[Texts, dict[str, Any]]:
        """The texts of a call, and what else it is given by name."""
        prompts = self.manifest.prompts
        known = {"prompt", "negative_prompt"} if prompts is None else {"prompt", "negative_prompt", *prompts.texts}
        if prompts is None and (name := next((each for each in known if named.get(each) is not None), "")):
            model = {each.argument.name for form in program.forms for each in form.conditions}
            raise BundleInputError(
                f"the bundle takes no {quoted(name)}; it is conditioned on {', '.join(sorted(model)) or 'nothing'}, "
                "and has no text encoder: give conditions, or export again"
            )
        given = texts_of(prompts, {name: value for name, value in named.items() if name in known})
        return given, {name: value for name, value in named.items() if name not in known}

    def _encoded(
        self,
        program: Program,
        schedule: Schedule,
        fixed: Mapping[str, Mapping[str, str]],
        texts: Texts,
        conditions: Mapping[str, Mapping[str, Tensor]],
        named: Mapping[str, Any],
        images: int | None,
    ) -> tuple[dict[str, dict[str, Tensor]], int | None]:
        """``conditions`` with what the texts are encoded to, and for how many images the texts are."""
        found = {half: dict(values) for half, values in conditions.items()}
        prompts = self.manifest.prompts
        if prompts is None:
            return found, images
        if images is None:
            batched = {each.argument.name for form in program.forms for each in form.conditions
                       if each.argument.batched}  # fmt: skip
            given = [*named.items(), *(item for values in found.values() for item in values.items())]
            batches = [value for name, value in given if name in batched]
            sizes = [len(each) for each in batches if isinstance(each, (list, tuple)) or getattr(each, "ndim", 0) > 0]
            images = max([*map(len, texts.values()), *sizes, 1])
        for name, each in texts.items():
            if len(each) not in (1, images):
                raise BundleInputError(
                    f"{len(each)} texts were given as {name} for {images} images; give one for all, or one an image"
                )
        self._check_images(schedule, images)
        for encoder in prompts.encoders:
            names = list(dict.fromkeys(tokens.text for tokens in encoder.tokens))
            # What the program needs and nobody gives is as in the call that was exported.
            stored = {*fixed.get(encoder.half, ()), *found.get(encoder.half, ())}
            stored |= set(named) if encoder.half == HALVES[0] else set()
            outputs = {port.name for port in self._encoding(encoder).outputs}
            needed = bool((_needed(program, encoder.half) & outputs) - stored)
            if not texts and not all(default_of(prompts, name) is not None for name in names):
                continue  # what is missing is told when all conditions are known
            own = texts_for(prompts, names, texts, needed=needed)
            if own is None:
                continue
            half = found.setdefault(encoder.half, {})
            made = self._encode(encoder, own, images)
            if twice := sorted(set(made) & {*half, *(named if encoder.half == HALVES[0] else ())}):
                raise BundleInputError(f"{twice[0]} of the {encoder.half} half is given, and {names[0]}, too; give one")
            half |= made
        return found, images

    def _encode(self, encoder: Encoder, texts: Texts, images: int) -> dict[str, Tensor]:
        """The conditions that texts are encoded to, one row an image; the same texts are encoded once."""
        engine = self._encoding(encoder)
        session = self._session(engine)
        made: dict[tuple[str, ...], list[Tensor]] = {}
        rows = []
        for image in range(images):
            own = {name: each[image % len(each)] for name, each in texts.items()}
            key = tuple(own.values())
            if key not in made:
                given: dict[str, Tensor] = {}
                for tokens in encoder.tokens:
                    given |= tokens_of(self._tokenizer(tokens.file), own[tokens.text], tokens)
                for port in engine.inputs:
                    if tuple(given[port.name].shape) != port.shape:
                        raise BundleIntegrityError(
                            f"{shown(engine.file)} takes {shown(port.name)} of {port.shape}, and its tokenizer gives "
                            f"{tuple(given[port.name].shape)}; export again"
                        )
                inputs = [given[port.name].to(getattr(torch, port.dtype)).contiguous() for port in engine.inputs]
                made[key] = session.run(inputs, [None] * len(engine.outputs), 1)
            rows.append(made[key])
        return {port.name: torch.cat([row[i] for row in rows]) for i, port in enumerate(engine.outputs)}

    def _encoding(self, encoder: Encoder) -> Engine:
        found = self._serving(encoder.row, 1)
        assert found is not None  # the manifest was checked
        return found

    def _tokenizer(self, name: str) -> Any:
        with self._lock:
            if name not in self._tokenizers:
                content = checked_bytes(self.folder, name, self.manifest.files)
                self._tokenizers[name] = tokenizer_from(content, name)
            return self._tokenizers[name]

    def encoded_texts(self) -> dict[str, Tensor]:
        """What the self-test's texts are encoded to, by the names that this has in it; nothing where the bundle takes
        none."""
        prompts = self.manifest.prompts
        if prompts is None:
            return {}
        tested = {name: (text.tested,) for name, text in prompts.texts.items() if text.tested is not None}
        found = {}
        for encoder in prompts.encoders:
            names = list(dict.fromkeys(tokens.text for tokens in encoder.tokens))
            texts = texts_for(prompts, names, tested)
            for name, made in ({} if texts is None else self._encode(encoder, texts, 1)).items():
                found[f"condition.0.{encoder.half}.{name}"] = made
        return found

    # --- what is known -----------------------------------------------------------------------------------------------

    def _check_images(self, schedule: Schedule, images: int) -> None:
        """Raise :class:`BundleInputError` for a number of images that the engines of a schedule do not serve."""
        rows = {call.row for call in schedule.calls}
        if isinstance(images, bool) or not isinstance(images, int) or images < 1:
            raise BundleInputError(f"{quoted(images)} is no number of images; give a whole number from 1 on")
        if any(self._serving(row, images) is None for row in rows):
            ranges = {each.images for each in self.manifest.engines if each.target == self.target and each.row in rows}
            served = ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in sorted(ranges))
            raise BundleInputError(
                f"{images} images at once were asked for; the bundle's engines serve {served}: export again with "
                "--batch, or make them in several calls"
            )

    def _conditions(
        self,
        program: Program,
        fixed: Mapping[str, Mapping[str, str]],
        conditions: Mapping[str, Mapping[str, Tensor]],
        named: Mapping[str, Any],
        images: int | None,
    ) -> tuple[dict[str, dict[str, Tensor]], int]:
        """Conditions by half and name, and for how many images they are. ``fixed``: those that lie in the file of
        weights."""
        by_half = {
            (row.half, each.argument.name): each
            for form in program.forms
            for each in form.conditions
            for row in each.rows
        }
        given = {half: dict(values) for half, values in conditions.items()}
        for name, value in named.items():
            given.setdefault(HALVES[0], {})[name] = value
        for half, values in given.items():
            for name, value in values.items():
                values[name] = _tensor(value, by_half[half, name])
                if by_half[half, name].argument.batched and images is None:
                    images = len(values[name])
            given[half] = values
        count = 1 if images is None else images
        for half, names in fixed.items():
            for name, stored in names.items():
                if name not in given.setdefault(half, {}) and (half, name) in by_half:
                    argument = by_half[half, name].argument
                    shape = (count, *argument.shape) if argument.batched else argument.shape
                    given[half][name] = self._stored(stored, shape)
        return given, count

    def _stored(self, name: str, shape: Sequence[int]) -> Tensor:
        """A condition in the file of weights, one row, in this shape."""
        value = self._weights[name]
        if value.ndim != len(shape) or any(own not in (1, size) for own, size in zip(value.shape, shape, strict=True)):
            raise BundleIntegrityError(f"{shown(name)} of the bundle has another shape; export again")
        return value.expand(*shape)

    def _check_asked(self, size: int, given: Mapping[str, Mapping[str, Tensor]], images: int) -> None:
        """Raise :class:`BundleInputError` for conditions whose values the engines' graphs follow from, where these are
        others than in the call that was exported."""
        for half, names in self.manifest.sizes[size].asked.items():
            for name, stored in names.items():
                value = given.get(half, {}).get(name)  # else it is what stands in the program, that of the export
                if value is not None and not torch.equal(value, self._stored(stored, value.shape).to(value.dtype)):
                    raise BundleInputError(
                        f"{name} of the {half} half is another one than in the call that was exported, and the "
                        "engines hold for its values alone (how many tokens a mask shows, where they stand): give one "
                        "like it, with embeddings for as many tokens, or export again with such a prompt"
                    )


class _Course:
    """One pass through a schedule: the calls of its engines, and the caches between them."""

    def __init__(self, bundle: Bundle, schedule: Schedule, images: int) -> None:
        self._bundle, self._images = bundle, images
        self._calls = iter(schedule.calls)
        self._slots: dict[int, Tensor] = {}
        bundle._check_images(schedule, images)

    def call(self, form: Form, call: Call, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the engine of the next call."""
        del call
        entry = next(self._calls)
        engine = self._bundle._serving(entry.row, self._images)
        assert engine is not None
        given = [self._input(engine, entry, port.name, inputs) for port in engine.inputs]
        into = [self._place(entry, port) for port in engine.outputs]
        outputs = self._bundle._session(engine).run(given, into, self._images)
        found = next(
            value for port, value in zip(engine.outputs, outputs, strict=True) if port.name not in entry.writes
        )
        return found.reshape(form.groups * self._images, *form.output)

    def _input(self, engine: Engine, entry: EngineCall, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        if name in entry.reads:
            return self._slots[entry.reads[name]]
        port = next(port for port in engine.inputs if port.name == name)
        dtype = getattr(torch, port.dtype)
        if name in entry.weights:
            return torch.tensor(entry.weights[name], dtype=dtype)
        if name not in inputs:
            raise BundleIntegrityError(
                f"{shown(engine.file)} takes {quoted(name)}, which its program does not give; export again"
            )
        return inputs[name].to(dtype).reshape(sizes_of(port.shape, self._images)).contiguous()

    def _place(self, entry: EngineCall, port: Port) -> Tensor | None:
        """Memory for an output: a cache's slot."""
        number = entry.writes.get(port.name)
        if number is None:
            return None
        if number not in self._slots:
            dtype, device = getattr(torch, port.dtype), self._bundle._device
            self._slots[number] = torch.empty(sizes_of(port.shape, self._images), dtype=dtype, device=device)
        return self._slots[number]


def check_names(manifest: Manifest, weights: WeightFile) -> None:
    """Raise :class:`BundleIntegrityError` for a tensor that a manifest speaks of, and the file of weights lacks."""
    named = [stored for engine in manifest.engines for stored in engine.weights.values()]
    for size in manifest.sizes:
        halves = (*size.conditions.values(), *size.asked.values())
        named += [stored for given in halves for stored in given.values()]
    missing = sorted({name for name in named if name not in weights})
    if missing:
        raise BundleIntegrityError(
            f"the manifest speaks of {shown(missing[0])} and {len(missing) - 1} more tensors that are not in "
            f"{shown(manifest.weights)}; copy the whole folder again, or export again"
        )


def _check_given(program: Program, conditions: Any, named: Mapping[str, Any]) -> None:
    """Raise :class:`BundleInputError` for conditions of a half or name that the program does not have, and for what is
    given twice: nothing that a caller says is left out without a word."""
    taken: dict[str, dict[str, None]] = {}
    for each in (each for form in program.forms for each in form.conditions):
        for row in each.rows:
            taken.setdefault(row.half, {})[each.argument.name] = None
    halves = ", ".join(taken) or "none"
    if not isinstance(conditions, Mapping) or not all(isinstance(each, Mapping) for each in conditions.values()):
        raise BundleInputError(
            f"the conditions are {quoted(conditions)}; give tensors by half and name, "
            '{"cond": {...}, "uncond": {...}}'
        )
    for half, values in conditions.items():
        if half not in taken:
            raise BundleInputError(
                f"conditions are given of the half {quoted(half)}, and the call that was exported has {halves}; leave "
                "them out, or export again with guidance"
            )
        for name in values:
            _check_taken(taken, half, name)
            if half == HALVES[0] and name in named:
                raise BundleInputError(f"{name} is given by name and among the conditions of the {half} half; give one")
    for name in named:
        _check_taken(taken, HALVES[0], name)


def _check_taken(taken: Mapping[str, Mapping[str, None]], half: str, name: str) -> None:
    if name in taken.get(half, ()):
        return
    others = [each for each in taken if name in taken[each]]
    if others:
        raise BundleInputError(f"the model takes {quoted(name)} of the {others[0]} half alone, not of the {half} half")
    known = dict.fromkeys(each for names in taken.values() for each in names)
    raise BundleInputError(f"the model takes no {quoted(name)}; it is conditioned on {', '.join(known) or 'nothing'}")


def _generators(seed: Any, generator: Any) -> tuple[torch.Generator, ...]:
    """Those that the noise comes from: one for all images, or one for each. Raises :class:`BundleInputError`."""
    if seed is not None and generator is not None:
        raise BundleInputError("a seed and a generator were given; give one of them")
    if generator is not None:
        found = tuple(generator) if isinstance(generator, (list, tuple)) else (generator,)
        if not found or not all(isinstance(each, torch.Generator) for each in found):
            raise BundleInputError(
                f"the generator is {quoted(generator)}; give a torch.Generator, or one for each image"
            )
        return found
    made = torch.Generator()
    if seed is None:
        made.seed()
        return (made,)
    try:
        if isinstance(seed, bool):
            raise TypeError
        made.manual_seed(operator.index(seed))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise BundleInputError(
            f"the seed is {quoted(seed)}; give a whole number from {SEEDS[0]} to {SEEDS[1]}"
        ) from error
    return (made,)


def _noise(program: Program, generators: Sequence[torch.Generator], images: int) -> Noise:
    """What draws the noise. Raises :class:`BundleInputError` for generators that do not fit the images."""
    if len(generators) == 1:
        return generators[0]
    if len(generators) != images:
        raise BundleInputError(f"{len(generators)} generators are given for {images} images; give one, or one for each")
    if any(draw.seeded and draw.groups > 1 for draw in program.draws):
        raise BundleInputError(
            "the pipeline draws noise for both halves of guidance at once, which generators of single images do not "
            "tell; give one generator"
        )

    def drawn(draw: Draw, count: int) -> Tensor:
        dtype = DTYPES[draw.dtype]
        if not draw.seeded:
            return torch.randn((draw.groups * count, *draw.shape), dtype=dtype)
        rows = [torch.randn((1, *draw.shape), generator=each, dtype=dtype, device=each.device) for each in generators]
        return torch.cat([row.cpu() for row in rows])

    return drawn


def _tensor(value: Any, condition: Condition) -> Tensor:
    """What a condition is given, as a tensor of its dtype and shape. Raises :class:`BundleInputError`."""
    argument = condition.argument
    dtype = getattr(torch, argument.dtype)
    try:
        tensor = torch.as_tensor(value)
        if tensor.is_floating_point() and not dtype.is_floating_point:
            raise ValueError(f"whole numbers are wanted ({argument.dtype})")
        tensor = tensor.to(dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BundleInputError(f"{argument.name} is {quoted(value)}, which is no tensor: {error}") from error
    rest = tuple(tensor.shape[1:]) if argument.batched else tuple(tensor.shape)
    if rest != argument.shape or (argument.batched and not tensor.ndim):
        rows = "images, " if argument.batched else ""
        raise BundleInputError(
            f"{argument.name} has the shape {tuple(tensor.shape)}; it must be ({rows}"
            f"{', '.join(map(str, argument.shape))})"
        )
    return tensor


def _paired(found: Mapping[str, Tensor], data: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """What was made beside what a self-test has of it. Raises :class:`BundleIntegrityError` where that is nothing."""
    for name, made in found.items():
        if name not in data or data[name].shape != made.shape:
            raise BundleIntegrityError(f"the self-test of the bundle lacks {shown(name)}; export again")
        yield made, data[name]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's own generator seeded within the block, for noise that takes no generator; then it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _needed(program: Program, half: str) -> set[str]:
    """The conditions of a half that stand in no program by themselves."""
    rows = ((each.argument.name, row) for form in program.forms for each in form.conditions for row in each.rows)
    return {name for name, row in rows if row.half == half and row.numbers is None}


def _scales(program: Program, guidance: float | Mapping[str, float] | None) -> dict[str, float]:
    if guidance is None:
        return {}
    try:
        if isinstance(guidance, Mapping):
            return {name: float(value) for name, value in guidance.items()}
        guidance = float(guidance)
    except (TypeError, ValueError) as error:
        raise BundleInputError(f"the guidance {quoted(guidance)} is no number") from error
    free = [scale.name for scale in program.scales]
    if len(free) != 1:
        baked = ", ".join(f"{scale.name} = {scale.value:g}" for scale in program.baked)
        raise ReplayError(
            f"a guidance scale of {guidance:g} was given, but the program leaves {', '.join(free) or 'none'} free"
            + (f"; {baked} was baked in" if baked else "; give them by name")
        )
    return {free[0]: float(guidance)}


__all__ = ["Bundle", "Sampled", "load_bundle"]
