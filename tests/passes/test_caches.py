"""Names of caches: built and taken apart in one place."""

import pytest

from difa_compile.passes.caches import CacheName


@pytest.mark.parametrize("site", ["attention", "blocks.0.attn1", "a.output.3", "b.residual", "cache.c", "x.output.1.y"])
@pytest.mark.parametrize("number", [0, 1, 12])
def test_a_name_is_taken_apart_into_what_it_was_built_of(site, number):
    output, residual = CacheName.output(site, number), CacheName.residual(site)
    assert (output.kind, output.site, output.number) == ("output", site, number)
    assert (residual.kind, residual.site, residual.number) == ("residual", site, 0)


def test_it_is_a_string():
    name = CacheName.output("blocks.0.attn1", 1)
    assert name == "cache.blocks.0.attn1.output.1"
    assert {name: 1}["cache.blocks.0.attn1.output.1"] == 1
    assert CacheName.residual("blocks.0.attn1") == "cache.blocks.0.attn1.residual"


def test_the_same_cache_at_another_site():
    assert CacheName.output("a", 2).at("b") == CacheName.output("b", 2)
    assert CacheName.residual("a").at("b") == CacheName.residual("b")
    assert isinstance(CacheName.residual("a").at("b"), CacheName)
