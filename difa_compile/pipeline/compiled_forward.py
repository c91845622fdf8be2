"""A model's forward, compiled, and what is done where Dynamo cannot compile it at once or at all.

The one way in which this package has models compiled: pipelines with a plan, calibration and inspection call a
:class:`CompiledForward`, each with a backend of its own.
"""

from __future__ import annotations

import functools
import inspect
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType, TracebackType
from typing import Any

import torch
from torch import nn

from difa_compile.backend.dynamo_answers import answering
from difa_compile.backend.graph_breaks import why_not_whole
from difa_compile.backend.run import Run, run_of
from difa_compile.errors import (
    DifaError,
    InputValuesError,
    PlanNotFollowedError,
    PlanNotFollowedWarning,
    UnsupportedPipelineError,
)
from difa_compile.pipeline.module_hooks import call_in_hooks, global_hooks, inner_forward, is_hooked

MOST_SHAPES = 64
"""Compiled graphs (input shapes times wired pipelines) that all models of one class may have; more are an error. Where
sizes or branches depend on values, each outcome counts like a shape."""

Args = tuple[object, ...]
Kwargs = Mapping[str, object]
Function = Callable[..., object]


class CompiledForward:
    """``torch.compile`` of a model's forward, one graph per input shape. The model itself is left as it is.

    What is compiled lies within the hooks that may be around the model. Hooks of modules inside it are part of the
    graph: Dynamo is told to guard them, which by default it leaves out. Hooks of all modules it cannot guard, so they
    make a compiled function of their own, and so does another ``forward`` of the model.

    Some models fill tables in their first call, in ways that cannot be captured; in others, branches and sizes depend
    on the values of the inputs (how many tokens a mask shows). So a model that cannot be captured is called once as it
    is, and captured again for the values it is called with (:func:`~difa_compile.backend.dynamo_answers.answering`). Of
    such a model there is a graph for each outcome; the last used for inputs of such shapes is tried first.

    ``strict``: whether it is an error or a warning if Dynamo runs the model as it is within a run; None where it does
    not matter. ``private``: the forward is compiled on a code object of its own, so what Dynamo keeps for it neither
    counts against the limit of graphs of the model's class nor outlives this object. ``whole``: a model that is not one
    graph is refused; else the backend is given its pieces.

    Calls raise the backend's errors as themselves, :class:`UnsupportedPipelineError` if the model cannot be captured as
    one graph, and :class:`PlanNotFollowedError` where Dynamo compiles nothing.

    Not with ``isolate_recompiles``: torch 2.13 keeps the region of that option in a variable of the process, so calls
    of two compiled functions in two threads end in each other's caches and are captured again and again.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: Function,
        options: Mapping[str, object] | None = None,
        *,
        strict: bool | None = None,
        private: bool = False,
        whole: bool = True,
    ) -> None:
        self.model = model
        self._backend = backend
        self.strict = strict
        self._private = private
        self._settings: dict[str, Any] = {"options": dict(options or {}), "dynamic": False, "fullgraph": whole}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:  # otherwise torch's own limit, 8 graphs
            self._settings["recompile_limit"] = MOST_SHAPES
        self._lock = threading.Lock()
        self._said: weakref.WeakSet[Run] = weakref.WeakSet()
        self._start(inner_forward(model), global_hooks())

    def _start(self, function: Function, hooks: tuple[int, ...]) -> None:
        self._function = function
        self._hooks = hooks
        # Of graphs with such hooks Dynamo must take none without; without them it finds its own again.
        backend = functools.partial(self._backend) if hooks else self._backend
        self._forwards: tuple[Function, ...] = (self._compile(backend),)
        self._served: dict[object, tuple[Function, ...]] = {}

    def _compile(self, backend: Function) -> Function:
        function = on_own_code(self._function) if self._private else self._function
        compiled: Function = torch.compile(function, backend=backend, **self._settings)
        return compiled

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call the model, with all that is hung around it."""
        if is_hooked(self.model):
            return call_in_hooks(self.model, self._inside, args, kwargs)
        return self._inside(*args, **kwargs)

    def _inside(self, *args: object, **kwargs: object) -> object:
        with self.attempt(args, kwargs) as attempt:
            attempt.result = attempt.forward(*args, **kwargs)
        return attempt.result

    def attempt(self, args: Args, kwargs: Kwargs) -> Attempt:
        """One call within the hooks around the model, to be made by the caller, who saves a frame of the stack."""
        function, hooks = inner_forward(self.model), global_hooks()
        if function != self._function or hooks != self._hooks:
            with self._lock:
                self._start(function, hooks)
        return Attempt(self, self._candidates(args, kwargs)[0], args, kwargs)

    def _candidates(self, args: Args, kwargs: Kwargs) -> tuple[Function, ...]:
        """What has been compiled, in the order in which it is tried for such inputs."""
        forwards = self._forwards
        if len(forwards) == 1:
            return forwards
        served = self._served.get(signature(args, kwargs), ())
        return (*served, *(forward for forward in forwards if forward not in served))  # of these none has such a graph

    # Where the first attempt fails

    def recover(self, failure: Exception, attempt: Attempt) -> object:
        """The result of the call whose first attempt raised ``failure``, or the error that tells what is the matter."""
        from torch._dynamo.exc import Unsupported, UserError

        args, kwargs = attempt.args, attempt.kwargs
        if isinstance(failure, InputValuesError):
            try:
                return self._search(args, kwargs, failed=attempt.forward)
            except Exception as later:
                failure = later
        if isinstance(failure, (Unsupported, UserError)):
            inner_forward(self.model)(*args, **kwargs)
            try:
                with answering():
                    return self._search(args, kwargs)
            except Exception as later:
                failure = later
        error = self._explained(failure)
        if error is None:
            raise failure
        raise error from failure

    def _search(self, args: Args, kwargs: Kwargs, failed: Function | None = None) -> object:
        """Call the first compiled function that holds for the values of the inputs, a new one if there is none."""
        for forward in self._candidates(args, kwargs):
            if forward is failed:
                continue
            try:
                result = self._tried(forward, args, kwargs)
            except InputValuesError:
                continue
            self._keep(forward, args, kwargs)
            return result
        forward = self._compile(functools.partial(self._backend))  # Dynamo takes no graph of another backend for it
        result = self._tried(forward, args, kwargs)
        self._keep(forward, args, kwargs)
        return result

    def _tried(self, forward: Function, args: Args, kwargs: Kwargs) -> object:
        with Attempt(self, forward, args, kwargs, is_last=True) as attempt:
            attempt.result = forward(*args, **kwargs)
        return attempt.result

    def _keep(self, forward: Function, args: Args, kwargs: Kwargs) -> None:
        """Try ``forward`` first from now on, for inputs of such shapes."""
        shapes = signature(args, kwargs)
        with self._lock:
            self._served[shapes] = (forward, *(other for other in self._served.get(shapes, ()) if other is not forward))
            if forward not in self._forwards:
                self._forwards = (*self._forwards, forward)

    def _explained(self, failure: Exception) -> Exception | None:
        """The error in this package's words that ``failure`` stands for; None for what is none of Dynamo's."""
        from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported, UserError

        name = type(self.model).__name__
        if isinstance(failure, BackendCompilerFailed):
            inner = failure.inner_exception
            return inner if isinstance(inner, DifaError) else None
        if isinstance(failure, FailOnRecompileLimitHit):
            return UnsupportedPipelineError(
                f"{name} was called with more input shapes (scales of a LoRA, texts of other lengths, where its sizes "
                f"depend on them), over all pipelines with a plan, than are compiled for models of one class "
                f"({MOST_SHAPES}); sample fewer, or call torch._dynamo.reset() to start over"
            )
        if isinstance(failure, (Unsupported, UserError)):
            return UnsupportedPipelineError(
                f"{name} cannot be captured as one graph: {why_not_whole(failure)}; a plan needs the whole model in "
                "one graph"
            )
        if not isinstance(failure, RuntimeError) or "found no compiled frames" not in str(failure):
            return None
        skipped = next(iter(re.findall(r"^ *- .*: (.+)$", str(failure), re.MULTILINE)), "")
        if torch._dynamo.config.disable:  # said by torch only where it would have captured something now
            skipped = "tracing is disabled"
        if "disabled" in skipped or "dispatch mode" in skipped:
            return PlanNotFollowedError(
                f"{name} cannot be run with its plan, because nothing is compiled here ({skipped}); switch "
                "torch.compile on (TORCHDYNAMO_DISABLE, torch._dynamo.config.disable), leave the mode that is around "
                "the call, or remove the plan"
            )
        return UnsupportedPipelineError(
            f"Dynamo no longer compiles {name}: another model of this class, compiled with torch.compile in this "
            "process, was called with more input shapes than torch._dynamo.config.recompile_limit (raise it, or "
            "compile the other with dynamic=True), or one was called while torch.compile was switched off. Call "
            "torch._dynamo.reset() to start over"
        )

    def check_compiled(self, run: Run) -> None:
        """Say, once per run, that the model was run as it is, without the plan: no compiled code has asked ``run``."""
        if run in self._said:
            return
        text = (
            f"step {run.index}: {type(self.model).__name__} was called as it is, without its plan, because "
            "nothing was compiled; torch.compile is switched off (torch.compiler.set_stance) or the call stands in "
            "a region that Dynamo leaves alone (torch.compiler.disable). Switch it on, or remove the plan"
        )
        if self.strict:
            raise PlanNotFollowedError(text)
        self._said.add(run)
        warnings.warn(text, PlanNotFollowedWarning, stacklevel=3)


