"""What a model's Python code asks of its data: how many tokens a mask shows, whether an image is given, which lengths.

A *question* is a node of a captured graph whose value, or whose size, is only known when the model runs. A plan needs
fixed sizes, so questions that the inputs alone answer, without the network's weights, are answered when the model is
captured: by running the few nodes that lead to the question on the real inputs (:class:`Slice`). The answers are as
binding as the shapes of the inputs: :class:`Questions` asks anew at every call, and for other answers the capture does
not hold.

A question that the weights answer (which expert a token is sent to) has another answer in every call. It stays open,
and so does the size: :func:`difa_compile.passes.prepare.specialize.check_sizes` says whether it is in a plan's way.

Before: ``shown = nonzero(mask)`` of size ``(u0, 1)``. After: ``sized(nonzero(mask), [5, 1])``, and the question
``nonzero(mask)`` with the answer ``(5, 1)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

from difa_compile.errors import InputValuesError
from difa_compile.ops.sized import SIZED
from difa_compile.passes.autocast import Autocast, autocast_kept, is_exit, open_at
from difa_compile.passes.facts import Facts
from difa_compile.passes.graph import alias_root, mutated_argument, op_name, reaching, tensor_of

BINDINGS = "unbacked_bindings"
"""Where Dynamo notes in a node's metadata which symbols the node brought in, and where in its value they stand."""

Answer = int | float | bool | str | tuple[Any, ...]
"""A number, the shape of a tensor, or a list of answers (as a tuple)."""

MEASURED = {"getitem", "masked_select", "repeat_interleave"}
"""Ops the size of whose result depends on all operands but on the first one's values."""

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def asked(value: torch.Tensor, truth: bool = False) -> Any:
    """A question about a tensor's values (``x.tolist()``, or ``bool(x)`` for its ``truth``), as a node of a graph."""
    return bool(value) if truth else value.tolist()


fx.node.has_side_effect(asked)  # keeps Dynamo from removing a node whose value the graph does not use


class Slice:
    """The nodes that lead to some questions, as a program of their own; what equal nodes compute is computed once.

    Nodes stand in the autocast regions of the graph in which they stood.

    ``inputs``: the placeholders it needs. Calling it with their real values gives the questions' values, in order.
    Raises :class:`Unanswerable` where the network's weights or random numbers are needed.
    """

    def __init__(self, owner: torch.nn.Module | Mapping[str, Any], graph: fx.Graph, ends: Sequence[fx.Node]) -> None:
        needed = leading_to(graph, ends)
        targets = set(ends)
        written = {alias_root(node) for node in needed if mutated_argument(node) is not None}
        program, mapping, known = fx.Graph(), dict[fx.Node, fx.Node](), dict[Any, fx.Node]()
        found: dict[fx.Node, fx.Node] = {}
        regions = {node: open_at(node) for node in (*needed, *targets)}
        entered = {enter for each in regions.values() for enter in each}

        def copy(node: fx.Node, at: Callable[[fx.Node], fx.Node]) -> fx.Node:
            fresh = program.node_copy(node, at)
            kwargs = tuple(sorted(fresh.kwargs.items()))
            written_out = repr((fresh.args, kwargs))  # for Python 1, 1.0 and True are equal
            key = (fresh.op, fresh.target, fresh.args, kwargs, written_out, regions[node])
            if written or node.op == "placeholder":  # two equal nodes may stand before and after a write
                return fresh
            try:
                same = known.setdefault(key, fresh)
            except TypeError:  # an argument without a hash
                return fresh
            if same is not fresh:
                program.erase_node(fresh)
            return same

        for node in graph.nodes:
            if node in entered or (is_exit(node) and node.args[0] in entered):
                mapping[node] = program.node_copy(node, mapping.__getitem__)
            elif node in needed:
                mapping[node] = copy(node, mapping.__getitem__)
            if node in targets:
                if node in needed:
                    found[node] = mapping[node]
                else:
                    first = node.args[0]
                    assert isinstance(first, fx.Node)
                    value = tensor_of(first)
                    assert value is not None
                    stand_in = program.call_function(blank, (tuple(map(int, value.shape)), value.device))
                    found[node] = copy(node, lambda n, f=first, s=stand_in: s if n is f else mapping[n])  # type: ignore[misc]
        program.output(tuple(found[node] for node in ends))
        self.inputs = tuple(node for node in mapping if node.op == "placeholder")
        self._module = fx.GraphModule(owner if isinstance(owner, torch.nn.Module) else dict(owner), program)
        self._written = [i for i, node in enumerate(self.inputs) if node in written]

    def __call__(self, values: Sequence[Any]) -> tuple[Any, ...]:
        values = list(values)
        for i in self._written:
            values[i] = values[i].clone()
        with torch.no_grad(), autocast_kept():
            results: tuple[Any, ...] = self._module(*values)
        return results


