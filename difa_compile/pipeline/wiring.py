"""Attaching a run to a diffusers pipeline, in place and reversibly.

Three objects are touched, each on the instance only:

1. the pipeline and its scheduler get a subclass of their class with the same name, which opens a
   :class:`~difa_compile.pipeline.schedule_follower.ScheduleFollower` around ``__call__`` and tells it of the
   scheduler's methods. Copies and pickles are of the original class;
2. each transformer's compiled call becomes a dispatcher: within a call of a wired pipeline it runs that pipeline's
   compiled forward, otherwise the forward as it was. So pipelines may share a transformer or a scheduler;
3. the transformer's ``cache_context``, if it has one, also names the branch of the run.

Which call is in progress is held per thread (a context variable), never on the shared objects.

Between the pipeline's ``__call__`` and what Dynamo compiled there is one frame of this package on the stack, the
dispatcher's; what else is to be done is done in functions that have returned by then.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from difa_compile.backend.current import enter, in_progress, leave
from difa_compile.backend.run import is_sampled
from difa_compile.errors import UnsupportedPipelineError
from difa_compile.pipeline.compiled_forward import CompiledForward
from difa_compile.pipeline.module_hooks import check_hooks, is_hooked
from difa_compile.pipeline.schedule_follower import ScheduleFollower


@dataclass(frozen=True)
class _Call:
    """A call of a wired pipeline that is in progress in this thread."""

    wiring: Wiring
    follower: ScheduleFollower


class _Unwired:
    """What is in progress in a thread within :func:`unwired`."""


_UNWIRED: Final = _Unwired()
_lock = threading.RLock()
_wirings: weakref.WeakKeyDictionary[Any, Wiring] = weakref.WeakKeyDictionary()
_scheduler_users: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_wired_classes: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()


def wiring_of(pipe: object) -> Wiring | None:
    """The wiring that ``pipe`` carries, if any."""
    try:
        return _wirings.get(pipe)
    except TypeError:  # not hashable or not weakly referable: nothing we could have wired
        return None


@contextmanager
def unwired() -> Iterator[None]:
    """Within this block, in this thread, wired pipelines and transformers run as they are without a plan."""
    enter(_UNWIRED)
    try:
        yield
    finally:
        leave(_UNWIRED)


class Wiring:
    """One pipeline connected to its transformers, each through a compiled forward of its own.

    ``compiled``: by transformer, what is called in its place. ``start`` makes the :class:`ScheduleFollower` for a call,
    given the pipeline, its scheduler and the call's arguments by name (defaults filled in).
    """

    def __init__(
        self,
        pipe: Any,
        compiled: Mapping[nn.Module, CompiledForward],
        start: Callable[[Any, Any, Mapping[str, object]], ScheduleFollower],
    ) -> None:
        self._pipe = weakref.ref(pipe)
        self.compiled = dict(compiled)
        self._start = start
        self._scheduler: weakref.ref[Any] | None = None

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The transformers."""
        return tuple(self.compiled)

    def is_attached(self, model: nn.Module) -> bool:
        """Whether calls of ``model`` come here: ``model.compile()`` takes the place of what is attached."""
        dispatch = model._compiled_call_impl
        return isinstance(dispatch, _Dispatch) and self in dispatch.users

    @property
    def is_alive(self) -> bool:
        """Whether the pipeline still exists."""
        return self._pipe() is not None

    def connect(self) -> None:
        """Attach to the pipeline, its scheduler and the transformers."""
        pipe: Any = self._pipe()
        with _lock:
            _wirings[pipe] = self
            pipe.__class__ = _wired_class(type(pipe), {"__call__": _follow_call})
            self._use_scheduler(pipe.scheduler)
            for model in self.models:
                _Dispatch.attach(model, self)

    def disconnect(self) -> None:
        """Put everything back as it was; objects shared with other wired pipelines stay wired for those."""
        pipe = self._pipe()
        with _lock:
            if pipe is not None:
                _wirings.pop(pipe, None)
                pipe.__class__ = _base_class(type(pipe))
            self._use_scheduler(None)
            for model in self.models:
                _Dispatch.detach(model, self)

    def _use_scheduler(self, scheduler: Any) -> None:
        """Wire ``scheduler`` in place of the one wired so far."""
        before = self._scheduler() if self._scheduler is not None else None
        if scheduler is before:
            return
        if before is not None:
            _scheduler_users[before] -= 1
            if not _scheduler_users[before]:
                del _scheduler_users[before]
                before.__class__ = _base_class(type(before))
        self._scheduler = None
        if scheduler is not None:
            hooks = {name: hook for name, hook in _SCHEDULER_HOOKS.items() if hasattr(type(scheduler), name)}
            scheduler.__class__ = _wired_class(type(scheduler), hooks)
            _scheduler_users[scheduler] = _scheduler_users.get(scheduler, 0) + 1
            self._scheduler = weakref.ref(scheduler)

    @contextmanager
    def call(self, pipe: Any, arguments: Mapping[str, object]) -> Iterator[None]:
        """The time of one call of the pipeline; the run inside it ends however the call ends."""
        for model in self.models:
            check_hooks(model)  # the user may have enabled some since
        with _lock:
            self._use_scheduler(pipe.scheduler)  # the user may have put in another one
        follower = self._start(pipe, pipe.scheduler, arguments)
        call = _Call(self, follower)
        enter(call)
        try:
            yield
        finally:
            leave(call)
            follower.close()


