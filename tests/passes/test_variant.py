"""Variants: copies of a graph with their sites, the caches they read and write, values kept right as nodes change."""

import pytest
import torch

from difa_compile.decision import REUSE, Decision
from difa_compile.passes.caches import CacheName
from difa_compile.passes.graph import is_linear, module_path, shape_of, tensor_of
from difa_compile.passes.variant import Context, refresh, start_variant
from difa_compile.plan.schedule import FULL_ROLE, Role
from tests.support.printed import changes, graph_text, one_attention, printed
from tests.support.tiny_models import captured_plain, sites_of


def variant_of(role=FULL_ROLE):
    module, sites, values = one_attention()
    return start_variant(module, sites, [role], Context()), module, values


def test_a_variant_begins_as_a_copy_with_sites_of_its_own():
    variant, module, values = variant_of(Role(REUSE))
    (target,) = variant.targets
    nodes = set(variant.graph.nodes)
    assert not nodes & set(module.graph.nodes)
    assert {*target.site.region.interior, *target.site.region.inputs, target.attention, *target.outputs} <= nodes
    assert target.role == Role(REUSE)
    assert printed(variant.module) == printed(module)
    assert torch.equal(variant.finish()(*values)[0], module(*values)[0])


def test_parameters_of_the_copy_are_known_as_parameters():
    """Of graphs that Dynamo captured AOTAutograd believes which inputs stay where they are."""
    variant, module, _ = variant_of()
    mine, theirs = (each.graph.find_nodes(op="placeholder") for each in (variant.module, module))
    assert [node._dynamo_source for node in mine] == [node._dynamo_source for node in theirs]
    assert all(node._dynamo_source is not None for node in mine)


def test_one_role_is_given_for_each_site():
    _, _, module, values = captured_plain()
    with pytest.raises(ValueError, match="zip"):
        start_variant(module, sites_of(module, values), [FULL_ROLE])


def test_a_cache_is_read_once_and_returned_contiguous():
    variant, module, values = variant_of()
    output = variant.targets[0].outputs[0]
    query = output.graph.find_nodes(op="call_method", target="transpose")[0]
    one = variant.read_cache(CacheName.output("attention", 0), output)
    assert variant.read_cache(CacheName.output("attention", 0), output) is one
    other = variant.read_cache(CacheName.residual("attention"), query)
    assert not tensor_of(query).is_contiguous()
    assert tensor_of(other).is_contiguous()
    assert [one._dynamo_source, other._dynamo_source] == [None, None]
    variant.write_cache(CacheName.output("attention", 1), query)
    finished = variant.finish()
    assert changes(printed(module), printed(finished)) == graph_text("""
        ...
        + %cache_0 = input  float32 (2, 6, 16), cache.attention.output.0
        + %cache_1 = input  float32 (2, 2, 6, 8), cache.attention.residual
        ...
        + %contiguous = contiguous(%query)  float32 (2, 2, 6, 8)
        ...
        - return (%add)
        + return (%add, %contiguous)
    """)
    inputs = [*values, torch.empty(2, 6, 16), torch.empty(2, 2, 6, 8)]
    output, written = finished(*inputs)
    assert torch.equal(output, module(*values)[0])
    assert written.is_contiguous()


def test_what_is_inserted_stands_in_the_module_of_its_neighbour():
    variant, _, _ = variant_of()
    (attention,) = (target.attention for target in variant.targets)
    halved = variant.call_after(attention, torch.narrow, (attention, 0, 1, 1))
    flat = variant.call_after(halved, "flatten", (halved,), {"start_dim": 2})
    assert (halved.prev, flat.prev) == (attention, halved)
    assert (shape_of(halved), shape_of(flat)) == ((1, 2, 6, 8), (1, 2, 48))
    assert module_path(flat) == module_path(attention)
    assert variant.latest is flat


def test_a_node_is_computed_anew_from_what_it_is_given():
    variant, _, _ = variant_of()
    linears = [node for node in variant.graph.nodes if is_linear(node)]
    source = linears[0].args[0]
    half = variant.call_after(source, torch.narrow, (source, 0, 0, 1))
    linears[0].replace_input_with(source, half)
    assert shape_of(linears[0]) == (2, 6, 16)
    refresh(linears[0])
    assert shape_of(linears[0]) == (1, 6, 16)
    linears[1].args = (half, half, None)
    with pytest.raises(Exception, match="2 dimensions"):
        variant.refresh(linears[1])
    assert variant.latest is linears[1], "an error names the node it came of"


def test_roles_are_kept_with_their_sites():
    _, _, module, values = captured_plain()
    roles = [Role(Decision.parse("window(box:1)")), Role(REUSE)]
    variant = start_variant(module, sites_of(module, values), roles)
    assert [(target.site.path, target.role) for target in variant.targets] == [
        ("layers.0.attention", roles[0]),
        ("layers.1.attention", roles[1]),
    ]