class Unanswerable(Exception):
    """A question that the inputs alone do not answer."""


def blank(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """A tensor of some shape that takes no memory, for ops that need an operand's shape only."""
    return torch.zeros((), device=device, dtype=torch.bool).expand(*shape)


def measured(node: fx.Node) -> bool:
    """Whether the size of the node's result does not depend on the values of its first operand."""
    if op_name(node) not in MEASURED or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    value = tensor_of(node.args[0])
    others = [n for n in node.all_input_nodes if n is not node.args[0]]
    return value is not None and not free_unbacked_symbols(value) and bool(others)


def leading_to(graph: fx.Graph, ends: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes that the answers depend on, in-place writes included; of a measured end only its operands.

    Raises :class:`Unanswerable`.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    last = max(place[node] for node in ends)
    starts: list[fx.Node] = []
    for end in ends:
        starts += [n for n in end.all_input_nodes if n is not end.args[0]] if measured(end) else [end]
    needed = reaching(starts)
    writers = [n for n in graph.nodes if mutated_argument(n) is not None and place[n] <= last]
    while True:
        grown = needed | reaching(n for n in writers if alias_root(n) in needed)
        if grown == needed:
            break
        needed = grown
    for node in needed:
        why = unanswerable(node)
        if why:
            raise Unanswerable(why)
    return needed


def unanswerable(node: fx.Node) -> str:
    """Why a node may not be among those that answer a question; "" if it may."""
    if isinstance(node.meta.get("example_value"), torch.nn.Parameter):
        return f"depends on the network's weights ({node.name})"
    if node.op == "call_module":
        return f"depends on a module's own call ({node.target})"
    name = op_name(node)
    if name.startswith(("rand", "normal", "bernoulli", "multinomial", "dropout", "uniform")):
        return f"depends on random numbers ({name})"
    return ""


# --- answering ------------------------------------------------------------------------------------------------------


def answer_of(value: Any) -> Answer:
    """What there is to know of a question's value."""
    if isinstance(value, torch.Tensor):
        return tuple(map(int, value.shape))
    if isinstance(value, (list, tuple)):
        return tuple(answer_of(item) for item in value)
    if isinstance(value, float) and math.isnan(value):
        return "NaN"  # which is equal to itself
    if isinstance(value, (int, float, bool)):
        return value
    raise Unanswerable(f"is a {type(value).__name__}")


def real_values(
    owner: torch.nn.Module | Mapping[str, Any],
    graph: fx.Graph,
    ends: Sequence[fx.Node],
    real: Callable[[fx.Node], Any],
    set_autocast: Callable[[], None] | None = None,
) -> tuple[Any, ...]:
    """The values of some nodes for the inputs that ``real`` gives. Raises :class:`Unanswerable`.

    Runs in a thread of its own, on the same stream: while a model is traced, this thread's operations may be diverted
    at any level, down to fake kernels. There ``set_autocast`` is called first; None: autocast is as in this thread.
    """
    piece = Slice(owner, graph, ends)
    values = [real(node) for node in piece.inputs]
    device = next((v.device for v in values if isinstance(v, torch.Tensor) and v.is_cuda), None)
    stream = torch.cuda.stream(None if device is None else torch.cuda.current_stream(device))

    prepare = set_autocast or Autocast.now().set

    def run() -> tuple[Any, ...]:
        prepare()
        with stream:
            return piece(values)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def settle(env: ShapeEnv, node: fx.Node, value: Any) -> None:
    """Let the symbols that a node brought into its graph be what its real value says.

    Raises :class:`Unanswerable` if that contradicts what is already known of a symbol.
    """
    for symbol, path in node.meta[BINDINGS].items():
        unknown = env.replace(symbol)
        if isinstance(unknown, sympy.Symbol):
            env.size_like.discard(unknown)  # sizes that are not known are not taken for 0 or 1; this one is known
            env._set_replacement(unknown, sympy.sympify(pytree.key_get(value, path)), "answered by the inputs")
    if is_open(env, node):
        raise Unanswerable(f"contradicts what is known of {node.name}")


def brings_in_sizes(node: fx.Node) -> bool:
    """Whether the size of the node's value, or the number it is, follows from values, known or not."""
    return bool(node.meta.get(BINDINGS)) or node.target is SIZED


def is_open(env: ShapeEnv, node: fx.Node) -> bool:
    """Whether a node brought in a symbol that stands for no plain number yet."""
    return any(env.replace(symbol).free_symbols for symbol in node.meta[BINDINGS])


def numbers(value: Any) -> Iterator[Any]:
    """All sizes, strides and numbers in a value, in order."""
    if isinstance(value, torch.Tensor):
        yield from value.shape
        if value.layout is torch.strided:
            yield from (*value.stride(), value.storage_offset())
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from numbers(item)
    else:
        yield value


def shape_env(node: fx.Node) -> ShapeEnv | None:
    """What knows of the symbols that a node brought into its graph; None if it brought none."""
    if not node.meta.get(BINDINGS):
        return None
    for number in numbers(node.meta.get("example_value")):
        if isinstance(number, SYMBOLIC):
            env: ShapeEnv = number.node.shape_env
            return env
    return None


def is_symbolic(node: fx.Node) -> bool:
    """Whether a node's value has symbols among its sizes, be they settled or not."""
    return any(isinstance(number, SYMBOLIC) for number in numbers(node.meta.get("example_value")))


def open_symbols(value: Any) -> set[sympy.Symbol]:
    """The unbacked symbols among the sizes of a tensor (or of several)."""
    if isinstance(value, (list, tuple)):
        return {symbol for item in value for symbol in open_symbols(item)}
    if not isinstance(value, torch.Tensor):
        return set()
    found = (number for number in numbers(value) if isinstance(number, SYMBOLIC))
    return {symbol for number in found for symbol in free_unbacked_symbols(number)}


def plain(value: Any) -> Any:
    """A value without settled symbols: sizes that are known are plain numbers."""
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(plain(item) for item in value) if type(value) in (list, tuple) else value
    if not isinstance(value, FakeTensor) or open_symbols(value) or value.layout is not torch.strided:
        return value
    if not any(isinstance(number, SYMBOLIC) for number in numbers(value)):
        return value
    with value.fake_mode:
        return torch.empty_strided(
            tuple(map(int, value.shape)), tuple(map(int, value.stride())), dtype=value.dtype, device=value.device
        )


def sized_by_values(graph: fx.Graph) -> list[fx.Node]:
    """The tensors whose size comes from values: those with symbols in their size that no operand has."""
    found = []
    several: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or not is_symbolic(node):
            continue
        operands = [n for n in node.all_input_nodes if is_symbolic(n)]
        if node.meta.get(BINDINGS) or all(n in several for n in operands):
            if tensor_of(node) is not None:
                found.append(node)
            elif isinstance(node.meta["example_value"], (list, tuple)):
                several.add(node)
    return found


def hold_to_size(node: fx.Node) -> None:
    """Pass a value on through :data:`~difa_compile.ops.sized.SIZED`."""
    value = tensor_of(node)
    assert value is not None
    with node.graph.inserting_after(node):
        held = node.graph.call_function(SIZED, (node, list(value.shape)))
    held.meta = {**node.meta, "example_value": value.contiguous()}
    held.meta.pop(BINDINGS, None)
    node.replace_all_uses_with(held, delete_user_cb=lambda user: user is not held)


# --- questions of a finished capture ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Questions:
    """The questions that a capture has answered, by which a later call is judged."""

    program: Slice | None
    positions: tuple[int, ...]
    """Where the program's inputs stand among the graph's."""
    answers: tuple[Answer, ...]

    def check(self, args: Sequence[Any]) -> None:
        """Raise :class:`InputValuesError` if the graph's inputs answer otherwise than those it was captured with."""
        if self.program is None:
            return
        try:
            found = tuple(map(answer_of, self.program([args[i] for i in self.positions])))
        except (IndexError, RuntimeError, ValueError) as error:  # the ways in which sizes do not fit
            raise InputValuesError(self._message(str(error).splitlines()[0])) from error
        if found != self.answers:
            was, now = next((a, b) for a, b in zip(self.answers, found, strict=True) if a != b)
            raise InputValuesError(self._message(f"{shown(now)} where it was {shown(was)}"))

    @staticmethod
    def _message(what: str) -> str:
        return (
            "the model's sizes or branches depend on the values of its inputs (for instance on how many tokens a mask "
            f"shows), and this call has others than the one it was captured for: {what}. Use difa_compile.apply, which "
            "captures the model anew, or call torch._dynamo.reset() first"
        )


def shown(answer: Answer) -> str:
    text = str(answer)
    return text if len(text) <= 60 else f"{text[:56]} ..."


NO_QUESTIONS = Questions(None, (), ())


def answer_questions(module: fx.GraphModule, facts: Facts) -> fx.GraphModule:
    """Answer the graph's questions, in place, and keep them (:class:`Questions`)."""
    facts.keep(answer(module, facts.inputs))
    return module


def answer(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Questions:
    """Answer a captured graph's questions with its real inputs, in place, and return them.

    Sizes that are so known become plain numbers in the values' metadata, and results of such sizes pass through
    :data:`~difa_compile.ops.sized.SIZED`, which holds them to it. What the inputs alone do not answer stays symbolic,
    and so does a number that no size depends on.
    """
    graph = module.graph
    placeholders = graph.find_nodes(op="placeholder")
    where = {node: i for i, node in enumerate(placeholders)}
    wanted = {symbol for node in graph.nodes for symbol in open_symbols(node.meta.get("example_value"))}
    questions = []
    for node in graph.nodes:
        env = shape_env(node)
        if env is None and node.target is not asked:
            continue
        try:
            if env is not None and is_open(env, node):
                if not wanted & {s for symbol in node.meta[BINDINGS] for s in env.replace(symbol).free_symbols}:
                    continue
                (value,) = real_values(module, graph, [node], lambda n: example_inputs[where[n]])
                settle(env, node, value)
            else:
                leading_to(graph, [node])
        except Unanswerable:
            continue
        questions.append(node)
    if not questions:
        return NO_QUESTIONS
    program = Slice(module, graph, questions)
    found = tuple(map(answer_of, program([example_inputs[where[node]] for node in program.inputs])))
    varying = [node for node in sized_by_values(graph) if not open_symbols(node.meta["example_value"])]
    for node in graph.nodes:
        node.meta["example_value"] = plain(node.meta.get("example_value"))
    for node in varying:
        hold_to_size(node)
    for node in questions:
        if node.target is asked:
            graph.erase_node(node)
    module.recompile()
    return Questions(program, tuple(where[node] for node in program.inputs), found)
