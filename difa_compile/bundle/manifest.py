"""The manifest of a bundle: what is in the folder, and how it goes together; ``manifest.json``.

A bundle is a folder of plain files, none of which is code of Python:

```
manifest.json                       this
weights-<digest>.safetensors        all weights and tables, each once
<engine>-<digest>.onnx, .pt2, .plan engines, without weights
kernel-<digest>.so                  our CPU kernel for local attention, which .pt2 call
programs/<steps>-<digest>.json      sampling loops
plans/<tier>-<digest>.json          the plans that engines were made from
tokenizers/<name>-<digest>.json     tokenizers of prompts
self-test-<digest>.safetensors      conditions and latents of a short run
about/<name>-<digest>               the model's card, its licence and notices, as they lay beside it
```

Every file's size and SHA-256 stand in the manifest, whose own digest stands in itself. Names are checked to lie in the
folder before anything is opened.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from difa_compile.errors import BundleFormatError, BundleIntegrityError, BundleVersionError
from difa_compile.files.documents import Format, Unfit
from difa_compile.wording import quoted, shown

MANIFEST = "manifest.json"

FORMAT = Format(
    name="manifest",
    version_key="schema_version",
    version=1,
    keys=(
        "made_with",
        "source",
        "files",
        "weights",
        "engines",
        "slots",
        "schedules",
        "sizes",
        "plans",
        "self_test",
        "prompts",
    ),
    optional=("compared",),
    most_bytes=2**28,
    damaged=BundleFormatError,
    other_version=BundleVersionError,
    edited=BundleIntegrityError,
    where_from="give the folder of a bundle, as difa export writes it",
    again="export again",
)


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the manifest: plain data, nothing else beside."""


class File(_Part, frozen=True):
    """``bytes``: its size. ``sha256``: of its content, 64 hex digits."""

    bytes: int
    sha256: str


class Adapter(_Part, frozen=True):
    """Weights that were put into the bundle after the export. ``name``: of the file; ``sha256``: of its content.
    ``kind``: ``"lora"``, or ``"weights"`` for whole ones. ``scale``: of a LoRA. ``without``: parts of the model whose
    weights in the file were left out. ``target``: whose engines made the self-test's latents with the new weights.
    """

    name: str
    sha256: str
    kind: str
    scale: float
    without: tuple[str, ...]
    target: str


class Source(_Part, frozen=True):
    """Where the model comes from: the pipeline's class and name, and what is known of its licence.

    ``licence``: as the model's card names it. ``card``: the file of that card in the bundle, ``notices``: of licences
    and notices that lay beside it; none where there were none. ``adapters``: what was put into the weights since, in
    order.
    """

    pipeline: str
    name: str
    model: str
    config_digest: str
    licence: str = ""
    card: str = ""
    notices: tuple[str, ...] | UnsetType = UNSET
    adapters: tuple[Adapter, ...] | UnsetType = UNSET


class Port(_Part, frozen=True):
    """An input or output: ``shape`` in whole numbers, and as ``2*images`` where it grows with the images."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Library(_Part, frozen=True):
    """Our CPU kernel for local attention: the file gives torch ``difa::local_attention_cpu``. ``instruction_set``: what
    the processor must have for it, "" for nothing in particular."""

    file: str
    instruction_set: str = ""


class Engine(_Part, frozen=True):
    """One file of one target.

    ``row``: the row of roles that it carries out, a number from 0; -1 for what encodes prompts, -2 for what encodes
    negative prompts where that is another engine, -3 and below for what decodes.
    ``images``: the least and the largest number of images. ``inputs``, ``outputs``: in the order in which it takes and
    gives them. ``weights``: by its own name for a tensor the name in the file of weights. ``instruction_set``: what the
    processor must have, "" for nothing in particular; of engines for GPUs their compute capabilities, "" for all that
    the library serves. ``kernel``: whether local attention in it is a call of our CPU kernel. ``versions``: what reads
    it. ``why_static``: why it serves one number of images alone. ``key``: digest of what it was made from, by which a
    later export into the same folder knows it again. ``memory``: of a GPU, in bytes, as the build told it:
    ``activations`` at the most images, ``constants``. ``unchecked``: why the model that it was built from was not run
    beside the program, "" where it was, or there is none. ``library``: with the kernel that it calls; null where there
    is none in the bundle, and it is compiled where the engine runs.
    """

    target: str
    file: str
    row: int
    images: tuple[int, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: dict[str, str]
    instruction_set: str = ""
    kernel: bool = False
    versions: dict[str, str] = {}
    why_static: str = ""
    key: str = ""
    memory: dict[str, int] = {}
    unchecked: str = ""
    library: Library | None = None


class Slot(_Part, frozen=True):
    """Memory that one cache at a time lies in; ``shape``: for one image."""

    dtype: str
    shape: tuple[int, ...]


class EngineCall(_Part, frozen=True):
    """A call of the model in a schedule, in the order of the program's calls.

    ``row``: of the engine. ``reads``, ``writes``: its caches by name, and the slot that each lies in; null is a cache
    that nobody reads. ``weights``: of its forecasts, by name.
    """

    row: int
    reads: dict[str, int]
    writes: dict[str, int | None]
    weights: dict[str, tuple[float, ...]] = {}


class Schedule(_Part, frozen=True):
    """A tier over one number of steps: its sampling program, a file, and the engine of each of its calls. ``size``: its
    place among the manifest's sizes."""

    tier: str
    steps: int
    program: str
    calls: tuple[EngineCall, ...]
    size: int = 0


