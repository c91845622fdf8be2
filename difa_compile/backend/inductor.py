"""Compiling a graph with inductor, and what may be asked of it; or with torch-tensorrt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_origin

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from difa_compile.errors import DecisionError, MissingDependencyError
from difa_compile.passes.graph import copy_module
from difa_compile.passes.prepare.questions import BINDINGS, brings_in_sizes

GraphCompiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
"""Turns a graph and example inputs into a function of the same inputs that returns a list or tuple."""

Config = Mapping[str, Any]
"""Values for names of ``torch._inductor.config``."""


def inductor(module: fx.GraphModule, example_inputs: Sequence[Any], config: Config | None = None) -> Callable[..., Any]:
    """Compile a graph with inductor as if Dynamo did, also when no capture is in progress.

    Without the ``ShapeEnv`` of a tracing context neither inductor nor AOTAutograd would use their caches on disk.
    Example inputs may be fake tensors, of symbolic sizes too. ``config``: values that hold while compiling, from
    :func:`inductor_config`.
    """
    from torch._inductor.compile_fx import compile_fx

    patches: dict[str, Any] = {"config_patches": dict(config)} if config else {}
    compiled: Any
    given = next((value.fake_mode for value in example_inputs if isinstance(value, FakeTensor)), None)
    if given is not None:
        with torch.no_grad(), tracing(TracingContext(given)):
            compiled = compile_fx(module, list(example_inputs), **patches)
    elif TracingContext.try_get() is not None:
        compiled = compile_fx(module, list(example_inputs), **patches)
    else:
        mode = FakeTensorMode(shape_env=ShapeEnv())
        copied, _ = copy_module(module)
        open_sizes = any(brings_in_sizes(node) for node in module.graph.nodes)
        for node in copied.graph.nodes:
            node.meta.pop(BINDINGS, None)  # symbols of the capture, which the compiler names anew
        inputs = list(example_inputs)
        if open_sizes:  # inductor takes such graphs with fake inputs, of fixed sizes, that can tell of other sizes
            inputs = [mode.from_tensor(v, static_shapes=True) if isinstance(v, torch.Tensor) else v for v in inputs]
        with torch.no_grad(), tracing(TracingContext(mode)):
            compiled = compile_fx(copied, inputs, ignore_shape_env=not open_sizes, **patches)
    return compiled  # type: ignore[no-any-return]


def torch_tensorrt() -> GraphCompiler:
    """What torch-tensorrt compiles graphs with, as a backend of Dynamo; operations that TensorRT does not have stay
    torch's. It needs an NVIDIA GPU, and never ran in our tests.

    Raises :class:`MissingDependencyError` where it is not installed.
    """
    try:
        import torch_tensorrt  # noqa: F401  # it registers its backends
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"inner='tensorrt' needs torch-tensorrt in the release for torch {torch.__version__.split('+')[0]}: pip "
            f"install torch-tensorrt ({error})"
        ) from error
    found: Any = torch._dynamo.lookup_backend("torch_tensorrt")
    return found  # type: ignore[no-any-return]


def inductor_config(mode: object = None, options: object = None) -> Config:
    """The values that a ``mode`` of ``torch.compile`` and inductor's ``options`` stand for; options go first.

    Raises :class:`DecisionError` for a mode or an option that inductor does not have, or a value of another type.
    """
    from torch._inductor import config, list_mode_options

    modes: Mapping[Any, Config] = list_mode_options()
    if mode is not None and mode not in modes:
        raise DecisionError(f"mode is {mode!r}; choose one of {', '.join(modes)}, or leave it out")
    if options is not None and not isinstance(options, Mapping):
        raise DecisionError(
            f"inductor_options is a {type(options).__name__}; give a dictionary, like {{'max_autotune': True}}"
        )
    chosen = dict(modes[mode]) if mode is not None else {}
    known = config.get_config_copy()
    for name, value in (options or {}).items():
        if name not in known:
            raise DecisionError(
                f"inductor_options has {name!r}, which inductor does not know; torch._inductor.list_options() names "
                "those it does"
            )
        wanted = config.get_type(name)  # type: ignore[attr-defined]
        if get_origin(wanted) is None and not isinstance(value, wanted):
            raise DecisionError(f"inductor_options has {name!r} as {value!r}; give a {wanted.__name__}")
        chosen[name] = value
    return chosen


def uses_cuda_graphs(config: Config) -> bool:
    """Whether graphs compiled with ``config`` are replayed as CUDA graphs, where the device has them."""
    default: bool = torch._inductor.config.triton.cudagraphs
    return bool(config.get("triton.cudagraphs", default))
