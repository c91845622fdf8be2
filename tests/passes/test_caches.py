"""Names of caches: built and taken apart in one place."""

import pytest

from difa_compile.passes.caches import CacheName


@pytest.mark.parametrize("site", ["attention", "blocks.0.attn1", "a.output.3", "b.residual", "cache.c", "x.output.1.y"])
@pytest.mark.parametrize("number", [0, 1, 12])
def test_a_name_is_taken_apart_into_what_it_was_built_of(site, number):
    output, residual = CacheName.output(site, number), CacheName.residual(site)
    assert (output.kind, output.site, output.number) == ("output", site, number)
    assert (residual.kind, residual.site, residual.number) == ("residual", site, 0)


@pytest.mark.parametrize("site", ["attention", "blocks.0.heads", "a.heads.3", "b.residual", "x.heads_residual.0-3,5"])
@pytest.mark.parametrize(("heads", "text"), [((0,), "0"), ((0, 1, 2, 7), "0-2,7")])
def test_names_of_single_heads(site, heads, text):
    for residual, kind in ((False, "heads"), (True, "heads_residual")):
        name = CacheName.heads(site, heads, residual=residual)
        assert name == f"cache.{site}.{kind}.{text}"
        assert (name.kind, name.site, name.number, name.of_heads) == (kind, site, 0, True)
        assert name.at("b") == CacheName.heads("b", heads, residual=residual)
    assert CacheName.output(site, 1).kind == "output"
    assert CacheName.residual(site).kind == "residual"
    assert not CacheName.output(site, 1).of_heads


def test_it_is_a_string():
    name = CacheName.output("blocks.0.attn1", 1)
    assert name == "cache.blocks.0.attn1.output.1"
    assert {name: 1}["cache.blocks.0.attn1.output.1"] == 1
    assert CacheName.residual("blocks.0.attn1") == "cache.blocks.0.attn1.residual"


def test_the_same_cache_at_another_site():
    assert CacheName.output("a", 2).at("b") == CacheName.output("b", 2)
    assert CacheName.residual("a").at("b") == CacheName.residual("b")
    assert isinstance(CacheName.residual("a").at("b"), CacheName)
