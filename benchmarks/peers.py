"""What other tools do with the demo model: each recipe a named case, set up as its users would set it up.

Three kinds: cache-dit (an optional package), the caches of diffusers, and uniform reuse or forecast of all blocks,
which no tool has in this form and which is written out here. What cannot take the demo model is not listed;
benchmarks/README.md says why.
"""

from __future__ import annotations

import ast
import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache, partial, update_wrapper
from importlib import metadata
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from . import _demo
from ._common import Row, Value

CACHE_DIT, DIFFUSERS, UNIFORM = "cache-dit", "diffusers", "uniform"


@dataclass(frozen=True)
class Case:
    """One recipe on a pipeline of its own."""

    name: str
    tool: str
    settings: Row
    prepare: Callable[[Any, int], None] = field(repr=False)
    """Sets up a freshly loaded pipeline for a run of so many steps."""
    compile: Callable[[Any], None] | None = field(default=None, repr=False)
    """What brings in inductor, once it is set up; None where ``prepare`` does or where nothing is compiled."""

    def load(self, model: str, steps: int) -> Any:
        """A pipeline of ``model`` that samples by this recipe, call after call."""
        pipe = with_own_code(_demo.load(model))
        self.prepare(pipe, steps)
        if self.compile is not None:
            self.compile(pipe)
        return pipe


def with_own_code(pipe: Any) -> Any:
    """The pipeline, the forward of whose transformer is a copy for itself.

    What Dynamo knows of code it keeps with the code: where it gives up on what one pipeline has hooked, it gives up on
    every other pipeline that runs the same code in that process, also if it has compiled that already.
    """
    base = type(pipe.transformer)
    forward = base.forward
    code = forward.__code__.replace()
    own = FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    update_wrapper(own, forward)
    pipe.transformer.__class__ = type(base.__name__, (base,), {"forward": own, "__module__": base.__module__})
    return pipe


def cases() -> Iterator[Case]:
    """Every recipe that can be run here, with inductor."""
    if CACHE_DIT not in missing():
        yield from cache_dit_cases()
    yield from diffusers_cases()
    yield from uniform_cases()


def eager(case: Case) -> Case:
    """The same recipe without torch.compile."""
    return replace(case, name=f"{case.name}, eager", compile=None)


def missing() -> list[str]:
    """The tools that are not installed."""
    return [tool for tool in (CACHE_DIT, DIFFUSERS) if version(tool) is None]


def version(tool: str) -> str | None:
    try:
        return metadata.version(tool)
    except metadata.PackageNotFoundError:
        return None


def compile_whole(pipe: Any) -> None:
    """As the guides of both tools have it; told that nothing is dynamic, Dynamo would make a graph for every step."""
    pipe.transformer.compile()


# cache-dit


def cache_dit_cases() -> Iterator[Case]:
    """DBCache by its threshold, by step masks of our own and by those it comes with, plain and with its forecasts.

    One block is computed at every step, the least it allows; by default it is 8, more than the demo model has.
    """
    by_threshold: tuple[tuple[str | None, tuple[float, ...]], ...] = (
        (None, (0.08, 0.2)),
        ("TaylorSeer 1", (0.04, 0.08, 0.12, 0.2)),
        ("TaylorSeer 2", (0.08, 0.12)),
        ("FoCa", (0.04,)),
        ("DMD", (0.04,)),
    )
    for forecast, thresholds in by_threshold:
        for threshold in thresholds:
            yield _cache_dit(f"threshold {threshold:g}", {"residual_diff_threshold": threshold}, forecast)
    by_mask: tuple[tuple[str | None, tuple[int, ...]], ...] = (
        (None, (3, 7)),
        ("TaylorSeer 1", (2, 4, 7)),
        ("TaylorSeer 2", (2, 3, 4, 5, 7, 10, 16)),
    )
    for forecast, intervals in by_mask:
        for every in intervals:
            ours: Row = {"steps_computation_policy": "static", "warmup": 4, "every": every}
            yield _cache_dit(f"mask every {every}", ours, forecast)
    for policy in ("slow", "medium", "fast", "ultra"):
        theirs: Row = {"steps_computation_policy": "static", "mask_policy": policy}
        yield _cache_dit(f"mask {policy}", theirs, "TaylorSeer 1")


def _cache_dit(tag: str, settings: Row, forecast: str | None) -> Case:
    settings = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, **settings}
    name = f"cache-dit DBCache{f' + {forecast}' if forecast else ''}, {tag}"
    prepare = partial(_enable_cache_dit, settings=settings, forecast=forecast)
    return Case(name, CACHE_DIT, {**settings, "forecast": forecast}, prepare, compile_whole)


