"""The sampling loop of a pipeline as data: which call of which model comes when, and what is made of what it gives.

A :class:`Program` is a list of operations, each of which makes a value: noise is drawn, a model is called, a clamp, a
sample of the scheduler. What goes into one is a linear combination of values that were made before, with factors that
are affine in the guidance scales. :func:`difa_compile.exporting.probing.probe` writes one down and :func:`replay`
carries it out, in plain torch, with no scheduler and no pipeline.

Values are batches of *rows*: ``groups * images`` of them, row ``group * images + image``. Groups are what guidance
makes of one image in a batched call (its conditional and its unconditional half); images never mix. The elements of a
row are in one order for all values, that of the pipeline's latents; where a draw or a model has another one, a
:class:`View` says where the latents' elements stand in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from difa_compile.errors import ProgramFormatError, ReplayError, SamplingCancelledError
from difa_compile.files.documents import Format, Unfit, as_list, as_number, as_object, as_text, as_whole, kind
from difa_compile.wording import quoted, shown

PROGRAM = Format(
    name="sampling program",
    version_key="schema_version",
    version=1,
    keys=(
        "pipeline",
        "scheduler",
        "steps",
        "images",
        "shape",
        "scales",
        "baked",
        "forms",
        "operations",
        "final",
        "error",
    ),
    most_bytes=2**28,
    damaged=ProgramFormatError,
    other_version=ProgramFormatError,
    edited=ProgramFormatError,
    where_from="say where it is",
    again="export the pipeline again",
)

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
"""What tensors of a program can be, by name."""

MOST_ELEMENTS = 2**40
"""Of one row: more is damage."""
MOST_GROUPS = 64


Number = tuple[float, ...]
"""``base + slope_1 * scale_1 + ...``, in the order of the program's scales; slopes that are 0 at the end are left out.
Of nothing is 0."""


def value_of(number: Number, scales: Sequence[float]) -> float:
    """What an affine number is for these guidance scales."""
    return math.fsum(factor * scale for factor, scale in zip(number, (1.0, *scales), strict=False))


@dataclass(frozen=True)
class View:
    """Where the elements of the latents' row stand in the row of another tensor.

    ``other.flatten().as_strided(sizes, strides, offset).reshape(latents)``. The sample that a model is given is the
    other way round: its row is ``latents.flatten().as_strided(...)`` in the shape of the model's input.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @classmethod
    def of(cls, place: Tensor) -> View | None:
        """That which shows element ``place[i]`` at position i; None where no sizes and strides do."""
        total, offset = place.numel(), int(place[0])
        moved = (place - offset).tolist()
        sizes: list[int] = []
        strides: list[int] = []
        block = 1
        while block < total:
            stride, count = moved[block], 2
            while (count + 1) * block <= total and moved[count * block] == count * stride:
                count += 1
            while total % (block * count):
                count -= 1
            sizes.insert(0, count)
            strides.insert(0, stride)
            block *= count
        view = cls(tuple(sizes) or (1,), tuple(strides) or (1,), offset)
        if min((*view.strides, offset)) < 0:
            return None
        return view if torch.equal(view.take(torch.arange(view.last + 1).unsqueeze(0))[0], place) else None

    @property
    def last(self) -> int:
        """The furthest element that it reads."""
        return self.offset + sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))

    def take(self, rows: Tensor) -> Tensor:
        """``(rows, elements)`` of the one tensor as ``(rows, elements)`` of the other."""
        rows = rows.contiguous()
        each = rows.stride(0)
        seen = rows.as_strided((len(rows), *self.sizes), (each, *self.strides), rows.storage_offset() + self.offset)
        return seen.reshape(len(rows), -1)


