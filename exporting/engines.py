"""Engines: the variants of an analysed model as programs of ``torch.export``, one for each row of roles.

A variant of the whole graph (:func:`difa_compile.passes.order.rewrite`, the passes that segments go through) becomes a
program in these steps; there are no passes of export's own.

1. *Pruned*: what neither an output nor a cache depends on goes, inputs and weights included. In-place writes stay where
   what they write is read.
2. *Bound*: Dynamo's graphs take parameters and buffers as inputs. Here they are attributes again, under the names that
   the model has for them. Inputs whose values tell where tokens stand are constants, since a capture holds for those
   positions alone (:class:`difa_compile.passes.analyse.positions.HeldPositions`), and so are numbers. What is left are
   the tensors that the model is called with, and caches.
3. *Sized*: the numbers of a graph are those of one batch. A second capture, at another batch, shows which of them
   depend on it, and these are written as multiples of an input's size (:mod:`difa_compile.backend.batch_sizes`).
4. *Exported*, and the program run beside the variant on the inputs of all captures at hand.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.experimental._config as symbols_config
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from difa_compile.backend.batch_sizes import pattern_of, write_units
from difa_compile.errors import DifaError, EngineError, is_out_of_memory
from difa_compile.exporting.captured import CapturedCall, owned_names
from difa_compile.passes.autocast import Autocast, autocast_kept, is_enter
from difa_compile.passes.caches import CacheName
from difa_compile.passes.graph import (
    alias_root,
    clean_path,
    copy_module,
    is_parameter,
    mutated_argument,
    plain_shape,
    source_name,
)
from difa_compile.passes.order import rewrite
from difa_compile.passes.prepare.arguments import input_name
from difa_compile.passes.replay import close, coarsest, fresh, same
from difa_compile.plan.schedule import FULL_ROLE, Role
from difa_compile.wording import quoted

IMAGES = "images"
"""The symbol of sizes: how many images a call is for."""


@dataclass(frozen=True)
class Port:
    """An input or output of an engine.

    ``name``: of an input the transformer's own argument (``hidden_states``, ``added_cond_kwargs.resolution``), of a
    cache its :class:`~difa_compile.passes.caches.CacheName`, of an output ``output``, or ``output.0``, ``output.1``
    where there are several. ``shape``: whole numbers, and of sizes that grow with the images texts like ``images`` and
    ``2*images``.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype

    def sizes(self, images: int) -> tuple[int, ...]:
        """The shape for so many images."""
        return tuple(size if isinstance(size, int) else images * factor_of(size) for size in self.shape)


@dataclass(frozen=True, eq=False)
class Engine:
    """A row of roles as a program.

    ``program``: takes ``inputs`` and gives ``outputs``, in their order; parameters and buffers are in it under the
    model's own names. ``inputs``: only what is read: first what the transformer is called with, then caches and the
    weights of forecasts. ``outputs``: the transformer's, then the caches written. ``weights``: the names of the
    parameters and buffers that are read. ``constants``: those of further tensors in it (positions of tokens, a model's
    tensors that are neither). ``images``: the least and the largest number of images that it serves.
    ``why_static``: why it serves one number of images alone, "" where it serves more.
    """

    program: ExportedProgram
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: tuple[str, ...]
    constants: tuple[str, ...]
    images: tuple[int, int]
    why_static: str = ""

    def serves(self, images: int) -> bool:
        """Whether it can be called for so many images."""
        return self.images[0] <= images <= self.images[1]


