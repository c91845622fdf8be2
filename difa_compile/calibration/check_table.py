"""Whether a table of errors was measured with a pipeline: the same model, weights, scheduler, token grid and schedule.

The pipeline is called with the inputs that a plan is to be for, and stopped at the first call of its model: only then
it is known which tokens there are, and which steps the call goes through (schedulers of second order call the model
more often than there are steps, and from image to image it goes through some of them).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from difa_compile.backend.capture import Capture
from difa_compile.backend.options import Options
from difa_compile.backend.run import Run
from difa_compile.calibration.measure import same_schedule
from difa_compile.calibration.sampling import (
    call_arguments,
    identity_of_scheduler,
    identity_of_weights,
    models_of,
    sample_with,
)
from difa_compile.errors import CalibrationError, PlanMismatchError, ScheduleError
from difa_compile.pipeline.call_arguments import check_call
from difa_compile.plan.data import model_digest
from difa_compile.plan.guidance import settle
from difa_compile.planner.table import ErrorTable
from difa_compile.wording import shown


def check_table(table: ErrorTable, pipe: Any, inputs: Mapping[str, Any], steps: int) -> None:
    """Raise unless ``table`` is of ``pipe`` called with ``inputs`` and so many steps. Other inputs (prompts, labels,
    noise) of the same sizes are no difference.

    Raises :class:`PlanMismatchError` for another model, other weights, sites or another token grid,
    :class:`ScheduleError` for another scheduler, another number of steps or other timesteps, :class:`ErrorTableError`
    for a table that is not complete, and what calling the pipeline and capturing the model raises.
    """
    table.check_complete()
    models = models_of(pipe)
    table.check_model(model_digest(models[0]))
    name = type(models[0]).__name__
    if table.identity.get("weights") != identity_of_weights(models):
        raise PlanMismatchError(
            f"the table of errors was measured with other weights than those of this {name} (another checkpoint, dtype "
            "or LoRA); measure with these, or make a plan of the table (plan_from_table) and compare what it does"
        )
    if table.identity.get("scheduler") != identity_of_scheduler(pipe):
        raise ScheduleError(
            "the table of errors was measured with another scheduler than this pipeline's "
            f"{type(pipe.scheduler).__name__}, or with one of another configuration; set the scheduler that it was "
            "measured with, or measure with this one"
        )
    call = call_arguments(pipe, inputs, steps)
    check_call(pipe, call)
    first = _FirstCall(models, functools.partial(_check_schedule, table, steps))
    try:
        sample_with(pipe, call, first, settle(pipe), Options(inner="eager"), what="check", kept=str)
    except _Stopped:
        pass
    finally:
        if hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()  # a call that is stopped does not come to that
    if first.capture is None:
        raise CalibrationError(f"{type(pipe).__name__} returned without calling its transformer")
    _check_sites(table, first.capture, name)


def _check_schedule(table: ErrorTable, steps: int, progress: Sequence[float]) -> None:
    if len(progress) != len(table.progress):
        raise ScheduleError(
            f"the table of errors was measured over a schedule of {len(table.progress)} steps, and this call, asked "
            f"for {steps}, goes through {len(progress)}; ask for as many as it was measured with, measure over "
            f"{steps}, or make a plan for fewer that is not run (difa plan --steps)"
        )
    pairs = zip(progress, table.progress, strict=True)
    step = next((step for step, (here, then) in enumerate(pairs) if not same_schedule([here], [then])), None)
    if step is not None:
        raise ScheduleError(
            f"the table of errors was measured over other timesteps: at step {step} its progress is "
            f"{table.progress[step]:.4g}, this call's {progress[step]:.4g} (1 at pure noise); call with the timesteps, "
            "sigmas and sizes that it was measured with, or measure with these"
        )


def _check_sites(table: ErrorTable, capture: Capture, name: str) -> None:
    """Texts may be of another length, as for plans."""
    try:
        capture.carried_over(table.full_plan())
    except PlanMismatchError as error:
        here = {unit.path: unit.info for unit in capture.model.units}
        for site in table.sites:
            found = here.get(site.path)
            if found is None:
                raise PlanMismatchError(
                    f"the table of errors was measured at {shown(site.path)}, which this {name} does not have; measure "
                    "this model"
                ) from error
            if found.shape != site.shape:
                raise PlanMismatchError(
                    f"the table of errors was measured with other sizes: {shown(site.path)} is {site.shape} in it, and "
                    f"{found.shape} here; call with the sizes that it was measured with, or measure with these"
                ) from error
        raise


class _Stopped(Exception):
    """Raised in the first call of the model, to end the pipeline's."""


class _FirstCall:
    """What is seen in the first call of the model. ``check`` is given the progress of the schedule, and may raise."""

    done = 0

    def __init__(self, models: Sequence[nn.Module], check: Callable[[Sequence[float]], None]) -> None:
        self.models = tuple(models)
        self._check = check
        self.progress: tuple[float, ...] = ()
        self.capture: Capture | None = None

    def open(self, progress: tuple[float, ...], guided: bool | None) -> Run:
        """A run that ends with its first call."""
        self._check(progress)
        self.progress = progress
        return _StoppingRun(self)

    def close(self) -> None:
        """Nothing is held."""


class _StoppingRun(Run):
    def __init__(self, first: _FirstCall) -> None:
        super().__init__(first.models[0], len(first.progress), progress=first.progress, experts=first.models[1:])
        self._first = first

    def call(self, capture: Capture, args: list[Any]) -> list[Any]:
        self._first.capture = capture
        raise _Stopped