@dataclass(frozen=True)
class Argument:
    """A tensor that a model is given, by its name in the call: ``timestep``, ``added_cond_kwargs.resolution``.

    ``shape`` is that of a row if it is ``batched``, else of the whole tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    batched: bool = True


@dataclass(frozen=True)
class ConditionRow:
    """What a group's rows of a condition hold.

    ``half``: ``cond`` or ``uncond``, or the group's number where nothing tells which half it is. ``fixed``: it did not
    change with the pipeline's prompt or label. ``numbers``: if it is fixed and small, what it holds, one number for
    each element of a row; such a row need not be given to :func:`replay`.
    """

    half: str
    fixed: bool = False
    numbers: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Condition:
    """A tensor that is the same in all calls of a form: embedded text, labels, masks, positions.

    ``rows``: one for each group if it is batched, else one.
    """

    argument: Argument
    rows: tuple[ConditionRow, ...]


@dataclass(frozen=True)
class Form:
    """What the calls of one model in one branch have in common.

    ``model``: the component's name. ``branch``: of guidance in two calls, None in a batched one. ``sample``: the input
    that is made of values; ``sample_view`` and ``output_view`` where rows of the model lie otherwise than the latents.
    ``output``: shape of a row of what the model gives. ``values``: inputs that follow the schedule.
    """

    model: str
    branch: str | None
    groups: int
    sample: Argument
    sample_view: View | None
    output: tuple[int, ...]
    output_view: View | None
    values: tuple[Argument, ...]
    conditions: tuple[Condition, ...]


@dataclass(frozen=True)
class Term:
    """``factor`` times a group's rows of the value that operation number ``value`` made."""

    value: int
    group: int
    factor: Number


Combination = tuple[Term, ...]
"""The sum of terms; of none, zeros."""


@dataclass(frozen=True)
class Draw:
    """``torch.randn((groups * images, *shape), dtype=dtype)``; ``seeded``: with the call's generator, else with torch's
    own. In the order of the operations the draws are those of the pipeline."""

    groups: int
    shape: tuple[int, ...]
    dtype: str
    seeded: bool
    view: View | None = None


