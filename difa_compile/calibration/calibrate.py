"""Calibration: a plan for a pipeline, found by sampling once with :mod:`difa_compile.calibration.search` in place of a
plan."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from difa_compile.backend.entry import difa
from difa_compile.backend.options import Options
from difa_compile.backend.run import Run
from difa_compile.calibration.search import CANDIDATES, MAX_THRESHOLD, PUBLISHED_CANDIDATES, Search, SearchSettings
from difa_compile.calibration.state import (
    CalibrationState,
    default_path,
    digest_of,
    generators_in,
    weights_digest,
)
from difa_compile.decision import Window
from difa_compile.errors import (
    DecisionError,
    DifaError,
    MissingDependencyError,
    NotAppliedError,
    ProfileError,
    ScheduleError,
    ThresholdError,
    UnsupportedPipelineError,
)
from difa_compile.machine.profile import current
from difa_compile.passes.autocast import Autocast
from difa_compile.pipeline.call_arguments import check_call, refused
from difa_compile.pipeline.compiled_forward import CompiledForward
from difa_compile.pipeline.schedule_follower import ScheduleFollower
from difa_compile.pipeline.transformers import check_scheduler, find_transformers
from difa_compile.pipeline.wiring import Wiring, wiring_of
from difa_compile.plan.data import LOSSES
from difa_compile.plan.guidance import Guidance, StatedGuidance, guidance_is_on, settle
from difa_compile.plan.plan import Plan, model_digest
from difa_compile.wording import quoted, shown

__all__ = ["CANDIDATES", "PUBLISHED_CANDIDATES", "calibrate"]

RANKS = ("auto", "time", "flops", "published")
"""How one candidate is chosen among those below the threshold: see :func:`calibrate`."""


def calibrate(
    pipe: Any,
    inputs: Mapping[str, Any],
    steps: int = 50,
    threshold: float = 0.05,
    window: Window | str | None = None,
    candidates: Sequence[str] | None = None,
    *,
    loss: str = "paper",
    state: Path | None = None,
    progress: bool = True,
    conditional_half: int | None = None,
    inner: str = "inductor",
    rank: str = "auto",
    keep_state: bool = False,
) -> Plan:
    """Search a plan for ``pipe`` by sampling once with ``inputs`` (keyword arguments of its call).

    ``steps``: of the schedule (a scheduler of second order calls the model more often; the plan has one row per call).
    ``threshold``: DiTFastAttn's delta, in (0, 10]; the published settings are 0.025 to 0.15. ``window``: for instance
    ``"band:32"`` or ``Window("disc", 8)``; by default a band of an eighth of the image tokens on each side.
    ``candidates``: names from :data:`CANDIDATES`, by default the published four; one that cannot be carried out at a
    site is noted with the reason in the plan. ``rank``: how one is chosen among those below the threshold.
    ``"published"``: the first, in DiTFastAttn's order or yours; its program chooses so by ``loss="code"``, while under
    the loss that its paper states, our default, more passes. ``"time"`` and ``"flops"``: the one that saves most for
    what it changes (the price in :mod:`difa_compile.calibration.search`), if it saves a larger share of the site's cost
    than the share of the threshold that it uses up. Cost is time as this machine's profile predicts it (``difa tune``),
    and windows that are predicted to be no faster than full attention are left out, noted with both times; or
    operations. ``"auto"`` is ``"time"`` where there is a profile, else ``"flops"``. ``loss``: see :func:`loss_of`.
    ``conditional_half``: 0 or 1, where the pipeline's order of guidance halves is not known. ``inner``: what compiles
    the candidates, ``"inductor"`` or ``"eager"`` (no waiting for compilation, slower calls). A ``generator`` in
    ``inputs`` is put back to its state afterwards; without one, sampling is seeded with 0.

    After every step the decisions so far are saved in ``state`` (by default a file of its own in the package's cache
    folder), so a calibration that was interrupted goes on where it was when started again with the same arguments: the
    steps decided are sampled again, which takes one call of the model each, and the search continues. The file is
    deleted at the end; with ``keep_state`` it stays, for a caller who deletes it once the plan is stored.

    Raises :class:`ScheduleError` (steps), :class:`ThresholdError`, :class:`DecisionError` (window, candidates, rank),
    :class:`PipelineCallError` (``inputs`` that the pipeline cannot be called with),
    :class:`ProfileError` (``rank="time"`` without a profile),
    :class:`UnsupportedPipelineError`, :class:`NotAppliedError` (the pipeline carries a plan), :class:`NonFiniteError`,
    :class:`CalibrationStateError`, :class:`OutputError` and what capturing the model raises.
    """
    window, names = check_settings(steps, threshold, window, candidates, loss, rank)
    models = find_transformers(pipe)
    digests = [model_digest(model) for model in models]
    if any(digest != digests[0] for digest in digests):
        raise UnsupportedPipelineError(
            f"the transformers of this {type(pipe).__name__} are not of one class and configuration, so one plan does "
            "not fit them all; calibrate them in pipelines of their own"
        )
    check_scheduler(pipe)
    if wiring_of(pipe) is not None:
        raise NotAppliedError(f"this {type(pipe).__name__} carries a plan; call remove(pipe) before calibrating")
    guidance = settle(pipe, StatedGuidance(conditional_half=conditional_half))
    half = guidance.conditional_half
    cfg_reason = _why_not_shared(guidance, explicit=candidates is not None, names=names)
    options = Options(inner=inner, cfg={} if half is None else {"conditional_half": half})
    call = _call_arguments(pipe, inputs, steps)
    check_call(pipe, call)
    settings = SearchSettings(float(threshold), loss, window, names, half, cfg_reason, *_ranking(models[0], rank))
    identity = {
        **{f"model {key}": str(value) for key, value in asdict(digests[0]).items()},
        "weights": digest_of([weights_digest(model) for model in models]),
        "scheduler": digest_of(
            {"class": type(pipe.scheduler).__name__, "config": _plain(getattr(pipe.scheduler, "config", None))}
        ),
        "inputs": digest_of(call),
        "settings": digest_of(
            {**settings.identity(), "steps": steps, "torch": torch.__version__, "autocast": str(Autocast.now())}
        ),
    }
    saved = CalibrationState.open(state if state is not None else default_path(identity), identity)
    search = Search(models, settings, saved, _bar if progress else None)
    _sample(pipe, call, search, guidance, options)
    plan = search.plan()
    if not keep_state:
        saved.remove()
    return plan


def check_settings(
    steps: int, threshold: float, window: Window | str | None, candidates: Sequence[str] | None, loss: str, rank: str
) -> tuple[Window | None, tuple[str, ...]]:
    """The window and the names of the candidates that :func:`calibrate` goes by, given its arguments.

    Needs no pipeline, so a program can ask before it loads one. Raises :class:`ScheduleError`, :class:`ThresholdError`
    and :class:`DecisionError`.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ScheduleError(f"steps is {quoted(steps)}; calibrate over a whole number of steps, at least 1")
    if isinstance(threshold, bool) or not 0 < threshold <= MAX_THRESHOLD:  # NaN fails too
        raise ThresholdError(
            f"threshold is {quoted(threshold)}; give a number above 0, at most {MAX_THRESHOLD:g} (published: 0.025 to "
            "0.15)"
        )
    if rank not in RANKS:
        raise DecisionError(f"rank is {quoted(rank)}; choose one of {', '.join(RANKS)}")
    if loss not in LOSSES:
        raise DecisionError(f"loss {quoted(loss)} is unknown; choose {' or '.join(LOSSES)}")
    return Window.parse(window) if isinstance(window, str) else window, _check_candidates(candidates)


