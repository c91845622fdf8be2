"""Is a program what the pipeline does? Its replay on random data, against what a watched pipeline did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from difa_compile.bundle.agreement import difference
from difa_compile.bundle.program import Argument, Call, Form, Program, replay
from difa_compile.errors import SamplingLoopError
from difa_compile.exporting.watching import Event
from difa_compile.wording import shown

SEED = 17
"""Of the generator; torch's own has the next one."""
HUGE = 1e4
"""In the place of infinity, of which no mean can be taken: masks are made of it."""


def differences(
    program: Program,
    calls: Sequence[Event],
    latents: Tensor,
    conditioning: Mapping[str, Mapping[str, Tensor]],
    images: int,
    scales: Mapping[str, float],
) -> tuple[float, float]:
    """Of a replay from the pipeline, and of the replay in float32 from that in float64.

    The largest over what the models are given and the final latents, relative to the largest value of each; infinite
    where what is not finite is not the same, and for latents that are not finite. What models are given in half
    precision may be rounded to the next number of it. ``calls``: those of the pipeline's models, in which
    :func:`stand_in` stood for them; replays are given what it made there, or such a step of rounding would grow from
    call to call. Raises :class:`SamplingLoopError` where
    the program calls the models otherwise.
    """
    program = in_dtypes_of(program, calls)
    exact, final = _replayed(program, calls, conditioning, images, scales, torch.float64)
    rounded, rounded_final = _replayed(program, calls, conditioning, images, scales, torch.float32)
    if not latents.isfinite().all():
        return math.inf, 0.0  # which tells nothing
    error, rounding = difference(final, latents), difference(rounded_final, final)
    for event, found, other in zip(calls, exact, rounded, strict=True):
        for name, tensor in event.tensors.items():
            error = max(error, _beyond_a_step(found[name], tensor))
            rounding = max(rounding, _beyond_a_step(other[name], found[name]))
    return error, rounding


def _beyond_a_step(found: Tensor, wanted: Tensor) -> float:
    """Their difference, 0 if it is that of two neighbours in half precision."""
    apart = difference(found, wanted)
    half = wanted.dtype in (torch.float16, torch.bfloat16)
    return 0.0 if half and apart <= torch.finfo(wanted.dtype).eps else apart


def _replayed(
    program: Program,
    calls: Sequence[Event],
    conditioning: Mapping[str, Mapping[str, Tensor]],
    images: int,
    scales: Mapping[str, float],
    dtype: torch.dtype,
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """What the models are given in a replay, and the final latents; it must call them as the pipeline did."""
    given: list[dict[str, Tensor]] = []

    def call(form: Form, operation: Call, inputs: dict[str, Tensor]) -> Tensor:
        event = calls[len(given)] if len(given) < len(calls) else None
        if event is None or event.form != (form.model, form.branch) or set(inputs) != set(event.tensors):
            raise SamplingLoopError("the pipeline calls its models otherwise than the program does")
        for name, tensor in event.tensors.items():
            if tensor.shape != inputs[name].shape or tensor.dtype != inputs[name].dtype:
                raise SamplingLoopError(f"{shown(name)} is of another form than in the call that was probed")
        given.append(inputs)
        return stand_in(len(given), form.sample.name, form.output, event.tensors)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + 1)
        generator = torch.Generator().manual_seed(SEED)
        final = replay(program, generator, conditioning, call, images=images, scales=scales, dtype=dtype)
    if len(given) != len(calls):
        raise SamplingLoopError("the pipeline calls its models more often than the program does")
    return given, final


def stand_in(number: int, sample: str, output: tuple[int, ...], inputs: Mapping[str, Tensor]) -> Tensor:
    """A function in a model's place: not linear, another one at each call, of all inputs, and each row by itself."""
    rows = inputs[sample].flatten(1).float()
    elements = math.prod(output)
    generator = torch.Generator().manual_seed(number)
    weights = torch.randn(2, elements, generator=generator).to(rows.device)
    wide = rows.repeat(1, -(-elements // rows.shape[1]))[:, :elements]
    others = torch.zeros(len(rows), 1, device=rows.device)
    for name, tensor in sorted(inputs.items()):
        if name != sample:
            batched = tensor.ndim > 0 and len(tensor) == len(rows)
            tensor = tensor.double().nan_to_num(3.0, HUGE, -HUGE)
            mean = tensor.flatten(1).mean(1) if batched and tensor.ndim > 1 else tensor
            mean = mean if batched else mean.mean().expand(len(rows))
            others += (mean / (1 + mean.abs())).float().unsqueeze(1)
    made = torch.tanh(weights[0] * wide + 0.3 * wide.roll(1, 1) + weights[1] + 0.3 * others)
    return made.view(len(rows), *output)


def in_dtypes_of(program: Program, events: Sequence[Event]) -> Program:
    """The program of a pipeline in half precision, with the dtypes in which it was watched."""

    def retyped(argument: Argument, event: Event) -> Argument:
        return replace(argument, dtype=str(event.tensors[argument.name].dtype).removeprefix("torch."))

    forms = []
    for form in program.forms:
        event = next((event for event in events if event.form == (form.model, form.branch)), None)
        if event is None or any(name not in event.tensors for name in _names(form)):
            return program
        forms.append(
            replace(
                form,
                sample=retyped(form.sample, event),
                values=tuple(retyped(argument, event) for argument in form.values),
                conditions=tuple(replace(each, argument=retyped(each.argument, event)) for each in form.conditions),
            )
        )
    return replace(program, forms=tuple(forms))


def _names(form: Form) -> list[str]:
    arguments = (form.sample, *form.values, *(condition.argument for condition in form.conditions))
    return [argument.name for argument in arguments]
