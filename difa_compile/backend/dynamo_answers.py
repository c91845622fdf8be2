"""Telling Dynamo the answers to what a model's Python code asks of its data.

A branch on a tensor (``if is_text_only:``), a list of lengths (``mask.sum(1).tolist()``) or a size that Python code
needs as a number ends a capture by Dynamo. Within :func:`answering` such a question is answered while the model is
traced, if its inputs alone answer it (:mod:`difa_compile.passes.prepare.questions`): the few nodes that lead to it run
on the real inputs. The graph keeps the question, so that every later call is checked for the answer.

This is the only module that reaches into Dynamo's translation: three places of it are replaced for the time of a
capture, for the thread that captures. Where a version of torch has them elsewhere, nothing is replaced, and such
models are refused as Dynamo refuses them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

from difa_compile.passes.prepare.questions import BINDINGS, Unanswerable, asked, real_values, settle

_answering: ContextVar[bool] = ContextVar("difa_compile_answering", default=False)
_lock = threading.Lock()
_users = 0
_replaced: list[Callable[[], None]] = []
"""How to put back what is replaced."""
_unanswered: weakref.WeakKeyDictionary[ShapeEnv, set[sympy.Symbol]] = weakref.WeakKeyDictionary()


@contextmanager
def answering() -> Iterator[None]:
    """Within this block, in this thread, models whose branches or sizes depend on their inputs' values are captured
    for the inputs they are called with."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _replace()
    token = _answering.set(True)
    try:
        yield
    finally:
        _answering.reset(token)
        with _lock:
            _users -= 1
            if not _users:
                while _replaced:
                    _replaced.pop()()


def _replace() -> None:
    from torch._dynamo import symbolic_convert
    from torch._dynamo.variables.tensor import TensorVariable

    evaluate = ShapeEnv.evaluate_expr

    def evaluate_answered(self: ShapeEnv, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        if _answering.get():
            orig_expr = answered(self, orig_expr)
        return evaluate(self, orig_expr, *args, **kwargs)

    _set(ShapeEnv, "evaluate_expr", evaluate_answered)
    if hasattr(TensorVariable, "method_tolist"):
        listed = TensorVariable.method_tolist

        def list_answered(self: Any, tx: Any) -> Any:
            return constant(tx, self) or listed(self, tx)

        _set(TensorVariable, "method_tolist", list_answered)
    translators = [symbolic_convert.InstructionTranslatorBase]
    for translator in translators:
        translators += [cls for cls in translator.__subclasses__() if cls not in translators]
        for code, handler in enumerate(getattr(translator, "dispatch_table", ())):
            if getattr(handler, "__qualname__", "") == "generic_jump.<locals>.inner":
                _set_item(translator.dispatch_table, code, _jump_answered(handler))


def _set(owner: Any, name: str, value: Any) -> None:
    before = getattr(owner, name)
    setattr(owner, name, value)
    _replaced.append(lambda: setattr(owner, name, before))


def _set_item(table: list[Any], index: int, value: Any) -> None:
    before = table[index]
    table[index] = value

    def put_back() -> None:
        table[index] = before

    _replaced.append(put_back)


def _jump_answered(handler: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """A handler of jumps for which a tensor on the stack is the truth it holds."""

    def jump(self: Any, inst: Any) -> None:
        if inst.opname.startswith("POP_JUMP") and self.stack[-1].is_tensor():
            truth = constant(self, self.stack[-1], truth=True)
            if truth is not None:
                self.stack[-1] = truth
        handler(self, inst)

    return jump


def constant(tx: Any, variable: Any, truth: bool = False) -> Any:
    """Dynamo's constant for a tensor's values as Python has them, or None where the inputs alone do not answer.

    ``truth``: for whether it holds, which a tensor of several values does not tell.

    The question stays in the graph as a node.
    """
    from torch._dynamo.variables import VariableTracker

    tracer = tx.output.current_tracer
    if not _answering.get() or tracer.parent is not None:
        return None
    question = tx.output.create_proxy("call_function", asked, (variable.as_proxy(), truth), {}).node
    try:
        (value,) = real_values(tx.output.nn_modules, tracer.graph, [question], real_input, autocast_around(tx))
    except (Unanswerable, RuntimeError):
        tracer.graph.erase_node(question)
        return None
    return VariableTracker.build(tx, value)


def answered(env: ShapeEnv, expression: sympy.Basic) -> sympy.Basic:
    """The expression with its unbacked symbols settled, as far as the inputs alone answer them."""
    from torch._dynamo.symbolic_convert import tls

    tx = getattr(tls, "current_tx", None)
    if tx is None or not isinstance(expression, sympy.Basic) or tx.output.shape_env is not env:
        return expression
    unanswered = _unanswered.setdefault(env, set())
    graph = tx.output.current_tracer.graph
    expression = env.replace(expression)
    for symbol in free_unbacked_symbols(expression) - unanswered:
        node = next((n for n in graph.nodes if symbol in n.meta.get(BINDINGS, ())), None)
        if node is None or tx.output.current_tracer.parent is not None:
            continue  # of an operation in progress
        try:
            (value,) = real_values(tx.output.nn_modules, graph, [node], real_input, autocast_around(tx))
            settle(env, node, value)
        except Unanswerable:
            unanswered.add(symbol)
    return env.replace(expression)


def autocast_around(tx: Any) -> Callable[[], None]:
    """Sets autocast, in the thread that calls it, to what it is around the model that is traced.

    What it is in the thread that traces tells nothing: there the model's own regions are entered, which its graph has
    too, and within an operation autocast is off.
    """
    found = dict(tx.output.tracing_context.global_context.global_state)

    def put() -> None:
        for name, (put_one, value) in found.items():
            if name.startswith("autocast"):
                put_one(value)

    return put


def real_input(node: fx.Node) -> Any:
    """The real value of an input of a graph that Dynamo is about to build."""
    argument = node.meta.get("grapharg")
    if argument is None:
        raise Unanswerable(f"{node.name} is no input")
    value = argument.example
    if isinstance(value, torch.Tensor) and isinstance(value, torch._subclasses.FakeTensor):
        raise Unanswerable(f"{node.name} has no real value")
    return value