def engines_of(calls: Sequence[CapturedCall], roles: Sequence[Role], most: int | None = None) -> tuple[Engine, ...]:
    """The engines of one row of roles: one for all numbers of images up to ``most``, or as few as it takes.

    ``calls``: of one transformer and branch, for numbers of images that differ; three are good (1, 2 and 3 images):
    what is true of them is taken to be true of more. With one, or without ``most``, the engine serves the images of the
    first call alone. Where no engine serves all, there is one for as many as can be, if any, and one for the images of
    each call that it leaves out. ``roles``: one per attention site, per unit, or per site of the capture's plan.

    Raises :class:`EngineError` for a graph that ``torch.export`` refuses, for one that computes something else than the
    variant, and where something is left in it that these roles do not need; :class:`PassError`, and
    :class:`PlanMismatchError` for another number of roles.
    """
    _check_calls(calls, most)
    variants = [_variant(call, roles) for call in calls]
    if most is None or most == 1 or len(calls) == 1:
        reason = "it was asked for one number of images" if most in (None, 1) else UNCOMPARED
        return (_static(variants[0], reason),)
    found, reason = _for_all(sorted(variants, key=lambda each: each.call.images), most)
    left = [each for each in variants if found is None or not found.serves(each.call.images)]
    return (*([] if found is None else [found]), *(_static(each, reason) for each in left))


UNCOMPARED = "there is no call for another number of images to compare with"


def _check_calls(calls: Sequence[CapturedCall], most: int | None) -> None:
    numbers = [call.images for call in calls]
    if not numbers or len(set(numbers)) < len(numbers):
        raise EngineError(
            f"calls for {', '.join(map(str, numbers)) or 'no'} images were given; give at least one, and no two for "
            "equal numbers of images"
        )
    if len({(call.model, call.expert, call.branch) for call in calls}) > 1:
        raise EngineError("the calls of an engine are of two transformers, or of two branches; give those of one")
    if most is not None and (isinstance(most, bool) or most < max(numbers)):
        raise EngineError(
            f"engines for up to {most} images were asked for, but a call for {max(numbers)} was captured; ask for at "
            "least as many"
        )
    if str(Autocast.now()):
        raise EngineError(
            f"engines were to be made under torch.autocast ({Autocast.now()}), which would be part of them; leave it, "
            "and load the model in the dtype that it is to compute in"
        )


# --- variants --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Variant:
    """A pruned variant of a whole graph, its parameters still inputs.

    ``values``: of its placeholders, in order. ``names``: of each placeholder the port that it becomes; None for what
    becomes part of the program. ``attributes``: of the others their names there, "" for plain numbers.
    ``outputs``: names of its outputs, in order.
    """

    call: CapturedCall
    module: fx.GraphModule
    values: tuple[Any, ...]
    names: tuple[str | None, ...]
    attributes: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def ports(self) -> tuple[Any, ...]:
        """The values of what stays an input, contiguous."""
        return tuple(
            value.contiguous() for value, name in zip(self.values, self.names, strict=True) if name is not None
        )

    def run(self) -> list[Any]:
        """What it computes."""
        with torch.no_grad():
            return list(self.module(*fresh(self.module, self.values)))


def _variant(call: CapturedCall, roles: Sequence[Role]) -> _Variant:
    """The variant of a call's graph for a row of roles, without what neither outputs nor caches depend on."""
    model = call.capture.model
    row = call.capture.whole(roles)
    reads: tuple[CacheName, ...] = ()
    writes: tuple[CacheName, ...] = ()
    module = model.module
    if any(role != FULL_ROLE for role in row):
        made = rewrite(model.canonical, model.units, row, model.context)
        module, reads, writes = made.module, made.cache_inputs, made.cache_outputs
    placeholders = module.graph.find_nodes(op="placeholder")
    caches = [_like(node.meta["example_value"]) for node in placeholders[len(call.args) :]]
    given = [str(name) for name in reads]
    owned = owned_names(call.model)
    held = model.positions.inputs
    names: list[str | None] = []
    attributes: list[str] = []
    for i, (node, value) in enumerate(zip(placeholders, (*call.args, *caches), strict=True)):
        name = None if i < len(call.args) else given[i - len(call.args)]
        attribute = ""
        if i < len(call.args) and isinstance(value, Tensor):
            attribute = owned.get(id(value), "")
            if not attribute and _is_held(node, i in held):
                attribute = input_name(node) if i in held else attribute_path(node)
            if not attribute:
                name = input_name(node)
        names.append(name)
        attributes.append(attribute)
    (output,) = module.graph.find_nodes(op="output")
    results = len(output.args[0]) - len(writes) if isinstance(output.args[0], (tuple, list)) else 1
    outputs = ["output"] if results == 1 else [f"output.{i}" for i in range(results)]
    pruned, kept, returned = prune(module)
    every = [*outputs, *map(str, writes)]
    values = (*call.args, *caches)
    variant = _Variant(
        call,
        pruned,
        tuple(values[i] for i in kept),
        tuple(names[i] for i in kept),
        tuple(attributes[i] for i in kept),
        tuple(every[i] for i in returned),
    )
    _check_left_out(variant, row)
    if any(is_enter(node) and node.args[2] is not False for node in module.graph.nodes):
        _check_regions(variant, module, values, returned)
    return variant


