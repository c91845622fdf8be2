"""Attaching a run to a diffusers pipeline, in place and reversibly.

Three objects are touched, each on the instance only:

1. the pipeline and its scheduler get a subclass of their class with the same name, which opens a
   :class:`~difa_compile.pipeline.schedule_follower.Following` around ``__call__`` and tells it of the scheduler's
   methods. Copies and pickles are of the original class;
2. each transformer's compiled call becomes a dispatcher: within a call of a wired pipeline it runs that pipeline's
   compiled forward, otherwise the forward as it was. So pipelines may share a transformer or a scheduler;
3. the transformer's ``cache_context``, if it has one, also names the branch of the run.

Which call is in progress is held per thread (a context variable), never on the shared objects.
"""

from __future__ import annotations

import functools
import inspect
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from difa_compile.backend.dynamo_answers import answering
from difa_compile.backend.graph_breaks import why_not_whole
from difa_compile.backend.run import is_sampled
from difa_compile.errors import DifaError, InputValuesError, PlanNotFollowedError, UnsupportedPipelineError
from difa_compile.pipeline.module_hooks import call_in_hooks, check_hooks, global_hooks, inner_forward
from difa_compile.pipeline.schedule_follower import Following

MOST_SHAPES = 64
"""Compiled graphs (input shapes times wired pipelines) that all models of one class may have; more are an error. Where
sizes or branches depend on values, each outcome counts like a shape."""


@dataclass(frozen=True)
class _Call:
    """A call of a wired pipeline that is in progress in this thread."""

    wiring: Wiring
    following: Following
    outer: _Call | None


_call: ContextVar[_Call | None] = ContextVar("difa_compile_pipeline_call", default=None)
_unwired: ContextVar[bool] = ContextVar("difa_compile_unwired", default=False)
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
    token = _unwired.set(True)
    try:
        yield
    finally:
        _unwired.reset(token)


