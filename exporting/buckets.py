"""Buckets: which engines the schedules of a bundle need, which of them each call of each step runs, and on what caches.

Steps whose rows of roles are equal share an engine, over all plans and numbers of steps that are given together. What a
call does and reads is not worked out here a second time: a :class:`~difa_compile.backend.run.Run` goes through each
schedule with captures that compute nothing and note what they are asked for (:func:`buckets_of`). So promotions,
forecasts, guidance in two calls and second experts are what they are in a run of the pipeline.

Caches lie in *slots*, memory that one tensor at a time lies in. A call never writes a slot that it reads, and what is
kept by two branches, or under another name because it got older, stays where it is: nothing is copied.

Where there are to be at most K engines, rows are merged (:mod:`difa_compile.exporting.merging`); what nobody reads is
then written, but not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from difa_compile.backend.capture import Caches, Capture
from difa_compile.backend.run import Run
from difa_compile.backend.stitch import CompiledRow
from difa_compile.decision import FULL
from difa_compile.errors import EngineError, RowLimitError
from difa_compile.exporting.captured import CapturedCall
from difa_compile.exporting.engines import Engine, engines_of, prune
from difa_compile.exporting.merging import Cost, Decisions, EngineKey, Guided, Row, merged, widened
from difa_compile.passes.caches import CacheName
from difa_compile.passes.graph import plain_shape, tensor_of
from difa_compile.passes.order import rewrite
from difa_compile.plan.cost import row_flops
from difa_compile.plan.data import Cell, Settings, SiteInfo
from difa_compile.plan.plan import Plan, ResolvedPlan
from difa_compile.plan.schedule import FULL_ROLE, Role, output_sources
from difa_compile.planner.rows import check_most

# --- what is run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """A plan on the steps of one sampling schedule. ``progress``: of each step, falling from 1 to 0.

    ``calls``: by step the calls of transformers, each an expert and a branch, in their order; () for those that were
    captured of the first expert, at every step.
    """

    plan: Plan
    progress: tuple[float, ...]
    calls: tuple[tuple[tuple[int, str | None], ...], ...] = ()


@dataclass(frozen=True)
class EngineRow:
    """An engine that is needed: of the graph of ``call`` (a place among the captured calls, the first of those that
    share graph and weights) with one role per unit of the model. ``calls``: how many run it, over all schedules."""

    call: int
    roles: Row
    calls: int


@dataclass(frozen=True)
class Slot:
    """Memory for a cache: the shape for the images of the captured call, and the dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes, for the images of the captured call."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class EngineCall:
    """One call of an engine in a course.

    ``reads`` and ``writes``: each cache of the engine by name, in its order, with the slot that it lies in; a cache
    that nobody reads is written to None. ``weights``: those of its forecasts, by name.
    """

    step: int
    expert: int
    branch: str | None
    engine: int
    reads: tuple[tuple[CacheName, int], ...]
    writes: tuple[tuple[CacheName, int | None], ...]
    weights: tuple[tuple[CacheName, tuple[float, ...]], ...] = ()


@dataclass(frozen=True)
class Buckets:
    """``rows``: the engines needed, in the order in which they are first called. ``courses``: of each schedule the
    calls in their order. ``slots``: of caches, for whichever course runs."""

    rows: tuple[EngineRow, ...]
    courses: tuple[tuple[EngineCall, ...], ...]
    slots: tuple[Slot, ...]


def buckets_of(
    calls: Sequence[CapturedCall], schedules: Sequence[Schedule], wider: Mapping[EngineKey, Row] | None = None
) -> Buckets:
    """What each call of each schedule runs and reads.

    ``calls``: of a pipeline (:func:`difa_compile.exporting.captured.captured`), one per expert and branch. ``wider``:
    for rows of some engines those of engines that write more caches, which run in their place (:func:`widened`).

    Raises :class:`EngineError` for a call of an expert or branch that was not captured, and what a run raises for a
    plan that does not fit.
    """
    noted = _Notes(calls, wider or {})
    courses = tuple(noted.follow(schedule) for schedule in schedules)
    rows = tuple(EngineRow(place, roles, count) for (place, roles), count in noted.counts.items())
    return Buckets(rows, courses, tuple(noted.slots))


