"""The part of a run that belongs to captures between which caches may pass: its roles, step by step, and its caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from difa_compile.backend.capture import Capture
from difa_compile.backend.two_calls import conditional_role, heads_of, take_over, unshared
from difa_compile.decision import MAX_ORDER, Decision
from difa_compile.errors import PlanMismatchError, RunError
from difa_compile.ops.reference import extrapolation_dtype
from difa_compile.passes.caches import CacheName, renew
from difa_compile.plan.schedule import Promotion, Role, assign_roles, output_sources, take_rows


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
        model = capture.model
        rows = tuple(
            tuple(capture.verdicts.effective(site, decision) for site, decision in enumerate(row))
            for row in capture.plan.decisions
        )
        caches = tuple(
            (model.units[i].path, model.units[i].tokens, model.units[i].cache_shapes, *model.cache_dtypes[i])
            for i in capture.units
        )
        return cls(model.context.two_call, rows, model.batch, caches)

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


@dataclass(frozen=True)
class StepCall:
    """One call of the model at a step of a part: a role per site, the caches it reads, those of another branch that it
    takes over, and the sites whose outputs the other call of this step will want, with the age of the oldest of them.
    """

    step: int
    roles: tuple[Role, ...]
    read: Mapping[CacheName, Tensor]
    kept: Mapping[CacheName, Tensor]
    wanted: Mapping[str, int]


@dataclass(frozen=True)
class Course:
    """What a branch does from a step on at which nothing is cached: by step a role per site, and the weights of its
    forecasts, each a view of one tensor per device and dtype."""

    roles: Mapping[int, tuple[Role, ...]]
    weights: Mapping[int, Mapping[CacheName, Tensor]]


class RunPart:
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
        self._resolved = resolved
        self._paths = tuple(site.path for site in plan.sites)
        self._sites = {path: index for index, path in enumerate(self._paths)}
        self._course = self._course_from(0)
        self._branch_courses: dict[str | None, Course] = {}
        """Of branches that have left steps out, and so were entered anew."""
        self.caches: dict[str | None, dict[CacheName, Tensor]] = {}
        self._last: dict[str | None, int] = {}
        self._shareable: set[RunPart] = set()

    def same_as(self, capture: Capture) -> Capture:
        """The capture that stands for ``capture``: the first that computes the same, or itself."""
        found = next((known for known in self._captures if known.model.identity == capture.model.identity), None)
        if found is None:
            self._captures.append(capture)
        return found or capture

    def replaced(self, parts: Sequence[RunPart], index: int, branch: str | None) -> RunPart | None:
        """The other part, if one made the call of the step before that this one would have to go on from."""
        if self._last.get(branch, -2) >= index - 1 - self.first:
            return None
        return next((part for part in parts if part._last.get(branch) == index - 1 - part.first), None)

    def sites_that_read(self, index: int, branch: str | None) -> list[str]:
        """The paths of sites with caches of a branch that steps after ``index`` read."""
        step = index - self.first
        read = {self._sites[name.site] for name in self.caches.get(branch, {}) if self._read_later(step, branch, name)}
        return [self._paths[site] for site in sorted(read)]

    def _course_from(self, step: int) -> Course:
        """The course of the steps from ``step`` on, where nothing is cached: what would be read from before is full."""
        plan = self.capture.plan
        assert plan is not None
        start = self.first + step
        rows, promotions = take_rows(plan.decisions, self._source_steps[start:], plan.blocks)
        self._promotions.update((replace(promotion, step=start + promotion.step), None) for promotion in promotions)
        effective = self.capture.verdicts.effective
        carried_out = [[effective(site, decision) for site, decision in enumerate(row)] for row in rows]
        roles = assign_roles(carried_out, plan.blocks)
        weights = self._weights_of(roles, start)
        return Course(dict(enumerate(roles, start=step)), {step + i: found for i, found in weights.items()})

    def _weights_of(self, rows: Sequence[Sequence[Role]], start: int) -> dict[int, dict[CacheName, Tensor]]:
        """The weights of all forecasts of a course that begins at ``start``, by step behind that; moved to each device
        at once."""
        found: dict[tuple[torch.device, torch.dtype], list[tuple[int, CacheName, tuple[float, ...]]]] = {}
        for index, path in enumerate(self._paths):
            column = [row[index].decision for row in rows]
            if not any(decision.order for decision in column):
                continue
            read = output_sources(column, [row[index].covered for row in rows])
            _, *dtypes, device = self.capture.model.cache_dtypes[self.capture.units[index]]
            assert isinstance(device, torch.device)
            assert isinstance(dtypes[0], torch.dtype)
            place = device, extrapolation_dtype(dtypes[0])
            for step, (decision, sources) in enumerate(zip(column, read, strict=True)):
                if decision.order:
                    behind = [start + source for source in sources]
                    weights = self._resolved.weights(start + step, index, decision, behind)
                    found.setdefault(place, []).append((step, CacheName.weights(path), weights))
        by_step: dict[int, dict[CacheName, Tensor]] = {}
        for (device, dtype), weights_there in found.items():
            widest = max(len(weights) for _, _, weights in weights_there)
            table = [[*weights, *[0.0] * (widest - len(weights))] for _, _, weights in weights_there]
            tensor = torch.tensor(table, dtype=dtype, device=device)
            for row, (step, name, weights) in zip(tensor, weights_there, strict=True):
                by_step.setdefault(step, {})[name] = row[: len(weights)]
        return by_step

    def _course_now(self, step: int, branch: str | None) -> Course:
        """The course of a branch at a step; if it has left steps out it is entered anew, with empty caches.

        Raises :class:`RunError` for a second call of one step and branch, which would take caches from the first.
        """
        last = self._last.get(branch)
        known = self._branch_courses.get(branch)
        if last == step and any(role.depends_on_calls for role in self._course.roles[step]):
            where = f"in branch {branch!r}" if branch else "without a branch"
            raise RunError(
                f"step {self.first + step}: the model was called twice {where}, and the plan keeps caches, which such "
                "calls would take from each other; go on with run.step, or say which call is which with "
                'run.branch("cond") and run.branch("uncond"), or use a plan without reuse and residuals'
            )
        if last != step and step != (0 if last is None else last + 1):
            self.caches[branch] = {}
            known = self._branch_courses[branch] = self._course_from(step)
        return self._course if known is None else known

    def drop_left(self, index: int) -> None:
        """The run goes to step ``index``: let go of the caches of branches that have left out the step before."""
        for branch, last in self._last.items():
            if self.first + last < index - 1:
                self.caches[branch] = {}

    def enter(self, capture: Capture, index: int, branch: str | None, conditional: RunPart | None) -> StepCall:
        """Begin a call of the model, as ``capture``, at step ``index`` of the run: what it does and reads.

        ``conditional``: the part of the run that made the latest conditional call; it is another one than this if the
        texts of the two calls have other shapes. Raises :class:`RunError` if the calls of the step are not made as
        sharing needs it, :class:`PlanMismatchError` if what is to be shared does not fit.
        """
        step = index - self.first
        course = self._course_now(step, branch)
        roles = course.roles[step]
        caches = self.caches.setdefault(branch, {})
        weights = course.weights.get(step, {})
        if branch == "uncond" and conditional is not None:
            self._check_shareable(conditional)
        shared = [capture.model.context.two_call and role.decision.cfg_shared for role in roles]
        if any(shared) and branch == "uncond" and conditional is not None and conditional.is_at(index):
            theirs = conditional.roles_at(index)  # share what the conditional call of this step has shared, and how
            held = conditional.caches["cond"]  # caches of heads have other names where that call was entered anew
            shared = [
                mine
                and other.decision.cfg_shared
                and other.decision.order == role.decision.order
                and heads_of(path, role.head_writes) <= held.keys()
                for mine, path, role, other in zip(shared, self._paths, roles, theirs, strict=True)
            ]
            roles = tuple(role if share else unshared(role) for role, share in zip(roles, shared, strict=True))
        if not any(shared):
            return StepCall(step, roles, {**caches, **weights} if weights else caches, {}, {})
        if branch is None:
            raise RunError(
                f"step {index} shares the CFG halves across two calls, but the run does not know which call this "
                'is; call run.branch("cond") or run.branch("uncond") before the model'
            )
        if branch == "cond":
            row = tuple(conditional_role(role) if share else role for role, share in zip(roles, shared, strict=True))
            wanted = {
                path: role.decision.order for path, role, share in zip(self._paths, row, shared, strict=True) if share
            }
            return StepCall(step, row, {**caches, **weights}, {}, wanted)
        if conditional is None or not conditional.is_at(index):
            raise RunError(
                f"step {index} shares the conditional call's attention with the {branch} call, but the "
                "conditional call of this step has not been made; call the conditional branch first, or use a plan "
                "without +cfg"
            )
        theirs_now = {**conditional.caches["cond"], **conditional.weights_at(index)}
        taken = take_over(self._paths, roles, shared, {**caches, **weights}, theirs_now)
        return StepCall(step, taken.roles, taken.read, taken.kept, {})

    def leave(
        self, call: StepCall, branch: str | None, outputs: list[Any], written: Mapping[CacheName, Tensor]
    ) -> list[Any]:
        """The call is made: keep the caches that a later call reads. Gives outputs that share no memory with them."""
        caches = self.caches[branch]
        renew(caches, {**call.kept, **written})
        outputs = apart(outputs, caches)
        for name in list(caches):
            wanted = name.kind == "output" and name.age <= call.wanted.get(name.site, -1)
            if not wanted and not self._read_later(call.step, branch, name):
                del caches[name]
        self._last[branch] = call.step
        return outputs

    def is_at(self, index: int) -> bool:
        """Whether step ``index`` of the run was the latest conditional call's."""
        return self._last.get("cond") == index - self.first

    def roles_at(self, index: int) -> tuple[Role, ...]:
        """The roles of the conditional branch at step ``index`` of the run."""
        step = index - self.first
        return self._branch_courses.get("cond", self._course).roles[step]

    def weights_at(self, index: int) -> Mapping[CacheName, Tensor]:
        """The weights of the conditional branch's forecasts at step ``index`` of the run."""
        return self._branch_courses.get("cond", self._course).weights.get(index - self.first, {})

    def _check_shareable(self, conditional: RunPart) -> None:
        """Raise :class:`PlanMismatchError` if a site that shares has caches of other shapes in the conditional call.

        Said at the first step, not at the first that shares. Image tokens are as many in both calls; text tokens need
        not be, and where they are in the attention their outputs cannot be taken over.
        """
        if conditional is self or conditional in self._shareable or not self.capture.model.context.two_call:
            return
        sites = zip(self.capture.model.sites, conditional.capture.model.sites, strict=True)  # blocks share nothing
        for index, (mine, theirs) in enumerate(sites):
            if mine.cache_shapes != theirs.cache_shapes and any(
                row[index].decision.cfg_shared for row in self._course.roles.values()
            ):
                raise PlanMismatchError(
                    f"{mine.path}: the plan shares the conditional call's attention with the unconditional one, but it "
                    f"is over {theirs.tokens} tokens (batch {theirs.query_shape[0]}) in the conditional call and "
                    f"{mine.tokens} (batch {mine.query_shape[0]}) in the other; give prompt and negative prompt texts "
                    "of equal length (padded), or use a plan without +cfg"
                )
        self._shareable.add(conditional)

    def _read_later(self, step: int, branch: str | None, name: CacheName) -> bool:
        """Whether a step after ``step`` reads a cache before other steps have filled it, or pushed it out."""
        roles = self._branch_courses.get(branch, self._course).roles
        site, age = self._sites[name.site], name.age
        for later in range(step + 1, len(self._source_steps) - self.first):
            role = roles[later][site]
            decision = role.decision
            if role.covered:
                continue
            if name.of_heads:  # of no age: a step that writes it takes the place of what is held
                if name in heads_of(name.site, role.head_reads):
                    return True
                if name in heads_of(name.site, role.head_writes):
                    return False
                continue
            if decision.kind.reads == name.kind and age <= decision.order:
                return True
            if decision.kind.fills(name.kind):
                age += 1
                if name.kind == "residual" or age > MAX_ORDER:
                    return False
        return False


def apart(outputs: list[Any], caches: Mapping[CacheName, Tensor]) -> list[Any]:
    """Outputs that share no memory with a cache: what is handed out may be written to."""
    held = {tensor.untyped_storage().data_ptr() for tensor in caches.values()}
    return [
        value.clone() if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in held else value
        for value in outputs
    ]
