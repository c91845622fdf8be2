"""Calibration: a plan for a pipeline, found by sampling once with :mod:`difa_compile.calibration.search` in place of a
plan."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from difa_compile.backend.options import Options
from difa_compile.calibration.sampling import call_arguments, identity_of, models_of, progress_bar, sample_with
from difa_compile.calibration.search import CANDIDATES, MAX_THRESHOLD, PUBLISHED_CANDIDATES, Search, SearchSettings
from difa_compile.calibration.state import (
    CalibrationState,
    default_path,
)
from difa_compile.decision import Window
from difa_compile.errors import (
    DecisionError,
    ProfileError,
    ScheduleError,
    ThresholdError,
    UnsupportedPipelineError,
)
from difa_compile.machine.profile import current
from difa_compile.pipeline.call_arguments import check_call
from difa_compile.plan.data import LOSSES
from difa_compile.plan.guidance import Guidance, StatedGuidance, settle
from difa_compile.plan.plan import Plan
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
    models = models_of(pipe)
    guidance = settle(pipe, StatedGuidance(conditional_half=conditional_half))
    half = guidance.conditional_half
    cfg_reason = _why_not_shared(guidance, explicit=candidates is not None, names=names)
    options = Options(inner=inner, cfg={} if half is None else {"conditional_half": half})
    call = call_arguments(pipe, inputs, steps)
    check_call(pipe, call)
    settings = SearchSettings(float(threshold), loss, window, names, half, cfg_reason, *_ranking(models[0], rank))
    identity = identity_of(pipe, models, call, settings.identity(), steps)
    saved = CalibrationState.open(state if state is not None else default_path(identity), identity)
    make_bar = functools.partial(progress_bar, what="calibrating", unit="decision") if progress else None
    search = Search(models, settings, saved, make_bar, guidance.form)
    sample_with(pipe, call, search, guidance, options, what="calibration", kept=lambda: shown(saved.path))
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
