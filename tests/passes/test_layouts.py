"""Token layouts read off graphs and position ids; those of whole models are in test_find_attention.py."""

import math

import pytest
import torch
from torch import nn

from difa_compile.layout import Layout
from difa_compile.passes.layouts import packed_grid, position_tables
from tests.tiny_models import Attention, BareAttention, captured, graph_of, sites_of

pytest.importorskip("diffusers")


def ids(*sizes, axes=None, start=0):
    """Position ids of a grid, row by row; ``axes``: which of three columns count."""
    grid = torch.meshgrid(*(torch.arange(start, start + size) for size in sizes), indexing="ij")
    table = torch.stack([axis.reshape(-1) for axis in grid], 1).float()
    if axes is None:
        return table
    wide = torch.zeros(len(table), 3)
    wide[:, axes] = table
    return wide


@pytest.mark.parametrize(
    ("value", "grid"),
    [
        (ids(4, 6, axes=[1, 2]), (4, 6)),
        (ids(4, 6, axes=[1, 2])[None], (4, 6)),
        (ids(4, 6), (4, 6)),
        (ids(3, 4, 6), (3, 4, 6)),
        (ids(4, 6, start=10), (4, 6)),
        (ids(4, 6, axes=[1, 2]).long(), (4, 6)),
        (ids(4, 6, axes=[2, 1]), None),  # column by column
        (ids(4, 6)[:-1], (3, 6)),  # a token is missing: the last row stands beside the grid
        (torch.zeros(7, 3), None),  # text
        (ids(24, axes=[1]), (24,)),  # a line
        (ids(4, 6).flip(0), None),
        (torch.randn(24, 3), None),
        (torch.randn(2, 24, 3), None),
    ],
)
def test_packed_position_ids(value, grid):
    module, values = graph_of(Packed().eval(), {"x": torch.randn(2, len(ids_of(value)), 8), "ids": value})
    (site,) = sites_of(module, values)
    whole = None if grid is None else Layout(grid, after=len(ids_of(value)) - math.prod(grid))
    assert site.layout == whole
    if grid is None:
        assert "does not show which grid" in site.layout_reason


def ids_of(value):
    return value[0] if value.ndim == 3 else value


class Packed(nn.Module):
    """Packed tokens with position ids that the model turns into something."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.attention = Attention(32, 2)

    def forward(self, x, ids):
        return self.attention(self.embed(x) + ids.float().sum(-1)[..., None])


@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("after", [0, 3])
def test_ids_of_text_may_stand_around_those_of_the_image(before, after):
    table = torch.cat([torch.zeros(before, 2), ids(4, 6) + 1, torch.zeros(after, 2)]).double()
    found = packed_grid(table, 24, before)
    assert found == ((4, 6) if not (before and after) or before == 5 else None)
    assert packed_grid(table, 23, before) is None


def test_ids_by_columns_and_with_gaps():
    assert packed_grid(ids(4, 6).double() * 2.5 + 7, 24) == (4, 6)
    module, values = graph_of(Packed().eval(), {"x": torch.randn(2, 24, 8), "ids": ids(4, 6)})
    assert [table.shape for table in position_tables(module.graph, values)] == [(24, 2)]
    values = [value.T.contiguous() if value.shape == (24, 2) else value for value in values]
    assert [table.shape for table in position_tables(module.graph, values)] == [(24, 2)]


def test_parameters_are_no_position_ids():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.ids = nn.Parameter(ids(4, 6))
            self.inner = Packed()

        def forward(self, x):
            return self.inner(x, self.ids)

    module, values = graph_of(Learned().eval(), {"x": torch.randn(2, 24, 8)})
    assert sites_of(module, values)[0].layout is None


class Registers(nn.Module):
    """Patches of the noisy sample with learned tokens on both sides."""

    def __init__(self, before, after):
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 2, 2)
        self.before = nn.Parameter(torch.randn(1, before, 32))
        self.after = nn.Parameter(torch.randn(1, after, 32))
        self.attention = Attention(32, 2)

    def forward(self, x):
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.before.expand(len(x), -1, -1), y, self.after.expand(len(x), -1, -1)], 1)
        return self.attention(y)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (24, 3)])
def test_tokens_on_both_sides(before, after):
    """Also where as many registers as image tokens make lengths ambiguous."""
    module, values = graph_of(Registers(before, after).eval(), {"x": torch.randn(2, 3, 8, 12)})
    (site,) = sites_of(module, values)
    assert site.layout == Layout((4, 6), before=before, after=after)


class Pooled(nn.Module):
    """Fewer tokens attend than the grid has."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 2, 2)
        self.attention = Attention(32, 2)

    def forward(self, x):
        return self.attention(self.patch(x).flatten(2).transpose(1, 2)[:, ::2])


class Flipped(nn.Module):
    """As many tokens as the grid has, in another order."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 2, 2)
        self.attention = Attention(32, 2)

    def forward(self, x):
        return self.attention(self.patch(x).flatten(2).transpose(1, 2).flip(1))


NOT_FOLLOWED = "the graph does not show how the tokens follow from the noisy sample; give layout="


class Padded(nn.Module):
    """Tokens added by padding."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 2, 2)
        self.attention = Attention(32, 2)

    def forward(self, x):
        return self.attention(nn.functional.pad(self.patch(x).flatten(2).transpose(1, 2), (0, 0, 0, 3)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Pooled, NOT_FOLLOWED),
        (Flipped, NOT_FOLLOWED),
    ],
)
def test_what_does_not_add_up_has_no_layout_and_says_why(model, reason):
    module, values = graph_of(model().eval(), {"x": torch.randn(2, 3, 8, 12)})
    (site,) = sites_of(module, values)
    assert site.layout is None
    assert site.layout_reason == reason


