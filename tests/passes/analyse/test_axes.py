"""Axes of the noisy sample followed through ops, against tensors whose entries say where they come from."""

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from difa_compile.passes.analyse.axes import Axis, Stretch, follow_axes, other, sample_axes


class Chain:
    """A graph that is built op by op on real tensors."""

    def __init__(self):
        self.graph = fx.Graph()

    def given(self, name, value):
        node = self.graph.placeholder(name)
        node.meta["example_value"] = value
        return node

    def __call__(self, target, *args, **kwargs):
        create = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = create(target, args, kwargs)
        real, options = (fx.node.map_arg(each, lambda n: n.meta["example_value"]) for each in (args, kwargs))
        found = getattr(real[0], target)(*real[1:], **options) if isinstance(target, str) else target(*real, **options)
        node.meta["example_value"] = found
        return node

    def follow(self, *latents, **options):
        return follow_axes(self.graph, sample_axes(latents), **options)


def axis(index, size, within=False, first=0):
    return (Stretch((Axis(index, size, within, first),)),)


def merged(*axes):
    return (Stretch(tuple(Axis(*each) for each in axes)),)


def test_patches_become_tokens():
    chain = Chain()
    latent = chain.given("latent", torch.randn(2, 3, 4, 6))
    patches = chain("unflatten", chain("unflatten", latent, 3, (3, 2)), 2, (2, 2))  # (B, C, h, p, w, q)
    tokens = chain("reshape", chain("permute", patches, 0, 2, 4, 1, 3, 5), 2, 6, 12)
    assert chain.follow(latent)[tokens] == (
        axis(0, 2),
        merged((2, 2), (3, 3)),
        merged((1, 3), (2, 2, True), (3, 2, True)),
    )


def test_other_tokens_stand_beside_them():
    chain = Chain()
    latent, text = chain.given("latent", torch.randn(2, 6, 4)), chain.given("text", torch.randn(2, 3, 4))
    joined = chain(torch.cat, [text, latent], 1)
    image = chain(operator.getitem, joined, (slice(None), slice(3, None)))
    cut = chain(operator.getitem, joined, (slice(None), slice(1, 5)))
    found = chain.follow(latent)
    assert found[joined][1] == (*other(3), *axis(1, 6))
    assert found[image] == found[latent]
    assert found[cut][1] == (*other(2), *axis(1, 2))


@pytest.mark.parametrize("index", [torch.arange(1, 5), torch.arange(4, 0, -1), torch.tensor([1, 1, 3, 2])])
def test_indexing_by_a_range_is_a_slice_and_by_others_is_not(index):
    chain = Chain()
    latent, places = chain.given("latent", torch.randn(2, 6, 4)), chain.given("places", index)
    taken = chain(operator.getitem, latent, (slice(None), places))
    ranges = {places: range(1, 5)} if index.tolist() == [1, 2, 3, 4] else {}
    if index.tolist() == [4, 3, 2, 1]:
        ranges = {places: range(4, 0, -1)}
    wanted = axis(1, 4, first=1) if ranges.get(places) == range(1, 5) else other(4)
    found = chain.follow(latent, ranges=ranges)[taken]
    assert found == (axis(0, 2), wanted, axis(2, 4))


def test_a_table_looked_up_says_nothing_of_where_tokens_stand():
    """Numbers along a line that fetch learned positions do not make a line of an image's tokens."""
    chain = Chain()
    numbers = chain.given("numbers", torch.arange(6))
    fetched = chain(torch.nn.functional.embedding, numbers, torch.randn(6, 4))
    assert fetched not in follow_axes(chain.graph, {numbers: (axis(-9, 6),)})


@pytest.mark.parametrize(
    "write",
    [
        lambda chain, x, other: chain("copy_", x, other),
        lambda chain, x, other: chain("index_put_", x, (torch.arange(2),), other),
        lambda chain, x, other: chain(operator.setitem, x, slice(None), other),
        lambda chain, x, other: chain("copy_", chain(operator.getitem, x, slice(None)), other),
    ],
)
def test_what_is_written_over_is_no_longer_the_sample(write):
    chain = Chain()
    latent, given = chain.given("latent", torch.randn(2, 6, 4)), chain.given("given", torch.randn(2, 6, 4))
    copied = chain("clone", latent)
    assert copied in chain.follow(latent)
    write(chain, copied, given)
    found = chain.follow(latent).get(copied, tuple(map(other, (2, 6, 4))))
    assert found == tuple(map(other, (2, 6, 4)))