class Decode(_Part, frozen=True):
    """What the pipeline does after its loop: from latents to bytes of pictures ``(images, *shape)``. ``row``: of its
    engines."""

    row: int
    shape: tuple[int, ...]


class Size(_Part, frozen=True):
    """A size of images. ``height``, ``width``: in pixels, as the pipeline's call was given them; 0 where it was not.
    ``conditions``: those that are the same for all calls, one row: by half and name the name in the file of weights.
    ``asked``: those whose values the engines' graphs follow from (how many tokens a mask shows, where tokens stand), as
    they were in the call that was exported: the engines hold for these alone. ``layouts``: of the tokens in attention,
    ``77+32x32``: those before the image, the image's, those after it.
    """

    height: int = 0
    width: int = 0
    conditions: dict[str, dict[str, str]] = {}
    decode: Decode | None = None
    asked: dict[str, dict[str, str]] = {}
    layouts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """``HEIGHTxWIDTH``, or nothing."""
        return f"{self.height}x{self.width}" if self.height else ""


class Text(_Part, frozen=True):
    """An argument that is a text: ``prompt``, ``negative_prompt_2``.

    ``follows``: the argument whose text it has where it is not given itself. ``default``: what it was in the call that
    was exported, or what the pipeline takes for it; null where it must be given. ``tested``: in the short run.
    """

    follows: str = ""
    default: str | None = None
    tested: str | None = None


class Tokens(_Part, frozen=True):
    """A text made into numbers for an engine.

    ``file``: the tokenizer. ``text``: the argument. ``steps``: what is done to it first, by the names of
    ``difa_compile.bundle.prompts.PREPARATIONS``; ``before`` and ``after``: what is then put around it. ``inputs``: by
    the engine's input ``ids``, ``mask`` or ``types``. ``special``: whether the tokenizer adds its special tokens.
    """

    file: str
    text: str
    inputs: dict[str, str]
    steps: tuple[str, ...] = ()
    before: str = ""
    after: str = ""
    special: bool = True


class Encoder(_Part, frozen=True):
    """What makes the conditions of one half from texts: the engines of a row, whose outputs have the conditions' names,
    for one prompt at a time."""

    half: str
    row: int
    tokens: tuple[Tokens, ...]


class Prompts(_Part, frozen=True):
    """``texts``: by argument. ``encoders``: of the halves."""

    texts: dict[str, Text]
    encoders: tuple[Encoder, ...]