def _enable_cache_dit(pipe: Any, steps: int, settings: Row, forecast: str | None) -> None:
    import cache_dit

    # It replaces __call__ of the pipeline's class, for all pipelines of that class: here each has one of its own.
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {})
    given: dict[str, Any] = dict(settings)
    if policy := given.pop("mask_policy", None):
        given["steps_computation_mask"] = cache_dit.steps_mask(total_steps=steps, mask_policy=policy)
    if every := given.pop("every", None):  # after the warm-up the last of every so many steps, and the last of all
        warmup = given.pop("warmup")
        mask = [int(step < warmup or (step - warmup) % every == every - 1) for step in range(steps)]
        given |= {"steps_computation_mask": [*mask[:-1], 1], "max_warmup_steps": warmup}
    forecasts: dict[str | None, Callable[[], Any]] = {
        None: lambda: None,
        "TaylorSeer 1": lambda: cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1),
        "TaylorSeer 2": lambda: cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=2),
        "FoCa": cache_dit.FoCaCalibratorConfig,
        "DMD": cache_dit.DMDCalibratorConfig,
    }
    config = cache_dit.DBCacheConfig(**given)
    cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=forecasts[forecast]())


# diffusers


def diffusers_cases() -> Iterator[Case]:
    """The caches of diffusers that do something on a DiT."""
    for threshold in (0.03, 0.05, 0.1, 0.2):
        yield _diffusers("FirstBlockCache", f"threshold {threshold:g}", {"threshold": threshold})
    for order, intervals in ((1, (2, 4, 6, 8)), (2, (2, 3, 4, 5, 6, 8))):
        for interval in intervals:
            lite: Row = {"of": "projection", "cache_interval": interval, "max_order": order}
            yield _diffusers("TaylorSeerCache", f"lite, order {order}, every {interval}", lite)
    for interval in (2, 4):
        attention: Row = {"of": "attention", "cache_interval": interval, "max_order": 1}
        yield _diffusers("TaylorSeerCache", f"attention, order 1, every {interval}", attention)
    for threshold, most in ((0.06, 3), (0.12, 4), (2.0, 8)):
        magnitude: Row = {"threshold": threshold, "max_skip_steps": most, "retention_ratio": 0.1}
        yield _diffusers("MagCache", f"threshold {threshold:g}, {most} in a row", magnitude)
    for threshold, most in ((0.05, 2), (0.1, 2), (0.25, 2), (0.35, 3), (0.5, 4), (0.7, 6), (1.0, 8)):
        sea: Row = {"threshold": threshold, "max_consecutive_cached": most}
        yield _diffusers("SeaCache", f"threshold {threshold:g}, {most} in a row", sea)
    for skip in (2, 4):
        pyramid: Row = {"spatial_attention_block_skip_range": skip}
        yield _diffusers("PyramidAttentionBroadcast", f"every {skip}", pyramid)
    for skip in (2, 5):
        yield _diffusers("FasterCache", f"guidance every {skip}", {"unconditional_batch_skip_range": skip})


def _diffusers(technique: str, tag: str, settings: Row) -> Case:
    prepare = partial(_enable_diffusers, technique=technique, settings=settings)
    return Case(f"diffusers {technique}, {tag}", DIFFUSERS, settings, prepare, compile_whole)


def _enable_diffusers(pipe: Any, steps: int, technique: str, settings: Row) -> None:
    clock = give_cache_mixin(pipe, steps, swap_halves=technique == "FasterCache")
    given: dict[str, Any] = dict(settings)
    if technique == "TaylorSeerCache":
        given |= _taylorseer(given.pop("of"), steps)
    elif technique == "MagCache":
        given |= {"num_inference_steps": steps, "mag_ratios": mag_ratios(steps)}
    elif technique in ("PyramidAttentionBroadcast", "FasterCache"):
        # In diffusers' pipelines it is a tensor, and comparing it ends a graph of Dynamo's; it ends one here.
        given["current_timestep_callback"] = torch.compiler.disable(lambda: clock.time)
    elif technique == "SeaCache":  # made for latents (C, T, H, W) of one sample; what it compares is their mean
        given["raw_vision_callback"] = lambda model, args, kwargs: list(args[0][:, :, None])
    if technique == "FasterCache":
        halved = ["hidden_states", "timestep", "class_labels"]
        given |= {"tensor_format": "BCHW", "_unconditional_conditional_input_kwargs_identifiers": halved}
    pipe.transformer.enable_cache(diffusers_config(technique, given))


def diffusers_config(technique: str, settings: dict[str, Any]) -> Any:
    from diffusers import hooks

    return getattr(hooks, f"{technique}Config")(**settings)


def _taylorseer(of: str, steps: int) -> dict[str, Any]:
    """The patterns by which it finds attention and its lite mode finds the projection match no module of a DiT.

    The last step is always computed, and what is kept is kept in the model's type, not in bfloat16.
    """
    names = {
        "attention": {"cache_identifiers": [r"transformer_blocks\.\d+\.attn1"]},
        "projection": {"cache_identifiers": ["proj_out_2"], "skip_predict_identifiers": [r"transformer_blocks\.\d+"]},
    }
    return {"taylor_factors_dtype": torch.float32, "disable_cache_after_step": steps - 1, **names[of]}


