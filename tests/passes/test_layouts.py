"""Token layouts read off graphs and position ids; those of whole models are in test_find_attention.py."""

import pytest
import torch
from torch import nn

from difa_compile.layout import Layout
from difa_compile.passes.layouts import packed_grid
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
        (ids(4, 6)[:-1], None),  # a token is missing
        (torch.zeros(7, 3), None),  # text
        (ids(24, axes=[1]), None),  # a line shows no grid
        (ids(4, 6).flip(0), None),
        (torch.randn(24, 3), None),
        (torch.randn(2, 24, 3), None),
    ],
)
def test_packed_position_ids(value, grid):
    assert packed_grid([None, 3, torch.randn(2, 5), value], 1000) == grid


def test_ids_of_more_tokens_than_there_are_do_not_count():
    assert packed_grid([ids(4, 6)], 24) == (4, 6)
    assert packed_grid([ids(4, 6)], 23) is None


def test_parameters_are_no_position_ids():
    assert packed_grid([nn.Parameter(ids(4, 6))], 1000) is None


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


class TwoImages(nn.Module):
    """Two equal parts, both from the noisy sample: which one is the image is not clear."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 2, 2)
        self.attention = Attention(32, 2)

    def forward(self, x):
        y = self.patch(x).flatten(2).transpose(1, 2)
        return self.attention(torch.cat([y, y.flip(1)], 1))


class Pooled(nn.Module):
    """Fewer tokens attend than the grid has."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 2, 2)
        self.attention = Attention(32, 2)

    def forward(self, x):
        return self.attention(self.patch(x).flatten(2).transpose(1, 2)[:, ::2])


class Padded(nn.Module):
    """Tokens beside the grid that no concatenation shows."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 2, 2)
        self.attention = Attention(32, 2)

    def forward(self, x):
        return self.attention(nn.functional.pad(self.patch(x).flatten(2).transpose(1, 2), (0, 0, 0, 3)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (TwoImages, "which of the parts [24, 24] is the image is not clear"),
        (Pooled, "the grid (4, 6) has 24 tokens, more than the 12 of the sequence"),
        (Padded, "3 tokens beside the grid (4, 6), and no concatenation shows where"),
    ],
)
def test_what_does_not_add_up_has_no_layout_and_says_why(model, reason):
    module, values = graph_of(model().eval(), {"x": torch.randn(2, 3, 8, 12)})
    (site,) = sites_of(module, values)
    assert site.layout is None
    assert site.layout_reason == reason


def test_the_users_layout_goes_first_and_must_add_up():
    _, _, module, values = captured("sd3")
    told = Layout((5, 5), before=1, after=5)
    assert {site.layout for site in sites_of(module, values, layout=told)} == {told}
    wrong = sites_of(module, values, layout=Layout((4, 4)))[0]
    assert wrong.layout is None
    assert wrong.layout_reason == "the given layout 4x4 has 16 tokens, the sequence has 31"
    module, values = graph_of(BareAttention().eval(), {"x": torch.randn(2, 6, 16)})
    assert sites_of(module, values, layout=Layout((2, 3)))[0].layout == Layout((2, 3))
