"""Runs: one pass through the sampling schedule. The step, the CFG branch and the caches live here, nowhere else.

    with difa_compile.sampling(model, steps=50) as run:
        for i, t in enumerate(timesteps):
            run.step(i)
            noise = compiled_model(latents, t)

A run is active in the thread (context) that opened it. Compiled code asks for the innermost active run of its model;
without one it computes in full.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, ref

from torch import Tensor, nn

from difa_compile.decision import Decision, Kind
from difa_compile.errors import (
    CachesLostError,
    CachesLostWarning,
    PlanMismatchError,
    PlanNotFollowedWarning,
    RunError,
    ScheduleError,
)
from difa_compile.plan.schedule import Promotion, Role, assign_roles, check_progress, check_steps, take_rows

if TYPE_CHECKING:
    from difa_compile.backend.capture import Capture

Roles = tuple[tuple[Role, ...], ...]

_active: ContextVar[tuple[Run, ...]] = ContextVar("difa_compile_runs", default=())


@contextmanager
def sampling(model: nn.Module, steps: int, *, progress: Sequence[float] | None = None) -> Iterator[Run]:
    """Open a run over ``steps`` model calls per CFG branch; it ends, and its caches go, when the block is left.

    ``progress``: the normalised timestep of each step, falling from 1 to 0, by which a plan made for another schedule
    is resolved; by default the plan's own spacing. ``model``: the module or what ``torch.compile`` made of it.

    Raises :class:`ScheduleError` for a wrong number of steps or a wrong progress. Warns
    (:class:`PlanNotFollowedWarning`) if steps were taken in which no call of the model came to this run: it computed
    what it does without a plan.
    """
    run = Run(model, steps, progress=progress)
    token = run.activate()
    try:
        yield run
        missed = run.missed_steps()
        if missed:
            which = f"{steps} steps" if len(missed) == steps or not run.calls else f"step {missed[0]}"
            more = f" and {len(missed) - 1} more" if which.startswith("step ") and len(missed) > 1 else ""
            warnings.warn(
                f"{which}{more} of a sampling run went by, and no call of {type(run.models[0]).__name__} followed a "
                "plan. Was it compiled with backend='difa'? Beyond torch._dynamo.config.recompile_limit input shapes "
                "(8 by default) Dynamo runs a model as it is: raise the limit, or compile with fullgraph=True to make "
                "that an error",
                PlanNotFollowedWarning,
                stacklevel=3,
            )
    finally:
        run.deactivate(token)
        run.reset()


def active_run(capture: Capture, args: Sequence[Any]) -> Run | None:
    """The innermost active run, in this thread, of the model that calls ``capture`` with ``args``."""
    parameter = capture.model_parameter(args)
    for run in reversed(_active.get()):
        if parameter is None or run.owns(parameter):
            return run
    return None


def run_of(model: nn.Module) -> Run | None:
    """The innermost active run of ``model`` in this thread."""
    return next((run for run in reversed(_active.get()) if model in run.models), None)


def is_sampled(model: nn.Module) -> bool:
    """Whether a run of ``model`` is active in this thread."""
    return run_of(model) is not None


class Run:
    """One pass through a schedule.

    ``index`` is the current step, ``current_branch`` the CFG branch ("cond", "uncond", None in a batched call).
    ``stepped``: whether a step was taken, ever; ``calls``: how often compiled code has asked this run.
    ``experts``: further models that take over some of the steps; each has caches of its own.

    A run stays with the captures it began with. Dynamo may hand over another one at any call (it was captured twice at
    the same time, the model was altered, Dynamo was reset): the caches go on with every capture that they fit
    (:class:`Fit`), and a capture that is the same as an earlier one is not used at all. Where they do not fit, what
    the plan would read is computed in full and the user told.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        *,
        progress: Sequence[float] | None = None,
        experts: Sequence[nn.Module] = (),
    ) -> None:
        check_steps(steps)
        self.models = tuple(getattr(each, "_orig_mod", each) for each in (model, *experts))
        self.steps = steps
        self.progress = None if progress is None else check_progress(progress)
        if self.progress is not None and len(self.progress) != steps:
            raise ScheduleError(f"{steps} steps were announced, but progress has {len(self.progress)} values")
        self.index = 0
        self.current_branch: str | None = None
        self.stepped = False
        self.calls = 0
        self.peak_cache_bytes = 0
        self._promotions: dict[Promotion, None] = {}
        self._calls_before = 0
        self._missed: list[int] = []
        self._said_lost = False
        self._owners: dict[int, tuple[ref[Tensor], int]] = {}
        """By id of a parameter: itself, since ids are given anew, and the index of its model."""
        self._parts: dict[int, list[CaptureRun]] = {}
        """By model: models of one class may share a capture. One for each form of input."""
        self._serving: dict[tuple[Capture, int], tuple[CaptureRun, Capture]] = {}
        """By the capture that Dynamo has handed over, and model: whose turn it is, and the capture that is run."""
        self._conditional: dict[int, CaptureRun] = {}
        """By model: which part the latest conditional call came from."""

    @property
    def promotions(self) -> tuple[Promotion, ...]:
        """Decisions made full because the step that would fill their cache is not in this schedule, by step."""
        return tuple(sorted(self._promotions, key=lambda promotion: (promotion.step, promotion.site)))

    def step(self, index: int) -> None:
        """Go to step ``index`` (from 0). Steps are taken in order; going back starts over with empty caches.

        Raises :class:`ScheduleError` outside the announced steps or if a step is left out.
        """
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < self.steps:
            raise ScheduleError(f"step {index!r} is outside the {self.steps} steps of this run (0 to {self.steps - 1})")
        self.stepped = True
        if index < self.index:
            self.reset()
        elif self._parts and index > self.index + 1:
            raise ScheduleError(
                f"step {index} follows step {self.index}: {index - self.index - 1} steps were left out, and what they "
                "would have cached is missing; announce the steps you take, or start a new run"
            )
        if index > self.index and self.calls:
            self._note_missed()
        self._calls_before = self.calls if index != self.index else self._calls_before
        self.index = index
        for part in self._all_parts():
            part.drop_left(index)

    def _note_missed(self) -> None:
        if self.calls == self._calls_before:
            self._missed.append(self.index)

    def missed_steps(self) -> list[int]:
        """The steps in which no compiled code has asked this run; all of those taken if none has, ever."""
        if not self.calls:
            return list(range(self.index + 1)) if self.stepped else []
        now = [self.index] if self.stepped and self.calls == self._calls_before else []
        return [*self._missed, *now]

    def branch(self, name: str | None) -> None:
        """Say which CFG branch the next calls compute, where it is two calls per step; None for a batched call."""
        self.current_branch = name

    def reset(self) -> None:
        """Forget all caches and go back to the start."""
        self._parts.clear()
        self._serving.clear()
        self._conditional.clear()
        self._missed.clear()
        self._calls_before = self.calls
        self.index = 0
        self.current_branch = None

    def activate(self) -> Token[tuple[Run, ...]]:
        """Make this the innermost active run of the thread; give the token to :meth:`deactivate`."""
        return _active.set((*_active.get(), self))

    def deactivate(self, token: Token[tuple[Run, ...]]) -> None:
        _active.reset(token)

    def owns(self, parameter: Tensor) -> bool:
        """Whether ``parameter`` is one of this run's models."""
        return self._owner(parameter) is not None

    def _owner(self, parameter: Tensor) -> int | None:
        """The index of the model that has ``parameter``. Models may get other ones in mid-run, as by a LoRA."""
        found = self._owners.get(id(parameter))
        if found is not None and found[0]() is parameter:
            return found[1]
        self._owners = {id(each): (ref(each), i) for i, model in enumerate(self.models) for each in model.parameters()}
        found = self._owners.get(id(parameter))
        return None if found is None else found[1]

    def _all_parts(self) -> Iterator[CaptureRun]:
        return (part for parts in self._parts.values() for part in parts)

    def cache_bytes(self) -> int:
        """Bytes of all caches held now, each tensor counted once."""
        held = {
            tensor.data_ptr(): tensor.numel() * tensor.element_size()
            for part in self._all_parts()
            for caches in part.caches.values()
            for tensor in caches.values()
        }
        return sum(held.values())

    def call(self, capture: Capture, args: list[Any]) -> list[Any]:
        """Execute one model call at the current step; what compiled code calls."""
        self.calls += 1
        if capture.plan is None:
            return capture.full(args)
        parameter = capture.model_parameter(args)
        model = 0 if parameter is None else self._owner(parameter)
        assert model is not None  # :func:`active_run` has asked
        part, capture = self._part(capture, model)
        before = part.replaced(self._parts[model], self.index, self.current_branch)
        if before is not None:
            self._caches_lost(before, part, model)
        outputs = part.call(capture, args, self.index, self.current_branch, self._conditional.get(model))
        if self.current_branch == "cond":
            self._conditional[model] = part
        self.peak_cache_bytes = max(self.peak_cache_bytes, self.cache_bytes())
        return outputs

    def _part(self, capture: Capture, model: int) -> tuple[CaptureRun, Capture]:
        """The part of this run that a capture belongs to, and the capture to run: an earlier one if it is the same."""
        known = self._serving.get((capture, model))
        if known is None:
            parts = self._parts.setdefault(model, [])
            fit = Fit.of(capture)
            part = next((part for part in parts if part.fit == fit), None)
            if part is None:
                part = CaptureRun(capture, fit, self.steps, self.progress, self.index, self._promotions)
                parts.append(part)
            known = self._serving[capture, model] = part, part.same_as(capture)
        return known

    def _caches_lost(self, before: CaptureRun, part: CaptureRun, model: int) -> None:
        """Say that ``part`` takes over in mid-run from ``before``, whose caches do not fit.

        Raises :class:`CachesLostError` where skips are errors.
        """
        sites = before.sites_that_read(self.index - 1, self.current_branch)
        if not sites or (self._said_lost and not part.capture.strict):
            return
        self._said_lost = True
        more = f" and {len(sites) - 1} more sites" if len(sites) > 1 else ""
        text = (
            f"step {self.index}: {type(self.models[model]).__name__} goes on as another graph than in the steps before "
            f"({part.fit.difference(before.fit)}), which their caches do not fit; {sites[0]}{more} would have read "
            "them, and attention there is full until they are filled again. Keep the model and the form of its inputs "
            "as they are during a run"
        )
        if part.capture.strict:
            raise CachesLostError(text)
        warnings.warn(text, CachesLostWarning, stacklevel=3)


