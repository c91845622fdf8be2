"""Sites, kinds and regions of whole models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from difa_compile.layout import Layout
from difa_compile.passes.analyse.find_attention import find_attention
from difa_compile.passes.graph import is_linear, module_path, op_name, shape_of
from difa_compile.passes.site import SiteKind
from tests.support.tiny_models import (
    TEXT,
    BareAttention,
    captured,
    captured_plain,
    counts,
    graph_of,
    in_place,
    plain,
    sites_of,
)

pytest.importorskip("diffusers")

EXPECTED = {
    "dit": [("transformer_blocks.{}.attn1", "self", 16, Layout((4, 4)), (1, 1))],
    "pixart": [("transformer_blocks.{}.attn1", "self", 16, Layout((4, 4)), (1, 1))],
    "sd3": [("transformer_blocks.{}.attn", "joint", 24 + TEXT, Layout((4, 6), after=TEXT), (2, 1))],
    "flux": [
        ("transformer_blocks.{}.attn", "joint", 24 + TEXT, Layout((4, 6), before=TEXT), (2, 2)),
        ("single_transformer_blocks.{}.attn", "self", 24 + TEXT, Layout((4, 6), before=TEXT), (1, 1)),
    ],
    "wan": [("blocks.{}.attn1", "self", 48, Layout((3, 4, 4)), (1, 1))],
}
"""Per family: path, kind, tokens, layout, outputs of the first and of the last block."""


@pytest.mark.parametrize("family", EXPECTED)
def test_sites_kinds_and_layouts(family):
    _, _, module, values = captured(family)
    sites = sites_of(module, values)
    wanted = [
        (path.format(i), kind, tokens, layout, outputs[i])
        for path, kind, tokens, layout, outputs in EXPECTED[family]
        for i in range(2)
    ]
    assert [(s.path, str(s.kind), s.tokens, s.layout, len(s.region.outputs)) for s in sites] == wanted
    for site in sites:
        assert site.query_shape == site.key_shape == (2, 2, site.tokens, 16)
        assert (site.width, site.mask, site.layout_reason) == (32, "none", "")
        assert site.info.heads == 2
        assert site.info.layout == site.layout


@pytest.mark.parametrize(("family", "paths"), [("pixart", "transformer_blocks.{}.attn2"), ("wan", "blocks.{}.attn2")])
def test_cross_attention_is_found_and_left_alone(family, paths):
    _, _, module, values = captured(family)
    sites_of(module, values)
    cross = [site for site in find_attention(module) if site.kind is SiteKind.CROSS]
    assert [site.path for site in cross] == [paths.format(i) for i in range(2)]
    for site in cross:
        assert not site.rewritable
        assert site.layout is None
        assert site.key_shape[2] == TEXT


@pytest.mark.parametrize("family", EXPECTED)
def test_regions_reach_from_the_projections_to_the_output_projection(family):
    """Every region lies in its attention module, holds all its linears, and ends where the module's results leave."""
    _, _, module, values = captured(family)
    for site in sites_of(module, values):
        inside = set(site.region.interior)
        linears = {n for n in module.graph.nodes if is_linear(n) and module_path(n).startswith(site.path + ".")}
        unused = {node for node in linears if node not in inside}
        assert all(not node.users or site.kind is SiteKind.JOINT for node in unused)
        assert linears - unused == {node for node in inside if is_linear(node)}
        assert all((module_path(node) + ".").startswith(site.path + ".") for node in inside)
        for output in site.region.outputs:
            assert shape_of(output)[0] == 2
            assert shape_of(output)[-1] == 32
            assert any(user not in inside for user in output.users)
        for node in inside - set(site.region.outputs):
            assert all(user in inside for user in node.users), f"{node} is used outside the region"
        assert set(site.region.inputs).isdisjoint(inside)


