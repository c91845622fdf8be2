"""What came of plans that were run, on disk after each, so that a search that was interrupted runs none of them again.

A record belongs to one table of errors, one way to call one pipeline, and one machine, whose times it holds, and is
refused for any other. Plans are known by their decisions and weights, so it serves searches under any limit.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from difa_compile.calibration.sampling import identity_of
from difa_compile.calibration.state import digest_of
from difa_compile.errors import CalibrationStateError
from difa_compile.files.documents import Format, Unfit, as_list, as_mapping, as_number, as_text
from difa_compile.files.writing import check_target, write_whole
from difa_compile.machine.profile import DEVICES, Machine
from difa_compile.pipeline.transformers import find_transformers
from difa_compile.plan.plan import Plan
from difa_compile.planner.effects import Array
from difa_compile.planner.table import ErrorTable
from difa_compile.wording import shown

ROUNDS = 3
"""How often the full model and a plan are timed, one after the other, where a plan is held to its word."""

TRIALS = Format(
    name="record of trials",
    version_key="trials_version",
    version=2,
    keys=("identity", "tried"),
    most_bytes=2**26,
    damaged=CalibrationStateError,
    other_version=CalibrationStateError,
    edited=CalibrationStateError,
    where_from="name another file",
    again="delete it to run the plans again",
)


@dataclass(frozen=True)
class Held:
    """What came of a plan in a run: ``share`` of the full model's time, both undisturbed
    (:func:`difa_compile.comparison.compare.undisturbed`), and PSNR in dB against its images, with the seeds that plans
    are chosen by and with the held-out ones; infinite for equal images. Of one round nothing can be left out."""

    share: float
    psnr: float
    held_out_psnr: float

    @property
    def decibels(self) -> float | None:
        """The PSNR; None for equal images."""
        return self.psnr if math.isfinite(self.psnr) else None

    def __str__(self) -> str:
        quality = "the same images" if self.decibels is None else f"{self.psnr:.1f} dB"
        return f"{self.share:.2f} of full's time, {quality}"


class Runs(Protocol):
    """What runs plans beside the full model."""

    def judge(self, plan: Plan) -> float:
        """The PSNR in dB of a plan with the seeds that plans are chosen by."""
        ...

    def run(self, plan: Plan, rounds: int = ROUNDS) -> Held:
        """Run a plan beside the full model, timed so many times."""
        ...


@dataclass
class KeptTrials:
    """``runs`` whose results are kept at ``path``, and looked up there first.

    ``tried``: by the digest of a plan's decisions and weights and the number of rounds, what came of it; of one that
    was judged, without a round, the PSNR alone. There is no file before the first result.
    """

    runs: Runs
    path: Path
    identity: Mapping[str, str]
    tried: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @classmethod
    def open(cls, runs: Runs, path: Path, identity: Mapping[str, str]) -> KeptTrials:
        """The record at ``path``, or an empty one.

        Raises :class:`CalibrationStateError` if the file is damaged or of other trials, and :class:`OutputError` if it
        could not be written. Leaves the file as it is.
        """
        check_target(path, "the record of trials")
        kept = cls(runs, path, dict(identity))
        if path.exists():
            known, kept.tried = read_trials(path)
            differing = [name for name in {**known, **kept.identity} if known.get(name) != kept.identity.get(name)]
            if differing:
                raise CalibrationStateError(
                    f"the record of trials {shown(path)} is of others: {shown(', '.join(differing))} differ; delete it "
                    "to run the plans again, or name another state"
                )
        return kept

    def judge(self, plan: Plan) -> float:
        """As :meth:`Runs.judge`."""
        key = _key(plan, 0)
        if key not in self.tried:
            self._keep(key, (self.runs.judge(plan),))
        return self.tried[key][0]

    def run(self, plan: Plan, rounds: int = ROUNDS) -> Held:
        """As :meth:`Runs.run`; what was timed more often than that serves as well."""
        digest = digest_of_decisions(plan)
        known = [int(key.split()[1]) for key in self.tried if key.startswith(f"{digest} ")]
        key = _key(plan, max([rounds, *known]))
        if key not in self.tried:
            found = self.runs.run(plan, rounds)
            self._keep(key, (found.share, found.psnr, found.held_out_psnr))
        share, psnr, held_out = self.tried[key]
        return Held(share, psnr, held_out)

    def _keep(self, key: str, found: tuple[float, ...]) -> None:
        """Note a result and write the file, whole or not at all. Raises :class:`OutputError`."""
        self.tried[key] = found
        content = {"identity": dict(self.identity), "tried": _json_of(self.tried)}
        write_whole(self.path, json.dumps(TRIALS.frame(content), allow_nan=False) + "\n", "the record of trials")


def read_trials(path: Path) -> tuple[dict[str, str], dict[str, tuple[float, ...]]]:
    """The identity and the results in a file. Raises :class:`CalibrationStateError` if it is damaged or edited."""
    document = TRIALS.parse(TRIALS.read_bytes(path), path)
    with TRIALS.reading(path):
        identity = {
            name: as_text(value, f"identity.{name}")
            for name, value in as_mapping(document["identity"], "identity").items()
        }
        tried = {
            key: _read_result(value, key, f"tried.{shown(key, 80)}")
            for key, value in as_mapping(document["tried"], "tried").items()
        }
    TRIALS.check_digest(document, {"identity": identity, "tried": _json_of(tried)}, path)
    return identity, tried


def trials_file(state: Path) -> Path:
    """Where the record of trials stands beside the state of a measurement."""
    return Path(f"{state}.trials")


def delete_kept(*paths: Path) -> None:
    """Delete files that are done with; one that cannot be deleted is told, and harms nobody."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            warnings.warn(f"{shown(path)} is done with but cannot be deleted: {shown(error)}", stacklevel=2)