@dataclass(frozen=True)
class Fit:
    """What captures have in common between which caches may pass: what the plan does, and the form of every cache."""

    two_call: bool
    rows: tuple[tuple[Decision, ...], ...]
    """By step of the plan and site: what is carried out."""
    batch: int
    caches: tuple[tuple[object, ...], ...]
    """By site: path, tokens, shapes, dtypes and device."""

    @classmethod
    def of(cls, capture: Capture) -> Fit:
        assert capture.plan is not None
        rows = tuple(
            tuple(capture.effective(site, decision) for site, decision in enumerate(row))
            for row in capture.plan.decisions
        )
        caches = tuple(
            (site.path, site.tokens, site.cache_shapes, *capture.cache_dtypes(index))
            for index, site in enumerate(capture.sites)
        )
        return cls(capture.two_call, rows, capture.sites[0].query_shape[0], caches)

    def difference(self, before: Fit) -> str:
        """What differs from the form of the steps before, in words."""
        if self.batch != before.batch:
            return f"its attention has a batch of {self.batch}, not {before.batch}"
        for mine, theirs in zip(self.caches, before.caches, strict=False):
            if mine[1] != theirs[1]:
                return f"{mine[0]} has {mine[1]} tokens, not {theirs[1]}"
            if mine != theirs:
                return f"{mine[0]} is in {mine[3]} on {mine[-1]}, not {theirs[3]} on {theirs[-1]}"
        for row, other in zip(self.rows, before.rows, strict=False):
            for site, (one, two) in enumerate(zip(row, other, strict=False)):
                if one != two:
                    return f"at {self.caches[site][0]} the plan comes to {one}, not {two}"
        return "it follows another plan"


