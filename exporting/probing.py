"""A pipeline's sampling loop, found by probing it: from a diffusers pipeline to a :class:`Program`.

The pipeline is called with its model, its noise and what its scheduler returns replaced, and looked at from outside:
nothing here knows a scheduler or a pipeline. Every value of the loop (a draw, an output of the model, a clamped
tensor, a sample) is replaced by a *basis*, one element of the row for each value, so that the factors of all values can
be read off the elements of whatever the loop makes of them. Since a sample that the scheduler returns is replaced by a
value of its own, what a step reads reaches no further back than the scheduler itself remembers.

Three probes give what is affine in a guidance scale, further ones, on random data with a nonlinear function in the
model's place, whether the program is right: only then is it accepted.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from difa_compile.bundle.program import (
    DTYPES,
    Argument,
    Call,
    Clamp,
    Combination,
    Condition,
    ConditionRow,
    Draw,
    Form,
    Number,
    Operation,
    Program,
    Sample,
    Scale,
    Term,
    View,
    value_of,
)
from difa_compile.errors import DifaError, NotAppliedError, NotLinearError, SamplingLoopError
from difa_compile.exporting.shortening import shortened, trimmed
from difa_compile.exporting.verifying import SEED, differences, stand_in
from difa_compile.exporting.watching import NO_TABLE, Event, Watch, first_tensor, wide, with_first
from difa_compile.pipeline.call_arguments import refused
from difa_compile.pipeline.transformers import check_scheduler, find_transformers
from difa_compile.pipeline.wiring import wiring_of
from difa_compile.plan.guidance import guidance_of
from difa_compile.wording import quoted, shown

ROUNDINGS, LEAST, MOST = 8.0, 1e-5, 1e-3
"""A replay may differ from the pipeline by so many times what float32 instead of float64 makes of the replay itself,
which is rounding as this very loop magnifies it; at least and at most by so much of the largest value: at least, since
schedulers work out their factors in float32 (3e-6 of DPMSolverMultistepInverseScheduler). A wrong factor, or a clamp
that is missed, is beyond."""
PROBED_AT, VERIFIED_AT = (2.0, 4.0), (3.0, 7.5)
"""Guidance scales. Powers of two, so that multiplying by them rounds nothing and what is 0 comes out as 0."""
UNGUIDED_AT = 0.5
SMALL = 16
"""Elements of a condition's row that are written down where they are fixed."""
DIGIT = 1024
"""Places are told in digits of this base, which float32 carries through any factor."""


@dataclass(frozen=True)
class Probed:
    """A program, and the conditions of the call it was found with, as :func:`difa_compile.bundle.program.replay` takes
    them: ``conditioning[half][name]``. ``images``: how many that call makes."""

    program: Program
    conditioning: Mapping[str, Mapping[str, Tensor]]
    images: int


def probe(pipe: Any, inputs: Mapping[str, Any], steps: int) -> Probed:
    """Write down the sampling loop of a diffusers pipeline for ``steps`` steps.

    ``inputs``: arguments of the pipeline's call, without steps and generator: prompts or labels, sizes, guidance. Sizes
    and whether guidance is on hold for the program; the number of images and the scale of guidance stay free where the
    pipeline lets them. Each transformer runs once, to see the shape of its output; the pipeline is called about ten
    times with nothing in the transformer's place, and left as it was.

    Raises :class:`SamplingLoopError`, its subclass :class:`NotLinearError`, and what
    :func:`difa_compile.pipeline.transformers.find_transformers` raises.
    """
    return _Probing(pipe, inputs, steps).probed()


# --- the probing -----------------------------------------------------------------------------------------------------


