"""Tables of errors: what was measured of a model, for plans under any budget; a file.

```
{
  "table_version": 3,
  "digest": "<SHA-256 of everything below, as canonical JSON>",
  "model": ..., "settings": ..., "sites": [...], "progress": [...],   (as in a plan)
  "begins": [],
  "done": 50,
  "machine": "...",
  "seconds": {"full": 0.06, "blocks filled": 0.061, ...},
  "calls": 1,
  "identity": {"weights": "<digest>", ...},
  "units": [{"name": "blocks", "sites": [6], "inside": null, "lags": [1, 2, ...], "decisions": [], "drift": "<base64>",
             "spread": "<base64>", "computed": {"full+cfg": "<base64>"}, "ages": [], "residual": {}}, ...]
}
```

Effects (:mod:`difa_compile.planner.effects`) are float32, little-endian, base64. A table of fewer steps than its
schedule has is that of a measurement that was interrupted, and goes on from there. Version 1 did not say where streams
begin, and held zeros there, as if nothing had changed; nor which machine had measured. Version 2 had no residuals.
"""

from __future__ import annotations

import base64
import binascii
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from difa_compile.decision import FULL, REUSE, Basis, Decision, Kind
from difa_compile.errors import DecisionError, ErrorTableError, PlanMismatchError, ScheduleError
from difa_compile.files.documents import Format, as_list, as_mapping, as_number, as_object, as_text, as_whole
from difa_compile.files.writing import write_whole
from difa_compile.machine.profile import machines_here
from difa_compile.plan.data import Cell, ModelInfo, Settings, SiteInfo
from difa_compile.plan.json_form import (
    model_json,
    read_model,
    read_settings,
    read_site,
    settings_json,
    site_json,
)
from difa_compile.plan.plan import Plan
from difa_compile.plan.schedule import check_steps, nearest_steps, stretched
from difa_compile.planner.effects import Array, Effects
from difa_compile.planner.problem import Costs, Problem, Unit, check_begins, flat_response
from difa_compile.wording import quoted, shown

TABLE = Format(
    name="table of errors",
    version_key="table_version",
    version=3,
    keys=(
        "model",
        "settings",
        "sites",
        "progress",
        "begins",
        "done",
        "machine",
        "seconds",
        "calls",
        "identity",
        "units",
    ),
    most_bytes=2**30,
    damaged=ErrorTableError,
    other_version=ErrorTableError,
    edited=ErrorTableError,
    where_from="give the path of a table of errors, as written by difa measure",
    again="measure again, into another file",
)

MOST_SECONDS = 1e9
"""Of a row; of numbers without a limit shares would be no numbers."""