def _sample(pipe: Any, call: dict[str, Any], search: Search, guidance: Guidance, options: Options) -> None:
    """Call the pipeline once with the search in place of a plan."""

    def start(pipe: Any, scheduler: Any, arguments: Mapping[str, object]) -> ScheduleFollower:
        def open_run(progress: tuple[float, ...]) -> Run:
            if guidance_is_on(pipe, arguments) is False:
                search.cfg_reason = search.cfg_reason or "guidance is off in this call, so its batch has no halves"
            elif guidance.form in ("two-call", "batched"):
                search.guidance = guidance.form
            return search.open(progress)

        return ScheduleFollower(scheduler, open_run, one_call_each=True, conditional_first=guidance.conditional_first)

    backend = functools.partial(difa)  # Dynamo takes no other pipeline's graphs for it
    compiled = {model: CompiledForward(model, backend, options.given) for model in search.models}
    wiring = Wiring(pipe, compiled, start)
    generators = [(generator, generator.get_state()) for generator in generators_in(call)]
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    quiet = hasattr(pipe, "set_progress_bar_config")
    wiring.connect()
    try:
        if quiet:
            pipe.set_progress_bar_config(**{**bar, "disable": True})
        try:
            pipe(**call)
        except (TypeError, ValueError) as error:
            if search.progress or isinstance(error, DifaError):
                raise
            raise refused(pipe, call, error) from error
    except KeyboardInterrupt as interrupt:
        kept = f"; they are saved in {shown(search.saved.path)}" if search.done else ""
        where = "from there" if search.done else "from the beginning"
        interrupt.add_note(
            f"calibration interrupted after {search.done} of {len(search.progress)} steps{kept}. Start it again with "
            f"the same arguments to go on {where}."
        )
        raise
    finally:
        search.close()
        wiring.disconnect()
        if quiet:
            pipe.set_progress_bar_config(**bar)
        for generator, initial in generators:
            generator.set_state(initial)