def test_an_op_in_place_that_moves_nothing_leaves_the_sample():
    chain = Chain()
    latent, given = chain.given("latent", torch.randn(2, 6, 4)), chain.given("given", torch.randn(2, 6, 4))
    copied = chain("clone", latent)
    chain("add_", chain(operator.getitem, copied, (slice(None), slice(0, 2))), chain("narrow", given, 1, 0, 2))
    found = chain.follow(latent)
    assert found[copied] == found[latent]


def test_samples_side_by_side_must_agree():
    """Texts of two lengths behind images of one size: padded to one length, the images stand alike."""
    chain = Chain()
    images = [chain.given(f"image{i}", torch.randn(4, 2)) for i in range(2)]
    texts = [chain.given(f"text{i}", torch.randn(i + 1, 2)) for i in range(2)]
    rows = [chain(torch.cat, list(pair)) for pair in zip(images, texts, strict=True)]
    batch = chain(torch.nn.utils.rnn.pad_sequence, rows, batch_first=True)
    turned = chain(torch.nn.utils.rnn.pad_sequence, [rows[0], chain("flip", rows[1], (0,))], batch_first=True)
    found = chain.follow(*images)
    assert found[batch][1] == (*axis(0, 4), *other(2))
    assert turned not in found or found[turned][1] == other(6)


def mixed(chain, draw, node):
    """One more op on a value, of those that move and combine entries but do not change them."""
    value = node.meta["example_value"]
    shape, rank = list(value.shape), value.ndim
    dim = draw(st.integers(0, rank - 1))
    size = shape[dim]
    start = draw(st.integers(0, size - 1))
    divisor = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    at = (slice(None),) * dim
    ops = [
        lambda: chain("permute", node, *draw(st.permutations(range(rank)))),
        lambda: chain("unflatten", node, dim, (divisor, size // divisor)),
        lambda: chain("flatten", node, dim),
        lambda: chain("reshape", node, -1, *shape[2:]) if rank > 1 else node,
        lambda: chain(operator.getitem, node, (*at, slice(start, None))),
        lambda: chain(operator.getitem, node, (*at, slice(None, None, 2))),
        lambda: chain(operator.getitem, node, (*at, torch.randperm(size))),
        lambda: chain("flip", node, (dim,)),
        lambda: chain("roll", node, 1, dim),
        lambda: chain(torch.cat, [node, chain(torch.zeros_like, node)], dim),
        lambda: chain(torch.cat, [chain(operator.getitem, node, (*at, slice(start, None))), node], dim),
        lambda: chain(torch.stack, [node, chain("flip", node, (dim,))], draw(st.integers(0, rank))),
        lambda: chain(torch.nn.functional.pad, node, (start, 1)),
        lambda: chain("unsqueeze", node, dim),
        lambda: chain("contiguous", node),
        lambda: chain("expand", node, *[3 if n == 1 else n for n in shape]),
    ]
    return draw(st.sampled_from(ops))() if rank < 6 and value.numel() < 2000 else node


@st.composite
def chains(draw):
    torch.manual_seed(0)
    chain = Chain()
    sizes = draw(st.lists(st.sampled_from((2, 3, 4, 6)), min_size=2, max_size=3))
    codes = torch.arange(1.0, 1 + torch.Size(sizes).numel()).reshape(sizes)  # 0 is for what is not of the sample
    node = latent = chain.given("latent", codes)
    for _ in range(draw(st.integers(1, 6))):
        node = mixed(chain, draw, node)
    return chain, latent, node


@settings(max_examples=120)
@given(chains())
def test_along_an_axis_the_sample_rises(made):
    """Wherever a dimension is said to follow an axis, its positions of the sample come in order and are no others'."""
    chain, latent, last = made
    sizes, value = latent.meta["example_value"].shape, last.meta["example_value"]
    where = torch.unravel_index((value - 1).clamp_min(0).long(), sizes)
    for i, extent in enumerate(chain.follow(latent).get(last, ())):
        start = 0
        for part in extent:
            if part.known:
                shape = [each.size for each in part.axes]
                real = value.narrow(i, start, part.length).movedim(i, 0).reshape(*shape, -1)
                for k, each in enumerate(part.axes):
                    place = where[each.index].narrow(i, start, part.length).movedim(i, 0).reshape(*shape, -1)
                    here, there = (place.narrow(k, a, each.size - 1) for a in (0, 1))
                    both = (real.narrow(k, 0, each.size - 1) > 0) & (real.narrow(k, 1, each.size - 1) > 0)
                    assert (there > here)[both].all(), (chain.graph, extent)
            start += part.length
