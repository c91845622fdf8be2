"""Files of weights that go into a bundle: what a LoRA adds to which weight, or which weights are whole new ones.

Read are safetensors files in the form of diffusers and PEFT: ``MODULE.lora_A.weight`` (r, in) and
``MODULE.lora_B.weight`` (out, r), with ``MODULE.alpha`` or PEFT's configuration (in the header, as diffusers writes it,
or beside the file, as PEFT does) where their product is not to be added as it is; and files of whole weights under the
model's own names, in one file or in several with their index (``MODEL.safetensors.index.json``). Modules may be named
with their component first (``transformer.``) or without it. LoRAs in other forms go through the converter that
diffusers has for the pipeline, if it is installed. Every tensor of a file is used, or named in an error.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difa_compile.bundle.weights import Place
from difa_compile.errors import AdapterError, MissingDependencyError
from difa_compile.files.documents import open_plain, parse_json, read_at_most
from difa_compile.wording import quoted, shown

LORA, WEIGHTS = "lora", "weights"
"""Kinds of adapters."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's configuration in the header of a file."""
CONFIG = "adapter_config.json"
"""Where PEFT keeps it, beside the file."""
MOST_CONFIG = 2**20
"""Bytes of such a file."""
INDEX = ".safetensors.index.json"
"""How the names of files end that say which tensor lies in which of several files beside them."""
MOST_INDEX = 2**26
"""Bytes of such a file."""
SHARD = re.compile(r"[A-Za-z0-9][\w.-]{0,199}\.safetensors", re.ASCII)
"""Names of files in an index: they lie in its folder, and nowhere else."""
PEFT_PREFIX = "base_model.model."
ENCODER = "text_encoder"
"""How the names of components begin that make embeddings of prompts."""
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
ALPHA = re.compile(r"(?P<module>.+)\.alpha")
OTHER_METHODS = {
    "a DoRA": re.compile(r"lora_magnitude_vector|dora_scale"),
    "a LoHa or LoKr": re.compile(r"hada_[wt]|lokr_[wt]"),
    "an OFT": re.compile(r"\boft_|\bboft_"),
    "a LoRA with biases": re.compile(r"lora_B\.bias|\.diff_b$|\.diff$"),
    "a LoRA of embeddings": re.compile(r"lora_embedding_[AB]"),
}
"""What is more than a product to add, by how it is told from others."""
OTHER_FORM = re.compile(
    r"^lora_(unet|transformer|te|te1|te2|te3|prior_unet)_|^(model\.)?diffusion_model\.|lora_(down|up)\b|\.lora\.(down|up)\."
    r"|lora_linear_layer|\blora_[AB]\.[^.]+\.weight$|processor\..*lora"
)
"""Names of other forms of LoRAs: kohya's, and those of other programs and of early diffusers."""
FUSE = (
    "put it into the pipeline (pipe.load_lora_weights(file), pipe.fuse_lora(), pipe.unload_lora_weights()), save the "
    "model (pipe.transformer.save_pretrained(folder)), and name the file of weights that was written"
)
LEAVE_OUT = "leave them out, if that is meant, with without=({part!r},) (--without {part})"


@dataclass(frozen=True)
class LowRank:
    """What a LoRA adds to a weight: ``factor`` times the product of the tensors ``up`` (out, r, ...) and ``down``
    (r, in, ...), by their names in the file."""

    down: str
    up: str
    factor: float


@dataclass(frozen=True)
class Whole:
    """A weight that is replaced by the tensor ``name`` of the file."""

    name: str


@dataclass(frozen=True)
class Shape:
    """Of a tensor in a file, without reading it."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class AdapterFile:
    """A file that was opened, or several by their index. ``name``: without the folders it lies in. ``sha256``: of its
    content (of several files, one after the other by name), 64 hex digits. ``config``: PEFT's configuration, as far as
    there is one."""

    path: Path
    sha256: str
    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, Shape]
    config: Mapping[str, object]

    @property
    def name(self) -> str:
        return self.path.name


class _Tensors(Mapping[str, Tensor]):
    """The tensors of safetensors files, each read when it is asked for, and not kept. ``files``: by name the one that
    holds it, opened."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = self._files[name].get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


