"""Segments: cut at blocks, equal where the blocks are equal, and together the same graph."""

from dataclasses import replace

import pytest
import torch

from difa_compile.passes import order
from difa_compile.passes.analyse.find_attention import Sites
from difa_compile.passes.analyse.find_blocks import Blocks
from difa_compile.passes.graph import alias_root, mutated_argument
from difa_compile.passes.order import analyse
from difa_compile.passes.segments import UNCUT, cut_segments, split_at_blocks
from tests.support.tiny_models import (
    FAMILIES,
    Attention,
    BareAttention,
    PlainTransformer,
    captured,
    captured_plain,
    graph_of,
    in_place,
    sites_of,
)

pytest.importorskip("diffusers")

EXPECTED = {
    "dit": [(), (0,), (1,), ()],
    "pixart": [(), (0,), (1,), ()],
    "sd3": [(), (0,), (1,), ()],
    "flux": [(), (0,), (1,), (2,), (3,), ()],
    "wan": [(), (0,), (1,), ()],
}


def run(split, values):
    held = [*values, *[None] * (split.values - len(values))]
    for segment in split.segments:
        results = segment.module(*[held[i] for i in segment.inputs])
        for number, value in zip(segment.outputs, results, strict=True):
            held[number] = value
        for number in segment.last_use:
            held[number] = None
    return [None if number is None else held[number] for number in split.results]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_segment_per_block_and_together_the_whole_graph(family):
    _, _, module, values = captured(family)
    split = split_at_blocks(module, sites_of(module, values))
    found = [segment.site_indices for segment in split.segments]
    assert [indices for indices in found if indices] == [indices for indices in EXPECTED[family] if indices]
    assert len(found) <= len(EXPECTED[family]) + 1
    with torch.no_grad():
        for one, two in zip(run(split, values), module(*values), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize(("family", "unlike"), [("dit", 1), ("pixart", 1), ("sd3", 2), ("flux", 3), ("wan", 1)])
def test_equal_blocks_have_equal_structure(family, unlike):
    """SD3's last block drops its text stream; FLUX has two kinds of block, the last of which drops its text."""
    _, _, module, values = captured(family)
    split = split_at_blocks(module, sites_of(module, values))
    assert len({segment.structure for segment in split.segments if segment.sites}) == unlike


def test_another_size_is_another_structure():
    structures = []
    for batch in (2, 4):
        _, _, module, values = captured_plain(batch)
        split = split_at_blocks(module, sites_of(module, values))
        structures.append({segment.structure for segment in split.segments})
    assert not structures[0] & structures[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_bound_to_their_own_segment(family):
    _, _, module, values = captured(family)
    sites = sites_of(module, values)
    for segment in split_at_blocks(module, sites).segments:
        nodes = set(segment.module.graph.nodes)
        assert [site.path for site in segment.sites] == [sites[i].path for i in segment.site_indices]
        for site in segment.sites:
            assert set(site.region.interior) <= nodes
            assert set(site.region.outputs) <= nodes
            assert set(site.region.inputs) <= nodes


def test_writes_in_place_stay_with_what_they_write():
    _, _, module, values = captured_plain(rotate=True)
    split = split_at_blocks(module, sites_of(module, values))
    writes = 0
    for segment in split.segments:
        for node in segment.module.graph.nodes:
            if in_place(node):
                writes += 1
                assert mutated_argument(node) is not None
                assert alias_root(node).op != "placeholder", "the written value comes from another segment"
    assert writes == 8


def test_values_that_cross_a_cut_are_contiguous():
    _, _, module, values = captured("flux")
    split = split_at_blocks(module, sites_of(module, values))
    held = [*values, *[None] * (split.values - len(values))]
    with torch.no_grad():
        for segment in split.segments:
            results = segment.module(*[held[i] for i in segment.inputs])
            for number, value in zip(segment.outputs, results, strict=True):
                held[number] = value
                assert value.is_contiguous()


def test_values_are_let_go_after_their_last_reader_and_not_before():
    _, _, module, values = captured("sd3")
    split = split_at_blocks(module, sites_of(module, values))
    gone = set()
    for segment in split.segments:
        assert not gone & set(segment.inputs)
        gone |= set(segment.last_use)
    assert not gone & {number for number in split.results if number is not None}
    assert not gone & set(range(len(values))), "the graph's own inputs belong to the caller"
    made = {number for segment in split.segments for number in segment.outputs}
    assert made - gone == {number for number in split.results if number is not None}


def test_a_model_without_blocks_is_one_segment():
    module, values = graph_of(BareAttention().eval(), {"x": torch.randn(2, 6, 16)})
    split = split_at_blocks(module, sites_of(module, values))
    assert [segment.site_indices for segment in split.segments] == [(0,)]


# Gates


def test_a_gate_stands_behind_its_span_and_hands_on_what_it_is_given():
    _, _, module, values = captured_plain()
    model = analyse(module, values)
    split = model.split
    (gate,) = [segment for segment in split.segments if segment.spanned]
    place = split.segments.index(gate)
    assert gate.spanned == tuple(range(place - len(gate.spanned), place))
    assert [split.segments[i].site_indices for i in gate.spanned] == [(0, 2), (1, 3)]
    assert gate.site_indices == (4,)
    before, behind = gate.inputs
    assert before in split.segments[gate.spanned[0]].inputs
    assert behind in split.segments[gate.spanned[-1]].outputs
    readers = [segment for segment in split.segments[place:] if behind in segment.inputs]
    assert readers == [gate], "what comes after the gate reads what the gate hands on"
    assert any(gate.outputs[0] in segment.inputs for segment in split.segments[place + 1 :])
    stream = torch.randn(2, 24, 32)
    assert torch.equal(gate.module(torch.zeros_like(stream), stream)[0], stream)
    (span,) = split.spans
    (unit,) = gate.sites
    assert (unit.path, unit.blocks, unit.flops) == (span.path, span.blocks, span.flops)
    with torch.no_grad():
        assert torch.equal(run(split, values)[0], module(*values)[0])


def test_a_span_that_ends_in_the_midst_of_a_segment_has_no_gate():
    _, _, module, values = captured_plain()
    model = analyse(module, values)
    (span,) = model.split.spans
    blocks = model.blocks[:2]
    for inner in (span.region.interior[1:], span.region.interior[:-1]):
        lesser = replace(span, region=replace(span.region, interior=inner))
        split = split_at_blocks(model.canonical, (*model.sites, *blocks), [lesser])
        assert split.spans == ()
        assert not any(segment.spanned for segment in split.segments)


def test_a_span_without_a_gate_is_told(monkeypatch):
    def uncut(module, facts):
        return split_at_blocks(module, (*facts[Sites].rewritable, *facts[Blocks].found))

    monkeypatch.setattr(order, "ANALYSIS", tuple(uncut if f is cut_segments else f for f in order.ANALYSIS))
    _, _, module, values = captured_plain()
    model = analyse(module, values)
    assert [block.path for block in model.blocks] == ["layers.0", "layers.1"]
    assert model.refused_blocks == (("layers.0..layers.1", UNCUT),)


def test_segments_end_where_blocks_end_though_these_enter_an_autocast():
    class Casting(Attention):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                x = x + 0.5
            return super().forward(x)

    torch.manual_seed(0)
    model = PlainTransformer([Casting(32, 2) for _ in range(2)]).eval()
    module, values = graph_of(model, {"x": torch.randn(2, 3, 8, 12)})
    analysed = analyse(module, values)
    assert [block.path for block in analysed.blocks] == ["layers.0", "layers.1", "layers.0..layers.1"]
    assert analysed.refused_blocks == ()
    split = analysed.split
    assert [segment.site_indices for segment in split.segments if segment.sites] == [(0, 2), (1, 3), (4,)]
    with torch.no_grad():
        assert torch.equal(run(split, values)[0], module(*values)[0])
