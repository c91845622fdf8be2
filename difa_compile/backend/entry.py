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

from difa_compile.backend.batch_sizes import AnyBatch
from difa_compile.backend.capture import Capture, GraphCompiler
from difa_compile.backend.graph_breaks import why_piece
from difa_compile.backend.inductor import Config, inductor, inductor_config, uses_cuda_graphs
from difa_compile.backend.run import active_run, call_without_run
from difa_compile.errors import (
    DecisionError,
    DifaError,
    LayoutError,
    NoAttentionError,
    RunError,
    SitesMismatchError,
    UnsupportedModelError,
)
from difa_compile.layout import Layout
from difa_compile.passes.autocast import autocast_kept, runs_regions
from difa_compile.passes.order import analyse
from difa_compile.passes.variant import Context
from difa_compile.plan.plan import RESIZES, Plan

OPTIONS = ("plan", "strict", "layout", "cfg", "inner", "resize", "mode", "inductor_options", "allow_slower", "dynamic")


def difa(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph according to a plan.

    Options:
        plan: a :class:`~difa_compile.plan.plan.Plan` or the path of one; None compiles the graph as inductor does, but
            lets calibration drive it.
        strict: a decision that can't be carried out is a :class:`SiteSkippedError` instead of a record.
        layout: the :class:`Layout` of the attention sequence, for models whose graph does not show it.
        cfg: ``{"conditional_half": 0 | 1}``, which half of the batch is conditional, or ``{"two_call": True}``, the
            halves are two calls per step; what the plan says by default.
        resize: ``"fraction"`` or ``"tokens"``: carry the plan onto other image sizes (:meth:`Plan.resized`), which are
            errors otherwise.
        inner: ``"inductor"`` (default) or ``"eager"``, what compiles the rewritten graphs.
        dynamic: a :class:`difa_compile.AnyBatch`, one for each compiled model: graphs that differ in the batch size
            alone are compiled twice at most.
        allow_slower: carry out windows that this machine's profile predicts to be slower than full attention too. By
            default they are left full and recorded as skipped, which ``strict`` does not mind.
        mode: of ``torch.compile``, for instance ``"reduce-overhead"`` (CUDA graphs). ``torch.compile`` takes no
            ``mode`` of its own beside options.
        inductor_options: values of ``torch._inductor.config``, for instance ``{"max_autotune": True}``.

    Errors of this package that show at compile time are raised by the call that triggered it, as themselves.
    """
    chosen = dict(options or {})
    try:
        unknown = sorted(set(chosen) - set(OPTIONS))
        if unknown:
            raise DecisionError(
                f"backend difa does not know option {unknown[0]!r}; its options are {', '.join(OPTIONS)}"
            )
        config = inductor_config(chosen.get("mode", mode), chosen.get("inductor_options"))
        if "plan" not in chosen:
            return inductor(module, example_inputs, config)
        return planned(module, example_inputs, chosen, config)
    except DifaError as error:
        return raiser(error)


def planned(
    module: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any], config: Config
) -> Callable[..., Any]:
    plan = options["plan"]
    file = None
    if isinstance(plan, (str, Path)):
        file = PlanFile(Path(plan))
        plan = Plan.load(plan)
    if plan is not None and not isinstance(plan, Plan):
        raise DecisionError(f"option plan is a {type(plan).__name__}; give a Plan, the path of one, or None")
    layout = options.get("layout")
    if layout is not None and not isinstance(layout, Layout):
        raise LayoutError(f"option layout is {layout!r}; give a difa_compile.Layout")
    if torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in example_inputs):
        raise RunError(
            "a model compiled with a plan was called with gradients enabled; plans are for inference: call it under "
            "torch.no_grad()"
        )
    cfg = options.get("cfg") or {}
    half, two_call = cfg.get("conditional_half"), cfg.get("two_call")
    if plan is not None:
        half = plan.settings.conditional_half if half is None else half
        two_call = plan.settings.guidance == "two-call" if two_call is None else two_call
    if half not in (None, 0, 1):
        raise DecisionError(f"conditional_half is {half!r}; give 0 (first half) or 1 (second half)")
    if options.get("resize") not in (None, *RESIZES):
        raise DecisionError(f"option resize is {options['resize']!r}; choose one of {', '.join(RESIZES)}")
    compiler = compiler_named(options.get("inner", "inductor"), config)
    batches = options.get("dynamic")
    if isinstance(batches, AnyBatch):
        compiler = functools.partial(batches.compile, compiler)
    elif batches is not None:
        raise DecisionError(
            f"option dynamic is {batches!r}; give a difa_compile.AnyBatch(), in which the captures of one compiled "
            "model find what is compiled already"
        )
    try:
        trace = None
        model = analyse(module, example_inputs, Context(half, bool(two_call)), layout=layout, trace=trace)
        capture = Capture(
            model,
            compiler,
            plan=plan,
            strict=bool(options.get("strict", False)),
            resize=options.get("resize"),
            overwrites=uses_cuda_graphs(config),
            allow_slower=bool(options.get("allow_slower", False)),
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


def compiler_named(name: str, config: Config | None = None) -> GraphCompiler:
    """The inner compiler by name, with inductor's ``config``. Raises :class:`DecisionError`."""
    if name == "inductor":
        return functools.partial(inductor, config=config)
    if name == "eager":
        if config:
            names = ", ".join(config)
            raise DecisionError(
                f"inner='eager' compiles nothing, so it takes no {names}; leave mode and inductor_options out"
            )
        return eager
    raise DecisionError(f"inner compiler {name!r} is unknown; choose inductor or eager")


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