@dataclass(frozen=True)
class Call:
    """A call of a model, at a step and in a branch of the plan. ``inputs``: a combination for each group.

    ``values``: for each of the form's values a number per group (or one, if it is not batched), which fills the row.
    """

    form: int
    step: int
    inputs: tuple[Combination, ...]
    values: tuple[tuple[Number, ...], ...]

    @property
    def groups(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Clamp:
    """Combinations, one for each group, clamped to ``low`` and ``high`` (None: not on that side)."""

    inputs: tuple[Combination, ...]
    low: float | None
    high: float | None

    @property
    def groups(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Sample:
    """What the scheduler makes of a step: combinations, one for each group."""

    inputs: tuple[Combination, ...]

    @property
    def groups(self) -> int:
        return len(self.inputs)


Operation = Draw | Call | Clamp | Sample


@dataclass(frozen=True)
class Scale:
    """A guidance scale, by its name among the pipeline's arguments, and what it was in the call that was probed.

    ``above``: it can only be chosen above this number, None for any; at 1 and below pipelines leave guidance out.
    """

    name: str
    value: float
    above: float | None = None


@dataclass(frozen=True)
class Program:
    """The sampling loop of one pipeline for one number of steps, size and form of guidance.

    ``steps``: calls of the scheduler. ``images``: how many at once, None for any number. ``shape``: of a row of the
    latents. ``scales``: what stays free; ``baked``: guidance scales that hold as they were probed. ``final``: the
    latents that come out, for the first step of all that follows. ``error``: the largest difference of a replay on
    random data from the pipeline's own loop, relative to the largest value, over all inputs of the models.

    Raises :class:`ProgramFormatError` where it contradicts itself: values before they are made, groups that are not
    there, shapes that do not go together.
    """

    pipeline: str
    scheduler: str
    steps: int
    images: int | None
    shape: tuple[int, ...]
    scales: tuple[Scale, ...]
    baked: tuple[Scale, ...]
    forms: tuple[Form, ...]
    operations: tuple[Operation, ...]
    final: Combination
    error: float

    def __post_init__(self) -> None:
        try:
            _check(self)
        except Unfit as unfit:
            raise ProgramFormatError(f"the sampling program cannot be used: {unfit}; {PROGRAM.again}") from unfit

    @property
    def elements(self) -> int:
        """Of a row of the latents."""
        return math.prod(self.shape)

    @property
    def calls(self) -> tuple[Call, ...]:
        return tuple(each for each in self.operations if isinstance(each, Call))

    @property
    def draws(self) -> tuple[Draw, ...]:
        return tuple(each for each in self.operations if isinstance(each, Draw))

    @cached_property
    def last_uses(self) -> dict[int, tuple[int, ...]]:
        """After which operation which values are read no more."""
        last = {index: index for index in range(len(self.operations))}
        for index, operation in enumerate(self.operations):
            for combination in _combinations(operation):
                last.update((term.value, index) for term in combination)
        kept = {term.value for term in self.final}
        found: dict[int, list[int]] = {}
        for value, index in last.items():
            if value not in kept:
                found.setdefault(index, []).append(value)
        return {index: tuple(values) for index, values in found.items()}

    def to_json(self) -> dict[str, Any]:
        """A document that JSON can hold: version, digest, and everything there is."""
        return PROGRAM.frame(_content(self))

    @classmethod
    def from_json(cls, document: object, where: object = "in a bundle") -> Program:
        """Read what :meth:`to_json` made. ``where`` names it in messages. Raises :class:`ProgramFormatError`."""
        with PROGRAM.reading(where):
            fields = as_object(document, "", (PROGRAM.version_key, "digest", *PROGRAM.keys))
            if as_whole(fields[PROGRAM.version_key], PROGRAM.version_key) != PROGRAM.version:
                raise Unfit(f"its schema version is {shown(fields[PROGRAM.version_key])}, not {PROGRAM.version}")
            as_text(fields["digest"], "digest")
            program = _program(fields)
        PROGRAM.check_digest(fields, _content(program), where)
        return program


# --- carrying it out -------------------------------------------------------------------------------------------------

Noise = torch.Generator | Callable[[Draw, int], Tensor]
"""A generator, or a function of a draw and the number of images that gives ``(groups * images, *shape)``."""


def replay(
    program: Program,
    noise: Noise,
    conditioning: Mapping[str, Mapping[str, Tensor]],
    call: Callable[[Form, Call, dict[str, Tensor]], Tensor],
    *,
    images: int = 1,
    scales: Mapping[str, float] | None = None,
    callback: Callable[[int, int, Tensor], bool | None] | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Carry out a program; the final latents, ``(images, *program.shape)``, float32.

    ``noise``: a generator draws what the pipeline would draw with it, number by number, and draws of the pipeline that
    take no generator come from torch's own. ``conditioning[half][name]``: ``(images, *shape)``, or the whole tensor of
    what is not batched; what has numbers of its own need not be given. ``call(form, call, inputs)`` runs a model: its
    inputs by name, rows of all groups one after the other; it returns ``(groups * images, *form.output)``.
    ``scales``: guidance scales other than those probed. ``dtype``: in which combinations are added up and kept.
    ``callback(step, steps, latents)`` is called after each step of the scheduler with the latents as they are,
    ``(images, *shape)``; if it returns ``False``, sampling ends.

    Raises :class:`ReplayError` for conditions, scales, noise or outputs that do not fit, before anything is run where
    that can be told, and :class:`SamplingCancelledError`.
    """
    if images < 1 or program.images not in (None, images):
        wanted = "at least one" if program.images is None else f"exactly {program.images}"
        raise ReplayError(f"{images} images are asked for, but the program makes {wanted} at once")
    guidance = _scales(program, scales or {})
    state = _State(program, images, guidance, dtype, torch.device(device))
    conditions = [_conditions(form, conditioning, images, state.device) for form in program.forms]
    values: dict[int, Tensor] = {}
    step = 0
    for index, operation in enumerate(program.operations):
        if isinstance(operation, Draw):
            values[index] = state.drawn(operation, noise)
        elif isinstance(operation, Call):
            form = program.forms[operation.form]
            inputs = {**state.inputs(form, operation, values), **conditions[operation.form]}
            values[index] = state.given(form, call(form, operation, inputs))
        else:
            made = state.combined(operation.inputs, values)
            values[index] = made.clamp(operation.low, operation.high) if isinstance(operation, Clamp) else made
            if isinstance(operation, Sample):
                step += 1
                preview = values[index].unflatten(0, (operation.groups, images))[_group(program, index)]
                if callback is not None and callback(step, program.steps, preview.unflatten(1, program.shape)) is False:
                    raise SamplingCancelledError(f"sampling was cancelled after step {step} of {program.steps}")
        for gone in program.last_uses.get(index, ()):
            del values[gone]
    final: Tensor = state.combined((program.final,), values).unflatten(1, program.shape)
    return final.float()


@dataclass(frozen=True)
class _State:
    """What stays the same while a program is carried out. Values are ``(groups * images, elements)``."""

    program: Program
    images: int
    scales: tuple[float, ...]
    dtype: torch.dtype
    device: torch.device

    def combined(self, inputs: Sequence[Combination], values: Mapping[int, Tensor]) -> Tensor:
        rows = torch.zeros(len(inputs), self.images, self.program.elements, dtype=self.dtype, device=self.device)
        for row, combination in zip(rows, inputs, strict=True):
            for term in combination:
                start = term.group * self.images
                source = values[term.value][start : start + self.images]
                row.add_(source, alpha=value_of(term.factor, self.scales))
        return rows.flatten(0, 1)

    def drawn(self, draw: Draw, noise: Noise) -> Tensor:
        shape = (draw.groups * self.images, *draw.shape)
        if isinstance(noise, torch.Generator):
            generator = noise if draw.seeded else None
            place = noise.device if draw.seeded else self.device
            found = torch.randn(shape, generator=generator, dtype=DTYPES[draw.dtype], device=place)
        else:
            found = noise(draw, self.images)
            if tuple(found.shape) != shape:
                raise ReplayError(f"noise of the shape {tuple(found.shape)} was given for a draw of {shape}")
        rows = found.to(self.device, self.dtype).flatten(1)
        return rows if draw.view is None else draw.view.take(rows)

    def inputs(self, form: Form, call: Call, values: Mapping[int, Tensor]) -> dict[str, Tensor]:
        sample = self.combined(call.inputs, values)
        if form.sample_view is not None:
            sample = form.sample_view.take(sample)
        found = {form.sample.name: sample.unflatten(1, form.sample.shape).to(DTYPES[form.sample.dtype])}
        for argument, numbers in zip(form.values, call.values, strict=True):
            filled = torch.tensor([value_of(number, self.scales) for number in numbers], dtype=torch.float64)
            if argument.batched:
                filled = filled.repeat_interleave(self.images).view(-1, *(1 for _ in argument.shape))
                filled = filled.expand(-1, *argument.shape)
            else:
                filled = filled[0].expand(argument.shape)
            found[argument.name] = filled.to(self.device, DTYPES[argument.dtype]).contiguous()
        return found

    def given(self, form: Form, output: Tensor) -> Tensor:
        shape = (form.groups * self.images, *form.output)
        if tuple(output.shape) != shape:
            raise ReplayError(f"{form.model} gave {tuple(output.shape)} where the program has {shape}")
        rows = output.to(self.device, self.dtype).flatten(1)
        return rows if form.output_view is None else form.output_view.take(rows)


def _group(program: Program, index: int) -> int:
    """The group of a sample that is shown: that which the final latents are made of."""
    operation = program.operations[index]
    shown_groups = {term.group for term in program.final}
    return min((group for group in shown_groups if group < operation.groups), default=0)


def _scales(program: Program, given: Mapping[str, float]) -> tuple[float, ...]:
    known = {scale.name: scale.value for scale in program.scales}
    for name, value in given.items():
        if name not in known:
            held = next((scale for scale in program.baked if scale.name == name), None)
            why = f"it is baked as {held.value:g}" if held else f"the program has {', '.join(known) or 'none'}"
            raise ReplayError(f"the guidance scale {quoted(name)} cannot be chosen: {why}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ReplayError(f"{name} is {quoted(value)}; give a finite number")
    for scale in program.scales:
        value = given.get(scale.name, scale.value)
        if scale.above is not None and not value > scale.above:
            raise ReplayError(
                f"{scale.name} is {value:g}; it must be above {scale.above:g}, since the calls are others where "
                "guidance is off: export the pipeline without guidance for that"
            )
    return tuple(float(given.get(name, value)) for name, value in known.items())


def _conditions(
    form: Form, given: Mapping[str, Mapping[str, Tensor]], images: int, device: torch.device
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for condition in form.conditions:
        argument = condition.argument
        shape = (images, *argument.shape) if argument.batched else argument.shape
        rows = []
        for row in condition.rows:
            tensor = given.get(row.half, {}).get(argument.name)
            if tensor is None and row.numbers is not None:
                tensor = torch.tensor(row.numbers, dtype=torch.float64).view(argument.shape).expand(shape)
            if tensor is None:
                raise ReplayError(f"{form.model} needs {argument.name} of the {row.half} half, and none is given")
            if tuple(tensor.shape) != shape:
                raise ReplayError(
                    f"{argument.name} of the {row.half} half has the shape {tuple(tensor.shape)}; it must be {shape}"
                )
            rows.append(tensor.to(device, DTYPES[argument.dtype]))
        found[argument.name] = torch.cat(rows) if argument.batched else rows[0]
    return found


# --- what must hold --------------------------------------------------------------------------------------------------


def _combinations(operation: Operation) -> tuple[Combination, ...]:
    return () if isinstance(operation, Draw) else operation.inputs


def _check(program: Program) -> None:
    """Raise :class:`Unfit` where a program contradicts itself."""
    if program.steps < 1:
        raise Unfit(f"steps is {program.steps}; it must be at least 1")
    if program.images is not None and program.images < 1:
        raise Unfit(f"images is {program.images}; it must be at least 1")
    _check_shape(program.shape, "shape")
    if not program.error >= 0 or math.isinf(program.error):
        raise Unfit(f"error is {program.error}; it must be finite and not negative")
    names = [scale.name for scale in (*program.scales, *program.baked)]
    if len(set(names)) < len(names):
        raise Unfit("a guidance scale stands there twice")
    for index, form in enumerate(program.forms):
        _check_form(form, program, f"forms[{index}]")
    keys = [(form.model, form.branch) for form in program.forms]
    if len(set(keys)) < len(keys):
        raise Unfit("forms has a model and branch twice")
    steps = 0
    for index, operation in enumerate(program.operations):
        where = f"operations[{index}]"
        if isinstance(operation, Draw):
            _check_groups(operation.groups, where)
            _check_shape(operation.shape, f"{where}.shape")
            _check_dtype(operation.dtype, where)
            _check_view(operation.view, operation.shape, program.shape, f"{where}.view")
            continue
        _check_groups(operation.groups, where)
        for combination in operation.inputs:
            _check_terms(combination, index, program, where)
        if isinstance(operation, Call):
            _check_call(operation, steps, program, where)
        elif isinstance(operation, Clamp):
            if operation.low is None and operation.high is None:
                raise Unfit(f"{where} clamps on neither side")
            if operation.low is not None and operation.high is not None and operation.low > operation.high:
                raise Unfit(f"{where} clamps to {operation.low} and {operation.high}, which cross")
        else:
            steps += 1
    if steps != program.steps:
        raise Unfit(f"steps is {program.steps}, but operations has {steps} samples")
    if not program.final:
        raise Unfit("final is empty")
    _check_terms(program.final, len(program.operations), program, "final")


def _check_form(form: Form, program: Program, where: str) -> None:
    _check_groups(form.groups, where)
    _check_shape(form.output, f"{where}.output")
    arguments = (form.sample, *form.values, *(condition.argument for condition in form.conditions))
    for argument in arguments:
        _check_shape(argument.shape, f"{where}: {shown(argument.name)}")
        _check_dtype(argument.dtype, where)
    if len({argument.name for argument in arguments}) < len(arguments):
        raise Unfit(f"{where} has an input twice")
    if not form.sample.batched:
        raise Unfit(f"{where}.sample is not batched")
    _check_view(form.sample_view, program.shape, form.sample.shape, f"{where}.sample_view")
    _check_view(form.output_view, form.output, program.shape, f"{where}.output_view")
    for condition in form.conditions:
        argument = condition.argument
        rows = form.groups if argument.batched else 1
        if len(condition.rows) != rows:
            raise Unfit(f"{where}: {shown(argument.name)} has {len(condition.rows)} rows; it must have {rows}")
        for row in condition.rows:
            if row.numbers is not None and (not row.fixed or len(row.numbers) != math.prod(argument.shape)):
                raise Unfit(f"{where}: {shown(argument.name)} has numbers that do not fill a fixed row")


def _check_call(call: Call, steps: int, program: Program, where: str) -> None:
    if not 0 <= call.form < len(program.forms):
        raise Unfit(f"{where}.form is {call.form}; there are {len(program.forms)} forms")
    if call.step != steps:
        raise Unfit(f"{where}.step is {call.step}, but {steps} samples stand before it")
    form = program.forms[call.form]
    if call.groups != form.groups:
        raise Unfit(f"{where} has {call.groups} groups; its form has {form.groups}")
    if len(call.values) != len(form.values):
        raise Unfit(f"{where} has {len(call.values)} values; its form has {len(form.values)}")
    for argument, numbers in zip(form.values, call.values, strict=True):
        if len(numbers) != (form.groups if argument.batched else 1):
            raise Unfit(f"{where} has {len(numbers)} numbers for {shown(argument.name)}")
        for number in numbers:
            _check_number(number, program, where)


def _check_terms(terms: Combination, before: int, program: Program, where: str) -> None:
    for term in terms:
        if not 0 <= term.value < before:
            raise Unfit(f"{where} reads value {term.value}, of which only {before} are made by then")
        groups = program.operations[term.value].groups
        if not 0 <= term.group < groups:
            raise Unfit(f"{where} reads group {term.group} of value {term.value}, which has {groups}")
        _check_number(term.factor, program, where)


def _check_number(number: Number, program: Program, where: str) -> None:
    if len(number) > 1 + len(program.scales):
        raise Unfit(f"{where} has a number with {len(number) - 1} slopes; there are {len(program.scales)} scales")
    if not all(math.isfinite(each) for each in number):
        raise Unfit(f"{where} has a number that is not finite")


def _check_shape(shape: tuple[int, ...], where: str) -> None:
    if any(size < 1 for size in shape) or len(shape) > 8 or math.prod(shape) > MOST_ELEMENTS:
        raise Unfit(f"{where} is {shown(list(shape))}; it must have at most 8 sizes of at least 1")


def _check_groups(groups: int, where: str) -> None:
    if not 1 <= groups <= MOST_GROUPS:
        raise Unfit(f"{where} has {shown(groups)} groups; there can be 1 to {MOST_GROUPS}")


def _check_dtype(dtype: str, where: str) -> None:
    if dtype not in DTYPES:
        raise Unfit(f"{where} has the dtype {quoted(dtype, 40)}; known are {', '.join(DTYPES)}")


def _check_view(view: View | None, source: tuple[int, ...], seen: tuple[int, ...], where: str) -> None:
    """A view must read within the row of ``source`` and give as many elements as ``seen`` has; none: equal shapes."""
    if view is None:
        if source != seen:
            raise Unfit(f"{where} is missing: {shown(list(source))} is to be seen as {shown(list(seen))}")
        return
    _check_shape(view.sizes, f"{where}.sizes")
    if len(view.strides) != len(view.sizes) or min((*view.strides, view.offset), default=0) < 0:
        raise Unfit(f"{where} must have a stride for each size, and no negative ones")
    if math.prod(view.sizes) != math.prod(seen) or view.last >= math.prod(source):
        raise Unfit(f"{where} does not show {shown(list(seen))} within {shown(list(source))}")


# --- as JSON ---------------------------------------------------------------------------------------------------------


def _content(program: Program) -> dict[str, Any]:
    return {
        "pipeline": program.pipeline,
        "scheduler": program.scheduler,
        "steps": program.steps,
        "images": program.images,
        "shape": list(program.shape),
        "scales": [_of_scale(scale) for scale in program.scales],
        "baked": [_of_scale(scale) for scale in program.baked],
        "forms": [_of_form(form) for form in program.forms],
        "operations": [_of_operation(operation) for operation in program.operations],
        "final": _of_combination(program.final),
        "error": program.error,
    }


def _of_scale(scale: Scale) -> dict[str, Any]:
    return {"name": scale.name, "value": scale.value, "above": scale.above}


def _of_form(form: Form) -> dict[str, Any]:
    return {
        "model": form.model,
        "branch": form.branch,
        "groups": form.groups,
        "sample": _of_argument(form.sample),
        "sample_view": _of_view(form.sample_view),
        "output": list(form.output),
        "output_view": _of_view(form.output_view),
        "values": [_of_argument(argument) for argument in form.values],
        "conditions": [
            {
                **_of_argument(condition.argument),
                "rows": [
                    {"half": row.half, "fixed": row.fixed, "numbers": None if row.numbers is None else [*row.numbers]}
                    for row in condition.rows
                ],
            }
            for condition in form.conditions
        ],
    }


def _of_argument(argument: Argument) -> dict[str, Any]:
    return {
        "name": argument.name,
        "dtype": argument.dtype,
        "shape": list(argument.shape),
        "batched": argument.batched,
    }


def _of_view(view: View | None) -> dict[str, Any] | None:
    if view is None:
        return None
    return {"sizes": list(view.sizes), "strides": list(view.strides), "offset": view.offset}


def _of_operation(operation: Operation) -> dict[str, Any]:
    if isinstance(operation, Draw):
        return {
            "op": "draw",
            "groups": operation.groups,
            "shape": list(operation.shape),
            "dtype": operation.dtype,
            "seeded": operation.seeded,
            "view": _of_view(operation.view),
        }
    inputs = [_of_combination(combination) for combination in operation.inputs]
    if isinstance(operation, Call):
        values = [[list(number) for number in numbers] for numbers in operation.values]
        return {"op": "call", "form": operation.form, "step": operation.step, "inputs": inputs, "values": values}
    if isinstance(operation, Clamp):
        return {"op": "clamp", "inputs": inputs, "low": operation.low, "high": operation.high}
    return {"op": "sample", "inputs": inputs}


def _of_combination(combination: Combination) -> list[list[Any]]:
    return [[term.value, term.group, *term.factor] for term in combination]


def _program(fields: Mapping[str, Any]) -> Program:
    images = fields["images"]
    return Program(
        as_text(fields["pipeline"], "pipeline"),
        as_text(fields["scheduler"], "scheduler"),
        as_whole(fields["steps"], "steps"),
        None if images is None else as_whole(images, "images"),
        _wholes(fields["shape"], "shape"),
        _scale_list(fields["scales"], "scales"),
        _scale_list(fields["baked"], "baked"),
        tuple(_form(item, f"forms[{i}]") for i, item in enumerate(as_list(fields["forms"], "forms"))),
        tuple(
            _operation(item, f"operations[{i}]") for i, item in enumerate(as_list(fields["operations"], "operations"))
        ),
        _combination(fields["final"], "final"),
        as_number(fields["error"], "error"),
    )


def _scale_list(value: object, where: str) -> tuple[Scale, ...]:
    found = []
    for index, item in enumerate(as_list(value, where)):
        place = f"{where}[{index}]"
        fields = as_object(item, place, ("name", "value", "above"))
        above = None if fields["above"] is None else as_number(fields["above"], f"{place}.above")
        name = as_text(fields["name"], f"{place}.name")
        found.append(Scale(name, as_number(fields["value"], f"{place}.value"), above))
    return tuple(found)


def _form(value: object, where: str) -> Form:
    keys = ("model", "branch", "groups", "sample", "sample_view", "output", "output_view", "values", "conditions")
    fields = as_object(value, where, keys)
    branch = fields["branch"]
    conditions = []
    for index, item in enumerate(as_list(fields["conditions"], f"{where}.conditions")):
        place = f"{where}.conditions[{index}]"
        parts = as_object(item, place, ("name", "dtype", "shape", "batched", "rows"))
        rows = as_list(parts["rows"], f"{place}.rows")
        argument = _argument({key: parts[key] for key in parts if key != "rows"}, place)
        conditions.append(
            Condition(argument, tuple(_condition_row(row, f"{place}.rows[{i}]") for i, row in enumerate(rows)))
        )
    values = as_list(fields["values"], f"{where}.values")
    return Form(
        as_text(fields["model"], f"{where}.model"),
        None if branch is None else as_text(branch, f"{where}.branch"),
        as_whole(fields["groups"], f"{where}.groups"),
        _argument(fields["sample"], f"{where}.sample"),
        _view(fields["sample_view"], f"{where}.sample_view"),
        _wholes(fields["output"], f"{where}.output"),
        _view(fields["output_view"], f"{where}.output_view"),
        tuple(_argument(item, f"{where}.values[{i}]") for i, item in enumerate(values)),
        tuple(conditions),
    )


def _condition_row(value: object, where: str) -> ConditionRow:
    fields = as_object(value, where, ("half", "fixed", "numbers"))
    numbers = fields["numbers"]
    return ConditionRow(
        as_text(fields["half"], f"{where}.half"),
        _truth(fields["fixed"], f"{where}.fixed"),
        None if numbers is None else _numbers(numbers, f"{where}.numbers"),
    )


def _argument(value: object, where: str) -> Argument:
    fields = as_object(value, where, ("name", "dtype", "shape", "batched"))
    return Argument(
        as_text(fields["name"], f"{where}.name"),
        as_text(fields["dtype"], f"{where}.dtype"),
        _wholes(fields["shape"], f"{where}.shape"),
        _truth(fields["batched"], f"{where}.batched"),
    )


def _view(value: object, where: str) -> View | None:
    if value is None:
        return None
    fields = as_object(value, where, ("sizes", "strides", "offset"))
    return View(
        _wholes(fields["sizes"], f"{where}.sizes"),
        _wholes(fields["strides"], f"{where}.strides"),
        as_whole(fields["offset"], f"{where}.offset"),
    )


_KEYS = {
    "draw": ("op", "groups", "shape", "dtype", "seeded", "view"),
    "call": ("op", "form", "step", "inputs", "values"),
    "clamp": ("op", "inputs", "low", "high"),
    "sample": ("op", "inputs"),
}


def _operation(value: object, where: str) -> Operation:
    name = value.get("op") if isinstance(value, dict) else None
    keys = _KEYS.get(name) if isinstance(name, str) else None
    if keys is None:
        raise Unfit(f"{where} is no operation; its op must be one of {', '.join(_KEYS)}")
    fields = as_object(value, where, keys)
    if name == "draw":
        return Draw(
            as_whole(fields["groups"], f"{where}.groups"),
            _wholes(fields["shape"], f"{where}.shape"),
            as_text(fields["dtype"], f"{where}.dtype"),
            _truth(fields["seeded"], f"{where}.seeded"),
            _view(fields["view"], f"{where}.view"),
        )
    listed = as_list(fields["inputs"], f"{where}.inputs")
    inputs = tuple(_combination(item, f"{where}.inputs[{i}]") for i, item in enumerate(listed))
    if name == "call":
        values = tuple(
            tuple(_numbers(number, f"{where}.values[{i}]") for number in as_list(item, f"{where}.values[{i}]"))
            for i, item in enumerate(as_list(fields["values"], f"{where}.values"))
        )
        form, step = as_whole(fields["form"], f"{where}.form"), as_whole(fields["step"], f"{where}.step")
        return Call(form, step, inputs, values)
    if name == "clamp":
        low, high = (
            None if fields[side] is None else as_number(fields[side], f"{where}.{side}") for side in ("low", "high")
        )
        return Clamp(inputs, low, high)
    return Sample(inputs)


def _combination(value: object, where: str) -> Combination:
    found = []
    for index, item in enumerate(as_list(value, where)):
        place = f"{where}[{index}]"
        source, group, *factor = as_list(item, place, at_least=2)
        found.append(Term(as_whole(source, place), as_whole(group, place), _numbers(factor, place)))
    return tuple(found)


def _numbers(value: object, where: str) -> tuple[float, ...]:
    return tuple(as_number(item, where) for item in as_list(value, where))


def _wholes(value: object, where: str) -> tuple[int, ...]:
    return tuple(as_whole(item, where) for item in as_list(value, where))


def _truth(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise Unfit(f"{where} is {kind(value)}; it must be true or false")
    return value