# --- opening ---------------------------------------------------------------------------------------------------------


def open_adapter(place: str | Path) -> AdapterFile:
    """Open a safetensors file, several by their index, or what there is of this in a folder. Raises
    :class:`AdapterError`, and :class:`MissingDependencyError` without safetensors."""
    try:
        import safetensors
    except ImportError as error:
        raise MissingDependencyError(
            "adapters are read with safetensors, which is not installed; pip install safetensors, or "
            "difa-compile[export]"
        ) from error
    path = _file_at(Path(place))
    shards = _shards(path) if path.name.endswith(INDEX) else {path.name: None}
    digest = hashlib.sha256()
    tensors: dict[str, Any] = {}
    shapes: dict[str, Shape] = {}
    header: dict[str, str] = {}
    for shard, wanted in sorted(shards.items()):
        part = path.with_name(shard)
        try:
            with open_plain(part, 2**62) as file:
                while block := file.read(2**20):
                    digest.update(block)
            opened: Any = safetensors.safe_open(str(part), "pt")
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, it is no dictionary
            found = {name: Shape(tuple(each.get_shape()), str(each.get_dtype())) for name, each in slices.items()}
            header |= opened.metadata() or {}
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            reason = shown(getattr(error, "strerror", None) or error, 300)
            raise AdapterError(
                f"{shown(part)} cannot be read as a safetensors file: {reason}; give a LoRA or weights as safetensors"
            ) from error
        if wanted is not None and (odd := wanted ^ found.keys()):
            raise AdapterError(
                f"{shown(path)} says of {shown(shard)} other tensors than it holds ({_some(odd)}); they belong to two "
                "models, or one is damaged"
            )
        shapes |= found
        tensors |= dict.fromkeys(found, opened)
    if not shapes:
        raise AdapterError(f"{shown(path)} holds no tensors; give the file of a LoRA or of weights")
    by_peft = any(name.startswith(PEFT_PREFIX) for name in shapes)
    return AdapterFile(path, digest.hexdigest(), _Tensors(tensors), shapes, _config(path, header, by_peft))


def _file_at(place: Path) -> Path:
    """The file itself, or the one file or index of a folder."""
    try:
        if place.is_dir():
            found = sorted(path for path in place.iterdir() if path.suffix == ".safetensors")
            indices = sorted(path for path in place.iterdir() if path.name.endswith(INDEX))
            if indices:
                left = [path.name for path in found if len(indices) > 1 or path.name not in _shards(indices[0])]
                if len(indices) > 1 or left:
                    names = ", ".join(shown(name, 60) for name in [*(path.name for path in indices), *left][:4])
                    raise AdapterError(f"the folder {shown(place)} holds several sets of weights, {names}; name one")
                return indices[0]
            if len(found) != 1:
                names = f": {', '.join(shown(path.name, 60) for path in found[:4])}" if found else ""
                raise AdapterError(
                    f"the folder {shown(place)} holds {len(found)} safetensors files{names}; name the one to use, "
                    f"or put their index (MODEL{INDEX}) beside them if they are parts of one model"
                )
            return found[0]
    except OSError as error:
        raise AdapterError(f"{shown(place)} cannot be read: {shown(error.strerror or error)}") from error
    if place.suffix.lower() in PICKLES:
        raise AdapterError(
            f"{shown(place)} is a pickle by its name, which runs code when it is opened, so it was not; have it as "
            "safetensors (safetensors.torch.save_file), from somebody whom you trust with that"
        )
    return place


