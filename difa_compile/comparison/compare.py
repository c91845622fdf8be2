"""Full attention against a plan, on one pipeline, with the same seeds: time, operations, memory, images and quality."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from difa_compile.comparison import metrics
from difa_compile.errors import (
    ComparisonError,
    DifaError,
    MissingDependencyError,
    ScheduleError,
    UnsupportedPipelineError,
)
from difa_compile.pipeline.apply import apply, remove
from difa_compile.pipeline.call_arguments import check_call, refused
from difa_compile.pipeline.module_hooks import call_in_hooks, inner_forward
from difa_compile.pipeline.transformers import find_transformers
from difa_compile.plan.cost import plan_flops
from difa_compile.plan.plan import Plan
from difa_compile.plan.schedule import Role, assign_roles
from difa_compile.wording import quoted, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from difa_compile.backend.capture import Capture
    from difa_compile.backend.verdicts import Record
    from difa_compile.decision import Decision
    from difa_compile.plan.data import SiteInfo

_OURS = ("generator", "num_inference_steps", "output_type", "return_dict")


@dataclass(frozen=True)
class Timing:
    """Seconds of one side. A call is one run of the whole pipeline, decoding included.

    ``calls``: each timed call; ``first_call``: the untimed first one, compilation included; ``step_seconds``: median
    over the timed calls, per scheduler step.
    """

    calls: tuple[float, ...]
    first_call: float
    step_seconds: tuple[float, ...]

    @property
    def call_seconds(self) -> float:
        """Median seconds of a call."""
        return statistics.median(self.calls)

    @property
    def seconds_per_step(self) -> float:
        """Mean of ``step_seconds``: the sampling loop alone, without prompt encoding and decoding."""
        return statistics.fmean(self.step_seconds)


@dataclass(frozen=True)
class Quality:
    """How far the planned images are from the full ones (``metrics``); None where something was not asked for.

    ``psnr`` (dB) and ``psnr_worst``: mean and least over the pairs that differ at all, None if ``identical`` counts
    them all. ``ssim``, ``ssim_worst``: over all pairs; None for images under 11 pixels. ``max_difference``: the largest
    difference of any pixel, in [0, 1]. The rest needs a judge: ``frechet`` is the distance full to planned,
    ``frechet_full`` and ``frechet_planned`` those to the reference images; ``judged_right_*`` are shares of images
    judged the class asked for; ``agreement`` is the share of pairs judged the same.
    """

    identical: int
    max_difference: float
    psnr: float | None = None
    psnr_worst: float | None = None
    ssim: float | None = None
    ssim_worst: float | None = None
    frechet: float | None = None
    frechet_full: float | None = None
    frechet_planned: float | None = None
    judged_right_full: float | None = None
    judged_right_planned: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Operations:
    """Attention operations per step for one element of the batch, in one convention of :mod:`difa_compile.plan.cost`.

    What was skipped is counted as full, so this is what was computed and not what the plan hoped for.
    """

    full_per_step: int
    planned_per_step: tuple[int, ...]

    @property
    def share(self) -> float:
        """Planned over full."""
        return sum(self.planned_per_step) / (self.full_per_step * len(self.planned_per_step))


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` measured. Images are (N, H, W, C) uint8, in the order of the seeds; see :meth:`to_json`.

    ``cache_bytes``: the most that the caches held at once. ``records``: what became of each decision at each site.
    """

    plan_digest: str
    pipeline: str
    device: str
    dtype: str
    backend_full: str
    steps: int
    seeds: tuple[int, ...]
    images_per_call: int
    full: Timing
    planned: Timing
    quality: Quality
    cache_bytes: int
    attention: Operations
    with_projections: Operations
    records: tuple[Record, ...]
    images_full: NDArray[np.uint8]
    images_planned: NDArray[np.uint8]

    @property
    def speedup(self) -> float:
        """Median seconds of a full call over those of a planned one; above 1 the plan is faster."""
        return self.full.call_seconds / self.planned.call_seconds

    @property
    def skips(self) -> tuple[Record, ...]:
        """The decisions that were not carried out, with the reason."""
        return tuple(record for record in self.records if record.outcome == "skipped")

    def to_json(self) -> dict[str, Any]:
        """Everything but the images, as JSON values with finite numbers; times in seconds."""
        result = {
            field.name: getattr(self, field.name) for field in fields(self) if not field.name.startswith("images_f")
        }
        del result["images_planned"]
        return result | {
            "seeds": list(self.seeds),
            "full": _timing_json(self.full),
            "planned": _timing_json(self.planned),
            "speedup": self.speedup,
            "quality": asdict(self.quality),
            "attention": _operations_json(self.attention),
            "with_projections": _operations_json(self.with_projections),
            "records": [_record_json(record) for record in self.records],
        }


