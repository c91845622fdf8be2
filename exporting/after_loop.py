"""What a pipeline does after its loop, as one exported graph: from the final latents to images.

Nothing here knows how a pipeline unpacks, scales, decodes and finishes its latents. The pipeline itself is called for a
step or two with its scheduler's ``step`` returning the latents that are given, and traced from there on: what comes
before (texts, noise, timesteps) runs as it always does, outside of the trace.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic

from difa_compile.bundle.program import Form, Program
from difa_compile.errors import AfterLoopError, NotAppliedError
from difa_compile.exporting.watching import Outputs, put, quiet, untraced
from difa_compile.pipeline.transformers import check_scheduler, find_transformers
from difa_compile.pipeline.wiring import wiring_of
from difa_compile.wording import shown

STEPS = (1, 2, 4)
"""To ask the pipeline for: the fewest that its scheduler can do."""
CONSTANT = "constant_"
"""How the names of buffers begin that are no weights of the pipeline."""
ROUNDINGS = 16
"""The graph may differ from the pipeline by so many roundings of 1, the largest value of an image."""


@dataclass(frozen=True, eq=False)
class AfterLoop:
    """``program.module()(latents)``: from latents ``(images, *shape)``, float32 whatever the pipeline has, to what the
    pipeline returns for ``output_type="pt"``, or as bytes.

    Parameters and buffers have their names in the pipeline (``vae.decoder.conv_in.weight``), and only what is read is
    there, beside :attr:`constants`. It serves ``least`` to ``most`` images at once (None: any number). ``shape``,
    ``dtype``: of what comes out for one image.
    """

    program: torch.export.ExportedProgram
    least: int
    most: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of what is read."""
        return tuple(name for name in self.program.state_dict if not name.startswith(CONSTANT))

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of what is no weight of the pipeline among the program's parameters and buffers."""
        return tuple(name for name in self.program.state_dict if name.startswith(CONSTANT))


def after_loop(
    pipe: Any, inputs: Mapping[str, Any], program: Program, images: int, *, as_bytes: bool = False
) -> AfterLoop:
    """Export what ``pipe`` does from the final latents of ``program`` to images.

    ``inputs``: as for :func:`difa_compile.exporting.probing.probe`, of a call that makes ``images`` images. With two or
    more the graph serves other numbers too, where it allows; one image often needs a graph of its own. ``as_bytes``:
    pictures ``(images, height, width, channels)`` in uint8, as files hold them, in place of ``(images, channels,
    height, width)`` from 0 to 1 in the pipeline's dtype; of videos the same for every frame.

    The transformers are not run. Raises :class:`AfterLoopError` where the pipeline cannot be traced, and where the
    graph does not give what the pipeline gives.
    """
    if wiring_of(pipe) is not None:
        raise NotAppliedError(f"this {type(pipe).__name__} carries a plan; call remove(pipe) before it is exported")
    check_scheduler(pipe)
    latents = torch.randn(images, *program.shape, generator=torch.Generator().manual_seed(11))
    tail = _Tail(pipe, inputs, program, images, as_bytes)
    name = type(pipe).__name__
    with torch.no_grad():
        wanted = tail.settled(latents)
        reason = ""
        for dynamic in (True, False) if images > 1 else (False,):
            try:
                graph = _exported(tail, latents, dynamic)
                found = graph.module()(latents)
            except Exception as error:  # whatever a tracer has against a pipeline's Python
                reason = f"{type(error).__name__}: {error}"
                continue
            difference = float((found.double() - wanted.double()).abs().max())
            allowed = 1.0 if as_bytes else ROUNDINGS * torch.finfo(wanted.dtype).eps / 2
            if found.shape == wanted.shape and difference <= allowed:
                least, most = _range(graph, latents) if dynamic else (images, images)
                return AfterLoop(graph, least, most, tuple(wanted.shape[1:]), wanted.dtype)
            reason = f"the graph differs from the pipeline by {difference:.1e}"
    raise AfterLoopError(
        f"what {name} does after its loop cannot be exported as one graph: {shown(reason, 300)}; decode its latents "
        "with the pipeline itself"
    )