class Manifest(_Part, frozen=True):
    """All of it. ``slots``: of caches, for whichever schedule runs. ``plans``: by tier the file of its plan.
    ``self_test``: the file of the short run. ``compared``: by target how far the self-test was off at the export,
    relative to the largest latent; of a target that is not named, no engine was run.
    """

    made_with: dict[str, str]
    source: Source
    files: dict[str, File]
    weights: str
    engines: tuple[Engine, ...]
    slots: tuple[Slot, ...]
    schedules: tuple[Schedule, ...]
    sizes: tuple[Size, ...]
    plans: dict[str, str]
    self_test: str
    prompts: Prompts | None = None
    compared: dict[str, float] = {}

    def content(self) -> dict[str, Any]:
        """As JSON has it."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found

    def to_json(self) -> dict[str, object]:
        """The whole document: version, digest, content."""
        return FORMAT.frame(self.content())

    @classmethod
    def from_json(cls, data: bytes | str, where: object) -> Manifest:
        """Read a manifest. Raises :class:`BundleFormatError`, :class:`BundleVersionError` and
        :class:`BundleIntegrityError`."""
        fields = FORMAT.parse(data, where)
        with FORMAT.reading(where, also=(msgspec.ValidationError,)):
            content = {name: fields[name] for name in (*FORMAT.keys, *FORMAT.optional) if name in fields}
            found = msgspec.convert(content, cls)
            _check(found)
        FORMAT.check_digest(fields, content, where)  # as it stands there: what is optional has joined in time
        return found

    @property
    def tiers(self) -> tuple[str, ...]:
        """In the order in which they were exported."""
        return tuple(dict.fromkeys(schedule.tier for schedule in self.schedules))

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(engine.target for engine in self.engines))

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """What was put into the weights after the export, in order."""
        return self.source.adapters or ()

    @property
    def notices(self) -> tuple[str, ...]:
        """The files of licences and notices."""
        return self.source.notices or ()

    def cache_bytes(self) -> int:
        """Memory of caches for one image: of the schedule that takes most."""
        held = [
            {slot for call in schedule.calls for slot in (*call.reads.values(), *call.writes.values())} - {None}
            for schedule in self.schedules
        ]
        size = [math.prod(slot.shape) * BYTES[slot.dtype] for slot in self.slots]
        return max(sum(size[slot] for slot in slots if slot is not None) for slots in held)

    @property
    def most_images(self) -> int:
        """That one call of the bundle can make."""
        return max(engine.images[1] for engine in self.engines if engine.row >= 0)

    def port_bytes(self, images: int) -> int:
        """Memory of what one engine takes and gives besides caches, of the one of which that is most, for so many
        images."""
        found = [0]
        for engine in self.engines:
            if engine.images[0] <= images <= engine.images[1]:
                ports = [port for port in (*engine.inputs, *engine.outputs) if not port.name.startswith(CACHE)]
                found.append(sum(math.prod(sizes_of(port.shape, images)) * BYTES[port.dtype] for port in ports))
        return max(found)

    @property
    def tested_by(self) -> str:
        """Who made the latents of the self-test: the pipeline, or engines of a target, in words."""
        return f"the engines of {self.adapters[-1].target}" if self.adapters else "the pipeline"


# --- consistency -----------------------------------------------------------------------------------------------------


def _check(manifest: Manifest) -> None:
    """Raise :class:`Unfit` where a manifest contradicts itself."""
    for name, file in manifest.files.items():
        _check_name(name)
        if not re.fullmatch("[0-9a-f]{64}", file.sha256) or file.bytes < 0:
            raise Unfit(f"files.{name} has no size and digest")
    named = [manifest.weights, manifest.self_test, *(engine.file for engine in manifest.engines)]
    named += [*(schedule.program for schedule in manifest.schedules), *manifest.plans.values()]
    named += [*manifest.notices, *filter(None, [manifest.source.card])]
    named += [engine.library.file for engine in manifest.engines if engine.library is not None]
    for name in named:
        if name not in manifest.files:
            raise Unfit(f"{quoted(name, 100)} is named, but not among the files")
    if not manifest.engines or not manifest.schedules:
        raise Unfit("a bundle has at least one engine and one schedule")
    if len({(each.tier, each.steps, each.size) for each in manifest.schedules}) < len(manifest.schedules):
        raise Unfit("a tier has two schedules for the same number of steps and size")
    for adapter in manifest.adapters:
        if not re.fullmatch("[0-9a-f]{64}", adapter.sha256) or not math.isfinite(adapter.scale):
            raise Unfit(f"the adapter {quoted(adapter.name, 100)} has no digest and scale")
        if adapter.target not in manifest.targets:
            raise Unfit(f"the self-test was made by engines of {shown(adapter.target)}, which there are none of")
    rows = {engine.row for engine in manifest.engines}
    for engine in manifest.engines:
        _check_engine(engine)
    for number, slot in enumerate(manifest.slots):
        if slot.dtype not in DTYPES or min(slot.shape, default=0) < 0 or math.prod(slot.shape) > MOST_ELEMENTS:
            raise Unfit(f"slot {number} is of {shown(slot.dtype)} and {shown(slot.shape, 100)}")
    for schedule in manifest.schedules:
        where = f"schedule {schedule.tier!r} of {schedule.steps} steps"
        if schedule.tier not in manifest.plans:
            raise Unfit(f"{where} has no plan")
        if not 0 <= schedule.size < len(manifest.sizes):
            raise Unfit(f"{where} is of size {schedule.size}, and there are {len(manifest.sizes)}")
        for call in schedule.calls:
            if call.row < 0 or call.row not in rows:
                raise Unfit(f"{where} calls row {call.row}, for which there is no engine")
            slots = [*call.reads.values(), *(slot for slot in call.writes.values() if slot is not None)]
            if any(not 0 <= slot < len(manifest.slots) for slot in slots):
                raise Unfit(f"{where} names a slot that there is not")
            if set(call.reads.values()) & set(call.writes.values()):
                raise Unfit(f"{where} has a call that reads and writes one slot")
        _check_course(manifest, schedule, where)
    for size in manifest.sizes:
        if min(size.height, size.width) < 0 or (size.height == 0) != (size.width == 0):
            raise Unfit(f"a size is {size.height} by {size.width}")
        if size.decode is not None:
            decoding = {engine.target for engine in manifest.engines if engine.row == size.decode.row <= DECODES}
            if decoding != set(manifest.targets):
                raise Unfit("there is no engine that decodes" + (" for each target" if decoding else ""))
            ports = [(len(each.inputs), len(each.outputs)) for each in manifest.engines if each.row == size.decode.row]
            if set(ports) != {(1, 1)}:
                raise Unfit("what decodes takes latents and gives pictures, and nothing else")
    if len({size.name for size in manifest.sizes}) < len(manifest.sizes):
        raise Unfit("a size stands there twice")
    if manifest.prompts is not None:
        _check_prompts(manifest, manifest.prompts)


def _check_course(manifest: Manifest, schedule: Schedule, where: str) -> None:
    """Raise :class:`Unfit` unless each call's caches are ports of all engines that may make it, of every target, and
    lie in slots of their form, which hold something when they are read."""
    serving: dict[int, list[Engine]] = {}
    for engine in manifest.engines:
        serving.setdefault(engine.row, []).append(engine)
    filled: set[int] = set()
    for number, call in enumerate(schedule.calls):
        which = f"call {number} of {where}"
        missing = sorted(set(manifest.targets) - {engine.target for engine in serving[call.row]})
        if missing:
            raise Unfit(f"row {call.row} has no engine for {shown(missing[0])}, which others have")
        for name, slot in call.reads.items():
            if slot not in filled:
                raise Unfit(f"{which} reads {shown(name)} from slot {slot}, which no call before it has written")
        written = [slot for slot in call.writes.values() if slot is not None]
        if len(set(written)) < len(written):
            raise Unfit(f"{which} writes two caches into one slot")
        filled.update(written)
        for engine in serving[call.row]:
            inputs = {port.name: port for port in engine.inputs}
            outputs = {port.name: port for port in engine.outputs}
            for kind, names, ports in (
                ("reads", call.reads, inputs),
                ("writes", call.writes, outputs),
                ("weights", call.weights, inputs),
            ):
                for name in names:
                    if name not in ports:
                        raise Unfit(f"{which} {kind} {shown(name)}, of which {shown(engine.file)} knows nothing")
            if not outputs.keys() - call.writes.keys():
                raise Unfit(f"{which} leaves {shown(engine.file)} no output but caches")
            lying = [(inputs[name], slot) for name, slot in call.reads.items()]
            lying += [(outputs[name], slot) for name, slot in call.writes.items() if slot is not None]
            for port, slot in lying:
                if not _lies_in(port, manifest.slots[slot], engine):
                    raise Unfit(f"{which}: {shown(port.name)} of {shown(engine.file)} does not fit slot {slot}")
            for name, numbers in call.weights.items():
                if inputs[name].shape != (len(numbers),):
                    raise Unfit(f"{which} has {len(numbers)} weights for {shown(name)} of {shown(engine.file)}")


def _lies_in(port: Port, slot: Slot, engine: Engine) -> bool:
    """Whether a cache has the slot's dtype, and its shape for one image. What serves one number of images alone has
    sizes for these."""
    if port.dtype != slot.dtype or len(port.shape) != len(slot.shape):
        return False
    count = engine.images[0] if engine.images[0] == engine.images[1] else 1
    return all(
        wanted in ((size, size * count) if isinstance(own, int) else (size,))
        for own, wanted, size in zip(port.shape, sizes_of(port.shape, 1), slot.shape, strict=True)
    )


def _check_prompts(manifest: Manifest, prompts: Prompts) -> None:
    texts = prompts.texts
    for name, text in texts.items():
        for told in (text.default, text.tested):
            if told is not None and (len(told) > LONGEST or not is_text(told)):
                raise Unfit(f"the text {shown(name)} is none that could be given")
        if text.follows and (text.follows not in texts or texts[text.follows].follows):
            raise Unfit(f"the text {shown(name)} follows {shown(text.follows)}, which is none of its own")
    halves = [encoder.half for encoder in prompts.encoders]
    if "cond" not in halves or len(set(halves)) < len(halves) or not set(halves) <= set(ENCODES):
        raise Unfit(f"prompts are encoded for {', '.join(map(shown, halves)) or 'no half'}")
    for encoder in prompts.encoders:
        where = f"the encoder of the {encoder.half} half"
        engines = [engine for engine in manifest.engines if engine.row == encoder.row]
        if encoder.row not in ENCODES.values() or {engine.target for engine in engines} != set(manifest.targets):
            raise Unfit(f"{where} has no engine for each target")
        given = [name for tokens in encoder.tokens for name in tokens.inputs]
        for engine in engines:
            ports = (*engine.inputs, *engine.outputs)
            if engine.images != (1, 1) or any(isinstance(size, str) for port in ports for size in port.shape):
                raise Unfit(f"{where} is not for one prompt at a time")
            if not engine.outputs or sorted(given) != sorted(port.name for port in engine.inputs):
                raise Unfit(f"{where} does not give {shown(engine.file)} what it takes")
        for tokens in encoder.tokens:
            if tokens.file not in manifest.files or tokens.text not in texts:
                raise Unfit(f"{where} has the tokenizer {shown(tokens.file)} for {shown(tokens.text)}, one of which "
                            "there is not")  # fmt: skip
            if not is_text(tokens.before + tokens.after):
                raise Unfit(f"{where} puts something around {shown(tokens.text)} that is no text")
            if not set(tokens.steps) <= set(STEPS) or not set(tokens.inputs.values()) <= set(KINDS):
                raise Unfit(f"{where} asks for something of a text that is not known")


def _check_engine(engine: Engine) -> None:
    where = f"engine {shown(engine.file)}"
    if not re.fullmatch("[a-z0-9-]{1,30}", engine.target):
        raise Unfit(f"{where} is of the target {shown(engine.target)}, which is no name")
    if not 1 <= engine.images[0] <= engine.images[1]:
        raise Unfit(f"{where} is for row {engine.row} and {engine.images[0]} to {engine.images[1]} images")
    if engine.library is not None and not engine.kernel:
        raise Unfit(f"{where} has a library for local attention, and does not call it")
    ports = [*engine.inputs, *engine.outputs]
    if len({port.name for port in engine.inputs}) < len(engine.inputs) or len(
        {port.name for port in engine.outputs}
    ) < len(engine.outputs):
        raise Unfit(f"{where} has two ports of one name")
    for port in ports:
        for size in port.shape:
            if isinstance(size, int) and size < 0:
                raise Unfit(f"{where}: {shown(port.name)} has the size {size}")
            if isinstance(size, str) and not re.fullmatch(r"(?:[1-9][0-9]{0,8}\*)?images", size):
                raise Unfit(f"{where}: {shown(port.name)} has the size {shown(size)}, which is none")
        if port.dtype not in DTYPES:
            raise Unfit(f"{where}: {shown(port.name)} is of {shown(port.dtype)}; known are {', '.join(DTYPES)}")


CACHE = "cache."
"""How names of ports begin that are caches, or the weights of a forecast over them."""
DECODES = -3
"""The row of engines that decode at the first size; those of the others follow below."""
ENCODES = {"cond": -1, "uncond": -2}
"""By half the row of engines that encode its prompts."""
LONGEST = 2**16
"""Characters of a prompt: tokenizers take time for each, though all but the first few hundred are cut off."""
MOST_ELEMENTS = 2**40
"""Of a cache for one image: more is damage."""
STEPS = ("fix", "unescape", "spaces", "lower", "strip")
"""What can be done to a text before it is tokenized, in order."""
KINDS = ("ids", "mask", "types")
"""What can be told of a text to an engine."""
BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1,
}  # fmt: skip
"""Of one number, by dtype."""
DTYPES = tuple(BYTES)


def is_text(text: str) -> bool:
    """Whether it can be written in UTF-8: halves of a pair of surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def sizes_of(shape: tuple[int | str, ...], images: int) -> tuple[int, ...]:
    """A port's shape for so many images."""
    return tuple(
        size if isinstance(size, int) else images * int(size.removesuffix("images").removesuffix("*") or 1)
        for size in shape
    )


