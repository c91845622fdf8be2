"""Which argument of the model each input of a graph is, and which of them is the noisy sample.

Dynamo names a placeholder after the local variable of the function it captures: ``l_hidden_states_``. Where that
function takes ``*args``, as the wrapper of a decorated ``forward`` does, all positional arguments would be one
variable; then the signature of the model says what each is called. Elements of a list (of samples, say) stay one
argument.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

from torch import fx, nn

from difa_compile.passes.graph import is_parameter, shape_of, source_name, tensor_of

_NAME = "argument"
"""Key in a placeholder's ``meta``."""


def name_arguments(graph: fx.Graph) -> None:
    """Note, of inputs that come in as ``*args`` or ``**kwargs``, which argument of the model each is.

    To be called while Dynamo compiles the graph: later nobody knows what function it was captured from.
    """
    frame = captured_frame()
    if frame is None:
        return
    code, variables = frame
    named = code.co_argcount + code.co_kwonlyargcount
    has_args, has_kwargs = bool(code.co_flags & inspect.CO_VARARGS), bool(code.co_flags & inspect.CO_VARKEYWORDS)
    args = code.co_varnames[named] if has_args else ""
    kwargs = code.co_varnames[named + has_args] if has_kwargs else ""
    model = variables.get(code.co_varnames[0]) if code.co_argcount else None
    names = _positional_names(model) if isinstance(model, nn.Module) else []
    before = code.co_argcount - 1  # those in front of *args, without self
    for node in graph.find_nodes(op="placeholder"):
        found = re.match(r"L\['(\w+)'\]\[(?:(\d+)|'(\w+)')\]", source_name(node))
        if found is None:
            continue
        variable, index, key = found.groups()
        if key is not None and variable == kwargs:
            node.meta[_NAME] = key
        elif index is not None and variable == args:
            position = before + int(index)
            node.meta[_NAME] = names[position] if position < len(names) else f"{args}[{index}]"


def captured_frame() -> tuple[CodeType, Mapping[str, Any]] | None:
    """Code and local variables of the function that Dynamo is capturing in this thread; None where it captures none."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        translator = InstructionTranslator.current_tx()
    except AttributeError:  # torch 2.13 has it in a variable of the thread that is only there meanwhile
        return None
    return None if translator is None else (translator.f_code, translator.f_locals)  # None: torch 2.12


def _positional_names(model: nn.Module) -> list[str]:
    """Names of the arguments that the model's ``forward`` takes by position, in order, decorators looked through."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, each in inspect.signature(model.forward).parameters.items() if each.kind in kinds]


def argument_name(node: fx.Node) -> str:
    """The argument a placeholder stands for, without the number of an element of a list."""
    if _NAME in node.meta:
        named: str = node.meta[_NAME]
        return named
    name = node.name.strip("_").removeprefix("l_").removeprefix("kwargs_").strip("_")
    return re.sub(r"_\d+$", "", name)


def latent_inputs(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """The placeholders of the noisy sample: by their usual name; else, of inputs that come in without names, as
    ``*args`` that nothing tells apart, the first, as is usual too; else the largest floating-point input.

    Several where the model takes a list of samples.
    """
    inputs = [
        node
        for node in graph.nodes
        if node.op == "placeholder"
        and not is_parameter(node)
        and (value := tensor_of(node)) is not None
        and value.is_floating_point()
        and value.ndim >= 2
    ]
    named = {node: argument_name(node) for node in inputs}
    for wanted in ("hidden_states", "sample", "latents", "latent", "x"):
        found = tuple(node for node in inputs if named[node] == wanted)
        if found:
            return found
    for wanted in ("hidden_states", "sample", "latent", "x_"):
        for node in inputs:
            if named[node].startswith(wanted):
                return (node,)
    for node in inputs:
        if named[node].endswith("latents"):
            return (node,)
    chosen = min(inputs, key=_position, default=None)
    if chosen is None or math.isinf(_position(chosen)):
        chosen = max(inputs, key=lambda node: math.prod(shape_of(node)), default=None)
    return () if chosen is None else tuple(node for node in inputs if named[node] == named[chosen])


def _position(node: fx.Node) -> float:
    """Where an input without a name stands among ``*args``; infinity for those that have a name."""
    found = re.fullmatch(r"\w+\[(\d+)\]", argument_name(node))
    return int(found[1]) if found else math.inf


def sample_sizes(latents: Sequence[fx.Node]) -> tuple[int, ...] | None:
    """Sizes of the noisy sample behind its first dimension (the batch; of the samples in a list, the channels)."""
    found = {shape_of(latent)[1:] for latent in latents}
    return found.pop() if len(found) == 1 else None