class CaptureRun:
    """The part of a run that belongs to the captures of one fit: the plan resolved onto the schedule, and the caches
    per branch.

    ``capture``: the first of them. ``first``: the step of the run at which it is first called. ``promotions`` is added
    to.
    """

    def __init__(
        self,
        capture: Capture,
        fit: Fit,
        steps: int,
        progress: Sequence[float] | None,
        first: int,
        promotions: dict[Promotion, None],
    ) -> None:
        plan = capture.plan
        assert plan is not None
        self.capture = capture
        self.fit = fit
        self.first = first
        self._captures = [capture]
        self._promotions = promotions
        resolved = plan.resolve(steps, progress=progress)
        self._source_steps = resolved.source_steps
        self.roles = self._roles_from(0)
        self._branch_roles: dict[str | None, dict[int, tuple[Role, ...]]] = {}
        """Roles by step of a branch that has left steps out, and so was entered anew."""
        self.caches: dict[str | None, dict[str, Tensor]] = {}
        self._last: dict[str | None, int] = {}
        self._shareable: set[CaptureRun] = set()
        self._sites = {site.path: index for index, site in enumerate(capture.sites)}

    def same_as(self, capture: Capture) -> Capture:
        """The capture that stands for ``capture``: the first that computes the same, or itself."""
        found = next((known for known in self._captures if known.identity == capture.identity), None)
        if found is None:
            self._captures.append(capture)
        return found or capture

    def replaced(self, parts: Sequence[CaptureRun], index: int, branch: str | None) -> CaptureRun | None:
        """The other part, if one made the call of the step before that this one would have to go on from."""
        if self._last.get(branch, -2) >= index - 1 - self.first:
            return None
        return next((part for part in parts if part._last.get(branch) == index - 1 - part.first), None)

    def sites_that_read(self, index: int, branch: str | None) -> list[str]:
        """The paths of sites with caches of a branch that steps after ``index`` read."""
        places = (self._place(name) for name in self.caches.get(branch, {}))
        read = {site for site, kind in places if self._read_later(index - self.first, branch, site, kind)}
        return [self.capture.sites[site].path for site in sorted(read)]

    def _roles_from(self, step: int) -> Roles:
        """Roles of the steps from ``step`` on, where nothing is cached: what would be read from before is full."""
        plan = self.capture.plan
        assert plan is not None
        start = self.first + step
        rows, promotions = take_rows(plan.decisions, self._source_steps[start:])
        self._promotions.update((replace(promotion, step=start + promotion.step), None) for promotion in promotions)
        effective = self.capture.effective
        return assign_roles([[effective(site, decision) for site, decision in enumerate(row)] for row in rows])

    def _roles_now(self, step: int, branch: str | None) -> tuple[Role, ...]:
        """The roles of a step, unless the branch has left steps out: then it is entered anew, with empty caches.

        Raises :class:`RunError` for a second call of one step and branch, which would take caches from the first.
        """
        last = self._last.get(branch)
        known = self._branch_roles.get(branch)
        if last == step and any(role.depends_on_calls for role in self.roles[step]):
            where = f"in branch {branch!r}" if branch else "without a branch"
            raise RunError(
                f"step {self.first + step}: the model was called twice {where}, and the plan keeps caches, which such "
                "calls would take from each other; go on with run.step, or say which call is which with "
                'run.branch("cond") and run.branch("uncond"), or use a plan without reuse and residuals'
            )
        if last != step and step != (0 if last is None else last + 1):
            self.caches[branch] = {}
            known = self._branch_roles[branch] = dict(enumerate(self._roles_from(step), start=step))
        return self.roles[step] if known is None else known[step]

    def drop_left(self, index: int) -> None:
        """The run goes to step ``index``: let go of the caches of branches that have left out the step before."""
        for branch, last in self._last.items():
            if self.first + last < index - 1:
                self.caches[branch] = {}

    def call(
        self,
        capture: Capture,
        args: list[Any],
        index: int,
        branch: str | None,
        conditional: CaptureRun | None = None,
    ) -> list[Any]:
        """One call of the model, as ``capture``. ``conditional``: the part of the run that made the latest conditional
        call; it is another one than this if the texts of the two calls have other shapes."""
        step = index - self.first
        roles = self._roles_now(step, branch)
        caches = self.caches.setdefault(branch, {})
        if branch == "uncond" and conditional is not None:
            self._check_shareable(conditional)
        shared = [capture.two_call and role.decision.cfg_shared for role in roles]
        if any(shared) and branch == "uncond" and conditional is not None and conditional.is_at(index):
            theirs = conditional.roles_at(index)  # share what the conditional call of this step has shared
            shared = [mine and other.decision.cfg_shared for mine, other in zip(shared, theirs, strict=True)]
            roles = tuple(role if share else unshared(role) for role, share in zip(roles, shared, strict=True))
        if any(shared):
            outputs, written = self._call_shared(capture, args, index, branch, roles, shared, caches, conditional)
        else:
            outputs, written = capture.execute(args, roles, caches)
        outputs, written = apart(outputs, {**caches, **written})
        caches.update(written)
        self._drop_unread(step, branch, caches, keep_outputs=shared if branch == "cond" else ())
        self._last[branch] = step
        return outputs

    def is_at(self, index: int) -> bool:
        """Whether step ``index`` of the run was the latest conditional call's."""
        return self._last.get("cond") == index - self.first

    def roles_at(self, index: int) -> tuple[Role, ...]:
        """The roles of the conditional branch at step ``index`` of the run."""
        step = index - self.first
        return self._branch_roles.get("cond", {}).get(step, self.roles[step])

    def _call_shared(
        self,
        capture: Capture,
        args: list[Any],
        index: int,
        branch: str | None,
        roles: Sequence[Role],
        shared: Sequence[bool],
        caches: dict[str, Tensor],
        conditional: CaptureRun | None,
    ) -> tuple[list[Any], Mapping[str, Tensor]]:
        """One of the two calls of a step in which some sites share: "cond" computes, the other takes its outputs."""
        if branch is None:
            raise RunError(
                f"step {index} shares the CFG halves across two calls, but the run does not know which call this "
                'is; call run.branch("cond") or run.branch("uncond") before the model'
            )
        if branch == "cond":
            row = [across(role) if share else role for role, share in zip(roles, shared, strict=True)]
            return capture.execute(args, row, caches)
        if conditional is None or not conditional.is_at(index):
            raise RunError(
                f"step {index} shares the conditional call's attention with the {branch} call, but the "
                "conditional call of this step has not been made; call the conditional branch first, or use a plan "
                "without +cfg"
            )
        theirs = conditional.caches["cond"]
        row = [Role(Decision(Kind.REUSE)) if share else role for role, share in zip(roles, shared, strict=True)]
        read = dict(caches)
        taken: dict[str, Tensor] = {}
        for site, role, share in zip(self.capture.sites, roles, shared, strict=True):
            if share:
                prefix = f"cache.{site.path}."
                for name, value in theirs.items():
                    kind = name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else ""
                    if kind == "output":
                        read[name] = value
                    if (kind == "output" and role.emit_output) or (kind == "residual" and role.emit_residual):
                        taken[name] = value
        outputs, written = capture.execute(args, row, read)
        return outputs, {**taken, **written}

    def _check_shareable(self, conditional: CaptureRun) -> None:
        """Raise :class:`PlanMismatchError` if a site that shares has caches of other shapes in the conditional call.

        Said at the first step, not at the first that shares. Image tokens are as many in both calls; text tokens need
        not be, and where they are in the attention their outputs cannot be taken over.
        """
        if conditional is self or conditional in self._shareable or not self.capture.two_call:
            return
        sites = zip(self.capture.sites, conditional.capture.sites, strict=True)
        for index, (mine, theirs) in enumerate(sites):
            if mine.cache_shapes != theirs.cache_shapes and any(row[index].decision.cfg_shared for row in self.roles):
                raise PlanMismatchError(
                    f"{mine.path}: the plan shares the conditional call's attention with the unconditional one, but it "
                    f"is over {theirs.tokens} tokens (batch {theirs.query_shape[0]}) in the conditional call and "
                    f"{mine.tokens} (batch {mine.query_shape[0]}) in the other; give prompt and negative prompt texts "
                    "of equal length (padded), or use a plan without +cfg"
                )
        self._shareable.add(conditional)

    def _drop_unread(
        self, step: int, branch: str | None, caches: dict[str, Tensor], keep_outputs: Sequence[bool] = ()
    ) -> None:
        """Let go of caches that no later step reads before they are filled again."""
        for name in list(caches):
            site, kind = self._place(name)
            shared = kind == "output" and bool(keep_outputs) and keep_outputs[site]
            if not shared and not self._read_later(step, branch, site, kind):
                del caches[name]

    def _place(self, name: str) -> tuple[int, str]:
        """The site index and the kind of a cache name."""
        path, _, rest = name.removeprefix("cache.").rpartition(".residual")
        kind = "residual"
        if not path or rest:
            path, _, rest = name.removeprefix("cache.").rpartition(".output.")
            kind = "output"
        return self._sites[path], kind

    def _read_later(self, step: int, branch: str | None, site: int, kind: str) -> bool:
        """Whether a step after ``step`` reads a cache of a site before another step fills it."""
        own = self._branch_roles.get(branch, {})
        later = (own.get(i, self.roles[i])[site].decision.kind for i in range(step + 1, len(self.roles)))
        if kind == "output":
            return next(later, None) is Kind.REUSE
        return next((k is Kind.WINDOW_RESIDUAL for k in later if k in (Kind.FULL, Kind.WINDOW_RESIDUAL)), False)