class _Tail(nn.Module):
    """The pipeline's call from where its scheduler returns the last sample, as a module of the pipeline's parts."""

    pipe: Any
    models: dict[nn.Module, Form]

    def __init__(self, pipe: Any, inputs: Mapping[str, Any], program: Program, images: int, as_bytes: bool) -> None:
        super().__init__()
        parameters = inspect.signature(type(pipe).__call__).parameters
        # Guidance ends with the loop. Without it no halves of a batch have to be taken apart behind it.
        off = {scale.name: 1.0 for scale in program.scales if scale.above is not None}
        self.call: dict[str, Any] = {**inputs, **off}
        if "output_type" in parameters:
            self.call["output_type"] = "pt"
        self.images, self.as_bytes = images, as_bytes
        self.takes_generator = "generator" in parameters
        find_transformers(pipe)
        # In a dictionary, so that they are no modules of this one: it has the parts alone that come after the loop.
        self.pipe = pipe
        self.models = {getattr(pipe, form.model): form for form in reversed(program.forms)}
        for name, component in getattr(pipe, "components", {}).items():
            if isinstance(component, nn.Module) and callable(getattr(component, "decode", None)):
                self.add_module(name, component)

    def settled(self, latents: Tensor) -> Tensor:
        """What comes out, with the fewest steps that the pipeline can be asked for."""
        problem: Exception | None = None
        for steps in STEPS:
            self.call["num_inference_steps"] = steps
            try:
                found: Tensor = self(latents)
                return found
            except AfterLoopError:
                raise
            except Exception as error:  # schedulers say in many ways that they need more steps
                problem = problem or error
        raise AfterLoopError(
            f"{type(self.pipe).__name__} cannot be called to see what it does after its loop: {shown(problem, 300)}; "
            "check the arguments of the call, and how many images it makes"
        ) from problem

    def forward(self, latents: Tensor) -> Tensor:
        pipe, scheduler = self.pipe, self.pipe.scheduler
        original = scheduler.step
        with ExitStack() as stack, ExitStack() as before:
            before.enter_context(untraced())

            def step(*arguments: Any, **options: Any) -> Any:
                before.close()  # from here on all that is done is traced
                given = inspect.signature(original).bind(*arguments, **options).arguments
                groups = given["sample"].shape[0] // self.images
                own = latents.to(given["sample"].device, given["sample"].dtype)
                sample = own if groups == 1 else torch.cat([own] * groups)
                return Outputs((sample, sample))

            put(stack, scheduler, "step", step, original)
            for model, form in self.models.items():
                put(stack, model, "forward", functools.partial(_zeros, model.forward, form), model.forward)
            stack.enter_context(quiet(pipe))
            generator = {"generator": torch.Generator().manual_seed(0)} if self.takes_generator else {}
            result = pipe(**self.call, **generator)
        found = first_result(result)
        if not isinstance(found, Tensor):
            raise AfterLoopError(
                f"{type(pipe).__name__} returns {shown(type(found).__name__)} for output_type='pt', where a tensor of "
                "images is expected; decode its latents with the pipeline itself"
            )
        return in_bytes(found) if self.as_bytes else found


def first_result(result: Any) -> Any:
    """What a pipeline returns its images in."""
    return result[0] if isinstance(result, (tuple, list)) else next(iter(result.values()))


def _zeros(original: Any, form: Form, *arguments: Any, **options: Any) -> Outputs:
    """In a model's place: nothing of it is left when its scheduler returns other latents."""
    given = inspect.signature(original).bind(*arguments, **options).arguments[form.sample.name]
    return Outputs((given.new_zeros(given.shape[0], *form.output),))


def in_bytes(images: Tensor) -> Tensor:
    """Pictures (..., channels, height, width) from 0 to 1 as files hold them: (..., height, width, channels), uint8."""
    return (images.movedim(-3, -1) * 255).round().to(torch.uint8)


def _exported(tail: _Tail, latents: Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    shapes = {"latents": {0: torch.export.Dim.AUTO}} if dynamic else None
    with symbolic.patch(backed_size_oblivious=dynamic):  # type: ignore[attr-defined]
        return exported(tail, (latents,), shapes)


def exported(
    module: nn.Module,
    arguments: tuple[Any, ...],
    shapes: Any = None,
    tidy: Callable[[torch.fx.Graph], None] = lambda graph: None,
) -> torch.export.ExportedProgram:
    """Exported, and once more without the parameters that nothing reads: those of other models of the pipeline.

    ``arguments``, ``shapes``: as ``torch.export.export`` takes them, and what it raises is raised. ``tidy`` may take
    out of the graph what keeps something from being dead.
    """
    graph = torch.export.export(module, arguments, dynamic_shapes=shapes).module(check_guards=False)
    assert isinstance(graph, torch.fx.GraphModule)
    tidy(graph.graph)
    graph.graph.eliminate_dead_code()
    _name_constants(graph.graph)
    graph.recompile()
    read = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    held = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    for name, _ in held:
        if name not in read:
            owner, _, attribute = name.rpartition(".")
            delattr(graph.get_submodule(owner), attribute)
    return torch.export.export(graph, arguments, dynamic_shapes=shapes)


def _name_constants(graph: torch.fx.Graph) -> None:
    """Make every constant a buffer with a name of its own, by which targets are told that it is no weight."""
    module = graph.owning_module
    assert module is not None
    own = set(module.state_dict(keep_vars=True))
    names: dict[str, str] = {}
    for node in graph.find_nodes(op="get_attr"):
        path = str(node.target)
        value = operator.attrgetter(path)(module)
        if path in own or not isinstance(value, Tensor):
            continue
        if path not in names:
            names[path] = f"{CONSTANT}{len(names)}"
            module.register_buffer(names[path], value.detach().clone(memory_format=torch.contiguous_format))
        node.target = names[path]


def _range(exported: torch.export.ExportedProgram, latents: Tensor) -> tuple[int, int | None]:
    """How many images it serves: the range that was traced, and one if that goes."""
    first = next(node for node in exported.graph.nodes if node.name in exported.graph_signature.user_inputs)
    size = first.meta["val"].shape[0]
    if isinstance(size, int):
        return size, size
    known = exported.range_constraints[size.node.expr]
    most = int(known.upper) if known.upper < 2**31 else None
    try:
        exported.module()(latents[:1])
    except (AssertionError, RuntimeError):  # the guard that says so
        return max(2, int(known.lower)), most
    return 1, most
