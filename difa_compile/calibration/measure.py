"""Measure once what decisions would do to a model's output, for plans under any budget.

One call of the pipeline, in which every step is computed in full. Beside that, at each step, the decisions are tried
one by one on the very inputs of the step, on the variants that a plan runs:

1. *Drift*: all units of a group (the blocks of the network, its attention sites) take what they computed i steps
   before. What that changes of the model's output, after guidance, is their drift at this step and lag. An
   extrapolation is a sum of lags, so it needs no trial of its own (:mod:`difa_compile.planner.effects`). Where a call
   has nothing of the step before to take (another model takes over, a call of guidance begins), the table says so.
2. *Other decisions* (windows, shared halves, groups of heads): what they change, in the same way. Windows with the
   residual of a full step are tried with those of several steps before.
3. *Groups of heads* that nobody has named are found beforehand, in a short call
   (:mod:`difa_compile.calibration.ranking`, :mod:`difa_compile.planner.groups`), and tried as one decision for all
   sites.
4. *Seconds*: rows of each kind are timed against one another, from the second step on.

How outputs are guided shows in what the scheduler is given (:mod:`difa_compile.calibration.guiding`), whatever scales
the call names. Changes are kept as a random projection to a few hundred numbers (Johnson-Lindenstrauss), the same one
everywhere, so that those of several decisions and steps can be added up. Each step is stored when it is done; a
measurement that was interrupted goes on behind the last one.
"""

from __future__ import annotations

import functools
import inspect
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difa_compile.backend.capture import Capture
from difa_compile.backend.options import Options
from difa_compile.backend.run import Run
from difa_compile.calibration.guiding import (
    GuidedCall,
    StatedWeights,
    floats_of,
    guided_change,
    guiding_weights,
)
from difa_compile.calibration.ranking import RANKED_STEPS, HeadRanking, reusable_sites
from difa_compile.calibration.sampling import call_arguments, identity_of, models_of, progress_bar, sample_with
from difa_compile.calibration.search import check_finite
from difa_compile.calibration.state import default_path
from difa_compile.decision import FULL, REUSE, Decision, Kind, Window
from difa_compile.errors import (
    CalibrationError,
    CalibrationStateError,
    DecisionError,
    UnsupportedPipelineError,
)
from difa_compile.files.writing import check_target
from difa_compile.machine.profile import machine_name
from difa_compile.passes.caches import CacheName
from difa_compile.pipeline.call_arguments import check_call
from difa_compile.plan.data import Settings, SiteInfo, model_digest
from difa_compile.plan.guidance import Guidance, StatedGuidance, settle
from difa_compile.plan.schedule import COVERED_ROLE, FULL_ROLE, Role, check_steps
from difa_compile.planner.groups import head_groups
from difa_compile.planner.table import TABLE, ErrorTable, MeasuredUnit, keeping
from difa_compile.wording import shown

NUMBERS = 512
"""To how many numbers a change of the output is projected: squared sizes are right to some six per cent."""
LAGS = 20
"""How many steps back blocks are tried: as far as a plan may reach without computing."""
ATTENTION_LAGS = (1, 2, 3, 5, 8, 13, 20)
"""The same of attention, which takes most of a call for each; those between are interpolated."""
AGES = (1, 3, 8)
"""How old residuals are tried with a window, a call for each."""
ROUNDING = 1e-5
"""By how much the progress of a step may differ from machine to machine: timesteps are numbers in float32."""
ROUNDS = 11
"""How often each kind of row is timed, where one graph serves all steps."""


@dataclass(frozen=True)
class MeasureSettings:
    """What is measured. ``guidance``: the weights of the conditional and the other half in what the scheduler is given,
    as far as the call tells; None where it names no one number.

    ``decisions``: tried at all attention sites together; None: shared halves, where they can be shared. ``groups``:
    tried beside them, decisions by the heads of all sites (:meth:`Decision.at_sites`). ``attention``: whether attention
    is measured at all; None: where there are decisions to try, or no blocks. ``half``: which half of a batch is
    conditional, None where the halves are two calls or there are none.
    """

    decisions: tuple[Decision, ...] | None = None
    groups: tuple[Decision, ...] = ()
    attention: bool | None = None
    lags: int = LAGS
    numbers: int = NUMBERS
    guidance: tuple[float, float] | None = (1.0, 0.0)
    half: int | None = None
    two_call: bool = False