@cache
def mag_ratios(steps: int) -> list[float]:
    """What a calibration run of MagCache prints, for its user to copy."""
    pipe = _demo.load("demo")
    give_cache_mixin(pipe, steps)
    pipe.transformer.enable_cache(diffusers_config("MagCache", {"calibrate": True, "num_inference_steps": steps}))
    printed = io.StringIO()
    with redirect_stdout(printed):
        _demo.sample(pipe, list(_demo.CALIBRATION_LABELS), steps, seed=1234)
    ratios: list[float] = ast.literal_eval(next(line for line in printed.getvalue().splitlines() if line[:2] == "[1"))
    return ratios


@dataclass
class Clock:
    """Where a run is. Not kept on the model: of a changing number there Dynamo makes a graph per value."""

    step: int = 0
    time: int = 0


def give_cache_mixin(pipe: Any, steps: int, swap_halves: bool = False) -> Clock:
    """What diffusers gives its models with caches, and a DiT lacks: CacheMixin, and a context around a step's call.

    ``swap_halves``: FasterCache takes the second half of a batch for the conditional one, which a DiT has first.
    """
    from diffusers.models.cache_utils import CacheMixin

    base, clock = type(pipe.transformer), Clock()

    def call(self: Any, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        now = int(timestep[0])
        clock.step, clock.time = (clock.step + 1 if now < clock.time else 0), now
        half = len(hidden_states) // 2 if swap_halves else 0
        if half:
            hidden_states, class_labels = hidden_states.roll(half, 0), class_labels.roll(half, 0)
        place = {"step_index": clock.step, "num_inference_steps": steps, "sigma": now / 1000}
        with self.cache_context("cond_uncond", **place):
            output = base.__call__(self, hidden_states, timestep=timestep, class_labels=class_labels)
        if half:
            output.sample = output.sample.roll(half, 0)
        return output

    pipe.transformer.__class__ = type(base.__name__, (base, CacheMixin), {"__call__": call})
    return clock


# Uniform reuse and forecast


def uniform_cases() -> Iterator[Case]:
    """The first three steps are computed, then every n-th; between them all blocks are reused (order 0) or forecast.

    ``last``: the last step is computed too.
    """
    for order, intervals in ((0, (2, 3, 4, 5, 6)), (1, (2, 3, 4, 5, 6, 8, 10)), (2, (2, 3, 4, 5, 6))):
        for every in intervals:
            yield _uniform(every, order)
    for every in (3, 4, 5, 6, 8, 10):
        yield _uniform(every, 1, last=True)


def _uniform(every: int, order: int, last: bool = False) -> Case:
    what = f"forecast of order {order}" if order else "reuse"
    name = f"uniform {what}, every {every}{' and the last' if last else ''}"
    settings: dict[str, Value] = {"first": 3, "every": every, "order": order, "last": last}
    return Case(name, UNIFORM, settings, partial(install_uniform, every=every, order=order, last=last), _inner_compile)


def _inner_compile(pipe: Any) -> None:
    for block in pipe.transformer.transformer_blocks:
        block.forward.keywords["forward"] = torch.compile(block.forward.keywords["forward"], dynamic=False)


def install_uniform(pipe: Any, steps: int, every: int, order: int, first: int = 3, last: bool = False) -> None:
    computed = {step for step in range(steps) if step < first or (step - first) % every == 0}
    stack = UniformStack(computed | {steps - 1} if last else computed, order)
    blocks = pipe.transformer.transformer_blocks
    for index, block in enumerate(blocks):
        block.forward = partial(stack.block, forward=block.forward, index=index, last=index == len(blocks) - 1)


class UniformStack:
    """What all blocks together add to the hidden states, at steps not computed from the ``order + 1`` last computed.

    Weights are Lagrange's in the timestep. They are linear, so this is each block forecast by itself, in one addition.
    """

    def __init__(self, computed: set[int], order: int) -> None:
        self.computed, self.order = computed, order
        self.step, self.time = -1, 0.0
        self.entered = torch.zeros(())
        self.known: list[tuple[float, Tensor]] = []

    def block(self, hidden: Tensor, forward: Callable[..., Tensor], index: int, last: bool, **kwargs: Any) -> Tensor:
        """In place of the forward of the block at ``index``."""
        if index == 0:
            self.begin(float(kwargs["timestep"][0]))
            self.entered = hidden
        if self.step not in self.computed:
            return hidden + self.forecast() if index == 0 else hidden
        out = forward(hidden, **kwargs)
        if last:
            self.known = [*self.known, (self.time, out - self.entered)][-self.order - 1 :]
        return out

    def begin(self, time: float) -> None:
        if time >= self.time:  # it falls within a run: this is the first step of the next
            self.step, self.known = -1, []
        self.step, self.time = self.step + 1, time

    def forecast(self) -> Tensor:
        total = torch.zeros(())
        for time, addition in self.known:
            weight = 1.0
            for other, _ in self.known:
                weight *= (self.time - other) / (time - other) if other != time else 1.0
            total = total + weight * addition
        return total