def unshared(role: Role) -> Role:
    """The role without sharing across the two calls of a step; reuse of a cache that is not there is full."""
    return replace(role, decision=replace(role.decision, cfg_shared=False))


def apart(outputs: list[Any], caches: Mapping[str, Tensor]) -> tuple[list[Any], dict[str, Tensor]]:
    """Outputs that share no memory with a cache: what is handed out may be written to."""
    held = {tensor.untyped_storage().data_ptr() for tensor in caches.values()}
    free = [
        value.clone() if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in held else value
        for value in outputs
    ]
    return free, dict(caches)


def across(role: Role) -> Role:
    """The conditional call's role where the other call takes its output: not halved, and the output kept."""
    decision = Decision(role.decision.kind, role.decision.window)
    emit = decision.kind is not Kind.REUSE
    return Role(decision, emit_output=emit, emit_residual=role.emit_residual, residual_window=role.residual_window)


_warned: WeakSet[Capture] = WeakSet()


def call_without_run(capture: Capture, args: list[Any]) -> list[Any]:
    """A call of a planned model outside any run: full attention, and a warning the first time."""
    if capture.plan is not None and capture not in _warned:
        _warned.add(capture)
        warnings.warn(
            "a model compiled with a difa plan was called outside a sampling run: it computes full attention. Open a "
            "run with difa_compile.sampling(model, steps), or wire the pipeline with difa_compile.apply(pipe, plan)",
            stacklevel=3,
        )
    return capture.full(args)
