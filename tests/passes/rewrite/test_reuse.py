"""Reuse and forecasts: what is left of the graph, and that what was erased is exactly the region."""

from dataclasses import replace

import pytest
import torch
from torch import fx

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.layout import Layout
from difa_compile.ops import reference
from difa_compile.passes.caches import CacheName
from difa_compile.passes.graph import alias_root, mutated_argument
from difa_compile.passes.order import rewrite
from difa_compile.passes.rewrite.reuse import why_not_forecast
from difa_compile.passes.variant import Context
from difa_compile.plan.schedule import FULL_ROLE, Role
from tests.support.printed import graph_text, one_attention, printed
from tests.support.tiny_models import BareAttention, captured, captured_plain, counts, graph_of, in_place, sites_of

pytest.importorskip("diffusers")


def variant_of(module, values, role, half=0):
    sites = sites_of(module, values)
    return rewrite(module, sites, [role] * len(sites), Context(half))


@pytest.mark.parametrize(
    ("family", "full", "left"),
    [
        ("dit", (22, 2), (14, 0)),
        ("pixart", (26, 4), (18, 2)),
        ("sd3", (32, 2), (17, 0)),
        ("flux", (48, 4), (26, 0)),
        ("wan", (26, 4), (18, 2)),
    ],
)
def test_linears_and_attentions_left(family, full, left):
    _, _, module, values = captured(family)
    window = Decision.parse("window(band:2)")
    assert counts(module) == full
    assert counts(variant_of(module, values, FULL_ROLE).module) == full
    assert counts(variant_of(module, values, Role(FULL, emit_output=True)).module) == full
    assert counts(variant_of(module, values, Role(window)).module) == full
    assert counts(variant_of(module, values, Role(Decision.parse("full+cfg"))).module) == full
    assert counts(variant_of(module, values, Role(REUSE)).module) == left
    assert counts(variant_of(module, values, Role(Decision.parse("reuse+cfg"))).module) == left
    assert counts(variant_of(module, values, Role(Decision.parse("forecast:2+cfg"))).module) == left
    sites = len(sites_of(module, values))
    residual = Role(FULL, emit_residual=True, residual_window=window.window)
    assert counts(variant_of(module, values, residual).module) == (full[0], full[1] + sites)


def test_the_original_graph_stays_as_it_was():
    _, _, module, values = captured("sd3")
    before = [(node.op, node.name, str(node.args), str(node.kwargs)) for node in module.graph.nodes]
    for text in ("reuse", "reuse+cfg", "forecast:1+cfg", "full+cfg", "window(band:2)+residual+cfg"):
        variant_of(module, values, Role(Decision.parse(text)))
    assert [(node.op, node.name, str(node.args), str(node.kwargs)) for node in module.graph.nodes] == before


def test_joint_attention_has_one_cache_per_stream_that_is_read():
    _, _, module, values = captured("sd3")
    variant = variant_of(module, values, Role(REUSE))
    assert variant.cache_outputs == ()
    assert set(variant.cache_inputs) == {
        "cache.transformer_blocks.0.attn.output.0",
        "cache.transformer_blocks.0.attn.output.1",
        "cache.transformer_blocks.1.attn.output.0",
    }, "the last block drops its text stream"


def test_writes_in_place_go_with_the_region_and_only_with_it():
    """The rotary embedding writes slice by slice into an empty tensor; reuse must take the writes along."""
    model, inputs, module, values = captured_plain(rotate=True)
    assert sum(in_place(node) for node in module.graph.nodes) == 8
    inside = {node for site in sites_of(module, values) for node in site.region.interior}
    assert all(node in inside for node in module.graph.nodes if in_place(node))
    variant = variant_of(module, values, Role(REUSE))
    left = [node.name for node in variant.module.graph.nodes]
    assert not [name for name in left if name.startswith(("setitem", "empty_like", "linear_q"))]
    assert not any(mutated_argument(node) is not None for node in variant.module.graph.nodes)
    emit = variant_of(module, values, Role(FULL, emit_output=True))
    results = emit.module(*values)
    with torch.no_grad():
        assert torch.equal(results[0], model(**inputs))
    again = variant.module(*values, *results[1:])
    assert torch.equal(again[0], results[0])


def test_a_single_site_is_reused_and_the_other_left():
    _, _, module, values = captured_plain(rotate=True)
    sites = sites_of(module, values)
    variant = rewrite(module, sites, [FULL_ROLE, Role(REUSE)], Context())
    linears, attentions = counts(variant.module)
    assert (linears, attentions) == (counts(module)[0] - 2, 1)
    assert sum(in_place(node) for node in variant.module.graph.nodes) == 4
    assert variant.cache_inputs == ("cache.layers.1.attention.output.0",)


def test_alias_root_follows_views_to_the_memory():
    module = captured_plain(rotate=True)[2]
    roots = {alias_root(node).name for node in module.graph.nodes if in_place(node)}
    assert len(roots) == 4
    assert all(name.startswith("out") or "empty" in name for name in roots), roots


def test_the_region_is_gone_and_its_output_is_an_input():
    module, sites, _ = one_attention()
    assert printed(rewrite(module, sites, [Role(REUSE)], Context(1)).module) == graph_text("""
        %x = input  float32 (2, 6, 16), batch 0
        %cache_0 = input  float32 (2, 6, 16), cache.attention.output.0
        %add = add(%x, %cache_0)  float32 (2, 6, 16), batch 0
        return (%add)
    """)