def _call_arguments(pipe: Any, inputs: Mapping[str, Any], steps: int) -> dict[str, Any]:
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


def _check_candidates(candidates: Sequence[str] | None) -> tuple[str, ...]:
    names = PUBLISHED_CANDIDATES if candidates is None else tuple(candidates)
    if isinstance(candidates, str) or not names:
        raise DecisionError(f"candidates is {quoted(candidates)}; give a list of names from {', '.join(CANDIDATES)}")
    for name in names:
        if not isinstance(name, str) or name not in CANDIDATES:
            raise DecisionError(f"candidate {quoted(name)} is unknown; choose from {', '.join(CANDIDATES)}")
    return names


def _ranking(model: torch.nn.Module, rank: str) -> tuple[str, str | None]:
    """What candidates are weighed by (``"auto"`` decided), and the digest of the profile if it is time."""
    if rank not in ("auto", "time"):
        return rank, None
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    profile = current(device)
    if profile is not None:
        return "time", profile.digest
    if rank == "time":
        raise ProfileError(
            f'rank="time" needs a profile of this machine for {device.type}, and there is none; run difa tune --device '
            f"{device.type}, or choose auto, flops or published"
        )
    return "flops", None


def _why_not_shared(guidance: Guidance, *, explicit: bool, names: tuple[str, ...]) -> str:
    """Why halves cannot be shared; empty where they can. Raises :class:`UnsupportedPipelineError` with the reason where
    candidates that share them are asked for explicitly."""
    reason = "" if guidance.form == "two-call" else guidance.why_no_half or ""
    if reason and explicit and any(CANDIDATES[name][1] for name in names):
        raise UnsupportedPipelineError(reason)
    return reason


def _plain(config: object) -> object:
    """A config as plain numbers, text and containers; what is none of these by its text."""
    if isinstance(config, Mapping):
        return {str(key): _plain(value) for key, value in config.items() if not str(key).startswith("_")}
    if isinstance(config, (list, tuple)):
        return [_plain(value) for value in config]
    return config if config is None or isinstance(config, (bool, int, float, str)) else repr(config)


def _bar(total: int, done: int) -> Any:
    """A progress bar over decisions (one per step and site) with the time left."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingDependencyError(
            "the progress bar needs tqdm, which is not installed; pip install tqdm, or calibrate with progress=False"
        ) from error
    return tqdm(total=total, initial=done, desc="calibrating", unit="decision", dynamic_ncols=True)