class Wiring:
    """One pipeline connected to its transformers, each through a compiled forward of its own.

    ``compiled``: by transformer, what is called with its arguments. ``start`` makes the :class:`Following` for a call,
    given the pipeline, its scheduler and the call's arguments by name (defaults filled in).
    """

    def __init__(
        self,
        pipe: Any,
        compiled: Mapping[nn.Module, Callable[..., object]],
        start: Callable[[Any, Any, Mapping[str, object]], Following],
    ) -> None:
        self._pipe = weakref.ref(pipe)
        self._compiled = dict(compiled)
        self._start = start
        self._scheduler: weakref.ref[Any] | None = None

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The transformers."""
        return tuple(self._compiled)

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
        following = self._start(pipe, pipe.scheduler, arguments)
        token = _call.set(_Call(self, following, _call.get()))
        try:
            yield
        finally:
            _call.reset(token)
            following.close()

    def forward(
        self, model: nn.Module, following: Following | None, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """One call of ``model`` in the run of ``following``, or in the run that the caller has opened."""

        def call() -> object:
            return run_compiled(self._compiled[model], model, args, kwargs)

        return call() if following is None else following.model_call(call)


class CompiledForward:
    """``torch.compile`` of the model's forward, one graph per input shape. The model itself is left as it is. What is
    compiled lies within the hooks that may be around the model (:func:`run_compiled` calls it there). Hooks of modules
    inside it are part of the graph: Dynamo is told to guard them, which by default it leaves out. Hooks of all modules
    it cannot guard, so they make a compiled function of their own, and so does another ``forward`` of the model.

    Where the model's sizes or branches depend on the values of its inputs (how many tokens a mask shows), also one
    graph for each outcome, of which the last used for inputs of such shapes is tried first.

    Not with ``isolate_recompiles``: torch 2.13 keeps the region of that option in a variable of the process, so calls
    of two compiled functions in two threads end in each other's caches and are captured again and again.
    """

    def __init__(self, model: nn.Module, backend: Callable[..., object], options: Mapping[str, object]) -> None:
        self._model = model
        self._backend = backend
        self._settings: dict[str, Any] = {"options": dict(options), "dynamic": False, "fullgraph": True}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:  # otherwise torch's own limit, 8 graphs
            self._settings["recompile_limit"] = MOST_SHAPES
        self._start(inner_forward(model), global_hooks())

    def _start(self, function: Callable[..., object], hooks: tuple[int, ...]) -> None:
        self._function = function
        self._hooks = hooks
        # Of graphs with such hooks Dynamo must take none without; without them it finds its own again.
        backend = functools.partial(self._backend) if hooks else self._backend
        self._forwards: tuple[Callable[..., object], ...] = (self._compile(backend),)
        self._served: dict[object, tuple[Callable[..., object], ...]] = {}

    def _compile(self, backend: Callable[..., object]) -> Callable[..., object]:
        compiled: Callable[..., object] = torch.compile(self._function, backend=backend, **self._settings)
        return compiled

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Raises what Dynamo raises."""
        function, hooks = inner_forward(self._model), global_hooks()
        if function != self._function or hooks != self._hooks:
            with _lock:
                self._start(function, hooks)
        with guarding_hooks():
            return self._call(args, kwargs)

    def _call(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        shapes = signature(args, kwargs)
        served = self._served.get(shapes, ())
        fresh = [forward for forward in self._forwards if forward not in served]  # these have no graph of such shapes
        for forward in (*served, *fresh):
            try:
                result = forward(*args, **kwargs)
            except InputValuesError:
                continue
            self._keep(shapes, forward)
            return result
        forward = self._compile(functools.partial(self._backend))  # Dynamo takes no graph of another backend for it
        result = forward(*args, **kwargs)
        self._keep(shapes, forward)
        return result

    def _keep(self, shapes: object, forward: Callable[..., object]) -> None:
        """Try ``forward`` first from now on, for inputs of such shapes."""
        served = self._served.get(shapes, ())
        if served and served[0] is forward:
            return
        with _lock:
            self._served[shapes] = (forward, *(other for other in self._served.get(shapes, ()) if other is not forward))
            if forward not in self._forwards:
                self._forwards = (*self._forwards, forward)


@contextmanager
def guarding_hooks() -> Iterator[None]:
    """Within this block graphs are guarded against hooks that come and go; ``config.patch`` takes 20 times as long."""
    before = torch._dynamo.config.skip_nnmodule_hook_guards
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    try:
        yield
    finally:
        torch._dynamo.config.skip_nnmodule_hook_guards = before


def signature(args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    """Shapes, dtypes and devices of the tensors among a call's arguments."""
    return tuple(
        (value.shape, value.dtype, value.device) if isinstance(value, torch.Tensor) else None
        for value in torch.utils._pytree.tree_leaves((args, dict(kwargs)))
    )


def compile_forward(
    model: nn.Module, backend: Callable[..., object], options: Mapping[str, object]
) -> Callable[..., object]:
    """The model's forward, compiled; :class:`CompiledForward`."""
    return CompiledForward(model, backend, options)


def run_compiled(
    compiled: Callable[..., object],
    model: nn.Module,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> object:
    """Call ``compiled``, made from the forward of ``model``, within the hooks that may be around it.

    Some models fill tables in their first call, in ways that cannot be captured; in others, branches and sizes depend
    on the values of the inputs. So a model that cannot be captured is called once as it is, and captured again for
    the values it is called with (:func:`~difa_compile.backend.dynamo_answers.answering`).

    An error of this package that Dynamo wrapped is raised as itself. Raises :class:`UnsupportedPipelineError` if the
    model cannot be captured as one graph, :class:`PlanNotFollowedError` where Dynamo compiles nothing.
    """
    return call_in_hooks(model, lambda *a, **k: _run_inside(compiled, model, a, k), args, kwargs)


def _run_inside(
    compiled: Callable[..., object],
    model: nn.Module,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    *,
    retry: bool = True,
) -> object:
    from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported, UserError

    name = type(model).__name__

    try:
        return compiled(*args, **kwargs)
    except BackendCompilerFailed as failure:
        if isinstance(failure.inner_exception, DifaError):
            raise failure.inner_exception from failure
        raise
    except FailOnRecompileLimitHit as failure:
        raise UnsupportedPipelineError(
            f"{name} was called with more input shapes (scales of a LoRA, texts of other lengths, where its sizes "
            f"depend on them), over all pipelines with a plan, than are compiled for models of one class "
            f"({MOST_SHAPES}); sample fewer, or call torch._dynamo.reset() to start over"
        ) from failure
    except (Unsupported, UserError) as failure:
        if retry:
            inner_forward(model)(*args, **kwargs)
            with answering():
                return _run_inside(compiled, model, args, kwargs, retry=False)
        raise UnsupportedPipelineError(
            f"{name} cannot be captured as one graph: {why_not_whole(failure)}; a plan needs the whole model in one "
            "graph"
        ) from failure
    except RuntimeError as failure:
        if "found no compiled frames" not in str(failure):
            raise
        skipped = next(iter(re.findall(r"^ *- .*: (.+)$", str(failure), re.MULTILINE)), "")
        if torch._dynamo.config.disable:  # said by torch only where it would have captured something now
            skipped = "tracing is disabled"
        if "disabled" in skipped or "dispatch mode" in skipped:
            raise PlanNotFollowedError(
                f"{name} cannot be run with its plan, because nothing is compiled here ({skipped}); switch "
                "torch.compile on (TORCHDYNAMO_DISABLE, torch._dynamo.config.disable), leave the mode that is around "
                "the call, or remove the plan"
            ) from failure
        raise UnsupportedPipelineError(
            f"Dynamo no longer compiles {name}: another model of this class, compiled with torch.compile in this "
            "process, was called with more input shapes than torch._dynamo.config.recompile_limit (raise it, or "
            "compile the other with dynamic=True), or one was called while torch.compile was switched off. Call "
            "torch._dynamo.reset() to start over"
        ) from failure


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
        if _unwired.get():
            return self.plain(*args, **kwargs)
        model = self.model
        self.users = [user for user in self.users if user.is_alive] or self.users[:1]
        call = _call_of_model(model)
        if call is not None:
            return call.wiring.forward(model, call.following, args, kwargs)
        if not is_sampled(model):
            return self.plain(*args, **kwargs)
        if len(self.users) > 1:
            raise UnsupportedPipelineError(
                f"{type(model).__name__} was called in a sampling run, but {len(self.users)} pipelines have a plan "
                "for it; call one of the pipelines, or remove the plan from all but one"
            )
        return self.users[0].forward(model, None, args, kwargs)

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
        if len(dispatch.users) > 1:
            dispatch.users.remove(wiring)
        else:
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
        call = _call_of_model(model)
        with plain:
            if call is None:
                yield
            else:
                with call.following.branch(name):
                    yield

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self._model())]
        return type(copied).cache_context.__get__(copied)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._model(), "cache_context")


def _call_of_model(model: nn.Module | None) -> _Call | None:
    """The innermost pipeline call of this thread that is wired to ``model``."""
    call = _call.get()
    while call is not None and model not in call.wiring.models:
        call = call.outer
    return call


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
        if wiring is None or _unwired.get():
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
            call = _call.get()
            following = call.following if call is not None and call.following.scheduler is self else None
            if following is not None and before is not None:
                before(following, *args, **kwargs)
            result: object = getattr(base, name)(self, *args, **kwargs)
            if following is not None and after is not None:
                after(following)
            return result

        return method

    return make


def _begin(following: Following, begin_index: int = 0) -> None:
    following.begin_at(begin_index)


def _scale(following: Following, sample: object, timestep: object = None, *_: object, **__: object) -> None:
    following.at(timestep)


_SCHEDULER_HOOKS = {
    "set_timesteps": _follow_method("set_timesteps", None, Following.schedule_set),
    "set_begin_index": _follow_method("set_begin_index", _begin, None),
    "scale_model_input": _follow_method("scale_model_input", _scale, None),
    "step": _follow_method("step", None, Following.stepped),
}