def held_tensors(call: CapturedCall) -> list[Tensor]:
    """The tensors that may become part of an engine's program and are no weights of the model: those that its graph has
    by itself, the positions that it holds for, and tensors of the model's code."""
    model = call.capture.model
    owned = owned_names(call.model)
    found = [value for value in model.module.buffers() if id(value) not in owned]
    for i, (node, value) in enumerate(zip(model.module.graph.find_nodes(op="placeholder"), call.args, strict=True)):
        if isinstance(value, Tensor) and id(value) not in owned and _is_held(node, i in model.positions.inputs):
            found.append(value)
    return found


def _is_held(node: fx.Node, position: bool) -> bool:
    """Whether an input of a graph, which is none of the model's parameters and buffers, becomes part of a program."""
    return position or is_parameter(node) or _is_models(node)


def _like(value: Tensor) -> Tensor:
    """A random tensor of the shape, dtype and device of a cache's fake value."""
    sizes = plain_shape(value)
    generator = torch.Generator().manual_seed(sum(sizes))
    return torch.randn(sizes, generator=generator).to(value.device, value.dtype)


def _is_models(node: fx.Node) -> bool:
    """Whether an input of a graph is no argument of the model, but a tensor of its own or of its code's."""
    return re.match(r"L\['(?!self'\])", source_name(node)) is None


def attribute_path(node: fx.Node) -> str:
    """The dotted path of a tensor of the model's: ``rope.table`` of ``L['self']._modules['rope'].table``."""
    path = re.sub(r"\._(?:parameters|buffers|modules)(?=[.\[])", "", source_name(node))
    return clean_path(path)


def live_nodes(
    graph: fx.Graph, ends: Iterable[fx.Node], instead: Mapping[fx.Node, Sequence[fx.Node]] | None = None
) -> set[fx.Node]:
    """The nodes that ``ends`` depend on, what is written in place into what they read included.

    ``instead``: for some nodes those that they depend on in place of their arguments.
    """
    swapped = dict(instead or {})

    def grown(starts: Iterable[fx.Node]) -> set[fx.Node]:
        seen, todo = set(starts), list(starts)
        while todo:
            node = todo.pop()
            for source in swapped.get(node, node.all_input_nodes):
                if source not in seen:
                    seen.add(source)
                    todo.append(source)
        return seen

    writers = [node for node in graph.nodes if mutated_argument(node) is not None]
    live = grown(list(ends))
    while True:
        more = [node for node in writers if node not in live and alias_root(node) in live]
        if not more:
            return live
        live |= grown([*live, *more])