@dataclass(frozen=True)
class MeasuredUnit:
    """The effects of sites that are decided together.

    ``sites``: their numbers in the table. ``inside``: the number of the unit that holds them. ``lags``: how many steps
    back they were tried, ascending from 1. ``drift`` (steps, lags, K): the effect of what they computed so many steps
    before.
    ``spread`` (steps, lags): of its squared size the standard deviation over the images, as a share of the mean.
    ``computed``: of each other decision its effect (steps, K). ``ages``: how old residuals were tried, ascending from
    1; none without ``residual``: of each window+residual its effect (steps, ages, K). Steps that are not done are zero.

    Decisions by heads that name as many heads as all sites have together number them site after site
    (:meth:`~difa_compile.decision.Decision.at_sites`).
    """

    name: str
    sites: tuple[int, ...]
    inside: int | None
    lags: tuple[int, ...]
    drift: Array = field(repr=False)
    spread: Array = field(repr=False)
    computed: Mapping[Decision, Array] = field(repr=False)
    ages: tuple[int, ...] = ()
    residual: Mapping[Decision, Array] = field(default_factory=dict, repr=False)

    @classmethod
    def empty(
        cls,
        name: str,
        sites: Sequence[int],
        inside: int | None,
        lags: Sequence[int],
        decisions: Sequence[Decision],
        numbers: int,
        steps: int,
        ages: Sequence[int] = (),
    ) -> MeasuredUnit:
        """A unit before anything is measured. ``ages``: how old residuals are tried, where decisions have some."""
        residual = [decision for decision in decisions if decision.kind is Kind.WINDOW_RESIDUAL]
        ages = tuple(ages) if residual else ()
        return cls(
            name,
            tuple(sites),
            inside,
            tuple(lags),
            np.zeros((steps, len(lags), numbers)),
            np.zeros((steps, len(lags))),
            {decision: np.zeros((steps, numbers)) for decision in decisions if decision not in residual},
            ages,
            {decision: np.zeros((steps, len(ages), numbers)) for decision in residual},
        )

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """All that were tried, beside what reads outputs."""
        return (*self.computed, *self.residual)

    def with_step(
        self, step: int, found: Mapping[tuple[str, object], Array], spread: Mapping[tuple[str, object], float]
    ) -> MeasuredUnit:
        """The unit with what was found at a step, by lag, by decision, or by window+residual and age; lags and ages
        that reach before the first step of its stream stay zero."""
        drift, spreads = self.drift.copy(), self.spread.copy()
        computed = {decision: values.copy() for decision, values in self.computed.items()}
        for i, lag in enumerate(self.lags):
            if (self.name, lag) in found:
                drift[step, i] = found[self.name, lag]
                spreads[step, i] = spread.get((self.name, lag), 0.0)
        for decision, values in computed.items():
            values[step] = found[self.name, decision]
        residual = {decision: values.copy() for decision, values in self.residual.items()}
        for decision, values in residual.items():
            for i, age in enumerate(self.ages):
                if (self.name, (decision, age)) in found:
                    values[step, i] = found[self.name, (decision, age)]
        return replace(self, drift=drift, spread=spreads, computed=computed, residual=residual)

    @property
    def typical_spread(self) -> float:
        """The median of the spread, over what was measured."""
        measured = self.spread[(self.drift != 0).any(2)]
        return float(np.median(measured)) if len(measured) else 0.0

    def effects(self, begins: Sequence[int] = ()) -> Effects:
        """The effects at every lag, and of residuals of every age, up to the longest that was tried; ``begins`` as in
        :class:`ErrorTable`.

        Those between lags that were tried are interpolated. Near the begin of its stream a step has not all of them:
        there they go on behind the last one that it has as between the last two, which is less far than to the next
        one that was tried. Beyond the longest nothing is known, and nothing is planned.
        """
        residual = {decision: _at_all_lags(values, self.ages, begins) for decision, values in self.residual.items()}
        return Effects(_at_all_lags(self.drift, self.lags, begins), self.computed, residual)


def _at_all_lags(measured: Array, lags: Sequence[int], begins: Sequence[int]) -> Array:
    """``measured`` (steps, lags, K) at all lags up to the longest, (steps, longest + 1, K)."""
    steps, _, numbers = measured.shape
    known = np.array([0, *lags])
    values = np.concatenate([np.zeros((steps, 1, numbers)), measured], axis=1)
    found = np.zeros((steps, lags[-1] + 1, numbers))
    for step in range(steps):
        since = step - max([0, *(begin for begin in begins if begin <= step)])
        there = int((known <= since).sum())  # lags that this step has
        for lag in range(1, min(since, lags[-1]) + 1):
            above = min(int(np.searchsorted(known, lag)), there - 1)
            low, high = known[above - 1], known[above]
            share = (lag - low) / (high - low)
            found[step, lag] = (1 - share) * values[step, above - 1] + share * values[step, above]
    return found


