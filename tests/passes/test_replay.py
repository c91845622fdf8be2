"""Graphs run on values: what is given, what is changed, what is copied, what counts as the same."""

import torch

from difa_compile.passes.graph import is_attention
from difa_compile.passes.order import rewrite
from difa_compile.passes.replay import Replay, close, coarsest, computes_the_same
from difa_compile.passes.variant import Context
from difa_compile.plan.schedule import FULL_ROLE
from tests.support.printed import one_attention
from tests.support.tiny_models import graph_of

BF16, F32 = torch.bfloat16, torch.float32


def test_a_result_in_float32_is_no_closer_than_what_it_was_made_from():
    one = torch.ones(4)
    assert not close(one, one + 1e-2, F32)
    assert close(one, one + 1e-2, BF16)
    assert not close(one, one + 0.2, BF16)
    assert not close(one, one.bfloat16(), BF16)


def test_values_are_given_instead_of_computed_and_changed_on_their_way():
    module, (site,), values = one_attention()
    region = site.region
    plain = Replay(module)
    (output,) = plain.run(*values)
    assert torch.equal(output, module(*values)[0])
    assert list(plain.values) == [region.attention], "the attention's value is kept"
    (left,) = region.outputs
    zeros = torch.zeros(2, 6, 16)
    (given,) = Replay(module, given={left: zeros}).run(*values)
    latent = next(value for value in values if not isinstance(value, torch.nn.Parameter))
    assert torch.equal(given, latent), "what is added to the sample is given as nothing"
    doubled = Replay(module, changed={left: lambda value: 2 * value})
    torch.testing.assert_close(doubled.run(*values)[0] - latent, 2 * (output - latent))


def test_graphs_that_compute_the_same_and_graphs_that_do_not():
    module, (site,), values = one_attention()
    one, two = (rewrite(module, [site], [FULL_ROLE], Context()).module for _ in range(2))
    assert computes_the_same(module, one, values)
    attention = next(node for node in two.graph.nodes if is_attention(node))
    attention.kwargs = {"scale": 0.5}
    two.recompile()
    assert not computes_the_same(module, two, values)


def test_the_fewest_digits_of_a_graph_decide_how_close_is_close():
    def mixed(x):
        return (x.bfloat16() @ x.bfloat16()).float()

    assert coarsest(graph_of(mixed, {"x": torch.randn(4, 4)})[0]) is BF16
    assert coarsest(one_attention()[0]) is F32
    assert coarsest(graph_of(lambda x: x.argmax(), {"x": torch.randn(4)})[0]) is torch.float64


def test_what_is_no_floating_point_number_must_be_equal():
    assert close(torch.tensor([1, 2]), torch.tensor([1, 2]), F32)
    assert not close(torch.tensor([1, 2]), torch.tensor([1, 3]), BF16)
    assert close(3, 3, F32)
    assert not close(3, 4, F32)
    assert not close(torch.ones(2), torch.ones(3), F32)
    assert close(torch.empty(0), torch.empty(0), F32)