def engines_for(row: EngineRow, calls: Sequence[Sequence[CapturedCall]], most: int | None = None) -> tuple[Engine, ...]:
    """The engines of a row, for all numbers of images up to ``most`` (:func:`engines_of`).

    ``calls``: of the pipeline, for one or several numbers of images; the row is of the first.
    """
    first = calls[0][row.call]
    same = [(call for call in each if (call.expert, call.branch) == (first.expert, first.branch)) for each in calls]
    found = [next(each, None) for each in same]
    if None in found:
        raise EngineError(
            f"of transformer {first.expert}{f' in branch {first.branch}' if first.branch else ''} no call was captured "
            f"for {calls[found.index(None)][0].images} images; capture such calls for each number of images"
        )
    return engines_of([call for call in found if call is not None], row.roles, most)


@dataclass(frozen=True)
class _Forms:
    """The caches that an engine reads (those that its outputs depend on) and writes, with their forms."""

    reads: Mapping[CacheName, Slot]
    writes: Mapping[CacheName, Slot]


class _Noting(Capture):
    """A capture whose rows compute nothing, but tell ``note`` that they are called, which says what they write."""

    def __init__(
        self, capture: Capture, place: int, note: Callable[[int, Row, Caches], dict[CacheName, Tensor]]
    ) -> None:
        self.__dict__.update(capture.__dict__)
        self._place = place
        self._note = note

    def compiled_row(self, roles: tuple[Role, ...]) -> CompiledRow:
        return partial(self._noted, roles)

    def _noted(
        self, roles: tuple[Role, ...], args: Sequence[Any], caches: Caches
    ) -> tuple[list[Any], dict[CacheName, Tensor]]:
        del args
        return [], self._note(self._place, self.whole(roles), caches)


@dataclass(frozen=True, eq=False)
class _Noted:
    """A call of a row of roles: the caches at hand, and tensors that stand for those that it writes."""

    place: int
    row: Row
    caches: Caches
    written: Mapping[CacheName, Tensor]