def test_with_cfg_the_conditional_half_of_the_cache_is_taken_twice():
    module, sites, _ = one_attention()
    assert printed(rewrite(module, sites, [Role(Decision.parse("reuse+cfg"))], Context(1)).module) == graph_text("""
        %x = input  float32 (2, 6, 16), batch 0
        %cache_0 = input  float32 (2, 6, 16), cache.attention.output.0
        %narrow = narrow(%cache_0, 0, 1, 1)  float32 (1, 6, 16)
        %repeat = repeat(%narrow, 2, 1, 1)  float32 (2, 6, 16)
        %add = add(%x, %repeat)  float32 (2, 6, 16), batch 0
        return (%add)
    """)


def test_a_forecast_is_a_weighted_sum_of_the_last_outputs():
    module, sites, _ = one_attention()
    role = Role(Decision.parse("forecast:1"))
    assert printed(rewrite(module, sites, [role], Context(1)).module) == graph_text("""
        %x = input  float32 (2, 6, 16), batch 0
        %cache_0 = input  float32 (2,), cache.attention.weights
        %cache_1 = input  float32 (2, 6, 16), cache.attention.output.0
        %cache_2 = input  float32 (2, 6, 16), cache.attention.output.0.1
        %select = select(%cache_0, 0, 0)  float32 ()
        %mul = mul(%cache_1, %select)  float32 (2, 6, 16)
        %select_1 = select(%cache_0, 0, 1)  float32 ()
        %mul_1 = mul(%cache_2, %select_1)  float32 (2, 6, 16)
        %add_1 = add(%mul, %mul_1)  float32 (2, 6, 16)
        %add = add(%x, %add_1)  float32 (2, 6, 16), batch 0
        return (%add)
    """)


def test_a_forecast_in_half_precision_is_cast_once_at_the_end():
    torch.manual_seed(0)
    module, values = graph_of(BareAttention().eval().bfloat16(), {"x": torch.randn(2, 6, 16, dtype=torch.bfloat16)})
    sites = sites_of(module, values, layout=Layout((2, 3)))
    role = Role(Decision.parse("forecast:1+cfg"))
    assert printed(rewrite(module, sites, [role], Context(1)).module) == graph_text("""
        %x = input  bfloat16 (2, 6, 16), batch 0
        %cache_0 = input  float32 (2,), cache.attention.weights
        %cache_1 = input  bfloat16 (2, 6, 16), cache.attention.output.0
        %cache_2 = input  bfloat16 (2, 6, 16), cache.attention.output.0.1
        %to = to(%cache_1, float32)  float32 (2, 6, 16)
        %select = select(%cache_0, 0, 0)  float32 ()
        %mul = mul(%to, %select)  float32 (2, 6, 16)
        %to_1 = to(%cache_2, float32)  float32 (2, 6, 16)
        %select_1 = select(%cache_0, 0, 1)  float32 ()
        %mul_1 = mul(%to_1, %select_1)  float32 (2, 6, 16)
        %add_1 = add(%mul, %mul_1)  float32 (2, 6, 16)
        %to_2 = to(%add_1, bfloat16)  bfloat16 (2, 6, 16)
        %narrow = narrow(%to_2, 0, 1, 1)  bfloat16 (1, 6, 16)
        %repeat = repeat(%narrow, 2, 1, 1)  bfloat16 (2, 6, 16)
        %add = add(%x, %repeat)  bfloat16 (2, 6, 16), batch 0
        return (%add)
    """)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_forecast_is_the_reference(dtype):
    """To the bit: the same operations in the same order; for both halves, or for the conditional one, copied."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 16, dtype=dtype)
    module, values = graph_of(BareAttention().eval().to(dtype), {"x": x})
    sites = sites_of(module, values)
    past = [torch.randn(2, 6, 16, dtype=dtype) for _ in range(3)]
    weights = torch.tensor([2.5, -2.25, 0.75], dtype=reference.extrapolation_dtype(dtype))
    caches = {CacheName.output("attention", 0, age): output for age, output in enumerate(past)}
    caches[CacheName.weights("attention")] = weights
    wanted = reference.extrapolate(past, weights)
    for text, sum_ in (("forecast:2", wanted), ("forecast:2+cfg", reference.share_halves(wanted, 1))):
        variant = rewrite(module, sites, [Role(Decision.parse(text))], Context(1))
        assert variant.cache_outputs == ()
        assert set(variant.cache_inputs) == set(caches)
        (found,) = variant.module(*values, *[caches[name] for name in variant.cache_inputs])
        assert found.dtype == dtype
        assert torch.equal(found, x + sum_)


def test_what_is_no_floating_point_number_is_not_extrapolated():
    """Whatever it is that leaves a region: only sums of numbers mean anything between steps."""
    _, sites, _ = one_attention()
    assert why_not_forecast(sites[0]) is None
    graph = fx.Graph()
    for value, kind in (
        (torch.ones(2, dtype=torch.int64), "int64"),
        (torch.ones(2, dtype=torch.bool), "bool"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (None, "no tensor"),
    ):
        output = graph.placeholder("chosen")
        output.meta["example_value"] = value
        site = replace(sites[0], region=replace(sites[0].region, outputs=(*sites[0].region.outputs, output)))
        reason = f"{output.name}, which leaves the region, is {kind}: only floating-point numbers are extrapolated"
        assert why_not_forecast(site) == reason
