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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet, ref

from torch import Tensor, nn

from difa_compile.backend.capture import Capture
from difa_compile.backend.current import enter, in_progress, leave
from difa_compile.backend.run_part import Fit, RunPart
from difa_compile.errors import (
    CachesLostError,
    CachesLostWarning,
    PlanNotFollowedWarning,
    ScheduleError,
)
from difa_compile.plan.schedule import Promotion, check_progress, check_steps


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
    run.activate()
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
        run.deactivate()
        run.reset()


def active_run(capture: Capture, args: Sequence[Any]) -> Run | None:
    """The innermost active run, in this thread, of the model that calls ``capture`` with ``args``."""
    parameter = capture.model.parameter(args)
    for run in reversed(in_progress()):
        if isinstance(run, Run) and (parameter is None or run.owns(parameter)):
            return run
    return None


def run_of(model: nn.Module) -> Run | None:
    """The innermost active run of ``model`` in this thread."""
    runs = (run for run in reversed(in_progress()) if isinstance(run, Run))
    return next((run for run in runs if model in run.models), None)


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
        self._parts: dict[int, list[RunPart]] = {}
        """By model: models of one class may share a capture. One for each form of input."""
        self._serving: dict[tuple[Capture, int], tuple[RunPart, Capture]] = {}
        """By the capture that Dynamo has handed over, and model: whose turn it is, and the capture that is run."""
        self._conditional: dict[int, RunPart] = {}
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

    def activate(self) -> None:
        """Make this the innermost active run of the thread, until :meth:`deactivate`."""
        enter(self)

    def deactivate(self) -> None:
        """The run is over in this thread."""
        leave(self)

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

    def _all_parts(self) -> Iterator[RunPart]:
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
        self.before_call(capture, args)
        if capture.plan is None:
            return capture.full()(args, {})[0]
        model = self.model_of(capture, args)
        part, capture = self._part(capture, model)
        branch = self.current_branch
        step = part.enter(capture, self.index, branch, self._conditional.get(model))
        outputs, written = capture.compiled_row(step.roles)(args, step.read)
        outputs = part.leave(step, branch, outputs, written)
        if branch == "cond":
            self._conditional[model] = part
        self.peak_cache_bytes = max(self.peak_cache_bytes, self.cache_bytes())
        return outputs

    def before_call(self, capture: Capture, args: Sequence[Any]) -> None:
        """Called before every call of the model, with the capture that Dynamo has handed over and the inputs of its
        graph; may raise."""

    def model_of(self, capture: Capture, args: Sequence[Any]) -> int:
        """The index of the model that makes a call."""
        parameter = capture.model.parameter(args)
        model = 0 if parameter is None else self._owner(parameter)
        assert model is not None  # :func:`active_run` has asked
        return model

    def _part(self, capture: Capture, model: int) -> tuple[RunPart, Capture]:
        """The part of this run that a capture belongs to, and the capture to run: an earlier one if it is the same.

        Says what is lost if another part made the call of the step before.
        """
        known = self._serving.get((capture, model))
        parts = self._parts.setdefault(model, [])
        if known is None:
            fit = Fit.of(capture)
            part = next((part for part in parts if part.fit == fit), None)
            if part is None:
                part = RunPart(capture, fit, self.steps, self.progress, self.index, self._promotions)
                parts.append(part)
            known = self._serving[capture, model] = part, part.same_as(capture)
        before = known[0].replaced(parts, self.index, self.current_branch)
        if before is not None:
            self._caches_lost(before, known[0], model)
        return known

    def _caches_lost(self, before: RunPart, part: RunPart, model: int) -> None:
        """Say that ``part`` takes over in mid-run from ``before``, whose caches do not fit.

        Raises :class:`CachesLostError` where skips are errors.
        """
        sites = before.sites_that_read(self.index - 1, self.current_branch)
        if not sites or (self._said_lost and not part.capture.verdicts.strict):
            return
        self._said_lost = True
        more = f" and {len(sites) - 1} more sites" if len(sites) > 1 else ""
        text = (
            f"step {self.index}: {type(self.models[model]).__name__} goes on as another graph than in the steps before "
            f"({part.fit.difference(before.fit)}), which their caches do not fit; {sites[0]}{more} would have read "
            "them, and attention there is full until they are filled again. Keep the model and the form of its inputs "
            "as they are during a run"
        )
        if part.capture.verdicts.strict:
            raise CachesLostError(text)
        warnings.warn(text, CachesLostWarning, stacklevel=3)


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
    return capture.full()(args, {})[0]