# Calls of the transformer


class _Dispatch:
    """What a wired transformer runs when it is called, and the ``cache_context`` it shows.

    Outside of a pipeline call, a run that the user opened (``with sampling(pipe.transformer, steps)``) is followed if
    it is clear whose plan is meant.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.users: list[Wiring] = []
        self.before: Callable[..., object] | None = model._compiled_call_impl
        self.plain: Callable[..., object] = self.before or model._call_impl

    def __call__(self, *args: object, **kwargs: object) -> object:
        compiled = self._begin_call()
        if compiled is None:
            return self.plain(*args, **kwargs)
        if is_hooked(self.model):
            return compiled(*args, **kwargs)
        with compiled.attempt(args, kwargs) as attempt:
            attempt.result = attempt.forward(*args, **kwargs)
        return attempt.result

    def _begin_call(self) -> CompiledForward | None:
        """What to call in place of the model, whose pipeline has heard of the call; None if no plan is meant."""
        model = self.model
        if isinstance(_innermost(), _Unwired):
            return None
        call = _reaching(model)
        if call is not None:
            call.follower.begin_call()
            return call.wiring.compiled[model]
        if not is_sampled(model):
            return None
        self.users = [user for user in self.users if user.is_alive] or self.users[:1]
        if len(self.users) > 1:
            raise UnsupportedPipelineError(
                f"{type(model).__name__} was called in a sampling run, but {len(self.users)} pipelines have a plan "
                "for it; call one of the pipelines, or remove the plan from all but one"
            )
        return self.users[0].compiled[model]

    @staticmethod
    def attach(model: nn.Module, wiring: Wiring) -> None:
        dispatch = model._compiled_call_impl
        if not isinstance(dispatch, _Dispatch):
            dispatch = _Dispatch(model)
            model._compiled_call_impl = dispatch
            if hasattr(model, "cache_context"):
                model.__dict__["cache_context"] = _CacheContext(model)
        dispatch.users = [user for user in dispatch.users if user.is_alive] + [wiring]

    @staticmethod
    def detach(model: nn.Module, wiring: Wiring) -> None:
        dispatch = model._compiled_call_impl
        if not isinstance(dispatch, _Dispatch):  # model.compile() has taken its place
            if isinstance(model.__dict__.get("cache_context"), _CacheContext):
                del model.__dict__["cache_context"]
            return
        if wiring not in dispatch.users:
            return
        dispatch.users = [user for user in dispatch.users if user is not wiring and user.is_alive]
        if not dispatch.users:
            model._compiled_call_impl = dispatch.before
            model.__dict__.pop("cache_context", None)


class _CacheContext:
    """``model.cache_context`` that also tells the run which guidance branch is computed. A copy is the plain method."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        model = self._model()
        assert model is not None
        method: Callable[..., AbstractContextManager[Any]] = getattr(type(model), "cache_context")  # noqa: B009
        return self._enter(model, name, method(model, name, *args, **kwargs))

    @staticmethod
    @contextmanager
    def _enter(model: nn.Module, name: str, plain: AbstractContextManager[Any]) -> Iterator[None]:
        call = _reaching(model)
        with plain:
            if call is None:
                yield
            else:
                with call.follower.branch(name):
                    yield

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self._model())]
        return type(copied).cache_context.__get__(copied)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._model(), "cache_context")


