"""Turn a graph captured with symbolic sizes into one with plain numbers.

Dynamo makes a size symbolic when it changes from call to call (``dynamic=None`` and a second batch size). A plan is for
one grid, and every shape gets a capture of its own, so symbolic sizes are fixed to this call's values. Reading the
value of a symbol makes Dynamo guard on it: another size leads to another capture, never to a wrong answer.

Before: ``view(x, s0, -1, 64)`` with ``s0`` an input. After: ``view(x, 2, -1, 64)``; the input stays, unused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from difa_compile.errors import UnsupportedModelError
from difa_compile.passes.facts import Facts


def specialize(module: fx.GraphModule, facts: Facts) -> fx.GraphModule:
    """Replace symbolic integers by their values, in place."""
    del facts
    fix_sizes(module)
    return module


def fix_sizes(module: fx.GraphModule) -> int:
    """Replace symbolic integers by their values, in place. Returns how many nodes were replaced.

    Sizes that are only known when the model runs (how many tokens a mask shows) stay as they are:
    :func:`check_sizes` says whether they are in the way of a plan.
    """
    replaced = 0
    for node in list(module.graph.nodes):
        value = node.meta.get("example_value")
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) and node.op != "output":
            if free_unbacked_symbols(value):
                continue
            constant: int | float | bool
            if isinstance(value, torch.SymInt):
                constant = int(value)
            elif isinstance(value, torch.SymFloat):
                constant = float(value)
            else:
                constant = bool(value)
            replace_by_constant(node, constant)
            replaced += 1
        elif isinstance(value, torch.Tensor):
            for size in (*value.shape, *(value.stride() if value.layout is torch.strided else ())):
                if not free_unbacked_symbols(size):
                    int(size)  # guards on sizes that no node of its own stands for
    if replaced:
        for node in reversed(list(module.graph.nodes)):
            if node.op in ("call_function", "call_method") and not node.users and is_symbolic(node):
                module.graph.erase_node(node)
        module.recompile()
    return replaced


def check_sizes(nodes: Iterable[fx.Node]) -> None:
    """Raise :class:`UnsupportedModelError` if the size of one of these values is only known when the model runs.

    Such a value can live within a segment, which is compiled whole; it can't cross a cut, be cached or be halved.
    """
    for node in nodes:
        value = node.meta.get("example_value")
        if value is None or not isinstance(value, (torch.Tensor, torch.SymInt)) or not free_unbacked_symbols(value):
            continue
        made = re.findall(r'File "[^"]*/([^/"]+)", line (\d+), in (\w+)', node.meta.get("stack_trace") or "")
        raise UnsupportedModelError(
            "sizes inside the model depend on the values of its inputs (for instance on how many tokens a mask shows)"
            + (f", in {made[-1][2]} ({made[-1][0]}:{made[-1][1]})" if made else "")
            + "; a plan needs fixed sizes: call the model with inputs that take another path, or leave the mask out"
        )


def is_symbolic(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size))


def replace_by_constant(node: fx.Node, constant: int | float | bool) -> None:
    """Write ``constant`` wherever ``node`` is an argument."""
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: constant if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: constant if n is node else n)
