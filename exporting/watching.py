"""One call of a pipeline, watched from outside: what is drawn, which models are called, what its scheduler returns.

Whatever happens in the call can be given another value, without the pipeline noticing; it is left as it was.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn, overrides
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from difa_compile.errors import NotLinearError, SamplingLoopError
from difa_compile.pipeline.schedule_follower import BRANCHES
from difa_compile.plan.guidance import guidance_of
from difa_compile.wording import shown

_RANDOM = {
    "randn_like", "rand", "rand_like", "randint", "randint_like", "normal", "bernoulli", "multinomial", "poisson",
    "normal_", "uniform_", "random_", "bernoulli_", "exponential_",
}  # fmt: skip


@dataclass
class Event:
    """What happened in a call of the pipeline: ``kind`` is draw, call, clamp or sample.

    ``rows``: of the value that it makes. ``shape``: of a row of it. ``told``: what else is to be the same in every
    call, compared with ``==``. ``tensors``: what went into it, by name.
    """

    kind: str
    rows: int
    shape: tuple[int, ...]
    told: tuple[Any, ...]
    tensors: dict[str, Tensor]
    number: int = 0
    step: int = 0
    form: tuple[str, str | None] = ("", None)


class Stop(BaseException):
    """Ends a call of the pipeline that is watched: where decoding begins, or where all is seen that was looked for."""


class Watch(TorchFunctionMode):
    """One call of a pipeline, watched.

    ``value(event, given)`` gives what stands in the place of an event's value, or None to leave it as it is;
    ``given()`` is what the model gives, or what was drawn. ``native``: in the dtypes of the pipeline; else half
    precision gives way to float32, in which factors can be read. ``memory``: of texts that were encoded, for calls to
    come. ``result``: what the pipeline returned, or was about to decode (``decoded``).
    """

    def __init__(
        self,
        pipe: Any,
        models: Mapping[str, nn.Module],
        value: Callable[[Event, Callable[[], Any] | None], Any],
        native: bool,
        memory: dict[Any, Any] | None = None,
    ) -> None:
        super().__init__()
        self.memory = {} if memory is None else memory
        self.native = native
        self.pipe, self.models, self.value = pipe, models, value
        self.events: list[Event] = []
        self.result: Tensor | None = None
        self.decoded = False
        self._steps = 0
        self._inside = self._busy = False
        self._context: list[str | None] = []
        self._unnamed = self._size = 0

    # What is seen

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        if self._busy:
            return function(*arguments, **options)
        name = getattr(function, "__name__", "")
        if function is torch.randn:
            return self._drawn(function, arguments, options)
        if name in _RANDOM:
            self._random(name)
        if self._inside and name in ("clamp", "clip", "clamp_", "clip_", "clamp_min", "clamp_max"):
            return self._clamped(function, name, arguments, options)
        if self._inside and name == "quantile":
            raise NotLinearError(f"{self._name} uses dynamic thresholding, {NO_TABLE}; switch thresholding off")
        return function(*arguments, **options)

    @property
    def _name(self) -> str:
        return type(self.pipe.scheduler).__name__

    def _as(self, like: Tensor, value: Tensor) -> Tensor:
        """On the device of ``like``, and in its dtype or, if factors are to be read, in one that holds them."""
        return value.to(like.device, like.dtype if self.native else wide(like.dtype))

    def _random(self, name: str) -> None:
        raise SamplingLoopError(
            f"{self._name} or {type(self.pipe).__name__} draws by torch's {name}, whose numbers cannot be drawn again "
            "outside; use a scheduler that draws with torch.randn"
        )

    def _add(self, event: Event, given: Callable[[], Any] | None = None) -> Any:
        event.number, event.step = len(self.events), self._steps
        self.events.append(event)
        self._busy = True  # what is done to find the value is not the pipeline's doing
        try:
            return self.value(event, given)
        finally:
            self._busy = False

    def _drawn(self, function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        made = function(*arguments, **options)
        if made.ndim < 2:
            return made
        told = (str(made.dtype).removeprefix("torch."), options.get("generator") is not None)
        event = Event("draw", len(made), tuple(made.shape[1:]), told, {})
        found = self._add(event, lambda: made)
        return self._as(made, made if found is None else found)

    def _clamped(self, function: Any, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        bound = dict(zip(("input", "min", "max"), arguments, strict=False))
        bound.update({{"self": "input"}.get(key, key): value for key, value in options.items()})
        given = bound["input"]
        if name == "clamp_max":
            bound["max"] = bound.pop("min", bound.get("max"))
        if given.numel() != self._size or not given.is_floating_point():  # a number of the schedule
            return function(*arguments, **options)
        low, high = bound.get("min"), bound.get("max")
        if any(isinstance(each, Tensor) and each.numel() > 1 for each in (low, high)):
            raise NotLinearError(f"{self._name} uses dynamic thresholding, {NO_TABLE}; switch thresholding off")
        told = tuple(None if each is None else float(each) for each in (low, high))
        found = self._add(Event("clamp", len(given), tuple(given.shape[1:]), told, {"input": given}))
        return function(*arguments, **options) if found is None else self._as(given, found)

    def _stepped(self, original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        given = inspect.signature(original).bind(*arguments, **options).arguments.get("sample")
        self._size = given.numel() if isinstance(given, Tensor) else 0
        self._inside = True
        try:
            made = original(*arguments, **options)
        finally:
            self._inside = False
        previous = first_tensor(made, "prev_sample")
        tensors = {"output": previous}
        if isinstance(given, Tensor):
            tensors["given"] = given
        event = Event("sample", len(previous), tuple(previous.shape[1:]), (), tensors)
        found = self._add(event)
        self._steps += 1
        self._unnamed = 0
        return made if found is None else with_first(made, self._as(previous, found), "prev_sample")

    def _called(self, name: str, original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        bound = inspect.signature(original).bind(*arguments, **options).arguments
        tensors: dict[str, Tensor] = {}
        plain: list[Any] = []
        for key, value in bound.items():
            _flatten(key, value, tensors, plain)
        event = Event("call", 0, (), tuple(plain), tensors, form=(name, self._branch()))
        return self._add(event, lambda: original(*arguments, **options))

    def _branch(self) -> str | None:
        if self._context:
            return self._context[-1]
        self._unnamed += 1
        known = guidance_of(self.pipe)
        if known.form == "two-call" and (known.conditional_first or self._unnamed > 1):
            return "cond" if self._unnamed == 1 else "uncond"
        return None if self._unnamed == 1 else "uncond"

    # Where it is put

    @contextmanager
    def _branch_named(self, name: str, *_: Any, **__: Any) -> Iterator[None]:
        self._context.append(BRANCHES.get(name))
        try:
            yield
        finally:
            self._context.pop()

    def _decoded(self, latents: Tensor, *_: Any, **__: Any) -> NoReturn:
        self.result, self.decoded = latents, True
        raise Stop

    def run(self, arguments: Mapping[str, Any]) -> None:
        """Call the pipeline with what is watched in place; it is taken off again whatever happens."""
        scheduler = self.pipe.scheduler
        with ExitStack() as stack:
            for name, model in self.models.items():
                put(stack, model, "forward", functools.partial(self._called, name, model.forward), model.forward)
                if callable(getattr(model, "cache_context", None)):
                    put(stack, model, "cache_context", self._branch_named, None)
            put(stack, scheduler, "step", functools.partial(self._stepped, scheduler.step), scheduler.step)
            for component in getattr(self.pipe, "components", {}).values():
                if isinstance(component, nn.Module) and callable(getattr(component, "decode", None)):
                    put(stack, component, "decode", self._decoded, None)
            encode = getattr(self.pipe, "encode_prompt", None)
            if callable(encode):  # what takes longest of a call without its transformer
                put(stack, self.pipe, "encode_prompt", functools.partial(_remembered, self.memory, encode), encode)
            stack.enter_context(quiet(self.pipe))
            stack.enter_context(torch.no_grad())
            stack.enter_context(self)
            with suppress(Stop):
                self.result = _result(self.pipe(**arguments))


NO_TABLE = "which is not linear in the model's outputs, so no table of factors says what it does"


def put(stack: ExitStack, owner: Any, name: str, new: Callable[..., Any], original: Callable[..., Any] | None) -> None:
    """Put a function in the place of a method of one object, until the stack is left."""
    if original is not None:  # pipelines look at what arguments it takes
        functools.update_wrapper(new, original)
    before = owner.__dict__.get(name)
    owner.__dict__[name] = new

    def take_off() -> None:
        if before is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before

    stack.callback(take_off)


@contextmanager
def untraced() -> Iterator[None]:
    """Within this block a tracer sees nothing, and tensors are real."""
    modes = []
    while torch._C._len_torch_function_stack():
        modes.append(overrides._pop_mode())
    try:
        with _disable_current_modes():
            yield
    finally:
        for mode in reversed(modes):
            overrides._push_mode(mode)


class Outputs(tuple[Any, ...]):
    """What models and schedulers return, as a tuple or with names: every name is the first."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0]