def _check_name(name: str) -> None:
    """Names are of one or two parts, each beginning with a letter or digit: nothing leaves the folder."""
    if not re.fullmatch(r"(?:[A-Za-z0-9][\w.-]{0,99}/)?[A-Za-z0-9][\w.-]{0,199}", name, re.ASCII) or name == MANIFEST:
        raise Unfit(f"{quoted(name, 100)} is no name of a file in a bundle")


# --- files -----------------------------------------------------------------------------------------------------------


def file_in(folder: Path, name: str) -> Path:
    """The path of a bundle's file: a plain one that lies in the folder, with no link on the way.

    Raises :class:`BundleIntegrityError`.
    """
    path = folder
    for part in Path(name).parts:
        path = path / part
        try:
            mode = os.lstat(path).st_mode
        except OSError as error:
            raise BundleIntegrityError(
                f"{shown(name)} of the bundle {shown(folder)} cannot be read: {shown(error.strerror or error)}; copy "
                "the whole folder again, or export again"
            ) from error
        if stat.S_ISLNK(mode):
            raise BundleIntegrityError(
                f"{shown(name)} of the bundle {shown(folder)} is a link, which could lead anywhere; put the file "
                "itself there"
            )
    if not stat.S_ISREG(mode):
        raise BundleIntegrityError(f"{shown(name)} of the bundle {shown(folder)} is no plain file; export again")
    return path


