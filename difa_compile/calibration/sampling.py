"""One call of a pipeline with something else in place of a plan: a search, a measurement."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import nn

from difa_compile.backend.entry import difa
from difa_compile.backend.options import Options
from difa_compile.backend.run import Run
from difa_compile.calibration.state import digest_of, generators_in, weights_digest
from difa_compile.errors import (
    DifaError,
    MissingDependencyError,
    NotAppliedError,
    ScheduleError,
    UnsupportedPipelineError,
)
from difa_compile.passes.autocast import Autocast
from difa_compile.pipeline.call_arguments import refused
from difa_compile.pipeline.compiled_forward import CompiledForward
from difa_compile.pipeline.schedule_follower import ScheduleFollower
from difa_compile.pipeline.transformers import check_scheduler, find_transformers
from difa_compile.pipeline.wiring import Wiring, wiring_of
from difa_compile.plan.data import model_digest
from difa_compile.plan.guidance import Guidance, guidance_is_on
from difa_compile.wording import quoted


def models_of(pipe: Any) -> tuple[nn.Module, ...]:
    """The transformers of a pipeline that carries no plan and has a scheduler; of one class and configuration.

    Raises :class:`UnsupportedPipelineError` and :class:`NotAppliedError`.
    """
    models = tuple(find_transformers(pipe))
    digests = [model_digest(model) for model in models]
    if any(digest != digests[0] for digest in digests):
        raise UnsupportedPipelineError(
            f"the transformers of this {type(pipe).__name__} are not of one class and configuration, so one plan does "
            "not fit them all; calibrate them in pipelines of their own"
        )
    check_scheduler(pipe)
    if wiring_of(pipe) is not None:
        raise NotAppliedError(f"this {type(pipe).__name__} carries a plan; call remove(pipe) before calibrating")
    return models


def identity_of(
    pipe: Any, models: Sequence[nn.Module], call: Mapping[str, Any], settings: Mapping[str, object], steps: int
) -> dict[str, str]:
    """Digests of all that what is found in a call depends on, by what they cover."""
    return {
        **{f"model {key}": str(value) for key, value in asdict(model_digest(models[0])).items()},
        "weights": identity_of_weights(models),
        "scheduler": identity_of_scheduler(pipe),
        "inputs": digest_of(call),
        "settings": digest_of(
            {**settings, "steps": steps, "torch": torch.__version__, "autocast": str(Autocast.now())}
        ),
    }


def identity_of_weights(models: Sequence[nn.Module]) -> str:
    """Digest of the weights of a pipeline's transformers."""
    return digest_of([weights_digest(model) for model in models])


def identity_of_scheduler(pipe: Any) -> str:
    """Digest of the class and the configuration of a pipeline's scheduler."""
    return digest_of({"class": type(pipe.scheduler).__name__, "config": plain(getattr(pipe.scheduler, "config", None))})


class Sampled(Protocol):
    """What follows a call of a pipeline in place of a plan. ``progress``: of the steps, empty before the first call."""

    @property
    def models(self) -> tuple[nn.Module, ...]: ...
    @property
    def progress(self) -> tuple[float, ...]: ...
    @property
    def done(self) -> int: ...
    def open(self, progress: tuple[float, ...], guided: bool | None) -> Run: ...
    def close(self) -> None: ...


def sample_with(
    pipe: Any,
    call: Mapping[str, Any],
    sampled: Sampled,
    guidance: Guidance,
    options: Options,
    *,
    what: str,
    kept: Callable[[], str],
    told_output: Callable[[object], None] | None = None,
) -> Any:
    """Call the pipeline once with ``sampled`` in place of a plan; what the pipeline returns.

    ``what`` is done, in words, and ``kept`` says after an interruption where what was found is kept. ``sampled`` is
    told whether guidance is on in this call, None where that is not known; ``told_output`` before every step of the
    scheduler what that is given.
    """

    def start(pipe: Any, scheduler: Any, arguments: Mapping[str, object]) -> ScheduleFollower:
        def open_run(progress: tuple[float, ...]) -> Run:
            return sampled.open(progress, guidance_is_on(pipe, arguments))

        return ScheduleFollower(
            scheduler,
            open_run,
            one_call_each=True,
            conditional_first=guidance.conditional_first,
            told_output=told_output,
        )

    backend = functools.partial(difa)  # Dynamo takes no other pipeline's graphs for it
    compiled = {model: CompiledForward(model, backend, options.given) for model in sampled.models}
    wiring = Wiring(pipe, compiled, start)
    generators = [(generator, generator.get_state()) for generator in generators_in(call)]
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    quiet = hasattr(pipe, "set_progress_bar_config")
    wiring.connect()
    try:
        if quiet:
            pipe.set_progress_bar_config(**{**bar, "disable": True})
        try:
            return pipe(**call)
        except (TypeError, ValueError) as error:
            if sampled.progress or isinstance(error, DifaError):
                raise
            raise refused(pipe, call, error) from error
    except KeyboardInterrupt as interrupt:
        saved = f"; they are saved in {kept()}" if sampled.done else ""
        where = "from there" if sampled.done else "from the beginning"
        interrupt.add_note(
            f"{what} interrupted after {sampled.done} of {len(sampled.progress)} steps{saved}. Start it again with "
            f"the same arguments to go on {where}."
        )
        raise
    finally:
        sampled.close()
        wiring.disconnect()
        if quiet:
            pipe.set_progress_bar_config(**bar)
        for generator, initial in generators:
            generator.set_state(initial)


def call_arguments(pipe: Any, inputs: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Arguments of the pipeline's call: the user's, the steps, a seed, and no decoding where that can be left out."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    call = {**inputs, "num_inference_steps": steps}
    if "num_inference_steps" in inputs and inputs["num_inference_steps"] != steps:
        raise ScheduleError(
            f"inputs ask for num_inference_steps={quoted(inputs['num_inference_steps'])}, but calibration is over "
            f"{steps} steps; leave num_inference_steps out of the inputs"
        )
    if "generator" in parameters and call.get("generator") is None:
        call["generator"] = torch.Generator().manual_seed(0)
    if "output_type" in parameters:
        call.setdefault("output_type", "latent")
    return call


def plain(config: object) -> object:
    """A config as plain numbers, text and containers; what is none of these by its text."""
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items() if not str(key).startswith("_")}
    if isinstance(config, (list, tuple)):
        return [plain(value) for value in config]
    return config if config is None or isinstance(config, (bool, int, float, str)) else repr(config)


def progress_bar(total: int, done: int, what: str, unit: str) -> Any:
    """A progress bar with the time left: ``what`` is done, counted in ``unit``."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingDependencyError(
            "the progress bar needs tqdm, which is not installed; pip install tqdm, or calibrate with progress=False"
        ) from error
    return tqdm(total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True)