def _shards(path: Path) -> dict[str, set[str] | None]:
    """By file the tensors that an index says lie in it. Raises :class:`AdapterError`."""
    try:
        with open_plain(path, MOST_INDEX) as file:
            fields = parse_json(read_at_most(file, MOST_INDEX))
        places = fields.get("weight_map") if isinstance(fields, dict) else None
        if not isinstance(places, dict) or not places:
            raise ValueError("it has no weight_map")
    except (OSError, ValueError, RecursionError) as error:
        reason = shown(getattr(error, "strerror", None) or error, 300)
        raise AdapterError(
            f"{shown(path)} is no index of safetensors files: {reason}; get it anew, or name the file of weights"
        ) from error
    shards: dict[str, set[str] | None] = {}
    for name, shard in places.items():
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise AdapterError(
                f"{shown(path)} says that {shown(name, 100)} lies in {quoted(shard, 100)}, which is no name of a "
                "safetensors file beside it; get it anew"
            )
        held = shards.setdefault(shard, set())
        assert held is not None
        held.add(name)
    return shards


def _config(path: Path, header: Mapping[str, str], by_peft: bool) -> Mapping[str, object]:
    """PEFT's configuration of a file: in its header, or beside it if PEFT itself wrote it."""
    beside = path.with_name(CONFIG)
    try:
        if METADATA in header:
            found = parse_json(header[METADATA])
        elif by_peft and beside.is_file():
            with open_plain(beside, MOST_CONFIG) as file:
                found = parse_json(read_at_most(file, MOST_CONFIG))
        else:
            return {}
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        what = f"{METADATA} in the header of {shown(path)}" if METADATA in header else shown(beside)
        raise AdapterError(
            f"{what} cannot be read: {shown(error, 300)}; without it nobody knows the LoRA's scale: save it again"
        ) from error
    return found


