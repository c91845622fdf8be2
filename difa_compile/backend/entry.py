"""The ``torch.compile`` backend: ``torch.compile(model, backend="difa", options={"plan": plan})``.

Dynamo hands over the whole model as one graph per input shape. Without a plan the graph goes to inductor as it is.
With one it becomes a :class:`~difa_compile.backend.capture.Capture`, and what is returned to Dynamo is a plain function
that asks the active run which step it is; Dynamo sees nothing of that, so switching variants never recompiles.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from difa_compile.backend.capture import Capture
from difa_compile.backend.graph_breaks import why_piece
from difa_compile.backend.inductor import GraphCompiler, inductor, torch_tensorrt, uses_cuda_graphs
from difa_compile.backend.options import Options
from difa_compile.backend.run import active_run, call_without_run
from difa_compile.errors import (
    DifaError,
    NoAttentionError,
    OutputError,
    PassError,
    RunError,
    SitesMismatchError,
    UnsupportedModelError,
)
from difa_compile.passes.autocast import autocast_kept, runs_regions
from difa_compile.passes.order import analyse
from difa_compile.passes.trace import Trace
from difa_compile.passes.variant import Context
from difa_compile.plan.guidance import StatedGuidance, settle
from difa_compile.plan.plan import Plan


def difa(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph according to a plan.

    ``options``: what :class:`~difa_compile.backend.options.Options` names. Without a ``plan`` among them, inductor
    compiles the graph as it is, or what ``inner`` names. ``mode``: what the option of that name is if it is not among
    them.

    Errors of this package that show at compile time are raised by the call that triggered it, as themselves; those that
    are no fault of the call (:class:`PassError`, a trace that cannot be written) within what Dynamo raises.
    """
    given = {"mode": mode, **(options or {})}
    try:
        chosen = Options.of(given)
        if "plan" not in given and chosen.inner == "inductor":
            return inductor(module, example_inputs, chosen.config)
        if "plan" not in given:
            return compiler_of(chosen)(module, example_inputs)
        return planned(module, example_inputs, chosen)
    except (PassError, OutputError):
        raise  # nothing that Dynamo should keep: the next call tries again
    except DifaError as error:
        return raiser(error)


def planned(module: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    plan, file = options.plan, None
    if isinstance(plan, Path):
        file = PlanFile(plan)
        plan = Plan.load(plan)
    if torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in example_inputs):
        raise RunError(
            "a model compiled with a plan was called with gradients enabled; plans are for inference: call it under "
            "torch.no_grad()"
        )
    guidance = settle(stated=StatedGuidance.of_option(options.cfg), plan=plan)
    try:
        trace = None if options.trace is None else Trace.begin(options.trace)
        context = Context(guidance.conditional_half, guidance.form == "two-call")
        model = analyse(module, example_inputs, context, layout=options.layout, trace=trace)
        capture = Capture(
            model,
            compiler_of(options),
            plan=plan,
            strict=options.strict,
            resize=options.resize,
            overwrites=uses_cuda_graphs(options.config),
            allow_slower=options.allow_slower,
            trace=trace,
        )
    except (NoAttentionError, SitesMismatchError, UnsupportedModelError) as error:
        piece = why_piece(module, None if plan is None else plan.model.class_name)
        if piece is None:
            raise
        raise UnsupportedModelError(
            f"Dynamo did not capture the model as one graph, which a plan needs; of this piece, {piece}. Use "
            "difa_compile.apply(pipe, plan), which captures some such models and says of the others why not, or change "
            "the model's code; torch.compile(..., fullgraph=True) stops at the break and says more about it"
        ) from error

    def run_captured(*args: Any) -> list[Any]:
        inputs = list(args)
        model.check(inputs)
        if file is not None:
            file.warn_if_changed()
        run = active_run(capture, inputs)
        return call_without_run(capture, inputs) if run is None else run.call(capture, inputs)

    return run_captured


class PlanFile:
    """A plan file as it was when it was read.

    Dynamo takes equal options for equal, so a model that is compiled again with the path of a plan runs what was
    compiled for it before, whatever is in the file by then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = self._state()

    def _state(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size

    def warn_if_changed(self) -> None:
        """Say, once for every time it was written, that the file is not what runs. A file that is gone is none."""
        state = self._state()
        if state not in (None, self.state):
            self.state = state
            warnings.warn(
                f"{self.path} was written again after a model was compiled with it; the plan that was read then is "
                "followed. Call torch._dynamo.reset() and compile the model again to follow the new one, or give "
                "Plan.load(path) instead of the path",
                stacklevel=3,
            )


def compiler_of(options: Options) -> GraphCompiler:
    """What compiles the graphs of a model with these options."""
    compiler: GraphCompiler = functools.partial(inductor, config=options.config)
    if options.inner != "inductor":
        compiler = eager if options.inner == "eager" else torch_tensorrt()
    return compiler if options.dynamic is None else functools.partial(options.dynamic.compile, compiler)


def eager(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Run a graph as it is, for debugging and for exact comparisons."""
    del example_inputs
    if not runs_regions(module.graph):
        return module.forward

    def run(*args: Any) -> Any:
        with autocast_kept():  # a graph that fails does not leave the region it has entered
            return module.forward(*args)

    return run


def raiser(error: DifaError) -> Callable[..., Any]:
    """A compiled function that raises ``error``: Dynamo would wrap one raised while compiling."""

    def raise_error(*_: Any) -> Any:
        raise error.with_traceback(None)

    return raise_error