class Projection:
    """A random projection of a model's output to ``numbers`` numbers, whose squared length is the mean squared entry.

    Entries get random signs and fall into random bins. It depends on the sizes alone, so it is the same at every step.
    """

    def __init__(self, numbers: int) -> None:
        self._numbers = numbers
        self._made: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, value: Tensor, output: int = 0) -> Tensor:
        """``value`` of any shape as (numbers,) float64 on the CPU. Values of different ``output`` are projected
        independently, so that squared lengths of their sums are sums."""
        flat = value.flatten().float()
        key = (flat.numel(), output, flat.device)
        if key not in self._made:
            generator = torch.Generator().manual_seed(flat.numel() + (output << 40))
            signs = torch.randint(0, 2, (flat.numel(),), generator=generator) * 2.0 - 1.0
            bins = torch.randperm(flat.numel(), generator=generator) % self._numbers
            self._made[key] = signs.to(flat.device), bins.to(flat.device)
        signs, bins = self._made[key]
        sums = torch.zeros(self._numbers, dtype=torch.float64, device=flat.device)
        sums.index_add_(0, bins, (flat * signs).double())
        projected: Tensor = (sums / flat.numel() ** 0.5).cpu()
        return projected


@dataclass
class _Group:
    """Units that are tried together. ``units``: their numbers in the model. ``sites``: in the table."""

    name: str
    units: tuple[int, ...]
    sites: tuple[int, ...]
    lags: tuple[int, ...]
    decisions: tuple[Decision, ...] = ()
    inside: int | None = None
    ages: tuple[int, ...] = ()

    @property
    def residual_windows(self) -> tuple[Window, ...]:
        """Against which windows residuals are taken."""
        found = (each.window for each in self.decisions if each.kind is Kind.WINDOW_RESIDUAL)
        return tuple(dict.fromkeys(window for window in found if window is not None))


@dataclass
class Stream:
    """The outputs that a branch of a model has computed in steps without a gap, the newest first, and by window its
    residuals. ``last``: the latest of these steps."""

    last: int
    history: list[dict[CacheName, Tensor]] = field(default_factory=list)
    residuals: dict[Window, list[dict[CacheName, Tensor]]] = field(default_factory=dict)

    def keep_residuals(self, window: Window, taken: Mapping[CacheName, Tensor], most: int) -> None:
        """Put in the residuals that a step has taken; those of ``most`` steps are held."""
        held = self.residuals.setdefault(window, [])
        held.insert(0, {name: value for name, value in taken.items() if name.kind == "residual"})
        del held[most:]

    def keep(self, step: int, written: Mapping[CacheName, Tensor], groups: Sequence[tuple[int, set[str]]]) -> None:
        """Put in what a step has computed, and let go of what no trial takes any more. ``groups``: how many steps
        back each is tried, and the paths of its units."""
        self.last = step
        self.history.insert(0, dict(written))
        for lags, paths in groups:
            for outputs in self.history[lags : lags + 1]:  # those before it have lost theirs at earlier steps
                for name in [name for name in outputs if name.site in paths]:
                    del outputs[name]
        while self.history and not self.history[-1]:
            del self.history[-1]