@dataclass(frozen=True)
class ErrorTable:
    """What was measured of a model over one schedule.

    ``seconds``: of a row of each kind, per call of the model, ``calls`` of which make a step; ``pipeline``: of a step
    outside the model. ``done``: how many steps are
    measured. ``identity``: digests of what was measured with, by what they cover. ``machine``: which took the seconds,
    in words; empty where none are known. ``begins``: the steps, ascending, at which a call of the model had nothing of
    the step before to take (another model takes over, or a call of guidance begins): nothing is read across them.
    """

    model: ModelInfo
    settings: Settings
    sites: tuple[SiteInfo, ...]
    progress: tuple[float, ...]
    units: tuple[MeasuredUnit, ...]
    done: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    calls: int = 1
    identity: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    begins: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.units or len({unit.name for unit in self.units}) != len(self.units):
            raise ErrorTableError("a table of errors needs units, at least one, and each a name of its own")
        for index, unit in enumerate(self.units):
            self._check_unit(index, unit)
        if self.calls < 1:
            raise ErrorTableError(
                f"a step is said to take {quoted(self.calls)} calls of the model; it takes at least 1"
            )
        if any(value < 0 for value in self.seconds.values()):
            raise ErrorTableError("a row is said to take less than no time")
        if any(value > MOST_SECONDS for value in self.seconds.values()):
            raise ErrorTableError("a row is said to take more than thirty years")
        missing = [name for name in self._timed() if name not in self.seconds] if self.seconds else []
        if missing:
            raise ErrorTableError(f"the table has no seconds of the row {quoted(missing[0])}")
        if not 0 <= self.done <= len(self.progress):
            raise ErrorTableError(f"{self.done} steps are said to be done, of {len(self.progress)}")
        check_begins(self.begins, len(self.progress))

    def _check_unit(self, index: int, unit: MeasuredUnit) -> None:
        name = f"unit {quoted(unit.name)}"
        if not unit.sites or any(not 0 <= site < len(self.sites) for site in unit.sites):
            raise ErrorTableError(f"{name} of the table names no site, or one that it does not have")
        if unit.inside is not None and not 0 <= unit.inside < index:
            raise ErrorTableError(f"{name} is inside unit {quoted(unit.inside)}, which must come before it")
        if len(unit.drift) != len(self.progress):
            raise ErrorTableError(
                f"{name} was measured over {len(unit.drift)} steps, but the schedule has {len(self.progress)}"
            )
        steps, _, numbers = unit.drift.shape
        shapes = [unit.drift.shape, unit.spread.shape, *(values.shape for values in unit.computed.values())]
        if shapes != [
            (steps, len(unit.lags), numbers),
            (steps, len(unit.lags)),
            *[(steps, numbers)] * len(unit.computed),
        ]:
            raise ErrorTableError(f"the effects of {name} do not go together: their sizes are {shown(shapes)}")
        self._check_decisions(name, unit)

    def _check_decisions(self, name: str, unit: MeasuredUnit) -> None:
        """Raise :class:`ErrorTableError` for residuals or head groups that the unit cannot have."""
        steps, _, numbers = unit.drift.shape
        for decision, values in unit.residual.items():
            if values.shape != (steps, len(unit.ages), numbers):
                raise ErrorTableError(
                    f"the effects of {name} do not go together: those of {decision} have the sizes "
                    f"{shown(list(values.shape))}, for {steps} steps, {len(unit.ages)} ages and {numbers} numbers"
                )
        if bool(unit.residual) != bool(unit.ages) or any(age > unit.lags[-1] for age in unit.ages):
            raise ErrorTableError(
                f"{name} has residuals of the ages {shown(list(unit.ages))}; there is one exactly where there is a "
                f"window+residual, and none is above its longest lag, {unit.lags[-1]}"
            )
        for decision in unit.decisions:
            try:
                decision.at_sites([self.sites[site].heads for site in unit.sites])
            except DecisionError as error:
                raise ErrorTableError(f"{name} of the table: {error}") from error

    def _timed(self) -> list[str]:
        """The names of the rows whose seconds costs are made of."""
        rows = ["full"]
        for unit in self.units:
            kept = dict.fromkeys(keeping(decision) for decision in unit.residual)
            rows += [f"{unit.name} {what}" for what in ("filled", "reuse", *map(str, unit.decisions), *kept)]
        return rows

    def with_step(
        self,
        found: Mapping[tuple[str, object], Array],
        spread: Mapping[tuple[str, object], float],
        begins: bool = False,
    ) -> ErrorTable:
        """The table with the next step: effects by unit and lag or decision, and whether a stream begins there."""
        units = tuple(unit.with_step(self.done, found, spread) for unit in self.units)
        began = (*self.begins, self.done) if begins else self.begins
        return replace(self, units=units, done=self.done + 1, begins=began)

    def with_seconds(self, seconds: Mapping[str, float], calls: int, machine: str) -> ErrorTable:
        """The table with what rows take on a machine."""
        return replace(self, seconds=dict(seconds), calls=calls, machine=machine)

    def thinned(self, steps: int) -> ErrorTable:
        """The table of a shorter schedule over the same course: each of its ``steps`` is the measured one that is
        nearest in progress, and what an earlier one left is as old as the distance between the two.

        Raises :class:`ErrorTableError` if steps are missing, and :class:`ScheduleError` for more steps than were
        measured, for so few that nothing was tried so far back, and for a schedule that visits timesteps several times.
        """
        self.check_complete()
        check_steps(steps)
        if steps == len(self.progress):
            return self
        if steps > len(self.progress):
            raise ScheduleError(
                f"the table of errors was measured over {len(self.progress)} steps, which say too little of {steps}; "
                "plan for fewer, or measure over as many"
            )
        if any(one <= other for one, other in pairwise(self.progress)):
            raise ScheduleError(
                "the table of errors was measured over a schedule that visits timesteps several times, of which no "
                "shorter one can be made; measure over as many steps as the plan is for"
            )
        progress = stretched(self.progress, steps)
        source = nearest_steps(self.progress, progress)
        begins = {next((new for new, old in enumerate(source) if old >= begin), steps) for begin in self.begins}
        units = tuple(_thinned(unit, source, self.begins) for unit in self.units)
        return replace(self, progress=progress, units=units, done=steps, begins=tuple(sorted(begins - {steps})))

    @property
    def complete(self) -> bool:
        """Whether all steps are measured."""
        return self.done == len(self.progress)

    def check_complete(self, where: object = "given") -> None:
        """Raise :class:`ErrorTableError` if steps are missing."""
        if not self.complete or not self.seconds:
            raise ErrorTableError(
                f"the table of errors {shown(where)} holds {self.done} of {len(self.progress)} steps: the measurement "
                "was interrupted; start difa measure with the same arguments again to go on"
            )

    def check_model(self, model: ModelInfo) -> None:
        """Raise :class:`PlanMismatchError` unless the table is of this model."""
        if (model.class_name, model.config_digest) != (self.model.class_name, self.model.config_digest):
            raise PlanMismatchError(
                f"the table of errors is of {shown(self.model.class_name)} (config "
                f"{shown(self.model.config_digest[:12])}), this is {model.class_name} (config "
                f"{model.config_digest[:12]}); measure this model"
            )

    def full_plan(self) -> Plan:
        """The plan by which everything is computed. Raises what :class:`Plan` raises of its parts."""
        rows = (tuple(Cell(FULL) for _ in self.sites),) * len(self.progress)
        return Plan(self.model, self.settings, self.sites, self.progress, rows)

    def tell_machine(self) -> None:
        """Warn if another machine than this one measured the seconds, of which a budget of time is a share."""
        here = machines_here()
        if self.machine and self.machine not in here:
            warnings.warn(
                f"the table of errors was measured on {shown(self.machine)}, and this is {' and '.join(here)}: a share "
                "of time by that table may be another one here. Measure here, or have the plan run and held to its "
                "budget (difa calibrate --budget)",
                stacklevel=3,
            )

    def problem(self) -> Problem:
        """What the planner chooses from; costs are seconds per step. Raises :class:`ErrorTableError` if steps are
        missing."""
        self.check_complete()
        seconds = {name: value * self.calls for name, value in self.seconds.items() if name != "pipeline"}
        full = seconds["full"]
        units = []
        rest = full
        for unit in self.units:
            reuse = seconds[f"{unit.name} reuse"]
            read = max(0.0, seconds.get(f"{unit.name} forecast", reuse) - reuse)
            own = max(1e-9, full - reuse + read)
            inner = sum(
                max(0.0, full - seconds[f"{other.name} reuse"])
                for other in self.units
                if other is not unit and other.inside is not None and self.units[other.inside] is unit
            )
            computed = {FULL: max(1e-9, own - inner)}
            for decision in unit.decisions:
                computed[decision] = max(0.0, computed[FULL] + seconds[f"{unit.name} {decision}"] - full)
            fill = max(0.0, seconds[f"{unit.name} filled"] - full)
            residual = {
                decision.window: max(0.0, seconds[f"{unit.name} {keeping(decision)}"] - full)
                for decision in unit.residual
                if decision.window is not None
            }
            costs = Costs(computed, read, fill, residual)
            units.append(Unit(unit.sites, unit.effects(self.begins), costs, unit.inside))
            rest -= computed[FULL]
        forecasts = any(f"{unit.name} forecast" in seconds for unit in self.units)
        readers = (Decision(Kind.FORECAST, order=1, basis=Basis.PROGRESS),) if forecasts else (REUSE,)
        response = flat_response(len(self.progress))
        base = max(0.0, rest) + self.seconds.get("pipeline", 0.0)
        return Problem(self.progress, tuple(units), response, base, readers, begins=self.begins)

    # --- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises :class:`OutputError`."""
        text = json.dumps(TABLE.frame(self._content()), allow_nan=False)
        write_whole(Path(path), text + "\n", "the table of errors")

    @classmethod
    def load(cls, path: str | Path) -> ErrorTable:
        """Read a file. Raises :class:`ErrorTableError` if it is damaged, edited, or of another version."""
        fields = TABLE.parse(TABLE.read_bytes(path), path)
        with TABLE.reading(path, also=(DecisionError,)):
            table = cls(
                read_model(fields["model"]),
                read_settings(fields["settings"]),
                tuple(read_site(item, f"sites[{i}]") for i, item in enumerate(as_list(fields["sites"], "sites"))),
                tuple(
                    as_number(item, f"progress[{i}]") for i, item in enumerate(as_list(fields["progress"], "progress"))
                ),
                tuple(_read_unit(item, f"units[{i}]") for i, item in enumerate(as_list(fields["units"], "units"))),
                as_whole(fields["done"], "done"),
                {
                    name: as_number(value, f"seconds.{name}")
                    for name, value in as_mapping(fields["seconds"], "seconds").items()
                },
                as_whole(fields["calls"], "calls"),
                {
                    name: as_text(value, f"identity.{name}")
                    for name, value in as_mapping(fields["identity"], "identity").items()
                },
                as_text(fields["machine"], "machine"),
                tuple(as_whole(item, f"begins[{i}]") for i, item in enumerate(as_list(fields["begins"], "begins"))),
            )
            table.full_plan()  # sites and progress make a plan
            if table.complete and table.seconds:
                table.problem()  # sizes and costs go together
        TABLE.check_digest(fields, table._content(), path)
        return table

    def _content(self) -> dict[str, object]:
        return {
            "model": model_json(self.model),
            "settings": settings_json(self.settings),
            "sites": [site_json(site) for site in self.sites],
            "progress": list(self.progress),
            "begins": list(self.begins),
            "done": self.done,
            "machine": self.machine,
            "seconds": dict(self.seconds),
            "calls": self.calls,
            "identity": dict(self.identity),
            "units": [_unit_json(unit) for unit in self.units],
        }


