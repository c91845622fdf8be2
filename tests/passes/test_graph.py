"""Predicates and helpers over graphs."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch.nn.attention.flex_attention import flex_attention

from difa_compile.passes.graph import (
    alias_root,
    argument,
    block_path,
    clean_path,
    copy_module,
    influenced_by,
    is_attention,
    is_flex,
    is_linear,
    is_parameter,
    module_path,
    mutated_argument,
    op_name,
    operation,
    plain_shape,
    reachable_from,
    reaching,
    shape_of,
    tensor_of,
)


def call(target, *args, **kwargs):
    """A node that calls this with a fresh placeholder in front of the other arguments."""
    graph = fx.Graph()
    create = graph.call_method if isinstance(target, str) else graph.call_function
    return create(target, (graph.placeholder("x"), *args), kwargs)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("view", "view"),
        (F.linear, "linear"),
        (operator.add, "add"),
        (torch.ops.aten.add.Tensor, "add"),
        (F.scaled_dot_product_attention, "scaled_dot_product_attention"),
    ],
)
def test_names_of_ops(target, name):
    assert op_name(call(target)) == name


def test_what_calls_nothing_has_no_name():
    assert op_name(fx.Graph().placeholder("x")) == ""


def test_attention_and_linears_are_told_by_their_functions():
    assert is_attention(call(F.scaled_dot_product_attention))
    assert is_attention(call(flex_attention))
    assert is_flex(call(flex_attention))
    assert not is_flex(call(F.scaled_dot_product_attention))
    assert is_linear(call(torch.ops.aten.linear.default))
    assert not is_linear(call(F.bilinear))


def test_shapes():
    node = fx.Graph().placeholder("x")
    assert (tensor_of(node), shape_of(node)) == (None, ())
    node.meta["val"] = torch.zeros(2, 3)
    assert shape_of(node) == plain_shape(torch.zeros(2, 3)) == (2, 3)
    node.meta["example_value"] = torch.zeros(4)
    assert shape_of(node) == (4,)


def test_parameters():
    graph = fx.Graph()
    learned, given, constant = graph.placeholder("w"), graph.placeholder("x"), graph.get_attr("c")
    learned.meta["example_value"] = torch.nn.Parameter(torch.zeros(2))
    assert [is_parameter(node) for node in (learned, given, constant)] == [True, False, True]


@pytest.mark.parametrize(
    ("node", "writes"),
    [
        (call("add_", 1), True),
        (call("add", 1), False),
        (call("__and__", 1), False),
        (call(operator.and_, 1), False),
        (call(operator.iadd, 1), True),
        (call(operator.setitem, 0, 1), True),
        (call(F.relu, inplace=True), True),
        (call(F.relu, inplace=False), False),
    ],
)
def test_writes_in_place(node, writes):
    assert mutated_argument(node) is (node.args[0] if writes else None)


def test_what_is_given_to_write_into_is_written():
    graph = fx.Graph()
    x, into = graph.placeholder("x"), graph.placeholder("into")
    assert mutated_argument(graph.call_function(torch.exp, (x,), {"out": into})) is into


def test_views_lead_to_the_memory_they_read():
    graph = fx.Graph()
    x = graph.placeholder("x")
    view = graph.call_method("transpose", (graph.call_method("view", (x, 2, 3)), 0, 1))
    written = graph.call_method("mul_", (view, 2))
    copied = graph.call_method("clone", (view,))
    assert alias_root(written) is x
    assert alias_root(copied) is copied


def test_arguments_by_position_and_name():
    node = call(F.softmax, dim=1)
    assert argument(node, 0, "input") is node.args[0]
    assert argument(node, 1, "dim") == 1
    assert argument(node, 2, "dtype", "none") == "none"


@pytest.mark.parametrize(
    ("raw", "path", "block"),
    [
        ("L['self'].__dict__['_modules']['blocks'].0.attn1", "blocks.0.attn1", "blocks.0"),
        ("L['self']._modules['blocks']._modules['12']", "blocks.12", "blocks.12"),
        ("L['self']._orig_mod.blocks[3].attn", "blocks.3.attn", "blocks.3"),
        ("L['self']", "", ""),
        ("L['fn'].norm", "norm", ""),
    ],
)
def test_module_paths(raw, path, block):
    assert clean_path(raw) == path
    assert block_path(path) == block
    node = call("view")
    assert module_path(node) == ""
    node.meta["nn_module_stack"] = {"outer": ("L['self']", object), "inner": (raw, object)}
    assert module_path(node) == path


def test_what_depends_on_what():
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    buffer = graph.call_method("clone", (y,))
    one = graph.call_method("neg", (x,))
    write = graph.call_function(operator.setitem, (graph.call_method("view", (buffer, -1)), 0, one))
    read = graph.call_method("neg", (buffer,))
    assert reachable_from([x]) == {x, one, write}
    assert influenced_by([x]) >= {x, one, write, buffer, read}
    assert y not in influenced_by([x])
    assert reaching([read]) == {read, buffer, y}


def test_a_copy_may_be_changed_and_keeps_its_sources():
    module = fx.symbolic_trace(lambda x: x.neg().exp())
    first = next(iter(module.graph.nodes))
    first._dynamo_source = "somewhere"
    copied, mapping = copy_module(module)
    assert mapping[first]._dynamo_source == "somewhere"
    assert [operation(node, module) for node in mapping] == [operation(node, module) for node in mapping.values()]
    copied.graph.erase_node(next(node for node in copied.graph.nodes if node.op == "output"))
    assert any(node.op == "output" for node in module.graph.nodes)
