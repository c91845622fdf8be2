"""Blocks and spans of whole models: what they add to, and why others are none."""

import operator
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import fx, nn

from difa_compile.passes.analyse.find_blocks import Blocks, block_runs, operations
from difa_compile.passes.facts import Facts
from difa_compile.passes.graph import is_attention, module_path, op_name, shape_of
from difa_compile.passes.order import ANALYSIS, PREPARATION, rewrite
from difa_compile.passes.variant import Context
from tests.support.tiny_models import FAMILIES, TEXT, Attention, captured, graph_of, sharpened

pytest.importorskip("diffusers")

BLOCKS = {
    "dit": ["transformer_blocks.0", "transformer_blocks.1"],
    "pixart": ["transformer_blocks.0", "transformer_blocks.1"],
    "sd3": ["transformer_blocks.0", "transformer_blocks.1"],
    "flux": [*(f"transformer_blocks.{i}" for i in range(2)), *(f"single_transformer_blocks.{i}" for i in range(2))],
    "wan": ["blocks.0", "blocks.1"],
}
TOKENS = {
    "dit": [(16,)] * 2,
    "pixart": [(16,)] * 2,
    "sd3": [(24, TEXT), (24,)],
    "flux": [(24, TEXT)] * 3 + [(24,)],
    "wan": [(48,)] * 2,
}
"""Per family and block the tokens of each stream. The last block of SD3 and FLUX hands on no text."""


@dataclass(frozen=True)
class Found:
    graph: fx.Graph
    own: tuple
    spans: tuple
    refused: tuple

    @property
    def blocks(self):
        return (*self.own, *self.spans)


def blocks_in(module, values):
    """What is found in a graph; nothing is proved."""
    facts = Facts(values, Context(), None, rewrite)
    for prepare in PREPARATION:
        module = prepare(module, facts)
    for find in ANALYSIS:
        fact = find(module, facts)
        if isinstance(fact, Blocks):
            return Found(module.graph, fact.found, fact.spans, fact.refused)
        facts.keep(fact)
    raise AssertionError("no pass finds blocks")


def analysed(model, inputs):
    return blocks_in(*graph_of(model, inputs))


@cache
def of_family(family):
    _, _, module, values = captured(family)
    return blocks_in(module, values)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_a_family_with_one_or_two_streams(family):
    found = of_family(family)
    own = found.own
    assert [block.path for block in own] == BLOCKS[family]
    assert found.refused == ()
    for block, tokens in zip(own, TOKENS[family], strict=True):
        region = block.region
        assert sorted(shape_of(node)[1] for node in region.outputs) == sorted(tokens)
        assert [shape_of(node) for node in region.streams] == [shape_of(node) for node in region.outputs]
        assert block.tokens == sum(tokens)
        inside = set(region.interior)
        assert not inside & {*region.inputs, *region.streams}
        assert set(region.streams) <= set(region.inputs)
        assert {n for n in inside if any(u not in inside for u in n.users)} == set(region.outputs)
        assert region.attention is next(node for node in region.interior if is_attention(node))
        assert block.info.is_block
        assert (block.info.width, block.info.layout, block.info.blocks) == (32, None, ())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_span_over_all_blocks(family):
    own, (span,) = of_family(family).own, of_family(family).spans
    assert span.path == f"{BLOCKS[family][0]}..{BLOCKS[family][-1]}"
    assert list(span.blocks) == BLOCKS[family]
    assert {node for block in own for node in block.region.interior} <= set(span.region.interior)
    (stream,), (output,) = span.region.streams, span.region.outputs
    assert stream in own[0].region.streams
    assert output in own[-1].region.outputs
    assert span.flops >= sum(block.flops for block in own)


