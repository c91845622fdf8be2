"""CFG sharing: which half is computed, and which regions are refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from difa_compile.decision import Decision
from difa_compile.passes.graph import is_linear, op_name, shape_of
from difa_compile.passes.order import rewrite
from difa_compile.passes.rewrite.share_cfg import why_not_shared
from difa_compile.passes.variant import Context
from difa_compile.plan.schedule import Role
from tests.support.printed import graph_text, one_attention, printed
from tests.support.tiny_models import FAMILIES, BareAttention, captured, captured_plain, graph_of, sites_of

pytest.importorskip("diffusers")

SHARED = Role(Decision.parse("full+cfg"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("half", [0, 1])
def test_every_value_of_the_region_is_computed_on_half_a_batch(family, half):
    _, _, module, values = captured(family)
    sites = sites_of(module, values)
    variant = rewrite(module, sites, [SHARED] * len(sites), Context(half))
    halves = [shape_of(node)[0] for node in variant.module.graph.nodes if is_linear(node) and shape_of(node)[0] == 1]
    linears = {node for site in sites for node in site.region.interior if is_linear(node)}
    assert len(halves) == len(linears)
    starts = {node.args[2] for node in variant.module.graph.nodes if node.target is torch.narrow}
    assert starts == {half}


@pytest.mark.parametrize("half", [0, 1])
def test_the_other_half_of_the_noise_does_not_matter_to_the_region(half):
    """With every block shared, the two samples' attention is equal, whatever the other sample holds."""
    _, _, module, values = captured_plain(rotate=True)
    sites = sites_of(module, values)
    emit = Role(Decision.parse("full+cfg"), emit_output=True)
    variant = rewrite(module, sites[:1] + sites[1:], [emit, emit], Context(half))
    results = variant.module(*values)[1:]
    other = [v.clone() if not isinstance(v, nn.Parameter) else v for v in values]
    latent = next(v for v in other if not isinstance(v, nn.Parameter))
    latent[1 - half] += 1
    changed = variant.module(*other)[1:]
    for one, two in zip(results, changed, strict=True):
        assert torch.equal(one[0], one[1])
        assert torch.equal(one, two)


def test_reasons_to_refuse():
    _, _, module, values = captured_plain()
    (site, _) = sites_of(module, values)
    assert why_not_shared(module, site, Context(0)) is None
    assert "not known" in why_not_shared(module, site, Context(None))


@pytest.mark.parametrize("batch", [1, 3])
def test_an_odd_batch_is_refused(batch):
    module, values = graph_of(BareAttention().eval(), {"x": torch.randn(batch, 6, 16)})
    (site,) = sites_of(module, values)
    assert why_not_shared(module, site, Context(0)) == f"a batch of {batch} has no two CFG halves"


class Leaking(BareAttention):
    """The queries are used outside the region too."""

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.o(y) + q.mean(-1).mean(1)[..., None]


def test_a_value_used_outside_the_region_is_computed_whole():
    torch.manual_seed(0)
    model = Leaking().eval()
    module, values = graph_of(model, {"x": torch.randn(2, 6, 16)})
    sites = sites_of(module, values)
    assert why_not_shared(module, sites[0], Context(1)) is None
    shared = rewrite(module, sites, [SHARED], Context(1)).module
    x = next(value for value in values if not isinstance(value, torch.nn.Parameter))
    q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (model.q, model.k, model.v))
    half = model.o(F.scaled_dot_product_attention(q[1:], k[1:], v[1:]).transpose(1, 2).flatten(2))
    wanted = x + torch.cat([half, half]) + q.mean(-1).mean(1)[..., None]
    torch.testing.assert_close(shared(*values)[0], wanted, atol=1e-6, rtol=0)


def test_a_fused_projection_that_feeds_more_than_the_attention_stays_whole():
    """FLUX.2's parallel blocks: one linear for query, key, value and the MLP."""

    class Fused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.together, self.out = torch.nn.Linear(16, 3 * 16 + 32), torch.nn.Linear(48, 16)

        def forward(self, x):
            qkv, mlp = self.together(x).split([48, 32], -1)
            q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in qkv.chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return x + self.out(torch.cat([y, mlp.relu()], -1))

    torch.manual_seed(0)
    module, values = graph_of(Fused().eval(), {"x": torch.randn(2, 6, 16)})
    sites = sites_of(module, values)
    assert why_not_shared(module, sites[0], Context(0)) is None
    shared = rewrite(module, sites, [SHARED], Context(0)).module
    by_op = {op_name(node): shape_of(node) for node in shared.graph.nodes}
    assert by_op["linear"][0] == 2
    assert by_op["scaled_dot_product_attention"][0] == 1
    equal = [v if isinstance(v, torch.nn.Parameter) else v[:1].expand(2, -1, -1).contiguous() for v in values]
    torch.testing.assert_close(shared(*equal)[0], module(*equal)[0], atol=1e-6, rtol=0)