def _innermost() -> _Call | _Unwired | None:
    """The innermost pipeline call in progress in this thread, or the block in which none is followed."""
    return next((each for each in reversed(in_progress()) if isinstance(each, (_Call, _Unwired))), None)


def _reaching(model: nn.Module) -> _Call | None:
    """The innermost pipeline call that is wired to ``model``; none within :func:`unwired`."""
    for each in reversed(in_progress()):
        if isinstance(each, _Unwired):
            return None
        if isinstance(each, _Call) and model in each.wiring.compiled:
            return each
    return None


# Classes of wired pipelines and schedulers


def _wired_class(base: type, methods: Mapping[str, Callable[[type], Callable[..., object]]]) -> type:
    """The subclass of ``base`` with ``methods`` (name -> maker of the method, given the base) on top."""
    base = _base_class(base)
    wired = _wired_classes.get(base)
    if wired is None:
        body: dict[str, object] = {name: make(base) for name, make in methods.items()}
        body |= {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": _reduce_to_base,
            "_difa_compile_base": base,
        }
        wired = _wired_classes[base] = type(base)(base.__name__, (base,), body)
    return wired


def _base_class(cls: type) -> type:
    """The class that ``cls`` wires, or ``cls`` itself."""
    base = cls.__dict__.get("_difa_compile_base", cls)
    assert isinstance(base, type)
    return base


def _reduce_to_base(self: Any, protocol: Any) -> Any:
    """Copies and pickles are of the original class."""
    wired = type(self)
    base = _base_class(wired)
    reduced: Any = base.__reduce_ex__(self, max(2, int(protocol)))  # type: ignore[call-arg]
    _, arguments, *rest = reduced
    return _blank, tuple(base if argument is wired else argument for argument in arguments), *rest


def _blank(cls: type, *arguments: Any) -> Any:
    """An instance whose state is filled in afterwards; what pickling does by default, but for another class."""
    return cls.__new__(cls, *arguments)


def _follow_call(base: type) -> Callable[..., object]:
    @functools.wraps(base.__call__)
    def followed(self: Any, *args: Any, **kwargs: Any) -> object:
        plain: Callable[..., object] = base.__call__
        wiring = wiring_of(self)
        if wiring is None or isinstance(_innermost(), _Unwired):
            return plain(self, *args, **kwargs)
        try:
            bound = inspect.signature(plain).bind(self, *args, **kwargs)
        except TypeError:
            return plain(self, *args, **kwargs)  # raises the same, in the pipeline's own words
        bound.apply_defaults()
        with wiring.call(self, bound.arguments):
            return plain(self, *args, **kwargs)

    return followed


def _follow_method(
    name: str, before: Callable[..., None] | None, after: Callable[..., None] | None
) -> Callable[[type], Callable[..., object]]:
    """Maker of a scheduler method that tells the pipeline call in progress before or after it runs."""

    def make(base: type) -> Callable[..., object]:
        @functools.wraps(getattr(base, name))
        def method(self: Any, *args: Any, **kwargs: Any) -> object:
            call = _innermost()
            follower = call.follower if isinstance(call, _Call) and call.follower.scheduler is self else None
            if follower is not None and before is not None:
                before(follower, *args, **kwargs)
            result: object = getattr(base, name)(self, *args, **kwargs)
            if follower is not None and after is not None:
                after(follower)
            return result

        return method

    return make


def _begin(follower: ScheduleFollower, begin_index: int = 0) -> None:
    follower.begin_at(begin_index)


def _scale(follower: ScheduleFollower, sample: object, timestep: object = None, *_: object, **__: object) -> None:
    follower.at(timestep)


def _give(follower: ScheduleFollower, model_output: object = None, *_: object, **__: object) -> None:
    follower.given(model_output)


_SCHEDULER_HOOKS = {
    "set_timesteps": _follow_method("set_timesteps", None, ScheduleFollower.schedule_set),
    "set_begin_index": _follow_method("set_begin_index", _begin, None),
    "scale_model_input": _follow_method("scale_model_input", _scale, None),
    "step": _follow_method("step", _give, ScheduleFollower.stepped),
}