class Layer(nn.Module):
    """A plain block of ``(B, N, 32)`` that says itself what it does around its attention."""

    def __init__(self, forward=None):
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(32), Attention(32, 2), nn.Linear(32, 32)
        self.other = Attention(32, 2)
        self.joined = nn.Linear(64, 32)
        self.how = forward

    def forward(self, x, *more):
        if self.how is not None:
            return self.how(self, x, *more)
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Denoiser(nn.Module):
    """Layers over 24 tokens; ``forward(self, x)`` says how they are joined, by default one after the other."""

    def __init__(self, *forwards, joined=None):
        super().__init__()
        self.patch, self.head = nn.Linear(4, 32), nn.Linear(32, 4)
        self.layers = nn.ModuleList(Layer(forward) for forward in forwards)
        self.joined = joined

    def forward(self, x):
        y = self.patch(x)
        if self.joined is not None:
            return self.head(self.joined(self, y))
        for layer in self.layers:
            y = layer(y)
        return self.head(y)


def denoiser(*forwards, joined=None):
    torch.manual_seed(0)
    return analysed(sharpened(Denoiser(*forwards, joined=joined)), {"x": torch.randn(2, 24, 4)})


def reasons(model):
    return dict(model.refused)


def paths(model):
    return [block.path for block in model.blocks]


NO_SUM = "which is used outside of it, is no sum of a value that came in and of what the block adds"


def test_a_layer_of_any_module_is_a_block():
    model = denoiser(None, None, None)
    assert paths(model) == ["layers.0", "layers.1", "layers.2", "layers.0..layers.2"]
    assert reasons(model) == {}


def test_long_skips_make_no_block_of_what_joins_them_and_no_span():
    """As in a U-net: the last layer takes what the first has made, through a projection of both."""

    def joining(layer, x, skipped):
        x = layer.joined(torch.cat([x, skipped], -1))
        return x + layer.attention(layer.norm(x))

    def joined(model, y):
        first = model.layers[0](y)
        return model.layers[2](model.layers[1](first), first)

    model = denoiser(None, None, joining, joined=joined)
    assert paths(model) == ["layers.0", "layers.1"]
    assert set(reasons(model)) == {"layers.2", "layers.0..layers.2"}
    assert all(NO_SUM in reason for reason in reasons(model).values())


def test_a_sum_with_a_long_skip_adds_to_the_value_made_last():
    def joined(model, y):
        first = model.layers[0](y)
        return model.layers[2](model.layers[1](first), first)

    def adding(layer, x, skipped):
        return x + skipped + layer.attention(layer.norm(x))

    model = denoiser(None, None, adding, joined=joined)
    blocks = {block.path: block for block in model.blocks}
    (stream,) = blocks["layers.2"].region.streams
    (before,) = blocks["layers.1"].region.outputs
    assert stream is before
    assert blocks["layers.0..layers.2"].region.streams == blocks["layers.0"].region.streams


def test_a_block_that_does_not_add_is_refused():
    model = denoiser(None, lambda layer, x: layer.attention(layer.norm(x)), None)
    assert paths(model) == ["layers.0", "layers.2"]
    assert NO_SUM in reasons(model)["layers.1"]
    assert NO_SUM in reasons(model)["layers.0..layers.2"]


def test_a_block_that_hands_on_another_value_is_refused():
    """Statistics of its tokens, which the head takes up."""

    def two(layer, x):
        y = x + layer.attention(layer.norm(x))
        return y, y.mean((1, 2))

    def joined(model, y):
        y, mean = model.layers[0](y)
        return model.layers[1](y) * mean[:, None, None]

    model = denoiser(two, None, joined=joined)
    assert paths(model) == ["layers.1"]
    assert reasons(model)["layers.0"].endswith("has shape (2,): no stream of tokens")

    def tokens(layer, x):
        return x + layer.attention(layer.norm(x)), layer.mlp(x)

    def weighted(model, y):
        y, other = model.layers[0](y)
        return model.layers[1](y) * other

    model = denoiser(tokens, None, joined=weighted)
    assert NO_SUM in reasons(model)["layers.0"]

    def chosen(layer, x):
        y = x + layer.attention(layer.norm(x))
        return y, y.argmax(-1)

    def picked(model, y):
        y, where = model.layers[0](y)
        return model.layers[1](y) + where[..., None]

    model = denoiser(chosen, None, joined=picked)
    assert reasons(model)["layers.0"].endswith("is no tensor of floating-point numbers")


