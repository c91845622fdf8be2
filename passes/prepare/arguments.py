"""Note on each input of a graph which argument of the model it is.

Before: an input that nothing tells apart from others, ``L['args'][1]``. After: the same, noted to be ``timestep``.

Dynamo names a placeholder after the local variable of the function it captures: ``l_hidden_states_``. Where that
function takes ``*args``, as the wrapper of a decorated ``forward`` does, all positional arguments would be one
variable; then the signature of the model says what each is called. Elements of a list (of samples, say) stay one
argument.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from types import CodeType
from typing import Any

from torch import fx, nn

from difa_compile.passes.facts import Facts
from difa_compile.passes.graph import source_name

_NAME = "argument"
"""Key in a placeholder's ``meta``."""


def name_arguments(module: fx.GraphModule, facts: Facts) -> fx.GraphModule:
    """Note, of inputs that come in as ``*args`` or ``**kwargs``, which argument of the model each is.

    To be called while Dynamo compiles the graph: later nobody knows what function it was captured from.
    """
    del facts
    note_arguments(module.graph)
    return module


def note_arguments(graph: fx.Graph) -> None:
    """:func:`name_arguments` of a graph."""
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


def input_name(node: fx.Node) -> str:
    """The place of a placeholder among the model's arguments: ``timestep``, ``added_cond_kwargs.resolution``, and for
    the third of a list of samples ``hidden_states.2``."""
    found = re.match(r"L\['(\w+)'\](.*)$", source_name(node))
    if found is None:
        return argument_name(node)
    variable, inside = found.groups()
    parts = [one or other for one, other in re.findall(r"\[(?:(\d+)|'([^']+)')\]", inside)]
    if _NAME in node.meta:
        return ".".join([node.meta[_NAME], *parts[1:]])
    return ".".join([variable, *parts])