def _thinned(unit: MeasuredUnit, source: Sequence[int], begins: Sequence[int]) -> MeasuredUnit:
    """A unit over a shorter schedule, whose steps are those of ``source``."""
    effects = unit.effects(begins)
    lags = _reach(source, effects.lags)
    if not lags:
        raise ScheduleError(
            f"the table of errors looks {effects.lags} steps back at {quoted(unit.name)}, and those of a schedule of "
            f"{len(source)} steps are further apart; plan for more, or measure over as many"
        )
    ages = _reach(source, max((effects.ages(decision) for decision in unit.residual), default=0))
    nearest = [int(np.abs(np.array(unit.lags) - lag).argmin()) for lag in range(effects.lags + 1)]
    spread = np.zeros((len(source), len(lags)))
    for step, old in enumerate(source):
        for i, lag in enumerate(lags[:step]):
            spread[step, i] = unit.spread[old, nearest[old - source[step - lag]]]
    return replace(
        unit,
        lags=lags,
        drift=_at_steps(effects.drift, source, lags),
        spread=spread,
        computed={decision: values[list(source)] for decision, values in unit.computed.items()},
        ages=ages,
        residual={d: _at_steps(values, source, ages) for d, values in effects.residual.items()} if ages else {},
    )


def _reach(source: Sequence[int], longest: int) -> tuple[int, ...]:
    """The lags of a shorter schedule, all from 1 on, that are nowhere above ``longest`` in the one it is made of."""
    lags = []
    for lag in range(1, len(source)):
        if max(late - early for early, late in zip(source, source[lag:], strict=False)) > longest:
            break
        lags.append(lag)
    return tuple(lags)


