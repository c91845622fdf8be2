"""Compile graphs once for all batch sizes.

Every batch size is captured on its own, with plain numbers: that is what the analysis of a graph works on. What comes
out of it for two batch sizes is the same graph with other numbers in it. So the second time a graph comes along, the
numbers that changed in proportion are written as multiples of a size, and it is compiled with that size as a symbol.
From then on this serves: a third batch size is captured, but nothing is compiled. ``torch.compile`` does likewise when
it makes a size dynamic that has changed.

Whether it serves is judged by all numbers of the graph at hand: each must be what the compiled graph has in its place.
A graph in which a number changed in another way (another image size, another length of text) is compiled for itself.
"""

from __future__ import annotations

import math
import operator
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from difa_compile.backend.inductor import GraphCompiler
from difa_compile.passes.autocast import Autocast
from difa_compile.passes.graph import copy_module, operation
from difa_compile.passes.prepare.questions import BINDINGS, brings_in_sizes

Numbers = tuple[int, ...]
Times = tuple[int | None, ...]
"""For each number how many units it is, the unit being what changes; None where it is always the same."""


class AnyBatch:
    """What has been compiled for a model, to serve its other batch sizes; :mod:`difa_compile.backend.batch_sizes`.

    Shared by the captures of one model that compile in the same way. ``compiled``: how many graphs have been compiled.
    """

    def __init__(self) -> None:
        self._families: dict[str, _Family] = {}
        self._lock = threading.RLock()
        self.compiled = 0

    def compile(
        self, compiler: GraphCompiler, module: fx.GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        """A function of the inputs that computes ``module``, by ``compiler`` where there is none yet.

        ``compiler`` may be given fake tensors with symbols as sizes.
        """
        pattern, numbers = pattern_of(module, example_inputs)
        with self._lock:
            family = self._families.setdefault(pattern, _Family(module))
            run = family.made.get(numbers)
            if run is not None:
                return run
            if family.resizable is not None and family.resizable.serves(numbers):
                return family.resizable.run
            for known in family.made:
                times = proportions(known, numbers)
                if times is None:
                    continue
                resizable = self._compile_for_all(compiler, module, example_inputs, numbers, times)
                if resizable is not None and resizable.serves(numbers):
                    family.resizable = resizable
                    return resizable.run
                break
            self.compiled += 1
            run = family.made[numbers] = compiler(module, example_inputs)
            return run

    def _compile_for_all(
        self,
        compiler: GraphCompiler,
        module: fx.GraphModule,
        example_inputs: Sequence[Any],
        numbers: Numbers,
        times: Times,
    ) -> _Resizable | None:
        """The graph with a symbol as unit; None if it cannot be written so."""
        if any(brings_in_sizes(node) for node in module.graph.nodes):
            return None
        environment = ShapeEnv()
        fakes, symbols = _fake_inputs(FakeTensorMode(shape_env=environment), example_inputs, times)
        if not symbols:
            return None
        copied, _ = copy_module(module)
        for node in copied.graph.nodes:
            node.meta.pop(BINDINGS, None)  # symbols of the capture, which the compiler names anew
        write_units(copied, example_inputs, times)
        self.compiled += 1
        try:
            run = compiler(copied, fakes)
        except Exception as error:
            reason = "".join([type(error).__name__, *(f": {line}" for line in str(error).strip().splitlines()[:1])])
            warnings.warn(
                f"a graph could not be compiled for all batch sizes, so it is compiled for this one: {reason}",
                stacklevel=2,
            )
            return None
        guards = tuple(guard.expr for guard in environment.guards)
        bounds = {
            symbol: (environment.var_to_range[symbol].lower, environment.var_to_range[symbol].upper)
            for symbol in symbols
        }
        return _Resizable(run, numbers, times, symbols, bounds, guards)


@dataclass
class _Family:
    """Graphs that are the same but for their numbers; ``first`` is kept since a pattern may name it by identity."""

    first: fx.GraphModule
    made: dict[Numbers, Callable[..., Any]] = field(default_factory=dict)
    resizable: _Resizable | None = None


@dataclass(frozen=True)
class _Resizable:
    """A function compiled for any unit. ``symbols``: how many units each symbol of it is; ``bounds`` and ``guards``:
    what the compiler took for granted of them."""

    run: Callable[..., Any]
    numbers: Numbers
    times: Times
    symbols: Mapping[sympy.Symbol, int]
    bounds: Mapping[sympy.Symbol, tuple[Any, Any]]
    guards: tuple[Any, ...]

    def serves(self, numbers: Numbers) -> bool:
        """Whether it computes the graph that has these numbers."""
        unit = unit_of(numbers, self.times)
        if unit is None:
            return False
        if any(k is None and a != b for k, a, b in zip(self.times, self.numbers, numbers, strict=True)):
            return False
        sizes = {symbol: sympy.Integer(k * unit) for symbol, k in self.symbols.items()}
        for symbol, size in sizes.items():
            lower, upper = self.bounds[symbol]
            if not lower <= size <= upper:
                return False
        return all(guard.xreplace(sizes) == sympy.true for guard in self.guards)


# --- numbers ---------------------------------------------------------------------------------------------------------


def pattern_of(module: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[str, Numbers]:
    """What a graph computes, its whole numbers left blank, and these numbers: sizes and strides of the inputs, then
    the arguments of its nodes, in order. A graph with attributes of its own is equal to itself alone. What autocast is
    set to around the graph is part of what it computes."""
    numbers: list[int] = []

    def blank(number: int) -> _Name:
        numbers.append(number)
        return _Name("#")

    lines = [f"autocast {Autocast.now()}"]
    for value in example_inputs:
        if isinstance(value, Tensor):
            numbers += [*value.shape, *value.stride()]
            lines.append(f"{value.dim()} {value.dtype} {value.device} {type(value).__name__} {value.requires_grad}")
        else:
            lines.append(repr(value))
    names: dict[fx.Node, Any] = {}
    for place, node in enumerate(module.graph.nodes):
        names[node] = _Name(f"%{place}")
        arguments = fx.map_arg(_map_numbers((node.args, node.kwargs), blank), names.__getitem__)
        lines.append(f"{operation(node, module)} {arguments}")
    return "\n".join(lines), tuple(numbers)


class _Name:
    """Stands for a node or a number in the text of a pattern, where no text can be taken for it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


def proportions(one: Numbers, other: Numbers) -> Times | None:
    """How the numbers of a graph depend on what changed between two sets of them; None if not in proportion."""
    changed = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
    before, unit = (math.gcd(*numbers) for numbers in zip(*changed, strict=True)) if changed else (0, 0)
    if not before or not unit or any(a // before != b // unit for a, b in changed):
        return None
    return tuple(None if a == b else b // unit for a, b in zip(one, other, strict=True))


def unit_of(numbers: Numbers, times: Times) -> int | None:
    """How large the unit is by these numbers; None if they do not agree on one."""
    found = {divmod(number, k) for number, k in zip(numbers, times, strict=True) if k is not None}
    unit, rest = found.pop() if len(found) == 1 else (0, 0)
    return unit if unit > 0 and not rest else None


def _map_numbers(value: Any, change: Callable[[int], Any]) -> Any:
    """Arguments of a node with every whole number among them changed."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return change(value)
    if isinstance(value, slice):
        return slice(*(_map_numbers(part, change) for part in (value.start, value.stop, value.step)))
    if isinstance(value, Mapping):
        return {key: _map_numbers(part, change) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_map_numbers(part, change) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value


# --- symbols ---------------------------------------------------------------------------------------------------------


def _sizes(example_inputs: Sequence[Any], times: Iterator[int | None]) -> Iterator[tuple[int, list[int | None]]]:
    """For each tensor among the inputs its place and how many units each of its sizes is."""
    for place, value in enumerate(example_inputs):
        if isinstance(value, Tensor):
            sizes = [next(times) for _ in range(value.dim())]
            for _ in range(value.dim()):
                next(times)  # strides follow from the sizes
            yield place, sizes


def _fake_inputs(
    mode: FakeTensorMode, example_inputs: Sequence[Any], times: Times
) -> tuple[list[Any], dict[sympy.Symbol, int]]:
    """The inputs as fake tensors, with a symbol for each size that changes, and how many units each symbol is.

    No symbols if one of these sizes is 1 at present: such sizes are taken to be 1 always.
    """
    from torch._dynamo.source import ConstantSource

    fakes = list(example_inputs)
    symbols: dict[sympy.Symbol, int] = {}
    for place, sizes in _sizes(example_inputs, iter(times)):
        context: Any = StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.STATIC if k is None else DimDynamic.DYNAMIC for k in sizes],
            constraint_sizes=[None] * len(sizes),
        )
        source = ConstantSource(f"input_{place}")
        fakes[place] = mode.from_tensor(example_inputs[place], symbolic_context=context, source=source)
        for size, k in zip(fakes[place].shape, sizes, strict=True):
            if k is not None and not isinstance(size, torch.SymInt):
                return fakes, {}
            if k is not None:
                symbols[size.node.expr] = k
    return fakes, symbols


def write_units(module: fx.GraphModule, example_inputs: Sequence[Any], times: Times) -> None:
    """Replace the numbers of a graph that change by multiples of an input's size, in place."""
    left = iter(times)
    nodes = list(module.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    sizes = [
        (k, place, dim) for place, found in _sizes(example_inputs, left) for dim, k in enumerate(found) if k is not None
    ]
    per_size, place, dim = min(sizes)
    with module.graph.inserting_after(placeholders[-1]):
        size = module.graph.call_method("size", (placeholders[place], dim))
    written: dict[int, fx.Node] = {per_size: size}

    def multiple(k: int) -> fx.Node:
        if k not in written:
            with module.graph.inserting_after(size):
                scaled = module.graph.call_function(operator.mul, (size, k))
            with module.graph.inserting_after(scaled):
                written[k] = module.graph.call_function(operator.floordiv, (scaled, per_size))
        return written[k]

    def change(number: int) -> Any:
        k = next(left)
        return number if k is None else multiple(k)

    for node in nodes:
        node.args, node.kwargs = _map_numbers((node.args, node.kwargs), change)
    module.graph.lint()
    module.recompile()
