"""Predicates and small helpers over Dynamo graphs: the only place that knows which targets mean what.

Every front end goes through these: passes ask ``is_attention(node)``, they never compare targets themselves.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

ATTENTION_TARGETS = {F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default}
LINEAR_TARGETS = {F.linear, torch._C._nn.linear, torch.ops.aten.linear.default}

REARRANGING = {
    "view", "reshape", "flatten", "unflatten", "transpose", "permute", "contiguous", "to", "type_as", "type", "float",
    "half", "bfloat16", "squeeze", "unsqueeze", "getitem", "split", "split_with_sizes", "chunk", "unbind", "clone",
    "swapaxes", "movedim", "detach", "narrow",
}  # fmt: skip
"""Ops that only move, cut or convert values; what may stand between the attention and its output projection."""

VIEWS = REARRANGING - {"clone"} | {
    "expand", "expand_as", "alias", "select", "view_as", "t", "diagonal", "view_as_real", "view_as_complex", "swapdims",
    "moveaxis", "adjoint", "real", "imag", "getattr", "squeeze_", "unsqueeze_",
}  # fmt: skip


def op_name(node: fx.Node) -> str:
    """The plain name of what a node calls: ``"linear"``, ``"view"``, ``"add"``; "" for placeholders and outputs."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return str(getattr(node.target, "__name__", node.target))


def is_attention(node: fx.Node) -> bool:
    """Whether the node is a scaled dot product attention, or FlexAttention with functions of its own."""
    return node.op == "call_function" and (node.target in ATTENTION_TARGETS or is_flex(node))


def is_flex(node: fx.Node) -> bool:
    """Whether the node is a FlexAttention, whose value is a tuple with the attention first."""
    return node.op == "call_function" and op_name(node) == "flex_attention"


def is_linear(node: fx.Node) -> bool:
    """Whether the node is a linear projection."""
    return node.op == "call_function" and node.target in LINEAR_TARGETS


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor that stands for a node's value (Dynamo's ``example_value``, export's ``val``), or None."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, torch.Tensor) else None


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The node's shape in plain integers; () where the node holds no tensor. -1: known only when the model runs."""
    value = tensor_of(node)
    return () if value is None else plain_shape(value)


def plain_shape(value: torch.Tensor) -> tuple[int, ...]:
    """A fake tensor's shape in plain integers. -1: known only when the model runs."""
    return tuple(-1 if free_unbacked_symbols(size) else int(size) for size in value.shape)


def is_parameter(node: fx.Node) -> bool:
    """Whether a placeholder is a parameter or buffer of the model."""
    value = node.meta.get("example_value")
    if node.op == "get_attr":
        return True
    if node.op != "placeholder":
        return False
    name = source_name(node)
    return isinstance(value, torch.nn.Parameter) or "_parameters" in name or "_buffers" in name


def source_name(node: fx.Node) -> str:
    """Where Dynamo found the value of a placeholder (``L['args'][0]``), or "" if it is not an input of the capture."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name() if callable(source.name) else source.name
    return str(name)


def copy_module(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy of a captured graph that may be changed, and for each node of the graph its copy."""
    mapping: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, mapping)
    original = next(node for node in module.graph.nodes if node.op == "output")
    graph.output(output).meta = copy.copy(original.meta)
    for old, new in mapping.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    fresh = fx.GraphModule(module, graph)
    keep_origin(fresh, module)
    return fresh, mapping


def keep_origin(fresh: fx.GraphModule, module: fx.GraphModule) -> None:
    """Let ``fresh``, made from ``module`` or a part of it, count as captured by Dynamo.

    Only of such graphs do AOTAutograd and inductor believe which inputs are parameters and so stay where they are;
    CUDA graphs copy all others at every call. Each placeholder must have a ``_dynamo_source``, None if it is not an
    input of the captured graph.
    """
    fresh.meta = dict(module.meta)
    if hasattr(module, "_param_name_to_source"):
        fresh._param_name_to_source = module._param_name_to_source


def operation(node: fx.Node, module: fx.GraphModule) -> str:
    """What a node does, in a text that is equal for nodes that do the same: without names, paths and arguments.

    Attributes of ``module`` (constants) are only equal to themselves, as long as it lives.
    """
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return f"attribute {id(module)} {node.target}"
    target = node.target if isinstance(node.target, str) else torch.typename(node.target) + repr(node.target)
    return f"{node.op} {target}"


def module_path(node: fx.Node) -> str:
    """The dotted path of the module that made a node: ``transformer_blocks.0.attn1``; "" for the model itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    raw: str = list(stack.values())[-1][0]
    return clean_path(raw)


def clean_path(raw: str) -> str:
    """Normalise Dynamo's ``L['self'].__dict__['_modules']['blocks'].0.attn1`` to ``blocks.0.attn1``."""
    path = re.sub(r"\.?__dict__\['_modules'\]", "", raw)
    path = re.sub(r"\._modules", "", path)
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    parts = [part for part in path.split(".") if part]
    for prefix in (["L", "self"], ["L", "fn"], ["L", "mod"], ["L"]):
        if parts[: len(prefix)] == prefix:
            parts = parts[len(prefix) :]
            break
    if parts and parts[0] in ("_orig_mod", "self"):
        parts = parts[1:]
    return ".".join(parts)


def block_path(path: str) -> str:
    """The repeated block a module path lies in: up to its first number (``blocks.3`` of ``blocks.3.attn1``), or ""."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ""


def mutated_argument(node: fx.Node) -> fx.Node | None:
    """The node whose value this node writes in place, or None."""
    name = op_name(node)
    of_operator = getattr(node.target, "__module__", "") == "_operator"  # which has and_, or_, not_ and is_
    in_place = (
        (node.op == "call_function" and node.target is operator.setitem)
        or (node.op == "call_method" and name.endswith("_") and not name.endswith("__"))
        or (node.op == "call_function" and not of_operator and name.endswith("_") and not name.endswith("__"))
        or (node.op == "call_function" and of_operator and name in IN_PLACE)
    )
    if in_place and node.args and isinstance(node.args[0], fx.Node):
        return node.args[0]
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    if node.kwargs.get("inplace") is True and node.args and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None


IN_PLACE = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"}


def alias_root(node: fx.Node) -> fx.Node:
    """The node that owns the memory a chain of views reads (the views' own input at the far end)."""
    while True:
        target = mutated_argument(node)
        if target is not None:
            node = target
        elif op_name(node) in VIEWS and node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        else:
            return node


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """A call's argument, given by position or by name."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def reachable_from(starts: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that depend on any of ``starts``, themselves included."""
    seen = set(starts)
    todo = list(seen)
    while todo:
        for user in todo.pop().users:
            if user not in seen:
                seen.add(user)
                todo.append(user)
    return seen


def influenced_by(starts: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes whose value depends on ``starts``, also where it was written into a buffer that they read."""
    seen = reachable_from(starts)
    while True:
        written = {alias_root(node) for node in seen if mutated_argument(node) is not None} - seen
        if not written:
            return seen
        seen |= reachable_from(written)


def reaching(ends: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that any of ``ends`` depends on, themselves included."""
    seen = set(ends)
    todo = list(seen)
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                todo.append(source)
    return seen