class Measuring:
    """A measurement over one pass through the schedule. ``table``: what is known from an earlier, interrupted one.

    Each call of the transformer arrives at :meth:`call`. ``keep(table)`` is called after every step.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        settings: MeasureSettings,
        start: ErrorTable | None,
        keep: Callable[[ErrorTable], None],
        make_bar: Callable[[int, int], Any] | None,
    ) -> None:
        self.models = tuple(models)
        self.settings = settings
        self.progress: tuple[float, ...] = ()
        self.table = start
        self._keep = keep
        self._make_bar = make_bar
        self._bar: Any = None
        self._groups: list[_Group] = []
        self._captures: list[Capture] = []
        self._streams: dict[tuple[int, int, str | None], Stream] = {}
        self._project = Projection(settings.numbers)
        self._step = -1
        self._calls = 0
        """Calls made in the step in progress."""
        self._most_calls = 0
        """Of those, in any step."""
        self._outputs: list[GuidedCall] = []
        """What the calls of the step in progress have computed in full."""
        self._changes: dict[tuple[int, object], list[list[Tensor]]] = {}
        """What trials have changed of that, call by call: by group, and lag or decision."""
        self._found: dict[tuple[int, object], Tensor] = {}
        """Effects of the step in progress."""
        self._spread: dict[tuple[int, int], float] = {}
        self._begins = False
        """Whether a call of the step in progress had nothing of the step before to take."""
        self._seconds: dict[str, float] = {}
        self._timed_on: Capture | None = None
        """What rows are timed on."""
        self._rounds = 0
        """How often they have been."""
        self._machine = ""
        self._left = 0.0
        """When the last call of the model ended, and later by what measuring has done since."""
        self._gaps: dict[int, list[float]] = {}
        """Seconds between calls of the model without those of measuring, by the later call's number in its step."""

    @property
    def done(self) -> int:
        """Steps that are measured and kept."""
        return 0 if self.table is None else self.table.done

    def open(self, progress: tuple[float, ...], guided: bool | None) -> Run:
        """The run for one pass through the schedule. ``guided``: whether guidance is on in this call, if known."""
        if guided is False:
            self.settings = replace(self.settings, guidance=(1.0, 0.0), half=None, two_call=False)
        if self.progress:
            raise UnsupportedPipelineError(
                "the pipeline goes through its schedule more than once in a call (set_timesteps is called again), "
                "which measuring does not support; measure with inputs that take one pass"
            )
        self.progress = progress
        if self.table is not None:
            self._check_goes_on(same_schedule(progress, self.table.progress), "another schedule")
        return MeasureRun(progress, self)

    def close(self) -> None:
        """Stop showing progress and let the caches go."""
        self._streams.clear()
        if self._bar is not None:
            self._bar.close()

    def finished(self) -> ErrorTable:
        """The whole table, once the pipeline has returned.

        Raises :class:`CalibrationError` if the pipeline stopped early.
        """
        ended = time.perf_counter()
        self._finish_step()
        if self.table is None or self.table.done != len(self.progress):
            raise CalibrationError(
                f"the pipeline ended after {self.done} of {len(self.progress)} steps; measure with inputs that go "
                "through the whole schedule"
            )
        if "pipeline" not in self.table.seconds:
            after = (ended - self._left) / len(self.progress)  # decoding, say
            beside = sum(map(statistics.median, self._gaps.values())) + after
            self.table = replace(self.table, seconds={**self.table.seconds, "pipeline": beside})
            self._keep(self.table)
        return self.table

    # --- one call ----------------------------------------------------------------------------------------------------

    def call(self, capture: Capture, args: list[Any], step: int, branch: str | None) -> list[Any]:
        """One transformer call: in full, with all that is tried beside it."""
        if self._left:
            place = self._calls if step == self._step else 0
            self._gaps.setdefault(place, []).append(time.perf_counter() - self._left)
        try:
            return self._call(capture, args, step, branch)
        finally:
            self._left = time.perf_counter()

    def _call(self, capture: Capture, args: list[Any], step: int, branch: str | None) -> list[Any]:
        self._meet(capture)
        if step != self._step:
            self._finish_step()
            self._step = step
        self._calls += 1
        place = (id(capture), id(capture.model.parameter(args)), branch)
        # What was not called in the step before has lost what it kept, as in a run with a plan.
        self._streams = {place: stream for place, stream in self._streams.items() if stream.last >= step - 1}
        self._begins |= step > 0 and place not in self._streams
        stream = self._streams.setdefault(place, Stream(step))
        outputs, written = capture.execute(args, self._full_row(capture), {})
        check_finite(outputs, f"step {step}, all sites full")
        if step >= self.done:
            self._outputs.append(GuidedCall(branch, self._latent(floats_of(outputs)[0]).clone()))
            self._try_all(capture, args, stream, outputs, step)
        if self._calls == 1 and self.table is not None and not self.table.seconds:
            self._time(capture, args, written, stream, step)
        paths = [(group.lags[-1], {capture.model.units[i].path for i in group.units}) for group in self._groups]
        stream.keep(step, written, paths)
        for group in self._groups:
            for window in group.residual_windows:
                stream.keep_residuals(window, self._residuals(capture, args, group, window), group.ages[-1])
        return outputs

    def _residuals(self, capture: Capture, args: list[Any], group: _Group, window: Window) -> dict[CacheName, Tensor]:
        """What the sites of a group leave out in a window."""
        role = Role(FULL, emit_residual=True, residual_window=window)
        _, written = capture.execute(args, self._group_row(capture, group, role), {})
        return written

    def _meet(self, capture: Capture) -> None:
        """Note the units of the first graph; later graphs must have the same."""
        if any(known is capture for known in self._captures):
            return
        self._captures.append(capture)
        groups, sites = self._grouped(capture)
        if not self._groups:
            self._groups = groups
            if not groups:
                raise CalibrationError(
                    "nothing in this model can be reused: "
                    + "; ".join(f"{path}: {reason}" for path, reason in capture.model.refused_blocks[:3])
                )
            if self.table is None:
                self.table = self._empty(capture, sites)
            self._check_goes_on(sites == self.table.sites, "other sites, or another token grid,")
            if self._make_bar is not None:
                self._bar = self._make_bar(len(self.progress), self.done)
        elif [group.units for group in groups] != [group.units for group in self._groups]:
            raise CalibrationError(
                "the transformer was called with inputs of other sizes in mid-run, so that what can be reused changed; "
                "measure with inputs of one size"
            )

    def _check_goes_on(self, same: bool, what: str) -> None:
        if not same:
            raise CalibrationStateError(
                f"the measurement to go on with has {what} than this one; name another file, or delete it to start "
                "from the beginning"
            )

    def _grouped(self, capture: Capture) -> tuple[list[_Group], tuple[SiteInfo, ...]]:
        """The groups of units that are tried together, and the sites of the table."""
        model = capture.model
        count = len(model.sites)
        able = [i for i in range(len(model.units)) if model.why_not(i, REUSE) is None]
        spans = [i for i in able if i >= count and model.blocks[i - count].blocks]
        held = {path for i in spans for path in model.blocks[i - count].blocks}
        outer = [*spans, *(i for i in able if i >= count and i not in spans and model.units[i].path not in held)]
        sites = (*(site.info for site in model.sites), *(model.units[i].info for i in outer))
        groups = []
        if outer:
            places = tuple(range(count, count + len(outer)))
            groups.append(_Group("blocks", tuple(outer), places, tuple(range(1, self.settings.lags + 1))))
        inner = reusable_sites(capture)
        wanted = self.settings.attention
        asked = self.settings.decisions or self.settings.groups
        if inner and (wanted or (wanted is None and (asked or not outer))):
            tried = self._tried(capture, inner)
            lags = tuple(lag for lag in ATTENTION_LAGS if lag <= self.settings.lags)
            ages = tuple(age for age in AGES if age <= self.settings.lags)
            groups.append(_Group("attention", inner, inner, lags, tried, 0 if outer else None, ages))
        return groups, sites

    def _tried(self, capture: Capture, sites: Sequence[int]) -> tuple[Decision, ...]:
        """The decisions to try at attention sites. Raises :class:`CalibrationError` if one can't be carried out."""
        model = capture.model
        if self.settings.decisions is None:
            shared = replace(FULL, cfg_shared=True)
            able = self.settings.half is not None and all(model.why_not(i, shared) is None for i in sites)
            return tuple(dict.fromkeys((*((shared,) if able else ()), *self.settings.groups)))
        for decision in self.settings.decisions:
            if decision.cfg_shared and self.settings.half is None:
                raise CalibrationError(
                    f"{decision} cannot be tried: guidance is no batch of two halves here; leave this decision out"
                )
            for i, own in zip(sites, self._at_sites(capture, sites, decision), strict=True):
                if (reason := model.why_not(i, own)) is not None:
                    raise CalibrationError(
                        f"{decision} cannot be tried at {model.units[i].path}: {reason}; leave this decision out"
                    )
        return tuple(dict.fromkeys((*self.settings.decisions, *self.settings.groups)))

    @staticmethod
    def _at_sites(capture: Capture, sites: Sequence[int], decision: Decision) -> tuple[Decision, ...]:
        """What a decision is at each of these units. Raises :class:`DecisionError`."""
        return decision.at_sites([capture.model.units[i].info.heads for i in sites])

    def _empty(self, capture: Capture, sites: tuple[SiteInfo, ...]) -> ErrorTable:
        settings = self.settings
        form = "two-call" if settings.two_call else "none" if settings.half is None else "batched"
        described = Settings(
            method="planned", guidance=form, conditional_half=settings.half, sample=capture.model.sample
        )
        units = tuple(
            MeasuredUnit.empty(
                group.name,
                group.sites,
                group.inside,
                group.lags,
                group.decisions,
                settings.numbers,
                len(self.progress),
                group.ages,
            )
            for group in self._groups
        )
        return ErrorTable(model_digest(self.models[0]), described, sites, self.progress, units, 0)

    # --- rows --------------------------------------------------------------------------------------------------------

    def _row(self, capture: Capture, given: Mapping[int, Role]) -> tuple[Role, ...]:
        """A row with these roles, by unit, all others full; what a block that is left out holds is covered."""
        row = [given.get(i, FULL_ROLE) for i in range(len(capture.model.units))]
        return tuple(row)

    def _full_row(self, capture: Capture) -> tuple[Role, ...]:
        kept = {i: Role(FULL, emit_output=True) for group in self._groups for i in group.units}
        return self._row(capture, kept)

    def _group_row(self, capture: Capture, group: _Group, role: Role) -> tuple[Role, ...]:
        row = dict.fromkeys(group.units, role)
        if role.decision.groups:
            own = self._at_sites(capture, group.units, role.decision)
            row = {i: Role(decision) for i, decision in zip(group.units, own, strict=True)}
        if role.reads_output and group.inside is None and group.units[0] >= len(capture.model.sites):
            row |= self._covered(capture, group)
        return self._row(capture, row)

    def _covered(self, capture: Capture, group: _Group) -> dict[int, Role]:
        """The roles of what the blocks of a group hold, where they are left out."""
        model = capture.model
        blocks = {path for i in group.units for path in (model.units[i].info.blocks or (model.units[i].path,))}
        return {
            i: COVERED_ROLE
            for i, unit in enumerate(model.units)
            if i not in group.units and any(unit.path == path or unit.path.startswith(f"{path}.") for path in blocks)
        }

    # --- trials ------------------------------------------------------------------------------------------------------

    def _try_all(self, capture: Capture, args: list[Any], stream: Stream, full: list[Any], step: int) -> None:
        for index, group in enumerate(self._groups):
            for lag in group.lags:
                if lag <= len(stream.history):
                    row = self._group_row(capture, group, Role(REUSE))
                    outputs, _ = capture.execute(args, row, stream.history[lag - 1])
                    self._note(index, lag, full, outputs, f"step {step}, {group.name} of {lag} steps before")
            for decision in group.decisions:
                row = self._group_row(capture, group, Role(decision))
                if decision.kind is not Kind.WINDOW_RESIDUAL:
                    outputs, _ = capture.execute(args, row, {})
                    self._note(index, decision, full, outputs, f"step {step}, {group.name}, {decision}")
                    continue
                assert decision.window is not None  # Decision guarantees it
                taken = stream.residuals.get(decision.window, [])
                for age in group.ages:
                    if age <= len(taken):
                        outputs, _ = capture.execute(args, row, taken[age - 1])
                        where = f"step {step}, {group.name}, {decision} of {age} steps before"
                        self._note(index, (decision, age), full, outputs, where)

    def _note(self, group: int, what: object, full: list[Any], tried: list[Any], where: str) -> None:
        """Keep what a trial has changed of this call's output, until it shows how the step's outputs are guided."""
        check_finite(tried, where)
        pairs = zip(floats_of(full), floats_of(tried), strict=True)
        changes = [self._latent(b.float() - a.float()) for a, b in pairs]
        self._changes.setdefault((group, what), []).append(changes)

    def given(self, output: object) -> None:
        """The scheduler is given ``output``, so the calls of the step in progress are all made: what trials have
        changed of them becomes what they change of that."""
        if self._outputs:
            began = time.perf_counter()
            self._guide(output)
            self._left += time.perf_counter() - began  # no time of the pipeline

    def _guide(self, output: object) -> None:
        """Make what trials have changed of the calls what they change of ``output``, if that is a tensor."""
        settings = self.settings
        target = self._latent(output) if isinstance(output, Tensor) else None
        stated = StatedWeights(settings.guidance, settings.half, settings.two_call)
        weights = guiding_weights(self._outputs, target, stated, f"step {self._step}")
        for (group, what), calls in self._changes.items():
            if len(calls) != len(self._outputs):
                continue  # a call that begins with this step had nothing of that lag, so nothing will take it
            guided = [guided_change([changes[0] for changes in calls], weights)]
            if len(calls[0]) > 1:
                self._check_unguided(weights, len(calls[0]))
                guided += calls[0][1:]
            projected = [self._project(change, index) for index, change in enumerate(guided)]
            self._found[group, what] = torch.stack(projected).sum(0) / len(guided) ** 0.5
            if isinstance(what, int):
                self._spread[group, what] = _spread_of(guided[0].flatten(1).square().mean(1).cpu())
        self._outputs, self._changes = [], {}

    def _check_unguided(self, weights: Sequence[Tensor], outputs: int) -> None:
        """Raise :class:`CalibrationError` where several outputs are guided: the scheduler shows of one how."""
        if len(weights) > 1 or weights[0].shape[1] > 1:
            raise CalibrationError(
                f"{type(self.models[0]).__name__} gives {outputs} outputs (sound beside a picture, say), and how each "
                "of them is guided cannot be told; measure it without guidance (guidance_scale=1), or calibrate by a "
                "threshold"
            )

    def _latent(self, change: Tensor) -> Tensor:
        """Without the channels of a learned variance, which are no part of the sample."""
        sample = self._captures[0].model.sample
        if sample and change.ndim == len(sample) + 1 and change.shape[1] == 2 * sample[0]:
            return change[:, : sample[0]]
        return change

    def _finish_step(self) -> None:
        """The step in progress is over: keep what was found."""
        if self.table is None or self._step < self.done or not self._calls:
            self._calls, self._begins = 0, False
            return
        if self._outputs:  # the pipeline went on without a step of its scheduler
            self._guide(None)
        found = {(self._groups[group].name, what): value.numpy() for (group, what), value in self._found.items()}
        spread: dict[tuple[str, object], float] = {
            (self._groups[group].name, lag): each for (group, lag), each in self._spread.items()
        }
        self.table = self.table.with_step(found, spread, self._begins)
        self._most_calls = max(self._most_calls, self._calls)
        if self._seconds and self.table.complete:  # not before: what goes on after an interruption has all rounds anew
            self.table = self.table.with_seconds(self._seconds, self._most_calls, self._machine)
        self._found, self._spread, self._calls, self._begins = {}, {}, 0, False
        self._keep(self.table)
        if self._bar is not None:
            self._bar.update(1)

    # --- seconds -----------------------------------------------------------------------------------------------------

    def _time(
        self, capture: Capture, args: list[Any], written: Mapping[CacheName, Tensor], stream: Stream, step: int
    ) -> None:
        """Time one row of each kind in turn, as often as is due at this step; the seconds of a row are the least of all
        rounds, since whatever else the machine does only adds to them. Rounds are spread over the steps, because that
        goes on for seconds. Of several graphs the first is timed, as long as it is called."""
        first = min(1, len(self.progress) - 1)
        due = math.ceil(ROUNDS * (step - first + 1) / (len(self.progress) - first)) - self._rounds
        if step < first or due <= 0 or self._timed_on not in (None, capture):
            return
        self._timed_on = capture
        rows = self._timed_rows(capture, args, written, stream)
        cuda = any(value.is_cuda for value in written.values())
        if not self._rounds:  # what compiles
            for row, given in rows.values():
                capture.execute(args, row, given)
        for _ in range(due):
            self._rounds += 1
            for name in list(rows)[:: -1 if self._rounds % 2 else 1]:
                row, given = rows[name]
                if cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                capture.execute(args, row, given)
                if cuda:
                    torch.cuda.synchronize()
                taken = time.perf_counter() - start
                self._seconds[name] = min(taken, self._seconds.get(name, taken))
        self._machine = machine_name(next(iter(written.values())).device)

    def _timed_rows(
        self, capture: Capture, args: list[Any], written: Mapping[CacheName, Tensor], stream: Stream
    ) -> dict[str, tuple[tuple[Role, ...], Mapping[CacheName, Tensor]]]:
        """One row of each kind, by its name in tables, with the caches that it takes."""
        rows: dict[str, tuple[tuple[Role, ...], Mapping[CacheName, Tensor]]] = {
            "full": ((FULL_ROLE,) * len(capture.model.units), {})
        }
        for group in self._groups:
            caches = dict(written) | {name.older(): value for name, value in written.items()}
            for i in group.units:
                wide = next(value for name, value in written.items() if name.site == capture.model.units[i].path)
                dtype = torch.promote_types(wide.dtype, torch.float32)
                caches[CacheName.weights(capture.model.units[i].path)] = torch.tensor(
                    [2.0, -1.0], dtype=dtype, device=wide.device
                )
            rows[f"{group.name} filled"] = (self._group_row(capture, group, Role(FULL, emit_output=True)), {})
            rows[f"{group.name} reuse"] = (self._group_row(capture, group, Role(REUSE)), caches)
            forecast = Decision(Kind.FORECAST, order=1)
            if all(capture.model.why_not(i, forecast) is None for i in group.units):
                rows[f"{group.name} forecast"] = (self._group_row(capture, group, Role(forecast)), caches)
            for window in group.residual_windows:
                taken = stream.residuals.get(window)
                caches |= taken[0] if taken else self._residuals(capture, args, group, window)
            for decision in group.decisions:
                reads = decision.kind is Kind.WINDOW_RESIDUAL
                kept = {name: value for name, value in caches.items() if reads and name.kind == "residual"}
                rows[f"{group.name} {decision}"] = (self._group_row(capture, group, Role(decision)), kept)
                if reads:
                    taking = Role(FULL, emit_residual=True, residual_window=decision.window)
                    rows[f"{group.name} {keeping(decision)}"] = (self._group_row(capture, group, taking), {})
        return rows