def _timing_json(timing: Timing) -> dict[str, Any]:
    return {
        "call_seconds": timing.call_seconds,
        "calls": list(timing.calls),
        "first_call": timing.first_call,
        "seconds_per_step": timing.seconds_per_step,
        "step_seconds": list(timing.step_seconds),
    }


def _operations_json(operations: Operations) -> dict[str, Any]:
    return {
        "share": operations.share,
        "full_per_step": operations.full_per_step,
        "planned_per_step": list(operations.planned_per_step),
    }


def _record_json(record: Record) -> dict[str, str]:
    return {
        "site": record.site,
        "decision": str(record.decision),
        "outcome": str(record.outcome),
        "reason": record.reason,
    }


class _StepClock:
    """Time stamps at the end of ``set_timesteps`` and of each ``step`` of a scheduler, without a device sync."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.stamps: list[Any] = []

    def stamp(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.stamps.append(event)
        else:
            self.stamps.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds of each step; call when the device has finished."""
        if self.cuda:
            return [a.elapsed_time(b) / 1000 for a, b in zip(self.stamps, self.stamps[1:], strict=False)]
        return [b - a for a, b in zip(self.stamps, self.stamps[1:], strict=False)]

    @contextmanager
    def watching(self, scheduler: Any) -> Iterator[None]:
        """Stamp while inside, and leave the scheduler as it was found."""
        kept = {name: vars(scheduler).get(name) for name in ("set_timesteps", "step")}

        def stamped(function: Callable[..., Any], first: bool) -> Callable[..., Any]:
            # wraps: diffusers looks at the signature of set_timesteps.
            @functools.wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                result = function(*args, **kwargs)
                if first:
                    self.stamps.clear()
                self.stamp()
                return result

            return call

        scheduler.set_timesteps = stamped(scheduler.set_timesteps, first=True)
        scheduler.step = stamped(scheduler.step, first=False)
        try:
            yield
        finally:
            for name, value in kept.items():
                if value is None:
                    delattr(scheduler, name)
                else:
                    setattr(scheduler, name, value)


@dataclass(frozen=True)
class Call:
    """One call of a pipeline: how long it took, all in all and per step, and its images (N, C, H, W) in [0, 1]."""

    seconds: float
    step_seconds: tuple[float, ...]
    images: Tensor

    def timing(self) -> Call:
        """The call without its images, which may be large."""
        return replace(self, images=self.images.new_empty(0))


def undisturbed(calls: Sequence[Call]) -> float:
    """Seconds that a call would take with nothing else on the machine: the least of each step's times over ``calls``,
    and of what is beside the steps.

    Company only adds to a time, in bursts of a few steps, so that no whole call may be without. All calls take the same
    steps.
    """
    steps = [min(times) for times in zip(*(call.step_seconds for call in calls), strict=True)]
    beside: float = min(call.seconds - sum(call.step_seconds) for call in calls)
    return sum(steps, beside)


@dataclass(frozen=True)
class Caller:
    """Calls one pipeline with everything but the seed held fixed."""

    pipe: Any
    inputs: Mapping[str, Any]
    steps: int

    def __call__(self, seed: int) -> Call:
        device = torch.device(self.pipe.device)
        clock = _StepClock(device)
        generator = torch.Generator().manual_seed(seed)
        _synchronize(device)
        with clock.watching(self.pipe.scheduler):
            start = time.perf_counter()
            try:
                output = self.pipe(**self.inputs, num_inference_steps=self.steps, generator=generator, output_type="pt")
            except (TypeError, ValueError) as error:
                if clock.stamps or isinstance(error, DifaError):
                    raise
                raise refused(self.pipe, self.inputs, error) from error
            _synchronize(device)
            seconds = time.perf_counter() - start
        return Call(seconds, tuple(clock.seconds()), _images(output))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _images(output: Any) -> Tensor:
    """Images (N, C, H, W) float32 in [0, 1] on the CPU; the frames of a video count as images."""
    images = getattr(output, "images", None)
    if images is None:
        images = getattr(output, "frames", None)
    if not isinstance(images, Tensor) or images.ndim not in (4, 5):
        raise UnsupportedPipelineError(
            f"the pipeline returned {type(output).__name__} without images or frames as a tensor (N, C, H, W) or "
            "(N, T, C, H, W) for output_type='pt'; compare needs images"
        )
    if images.ndim == 5:
        images = images.flatten(0, 1)
    return images.detach().float().cpu().clamp(0, 1)


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Hide the pipeline's own progress bar."""
    kept = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**(kept or {}))


