"""Sites: what a plan records of one, what of it may be cached, and whether a plan can act on it."""

import pytest

from difa_compile.decision import FULL, Window
from difa_compile.layout import Layout
from difa_compile.passes.order import rewrite
from difa_compile.passes.site import SiteKind
from difa_compile.passes.variant import Context
from difa_compile.plan.data import SiteInfo
from difa_compile.plan.schedule import Role
from tests.support.tiny_models import captured, captured_plain, sites_of


def test_what_a_plan_records():
    _, _, module, values = captured_plain()
    first, second = sites_of(module, values)
    assert first.info == SiteInfo("layers.0.attention", "self", 2, 16, 24, 32, Layout((4, 6)))
    assert second.info == SiteInfo("layers.1.attention", "self", 2, 16, 24, 32, Layout((4, 6)))
    assert (first.tokens, first.mask, first.scale) == (24, "none", None)


def test_the_shapes_of_caches_are_those_of_what_variants_write():
    """The residual first, then one for each stream that leaves the region: joint attention has two."""
    pytest.importorskip("diffusers")
    _, _, module, values = captured("sd3")
    first, last = sites = sites_of(module, values)
    assert first.cache_shapes == ((2, 2, 31, 16), (2, 7, 32), (2, 24, 32))
    assert last.cache_shapes == ((2, 2, 31, 16), (2, 24, 32)), "the last block drops its text"
    role = Role(FULL, emit_output=True, emit_residual=True, residual_window=Window("box", 1))
    variant = rewrite(module, sites, [role] * 2, Context())
    written = dict(zip(variant.cache_outputs, variant.module(*values)[1:], strict=True))
    for site in sites:
        shapes = [tuple(value.shape) for name, value in written.items() if name.site == site.path]
        assert tuple(shapes) == site.cache_shapes


def test_a_plan_acts_on_all_but_cross_attention():
    pytest.importorskip("diffusers")
    from difa_compile.passes.analyse.find_attention import find_attention

    _, _, module, values = captured("pixart")
    rewritable = sites_of(module, values)
    every = find_attention(module, values=values)
    assert [site.kind for site in every] == [SiteKind.SELF, SiteKind.CROSS] * 2
    assert [site.path for site in every if site.rewritable] == [site.path for site in rewritable]


def test_a_region_is_told_in_the_order_of_the_graph():
    _, _, module, values = captured_plain(rotate=True)
    place = {node: i for i, node in enumerate(module.graph.nodes)}
    for site in sites_of(module, values):
        region = site.region
        order = [place[node] for node in region.interior]
        assert order == sorted(order)
        assert {region.attention, *region.outputs} <= set(region.interior)
        assert not set(region.inputs) & set(region.interior)