def prune(module: fx.GraphModule) -> tuple[fx.GraphModule, tuple[int, ...], tuple[int, ...]]:
    """A copy of a graph without what its outputs do not depend on, placeholders included, and without outputs that are
    None: with it the places of the placeholders and of the outputs that are left. Autocast regions are left out.

    Inputs that the graph writes to are copied first: a program leaves what it is given as it is.
    """
    graph = module.graph
    (output,) = graph.find_nodes(op="output")
    returned = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    live = live_nodes(graph, [node for node in returned if isinstance(node, fx.Node)])
    written = {alias_root(node) for node in live if mutated_argument(node) is not None}
    pruned = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    placeholders = graph.find_nodes(op="placeholder")
    for node in placeholders:
        if node in live:
            mapping[node] = pruned.node_copy(node)
            mapping[node]._dynamo_source = getattr(node, "_dynamo_source", None)
    for node in placeholders:
        if node in live and node in written:
            mapping[node] = pruned.call_method("clone", (mapping[node],))
    for node in graph.nodes:
        if node in live and node.op not in ("placeholder", "output"):
            mapping[node] = pruned.node_copy(node, mapping.__getitem__)
    kept = tuple(i for i, node in enumerate(returned) if isinstance(node, fx.Node))
    pruned.output(tuple(mapping[node] for node in returned if isinstance(node, fx.Node)))
    pruned.lint()
    left = tuple(i for i, node in enumerate(placeholders) if node in live)
    return fx.GraphModule(module, pruned), left, kept


def _check_regions(variant: _Variant, module: fx.GraphModule, values: Sequence[Any], returned: Sequence[int]) -> None:
    """Raise :class:`EngineError` if autocast regions of the model's own make a difference: ``torch.export`` drops them
    without a word. ``module``: the variant's graph with them; ``values``: its inputs; ``returned``: as of
    :func:`prune`."""
    with torch.no_grad(), autocast_kept():
        results = module(*fresh(module, values))
    if not all(same(one, results[i]) for one, i in zip(variant.run(), returned, strict=True)):
        raise EngineError(
            f"{type(variant.call.model).__name__} computes under torch.autocast in regions of its own, which "
            "torch.export drops; change the model's code to cast what it casts itself"
        )


def _check_left_out(variant: _Variant, row: Sequence[Role]) -> None:
    """Raise :class:`EngineError` if a weight is left that only what the row leaves out would read.

    Told from the unchanged graph: what its outputs depend on, if left-out units hand on nothing but their streams.
    """
    model = variant.call.capture.model
    if all(role == FULL_ROLE for role in row):
        return
    graph = model.canonical.graph
    instead: dict[fx.Node, Sequence[fx.Node]] = {}
    ends: list[fx.Node] = []
    for unit, role in zip(model.units, row, strict=True):
        outputs = unit.region.outputs
        if role.reads_output:
            streams = unit.region.streams or (None,) * len(outputs)
            for one, stream in zip(outputs, streams, strict=True):
                instead.setdefault(one, () if stream is None else (stream,))
        elif not role.covered and (role.emit_output or role.emit_residual or role.head_writes):
            ends += [unit.region.attention, *outputs, *unit.region.streams]
    (output,) = graph.find_nodes(op="output")
    needed = live_nodes(graph, [*output.all_input_nodes, *ends], instead)
    places = [i for i, node in enumerate(graph.find_nodes(op="placeholder")) if node in needed]
    allowed = {id(variant.call.args[i]) for i in places}
    extra = [
        attribute
        for value, attribute in zip(variant.values, variant.attributes, strict=True)
        if attribute and id(value) not in allowed
    ]
    if extra:
        raise EngineError(
            f"{extra[0]} and {len(extra) - 1} more weights are read by an engine whose roles leave out all that needs "
            "them. This is a fault of difa-compile, not of the model or the plan"
        )


# --- programs --------------------------------------------------------------------------------------------------------


