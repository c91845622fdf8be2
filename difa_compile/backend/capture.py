"""A captured graph that can be run with any row of decisions.

One Dynamo capture of a model becomes one :class:`Capture`: its sites, what can't be done at which site and why, and the
segments (:mod:`difa_compile.passes.segments`) whose variants are rewritten and compiled when first needed, once per
unique (segment structure, roles).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from difa_compile.backend.stitch import Link, Row, stitch
from difa_compile.decision import FULL, Decision, Kind
from difa_compile.errors import LayoutError, NoAttentionError, PlanMismatchError, SiteSkippedError
from difa_compile.layout import Layout
from difa_compile.machine.profile import Profile, current
from difa_compile.passes.analyse.batch_dims import annotate_batch
from difa_compile.passes.analyse.find_attention import attention_inputs, find_attention
from difa_compile.passes.analyse.positions import HeldPositions
from difa_compile.passes.graph import tensor_of
from difa_compile.passes.order import rewrite
from difa_compile.passes.prepare.arguments import latent_inputs, name_arguments, sample_sizes
from difa_compile.passes.prepare.canonical import canonical
from difa_compile.passes.prepare.questions import answer
from difa_compile.passes.prepare.specialize import check_sizes, specialize
from difa_compile.passes.proofs import Proof, computes_the_same, fresh, prove
from difa_compile.passes.rewrite.share_cfg import why_not_shared
from difa_compile.passes.rewrite.window import why_not_window
from difa_compile.passes.segments import Segment, split_at_blocks, structure_of
from difa_compile.passes.variant import Context
from difa_compile.plan.cost import Setting, seconds_text, site_seconds, without_window
from difa_compile.plan.plan import Plan, same_but_for_text
from difa_compile.plan.schedule import FULL_ROLE, Role, assign_roles

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
"""Turns a graph and example inputs into a function of the same inputs that returns a list or tuple."""


@dataclass(frozen=True)
class Record:
    """What became of a decision at a site: ``outcome`` is ``"rewritten"``, ``"full"`` (as decided) or ``"skipped"``.

    Skipped are decisions that cannot be carried out and windows that are predicted slower than full attention.
    """

    site: str
    decision: str
    outcome: str
    reason: str


@dataclass(frozen=True)
class State:
    """A point in the execution of a capture: the values so far, the next segment, the caches written.

    Never changed in place, so that one state can be continued in several ways.
    """

    values: tuple[Any, ...]
    position: int
    caches_out: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """A compiled variant of a segment. Caches are (site within the segment, rest of the name): names without the site,
    so that equal blocks share it."""

    run: Callable[..., Any]
    cache_inputs: tuple[tuple[int, str], ...]
    cache_outputs: tuple[tuple[int, str], ...]


class Capture:
    """One captured graph of a model.

    ``overwrites``: what ``compiler`` makes returns memory that is overwritten in the next call of the model, as CUDA
    graphs do. Outputs and caches, which are still read then, are copied out of it.

    ``allow_slower``: windows of the plan are carried out even where the machine's profile says that they take longer
    than full attention.

    Attributes:
        sites: the sites a plan can act on (self- and joint attention), in execution order.
        all_sites: these and the cross-attention sites.
        sample: sizes of the noisy sample behind its first dimension, None where the samples of a list differ in them.
        plan: the plan it was compiled for, carried onto this length of text, and this image size if ``resize`` says
            how, or None.
        two_call: whether the CFG halves are two calls per step, so that sharing them is reuse within the step.
        strict: whether a decision that cannot be carried out is an error.
        compiled_variants: how many segment variants have been compiled so far.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        example_inputs: Sequence[Any],
        compiler: Compiler,
        *,
        plan: Plan | None = None,
        layout: Layout | None = None,
        conditional_half: int | None = None,
        two_call: bool = False,
        strict: bool = False,
        resize: str | None = None,
        overwrites: bool = False,
        allow_slower: bool = False,
    ) -> None:
        name_arguments(module.graph)
        self._questions = answer(module, example_inputs)
        specialize(module)
        self.module = module
        self.plan = plan
        self.two_call = two_call
        self.compiled_variants = 0
        self._compiler = compiler
        self._overwrites = overwrites
        self._context = Context(conditional_half)
        self._compiled: dict[tuple[str, tuple[Role, ...]], Compiled] = {}
        self._rows: dict[tuple[Role, ...], Row] = {}
        self._reasons: dict[tuple[int, Decision], str | None] = {}
        self._why_unshared: str | None = None
        self.strict = strict
        self._allow_slower = allow_slower
        self._slower: dict[tuple[int, Decision], str] = {}
        self._seconds: dict[tuple[int, Role | Decision], float | None] = {}
        self._whole: Callable[..., Any] | None = None
        self._lock = threading.RLock()
        self._parameter = first_parameter(example_inputs)
        module = self._canonical(module, example_inputs)
        latents = latent_inputs(module.graph)
        self.sample = sample_sizes(latents)
        annotate_batch(module.graph, latents)
        self.all_sites = find_attention(module, layout=layout, values=example_inputs)
        self._positions = HeldPositions(
            module.graph,
            example_inputs,
            lambda values: [site.layout for site in find_attention(module, layout=layout, values=values)],
        )
        self.sites = tuple(site for site in self.all_sites if site.rewritable)
        if not self.sites:
            raise NoAttentionError(
                f"the graph has {len(self.all_sites)} attention calls, none of them self- or joint attention of the "
                "denoised tokens through scaled_dot_product_attention; there is nothing a plan could change"
            )
        if layout is not None and all(site.layout is None for site in self.sites):
            raise LayoutError(f"{self.sites[0].path}: {self.sites[0].layout_reason}; give the layout of the sequence")
        for site in self.sites:
            check_sizes((*attention_inputs(site.region.attention), *site.region.interior))
        self.split = split_at_blocks(module, self.sites)
        for segment in self.split.segments:
            check_sizes(segment.module.graph.find_nodes(op="placeholder"))
        self._segment_of = {index: i for i, segment in enumerate(self.split.segments) for index in segment.site_indices}
        self._proofs = self._prove(fresh(module, example_inputs))  # proving must not change what the model writes to
        self.records: tuple[Record, ...] = ()
        if plan is not None:
            infos = [site.info for site in self.sites]
            samples = (self.sample, plan.settings.sample)
            if infos != list(plan.sites) and (resize is not None or same_but_for_text(infos, plan.sites, samples)):
                self.plan = plan = plan.resized(infos, resize or "tokens")
            plan.validate(sites=infos)
            self._judge(plan)

    @staticmethod
    def _canonical(module: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
        """The graph that plans rewrite: with all attention in one form, if that computes the same."""
        rewritten = canonical(module)
        if rewritten is module or computes_the_same(module, rewritten, example_inputs):
            return rewritten
        warnings.warn(
            "attention written out in plain products was recognised, but as one call it does not compute the same on "
            "the example inputs; it is left alone",
            stacklevel=2,
        )
        return module

    # --- what can be done --------------------------------------------------------------------------------------------

    def _judge(self, plan: Plan) -> None:
        """Find what of the plan is carried out, and write it into the records. Raises :class:`SiteSkippedError`."""
        impossible = [
            (site.path, decision, reason)
            for index, site in enumerate(self.sites)
            for decision in dict.fromkeys(row[index] for row in plan.decisions)
            if (reason := self.why_not(index, decision)) is not None
        ]
        if self.strict and impossible:
            path, decision, reason = impossible[0]
            raise SiteSkippedError(
                f"{path}: {decision} can't be carried out: {reason} ({len(impossible)} such "
                "decisions in all). Take the decision out of the plan, or compile with strict=False to leave these "
                "sites full"
            )
        if not self._allow_slower:
            self._slower = self._predicted_slower(plan)
        self.records = self._record(plan)

    def leave_unshared(self, reason: str) -> None:
        """From now on no decision that shares the CFG halves can be carried out, for this reason.

        For what only shows in the first call. Raises :class:`SiteSkippedError` if the plan has such decisions and skips
        are errors.
        """
        with self._lock:
            if self.plan is None or self._why_unshared is not None:
                return
            self._why_unshared = reason
            self._reasons.clear()
            self._slower = {}
            try:
                self._judge(self.plan)
            except SiteSkippedError:  # so it is at every call
                self._why_unshared = None
                self._reasons.clear()
                raise

    def why_not(self, site_index: int, decision: Decision) -> str | None:
        """The reason why ``decision`` can't be carried out at a site, or None.

        CFG sharing is judged for a batched call; across two calls it is reuse within the step.
        """
        key = (site_index, decision)
        if key not in self._reasons:
            self._reasons[key] = self._why_not(site_index, decision)
        return self._reasons[key]

    def _why_not(self, site_index: int, decision: Decision) -> str | None:
        if decision.cfg_shared and self._why_unshared is not None:
            return self._why_unshared
        segment = self.split.segments[self._segment_of[site_index]]
        site = segment.sites[segment.site_indices.index(site_index)]
        proof = self._proofs[site_index]
        reason = proof.reuse if decision.kind is Kind.REUSE else None
        if decision.cfg_shared and reason is None:
            reason = proof.reuse if self.two_call else proof.sharing
        if reason is not None:
            return reason
        if decision.window is not None:
            reason = why_not_window(site)
            if reason is not None:
                return reason
        if decision.cfg_shared and not self.two_call:
            role = Role(FULL)
            return why_not_shared(segment.module, site, role, self._context)
        return None

    def effective(self, site_index: int, decision: Decision) -> Decision:
        """The decision itself, or full: where it can't be carried out, and for a window that is predicted slower.

        In place of such a window full attention shares the CFG halves as the decision says.
        """
        if self.why_not(site_index, decision) is not None:
            return FULL
        return without_window(decision) if (site_index, decision) in self._slower else decision

    # --- what it would take ------------------------------------------------------------------------------------------

    @cached_property
    def profile(self) -> Profile | None:
        """The profile of this machine, read once, so that all calls of a capture decide alike."""
        return current(self._setting(0).device)

    def _setting(self, site_index: int) -> Setting:
        site = self.sites[site_index]
        _, _, value = (node.meta["example_value"] for node in attention_inputs(site.region.attention))
        attended = tensor_of(site.region.attention)  # of the dtype that is computed in, to which autocast may cast
        dtype = value.dtype if attended is None else attended.dtype
        return Setting(
            site.query_shape[0], dtype, value.device, site.key_shape[1], value.shape[-1], site.mask != "none"
        )

    def seconds(self, site_index: int, role: Role | Decision) -> float | None:
        """Predicted seconds of a site at one step of one call; None without a profile that can tell."""
        if self.profile is None:
            return None
        key = (site_index, role)
        if key not in self._seconds:
            info = self.sites[site_index].info
            self._seconds[key] = site_seconds(role, info, self._setting(site_index), self.profile)
        return self._seconds[key]

    def why_slower(self, site_index: int, decision: Decision) -> str | None:
        """Both figures in words if a window is predicted to take no less than full attention, which shares as it does.

        Judged by itself, without the step that takes its residual. None also where nothing can be predicted.
        """
        window, full = (self.seconds(site_index, one) for one in (decision, without_window(decision)))
        if decision.window is None or window is None or full is None or window < full:
            return None
        return self._figures(site_index, window, full, than="no faster than")

    def _figures(self, site_index: int, window: float, full: float, note: str = "", than: str = "slower than") -> str:
        setting, site = self._setting(site_index), self.sites[site_index]
        assert self.profile is not None
        most = self.profile.extrapolates(site.info.keys, setting.dtype)
        return (
            f"predicted {than} full: {seconds_text(window)}{note} against {seconds_text(full)} on this machine"
            f"{', extrapolated from fewer tokens' if most else ''}"
        )

    def _predicted_slower(self, plan: Plan) -> dict[tuple[int, Decision], str]:
        """The windows of a plan that are predicted to cost more than they save over the plan's own schedule.

        What taking a residual costs is set against what all its readers save. In place of a window comes full
        attention, which shares the CFG halves as the window did.
        """
        found: dict[tuple[int, Decision], str] = {}
        for index in range(len(self.sites)):
            column = [self.effective(index, row[index]) for row in plan.decisions]
            windows = [decision for decision in dict.fromkeys(column) if decision.window is not None]
            again = bool(windows)
            while again:  # a window left out may leave the cost of a residual to the others
                again = False
                for decision in windows:
                    without = [without_window(one) if one == decision else one for one in column]
                    now, then = self._column_seconds(index, column), self._column_seconds(index, without)
                    if now is None or then is None or then >= now:
                        continue
                    full = self.seconds(index, without_window(decision))
                    assert full is not None
                    each = full + (now - then) / column.count(decision)
                    note = " (with its residual)" if decision.kind is Kind.WINDOW_RESIDUAL else ""
                    figures = self._figures(index, each, full, note)
                    found[index, decision] = f"{figures}; allow_slower=True takes it anyway"
                    column, again = without, True
        return found

    def _column_seconds(self, site_index: int, column: Sequence[Decision]) -> float | None:
        """Predicted seconds of one site over a schedule."""
        total = 0.0
        for (role,) in assign_roles([[decision] for decision in column]):
            seconds = self.seconds(site_index, role)
            if seconds is None:
                return None
            total += seconds
        return total

    def _record(self, plan: Plan) -> tuple[Record, ...]:
        records = []
        for index, site in enumerate(self.sites):
            for decision in dict.fromkeys(row[index] for row in plan.decisions):
                reason = self.why_not(index, decision) or self._slower.get((index, decision))
                outcome = "skipped" if reason else "full" if decision == FULL else "rewritten"
                records.append(Record(site.path, str(decision), outcome, reason or ""))
        return tuple(records)

    def _prove(self, example_inputs: Sequence[Any]) -> dict[int, Proof]:
        """Run every kind of segment once on real values and let its regions prove themselves."""
        proved: dict[str, tuple[Proof, ...]] = {}
        kinds = {segment.structure for segment in self.split.segments if segment.sites}
        values: list[Any] = [*example_inputs, *[None] * (self.split.values - len(example_inputs))]
        with torch.no_grad():
            for segment in self.split.segments:
                inputs = [values[i] for i in segment.inputs]
                if segment.sites and segment.structure not in proved:
                    proved[segment.structure] = tuple(
                        prove(segment.module, segment.sites, i, inputs, self._context)
                        for i in range(len(segment.sites))
                    )
                    if len(proved) == len(kinds):
                        break
                results = segment.module(*inputs)
                for number, value in zip(segment.outputs, results, strict=True):
                    values[number] = value
                for number in segment.last_use:
                    values[number] = None
        return {
            index: proof
            for segment in self.split.segments
            if segment.sites
            for index, proof in zip(segment.site_indices, proved[segment.structure], strict=True)
        }

    # --- running -----------------------------------------------------------------------------------------------------

    def check(self, args: Sequence[Any]) -> None:
        """Raise :class:`InputValuesError` if the capture does not hold for inputs of these values.

        A model may ask its inputs how many tokens a mask shows, or branch on them; the capture holds for the answers
        with which it was made, and for the positions of tokens that it was given.
        """
        self._questions.check(args)
        self._positions.check(args)

    def full(self, args: Sequence[Any]) -> list[Any]:
        """The unmodified graph, compiled whole."""
        return self.execute(args, [FULL_ROLE] * len(self.sites), {})[0]

    def _run_whole(self, args: Sequence[Any]) -> list[Any]:
        if self._whole is None:
            with self._lock:
                if self._whole is None:
                    self._whole = self._compiler(self.module, args)
        return list(self._whole(*args))

    def begin(self, args: Sequence[Any]) -> State:
        """The state before the first segment. ``args``: the graph's inputs, parameters included, in order."""
        return State((*args, *[None] * (self.split.values - len(args))), 0)

    def advance(
        self, state: State, roles: Sequence[Role], caches: Mapping[str, Tensor], *, stop: int | None = None
    ) -> State:
        """Run on from ``state`` with one role per site, to the end or up to the segment that holds site ``stop``.

        ``caches`` are read by name; those written are in the result's ``caches_out``. ``state`` stays as it was.
        """
        if len(roles) != len(self.sites):
            raise PlanMismatchError(f"{len(roles)} roles were given for {len(self.sites)} sites")
        end = len(self.split.segments) if stop is None else self._segment_of[stop]
        values = list(state.values)
        written = dict(state.caches_out)
        for segment in self.split.segments[state.position : end]:
            inputs = [values[i] for i in segment.inputs]
            paths = [self.sites[i].path for i in segment.site_indices]
            variant = self._variant(segment, tuple(roles[i] for i in segment.site_indices), inputs, paths, caches)
            read = [caches[f"cache.{paths[i]}.{rest}"] for i, rest in variant.cache_inputs]
            results = variant.run(*inputs, *read)
            for number, value in zip(segment.outputs, results, strict=False):
                values[number] = value
            for (i, rest), value in zip(variant.cache_outputs, results[len(segment.outputs) :], strict=True):
                written[f"cache.{paths[i]}.{rest}"] = value
            for number in segment.last_use:
                values[number] = None
        return State(tuple(values), max(end, state.position), written)

    def outputs(self, state: State) -> list[Any]:
        """The graph's outputs, once a state is at the end."""
        return [None if number is None else state.values[number] for number in self.split.results]

    def execute(
        self, args: Sequence[Any], roles: Sequence[Role], caches: Mapping[str, Tensor]
    ) -> tuple[list[Any], Mapping[str, Tensor]]:
        """Outputs and written caches of one call with one role per site."""
        if not self._overwrites:
            return self._execute(args, tuple(roles), caches)
        torch.compiler.cudagraph_mark_step_begin()  # the results of the call before may go
        outputs, written = self._execute(args, tuple(roles), caches)
        return [copied(value) for value in outputs], written

    def _execute(
        self, args: Sequence[Any], roles: tuple[Role, ...], caches: Mapping[str, Tensor]
    ) -> tuple[list[Any], Mapping[str, Tensor]]:
        row = self._rows.get(roles)
        if row is not None:
            return row(args, caches)
        if all(role == FULL_ROLE for role in roles):
            return self._run_whole(args), {}
        state = self.advance(self.begin(args), roles, caches)  # compiles what the row needs
        self._rows[roles] = self.stitched(roles)
        return self.outputs(state), state.caches_out

    def stitched(self, roles: tuple[Role, ...]) -> Row:
        """One function that runs all segments with one role per site; their variants must have been run before."""
        return stitch(self.split, [self._link(segment, roles) for segment in self.split.segments])

    def _link(self, segment: Segment, roles: tuple[Role, ...]) -> Link:
        """What runs a segment in a row that has been run before."""
        found = self._compiled[segment.structure, tuple(roles[i] for i in segment.site_indices)]
        paths = [self.sites[i].path for i in segment.site_indices]
        reads, writes = (
            tuple(f"cache.{paths[i]}.{rest}" for i, rest in names)
            for names in (found.cache_inputs, found.cache_outputs)
        )
        return Link(found.run, reads, writes)

    def _variant(
        self,
        segment: Segment,
        roles: tuple[Role, ...],
        inputs: Sequence[Any],
        paths: Sequence[str],
        caches: Mapping[str, Tensor],
    ) -> Compiled:
        key = (segment.structure, roles)
        found = self._compiled.get(key)
        if found is None:
            with self._lock:
                found = self._compiled.get(key)
                if found is None:
                    found = self._compiled[key] = self._build(segment, roles, inputs, paths, caches)
        return found

    def _build(
        self,
        segment: Segment,
        roles: tuple[Role, ...],
        inputs: Sequence[Any],
        paths: Sequence[str],
        caches: Mapping[str, Tensor],
    ) -> Compiled:
        rewritten = rewrite(segment.module, segment.sites, roles, self._context)
        names = [site.path for site in segment.sites]

        def relative(name: str) -> tuple[int, str]:
            for i, path in enumerate(names):
                prefix = f"cache.{path}."
                if name.startswith(prefix) and name[len(prefix) :].split(".")[0] in ("output", "residual"):
                    return i, name[len(prefix) :]
            raise AssertionError(name)

        reads = tuple(relative(name) for name in rewritten.cache_inputs)
        read = [caches[f"cache.{paths[i]}.{rest}"] for i, rest in reads]
        run = self._compiler(rewritten.module, [*inputs, *read])
        if self._overwrites and rewritten.cache_outputs:
            run = copying_from(len(segment.outputs), run)
        self.compiled_variants += 1
        return Compiled(run, reads, tuple(relative(name) for name in rewritten.cache_outputs))

    @cached_property
    def identity(self) -> tuple[object, ...]:
        """Equal for captures that compute the same function of the same inputs, in the same pieces."""
        inputs = tuple(str(node.target) for node in self.module.graph.find_nodes(op="placeholder"))
        pieces = tuple((segment.structure, segment.inputs, segment.outputs) for segment in self.split.segments)
        return structure_of(self.module), inputs, pieces, self.split.results

    def cache_dtypes(self, site_index: int) -> tuple[object, ...]:
        """The dtypes of what may be cached at a site, as its shapes (:attr:`Site.cache_shapes`), and the device."""
        region = self.sites[site_index].region
        values = [tensor_of(node) for node in (region.attention, *region.outputs)]
        return *(None if value is None else value.dtype for value in values), getattr(values[0], "device", None)

    def model_parameter(self, args: Sequence[Any]) -> Tensor | None:
        """A parameter of the model that makes a call with ``args``, or None if it has none.

        Dynamo shares one capture among models of a class, whose parameters are inputs of the graph.
        """
        return None if self._parameter is None else args[self._parameter]


def batch_of(capture: Capture) -> int:
    """The batch of the first site's attention; where attention is over parts of a sample, a multiple of the samples."""
    return capture.sites[0].query_shape[0]


def copying_from(first: int, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with its results from ``first`` on copied."""

    def run_and_copy(*args: Any) -> list[Any]:
        results = run(*args)
        return [*results[:first], *(copied(value) for value in results[first:])]

    return run_and_copy


def copied(value: Any) -> Any:
    """A tensor in memory of its own; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value


def first_parameter(inputs: Sequence[Any]) -> int | None:
    """Where the first parameter stands among a graph's inputs."""
    return next((i for i, value in enumerate(inputs) if isinstance(value, torch.nn.Parameter)), None)
