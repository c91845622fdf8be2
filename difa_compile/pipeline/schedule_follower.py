"""What follows one call of a pipeline through its sampling schedule, without ever waiting for the device.

A :class:`ScheduleFollower` knows at which step one call of a pipeline is, and has the run that belongs to it. It begins
when a wired pipeline is called and is closed when that returns or raises. It hears of the scheduler's
``set_timesteps``, ``set_begin_index``, ``scale_model_input`` and ``step`` and of the transformer's calls.
The position is counted; the value of a timestep tensor on a device is never read. Where a call enters the schedule half
way (image to image), the start is told by ``set_begin_index``, or by where the timestep handed to the scheduler lies in
the memory of ``scheduler.timesteps``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from difa_compile.errors import ScheduleError, UnsupportedPipelineError
from difa_compile.plan.schedule import normalised_progress

if TYPE_CHECKING:
    from difa_compile.backend.run import Run
    from difa_compile.plan.plan import Promotion

BRANCHES = {"cond": "cond", "uncond": "uncond", "pred_cond": "cond", "pred_uncond": "uncond"}
"""What ``cache_context`` is given by pipelines of diffusers and by its guiders, and the branch it names."""


@dataclass(frozen=True)
class RunStats:
    """What one run through the schedule took.

    ``steps`` were sampled with ``calls`` calls of the transformer. ``peak_cache_bytes``: most bytes of caches held at
    once. ``seconds``: from the first transformer call to the end of the last step, on the host.
    """

    steps: int
    calls: int
    peak_cache_bytes: int
    promotions: tuple[Promotion, ...]
    seconds: float


class ScheduleFollower:
    """The position of one pipeline call in its sampling schedule, and the run that belongs to it.

    ``open_run(progress)`` makes the run for the steps that lie ahead; it is called at the transformer's first call.
    ``check`` is called before every call of the transformer, and may raise.
    ``one_call_each``: whether two calls of one step and branch would disturb each other (the plan keeps caches).
    ``conditional_first``: a step's first call is the conditional one, where ``cache_context`` does not name it.
    ``finished`` is told what a run took when it ends, ``told_output`` before every step of the scheduler what that is
    given: what the pipeline has made of the outputs of the step's calls.
    """

    def __init__(
        self,
        scheduler: Any,
        open_run: Callable[[tuple[float, ...]], Run],
        *,
        one_call_each: bool,
        conditional_first: bool = False,
        check: Callable[[], None] | None = None,
        finished: Callable[[RunStats], None] | None = None,
        told_output: Callable[[object], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self._open_run = open_run
        self._check = check
        self._finished = finished
        self._told_output = told_output
        self._one_call_each = one_call_each
        self._first_branch = "cond" if conditional_first else None
        self._run: Run | None = None
        self._values: list[float] | None = None
        self._branch: str | None = None
        self._in_context = False
        self._start_over()

    def _start_over(self) -> None:
        self._begin = 0
        self._position = 0
        self._steps = 0
        self._calls = 0
        self._calls_now: Counter[str | None] = Counter()
        self._began = self._ended = 0.0

    # What the scheduler does

    def schedule_set(self) -> None:
        """``set_timesteps`` was called: a new run begins with the next transformer call."""
        self.close()
        self._values = None
        self._start_over()

    def begin_at(self, index: int) -> None:
        """``set_begin_index`` was called; only the start of a run listens to it."""
        if self._run is None:
            self._begin = int(index)

    def at(self, timestep: object) -> None:
        """``timestep`` was handed to the scheduler; only the start of a run listens to it."""
        if self._run is None:
            found = self._locate(timestep)
            if found is not None:
                self._begin = found

    def given(self, output: object) -> None:
        """``step`` is about to be called with ``output``, the model's after guidance."""
        if self._run is not None and self._told_output is not None:
            self._told_output(output)

    def stepped(self) -> None:
        """``step`` was called: the run moves on."""
        if self._run is None:
            return
        self._ended = time.perf_counter()
        self._position += 1
        self._calls_now.clear()
        if self._position < self._steps:
            self._run.step(self._position)

    # What the transformer does

    @contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """Within ``cache_context(name)`` of the transformer. Names that are not of guidance count as no branch."""
        outer = self._branch, self._in_context
        self._branch, self._in_context = BRANCHES.get(name), True
        try:
            yield
        finally:
            self._branch, self._in_context = outer

    def begin_call(self) -> None:
        """The transformer is about to be called: put the run at the current step and branch."""
        if self._check is not None:
            self._check()
        if self._run is None:
            self._open()
        assert self._run is not None
        if self._position >= self._steps:
            raise ScheduleError(
                f"the transformer was called after the last of {self._steps} steps; call scheduler.set_timesteps "
                "before each pass through the schedule"
            )
        self._run.branch(self._branch_of_call())
        self._calls += 1

    def _branch_of_call(self) -> str | None:
        """The branch ``cache_context`` names; else none for a step's first call (cond, where that is known) and uncond
        for its second."""
        count = self._calls_now[self._branch]
        self._calls_now[self._branch] += 1
        unnamed = self._branch is None and not any(self._calls_now[name] for name in BRANCHES.values())
        if not self._one_call_each:
            return self._branch
        if count == 0:
            return self._first_branch if unnamed and not self._in_context else self._branch
        if count == 1 and unnamed and not self._in_context:
            return "uncond"
        where = f"in branch {self._branch!r}" if self._branch else "without cache_context"
        raise UnsupportedPipelineError(
            f"step {self._position}: the transformer was called {count + 1} times {where}, and the plan keeps caches, "
            "which such calls would take from each other; use a plan without reuse, residuals and +cfg, or leave out "
            "the option that makes the further calls (perturbed or skipped-layer guidance, tiles)"
        )

    # The run

    def _open(self) -> None:
        values = self._timesteps()
        if not 0 <= self._begin < len(values):
            raise ScheduleError(f"the schedule has {len(values)} steps but begins at step {self._begin}")
        total = getattr(getattr(self.scheduler, "config", None), "num_train_timesteps", None)
        if not isinstance(total, int):
            raise UnsupportedPipelineError(
                f"{type(self.scheduler).__name__} has no config.num_train_timesteps, so the progress of its steps is "
                "unknown; use a scheduler that counts training timesteps"
            )
        try:
            progress = normalised_progress(values, total)[self._begin :]
        except ScheduleError as error:
            raise UnsupportedPipelineError(
                f"{type(self.scheduler).__name__} cannot be followed: {error}; use a scheduler whose timesteps lie in "
                f"0..{total}"
            ) from error
        self._run = self._open_run(progress)
        self._steps = len(progress)
        self._run.activate()
        self._run.step(0)
        self._began = self._ended = time.perf_counter()

    def close(self) -> None:
        """End the run, if one is open: its caches are freed. Never raises on account of the run's state."""
        run = self._run
        if run is None:
            return
        self._run = None
        stats = RunStats(
            steps=self._position,
            calls=self._calls,
            peak_cache_bytes=run.peak_cache_bytes,
            promotions=run.promotions,
            seconds=self._ended - self._began,
        )
        run.deactivate()
        run.reset()
        if self._finished is not None:
            self._finished(stats)

    # The schedule

    def _timesteps(self) -> list[float]:
        """The scheduler's timesteps, copied to the host once per ``set_timesteps``."""
        if self._values is None:
            timesteps = getattr(self.scheduler, "timesteps", None)
            if timesteps is None:
                raise UnsupportedPipelineError(
                    f"{type(self.scheduler).__name__} has no timesteps, so its schedule cannot be followed"
                )
            listed = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps
            self._values = [float(value) for value in listed]
        return self._values

    def _locate(self, timestep: object) -> int | None:
        """Index of ``timestep`` in the schedule, if that can be told without waiting for the device."""
        timesteps = getattr(self.scheduler, "timesteps", None)
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1:
                return None
            if isinstance(timesteps, Tensor) and timesteps.ndim == 1 and _shares_storage(timestep, timesteps):
                stride = timesteps.stride(0) or 1
                index = (timestep.storage_offset() - timesteps.storage_offset()) // stride
                return index if 0 <= index < len(timesteps) else None
            if timestep.device.type != "cpu":
                return None
            timestep = timestep.item()
        if not isinstance(timestep, (int, float)) or timesteps is None:
            return None
        values = self._timesteps()
        return values.index(timestep) if timestep in values else None


def _shares_storage(part: Tensor, whole: Tensor) -> bool:
    return (
        part.dtype == whole.dtype
        and part.device == whole.device
        and part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    )