def same_schedule(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two schedules have the same progress at every step, apart from rounding."""
    return len(one) == len(other) and all(abs(a - b) <= ROUNDING for a, b in zip(one, other, strict=True))


def _spread_of(sizes: Tensor) -> float:
    """The standard deviation of squared sizes (N,) as a share of their mean; 0 for one."""
    return float(sizes.std(correction=0) / sizes.mean().clamp_min(1e-30))


class MeasureRun(Run):
    """A run in which every call is computed in full and measured."""

    def __init__(self, progress: tuple[float, ...], measuring: Measuring) -> None:
        super().__init__(measuring.models[0], len(progress), progress=progress, experts=measuring.models[1:])
        self._measuring = measuring

    def call(self, capture: Capture, args: list[Any]) -> list[Any]:
        self.calls += 1
        return self._measuring.call(capture, args, self.index, self.current_branch)


def measure(
    pipe: Any,
    inputs: Mapping[str, Any],
    steps: int = 50,
    *,
    decisions: Sequence[Decision | str] | None = None,
    heads: Sequence[Window | str] = (),
    attention: bool | None = None,
    state: Path | None = None,
    progress: bool = True,
    conditional_half: int | None = None,
    inner: str = "inductor",
) -> ErrorTable:
    """Measure what leaving out work would do to the output of ``pipe``, called once with ``inputs``.

    From the table :func:`difa_compile.planner.choice.choose` makes plans for any budget. Several images in one call
    (prompts, labels) make it a mean over them. ``attention``: whether what attention alone may leave out is measured,
    too, which takes several times as long, and holds what all attention sites put out in the last 20 steps, on the
    model's device; by default where ``decisions`` or ``heads`` are given, or where the model has no blocks that can be
    left out. ``decisions``: tried at all attention sites then, a call of the model each, such as ``window(band:32)``,
    the same with ``+residual`` (four calls), ``full+cfg`` or ``heads(0-3:window(box:4);4-7:full)``; by default
    ``full+cfg``, where guidance is one batch whose halves can be shared. ``heads``: windows, such as ``box:4``, that
    single heads may take: which of them do is found in a short call beforehand, for three shares of the work that they
    save (:func:`~difa_compile.planner.groups.head_groups`), and these are tried, too. ``inner``, ``conditional_half``:
    as in :func:`difa_compile.calibrate`.

    After every step what was found is stored in ``state`` (by default a file in the package's cache folder, deleted in
    the end), so that a measurement that was interrupted goes on where it was, when started with the same arguments.

    Raises :class:`ScheduleError` (steps), :class:`DecisionError` (decisions), :class:`PipelineCallError`,
    :class:`UnsupportedPipelineError`, :class:`NotAppliedError`, :class:`NonFiniteError`, :class:`CalibrationError` if
    nothing can be reused, or if no head can take a window, :class:`ErrorTableError` and
    :class:`CalibrationStateError` for a ``state`` that is damaged or of another measurement, :class:`OutputError` and
    what capturing the model raises.
    """
    check_steps(steps)
    tried = None if decisions is None else _to_try(decisions)
    windows = tuple(dict.fromkeys(Window.parse(each) if isinstance(each, str) else each for each in heads))
    if windows and attention is False:
        raise DecisionError("windows for single heads are given, but attention is not to be measured; measure it")
    models = models_of(pipe)
    guidance = settle(pipe, StatedGuidance(conditional_half=conditional_half))
    half = guidance.conditional_half
    call = call_arguments(pipe, inputs, steps)
    check_call(pipe, call)
    scale = guidance_scale(pipe, call)
    weights = None if scale is None else (scale, 1 - scale)
    settings = MeasureSettings(
        tried, attention=attention, guidance=weights, half=half, two_call=guidance.form == "two-call"
    )
    if guidance.form == "none":
        settings = replace(settings, guidance=(1.0, 0.0))
    described = {
        **asdict(settings),
        "decisions": None if tried is None else [str(decision) for decision in tried],
        "heads": [str(window) for window in windows],
        "tried": [ATTENTION_LAGS, AGES],
        "table": TABLE.version,
    }
    identity = identity_of(pipe, models, call, described, steps)
    path = state if state is not None else default_path(identity)
    start = _saved(path, identity)
    check_target(path, "the table of errors")

    if start is not None and start.complete and "pipeline" in start.seconds:  # asked for again
        if state is None:
            path.unlink(missing_ok=True)
        return start

    def keep(table: ErrorTable) -> None:
        replace(table, identity=identity).save(path)

    make_bar = functools.partial(progress_bar, what="measuring", unit="step") if progress else None
    options = Options(inner=inner, cfg={} if half is None else {"conditional_half": half})
    if windows and start is not None:
        settings = replace(settings, groups=_groups_in(start, tried))
    elif windows:
        settings = replace(settings, groups=_groups_for(pipe, inputs, steps, models, windows, guidance, options))
    measuring = Measuring(models, settings, start, keep, make_bar)
    sample_with(
        pipe,
        call,
        measuring,
        guidance,
        options,
        what="measurement",
        kept=lambda: shown(path),
        told_output=measuring.given,
    )
    table = replace(measuring.finished(), identity=identity)
    if state is None:
        path.unlink(missing_ok=True)
    else:
        table.save(path)
    return table


def _to_try(decisions: Sequence[Decision | str]) -> tuple[Decision, ...]:
    """Decisions that attention can be tried with. Raises :class:`DecisionError`."""
    tried = [Decision.parse(each) if isinstance(each, str) else each for each in decisions]
    for decision in tried:
        if decision.kind.reads == "output" or decision == FULL:
            raise DecisionError(f"{decision} need not be tried: it is part of every measurement; leave it out")
        if decision.groups and decision.reads_caches:
            raise DecisionError(
                f"{decision} reads what earlier steps have left of single heads, which is not planned; try it without"
            )
    return tuple(dict.fromkeys(tried))


def _groups_for(
    pipe: Any,
    inputs: Mapping[str, Any],
    steps: int,
    models: Sequence[nn.Module],
    windows: Sequence[Window],
    guidance: Guidance,
    options: Options,
) -> tuple[Decision, ...]:
    """Groups of heads to try, from a short call of the pipeline. Raises as :func:`head_groups`."""
    given = {name: value for name, value in inputs.items() if name != "num_inference_steps"}
    call = call_arguments(pipe, given, min(steps, RANKED_STEPS))
    ranking = HeadRanking(models, windows)
    sample_with(pipe, call, ranking, guidance, options, what="ranking of heads", kept=lambda: "nothing")
    return head_groups(ranking.errors, ranking.saved, windows)


def _groups_in(table: ErrorTable, tried: Sequence[Decision] | None) -> tuple[Decision, ...]:
    """The groups of heads that an interrupted measurement tries beside what was asked for."""
    asked = {replace(FULL, cfg_shared=True)} if tried is None else set(tried)
    return tuple(decision for unit in table.units for decision in unit.decisions if decision not in asked)


def guidance_scale(pipe: Any, call: Mapping[str, Any]) -> float | None:
    """The scale that a call of ``pipe`` guides with: its own argument or the default; 1 where there is none, and None
    where it is not one number."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    for name in ("true_cfg_scale", "guidance_scale"):
        if name in parameters:
            value = call.get(name, parameters[name].default)
            return float(value) if isinstance(value, (int, float)) else None
    return 1.0


def _saved(path: Path, identity: Mapping[str, str]) -> ErrorTable | None:
    """The table of an interrupted measurement. Raises :class:`CalibrationStateError` if it is of another one."""
    if not path.exists():
        return None
    table = ErrorTable.load(path)
    differ = [name for name in identity if table.identity.get(name) != identity[name]]
    if differ:
        raise CalibrationStateError(
            f"the table of errors {shown(path)} is of another measurement ({', '.join(differ)} differ); name another "
            "file, or delete it to start from the beginning"
        )
    return table
