"""Which dimension carries the batch: in whole models, and op by op."""

import re

import pytest
import torch
from torch import nn

from difa_compile.passes.analyse.batch_dims import annotate_batch, why_not_followed
from difa_compile.passes.analyse.find_attention import attention_inputs
from difa_compile.passes.analyse.sample import latent_inputs
from difa_compile.passes.graph import is_parameter, shape_of, tensor_of
from tests.support.tiny_models import FAMILIES, Attention, BareAttention, captured, captured_plain, graph_of, sites_of

pytest.importorskip("diffusers")


@pytest.mark.parametrize("family", FAMILIES)
def test_regions_of_whole_models(family):
    """Two heads, and a batch of two: sizes alone would not tell them apart."""
    _, _, module, values = captured(family)
    for site in sites_of(module, values):
        for node in (*attention_inputs(site.region.attention), *site.region.outputs):
            assert node.meta["batch_dim"] == 0
        for node in site.region.interior:
            if tensor_of(node) is not None:
                dim = node.meta["batch_dim"]
                assert shape_of(node)[dim] in (2, 2 * shape_of(node)[dim] // 2)
        assert not any("batch_dim" in node.meta for node in site.region.inputs if is_parameter(node))


@pytest.mark.parametrize("family", ["dit", "sd3"])
def test_annotated_dimensions_follow_the_batch_size(family):
    """The same model at another batch size: exactly the annotated dimensions change, in proportion."""
    two, four = (captured(family, batch)[2] for batch in (2, 4))
    for module in (two, four):
        annotate_batch(module.graph, latent_inputs(module.graph))
    ones, others = list(two.graph.nodes), list(four.graph.nodes)
    assert [node.target for node in ones if node.op == "call_function"] == [
        node.target for node in others if node.op == "call_function"
    ]
    known = 0
    for one, other in zip(ones, others, strict=True):
        small, large = shape_of(one), shape_of(other)
        moved = [dim for dim in range(len(small)) if small[dim] != large[dim]]
        if "batch_dim" in one.meta and tensor_of(one) is not None:
            assert moved == [one.meta["batch_dim"]], one
            assert large[moved[0]] == 2 * small[moved[0]]
            known += 1
    assert known > 50


def test_the_plain_model_with_writes_in_place():
    _, _, module, values = captured_plain(rotate=True)
    for site in sites_of(module, values):
        assert all(node.meta["batch_dim"] == 0 for node in site.region.outputs)


class Transposed(nn.Module):
    """The batch wanders: to the end, into a stack, through a chunk and back."""

    def forward(self, x):
        last = x.permute(1, 2, 0)
        stacked = torch.stack([last, last], 0)
        one, _ = stacked.transpose(0, 3).chunk(2, dim=1)
        return one + 1, last * torch.arange(2.0), x.reshape(-1), x.sum(0)


def test_the_batch_is_followed_through_layout_ops():
    module, _ = graph_of(Transposed(), {"x": torch.randn(2, 5, 6)})
    annotate_batch(module.graph, latent_inputs(module.graph))
    found = {node.name: node.meta.get("batch_dim") for node in module.graph.nodes}
    by_target = {str(node.target): node.meta.get("batch_dim") for node in module.graph.nodes}
    assert by_target["permute"] == 2
    assert by_target["transpose"] == 0
    assert [dim for name, dim in found.items() if name.startswith("stack")] == [3]
    assert by_target["sum"] is None


def test_a_mask_without_a_batch_dimension_is_the_same_for_all_samples():
    """A bias of (heads, L, L) with as many heads as samples."""

    class Biased(BareAttention):
        def forward(self, x, bias):
            q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
            return x + self.o(
                torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
            )

    module, _ = graph_of(Biased().eval(), {"x": torch.randn(2, 6, 16), "bias": torch.randn(2, 6, 6)})
    annotate_batch(module.graph, latent_inputs(module.graph))
    bias = next(
        n for n in module.graph.nodes if n.op == "placeholder" and "bias_" in n.name and shape_of(n) == (2, 6, 6)
    )
    assert "batch_dim" not in bias.meta


def test_the_batch_is_followed_into_a_sequence_that_is_put_together_by_index():
    class Together(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention(16, 2)

        def forward(self, x, text, places, mask):
            y = text.new_zeros(2, 9, 16).index_copy(1, torch.arange(3), text).index_copy(1, places, x)
            seen = (mask.bool() & ~(mask == 2)).int()
            return self.attention(y) * seen[..., None]

    inputs = {"x": torch.randn(2, 6, 16), "text": torch.randn(2, 3, 16), "places": torch.arange(3, 9)}
    module, _ = graph_of(Together().eval(), {**inputs, "mask": torch.ones(2, 9, dtype=torch.long)})
    annotate_batch(module.graph, latent_inputs(module.graph))
    carried = {node.name: node.meta.get("batch_dim") for node in module.graph.find_nodes(op="placeholder")}
    assert {name.strip("_"): dim for name, dim in carried.items() if "self" not in name} == {
        "l_x": 0, "l_text": 0, "l_places": None, "l_mask": 0
    }  # fmt: skip


class Reordered(nn.Module):
    def __init__(self, reorder):
        super().__init__()
        self.attention = Attention(16, 2)
        self.reorder = reorder

    def forward(self, x):
        return self.attention(self.reorder(x.sin()))


@pytest.mark.parametrize(
    ("reorder", "reason"),
    [
        (lambda x: x.roll(1, 0), ": not behind roll, whose effect on dimensions is not known"),
        (
            lambda x: x[torch.tensor([1, 0])],
            ": not behind getitem, which takes, orders or joins samples otherwise",
        ),
        (lambda x: torch.cat([x[1:], x[:1]]), ""),
        (lambda x: x * 2, ""),
    ],
)
def test_where_the_batch_is_lost_is_told(reorder, reason):
    module, values = graph_of(Reordered(reorder).eval(), {"x": torch.randn(2, 6, 16)})
    (site,) = sites_of(module, values)
    found = why_not_followed(attention_inputs(site.region.attention))
    assert re.sub(r" \(node \w+\)", "", found) == reason


@pytest.mark.parametrize(
    ("op", "dim"),
    [
        (lambda x, places: x[:, places], 0),
        (lambda x, places: x.swapdims(0, 1)[places], 1),
        (lambda x, places: x[:, 0] @ torch.ones(16, 3), 0),
        (lambda x, places: x.movedim(0, -1), 2),
        (lambda x, places: x.softmax(0), None),
        (lambda x, places: x.flatten(0, 1).unflatten(0, (2, 6)), 0),
        (lambda x, places: x.swapdims(0, 1).flatten(0, 1), None),
    ],
)
def test_ops_that_let_the_batch_through(op, dim):
    class Model(nn.Module):
        def forward(self, x, places):
            return op(x, places)

    module, _ = graph_of(Model(), {"x": torch.randn(2, 6, 16), "places": torch.arange(4)})
    annotate_batch(module.graph, latent_inputs(module.graph))
    (result,) = next(node for node in module.graph.nodes if node.op == "output").args[0]
    assert result.meta.get("batch_dim") == dim