def _bound(variant: _Variant, module: fx.GraphModule) -> fx.GraphModule:
    """``module``, a form of a variant's graph, with its weights as attributes."""
    graph = fx.Graph()
    mapping: dict[fx.Node, Any] = {}
    root: dict[str, Any] = {
        str(node.target): _attribute(module, str(node.target)) for node in module.graph.find_nodes(op="get_attr")
    }
    taken = Counter[str]()
    placeholders = module.graph.find_nodes(op="placeholder")
    for node, name in zip(placeholders, variant.names, strict=True):
        if name is not None:
            identifier = re.sub(r"\W", "_", name)
            taken[identifier] += 1
            suffix = f"__{taken[identifier]}" if taken[identifier] > 1 else ""
            mapping[node] = graph.placeholder(identifier + suffix)
    for node, value, name, attribute in zip(
        placeholders, variant.values, variant.names, variant.attributes, strict=True
    ):
        if attribute:
            mapping[node] = graph.get_attr(attribute)
            root[attribute] = value
        elif name is None:
            mapping[node] = value
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "output"):
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
            mapping[node].meta = {}
    (output,) = module.graph.find_nodes(op="output")
    graph.output(fx.map_arg(output.args[0], mapping.__getitem__))
    return fx.GraphModule(root, graph)


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _exported(
    variant: _Variant, module: fx.GraphModule, sizes: _Sizes | None, images: tuple[int, int]
) -> ExportedProgram:
    """The program of ``module``, a form of a variant's graph. Sizes that depend on the number of images are open within
    ``images``, the least and the largest; without ``sizes`` none is."""
    shapes: tuple[dict[int, Any], ...] | None = None
    if sizes is not None:
        count = Dim(IMAGES, min=images[0], max=images[1])
        shapes = tuple(
            {dim: count if k == 1 else k * count for dim, k in enumerate(factors) if k is not None}
            for factors in sizes.ports
        )
    with torch.no_grad():
        return torch.export.export(_bound(variant, module), variant.ports, dynamic_shapes=shapes, strict=False)


def _check_same(program: ExportedProgram, variant: _Variant, wanted: Sequence[Any]) -> None:
    """Raise :class:`EngineError` if a program does not compute what a variant does, up to rounding."""
    try:
        with torch.no_grad():
            found = program.module()(*variant.ports)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise EngineError(
            f"an exported program cannot be run for {variant.call.images} images: {_line(error)}"
        ) from error
    dtype = coarsest(variant.module)
    for name, one, other in zip(variant.outputs, found, wanted, strict=True):
        if not close(one, other, dtype):
            raise EngineError(
                f"{name} of an exported program is not what the variant gives for {variant.call.images} images. This "
                "is a fault of difa-compile or of torch.export, not of the model or the plan"
            )


def _engine(
    variant: _Variant,
    program: ExportedProgram,
    results: Mapping[int, Sequence[Tensor]],
    images: tuple[int, int],
    reason: str,
    ports: Sequence[Sequence[int | None]] | None = None,
) -> Engine:
    """What a program is as an engine. ``results``: what its variants give, by their numbers of images; the first is
    that of ``variant``."""
    factors = ports or [[None] * value.dim() for value in variant.ports]
    names = [name for name in variant.names if name is not None]
    inputs = tuple(
        Port(name, tuple(_size(size, k) for size, k in zip(value.shape, ks, strict=True)), value.dtype)
        for name, value, ks in zip(names, variant.ports, factors, strict=True)
    )
    outputs = []
    for i, name in enumerate(variant.outputs):
        shapes = zip(*(found[i].shape for found in results.values()), strict=True)
        sizes = tuple(
            _size(shape[0], None if len(set(shape)) == 1 else shape[0] // next(iter(results))) for shape in shapes
        )
        outputs.append(Port(name, sizes, next(iter(results.values()))[i].dtype))
    placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    owned = set(owned_names(variant.call.model).values())
    read = [
        spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind is not InputKind.USER_INPUT and spec.target is not None and placeholders[spec.arg.name].users
    ]
    weights = tuple(name for name in read if name in owned)
    constants = tuple(name for name in read if name not in owned)
    return Engine(program, inputs, tuple(outputs), weights, constants, images, reason)


def _size(size: int, factor: int | None) -> int | str:
    """A size of a port: a number, or how many times the images it is."""
    return size if factor is None else IMAGES if factor == 1 else f"{factor}*{IMAGES}"


def factor_of(size: str) -> int:
    """How many times the images a size of a port is: 2 of ``2*images``. Raises :class:`EngineError` for others."""
    found = re.fullmatch(rf"(?:([1-9][0-9]*)\*)?{IMAGES}", size)
    if found is None:
        raise EngineError(f"a size of an engine is {quoted(size)}; it is a number, {IMAGES}, or 2*{IMAGES} and so on")
    return int(found[1] or 1)


def _static(variant: _Variant, reason: str) -> Engine:
    """The engine of one variant, for its images alone. Raises :class:`EngineError`."""
    count = variant.call.images
    try:
        program = _exported(variant, variant.module, None, (count, count))
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, DifaError):
            raise
        raise EngineError(
            f"torch.export refuses the graph of {type(variant.call.model).__name__}: {_line(error)}"
        ) from error
    wanted = variant.run()
    _check_same(program, variant, wanted)
    return _engine(variant, program, {count: wanted}, (count, count), reason)


