"""A captured graph that can be run with any row of roles.

One Dynamo capture of a model becomes one :class:`Capture`: the analysed model, what of the plan is carried out, and the
compiled variants of its segments (:mod:`difa_compile.passes.segments`). These are rewritten and compiled when first
needed, once per unique (segment structure, roles).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from difa_compile.backend.inductor import GraphCompiler
from difa_compile.backend.prediction import Prediction
from difa_compile.backend.stitch import CompiledRow, Link, copied, stitch
from difa_compile.backend.verdicts import Verdicts
from difa_compile.errors import PlanMismatchError
from difa_compile.passes.analysed_model import AnalysedModel
from difa_compile.passes.caches import CacheName
from difa_compile.passes.limit import rewrite_limit
from difa_compile.passes.order import rewrite
from difa_compile.passes.segments import Segment
from difa_compile.passes.trace import Trace
from difa_compile.plan.plan import Plan, same_but_for_text
from difa_compile.plan.schedule import FULL_ROLE, Role

Caches = Mapping[CacheName, Tensor]


@dataclass(frozen=True)
class State:
    """A point in the execution of a capture: the values so far, the next segment, the caches written.

    Never changed in place, so that one state can be continued in several ways.
    """

    values: tuple[Any, ...]
    position: int
    caches_out: Caches = field(default_factory=dict)


@dataclass(frozen=True)
class CompiledVariant:
    """A compiled variant of a segment. Caches are (site within the segment, name at the segment that was compiled), so
    that equal segments share it."""

    run: Callable[..., Any]
    cache_inputs: tuple[tuple[int, CacheName], ...]
    cache_outputs: tuple[tuple[int, CacheName], ...]


class Capture:
    """An analysed model with a compiler.

    ``plan``: what it is compiled for, or None. It is carried onto this length of text, and onto this image size if
    ``resize`` says how (:meth:`Plan.resized`). ``strict``, ``allow_slower``: as in
    :class:`~difa_compile.backend.verdicts.Verdicts`. ``overwrites``: what ``compiler`` makes returns memory that is
    overwritten in the next call of the model, as CUDA graphs do. Outputs and caches, which are still read then, are
    copied out of it. ``trace``: where variants are written.

    Raises :class:`PlanMismatchError`, :class:`SitesMismatchError` and :class:`SiteSkippedError`.

    Attributes:
        model: the analysed model.
        plan: the plan it was compiled for, as it was carried onto this model, or None.
        units: for each site of the plan its number among the model's units; without a plan, all units.
        prediction: what its sites take on this machine.
        verdicts: what of the plan is carried out.
        compiled_variants: how many segment variants have been compiled so far.
    """

    def __init__(
        self,
        model: AnalysedModel,
        compiler: GraphCompiler,
        *,
        plan: Plan | None = None,
        strict: bool = False,
        resize: str | None = None,
        overwrites: bool = False,
        allow_slower: bool = False,
        trace: Trace | None = None,
    ) -> None:
        self.model = model
        self.compiled_variants = 0
        self._compiler = compiler
        self._overwrites = overwrites
        self._trace = trace
        self._limit = rewrite_limit()
        self._compiled: dict[object, CompiledVariant] = {}
        self._rows: dict[tuple[Role, ...], CompiledRow] = {}
        self._unmodified: CompiledRow | None = None
        self._lock = threading.RLock()
        self.prediction = Prediction(model)
        self.plan = None if plan is None else self.carried_over(plan, resize)
        self.units = tuple(self._units(self.plan))
        self.verdicts = Verdicts(
            model, self.prediction, self.plan, self.units, strict=strict, allow_slower=allow_slower
        )

    def carried_over(self, plan: Plan, resize: str | None = None) -> Plan:
        """A plan as it is for this model's sizes. Raises :class:`PlanMismatchError`, :class:`SitesMismatchError`."""
        named = {site.path for site in plan.sites if site.is_block}
        infos = [site.info for site in self.model.sites]
        infos += [block.info for block in self.model.blocks if block.path in named]
        samples = (self.model.sample, plan.settings.sample)
        if infos != list(plan.sites) and (resize is not None or same_but_for_text(infos, plan.sites, samples)):
            plan = plan.resized(infos, resize or "tokens")
        plan.validate(sites=infos)
        return plan

    def _units(self, plan: Plan | None) -> Iterable[int]:
        number = {unit.path: index for index, unit in enumerate(self.model.units)}
        return number.values() if plan is None else (number[site.path] for site in plan.sites)

    def follow(self, plan: Plan) -> None:
        """From now on, and from the next run on, follow another plan of the same model and sizes.

        What was compiled for the rows they have in common is used again. Raises as the constructor does.
        """
        plan = self.carried_over(plan)
        units = tuple(self._units(plan))
        verdicts = self.verdicts.of(plan, units)
        if units != self.units:
            self._rows.clear()  # they are kept by the roles of a plan's sites
        self.plan, self.units, self.verdicts = plan, units, verdicts

    def leave_unshared(self, reason: str) -> None:
        """From now on no decision that shares the CFG halves is carried out, for this reason.

        For what only shows in the first call. Raises :class:`SiteSkippedError`, at every call, if the plan has such
        decisions and skips are errors.
        """
        if self.plan is not None and self.verdicts.why_unshared is None:
            self.verdicts = self.verdicts.unshared(reason)

    # --- whole rows --------------------------------------------------------------------------------------------------

    def compiled_row(self, roles: tuple[Role, ...]) -> CompiledRow:
        """The function that makes one call of the model with one role per site or unit: of inputs and caches, giving
        outputs and the caches written. What it needs is compiled when it is first called."""
        return self._rows.get(roles) or partial(self._first_call, roles)

    def full(self) -> CompiledRow:
        """The row of the unmodified graph, compiled whole."""
        return self.compiled_row((FULL_ROLE,) * len(self.model.sites))

    def execute(
        self, args: Sequence[Any], roles: Sequence[Role], caches: Caches
    ) -> tuple[list[Any], dict[CacheName, Tensor]]:
        """Outputs and written caches of one call with one role per site."""
        return self.compiled_row(tuple(roles))(args, caches)

    def _first_call(
        self, roles: tuple[Role, ...], args: Sequence[Any], caches: Caches
    ) -> tuple[list[Any], dict[CacheName, Tensor]]:
        """Make a call and keep its row for the next time."""
        if all(role == FULL_ROLE for role in roles):
            with self._lock:
                if self._unmodified is None:
                    self._unmodified = whole_row(self._compiler(self.model.module, args), self._overwrites)
                self._rows[roles] = self._unmodified
            return self._unmodified(args, caches)
        if self._overwrites:
            torch.compiler.cudagraph_mark_step_begin()  # the results of the call before may go
        state = self.advance(self.begin(args), roles, caches)  # compiles what the row needs
        self._rows[roles] = self.stitched(roles)
        outputs = self.outputs(state)
        return [copied(value) for value in outputs] if self._overwrites else outputs, dict(state.caches_out)

    def stitched(self, roles: Sequence[Role]) -> CompiledRow:
        """One function that runs all segments with one role per site; their variants must have been run before."""
        roles = self.whole(roles)
        left_out = self._left_out(roles)
        links = [None if i in left_out else self._link(i, roles) for i in range(len(self.model.split.segments))]
        return stitch(self.model.split, links, self._overwrites)

    def _link(self, index: int, roles: tuple[Role, ...]) -> Link:
        """What runs a segment in a row that has been run before."""
        segment = self.model.split.segments[index]
        own = tuple(roles[i] for i in segment.site_indices)
        if is_open(segment, own):
            return Link(None, segment.inputs[-len(segment.outputs) :], (), ())
        variant = self._compiled[self._key(index, own)]
        return Link(
            variant.run,
            inputs_of(segment, own),
            self._names(segment, variant.cache_inputs),
            self._names(segment, variant.cache_outputs),
        )

    def _left_out(self, roles: Sequence[Role]) -> frozenset[int]:
        """The segments (by number) of the spans that are left out."""
        return frozenset(
            number
            for segment in self.model.split.segments
            if segment.spanned and roles[segment.site_indices[0]].reads_output
            for number in segment.spanned
        )

    # --- step by step ------------------------------------------------------------------------------------------------

    def begin(self, args: Sequence[Any]) -> State:
        """The state before the first segment. ``args``: the graph's inputs, parameters included, in order."""
        return State((*args, *[None] * (self.model.split.values - len(args))), 0)

    def advance(self, state: State, roles: Sequence[Role], caches: Caches, *, stop: int | None = None) -> State:
        """Run on from ``state`` with one role per site, to the end or up to the segment that holds site ``stop``.

        ``roles`` are of the attention sites, then of the blocks, which are full where they have none. ``caches`` are
        read by name; those written are in the result's ``caches_out``. ``state`` stays as it was.
        """
        roles = self.whole(roles)
        segments = self.model.split.segments
        end = len(segments) if stop is None else self.model.segment_of(stop)
        values = list(state.values)
        written = dict(state.caches_out)
        left_out = self._left_out(roles)
        for index in range(state.position, end):
            segment = segments[index]
            own = tuple(roles[i] for i in segment.site_indices)
            inputs = [values[i] for i in inputs_of(segment, own)]
            results: Sequence[Any] = ()
            if is_open(segment, own):
                results = inputs[-len(segment.outputs) :]
            elif index not in left_out:
                variant = self._variant(index, own, inputs, caches)
                results = variant.run(*inputs, *[caches[name] for name in self._names(segment, variant.cache_inputs)])
                made = results[len(segment.outputs) :]
                written |= zip(self._names(segment, variant.cache_outputs), made, strict=True)
            for number, value in zip(segment.outputs, results, strict=False):
                values[number] = value
            for number in segment.last_use:
                values[number] = None
        return State(tuple(values), max(end, state.position), written)

    def whole(self, roles: Sequence[Role]) -> tuple[Role, ...]:
        """One role per unit of the model, given those of its attention sites, of the plan's, or of all."""
        count = len(self.model.units)
        if len(roles) == count:
            return tuple(roles)
        units = range(len(self.model.sites)) if len(roles) == len(self.model.sites) else self.units
        if len(roles) != len(units):
            raise PlanMismatchError(f"{len(roles)} roles were given for {len(self.model.sites)} sites")
        whole = [FULL_ROLE] * count
        for unit, role in zip(units, roles, strict=True):
            whole[unit] = role
        return tuple(whole)

    def outputs(self, state: State) -> list[Any]:
        """The graph's outputs, once a state is at the end."""
        return [None if number is None else state.values[number] for number in self.model.split.results]

    # --- variants ----------------------------------------------------------------------------------------------------

    def _key(self, index: int, roles: tuple[Role, ...]) -> object:
        """What a compiled variant of a segment is kept under: equal segments share it, unless rewrites are limited, for
        then one of them may be rewritten and the other not."""
        structure = self.model.split.segments[index].structure
        return (structure, roles) if self._limit is None else (index, roles)

    def _names(self, segment: Segment, caches: Sequence[tuple[int, CacheName]]) -> tuple[CacheName, ...]:
        """The names of a variant's caches at a segment."""
        paths = [self.model.units[i].path for i in segment.site_indices]
        return tuple(name.at(paths[i]) for i, name in caches)

    def _variant(self, index: int, roles: tuple[Role, ...], inputs: Sequence[Any], caches: Caches) -> CompiledVariant:
        key = self._key(index, roles)
        found = self._compiled.get(key)
        if found is None:
            with self._lock:
                found = self._compiled.get(key)
                if found is None:
                    found = self._compiled[key] = self._build(self.model.split.segments[index], roles, inputs, caches)
        return found

    def _build(
        self, segment: Segment, roles: tuple[Role, ...], inputs: Sequence[Any], caches: Caches
    ) -> CompiledVariant:
        trace = None
        if self._trace is not None:
            trace = self._trace.variant(segment.sites[0].path if segment.sites else "between")
        rewritten = rewrite(segment.module, segment.sites, roles, self.model.context, trace=trace, limit=self._limit)
        place = {site.path: i for i, site in enumerate(segment.sites)}
        reads, writes = (
            tuple((place[name.site], name) for name in names)
            for names in (rewritten.cache_inputs, rewritten.cache_outputs)
        )
        read = [caches[name] for name in self._names(segment, reads)]
        run = self._compiler(rewritten.module, [*inputs, *read])
        if self._overwrites and writes:
            run = copying_from(len(segment.outputs), run)
        self.compiled_variants += 1
        return CompiledVariant(run, reads, writes)