def _at_steps(values: Array, source: Sequence[int], lags: Sequence[int]) -> Array:
    """Of ``values`` (T, longest + 1, K) by lag those of the steps of ``source`` to each other, (steps, lags, K)."""
    found = np.zeros((len(source), len(lags), values.shape[2]))
    for step, old in enumerate(source):
        for i, lag in enumerate(lags[:step]):
            found[step, i] = values[old, old - source[step - lag]]
    return found


def keeping(decision: Decision) -> str:
    """What a row does that takes and keeps the residual that a window+residual reads: ``residual(band:2)``."""
    return f"residual({decision.window})"


def _unit_json(unit: MeasuredUnit) -> dict[str, object]:
    return {
        "name": unit.name,
        "sites": list(unit.sites),
        "inside": unit.inside,
        "lags": list(unit.lags),
        "numbers": unit.drift.shape[2],
        "drift": _packed(unit.drift),
        "spread": _packed(unit.spread),
        "computed": {str(decision): _packed(values) for decision, values in unit.computed.items()},
        "ages": list(unit.ages),
        "residual": {str(decision): _packed(values) for decision, values in unit.residual.items()},
    }


def _read_unit(value: object, where: str) -> MeasuredUnit:
    keys = ("name", "sites", "inside", "lags", "numbers", "drift", "spread", "computed", "ages", "residual")
    fields = as_object(value, where, keys)
    lags, ages = _read_lags(fields, "lags", where), _read_lags(fields, "ages", where)
    if not lags:
        raise ErrorTableError(f"{where}: lags must ascend from 1")
    numbers = as_whole(fields["numbers"], f"{where}.numbers")
    inside = None if fields["inside"] is None else as_whole(fields["inside"], f"{where}.inside")
    computed = as_mapping(fields["computed"], f"{where}.computed")
    return MeasuredUnit(
        as_text(fields["name"], f"{where}.name"),
        tuple(as_whole(site, f"{where}.sites") for site in as_list(fields["sites"], f"{where}.sites")),
        inside,
        lags,
        _unpacked(fields["drift"], f"{where}.drift", (-1, len(lags), numbers)),
        _unpacked(fields["spread"], f"{where}.spread", (-1, len(lags))),
        {
            Decision.parse(name): _unpacked(values, f"{where}.computed", (-1, numbers))
            for name, values in computed.items()
        },
        ages,
        {
            Decision.parse(name): _unpacked(values, f"{where}.residual", (-1, len(ages), numbers))
            for name, values in as_mapping(fields["residual"], f"{where}.residual").items()
        },
    )


def _read_lags(fields: Mapping[str, object], name: str, where: str) -> tuple[int, ...]:
    """Numbers of steps that ascend from 1, or none."""
    lags = tuple(as_whole(lag, f"{where}.{name}") for lag in as_list(fields[name], f"{where}.{name}"))
    if lags and (lags[0] != 1 or any(a >= b for a, b in pairwise(lags))):
        raise ErrorTableError(f"{where}: {name} must ascend from 1")
    return lags


def _packed(values: Array) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")


def _unpacked(value: object, where: str, shape: tuple[int, ...]) -> Array:
    try:
        data = base64.b64decode(as_text(value, where), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{where} is not base64") from error
    values = np.frombuffer(data, dtype="<f4").astype(np.float64).reshape(shape)
    if not np.isfinite(values).all():
        raise ErrorTableError(f"{where} of the table of errors holds NaN or infinity; measure again")
    return values