def test_a_model_that_is_not_diffusers():
    _, _, module, values = captured_plain(rotate=True)
    sites = sites_of(module, values)
    assert [(s.path, str(s.kind), s.layout, s.width) for s in sites] == [
        (f"layers.{i}.attention", "self", Layout((4, 6)), 32) for i in range(2)
    ]
    for site in sites:
        names = [op_name(node) for node in site.region.interior]
        assert names.count("linear") == 2
        assert sum(in_place(node) for node in site.region.interior) == 4, "the rotary writes of query and key"


@pytest.mark.parametrize("mask", ["mask", "causal"])
def test_masks_are_seen(mask):
    model, inputs = plain(masks=("none", mask))
    module, values = graph_of(model, inputs)
    assert [site.mask for site in sites_of(module, values)] == ["none", mask]


class Twice(nn.Module):
    """One module that attends twice, and an average of the noisy sample without projections."""

    def __init__(self):
        super().__init__()
        self.inner = BareAttention()

    def forward(self, x):
        return self.inner(self.inner(x)) + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


def test_repeated_modules_get_names_of_their_own_and_an_average_is_left_alone():
    torch.manual_seed(0)
    module, values = graph_of(Twice().eval(), {"x": torch.randn(2, 6, 16)})
    assert [site.path for site in sites_of(module, values)] == ["inner", "inner#1"]
    assert [(site.path, str(site.kind)) for site in find_attention(module)] == [
        ("inner", "self"),
        ("inner#1", "self"),
        ("attention", "cross"),
    ]
    assert counts(module) == (8, 3)


def test_scale_is_read_off_the_call():
    class Scaled(BareAttention):
        def forward(self, x):
            q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
            return x + self.o(F.scaled_dot_product_attention(q, k, v, scale=0.25).transpose(1, 2).flatten(2))

    module, values = graph_of(Scaled().eval(), {"x": torch.randn(2, 6, 16)})
    (site,) = sites_of(module, values)
    assert site.scale == 0.25


def test_grouped_queries_keep_their_head_counts():
    class Grouped(BareAttention):
        def __init__(self):
            super().__init__()
            self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x):
            q, k, v = (part(x).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
            return x + self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    module, values = graph_of(Grouped().eval(), {"x": torch.randn(2, 6, 16)})
    (site,) = sites_of(module, values)
    assert (site.query_shape[1], site.key_shape[1]) == (2, 1)


def test_keys_with_text_beside_the_querys_own_stream():
    """Image queries over text and image keys: joint, with the layout of the keys."""

    class TextInKeys(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 32, 2, 2)
            self.q, self.k, self.v, self.text_k, self.text_v = (nn.Linear(32, 32) for _ in range(5))

        def forward(self, x, text):
            y = self.patch(x).flatten(2).transpose(1, 2)
            key = torch.cat([self.text_k(text), self.k(y)], 1)
            value = torch.cat([self.text_v(text), self.v(y)], 1)
            q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in (self.q(y), key, value))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    module, values = graph_of(TextInKeys().eval(), {"x": torch.randn(2, 3, 8, 12), "text": torch.randn(2, 5, 32)})
    (site,) = sites_of(module, values)
    assert site.kind is SiteKind.JOINT
    assert (site.tokens, site.layout) == (24, Layout((4, 6), before=5))
    assert (site.info.tokens, site.info.keys) == (24, 29)


def test_low_rank_projections_and_adapters_are_projections():
    """Linears in front of or beside the projections, inside the attention's module: still one stream."""

    class Adapted(BareAttention):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)
            self.low = nn.Linear(16, 16)

        def forward(self, x):
            q = self.q(x) + self.up(self.down(x)) * 0.5
            k, v = self.k(self.low(x)), self.v(x)
            q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (q, k, v))
            return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = nn.Sequential(Adapted()).eval()
    module, values = graph_of(model, {"input": torch.randn(2, 6, 16)})
    (site,) = sites_of(module, values)
    assert site.kind is SiteKind.SELF
    assert sum(is_linear(node) for node in site.region.interior) == 7