def test_two_values_that_are_sums_with_the_same_one_are_refused():
    def both(layer, x):
        y = x + layer.attention(layer.norm(x))
        return y, y + layer.mlp(y)

    model = denoiser(both, None, joined=lambda model, y: sum(model.layers[0](y)) + model.layers[1](y))
    assert reasons(model)["layers.0"].startswith("two of the values that it hands on are sums with the same value")


def test_a_block_that_writes_into_what_it_was_given_is_refused():
    def writing(layer, x):
        x.mul_(2)
        return x + layer.attention(layer.norm(x))

    model = denoiser(writing, None, joined=lambda model, y: model.layers[1](model.layers[0](y + 1)))
    assert reasons(model)["layers.0"].startswith("it writes in place into add, which comes from outside")
    assert paths(model) == ["layers.1"]


def test_a_write_into_what_the_block_has_made_goes_with_it():
    def writing(layer, x):
        y = layer.attention(layer.norm(x))
        y.mul_(2)
        return x + y

    model = denoiser(writing, None)
    assert paths(model) == ["layers.0", "layers.1", "layers.0..layers.1"]
    assert "mul_" in {op_name(node) for node in model.blocks[0].region.interior}


def test_a_module_that_attends_several_times_with_other_work_between_is_refused():
    def joined(model, y):
        return model.layers[0](model.layers[1](model.layers[0](y)))

    model = denoiser(None, None, joined=joined)
    assert paths(model) == ["layers.1"]
    assert reasons(model) == {"layers.0": "it attends in 2 parts, with other work between"}


def test_a_block_with_two_attentions_is_one_block():
    def twice(layer, x):
        x = x + layer.attention(layer.norm(x))
        return x + layer.other(x)

    model = denoiser(twice, None)
    assert sum(map(is_attention, model.blocks[0].region.interior)) == 2
    assert paths(model) == ["layers.0", "layers.1", "layers.0..layers.1"]


def test_what_leads_to_no_output_goes_with_its_block():
    """As the text of FLUX' last block: nobody reads it, and left out nothing of it is computed."""

    def idle(layer, x):
        layer.mlp(x) * 2
        return x + layer.attention(layer.norm(x))

    model = denoiser(None, idle)
    dead = [n for n in model.graph.nodes if op_name(n) in ("mul", "linear") and not n.users]
    (block,) = [block for block in model.blocks if block.path == "layers.1"]
    assert set(dead) <= set(block.region.interior)


def test_of_several_values_the_one_from_the_sample_is_the_stream():
    """A table of positions is added within the block, and made later than what it is added to."""

    class Placed(Denoiser):
        def forward(self, x):
            y = self.patch(x)
            places = torch.arange(24.0)[:, None].expand(24, 32)[None].repeat(2, 1, 1).sin()
            for layer in self.layers:
                y = layer(y, places)
            return self.head(y)

    def placed(layer, x, places):
        x = x + places
        return x + layer.attention(layer.norm(x))

    torch.manual_seed(0)
    model = analysed(sharpened(Placed(placed, placed)), {"x": torch.randn(2, 24, 4)})
    assert paths(model) == ["layers.0", "layers.1", "layers.0..layers.1"]
    (stream,) = model.blocks[0].region.streams
    assert op_name(stream) == "linear"
    assert model.blocks[1].region.streams == model.blocks[0].region.outputs


class Lists(nn.Module):
    """Two lists of blocks with a product between them: no span over both."""

    def __init__(self):
        super().__init__()
        self.patch, self.head = nn.Linear(4, 32), nn.Linear(32, 4)
        self.one, self.two = (nn.ModuleList(Layer() for _ in range(2)) for _ in range(2))
        self.between = nn.Linear(32, 32)

    def forward(self, x):
        y = self.patch(x)
        for layer in self.one:
            y = layer(y)
        y = self.between(y)
        for layer in self.two:
            y = layer(y)
        return self.head(y)


def test_a_span_per_list_where_there_is_none_over_all():
    torch.manual_seed(0)
    model = analysed(sharpened(Lists()), {"x": torch.randn(2, 24, 4)})
    assert [(block.path, block.blocks) for block in model.blocks if block.blocks] == [
        ("one.0..one.1", ("one.0", "one.1")),
        ("two.0..two.1", ("two.0", "two.1")),
    ]
    assert reasons(model) == {}


