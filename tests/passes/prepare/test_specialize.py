"""Symbolic sizes become numbers, and the graph computes the same."""

import pytest
import torch

from difa_compile.errors import UnsupportedModelError
from difa_compile.passes.graph import shape_of
from difa_compile.passes.prepare.specialize import check_sizes, fix_sizes
from tests.support.printed import graph_text, printed
from tests.support.tiny_models import graph_of, plain, sites_of

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def symbols(module):
    found = []
    for node in module.graph.nodes:
        torch.fx.map_arg((node.args, node.kwargs), lambda argument: found.append(argument.meta.get("example_value")))
    return [value for value in found if isinstance(value, SYMBOLIC)]


def test_no_symbol_is_used_afterwards():
    model, inputs = plain()
    module, values = graph_of(model, inputs, dynamic=True)
    with torch.no_grad():
        before = model(**inputs)
        assert symbols(module), "the capture was meant to have symbolic sizes"
        assert fix_sizes(module) > 0
        assert not symbols(module)
        assert torch.equal(module(*values)[0], before)
    sites = sites_of(module, values)
    assert len(sites) == 2
    assert all(type(size) is int for site in sites for size in (*site.query_shape, *site.layout.grid))


def test_a_graph_of_plain_numbers_stays_as_it_is():
    model, inputs = plain()
    module, _ = graph_of(model, inputs)
    before = str(module.graph)
    assert fix_sizes(module) == 0
    assert str(module.graph) == before


def test_sizes_that_dynamo_holds_open_become_numbers():
    """The inputs of the sizes stay, for calls give them."""

    def folded(x):
        return x.view(x.shape[0], -1, 4).sum(1)

    module, values = graph_of(folded, {"x": torch.randn(3, 8)}, dynamic=True)
    assert "%view = view(%x, x.size().0, -1, 4)" in printed(module)
    assert fix_sizes(module) == 2
    assert printed(module) == graph_text("""
        x.size().0 = input
        x.size().1 = input
        %x = input  float32 (3, 8)
        %view = view(%x, 3, -1, 4)  float32 (3, 2, 4)
        %sum_1 = sum(%view, 1)  float32 (3, 4)
        return (%sum_1)
    """)
    tensor = next(value for value in values if isinstance(value, torch.Tensor))
    assert torch.equal(module(*values)[0], folded(tensor))


def test_what_only_the_weights_answer_stays_open_and_is_told_where_it_is_in_the_way():
    def chosen(x, weight):
        return (x @ weight).nonzero().float()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        module, _ = graph_of(chosen, {"x": torch.randn(3, 4), "weight": torch.randn(4, 4)})
    fix_sizes(module)
    (node,) = (node for node in module.graph.nodes if node.op == "call_method" and node.target == "nonzero")
    assert shape_of(node) == (-1, 2)
    with pytest.raises(UnsupportedModelError, match=r"in chosen \(test_specialize\.py:\d+\); a plan needs fixed sizes"):
        check_sizes([node])
    check_sizes(module.graph.find_nodes(op="placeholder"))
