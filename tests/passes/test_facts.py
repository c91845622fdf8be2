"""Facts: kept under their class, and there once the pass that finds them has gone before."""

from dataclasses import dataclass

import pytest

from difa_compile.passes.analyse.find_attention import Sites
from difa_compile.passes.analyse.sample import Sample
from difa_compile.passes.facts import Facts
from difa_compile.passes.order import ANALYSIS, rewrite
from difa_compile.passes.segments import Split
from difa_compile.passes.variant import Context
from tests.support.tiny_models import captured_plain, sites_of


@dataclass(frozen=True)
class Colour:
    name: str


@dataclass(frozen=True)
class DarkColour(Colour):
    pass


def no_facts(values=()):
    return Facts(values, Context(), None, rewrite)


def test_a_fact_is_found_under_its_own_class():
    facts = no_facts()
    assert facts.get(Colour) is None
    with pytest.raises(KeyError):
        facts[Colour]
    facts.keep(Colour("red"))
    assert facts[Colour] == facts.get(Colour) == Colour("red")
    facts.keep(DarkColour("blue"))
    assert facts[Colour] == Colour("red"), "a class below it is another fact"
    facts.keep(Colour("green"))
    assert facts[Colour] == Colour("green"), "the last one counts"


def test_models_share_no_facts():
    one, two = no_facts(), no_facts()
    one.keep(Colour("red"))
    assert two.get(Colour) is None


def test_every_analysis_finds_what_the_next_ones_ask_for():
    """One after the other on a real graph; none is run before those that it builds on."""
    _, _, module, values = captured_plain()
    sites_of(module, values)
    facts, found = no_facts(values), []
    for find in ANALYSIS:
        fact = find(module, facts)
        if fact is not None:
            facts.keep(fact)
            found.append(type(fact))
    assert found[0] is Sample
    assert found.index(Sites) < found.index(Split)
    assert len(set(found)) == len(found), "each has a class of its own"
    assert [site.path for site in facts[Sites].rewritable] == ["layers.0.attention", "layers.1.attention"]