# --- what it changes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changes:
    """What a file does to the weights of a bundle, by their names in it. ``kind``: ``"lora"`` or ``"weights"``;
    ``tensors``: where :class:`LowRank` and :class:`Whole` find theirs."""

    kind: str
    tensors: Mapping[str, Tensor]
    by_weight: Mapping[str, LowRank | Whole]

    def of(self, name: str, weight: Tensor, scale: float) -> Tensor:
        """The new value of a weight, of its shape and dtype; computed in float32 (float64 where the weight is).

        Raises :class:`AdapterError` for numbers that are not finite.
        """
        change = self.by_weight[name]
        exact = torch.float64 if weight.dtype is torch.float64 else torch.float32
        if isinstance(change, Whole):
            found = self._finite(change.name).to(exact)
        else:
            up, down = self._finite(change.up).to(exact), self._finite(change.down).to(exact)
            product = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            found = weight.to(exact) + scale * change.factor * product
        made = found.to(weight.dtype)
        if not torch.isfinite(made).all():
            raise AdapterError(
                f"{shown(name)} is not finite with the adapter: its numbers are too large for {weight.dtype}, or the "
                f"weight was not finite before; a smaller scale than {scale:g} may help"
            )
        return made

    def _finite(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        if not torch.isfinite(tensor if tensor.dtype is torch.float64 else tensor.float()).all():
            raise AdapterError(
                f"{shown(name)} of the adapter holds NaN or infinity; its training diverged, or it is damaged"
            )
        return tensor


def changes(
    file: AdapterFile,
    stored: Mapping[str, Place],
    components: Sequence[str],
    without: Collection[str] = (),
    pipeline: str = "",
) -> Changes:
    """What ``file`` does to the weights ``stored`` in a bundle, by their names there, ``COMPONENT.MODULE.weight``.

    ``components``: of the models in the sampling loop, which names without a component are taken of. ``without``: parts
    whose tensors are left out, ``transformer.proj_out`` or ``text_encoder``. ``pipeline``: the name of its class, whose
    converter in diffusers takes other forms. Shapes and dtypes are compared here, numbers not looked at.

    Raises :class:`AdapterError` for what is not used to the last tensor.
    """
    there = [part for part in without if any(_is_of(name, part) for name in file.shapes)]
    file = _left_out(file, there)
    for kind, form in OTHER_METHODS.items():
        if name := next(filter(form.search, file.shapes), None):
            raise AdapterError(f"{shown(file.path)} is {kind} ({shown(name, 100)}), which is more than a LoRA: {FUSE}")
    if any("lora" in name and OTHER_FORM.search(name) for name in file.shapes):
        file = _converted(file, pipeline)
    file = _left_out(file, [part for part in without if part not in there])  # by its name in diffusers' form
    is_lora = any(FACTOR.fullmatch(name) for name in file.shapes)
    found = _Found(file, stored, tuple(components))
    by_weight: Mapping[str, LowRank | Whole] = _low_rank(found) if is_lora else _whole(found)
    found.refuse_the_rest()
    return Changes(LORA if is_lora else WEIGHTS, file.tensors, by_weight)


def _left_out(file: AdapterFile, without: Collection[str]) -> AdapterFile:
    """The file without some parts. Raises :class:`AdapterError` for parts that it does not have."""
    for part in without:
        if not any(_is_of(name, part) for name in file.shapes):
            raise AdapterError(
                f"nothing in {shown(file.path)} is of {quoted(part)}, which is to be left out; its names are such as "
                f"{_some(file.shapes)}"
            )
    kept = {name: each for name, each in file.shapes.items() if not any(_is_of(name, part) for part in without)}
    if not kept:
        raise AdapterError(f"nothing of {shown(file.path)} is left to put into the bundle; leave less out")
    return AdapterFile(file.path, file.sha256, file.tensors, kept, file.config)


def _is_of(name: str, part: str) -> bool:
    return bool(part) and f"{name.removeprefix(PEFT_PREFIX)}.".startswith(f"{part}.")


def _some(names: Collection[str]) -> str:
    """A few names, for a message."""
    few = [shown(name, 100) for name in sorted(names)[:3]]
    return ", ".join(few) + (f" and {len(names) - len(few)} more" if len(names) > len(few) else "")


class _Found:
    """A file beside the weights of a bundle: which weight a name means, and which names meant none."""

    def __init__(self, file: AdapterFile, stored: Mapping[str, Place], components: tuple[str, ...]) -> None:
        self.file, self.stored, self.components = file, stored, components
        self.unknown: list[str] = []

    def weight(self, given: str, tensors: Sequence[str]) -> str | None:
        """The weight of the bundle that ``given`` means, with its component or without; None, noted, if none."""
        if given in self.stored:
            return given
        found = [name for component in self.components if (name := f"{component}.{given}") in self.stored]
        if len(found) > 1:
            raise AdapterError(
                f"{quoted(given)} in {shown(self.file.path)} could be {' or '.join(found)}; name tensors with their "
                "component first"
            )
        if not found:
            self.unknown += tensors
            return None
        return found[0]

    def refuse_the_rest(self) -> None:
        """Raise :class:`AdapterError` if any name of the file means no weight of the bundle."""
        if not self.unknown:
            return
        parts = sorted({name.removeprefix(PEFT_PREFIX).split(".")[0] for name in self.unknown})
        held = sorted({name.split(".")[0] for name in self.stored})
        encoders = [part for part in parts if part.startswith(ENCODER) and part not in held]
        if encoders:
            remedy = (
                f"the bundle has no {encoders[0]}, its callers give it embeddings: make them with that LoRA in the "
                f"pipeline, and {LEAVE_OUT.format(part=encoders[0])}"
            )
        else:
            module = FACTOR.sub(r"\g<module>", sorted(self.unknown)[0]).removeprefix(PEFT_PREFIX)
            part = module.rpartition(".")[0] if module == sorted(self.unknown)[0] else module
            remedy = (
                f"the bundle has weights of {', '.join(shown(name, 60) for name in held)}, {_some(self.stored)}: give "
                "an adapter of its model. If the model has them and no engine reads them, "
                f"{LEAVE_OUT.format(part=shown(part or module, 100))}"
            )
        raise AdapterError(
            f"{len(self.unknown)} of {len(self.file.shapes)} tensors in {shown(self.file.path)} mean no weight of the "
            f"bundle: {_some(self.unknown)}; {remedy}"
        )

    def check_floats(self, name: str, tensors: Sequence[str]) -> None:
        place = self.stored[name]
        for each in tensors:
            if not self.file.shapes[each].dtype.startswith(("F", "BF")):
                raise AdapterError(f"{shown(each)} is of {self.file.shapes[each].dtype}; weights are of floats")
        if not place.dtype.is_floating_point:
            raise AdapterError(
                f"{shown(name)} is of {place.dtype} in the bundle, into which nothing can be put; {FUSE}, and export"
            )


def _low_rank(found: _Found) -> dict[str, LowRank | Whole]:
    """What a LoRA adds, by weight."""
    file = found.file
    factors: dict[str, dict[str, str]] = {}
    alphas: dict[str, str] = {}
    mixed = []
    for name in file.shapes:
        if match := FACTOR.fullmatch(name):
            factors.setdefault(match["module"], {})[match["factor"]] = name
        elif match := ALPHA.fullmatch(name):
            alphas[match["module"]] = name
        elif name.startswith(ENCODER):  # diffusers' converters have names of their own for these
            found.unknown.append(name)
        else:
            mixed.append(name)
    if mixed:
        raise AdapterError(
            f"{shown(file.path)} holds factors of a LoRA and {len(mixed)} tensors that are none: {_some(mixed)}; {FUSE}"
        )
    if lonely := sorted(set(alphas) - set(factors)):
        raise AdapterError(f"{shown(file.path)} has an alpha of {shown(lonely[0], 100)} and no factors; it is damaged")
    if alphas and file.config:
        raise AdapterError(
            f"{shown(file.path)} tells its scale twice, by {shown(alphas[min(alphas)], 100)} and by PEFT's "
            "configuration; take out one of them"
        )
    numbers = {module: _number(file, name) for module, name in alphas.items()}
    by_weight: dict[str, LowRank | Whole] = {}
    for module, pair in sorted(factors.items()):
        if len(pair) != 2:
            raise AdapterError(
                f"{shown(module, 100)} has one factor in {shown(file.path)} ({shown(next(iter(pair.values())), 100)}) "
                "of two; the file is damaged"
            )
        own = module.removeprefix(PEFT_PREFIX)
        weight = found.weight(f"{own}.weight", list(pair.values()))
        if weight is None:
            continue
        if weight in by_weight:
            raise AdapterError(f"{shown(file.path)} has two LoRAs for {shown(weight)}; take out one of them")
        rank = _rank(found, weight, pair)
        factor = _alpha(file, module, own, rank, numbers)
        by_weight[weight] = LowRank(pair["A"], pair["B"], factor)
    return by_weight


def _number(file: AdapterFile, name: str) -> float:
    """The one number that a tensor holds."""
    if math.prod(file.shapes[name].shape) != 1:
        raise AdapterError(f"{shown(name)} has the shape {file.shapes[name].shape}; an alpha is one number")
    value = float(file.tensors[name].detach().reshape(()))
    if not math.isfinite(value):
        raise AdapterError(f"{shown(name)} is {value}; an alpha is a finite number")
    return value


def _rank(found: _Found, name: str, pair: Mapping[str, str]) -> int:
    """The rank of a pair that fits a weight."""
    up, down = (found.file.shapes[pair[factor]].shape for factor in "BA")
    wanted = found.stored[name].shape
    found.check_floats(name, list(pair.values()))
    fits = (
        len(wanted) == len(up) == len(down) >= 2
        and up[0] == wanted[0]
        and up[1] == down[0]
        and set(up[2:]) <= {1}
        and down[1:] == wanted[1:]
    )
    if not fits:
        raise AdapterError(
            f"the LoRA of {shown(name)} does not fit: lora_B {up} and lora_A {down} make no {wanted}; it belongs to "
            "another model, or to layers in groups"
        )
    if not up[1]:
        raise AdapterError(f"the LoRA of {shown(name)} has rank 0, so it holds nothing; it was not trained or saved")
    return up[1]


def _alpha(file: AdapterFile, module: str, own: str, rank: int, alphas: Mapping[str, float]) -> float:
    """What the product of two factors is multiplied by: alpha over the rank (over its root, with rslora).

    Without a word about it in the file that is 1, as diffusers has it. Modules without an alpha in a file of alphas
    take that of the others, if they agree.
    """
    if alphas:
        if module not in alphas and len(set(alphas.values())) > 1:
            raise AdapterError(
                f"{shown(file.path)} has no alpha for {shown(module, 100)}, and several for others; add the one that "
                "is meant"
            )
        return alphas.get(module, next(iter(alphas.values()))) / rank
    if not file.config:
        if module.startswith(PEFT_PREFIX):
            raise AdapterError(
                f"{shown(file.path)} is of PEFT's form, whose scale stands in {CONFIG}, and there is none beside it; "
                "put it there"
            )
        return 1.0
    config, within = _config_of(file.config, own)
    if not config:
        return 1.0
    return _peft_factor(file, config, within, rank)


def _config_of(config: Mapping[str, object], own: str) -> tuple[dict[str, object], str]:
    """The fields of a configuration that a module goes by, and its name within what they are for: diffusers puts those
    of all components into one, ``transformer.r`` and ``text_encoder.r``."""
    component, _, within = own.partition(".")
    fields = {name.removeprefix(f"{component}."): value for name, value in config.items()
              if name.startswith(f"{component}.")}  # fmt: skip
    return (fields, within) if fields else (dict(config) if "r" in config else {}, own)


def _peft_factor(file: AdapterFile, config: Mapping[str, object], module: str, rank: int) -> float:
    """The factor by PEFT's configuration. Raises :class:`AdapterError` for what it says that is not done here."""
    where = f"the configuration of {shown(file.path)}"
    for field, harmless in (
        ("peft_type", ("LORA",)),
        ("use_dora", (False,)),
        ("lora_bias", (False,)),
        ("fan_in_fan_out", (False,)),
        ("init_lora_weights", (True, False, "gaussian")),
    ):
        value = config.get(field)
        if value is not None and value not in harmless:
            raise AdapterError(f"{where} says {field} = {quoted(value, 60)}, which is more than a LoRA: {FUSE}")
    said = _by_pattern(file, config, "rank_pattern", "r", module)
    if said is not None and said != rank:
        raise AdapterError(
            f"{where} says rank {said:g} of {shown(module, 100)}, whose factors have {rank}; they belong to two files"
        )
    alpha = _by_pattern(file, config, "alpha_pattern", "lora_alpha", module)
    if alpha is None:
        raise AdapterError(f"{where} has no lora_alpha, which its scale is made of; add it")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(
    file: AdapterFile, config: Mapping[str, object], patterns: str, usual: str, module: str
) -> float | None:
    """A number of the configuration for a module: that of the first pattern which is the end of its name, or the usual
    one. Patterns can be regular expressions, which are not taken from files."""
    table = config.get(patterns) or {}
    if not isinstance(table, dict):
        raise AdapterError(f"{patterns} in the configuration of {shown(file.path)} is no table of modules")
    value = config.get(usual)
    for pattern, number in table.items():
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.-]+", plain):
            raise AdapterError(
                f"{patterns} in the configuration of {shown(file.path)} has the regular expression "
                f"{quoted(pattern, 100)}, which is not carried out; name modules there"
            )
        if module == plain or (not pattern.startswith("^") and module.endswith(f".{plain}")):
            value = number
            break
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise AdapterError(f"{usual} in the configuration of {shown(file.path)} is {quoted(value, 60)}, no number")
    return float(value)