class Mixing(BareAttention):
    """The samples of a batch are mixed before the attention."""

    def forward(self, x):
        return super().forward(x.roll(1, 0))


def test_a_batch_that_cannot_be_followed_is_refused():
    module, values = graph_of(Mixing().eval(), {"x": torch.randn(2, 6, 16)})
    (site,) = sites_of(module, values)
    assert why_not_shared(module, site, Context(0)) == (
        "the batch can't be followed from the noisy sample to this attention: not behind roll (node roll), whose "
        "effect on dimensions is not known"
    )


class Folded(BareAttention):
    """Batch and tokens are one dimension around the projections, with the sizes written as numbers."""

    def forward(self, x):
        flat = x.reshape(4 * 6, 16)
        q, k, v = (part(flat).view(4, 6, 2, 8).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(24, 16)
        return x + self.o(y).view(4, 6, 16)


def test_numbers_in_reshapes_are_halved():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 16)
    module, values = graph_of(Folded().eval(), {"x": x})
    (site,) = sites_of(module, values)
    assert why_not_shared(module, site, Context(1)) is None
    variant = rewrite(module, (site,), [SHARED], Context(1))
    delta = variant.module(*values)[0] - x
    wanted = (module(*values)[0] - x)[[2, 3, 2, 3]]
    torch.testing.assert_close(delta, wanted, atol=1e-6, rtol=0)


def test_the_graph_that_is_asked_stays_as_it_was():
    _, _, module, values = captured("flux")
    before = str(module.graph)
    for site in sites_of(module, values):
        assert why_not_shared(module, site, Context(1)) is None
    assert str(module.graph) == before


def test_the_region_is_computed_on_the_half_and_doubled_behind():
    module, sites, _ = one_attention()
    assert printed(rewrite(module, sites, [SHARED], Context(1)).module) == graph_text("""
        %x = input  float32 (2, 6, 16), batch 0
        %narrow = narrow(%x, 0, 1, 1)  float32 (1, 6, 16)
        %linear = linear(%narrow, q.weight, q.bias)  float32 (1, 6, 16), batch 0
        %unflatten = unflatten(%linear, -1, (2, 8))  float32 (1, 6, 2, 8), batch 0
        %query = transpose(%unflatten, 1, 2)  float32 (1, 2, 6, 8), batch 0
        %linear_1 = linear(%narrow, k.weight, k.bias)  float32 (1, 6, 16), batch 0
        %unflatten_1 = unflatten(%linear_1, -1, (2, 8))  float32 (1, 6, 2, 8), batch 0
        %key = transpose(%unflatten_1, 1, 2)  float32 (1, 2, 6, 8), batch 0
        %linear_2 = linear(%narrow, v.weight, v.bias)  float32 (1, 6, 16), batch 0
        %unflatten_2 = unflatten(%linear_2, -1, (2, 8))  float32 (1, 6, 2, 8), batch 0
        %value = transpose(%unflatten_2, 1, 2)  float32 (1, 2, 6, 8), batch 0
        %sdpa = sdpa(%query, %key, %value)  float32 (1, 2, 6, 8), batch 0
        %transpose_3 = transpose(%sdpa, 1, 2)  float32 (1, 6, 2, 8), batch 0
        %y = flatten(%transpose_3, 2)  float32 (1, 6, 16), batch 0
        %linear_3 = linear(%y, o.weight, o.bias)  float32 (1, 6, 16), batch 0
        %repeat = repeat(%linear_3, 2, 1, 1)  float32 (2, 6, 16), batch 0
        %add = add(%x, %repeat)  float32 (2, 6, 16), batch 0
        return (%add)
    """)


@pytest.mark.parametrize("half", [0, 1])
def test_the_half_that_is_conditional_is_the_one_taken(half):
    module, sites, _ = one_attention()
    lines = printed(rewrite(module, sites, [SHARED], Context(half)).module).splitlines()
    assert [line for line in lines if "narrow(" in line] == [f"%narrow = narrow(%x, 0, {half}, 1)  float32 (1, 6, 16)"]