def identity_of_trials(
    pipe: Any, inputs: Mapping[str, Any], steps: int, seeds: Sequence[int], held_out: Sequence[int], table: ErrorTable
) -> dict[str, str]:
    """Digests of all that the results of plans of ``table`` depend on, by what they cover.

    Raises :class:`CalibrationStateError` for inputs whose content cannot be told.
    """
    settings = {"seeds": list(seeds), "held out": list(held_out)}
    device = torch.device(pipe.device)
    machine = str(Machine.here(device)) if device.type in DEVICES else device.type
    own = identity_of(pipe, tuple(find_transformers(pipe)), inputs, settings, steps)
    return {**own, "table of errors": digest_of_table(table), "machine": machine}


def digest_of_table(table: ErrorTable) -> str:
    """The digest of all that plans are chosen from, which is the same for a table and for its file."""
    stored = as_stored(table)
    units = [
        {item.name: getattr(unit, item.name) for item in fields(unit)}
        | {"computed": {str(decision): values for decision, values in unit.computed.items()}}
        | {"residual": {str(decision): values for decision, values in unit.residual.items()}}
        for unit in stored.units
    ]
    described = {"model": asdict(table.model), "sites": [site.path for site in table.sites], "units": units}
    said = {item.name: getattr(table, item.name) for item in fields(table) if item.name not in ("settings", "identity")}
    return digest_of(said | described)


def as_stored(table: ErrorTable) -> ErrorTable:
    """The table as it comes from its file, in single precision, so that the same plans are chosen from both."""
    units = tuple(
        replace(
            unit,
            drift=_single(unit.drift),
            spread=_single(unit.spread),
            computed={decision: _single(values) for decision, values in unit.computed.items()},
            residual={decision: _single(values) for decision, values in unit.residual.items()},
        )
        for unit in table.units
    )
    return replace(table, units=units)


def _single(values: Array) -> Array:
    return values.astype(np.float32).astype(np.float64)


def digest_of_decisions(plan: Plan) -> str:
    """A plan by what is done at which step, whatever is said of it."""
    decisions = [[str(decision) for decision in row] for row in plan.decisions]
    weights = [[step, site, list(weights)] for (step, site), (_, weights) in sorted(plan.fitted.items())]
    done = [decisions, plan.progress, [site.path for site in plan.sites], *([weights] if weights else [])]
    return digest_of(done)


def _key(plan: Plan, rounds: int) -> str:
    return f"{digest_of_decisions(plan)} {rounds}"


def _json_of(tried: Mapping[str, tuple[float, ...]]) -> dict[str, list[float | None]]:
    """Results as JSON types: infinite numbers are null."""
    return {key: [value if math.isfinite(value) else None for value in found] for key, found in tried.items()}


def _read_result(value: object, key: str, where: str) -> tuple[float, ...]:
    expected = 1 if key.endswith(" 0") else 3
    items = as_list(value, where)
    if len(items) != expected:
        raise Unfit(f"{where} has {len(items)} entries; it must have {expected}")
    found = tuple(math.inf if item is None else as_number(item, where) for item in items)
    if min(found) < 0 or (expected == 3 and not found[0] < math.inf):
        raise Unfit(f"{where} holds no results of a run: {shown(items)}")
    return found