def is_open(segment: Segment, roles: Sequence[Role]) -> bool:
    """Whether a segment is a gate that hands on what it is given: its span is full, and nobody wants what it adds."""
    return bool(segment.spanned) and roles[0] == FULL_ROLE


def inputs_of(segment: Segment, roles: Sequence[Role]) -> tuple[int, ...]:
    """The values (by number) that a segment is given. A gate whose span is left out has no streams behind it: those
    before it, of the same form, stand in their places, which are not read then."""
    if segment.spanned and roles[0].reads_output:
        streams = segment.inputs[: len(segment.outputs)]
        return (*streams, *streams)
    return segment.inputs


def whole_row(run: Callable[..., Any], overwrites: bool) -> CompiledRow:
    """The row of a graph that was compiled whole, with no caches."""

    def row(args: Sequence[Any], caches: Caches) -> tuple[list[Any], dict[CacheName, Tensor]]:
        del caches
        return list(run(*args)), {}

    def row_copied(args: Sequence[Any], caches: Caches) -> tuple[list[Any], dict[CacheName, Tensor]]:
        del caches
        torch.compiler.cudagraph_mark_step_begin()
        return [copied(value) for value in run(*args)], {}

    return row_copied if overwrites else row


def copying_from(first: int, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with its results from ``first`` on copied."""

    def run_and_copy(*args: Any) -> list[Any]:
        results = run(*args)
        return [*results[:first], *(copied(value) for value in results[first:])]

    return run_and_copy