@contextmanager
def compiled_by(transformer: Any, backend: str) -> Iterator[None]:
    """``transformer`` compiled in place by ``backend``; for ``"eager"`` it is left as it is."""
    if backend == "eager":
        yield
        return
    kept = transformer._compiled_call_impl
    # dynamic=False: batch sizes seen earlier in this process must not slow this side down.
    # fullgraph=True: past the recompile limit there is an error, not an eager run that passes for a compiled one.
    compiled = torch.compile(inner_forward(transformer), backend=backend, dynamic=False, fullgraph=True)
    transformer._compiled_call_impl = lambda *args, **kwargs: call_in_hooks(transformer, compiled, args, kwargs)
    try:
        yield
    finally:
        transformer._compiled_call_impl = kept


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[str], None]]:
    if not show:
        yield lambda name: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise MissingDependencyError(
            "a progress bar needs tqdm; install difa-compile[report] or pass progress=False"
        ) from error
    with tqdm(total=total, desc="compare", unit="call") as bar:

        def advance(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        yield advance


def compare(
    pipe: Any,
    plan: Plan | str | Path,
    inputs: Mapping[str, Any],
    *,
    steps: int,
    seeds: Sequence[int] = (0,),
    repeats: int = 3,
    judge: metrics.Judge | None = None,
    reference: Tensor | None = None,
    backend_full: Literal["inductor", "eager"] = "inductor",
    allow_slower: bool = False,
    progress: bool = True,
) -> Comparison:
    """Sample ``pipe`` with full attention and under ``plan``, from the same seeds, and measure both.

    ``inputs`` are the pipeline's keyword arguments (``class_labels``, ``prompt``, ``guidance_scale``...) without those
    set here: generator, number of steps and output type. Each of the ``seeds`` is one call. Both sides take turns, so
    that a machine that slows down meanwhile favours neither: an untimed first call each, which compiles, then at least
    ``repeats`` timed ones, going round the seeds. The full side is compiled by ``backend_full``, or is left as the
    pipeline has it for ``"eager"``. ``allow_slower``: the planned side carries out windows that are predicted slower
    than full attention too, as in :func:`~difa_compile.pipeline.apply.apply`, so that the prediction can be checked.

    ``judge`` and ``reference`` (real images (N, C, H, W) in [0, 1]) add what :class:`Quality` says; which class was
    asked for is taken from ``inputs["class_labels"]``. The pipeline is left as it was found, also after an exception.

    Raises :class:`ScheduleError` for fewer than one step, :class:`ComparisonError` for inputs that are set here, for no
    or repeated seeds and for less than one repeat, :class:`PipelineCallError` for inputs that the pipeline cannot be
    called with, :class:`UnsupportedPipelineError` for a pipeline without images, and
    what :func:`difa_compile.pipeline.apply.apply` raises.
    """
    _check_arguments(inputs, steps, seeds, repeats, backend_full)
    check_call(pipe, inputs)
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    seeds = tuple(seeds)
    transformers = find_transformers(pipe)
    rounds = max(repeats, len(seeds) - 1)

    calls: dict[str, list[Call]] = {"full": [], "planned": []}
    with ExitStack() as stack:
        stack.enter_context(quiet(pipe))
        for transformer in transformers:
            stack.enter_context(compiled_by(transformer, backend_full))
        # The copy shares all components; only `pipe` is wired, and calls of the copy run the transformer as it was.
        sides = [("full", Caller(copy.copy(pipe), inputs, steps)), ("planned", Caller(pipe, inputs, steps))]
        applied = apply(pipe, plan, allow_slower=allow_slower)
        stack.callback(remove, pipe)
        advance = stack.enter_context(_bar(2 * (rounds + 1), progress))
        for index in range(rounds + 1):
            for name, caller in sides if index % 2 else reversed(sides):
                calls[name].append(caller(seeds[index % len(seeds)]))
                advance(name)
        records = tuple(applied.records)
        capture = applied.captures[-1]
        stats = applied.last_run
        assert stats is not None
        resolved = plan.resolve(steps, pipe.scheduler)

    full_images, planned_images = (
        torch.cat([call.images for call in calls[name][: len(seeds)]]) for name in ("full", "planned")
    )
    roles = _carried_out(capture, resolved.rows, plan.blocks)
    attention, with_projections = (_operations(resolved.sites, roles, counted) for counted in (False, True))
    return Comparison(
        plan_digest=plan.digest,
        pipeline=type(pipe).__name__,
        device=str(pipe.device),
        dtype=str(transformers[0].dtype).removeprefix("torch."),
        backend_full=backend_full,
        steps=steps,
        seeds=seeds,
        images_per_call=len(full_images) // len(seeds),
        full=_timing(calls["full"]),
        planned=_timing(calls["planned"]),
        quality=_quality(full_images, planned_images, inputs, judge, reference),
        cache_bytes=stats.peak_cache_bytes,
        attention=attention,
        with_projections=with_projections,
        records=records,
        images_full=_pixels(full_images),
        images_planned=_pixels(planned_images),
    )


def _check_arguments(
    inputs: Mapping[str, Any], steps: int, seeds: Sequence[int], repeats: int, backend_full: str
) -> None:
    if steps < 1:
        raise ScheduleError(f"compare needs at least one step, got {steps}")
    taken = sorted(set(inputs) & set(_OURS))
    if taken:
        raise ComparisonError(f"compare sets {', '.join(taken)} itself; leave it out of inputs")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ComparisonError(f"seeds must be one or more different numbers, got {shown(list(seeds))}")
    if repeats < 1:
        raise ComparisonError(f"repeats must be at least 1, got {repeats}")
    if backend_full not in ("inductor", "eager"):
        raise ComparisonError(f"backend_full is {quoted(backend_full)}; choose inductor or eager")


def _timing(calls: Sequence[Call]) -> Timing:
    first, *timed = calls
    per_step = zip(*(call.step_seconds for call in timed), strict=True)
    return Timing(
        calls=tuple(call.seconds for call in timed),
        first_call=first.seconds,
        step_seconds=tuple(map(statistics.median, per_step)),
    )


def _pixels(images: Tensor) -> NDArray[np.uint8]:
    """(N, C, H, W) in [0, 1] as (N, H, W, C) uint8."""
    pixels: NDArray[np.uint8] = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return pixels


def _carried_out(
    capture: Capture, rows: Sequence[Sequence[Decision]], blocks: Sequence[int | None]
) -> tuple[tuple[Role, ...], ...]:
    """The roles with every skipped decision replaced by what was done instead."""
    carried_out = [[capture.verdicts.effective(i, decision) for i, decision in enumerate(row)] for row in rows]
    return assign_roles(carried_out, blocks)


@dataclass(frozen=True)
class _Carried:
    sites: tuple[SiteInfo, ...]
    roles: tuple[tuple[Role, ...], ...]


def _operations(sites: tuple[SiteInfo, ...], roles: tuple[tuple[Role, ...], ...], with_projections: bool) -> Operations:
    cost = plan_flops(_Carried(sites, roles), with_projections)
    return Operations(cost.full_per_step, cost.planned_per_step)


def _quality(
    full: Tensor, planned: Tensor, inputs: Mapping[str, Any], judge: metrics.Judge | None, reference: Tensor | None
) -> Quality:
    ratios = metrics.psnr(full, planned)
    differing = ratios[ratios.isfinite()]
    similar = metrics.ssim(full, planned) if min(full.shape[2:]) >= 11 else None
    frechet = frechet_full = frechet_planned = agreement = right_full = right_planned = None
    if judge is not None:
        agreement = metrics.judge_agreement(full, planned, judge)
        if len(full) > 1:
            frechet = metrics.frechet_distance(full, planned, judge)
            if reference is not None:
                frechet_full = metrics.frechet_distance(reference, full, judge)
                frechet_planned = metrics.frechet_distance(reference, planned, judge)
        asked = inputs.get("class_labels")
        if asked is not None:
            labels = torch.as_tensor(asked).reshape(-1)
            labels = labels.repeat(len(full) // len(labels))
            right_full = metrics.judged_right(full, labels, judge)
            right_planned = metrics.judged_right(planned, labels, judge)
    return Quality(
        identical=len(ratios) - len(differing),
        max_difference=(full - planned).abs().max().item(),
        psnr=differing.mean().item() if len(differing) else None,
        psnr_worst=differing.min().item() if len(differing) else None,
        ssim=similar.mean().item() if similar is not None else None,
        ssim_worst=similar.min().item() if similar is not None else None,
        frechet=frechet,
        frechet_full=frechet_full,
        frechet_planned=frechet_planned,
        judged_right_full=right_full,
        judged_right_planned=right_planned,
        agreement=agreement,
    )