def checked_bytes(folder: Path, name: str, files: Mapping[str, File]) -> bytes:
    """The content of a small file, which is what the manifest says. Raises :class:`BundleIntegrityError`."""
    path = file_in(folder, name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleIntegrityError(f"{shown(path)} cannot be read: {shown(error.strerror or error)}") from error
    _compare(path, files[name], len(data), hashlib.sha256(data).hexdigest())
    return data


def check_file(folder: Path, name: str, files: Mapping[str, File], whole: bool = True) -> Path:
    """A file's path, once its size is what the manifest says and, if ``whole``, its digest.

    Raises :class:`BundleIntegrityError`.
    """
    path = file_in(folder, name)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.file_digest(file, "sha256").hexdigest() if whole else files[name].sha256
    except OSError as error:
        raise BundleIntegrityError(f"{shown(path)} cannot be read: {shown(error.strerror or error)}") from error
    _compare(path, files[name], size, digest)
    return path


def _compare(path: Path, wanted: File, size: int, digest: str) -> None:
    if size != wanted.bytes:
        raise BundleIntegrityError(
            f"{shown(path)} has {size} bytes, and the manifest says {wanted.bytes}: it was cut off or exchanged; copy "
            "the whole folder again, or export again"
        )
    if digest != wanted.sha256:
        raise BundleIntegrityError(
            f"{shown(path)} is not what was exported: its SHA-256 is {digest[:12]}..., the manifest says "
            f"{wanted.sha256[:12]}...; copy the whole folder again, or export again"
        )


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a bundle. Raises :class:`BundleFormatError`, :class:`BundleVersionError` and
    :class:`BundleIntegrityError`."""
    path = Path(folder) / MANIFEST
    if path.is_symlink():
        raise BundleIntegrityError(f"{shown(path)} is a link, which could lead anywhere; put the file itself there")
    return Manifest.from_json(FORMAT.read_bytes(path), path)
