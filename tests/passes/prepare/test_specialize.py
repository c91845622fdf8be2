"""Symbolic sizes become numbers, and the graph computes the same."""

import torch

from difa_compile.passes.prepare.specialize import fix_sizes
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