class _Notes:
    """What runs through several schedules ask for."""

    def __init__(self, calls: Sequence[CapturedCall], wider: Mapping[EngineKey, Row]) -> None:
        self._calls = calls
        self._wider = wider
        graphs = [(call.capture, call.expert) for call in calls]
        self._graph = [graphs.index(graph) for graph in graphs]
        """Of each call the place of the first with the same graph and weights."""
        self.counts: dict[EngineKey, int] = {}
        """By engine, as it is first called, how often it is."""
        self.slots: list[Slot] = []
        self._forms: dict[EngineKey, _Forms] = {}

    def follow(self, schedule: Schedule) -> tuple[EngineCall, ...]:
        """The calls of a schedule."""
        noted: list[_Noted] = []

        def note(place: int, row: Row, caches: Caches) -> dict[CacheName, Tensor]:
            written = {name: torch.empty(0) for name in self._forms_of(place, row).writes}
            noted.append(_Noted(place, row, dict(caches), written))
            return dict(written)

        captures = {place: _Noting(self._calls[place].capture, place, note) for place in self._graph}
        for capture in captures.values():
            capture.follow(schedule.plan)
        models = {call.expert: call.model for call in self._calls}
        experts = [models[expert] for expert in sorted(models)]
        run = Run(experts[0], len(schedule.progress), progress=schedule.progress, experts=experts[1:])
        first = min(models)
        always = tuple((call.expert, call.branch) for call in self._calls if call.expert == first)
        if schedule.calls and len(schedule.calls) != len(schedule.progress):
            raise EngineError(
                f"a schedule has calls for {len(schedule.calls)} steps, but the progress of {len(schedule.progress)}"
            )
        made: list[tuple[int, int, str | None]] = []
        for step in range(len(schedule.progress)):
            run.step(step)
            for expert, branch in schedule.calls[step] if schedule.calls else always:
                place = self._captured(expert, branch)
                run.branch(branch)
                run.call(captures[self._graph[place]], list(self._calls[place].args))
                made.append((step, expert, branch))
        return self._placed(made, noted)

    def _captured(self, expert: int, branch: str | None) -> int:
        for place, call in enumerate(self._calls):
            if (call.expert, call.branch) == (expert, branch):
                return place
        raise EngineError(
            f"a schedule calls transformer {expert}{f' in branch {branch}' if branch else ''}, of which no call was "
            "captured; capture the pipeline with inputs with which it makes such calls"
        )

    def _placed(self, made: Sequence[tuple[int, int, str | None]], noted: Sequence[_Noted]) -> tuple[EngineCall, ...]:
        """The calls with their caches in slots. A slot is free after the last call that reads what lies in it."""
        keys = [(each.place, self._wider.get((each.place, each.row), each.row)) for each in noted]
        read = [
            {name: each.caches[name] for name in self._forms_of(*key).reads}
            for each, key in zip(noted, keys, strict=True)
        ]
        last = {id(tensor): i for i, caches in enumerate(read) for tensor in caches.values()}
        slot_of: dict[int, int] = {}
        found = []
        for i, (each, key, caches) in enumerate(zip(noted, keys, read, strict=True)):
            self.counts[key] = self.counts.get(key, 0) + 1
            busy = {slot for token, slot in slot_of.items() if last[token] >= i}
            writes: list[tuple[CacheName, int | None]] = []
            for name, form in self._forms_of(*key).writes.items():
                token = id(each.written.get(name))
                if token in last:
                    slot_of[token] = self._free(form, busy)
                    busy.add(slot_of[token])
                writes.append((name, slot_of.get(token)))
            reads = tuple((name, slot_of[id(tensor)]) for name, tensor in caches.items() if name.kind != "weights")
            weights = tuple((name, tuple(tensor.tolist())) for name, tensor in caches.items() if name.kind == "weights")
            found.append(EngineCall(*made[i], list(self.counts).index(key), reads, tuple(writes), weights))
        return tuple(found)

    def _free(self, form: Slot, busy: set[int]) -> int:
        """A slot of this form that is not busy."""
        found = next((i for i, slot in enumerate(self.slots) if slot == form and i not in busy), len(self.slots))
        if found == len(self.slots):
            self.slots.append(form)
        return found

    def _forms_of(self, place: int, row: Row) -> _Forms:
        if (place, row) not in self._forms:
            self._forms[place, row] = _forms_of(self._calls[place].capture, row)
        return self._forms[place, row]


def _forms_of(capture: Capture, row: Row) -> _Forms:
    """The caches of a row of roles of a capture."""
    if all(role == FULL_ROLE for role in row):
        return _Forms({}, {})
    model = capture.model
    made = rewrite(model.canonical, model.units, row, model.context)
    graph = made.module.graph
    inputs = graph.find_nodes(op="placeholder")
    (output,) = graph.find_nodes(op="output")
    results = output.args[0]
    assert isinstance(results, (tuple, list))
    first = len(inputs) - len(made.cache_inputs)
    left = [place - first for place in prune(made.module)[1] if place >= first]
    writes = results[len(results) - len(made.cache_outputs) :]
    return _Forms(
        {made.cache_inputs[i]: _slot(inputs[first + i]) for i in left},
        {name: _slot(node) for name, node in zip(made.cache_outputs, writes, strict=True)},
    )


def _slot(node: Any) -> Slot:
    value = tensor_of(node)
    assert value is not None, "caches are tensors"
    return Slot(plain_shape(value), value.dtype)


# --- at most so many -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limited:
    """``buckets`` of at most so many engines. ``schedules``: as they are now, each plan on its own steps. ``before``
    and ``after``: what all steps cost, without and with the limit, in ``weighed``: ``"predicted time"`` or
    ``"operations"``."""

    buckets: Buckets
    schedules: tuple[Schedule, ...]
    before: float
    after: float
    weighed: str