class Attempt:
    """One call of a compiled forward, as a block around the call::

        with compiled.attempt(args, kwargs) as attempt:
            attempt.result = attempt.forward(*args, **kwargs)
        return attempt.result

    In the block Dynamo guards graphs against hooks that come and go. Where the call raises what a second attempt may
    mend, ``result`` is what that gives; not for one that ``is_last``.
    """

    __slots__ = ("_calls", "_compiled", "_guards_left_out", "_is_last", "_run", "args", "forward", "kwargs", "result")

    def __init__(
        self, compiled: CompiledForward, forward: Function, args: Args, kwargs: Kwargs, *, is_last: bool = False
    ) -> None:
        self._compiled = compiled
        self._is_last = is_last
        self.forward = forward
        self.args = args
        self.kwargs = kwargs
        self.result: object = None

    def __enter__(self) -> Attempt:
        self._run = None if self._compiled.strict is None else run_of(self._compiled.model)
        self._calls = 0 if self._run is None else self._run.calls
        config = torch._dynamo.config  # config.patch takes 20 times as long
        self._guards_left_out = config.skip_nnmodule_hook_guards
        config.skip_nnmodule_hook_guards = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        torch._dynamo.config.skip_nnmodule_hook_guards = self._guards_left_out
        if failure is None:
            if self._run is not None and self._run.calls == self._calls:
                self._compiled.check_compiled(self._run)
            return False
        if self._is_last or not isinstance(failure, Exception):
            return False
        self.result = self._compiled.recover(failure, self)
        return True


def signature(args: Args, kwargs: Kwargs) -> object:
    """Shapes, dtypes and devices of the tensors among a call's arguments."""
    return tuple(
        (value.shape, value.dtype, value.device) if isinstance(value, torch.Tensor) else None
        for value in torch.utils._pytree.tree_leaves((args, dict(kwargs)))
    )


def on_own_code(function: Function) -> Function:
    """A bound method on a code object of its own, for which Dynamo keeps nothing yet; other functions as they are."""
    plain = getattr(function, "__func__", None)
    if plain is None:
        return function
    copied = FunctionType(
        plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
    )
    copied.__kwdefaults__ = plain.__kwdefaults__
    return MethodType(copied, getattr(function, "__self__"))  # noqa: B009