def _line(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


# --- any number of images --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sizes:
    """What depends on the number of images: how many times the images each number of a graph is, and each size of the
    ports; None where it is always the same."""

    numbers: tuple[int | None, ...]
    ports: tuple[tuple[int | None, ...], ...]


def _sizes_of(variants: Sequence[_Variant]) -> _Sizes | str:
    """How the numbers of a graph depend on the images, told from its variants for several, or why that is not known."""
    images = [each.call.images for each in variants]
    patterns = [pattern_of(each.module, each.values) for each in variants]
    if len({pattern for pattern, _ in patterns}) > 1:
        return f"its graphs for {_listed(images)} images differ in more than numbers"
    factors: list[int | None] = []
    for column in zip(*(numbers for _, numbers in patterns), strict=True):
        found = {divmod(number, count) for number, count in zip(column, images, strict=True)}
        factor, rest = found.pop()
        if len(set(column)) == 1:
            factors.append(None)
        elif found or rest or factor < 1:
            return (
                f"a number of its graph is {_listed(column)} for {_listed(images)} images, which is not in proportion"
            )
        else:
            factors.append(factor)
    columns = [
        zip(*shapes, strict=True) for shapes in zip(*([v.shape for v in each.ports] for each in variants), strict=True)
    ]
    ports = tuple(tuple(None if len(set(sizes)) == 1 else sizes[0] // images[0] for sizes in each) for each in columns)
    if not any(k is not None for each in ports for k in each):
        return "none of its inputs grows with the number of images"
    return _Sizes(tuple(factors), ports)


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _for_all(variants: Sequence[_Variant], most: int) -> tuple[Engine | None, str]:
    """The engine for all numbers of images from the least of ``variants``, which rise, to ``most``; or without those of
    the least, since a size of 1 may be a special case of an operation. With it why some are not served."""
    sizes = _sizes_of(variants)
    if isinstance(sizes, str):
        return None, sizes
    results = {each.call.images: each.run() for each in reversed(variants)}
    largest, reason = variants[-1], ""
    for served in (variants, variants[1:]):
        for oblivious in (True, False):  # of the sizes of the example
            if len(served) < 2:
                continue
            images = served[0].call.images, most
            module, _ = copy_module(largest.module)
            write_units(module, largest.values, sizes.numbers)
            try:
                with symbols_config.patch(backed_size_oblivious=oblivious):  # type: ignore[attr-defined]
                    program = _exported(largest, module, sizes, images)
                for each in served:
                    _check_same(program, each, results[each.call.images])
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                reason = reason or _line(error)
                continue
            return _engine(largest, program, results, images, "", sizes.ports), reason
    return None, f"torch.export makes no program of open sizes: {reason}"