def test_spans_hold_all_blocks_that_lie_between_their_ends():
    """As Latte, whose spatial and temporal blocks take turns: a span of the ones would leave out some of the others."""

    class Turns(Lists):
        def forward(self, x):
            y = self.patch(x)
            for one, two in zip(self.one, self.two, strict=True):
                y = two(self.between(one(y)))
            return self.head(y)

    torch.manual_seed(0)
    model = analysed(sharpened(Turns()), {"x": torch.randn(2, 24, 4)})
    assert paths(model) == ["one.0", "two.0", "one.1", "two.1"]
    assert NO_SUM in reasons(model).pop("one.0..two.1")
    assert {path: reason for path, reason in reasons(model).items() if path != "one.0..two.1"} == {
        "one.0..one.1": "other blocks lie between its own: two.0",
        "two.0..two.1": "other blocks lie between its own: one.1",
    }


def test_joined_streams_are_told_apart_by_where_they_stand():
    """Two of one shape side by side, of which the first is computed first and handed on last."""

    def joint(layer, x, y):
        both = torch.cat([x, y], 1)
        both = both + layer.attention(layer.norm(both))
        both = both + layer.mlp(both)
        x, y = both.split([24, 24], 1)
        return y, x

    def joined(model, y):
        one, two = model.joined_mlp(y), model.other_mlp(y)
        two, one = model.layers[0](one, two)
        return model.layers[1](two + one * 3)

    torch.manual_seed(0)
    net = Denoiser(joint, None, joined=joined)
    net.joined_mlp, net.other_mlp = nn.Linear(32, 32), nn.Linear(32, 32)
    model = analysed(sharpened(net), {"x": torch.randn(2, 24, 4)})
    (block,) = [block for block in model.blocks if block.path == "layers.0"]
    names = {module_path(node): node for node in block.region.streams}
    assert set(names) == {"joined_mlp", "other_mlp"}
    starts = {stream: output.args[1] for stream, output in zip(block.region.streams, block.region.outputs, strict=True)}
    assert starts == {names["joined_mlp"]: 0, names["other_mlp"]: 1}, "which of the two parts is its own"


def test_what_no_module_makes_in_the_midst_of_a_block_is_part_of_it():
    model = denoiser(None, None, joined=lambda model, y: model.layers[1](model.layers[0](model.layers[0](y) + 1)))
    assert paths(model) == ["layers.0", "layers.1", "layers.0..layers.1"]
    assert sum(map(is_attention, model.blocks[0].region.interior)) == 2


def test_a_block_that_enters_an_autocast_is_one_block():
    def casting(layer, x):
        with torch.autocast("cpu", enabled=False):
            x = x * 1.5
        return x + layer.attention(layer.norm(x))

    def outside(layer, x):
        with torch.autocast("cpu", enabled=False):
            return x + layer.attention(layer.norm(x))

    for forward in (casting, outside):
        model = denoiser(None, forward, forward)
        expected = ["layers.0"] if forward is casting else ["layers.0", "layers.1", "layers.2", "layers.0..layers.2"]
        assert paths(model) == expected, "1.5 x + ... is no sum with x"


def test_a_single_block_makes_no_span():
    model = denoiser(None)
    assert paths(model) == ["layers.0"]


def test_runs_are_broken_by_other_modules_alone():
    model = denoiser(None, None)
    body = [node for node in model.graph.nodes if node.op not in ("placeholder", "output")]
    runs = block_runs(body)
    assert set(runs) == {"layers.0", "layers.1"}
    assert all(len(parts) == 1 for parts in runs.values())


def test_operations_by_hand():
    """Of a layer: qkv, attention, its output, an MLP of one linear; of one element of the batch."""
    model = denoiser(None, None)
    tokens, width = 24, 32
    linears = tokens * width * (3 * width + width + width)
    attention = 2 * tokens * tokens * width
    block = model.blocks[0]
    assert block.flops == 2 * (linears + attention)
    assert model.blocks[-1].flops == 2 * block.flops
    assert block.info.flops == block.flops
    adding = [node for node in block.region.interior if node.target is operator.add]
    assert [operations(node) for node in adding] == [0, 0]
