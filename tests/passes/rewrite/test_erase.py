"""Regions that are taken out of a graph: all that nobody needs, and nothing else."""

import torch
import torch.nn.functional as F

from difa_compile.passes.rewrite.erase import erase_region
from difa_compile.passes.variant import start_variant
from difa_compile.plan.schedule import FULL_ROLE
from tests.support.printed import graph_text, one_attention, printed
from tests.support.tiny_models import BareAttention, captured_plain, graph_of, in_place, sites_of


def test_erasing_keeps_what_others_still_use():
    """A region whose output is still read stays whole, its in-place writes included."""
    _, _, module, values = captured_plain(rotate=True)
    sites = sites_of(module, values)
    variant = start_variant(module, sites, [FULL_ROLE] * 2)
    before = len(variant.graph.nodes)
    erase_region(variant.targets[0].site.region.interior)
    assert len(variant.graph.nodes) == before
    assert torch.equal(variant.finish()(*values)[0], module(*values)[0])


def cut_off(module, sites):
    """A copy of a graph in which nothing outside reads the region's outputs, and the region there."""
    variant = start_variant(module, sites, [FULL_ROLE] * len(sites))
    region = variant.targets[0].site.region
    (output,) = region.outputs
    output.replace_all_uses_with(region.inputs[0])
    return variant, region


def test_a_region_that_nobody_reads_goes_as_a_whole():
    module, sites, _ = one_attention()
    variant, region = cut_off(module, sites)
    erase_region(region.interior)
    assert printed(variant.finish()) == graph_text("""
        %x = input  float32 (2, 6, 16), batch 0
        %add = add(%x, %x)  float32 (2, 6, 16), batch 0
        return (%add)
    """)


def test_what_others_read_stays_with_all_that_leads_to_it():
    module, sites, _ = one_attention()
    variant, region = cut_off(module, sites)
    (key,) = (node for node in region.interior if node.name == "key")
    add = next(node for node in variant.graph.nodes if node.name == "add")
    variant.call_after(add, "sum", (key,))
    erase_region(region.interior)
    assert printed(variant.finish()) == graph_text("""
        %x = input  float32 (2, 6, 16), batch 0
        %linear_1 = linear(%x, k.weight, k.bias)  float32 (2, 6, 16), batch 0
        %unflatten_1 = unflatten(%linear_1, -1, (2, 8))  float32 (2, 6, 2, 8), batch 0
        %key = transpose(%unflatten_1, 1, 2)  float32 (2, 2, 6, 8), batch 0
        %add = add(%x, %x)  float32 (2, 6, 16), batch 0
        %sum_1 = sum(%key)  float32 ()
        return (%add)
    """)


class Written(BareAttention):
    """The queries are filled in place, slice by slice."""

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
        filled = torch.empty_like(q)
        filled[..., :4] = q[..., 4:]
        filled[..., 4:] = q[..., :4]
        return x + self.o(F.scaled_dot_product_attention(filled, k, v).transpose(1, 2).flatten(2))


def test_writes_go_with_the_value_they_write_and_stay_with_it():
    torch.manual_seed(0)
    module, values = graph_of(Written().eval(), {"x": torch.randn(2, 6, 16)})
    sites = sites_of(module, values)
    variant, region = cut_off(module, sites)
    erase_region(region.interior)
    assert [node.name for node in variant.graph.nodes if node.op.startswith("call")] == ["add"]
    variant, region = cut_off(module, sites)
    (filled,) = (node for node in region.interior if node.name == "filled")
    add = next(node for node in variant.graph.nodes if node.name == "add")
    summed = variant.call_after(add, "sum", (filled,))
    erase_region(region.interior)
    output = next(node for node in variant.graph.nodes if node.op == "output")
    output.args = ((summed,),)
    assert sum(in_place(node) for node in variant.graph.nodes) == 2
    torch.manual_seed(0)
    model = Written().eval()
    latent = next(value for value in values if not isinstance(value, torch.nn.Parameter))
    torch.testing.assert_close(variant.finish()(*values)[0], model.q(latent).sum())
