"""Names of caches: built and taken apart in one place."""

import pytest

from difa_compile.passes.caches import CacheName, renew


@pytest.mark.parametrize(
    "site",
    ["attention", "blocks.0.attn1", "a.output.3", "b.residual", "cache.c", "x.output.1.y", "w.weights", "a.output.3.1"],
)
@pytest.mark.parametrize("number", [0, 1, 12])
def test_a_name_is_taken_apart_into_what_it_was_built_of(site, number):
    output, residual = CacheName.output(site, number), CacheName.residual(site)
    assert (output.kind, output.site, output.number) == ("output", site, number)
    assert (residual.kind, residual.site, residual.number, residual.age) == ("residual", site, 0, 0)
    weights = CacheName.weights(site)
    assert (weights.kind, weights.site, weights.number, weights.age) == ("weights", site, 0, 0)
    for age in (0, 1, 3):
        old = CacheName.output(site, number, age)
        assert (old.kind, old.site, old.number, old.age) == ("output", site, number, age)
        assert old.older() == CacheName.output(site, number, age + 1)
    assert CacheName.output(site, number, 0) == output


@pytest.mark.parametrize("site", ["attention", "blocks.0.heads", "a.heads.3", "b.residual", "x.heads_residual.0-3,5"])
@pytest.mark.parametrize(("heads", "text"), [((0,), "0"), ((0, 1, 2, 7), "0-2,7")])
def test_names_of_single_heads(site, heads, text):
    for residual, kind in ((False, "heads"), (True, "heads_residual")):
        name = CacheName.heads(site, heads, residual=residual)
        assert name == f"cache.{site}.{kind}.{text}"
        assert (name.kind, name.site, name.number, name.age, name.of_heads) == (kind, site, 0, 0, True)
        assert name.at("b") == CacheName.heads("b", heads, residual=residual)
    assert CacheName.output(site, 1).kind == "output"
    assert CacheName.residual(site).kind == "residual"
    assert not CacheName.output(site, 1).of_heads
    old, weights = CacheName.output(site, 1, 2), CacheName.weights(site)
    assert (old.kind, old.site, old.number, old.age) == ("output", site, 1, 2)
    assert (weights.kind, weights.site) == ("weights", site)


def test_it_is_a_string():
    name = CacheName.output("blocks.0.attn1", 1)
    assert name == "cache.blocks.0.attn1.output.1"
    assert {name: 1}["cache.blocks.0.attn1.output.1"] == 1
    assert CacheName.output("blocks.0.attn1", 1, 2) == "cache.blocks.0.attn1.output.1.2"
    assert CacheName.residual("blocks.0.attn1") == "cache.blocks.0.attn1.residual"
    assert CacheName.weights("blocks.0.attn1") == "cache.blocks.0.attn1.weights"


def test_the_same_cache_at_another_site():
    assert CacheName.output("a", 2).at("b") == CacheName.output("b", 2)
    assert CacheName.residual("a").at("b") == CacheName.residual("b")
    assert CacheName.output("a", 2, 3).at("b") == CacheName.output("b", 2, 3)
    assert CacheName.weights("a").at("b") == CacheName.weights("b")
    assert isinstance(CacheName.residual("a").at("b"), CacheName)


def test_caches_get_older_as_newer_ones_are_written():
    name = CacheName.output("a", 0)
    caches = {}
    for step in range(6):
        renew(caches, {name: step})
        newest_first = [caches[CacheName.output("a", 0, age)] for age in range(len(caches))]
        assert newest_first == list(range(step, max(-1, step - 4), -1))  # no forecast reads more than four


def test_only_what_is_written_makes_older():
    """Each output of each site by itself; a residual, weights and single heads have no age; what was let go leaves no
    gap behind."""
    a, other, b, residual = (
        CacheName.output("a", 0),
        CacheName.output("a", 1),
        CacheName.output("b", 0),
        CacheName.residual("a"),
    )
    caches = {a: 1, other: 10, b: 100, residual: 1000}
    renew(caches, {a: 2, residual: 2000})
    assert caches == {a: 2, a.older(): 1, other: 10, b: 100, residual: 2000}
    renew(caches, {})
    assert caches == {a: 2, a.older(): 1, other: 10, b: 100, residual: 2000}
    del caches[a]
    renew(caches, {a: 3})
    assert caches == {a: 3, a.older(): 1, other: 10, b: 100, residual: 2000}
    heads = CacheName.heads("a", (0, 1), residual=False)
    renew(caches, {heads: 7})
    renew(caches, {heads: 8})
    assert caches == {a: 3, a.older(): 1, other: 10, b: 100, residual: 2000, heads: 8}