def test_padding_is_other_tokens():
    module, values = graph_of(Padded().eval(), {"x": torch.randn(2, 3, 8, 12)})
    assert sites_of(module, values)[0].layout == Layout((4, 6), after=3)


class SpatialAndTemporal(nn.Module):
    """A video model that attends within frames, then along time, as Latte and Open-Sora do."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 2, 2)
        self.spatial, self.temporal = Attention(32, 2), Attention(32, 2)

    def forward(self, x):
        batch, _, frames = x.shape[:3]
        y = self.patch(x.permute(0, 2, 1, 3, 4).flatten(0, 1)).flatten(2).transpose(1, 2)
        y = y + self.spatial(y)
        tokens = y.shape[1]
        y = y.reshape(batch, frames, tokens, -1).permute(0, 2, 1, 3).flatten(0, 1)
        y = y + self.temporal(y)
        return y.reshape(batch, tokens, frames, -1).transpose(1, 2)


def test_spatial_and_temporal_attention_have_their_own_grids():
    """3 frames of 4 x 6 tokens: no number of tokens tells the two apart from other splits, the graph does."""
    module, values = graph_of(SpatialAndTemporal().eval(), {"x": torch.randn(2, 3, 3, 8, 12)})
    assert [site.layout for site in sites_of(module, values)] == [Layout((4, 6)), Layout((3,))]


def test_the_users_layout_goes_first_and_must_add_up():
    _, _, module, values = captured("sd3")
    told = Layout((5, 5), before=1, after=5)
    assert {site.layout for site in sites_of(module, values, layout=told)} == {told}
    wrong = sites_of(module, values, layout=Layout((4, 4)))[0]
    assert wrong.layout is None
    assert wrong.layout_reason == "the given layout 4x4 has 16 tokens, the sequence has 31"
    module, values = graph_of(BareAttention().eval(), {"x": torch.randn(2, 6, 16)})
    assert sites_of(module, values, layout=Layout((2, 3)))[0].layout == Layout((2, 3))


class Rearranged(nn.Module):
    """Patches whose tokens are put into another order, or replaced by mixtures, before the attention."""

    def __init__(self, rearrange):
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 2, 2)
        self.mix = nn.Linear(24, 24)
        self.attention = Attention(32, 2)
        self.rearrange = rearrange

    def forward(self, x):
        return self.attention(self.rearrange(self, self.patch(x).flatten(2).transpose(1, 2)))


def scattered(owner, t):
    out = torch.empty_like(t)
    out[:, torch.arange(23, -1, -1)] = t
    return out


def halves_exchanged(owner, t):
    out = torch.empty_like(t)
    out[:, :12], out[:, 12:] = t[:, 12:], t[:, :12]
    return out


def batch_of_two_orders(owner, t):
    return torch.cat([t, t[:, torch.arange(23, -1, -1)]], 0)


@pytest.mark.parametrize(
    "rearrange",
    [
        scattered,
        halves_exchanged,
        batch_of_two_orders,
        lambda owner, t: owner.mix(t.mT).mT,
        lambda owner, t: owner.mix(t.swapdims(1, 2)).swapdims(1, 2),
        lambda owner, t: torch.fft.fft(t, dim=1).real,
        lambda owner, t: torch.stack([t, t.flip(1)], 1)[:, 1],
    ],
    ids=["scattered", "halves exchanged", "two orders", "mixed", "mixed by swapdims", "frequencies", "stacked"],
)
def test_tokens_in_another_order_have_no_layout(rearrange):
    module, values = graph_of(Rearranged(rearrange).eval(), {"x": torch.randn(2, 3, 8, 12)})
    (site,) = sites_of(module, values)
    assert site.layout is None


def written_whole(owner, t):
    out = torch.empty_like(t)
    out[..., 0::2], out[..., 1::2] = t[..., 1::2], t[..., 0::2]
    return out


@pytest.mark.parametrize("rearrange", [written_whole, lambda owner, t: t.mT.swapdims(1, 2), lambda owner, t: t * 2])
def test_tokens_in_order_keep_their_layout(rearrange):
    module, values = graph_of(Rearranged(rearrange).eval(), {"x": torch.randn(2, 3, 8, 12)})
    (site,) = sites_of(module, values)
    assert site.layout == Layout((4, 6))


def test_queries_in_another_order_than_keys_have_no_layout():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 32, 2, 2)
            self.parts = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))

        def forward(self, x, text):
            y = self.patch(x).flatten(2).transpose(1, 2)
            (q, k, v), (tq, tk, tv) = (
                [part(z) for part in parts] for z, parts in ((y, self.parts[:3]), (text, self.parts[3:]))
            )
            q, k, v = torch.cat([tq, q], 1), torch.cat([k, tk], 1), torch.cat([v, tv], 1)
            q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in (q, k, v))
            return nn.functional.scaled_dot_product_attention(q, k, v)

    module, values = graph_of(Crossed().eval(), {"x": torch.randn(2, 3, 8, 12), "text": torch.randn(2, 5, 32)})
    (site,) = sites_of(module, values)
    assert site.layout is None
    assert site.layout_reason == "queries stand as 5+4x6, keys as 4x6+5"


def test_sizes_of_other_inputs_are_no_grid():
    """Text of (2, 8) rows flattened to 16 says nothing about 16 image tokens."""

    class WithText(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.text, self.attention = nn.Linear(8, 32), nn.Linear(8, 32), Attention(32, 2)

        def forward(self, x, text):
            return self.attention(self.embed(x)) + self.text(text.flatten(0, 1)).mean(0)

    module, values = graph_of(WithText().eval(), {"x": torch.randn(2, 16, 8), "text": torch.randn(2, 8, 8)})
    assert sites_of(module, values)[0].layout is None