def _whole(found: _Found) -> dict[str, LowRank | Whole]:
    """Whole weights, by name."""
    by_weight: dict[str, LowRank | Whole] = {}
    for given in sorted(found.file.shapes):
        name = found.weight(given, [given])
        if name is None:
            continue
        if name in by_weight:
            raise AdapterError(f"{shown(found.file.path)} has {shown(name)} twice; take out one of them")
        found.check_floats(name, [given])
        mine, theirs = found.stored[name].shape, found.file.shapes[given].shape
        if mine != theirs:
            raise AdapterError(
                f"{shown(given)} has the shape {theirs} in {shown(found.file.path)}, and {mine} in the bundle; give "
                "weights of a model of the same configuration, or export the other model"
            )
        by_weight[name] = Whole(given)
    return by_weight


# --- other forms -----------------------------------------------------------------------------------------------------


def _converted(file: AdapterFile, pipeline: str) -> AdapterFile:
    """A LoRA of another form in diffusers' own, by the converter of its pipeline. Raises :class:`AdapterError` where
    there is none, it fails, or it leaves tensors out."""
    odd = next(name for name in file.shapes if "lora" in name and OTHER_FORM.search(name))
    refusal = f"{shown(file.path)} is a LoRA in a form of another program ({shown(odd, 100)})"
    remedy = (
        "load it with pipe.load_lora_weights(file), save it with pipe.transformer.save_lora_adapter(folder), and name "
        "that folder"
    )
    convert = _converter(pipeline)
    if convert is None:
        raise AdapterError(f"{refusal}, and diffusers, which converts it, is not here or not for {shown(pipeline)}; "
                           f"{remedy}")  # fmt: skip
    given = {name: file.tensors[name] for name in file.shapes}
    for tensor in given.values():
        if tensor.is_floating_point():
            tensor.requires_grad_(True)
    try:
        with torch.enable_grad():
            made, alphas = convert({name: tensor.clone() for name, tensor in given.items()})
            total = torch.stack([tensor.float().sum() for tensor in made.values() if tensor.requires_grad]).sum()
            total.backward()
    except Exception as error:  # converters share no class of errors
        raise AdapterError(f"{refusal}, which diffusers does not convert: {shown(error, 300)}; {remedy}") from error
    unused = [name for name, tensor in given.items() if tensor.requires_grad and tensor.grad is None]
    lost = [name for name in unused if not ALPHA.fullmatch(name)]  # those are read as plain numbers
    if lost:
        raise AdapterError(f"{refusal}, of which diffusers leaves out {len(lost)} tensors: {_some(lost)}; {remedy}")
    tensors = {name: tensor.detach() for name, tensor in (made | alphas).items()}
    shapes = {name: Shape(tuple(tensor.shape), _DTYPES.get(tensor.dtype, "")) for name, tensor in tensors.items()}
    return AdapterFile(file.path, file.sha256, tensors, shapes, {})


_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def _converter(pipeline: str) -> Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]] | None:
    """How diffusers reads LoRAs for a class of pipelines: from tensors by name to tensors and alphas in its own form.
    None without diffusers, or for a class that loads no LoRAs."""
    try:
        import diffusers

        read = getattr(getattr(diffusers, pipeline, None), "lora_state_dict", None)
    except (ImportError, RuntimeError):  # its stand-ins for pipelines without transformers raise on any attribute
        return None
    if read is None:
        return None

    def convert(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found = read(tensors, return_alphas=True)
        state, alphas = found if isinstance(found, tuple) else (found, None)
        return state, {name: torch.as_tensor(value) for name, value in (alphas or {}).items()}

    return convert