def limited(calls: Sequence[CapturedCall], schedules: Sequence[Schedule], most: int | None = None) -> Limited:
    """The buckets of schedules, rows merged where there would be more than ``most`` engines.

    Rows are weighed by their predicted time where this machine has been measured (``difa tune``), else by their
    operations. What is merged is what of the plans is carried out. Raises as :func:`buckets_of` and :func:`merged`;
    :class:`RowLimitError` also where each graph that was captured needs an engine, and there are more of them.
    """
    if most is not None:
        check_most(most)
    plain = buckets_of(calls, schedules)
    model = calls[0].capture.model
    sites = [unit.info for unit in model.units]
    cost, weighed = _weighing(calls[0].capture, [row.roles for row in plain.rows])
    price = cache(cost)
    before = _cost(plain, price)
    if most is None or len(plain.rows) <= most:
        return Limited(plain, tuple(schedules), before, before, weighed)
    carried = [_carried_out(calls[0].capture, schedule) for schedule in schedules]
    rows = [decisions for decisions, _, _ in carried]
    guided = Guided(model.context.two_call, len({id(call.capture) for call in calls if call.expert == calls[0].expert}))
    for limit in range(most, guided.graphs - 1, -1):
        found = merged(rows, sites, limit, guided=guided, cost=price)
        plans = tuple(
            replace(schedule, plan=_weighted(_plan_of(schedule, sites, decisions), resolved, units))
            for schedule, decisions, (_, resolved, units) in zip(schedules, found.rows, carried, strict=True)
        )
        made = buckets_of(calls, plans)
        wider = widened({(row.call, row.roles): row.calls for row in made.rows}, most, price)
        if wider:
            made = buckets_of(calls, plans, wider)
        plain = made
        if len(made.rows) <= most:
            return Limited(made, plans, before, _cost(made, price), weighed)
    raise RowLimitError(
        f"{most} engines were allowed, but even if everything is full at every step {len(plain.rows)} are needed, "
        "since transformers, or the calls of guidance's branches, differ; allow as many"
    )


def _weighing(capture: Capture, rows: Sequence[Row]) -> tuple[Cost, str]:
    """What a row of roles costs, and in what: predicted time if that is known of all these rows and of a full one,
    hence of all that they can become."""
    predicted = capture.prediction.row_seconds

    def seconds(row: Row) -> float:
        found = predicted(row)
        assert found is not None, "of the same operations as rows that are known"
        return found

    if all(predicted(row) is not None for row in (*rows, (FULL_ROLE,) * len(capture.model.units))):
        return seconds, "predicted time"
    return partial(row_flops, sites=[unit.info for unit in capture.model.units]), "operations"


def _cost(buckets: Buckets, price: Cost) -> float:
    return sum(row.calls * price(row.roles) for row in buckets.rows)


def _carried_out(capture: Capture, schedule: Schedule) -> tuple[Decisions, ResolvedPlan, tuple[int, ...]]:
    """What of a schedule's plan is carried out, by step and unit of the model; the plan on that schedule, and the unit
    that each of its sites is."""
    follower = _Noting(capture, 0, lambda *_: {})
    follower.follow(schedule.plan)
    plan = follower.plan
    assert plan is not None
    resolved = plan.resolve(len(schedule.progress), progress=schedule.progress)
    found = []
    for row in resolved.rows:
        whole = [FULL] * len(capture.model.units)
        for site, decision in enumerate(row):
            whole[follower.units[site]] = follower.verdicts.effective(site, decision)
        found.append(tuple(whole))
    return tuple(found), resolved, tuple(follower.units)


def _plan_of(schedule: Schedule, sites: Sequence[SiteInfo], decisions: Decisions) -> Plan:
    """A plan that says this on the steps of a schedule."""
    own = schedule.plan.settings
    settings = Settings(method="rule", guidance=own.guidance, conditional_half=own.conditional_half, sample=own.sample)
    cells = tuple(tuple(map(Cell, row)) for row in decisions)
    return Plan(schedule.plan.model, settings, tuple(sites), schedule.progress, cells)


def _weighted(plan: Plan, made_from: ResolvedPlan, units: Sequence[int]) -> Plan:
    """The plan with the fitted weights of the one that it was made from, where its forecasts read the same steps."""
    if not made_from.plan.fitted:
        return plan
    rows = [list(row) for row in plan.rows]
    for site, unit in enumerate(units):
        roles = [row[unit] for row in plan.roles]
        read = output_sources([role.decision for role in roles], [role.covered for role in roles])
        for step, sources in enumerate(read):
            if roles[step].decision.order:
                own = made_from.fitted_weights(step, site, sources)
                rows[step][unit] = replace(rows[step][unit], weights=own)
    return replace(plan, rows=tuple(map(tuple, rows)))
