"""What differs between two bundles: by their manifests, and by the numbers in their weights.

print(bundle_difference("digits/", "digits-style/").weights)
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from difa_compile.bundle.adapters import LORA
from difa_compile.bundle.adapting import relative_change
from difa_compile.bundle.manifest import Engine, Manifest, check_file, checked_bytes, read_manifest
from difa_compile.bundle.program import Program
from difa_compile.bundle.weights import WeightFile, bytes_of
from difa_compile.errors import PlanMismatchError
from difa_compile.files.documents import parse_json
from difa_compile.plan.plan import Plan

DIGITS = 12
"""Of a digest that is shown."""


@dataclass(frozen=True)
class Sides:
    """What stands for one thing in the two bundles, as text; "" where there is nothing."""

    first: str
    second: str


@dataclass(frozen=True)
class WeightChange:
    """A tensor that both have, with other numbers. ``amount``: the norm of the difference as a share of the first's;
    infinite where that is 0, None where shapes or dtypes differ, which ``form`` tells ("" where they do not)."""

    name: str
    amount: float | None
    form: str


@dataclass(frozen=True)
class PlanChange:
    """A plan of one tier that is another. ``cells``: how many decisions differ, of ``of``; None where the plans cannot
    be compared cell by cell, for the reason ``why``. ``weights``: how many forecasts have others."""

    tier: str
    cells: int | None
    of: int
    why: str
    weights: int = 0


@dataclass(frozen=True)
class BundleDifference:
    """What differs between a first and a second bundle; empty parts are equal.

    ``source``: of the model and what was put into it, ``versions``: of what made the bundles, ``settings``: tiers,
    targets, images, caches, conditions, decoding; each by its name. ``plans``: of tiers that both have. ``programs``:
    by tier and steps the sampling loop, and the engines that its calls run. ``engines``: by target and name those that
    one of them alone has; ``kept``: how many both have, by the digest of what they were made from. ``added``,
    ``removed``: names of tensors that one of them has, ``changed``: of those that both have. ``bytes``: on the disk.
    """

    source: Mapping[str, Sides]
    versions: Mapping[str, Sides]
    settings: Mapping[str, Sides]
    plans: tuple[PlanChange, ...]
    programs: Mapping[str, Sides]
    engines: Mapping[str, Sides]
    kept: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[WeightChange, ...]
    bytes: tuple[int, int]

    @property
    def equal(self) -> bool:
        """Whether they hold the same things, whatever their files are called and how large they are."""
        parts = (self.source, self.versions, self.settings, self.plans, self.programs, self.engines)
        return not any((*parts, self.added, self.removed, self.changed))


def bundle_difference(first: str | Path, second: str | Path) -> BundleDifference:
    """Compare two bundles. Nothing is run; files that are looked into must be what their manifests say.

    Raises :class:`BundleFormatError` and its subclasses, and what plans and programs raise that are damaged.
    """
    pair = _Side.of(first), _Side.of(second)
    one, other = pair
    names = [set(each.weights.places) for each in pair]
    engines, kept = _engines(*pair)
    return BundleDifference(
        source=_fields(one.source(), other.source()),
        versions=_fields(one.manifest.made_with, other.manifest.made_with),
        settings=_fields(one.settings(), other.settings()),
        plans=tuple(_plans(*pair)),
        programs=_fields(one.programs(), other.programs()),
        engines=engines,
        kept=kept,
        added=tuple(sorted(names[1] - names[0])),
        removed=tuple(sorted(names[0] - names[1])),
        changed=tuple(_changed(*pair, sorted(names[0] & names[1]))),
        bytes=(one.size, other.size),
    )


@dataclass(frozen=True)
class _Side:
    """One of the two bundles, and what it says of itself as text."""

    folder: Path
    manifest: Manifest
    weights: WeightFile

    @classmethod
    def of(cls, folder: str | Path) -> _Side:
        manifest = read_manifest(folder)
        path = Path(folder)
        return cls(path, manifest, WeightFile(check_file(path, manifest.weights, manifest.files)))

    @property
    def size(self) -> int:
        return sum(file.bytes for file in self.manifest.files.values())

    def plan(self, tier: str) -> Plan:
        return Plan.load(check_file(self.folder, self.manifest.plans[tier], self.manifest.files))

    def digest(self, name: str) -> str:
        return self.manifest.files[name].sha256[:DIGITS] if name else ""

    def source(self) -> dict[str, str]:
        source = self.manifest.source
        adapters = [
            f"{each.name} {each.sha256[:DIGITS]}"
            + (f", scale {each.scale:g}" if each.kind == LORA else "")
            + (f", without {', '.join(each.without)}" if each.without else "")
            for each in self.manifest.adapters
        ]
        return {
            "pipeline": source.pipeline,
            "name": source.name,
            "model": source.model,
            "configuration": source.config_digest[:DIGITS],
            "licence": source.licence,
            "model card": self.digest(source.card),
            "notices": " ".join(map(self.digest, self.manifest.notices)),
            "put in": "; ".join(adapters),
        }

    def settings(self) -> dict[str, str]:
        manifest = self.manifest
        images = sorted({engine.images for engine in manifest.engines if engine.row >= 0})
        steps = {
            tier: ",".join(str(each.steps) for each in manifest.schedules if (each.tier, each.size) == (tier, 0))
            for tier in manifest.tiers
        }
        sizes = {size.name: size for size in manifest.sizes}
        return {
            "tiers and steps": "; ".join(f"{tier}: {each}" for tier, each in steps.items()),
            "targets": ", ".join(manifest.targets),
            "images": ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in images),
            "caches": f"{len(manifest.slots)}, of {manifest.cache_bytes()} bytes an image",
            "sizes": ", ".join(filter(None, sizes)),
            "fixed conditions": ", ".join(
                " ".join(filter(None, (size, f"{half}.{name}")))
                for size, each in sizes.items()
                for half, given in sorted(each.conditions.items())
                for name in sorted(given)
            ),
            **self.prompts(),
            "decoding": ", ".join("x".join(map(str, each.decode.shape)) for each in sizes.values() if each.decode),
        }

    def prompts(self) -> dict[str, str]:
        """The texts that it takes, and by half how numbers are made of them."""
        prompts = self.manifest.prompts
        if prompts is None:
            return {"texts": ""}
        texts = [
            name
            + (f" after {text.follows}" if text.follows else "")
            + (f", else {json.dumps(text.default)}" if text.default is not None else "")
            for name, text in sorted(prompts.texts.items())
        ]
        found = {"texts": "; ".join(texts)}
        for encoder in prompts.encoders:
            found[f"tokens of {encoder.half}"] = "; ".join(
                f"{each.text}: {self.digest(each.file)}, {' '.join([*each.steps, *sorted(each.inputs)])}"
                + (f", {json.dumps([each.before, each.after])}" if each.before or each.after else "")
                + ("" if each.special else ", no special tokens")
                for each in encoder.tokens
            )
        return found

    def programs(self) -> dict[str, str]:
        """By tier and steps: the scheduler, the calls, the guidance scales, and digests of what else there is."""
        by_row: dict[int, list[str]] = {}
        for engine in self.manifest.engines:
            by_row.setdefault(engine.row, []).append("".join(_identity(self, engine)))
        found = {}
        for schedule in self.manifest.schedules:
            program = Program.from_json(
                parse_json(checked_bytes(self.folder, schedule.program, self.manifest.files)), schedule.program
            )
            order = [[sorted(by_row[call.row]), sorted(call.weights.items())] for call in schedule.calls]
            scales = [f"{scale.name} free" for scale in program.scales]
            scales += [f"{scale.name} {scale.value:g}" for scale in program.baked]
            size = self.manifest.sizes[schedule.size].name
            found[f"{schedule.tier}, {schedule.steps} steps" + (f", {size}" if size else "")] = ", ".join(
                [
                    program.scheduler,
                    f"{len(program.calls)} calls of {len({call.row for call in schedule.calls})} engines",
                    *scales,
                    f"loop {self.digest(schedule.program)}",
                    f"order {hashlib.sha256(json.dumps(order).encode()).hexdigest()[:DIGITS]}",
                ]
            )
        return found


def _identity(side: _Side, engine: Engine) -> tuple[str, str]:
    """What engines are the same by: target, and the digest of what they were made from."""
    return engine.target, engine.key or side.manifest.files[engine.file].sha256


def _engines(one: _Side, other: _Side) -> tuple[dict[str, Sides], int]:
    """Engines that one side alone has, by target and name, and how many both have."""
    counts = [Counter(_identity(side, engine) for engine in side.manifest.engines) for side in (one, other)]
    shared = counts[0] & counts[1]
    texts = []
    for side in (one, other):
        left = Counter(shared)
        described: dict[str, str] = {}
        for engine in side.manifest.engines:
            identity = _identity(side, engine)
            if left[identity]:
                left[identity] -= 1
                continue
            reads, writes = (
                sum(port.name.startswith("cache.") for port in ports) for ports in (engine.inputs, engine.outputs)
            )
            low, high = engine.images
            described[f"{engine.target} {engine.file.rpartition('-')[0]}"] = (
                f"{low if low == high else f'{low}-{high}'} images, {len(engine.weights)} weights, {reads} caches in, "
                f"{writes} out, {engine.instruction_set or 'any processor'}, {identity[1][:DIGITS]}"
            )
        texts.append(described)
    return _fields(*texts), shared.total()


def _fields(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, Sides]:
    """The fields whose texts differ; one that a side has not is "" there."""
    sides = {name: Sides(one.get(name, ""), other.get(name, "")) for name in [*one, *other]}
    return {name: each for name, each in sides.items() if each.first != each.second}


def _plans(one: _Side, other: _Side) -> Iterator[PlanChange]:
    for tier in one.manifest.plans:
        if tier not in other.manifest.plans:
            continue  # told among the tiers
        mine, theirs = one.plan(tier), other.plan(tier)
        if mine.digest == theirs.digest:
            continue
        cells = sum(len(row) for row in mine.decisions)
        try:
            yield PlanChange(tier, len(mine.diff(theirs)), cells, "", mine.other_weights(theirs))
        except PlanMismatchError as error:
            yield PlanChange(tier, None, cells, str(error))


def _changed(one: _Side, other: _Side, names: Sequence[str]) -> Iterator[WeightChange]:
    """Tensors of both with other numbers, or of another form."""
    if one.digest(one.manifest.weights) == other.digest(other.manifest.weights):
        return
    for name in names:
        before, after = one.weights[name], other.weights[name]
        forms = [f"{str(each.dtype).removeprefix('torch.')} {list(each.shape)}" for each in (before, after)]
        if forms[0] == forms[1] and bytes_of(before) == bytes_of(after):
            continue
        amount = relative_change(before, after) if before.shape == after.shape else None
        yield WeightChange(name, amount, " -> ".join(forms) if forms[0] != forms[1] else "")