def _remembered(memory: dict[Any, Any], original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a function gave for the very same arguments."""

    def told(value: Any) -> Any:
        return ("by identity", id(value)) if isinstance(value, (Tensor, nn.Module)) else repr(value)

    key = (tuple(map(told, arguments)), tuple((name, told(value)) for name, value in sorted(options.items())))
    if key not in memory:
        memory[key] = original(*arguments, **options), (arguments, options)  # kept, so that no other has its identity
    return memory[key][0]


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Within this block the pipeline shows no progress bar."""
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    if not hasattr(pipe, "set_progress_bar_config"):
        yield
        return
    pipe.set_progress_bar_config(**{**bar, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**bar)


def first_tensor(value: Any, name: str) -> Tensor:
    found = value if isinstance(value, Tensor) else getattr(value, name, None)
    if found is None:
        found = value[0] if isinstance(value, (tuple, list)) else next(iter(value.values()))
    if not isinstance(found, Tensor):
        raise SamplingLoopError(f"a tensor was expected as {name}, and there is {shown(type(found).__name__)}")
    return found


def with_first(value: Any, tensor: Tensor, name: str) -> Any:
    """``value`` with its first tensor exchanged."""
    if isinstance(value, Tensor):
        return tensor
    if isinstance(value, (tuple, list)):
        return (tensor, *value[1:])
    names = list(value.keys())
    return type(value)(**{**value, name if name in names else names[0]: tensor})


def _result(output: Any) -> Tensor | None:
    found = output[0] if isinstance(output, (tuple, list)) else next(iter(output.values()), None)
    return found if isinstance(found, Tensor) else None


def _flatten(name: str, value: Any, tensors: dict[str, Tensor], plain: list[Any]) -> None:
    """The tensors of an argument by their names (``added_cond_kwargs.resolution``), and what else stands there."""
    if isinstance(value, Tensor):
        tensors[name] = value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(f"{name}.{key}", item, tensors, plain)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _flatten(f"{name}.{index}", item, tensors, plain)
    elif value is not None and isinstance(value, (bool, int, float, str)):
        plain.append((name, value))


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