@dataclass
class _Shapes:
    """What is known of the loop before its factors are: found once."""

    images: int = 0
    shape: tuple[int, ...] = ()
    samples: dict[tuple[str, str | None], str] = field(default_factory=dict)
    """The input that is made of values, by form."""
    views: dict[tuple[str, Any], View] = field(default_factory=dict)
    """By ``("draw", number)``, ``("input", form)``, ``("output", form)``."""
    templates: dict[tuple[str, str | None], Any] = field(default_factory=dict)
    """What a model returns."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


_Factors = dict[tuple[int, int], dict[tuple[int, int], float]]
"""By (number, group) of what is made: by (number, group) of what it is made of."""


@dataclass
class _Read:
    """What basis probes at one choice of scales have found."""

    factors: _Factors
    final: dict[tuple[int, int], float] | None
    events: list[Event]
    decoded: bool
    """Whether the result is what would have been decoded, scaled in whatever way."""


class _Probing:
    """The probing of one pipeline, from what is known of nothing to a program that was verified."""

    def __init__(self, pipe: Any, inputs: Mapping[str, Any], steps: int) -> None:
        if wiring_of(pipe) is not None:
            raise NotAppliedError(f"this {type(pipe).__name__} carries a plan; call remove(pipe) before it is probed")
        models = find_transformers(pipe)
        check_scheduler(pipe)
        _check_config(pipe.scheduler)
        self.pipe = pipe
        self.models: dict[str, nn.Module] = {
            name: model
            for name in ("transformer", "transformer_2")
            for model in models
            if getattr(pipe, name, None) is model
        }
        self.parameters = inspect.signature(type(pipe).__call__).parameters
        self.inputs = {name: value for name, value in inputs.items() if name != "generator"}
        self.steps = steps
        self.shapes = _Shapes()
        self.encoded: dict[Any, Any] = {}

    # Calls of the pipeline

    def watch(
        self,
        value: Callable[[Event, Callable[[], Any] | None], Any],
        *,
        scales: Mapping[str, float] | None = None,
        inputs: Mapping[str, Any] | None = None,
        steps: int | None = None,
        seed: int = 0,
        native: bool = False,
    ) -> Watch:
        watch = Watch(self.pipe, self.models, value, native, self.encoded)
        call = {**(self.inputs if inputs is None else inputs), **(scales or {})}
        call["num_inference_steps"] = self.steps if steps is None else steps
        if "output_type" in self.parameters:
            call["output_type"] = "latent"
        if "generator" in self.parameters:
            call["generator"] = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            try:
                watch.run(call)
            except (TypeError, ValueError) as error:
                if watch.events or isinstance(error, DifaError):
                    raise
                raise refused(self.pipe, call, error) from error
        return watch

    def filled(
        self, fill: Callable[[Event, int, tuple[int, ...]], Tensor], native: bool = False, **options: Any
    ) -> Watch:
        """A call in which every value is ``fill(event, rows, shape of a row)``, in the model's own shapes."""

        def value(event: Event, given: Callable[[], Any] | None) -> Any:
            if event.kind != "call":
                return fill(event, event.rows, event.shape)
            template = self.shapes.templates.get(event.form)
            if template is None:
                assert given is not None
                template = self.shapes.templates[event.form] = given()
            like = first_tensor(template, "sample")
            sample = self.shapes.samples.get(event.form)
            event.rows = len(event.tensors[sample]) if sample else len(like)
            event.shape = tuple(like.shape[1:])
            made = fill(event, event.rows, event.shape)
            return with_first(template, made.to(like.device, like.dtype if native else wide(like.dtype)), "sample")

        return self.watch(value, native=native, **options)

    # What is known before the factors

    def explore(self) -> Watch:
        """Sizes, inputs, places. Returns the call in which all values are zeros."""
        shapes = self.shapes
        zeros = self.filled(lambda event, rows, shape: torch.zeros(rows, *shape), native=True)
        generator = torch.Generator().manual_seed(5)
        noisy = self.filled(lambda event, rows, shape: torch.randn(rows, *shape, generator=generator), native=True)
        _check_same(zeros.events, noisy.events, "what the model gives")
        draws = [event for event in zeros.events if event.kind == "draw"]
        samples = [event for event in zeros.events if event.kind == "sample"]
        if not draws or not samples:
            what = "draws no noise" if not draws else "never calls its scheduler's step"
            raise SamplingLoopError(f"{type(self.pipe).__name__} {what} in this call, so its loop cannot be probed")
        shapes.images, shapes.shape = draws[0].rows, samples[0].shape
        for quiet, loud in zip(zeros.events, noisy.events, strict=True):
            if quiet.kind == "call":
                self._find_sample(quiet, loud)
            elif any(bool(tensor.any()) for tensor in quiet.tensors.values()):
                raise SamplingLoopError(
                    f"step {quiet.step}: the sample holds something that is neither noise nor the model's output (an "
                    "image to begin with?); only loops that begin with noise can be written down"
                )
        for event in zeros.events:
            self.groups(event)
        self._find_views(zeros.events)
        return zeros

    def _find_sample(self, quiet: Event, loud: Event) -> None:
        names = [name for name in quiet.tensors if not _equal(quiet.tensors[name], loud.tensors[name])]
        model = type(self.models[quiet.form[0]]).__name__
        if not names and quiet.form in self.shapes.samples:
            return
        if len(names) != 1:
            raise SamplingLoopError(
                f"{model} has {len(names)} inputs with the noisy sample ({', '.join(map(shown, names)) or 'none'});"
                " only loops with exactly one can be written down"
            )
        if self.shapes.samples.setdefault(quiet.form, names[0]) != names[0]:
            raise SamplingLoopError(f"{model} is given the sample under several names; only one can be written down")
        if bool(quiet.tensors[names[0]].any()):
            raise SamplingLoopError(
                f"the input {shown(names[0])} of {model} holds something beside the sample (an image, a mask); only "
                "loops whose sample is made of noise and the model's outputs can be written down"
            )

    def groups(self, event: Event, rows: int | None = None) -> int:
        rows = event.rows if rows is None else rows
        images = self.shapes.images
        if rows % images:
            raise SamplingLoopError(f"a {event.kind} has {rows} rows for {images} images, which is no multiple")
        return rows // images

    def _find_views(self, events: list[Event]) -> None:
        """Where rows lie otherwise than the latents do: found by filling in the numbers of their elements."""
        shape = self.shapes.shape
        wanted: dict[str, bool] = dict.fromkeys(("draw", "input", "output"), False)
        started = False
        for event in events:
            if event.kind == "draw" and event.shape != shape:
                if started:
                    raise SamplingLoopError(
                        f"noise of {event.shape} is drawn amid the steps, whose samples are {shape}"
                    )
                wanted["draw"] = True
            elif event.kind == "call":
                started = True
                given = tuple(event.tensors[self.shapes.samples[event.form]].shape[1:])
                wanted["input"] |= given != shape
                wanted["output"] |= event.shape != shape
            elif event.kind in ("sample", "clamp") and event.shape != shape:
                raise SamplingLoopError(f"the scheduler's samples are of several shapes, {shape} and {event.shape}")
        if wanted["draw"]:
            self._find_draw_views(events)
        for form in dict.fromkeys(event.form for event in events if event.kind == "call"):
            first = next(event for event in events if event.form == form and event.kind == "call")
            if wanted["output"] and first.shape != shape:
                view = self._output_view(form, first)
                self.shapes.views["output", form] = view
            given = tuple(first.tensors[self.shapes.samples[form]].shape[1:])
            if given != shape:
                self.shapes.views["input", form] = self._input_view(form, math.prod(given))

    def _places(self, elements: int, seen: Callable[[Tensor], Tensor], what: str) -> View:
        """The view that ``seen``, a linear function of rows, takes of a row: by digits of the elements' numbers."""
        numbers = torch.arange(elements)
        ones = seen(torch.ones(elements))
        if not bool(ones.all()):
            raise SamplingLoopError(f"{what} reaches only part of the sample, so its elements cannot be followed")
        place = torch.zeros(ones.numel(), dtype=torch.int64)
        power = 1
        while power < elements:
            digits = seen((numbers // power % DIGIT).float()) / ones
            place += digits.double().round().long().flatten() * power
            power *= DIGIT
        view = View.of(place)
        if view is None or view.last >= elements:
            raise SamplingLoopError(f"{what} is put in an order that reshaping and permuting do not make")
        return view

    def _find_draw_views(self, events: list[Event]) -> None:
        for draw in [event for event in events if event.kind == "draw" and event.shape != self.shapes.shape]:

            def seen(row: Tensor, number: int = draw.number) -> Tensor:
                def fill(event: Event, rows: int, shape: tuple[int, ...]) -> Tensor:
                    each = row.view(shape) if event.number == number else torch.zeros(shape)
                    return each.expand(rows, *shape).clone()

                watch = self.filled(fill)
                return next(event for event in watch.events if event.kind == "sample").tensors["given"][0].float()

            self.shapes.views["draw", draw.number] = self._places(
                math.prod(draw.shape), seen, "the noise that sampling begins with"
            )

    def _output_view(self, form: tuple[str, str | None], first: Event) -> View:
        def seen(row: Tensor) -> Tensor:
            def fill(event: Event, rows: int, shape: tuple[int, ...]) -> Tensor:
                own = event.kind == "call" and event.form == form
                return (row.view(shape) if own else torch.zeros(shape)).expand(rows, *shape).clone()

            watch = self.filled(fill)
            later = (event for event in watch.events[first.number :] if event.kind in ("clamp", "sample"))
            tensors = (event.tensors.get("input", event.tensors.get("output")) for event in later)
            return next(tensor[0].float() for tensor in tensors if tensor is not None and bool(tensor.any()))

        return self._places(math.prod(first.shape), seen, f"the output of {form[0]}")

    def _input_view(self, form: tuple[str, str | None], elements: int) -> View:
        def seen(row: Tensor) -> Tensor:
            def fill(event: Event, rows: int, shape: tuple[int, ...]) -> Tensor:
                each = row.view(shape) if event.kind == "sample" else torch.zeros(shape)
                return each.expand(rows, *shape).clone()

            watch = self.filled(fill, steps=max(2, self.steps))
            calls = (event.tensors[self.shapes.samples[form]] for event in watch.events if event.form == form)
            found = next((each[0].float() for each in calls if bool(each.any())), None)
            if found is None:
                raise SamplingLoopError(f"{form[0]} is never given a sample of its own, so its place is unknown")
            return found

        if elements != self.shapes.elements:
            raise SamplingLoopError(
                f"{form[0]} is given {elements} elements where the sample has {self.shapes.elements}"
            )
        return self._places(self.shapes.elements, seen, f"the sample that {form[0]} is given")

    # The factors

    def read(self, scales: Mapping[str, float], like: list[Event] | None = None) -> _Read:
        """The factors of all values in what is made of them, for one choice of guidance scales."""
        # One element is nobody's: what stands there comes from no value.
        room = self.shapes.elements - 1
        if room < 1:
            raise SamplingLoopError("a sample of one element leaves no room to probe it; choose a larger size")
        factors: _Factors = {}
        final: dict[tuple[int, int], float] | None = {}
        first = 0
        while True:
            ids: list[tuple[int, int]] = []
            watch = self._basis(first, room, ids, factors, scales)
            if like is not None:
                _check_same(like, watch.events, "the guidance scale")
            final = self._final(watch, first, room, ids, final)
            first += room
            if first >= len(ids):
                return _Read(factors, final, watch.events, watch.decoded)

    def _basis(
        self, first: int, room: int, ids: list[tuple[int, int]], factors: _Factors, scales: Mapping[str, float]
    ) -> Watch:
        images, elements = self.shapes.images, self.shapes.elements

        def fill(event: Event, rows: int, shape: tuple[int, ...]) -> Tensor:
            for name, tensor in event.tensors.items():
                view = self.shapes.views.get(("input", event.form)) if event.kind == "call" else None
                if event.kind == "call" and name != self.shapes.samples.get(event.form):
                    continue
                if name == "given":
                    continue
                self._note(event, tensor, view, first, room, ids, factors)
            if event.kind != "call":
                event.tensors.clear()
            basis = torch.zeros(rows, elements)
            for group in range(self.groups(event, rows)):
                place = len(ids) - first
                ids.append((event.number, group))
                if 0 <= place < room:
                    basis[group * images : (group + 1) * images, place] = 1.0
            view = self.shapes.views.get((event.kind, event.number) if event.kind == "draw" else ("output", event.form))
            if view is None or event.kind not in ("draw", "call"):
                return basis.view(rows, *shape)
            whole = torch.zeros(rows, math.prod(shape))
            place_of = view.take(torch.arange(math.prod(shape)).unsqueeze(0))[0]
            whole[:, place_of] = basis
            return whole.view(rows, *shape)

        return self.filled(fill, scales=scales)

    def _note(
        self,
        event: Event,
        tensor: Tensor,
        view: View | None,
        first: int,
        room: int,
        ids: list[tuple[int, int]],
        factors: _Factors,
    ) -> None:
        rows = tensor.flatten(1).float().cpu()
        if view is not None:
            place_of = view.take(torch.arange(self.shapes.elements).unsqueeze(0))[0]
            rows = torch.zeros_like(rows).index_copy_(1, place_of, rows)
        images = self.shapes.images
        for group in range(self.groups(event, len(rows))):
            own = rows[group * images : (group + 1) * images]
            if not bool((own == own[:1]).all()):
                raise SamplingLoopError(
                    f"step {event.step}: images of a batch are not treated alike, or do not stand one after the other "
                    "within their half; probe the pipeline with one image"
                )
            row = own[0]
            if not bool(torch.isfinite(row).all()):
                raise NotLinearError(f"step {event.step}: the loop makes NaN or infinity of zeros; {_REMEDY}")
            places = row.nonzero().flatten().tolist()
            found = factors.setdefault((event.number, group), {})
            for place in places:
                if place >= room or first + place >= len(ids):
                    raise NotLinearError(
                        f"step {event.step}: the loop of {type(self.pipe).__name__} with "
                        f"{type(self.pipe.scheduler).__name__} adds something that is neither noise nor an output, or "
                        f"moves elements; {_REMEDY}"
                    )
                found[ids[first + place]] = float(row[place])

    def _final(
        self,
        watch: Watch,
        first: int,
        room: int,
        ids: list[tuple[int, int]],
        before: dict[tuple[int, int], float] | None,
    ) -> dict[tuple[int, int], float] | None:
        """What the pipeline's result is made of; None where it is no longer in the shape of the latents."""
        result = watch.result
        if result is None or before is None or tuple(result.shape[1:]) != self.shapes.shape:
            return None
        row = result[0].flatten().float().cpu()[: min(room, len(ids) - first)]
        return before | {ids[first + place]: float(row[place]) for place in row.nonzero().flatten().tolist()}

    # The program

    def probed(self) -> Probed:
        zeros = self.explore()
        candidates, baked = self._candidates()
        program = None
        if candidates:
            with suppress(SamplingLoopError):  # the scale enters otherwise, or the loop is none; the next try tells
                program = self._program(zeros, candidates, baked)
        if program is None:
            held = tuple(Scale(name, value) for name, value in candidates.items())
            program = self._program(zeros, {}, (*baked, *held))
        return Probed(program, self.conditioning(program, zeros.events, self.shapes.images), self.shapes.images)

    def _wrong(self, error: float, allowed: float) -> NotLinearError:
        loop = f"the loop of {type(self.pipe).__name__} with {_why_not_linear(self.pipe)}"
        return NotLinearError(
            f"{loop}: on random data its factors miss it by {error:.1e} of the largest value, where at most "
            f"{allowed:.0e} is rounding; {_REMEDY}"
        )

    def _candidates(self) -> tuple[dict[str, float], tuple[Scale, ...]]:
        """Guidance scales that may stay free, and those that hold: which are off, so that the calls are others."""
        free: dict[str, float] = {}
        held = []
        for name, parameter in self.parameters.items():
            value = self.inputs.get(name, parameter.default)
            if not name.endswith(("guidance_scale", "cfg_scale", "guidance_scale_2")):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if value > 1.0:
                free[name] = float(value)
            else:
                held.append(Scale(name, float(value)))
        return free, tuple(held)

    def _program(self, zeros: Watch, candidates: Mapping[str, float], baked: tuple[Scale, ...]) -> Program:
        base = dict.fromkeys(candidates, PROBED_AT[0])
        reads = [self.read(base, zeros.events)]
        names: list[str] = []
        for name in candidates:
            read = self.read({**base, name: PROBED_AT[1]}, zeros.events)
            if not _same_read(reads[0], read):
                names.append(name)
                reads.append(read)
        scales = tuple(Scale(name, candidates[name], 1.0) for name in names)
        later = self._longer(zeros)
        operations = self._operations(reads)
        forms, values = self._forms([*zeros.events, *later], reads, operations)
        numbers = iter(values)
        whole = tuple(replace(each, values=next(numbers)) if isinstance(each, Call) else each for each in operations)
        final = self._final_of(reads, whole)
        steps = sum(isinstance(each, Sample) for each in whole)
        program = Program(
            type(self.pipe).__name__, type(self.pipe.scheduler).__name__, steps, None, self.shapes.shape, scales, baked,
            forms, whole, final, 0.0,
        )  # fmt: skip
        program = self._lowered(program, base)
        short = replace(program, operations=tuple(shortened(program)))
        if short != program:
            with suppress(NotLinearError):  # rounding that the short way magnifies; then the long one holds
                return self._accepted(short)
        return self._accepted(program)

    def _longer(self, zeros: Watch) -> list[Event]:
        """What happens in a call of one step more, where some model is called only once: to see what follows the
        schedule. Of schedulers that refuse it nothing; what is given once is a condition then."""
        forms = [event.form for event in zeros.events if event.kind == "call"]
        if all(forms.count(form) > 1 for form in forms):
            return []
        with suppress(ValueError, RuntimeError):
            return self.filled(lambda event, rows, shape: torch.zeros(rows, *shape), steps=self.steps + 1).events
        return []

    def _accepted(self, program: Program) -> Program:
        return replace(program, error=self._verified(program, self.inputs), images=self._any_number(program))

    def _operations(self, reads: Sequence[_Read]) -> list[Operation]:
        made: list[Operation] = []
        forms = list(dict.fromkeys(event.form for event in reads[0].events if event.kind == "call"))
        for event in reads[0].events:
            groups = self.groups(event)
            if event.kind == "draw":
                dtype, seeded = event.told
                view = self.shapes.views.get(("draw", event.number))
                made.append(Draw(groups, event.shape, dtype, seeded, view))
                continue
            inputs = tuple(_combined(reads, (event.number, group)) for group in range(groups))
            if event.kind == "call":
                made.append(Call(forms.index(event.form), event.step, inputs, ()))
            elif event.kind == "clamp":
                made.append(Clamp(inputs, *event.told))
            else:
                made.append(Sample(inputs))
        return made

    def _final_of(self, reads: Sequence[_Read], operations: Sequence[Operation]) -> Combination:
        """The group of the last sample that the result is made of; where it is made of others, what it is made of."""
        last = max(index for index, each in enumerate(operations) if isinstance(each, Sample))
        found = [read.final for read in reads]
        if found[0]:
            used = list(found[0])
            if {number for number, _ in used} == {last} and len(used) == 1:
                return (Term(last, used[0][1], (1.0,)),)
            if reads[0].decoded:
                raise SamplingLoopError(
                    f"{type(self.pipe).__name__} decodes something else than its scheduler's last sample, and does not "
                    "return it as latents"
                )
            return tuple(
                Term(*key, _affine([(each or {}).get(key, 0.0) for each in found]))
                for key in sorted(set().union(*(each or {} for each in found)))
            )
        if operations[last].groups > 1:
            raise SamplingLoopError("it cannot be told which of the last sample's rows the pipeline goes on with")
        return (Term(last, 0, (1.0,)),)

    # Inputs that are not made of values

    def _forms(
        self, events: Sequence[Event], reads: Sequence[_Read], operations: Sequence[Operation]
    ) -> tuple[tuple[Form, ...], list[tuple[tuple[Number, ...], ...]]]:
        """The forms of calls, and the values of each call in turn."""
        altered = self._altered_call()
        forms: dict[tuple[str, str | None], Form] = {}
        for event in events:
            if event.kind == "call" and event.form not in forms:
                forms[event.form] = self._form(event, events, reads, operations, altered)
        values = []
        calls = [[event for event in read.events if event.kind == "call"] for read in reads]
        for same in zip(*calls, strict=True):
            form = forms[same[0].form]
            values.append(
                tuple(
                    tuple(
                        _affine([self._number(event, argument, group) for event in same])
                        for group in range(form.groups if argument.batched else 1)
                    )
                    for argument in form.values
                )
            )
        return tuple(forms.values()), values

    def _form(
        self,
        first: Event,
        events: Sequence[Event],
        reads: Sequence[_Read],
        operations: Sequence[Operation],
        altered: Watch | None,
    ) -> Form:
        form, sample = first.form, self.shapes.samples[first.form]
        groups = self.groups(first)
        own = [event for event in events if event.kind == "call" and event.form == form]
        scaled = [[each for each in read.events if each.kind == "call" and each.form == form] for read in reads]
        others = [event for event in altered.events if event.form == form] if altered else []
        halves = self._halves(form, groups, operations)
        values, conditions = [], []
        for name, tensor in first.tensors.items():
            argument = _argument(name, tensor, first.rows)
            if name == sample:
                continue
            if any(name not in event.tensors for event in own):
                raise SamplingLoopError(f"{shown(name)} is given to some calls of {form[0]} and not to others")
            follows = any(not _equal(tensor, event.tensors[name]) for event in own)
            follows |= any(not _equal(calls[0].tensors[name], scaled[0][0].tensors[name]) for calls in scaled[1:])
            if follows:
                values.append(argument)
                continue
            other = others[0].tensors.get(name) if others else None
            conditions.append(self._condition(argument, tensor, other, groups, halves))
        given = _argument(sample, first.tensors[sample], first.rows)
        views = self.shapes.views
        return Form(
            form[0], form[1], groups, given, views.get(("input", form)), first.shape, views.get(("output", form)),
            tuple(values), tuple(conditions),
        )  # fmt: skip

    def _condition(
        self, argument: Argument, tensor: Tensor, other: Tensor | None, groups: int, halves: Sequence[str]
    ) -> Condition:
        images = self.shapes.images
        parts = tensor.chunk(groups) if argument.batched else (tensor,)
        comparable = other is not None and other.shape == tensor.shape
        others = (other.chunk(groups) if argument.batched else (other,)) if other is not None and comparable else None
        rows = []
        for group, part in enumerate(parts):
            fixed = others is not None and _equal(part, others[group])
            row = part[0] if argument.batched else part
            alike = not argument.batched or all(_equal(part[image], row) for image in range(images))
            small = fixed and alike and row.numel() <= SMALL
            numbers = tuple(float(number) for number in row.flatten().tolist()) if small else None
            rows.append(ConditionRow(halves[group] if argument.batched else halves[0], fixed, numbers))
        return Condition(argument, tuple(rows))

    def _halves(self, form: tuple[str, str | None], groups: int, operations: Sequence[Operation]) -> tuple[str, ...]:
        """Which half each group is: of two, the conditional one is that which counts for nothing at a scale of 0."""
        if groups == 1:
            return (form[1] or "cond",)
        numbers = tuple(map(str, range(groups)))
        if groups != 2:
            return numbers
        half = guidance_of(self.pipe).conditional_half
        for index, call in enumerate(operations):
            if not isinstance(call, Call):
                continue
            for later in operations[index + 1 :]:
                if not isinstance(later, (Clamp, Sample)):
                    continue
                factors = {term.group: term.factor for each in later.inputs for term in each if term.value == index}
                if set(factors) == {0, 1} and all(len(factor) > 1 for factor in factors.values()):
                    gone = [abs(factors[group][0]) < 1e-3 * abs(factors[group][1]) for group in (0, 1)]
                    if sum(gone) == 1:
                        half = gone.index(True)
                break
            break
        return numbers if half is None else ("cond", "uncond") if half == 0 else ("uncond", "cond")

    def _number(self, event: Event, argument: Argument, group: int) -> float:
        """What fills a group's rows of an input that follows the schedule."""
        tensor = event.tensors[argument.name]
        images = self.shapes.images
        if tensor.numel() != math.prod(argument.shape) * (event.rows if argument.batched else 1):
            raise SamplingLoopError(f"{shown(argument.name)} has other sizes at step {event.step} than before")
        rows = tensor[group * images : (group + 1) * images] if argument.batched else tensor
        number = float(rows.flatten()[0])
        if not bool((rows == rows.flatten()[0]).all()):
            raise SamplingLoopError(
                f"{shown(argument.name)} follows the schedule and holds several numbers; only one for an image can be "
                "written down"
            )
        return number

    def conditioning(self, program: Program, events: Sequence[Event], images: int) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        for event in events:
            form = next((each for each in program.forms if (each.model, each.branch) == event.form), None)
            if event.kind != "call" or form is None:
                continue
            for condition in form.conditions:
                tensor = event.tensors[condition.argument.name]
                parts = tensor.split(images) if condition.argument.batched else (tensor,)
                for row, part in zip(condition.rows, parts, strict=True):
                    half = found.setdefault(row.half, {})
                    if not _equal(half.setdefault(condition.argument.name, part), part):
                        raise SamplingLoopError(
                            f"{shown(condition.argument.name)} of the {row.half} half differs between the models of "
                            f"{type(self.pipe).__name__}; only one for all can be written down"
                        )
        return found

    # Other calls

    def _altered_call(self) -> Watch | None:
        """A call with another prompt or label, to see what follows it; None where nothing can be altered."""
        inputs = {name: _altered(name, value) for name, value in self.inputs.items()}
        if all(inputs[name] is self.inputs[name] for name in inputs):
            return None
        return self.filled(lambda event, rows, shape: torch.zeros(rows, *shape), inputs=inputs)

    def _any_number(self, program: Program) -> int | None:
        """None if a call of twice the images follows the program too, else the number it was probed with."""
        images = self.shapes.images
        for inputs in _doubled(self.inputs, self.parameters):
            with suppress(ValueError, RuntimeError, DifaError):  # whatever the pipeline has against it
                self._verified(program, inputs, 2 * images)
                return None
        return images

    def _lowered(self, program: Program, base: Mapping[str, float]) -> Program:
        """Scales that may be 1 and less as well, since they are only an input of the model."""
        found = []
        for index, scale in enumerate(program.scales):
            at = {**base, scale.name: UNGUIDED_AT}
            try:
                read = self.read(at, None)
            except (NotLinearError, SamplingLoopError):
                read = None
            values = [UNGUIDED_AT if place == index else PROBED_AT[0] for place in range(len(program.scales))]
            same = read is not None and _agrees(program, read, values)
            found.append(replace(scale, above=None) if same else scale)
        return replace(program, scales=tuple(found))

    # Is it right?

    def _verified(self, program: Program, inputs: Mapping[str, Any], images: int | None = None) -> float:
        """The largest error of replays on random data, at the scales of the call and at two further ones."""
        choices: list[dict[str, float]] = [{}]
        if program.scales:
            choices = [{scale.name: at for scale in program.scales} for at in VERIFIED_AT]
        worst = 0.0
        for scales in choices:
            error, rounding = self._difference(program, inputs, images or self.shapes.images, scales)
            allowed = min(max(ROUNDINGS * rounding, LEAST), MOST)
            if not error <= allowed:
                raise self._wrong(error, allowed)
            worst = max(worst, error)
        return worst

    def _difference(
        self, program: Program, inputs: Mapping[str, Any], images: int, scales: Mapping[str, float]
    ) -> tuple[float, float]:
        """:func:`difa_compile.exporting.verifying.differences` from a call on random data."""
        calls: list[Event] = []

        def value(event: Event, given: Callable[[], Any] | None) -> Any:
            if event.kind != "call":
                return None
            calls.append(event)
            event.tensors = {name: tensor.clone() for name, tensor in event.tensors.items()}
            template, sample = self.shapes.templates[event.form], self.shapes.samples[event.form]
            like = first_tensor(template, "sample")
            event.rows, event.shape = len(event.tensors[sample]), tuple(like.shape[1:])
            made = stand_in(len(calls), sample, event.shape, event.tensors)
            return with_first(template, made.to(like.device, wide(like.dtype)), "sample")

        watch = self.watch(value, scales=scales, inputs=inputs, seed=SEED)
        chosen = {scale.name: scales[scale.name] for scale in program.scales}
        last = next(event for event in reversed(watch.events) if event.kind == "sample").tensors["output"]
        term = program.final[0]
        from_last = len(program.final) == 1 and isinstance(program.operations[term.value], Sample)
        latents = last[term.group * images :][:images] if from_last else watch.result
        assert latents is not None
        return differences(program, calls, latents, self.conditioning(program, calls, images), images, chosen)


# --- parts -----------------------------------------------------------------------------------------------------------


def _check_config(scheduler: Any) -> None:
    config = getattr(scheduler, "config", {})
    if not isinstance(config, Mapping):
        return
    name = type(scheduler).__name__
    if config.get("thresholding") is True:
        raise NotLinearError(f"{name} uses dynamic thresholding, {NO_TABLE}; switch thresholding off")


_REMEDY = "use another scheduler, or leave out options that rescale or normalise guidance"


def _why_not_linear(pipe: Any) -> str:
    """A scheduler by name, and what of its settings may be the reason."""
    config = getattr(pipe.scheduler, "config", {})
    variance = str(config.get("variance_type", "")) if isinstance(config, Mapping) else ""
    learned = f" (variance_type={quoted(variance)}: a learned variance)" if variance.startswith("learned") else ""
    return f"{type(pipe.scheduler).__name__} is not linear{learned}"


def _check_same(wanted: Sequence[Event], found: Sequence[Event], by: str) -> None:
    def told(events: Sequence[Event]) -> list[Any]:
        return [(event.kind, event.rows, event.shape, event.told, event.step, event.form) for event in events]

    if told(wanted) != told(found):
        raise NotLinearError(f"which calls, draws and clamps the loop makes depends on {by}, so no list can hold them")


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


def _argument(name: str, tensor: Tensor, rows: int) -> Argument:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise SamplingLoopError(f"the input {shown(name)} is of the dtype {dtype}, which no program holds")
    batched = tensor.ndim > 0 and len(tensor) == rows
    return Argument(name, dtype, tuple(tensor.shape[1:] if batched else tensor.shape), batched)


def _affine(found: Sequence[float]) -> Number:
    """``base + slope_1 * scale_1 + ...`` through what was found at the first scales, and with one of them moved."""
    low, high = PROBED_AT
    slopes = [(moved - found[0]) / (high - low) for moved in found[1:]]
    number = [found[0] - sum(slope * low for slope in slopes), *slopes]
    return trimmed(number)


def _combined(reads: Sequence[_Read], key: tuple[int, int]) -> Combination:
    found = [read.factors.get(key, {}) for read in reads]
    sources = sorted(set().union(*found))
    return tuple(Term(*source, _affine([each.get(source, 0.0) for each in found])) for source in sources)


def _same_read(one: _Read, other: _Read) -> bool:
    if one.factors != other.factors or one.final != other.final:
        return False
    pairs = zip(one.events, other.events, strict=True)
    return all(
        _equal(tensor, b.tensors[name]) for a, b in pairs if a.kind == "call" for name, tensor in a.tensors.items()
    )


def _agrees(program: Program, read: _Read, scales: Sequence[float]) -> bool:
    """Whether a probe at other scales found what the program says of them."""
    if len(read.events) != len(program.operations):
        return False
    for number, (event, operation) in enumerate(zip(read.events, program.operations, strict=True)):
        if isinstance(operation, Draw):
            continue
        for group, combination in enumerate(operation.inputs):
            said = {(term.value, term.group): value_of(term.factor, scales) for term in combination}
            found = read.factors.get((number, group), {})
            if any(abs(said.get(key, 0.0) - found.get(key, 0.0)) > 1e-5 for key in {*said, *found}):
                return False
        if isinstance(operation, Call):
            form = program.forms[operation.form]
            if event.form != (form.model, form.branch):
                return False
            for argument, numbers in zip(form.values, operation.values, strict=True):
                first = float(event.tensors[argument.name].flatten()[0])
                if abs(value_of(numbers[0], scales) - first) > 1e-5 * (1 + abs(first)):
                    return False
    return True


def _altered(name: str, value: Any) -> Any:
    """Another prompt or label; the very same object where it is neither."""
    if isinstance(value, Tensor):
        return value + 1 if "embeds" in name and value.is_floating_point() else value
    if isinstance(value, str):
        return ("a" if value != "a" else "b") if "prompt" in name else value
    if isinstance(value, (list, tuple)) and value:
        if all(isinstance(item, str) for item in value):
            return [_altered(name, item) for item in value] if "prompt" in name else value
        if "label" in name and all(isinstance(item, int) for item in value):
            return [item - 1 if item > 0 else item + 1 for item in value]
    return value


def _doubled(inputs: Mapping[str, Any], parameters: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments for twice the images, in the ways in which pipelines are asked for them."""
    for name in ("num_images_per_prompt", "num_videos_per_prompt"):
        if name in parameters:
            yield {**inputs, name: 2 * int(inputs.get(name) or 1)}
    given = {name: value for name, value in inputs.items() if "prompt" in name or "label" in name}
    texts = {name: [value, value] for name, value in given.items() if isinstance(value, str)}
    lists = {name: [*value, *value] for name, value in given.items() if isinstance(value, (list, tuple))}
    if texts or lists:
        yield {**inputs, **texts, **lists}
