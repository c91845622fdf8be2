"""Token layouts read off graphs and position ids; those of whole models are in test_find_attention.py."""

import math
import operator
import random
import re

import pytest
import torch
from torch import fx, nn

from difa_compile.layout import Layout
from difa_compile.passes.analyse.axes import follow_axes, sample_axes
from difa_compile.passes.analyse.token_grids import packed_grid, position_tables
from tests.support.tiny_models import Attention, BareAttention, captured, graph_of, sites_of

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
        (Pooled, NOT_FOLLOWED + "; they are not followed behind getitem (node getitem), which rearranges them"),
        (
            Flipped,
            NOT_FOLLOWED + "; they are not followed behind flip (node flip), whose effect on dimensions is not known",
        ),
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


# Sequences that a loop fills sample by sample


class Filled(BareAttention):
    """Text and image of each sample are written into a sequence of zeros; ``lengths``: of the texts."""

    def __init__(self, lengths):
        super().__init__()
        self.lengths = lengths

    def forward(self, hidden_states, text):
        image = hidden_states.flatten(2).transpose(1, 2)
        tokens = image.shape[1]
        whole = image.new_zeros(len(self.lengths), max(self.lengths) + tokens, image.shape[2])
        for i, length in enumerate(self.lengths):
            whole[i, :length] = text[i, :length]
            whole[i, length : length + tokens] = image[i]
        return super().forward(whole)


@pytest.mark.parametrize(
    ("lengths", "layout", "reason"),
    [
        ((5, 5), Layout((3, 4), before=5), ""),
        ((5, 7), None, r"stand differently in the sequence \(5\+3x4\+2 and 7\+3x4\): texts of other lengths"),
    ],
)
def test_samples_put_into_a_sequence_one_by_one(lengths, layout, reason):
    inputs = {"hidden_states": torch.randn(2, 16, 3, 4), "text": torch.randn(2, 7, 16)}
    (site,) = sites_of(*graph_of(Filled(lengths).eval(), inputs))
    assert site.layout == layout
    assert re.search(reason, site.layout_reason)


def test_what_is_said_of_written_values_is_what_they_hold():
    """Random writes, whole and of one sample: where positions of the sample are said to stand, there they are."""
    chance = random.Random(0)
    told = 0
    for _ in range(300):
        graph, samples, tokens, length = fx.Graph(), chance.choice((1, 2, 3)), 4, chance.choice((6, 8))
        latent = graph.placeholder("hidden_states")
        latent.meta["example_value"] = torch.arange(1.0, tokens + 1)[None, :, None].expand(samples, tokens, 1)
        whole = graph.call_function(torch.zeros, ((samples, length, 1),))
        whole.meta["example_value"] = torch.zeros(samples, length, 1)
        one = graph.call_function(operator.getitem, (latent, 0))
        one.meta["example_value"] = latent.meta["example_value"][0]
        places = [chance.randrange(length - tokens + 1) for _ in range(2)]
        for number in range(chance.randrange(1, 2 * samples + 2)):
            start = chance.choice(places)
            stretch = slice(start, start + tokens)
            entry = number % samples if chance.random() < 0.8 else chance.randrange(-samples, samples)
            kinds = [((entry, stretch), one), ((slice(None), stretch), latent), ((entry, ..., slice(None)), 0.0)]
            index, value = chance.choices(kinds, (8, 1, 1))[0]
            graph.call_function(operator.setitem, (whole, index, value))
        graph.output(whole)
        held = fx.Interpreter(fx.GraphModule({}, graph)).run(latent.meta["example_value"])
        found = follow_axes(graph, sample_axes([latent])).get(whole)
        at = 0
        for part in found[1] if found else ():
            if part.known and part.axes[0].index == 1:
                told += 1
                first = part.axes[0].first + 1
                wanted = torch.arange(first, first + part.length).expand(samples, -1)
                assert torch.equal(held[:, at : at + part.length, 0], wanted.float()), graph
            at += part.length
    assert told > 60
