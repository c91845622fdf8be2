"""Regions prove themselves: a region that lies is caught."""

import dataclasses

import pytest
import torch

from difa_compile.backend.entry import eager
from difa_compile.decision import REUSE, Decision
from difa_compile.passes import proofs
from difa_compile.passes.graph import op_name
from difa_compile.passes.order import analyse, rewrite
from difa_compile.passes.proofs import Proof, agree, double_half, elsewhere, prove
from difa_compile.passes.replay import fresh, same
from difa_compile.passes.site import Region
from difa_compile.passes.variant import Context
from tests.support.captures import capture_of
from tests.support.tiny_models import (
    Attention,
    BareAttention,
    PlainTransformer,
    captured,
    captured_plain,
    graph_of,
    sites_of,
)

pytest.importorskip("diffusers")


@pytest.mark.parametrize("family", ["dit", "sd3", "flux", "wan"])
def test_honest_regions_prove_themselves(family):
    _, _, module, values = captured(family)
    sites = sites_of(module, values)
    for index in range(len(sites)):
        assert prove(module, sites, index, values, Context(0), rewrite) == Proof()


def test_a_region_that_hides_a_write_is_caught():
    """One output is told from before an in-place write that the reader sees: reuse would lose the write."""

    def doubled(self, y):
        z = self.o(y).view(2, 6, 2, 8).transpose(1, 2)
        z.mul_(2)
        return z.transpose(1, 2).reshape(2, 6, 16)

    torch.manual_seed(0)
    module, values = graph_of(BareAttention(doubled).eval(), {"x": torch.randn(2, 6, 16)})
    (site,) = sites_of(module, values)
    write = next(node for node in module.graph.nodes if op_name(node) == "mul_")
    target = write.args[0]
    region = site.region
    assert prove(module, [site], 0, values, Context(), rewrite) == Proof()
    upto = [*region.interior[: region.interior.index(target) + 1], write]
    lie = dataclasses.replace(site, region=Region(region.attention, tuple(upto), region.inputs, (target,)))
    assert prove(module, [lie], 0, values, Context(), rewrite).reuse == (
        "reusing the region's own output does not reproduce the full output"
    )


def test_a_site_that_fails_is_left_full_and_says_so(monkeypatch):
    _, _, module, values = captured_plain()
    monkeypatch.setattr(proofs, "prove", lambda *_: Proof("it lied", "it shared badly"))
    capture = capture_of(module, values, eager, conditional_half=0)
    assert capture.verdicts.why_not(0, REUSE) == "it lied"
    assert capture.verdicts.why_not(0, Decision.parse("full+cfg")) == "it shared badly"
    assert capture.verdicts.why_not(0, Decision.parse("window(band:2)+cfg")) == "it shared badly"
    assert capture.verdicts.why_not(0, Decision.parse("window(band:2)")) is None, (
        "a window changes nothing of the region"
    )
    assert capture.verdicts.effective(1, REUSE) == Decision.parse("full")


def test_a_region_that_is_too_wide_is_caught():
    """With a gate that depends on the input inside the region, its own output is right and another step's is not."""

    class Gated(BareAttention):
        def forward(self, x):
            return super().forward(x) * torch.sigmoid(x)

    torch.manual_seed(0)
    module, values = graph_of(Gated(lambda self, y: self.o(y)).eval(), {"x": torch.randn(2, 6, 16)})
    (site,) = sites_of(module, values)
    assert prove(module, [site], 0, values, Context(), rewrite) == Proof()
    added, gated = (next(node for node in module.graph.nodes if op_name(node) == name) for name in ("add", "mul"))
    region = site.region
    wide = Region(region.attention, (*region.interior, added, gated), region.inputs, (gated,))
    lie = dataclasses.replace(site, region=wide)
    assert prove(module, [lie], 0, values, Context(), rewrite).reuse == (
        "the region holds more than its attention: what is reused depends on other values of its step"
    )


def test_a_rewrite_that_does_not_run_is_a_reason_not_a_crash():
    _, _, module, values = captured_plain()
    sites = sites_of(module, values)
    wrong = [value if isinstance(value, torch.nn.Parameter) else value[..., :4] for value in values]
    reason = prove(module, sites, 0, wrong, Context(), rewrite).reuse
    assert reason.startswith("the rewritten region does not run: RuntimeError: ")


def test_sharing_that_mixes_the_halves_is_caught(monkeypatch):
    """A rewrite that takes tokens for the batch would pass reuse, but not a batch with equal halves."""
    _, _, module, values = captured("dit")
    sites = sites_of(module, values)

    def backwards(value, dim, start, length):
        return value.narrow(dim, start, length).flip(1)

    def mixing(graph, sites, roles, context):
        variant = rewrite(graph, sites, roles, context)
        if any(role.decision.cfg_shared for role in roles):
            narrow = next(node for node in variant.module.graph.nodes if node.target is torch.narrow)
            narrow.target = wrong
            variant.module.recompile()
        return variant

    def refusing(value, dim, start, length):
        raise RuntimeError("no half today")

    wrong = backwards
    assert prove(module, sites, 0, values, Context(0), mixing).sharing == (
        "sharing the CFG halves of a batch with equal halves does not reproduce the full output"
    )
    wrong = refusing
    proof = prove(module, sites, 0, values, Context(0), mixing)
    assert proof.reuse is None
    assert proof.sharing == "the rewritten region does not run: RuntimeError: no half today"


def test_inputs_that_the_graph_writes_to_are_copied():
    class Writer(BareAttention):
        def forward(self, x, buffer):
            buffer.add_(1)
            return super().forward(x) + buffer

    torch.manual_seed(0)
    module, values = graph_of(Writer().eval(), {"x": torch.randn(2, 6, 16), "buffer": torch.zeros(16)})
    buffer = next(v for v in values if v.shape == (16,) and not isinstance(v, torch.nn.Parameter))
    kept = buffer.clone()
    copies = fresh(module, values)
    assert sum(one is not two for one, two in zip(copies, values, strict=True)) == 1
    (site,) = sites_of(module, values)
    assert prove(module, [site], 0, values, Context(), rewrite) == Proof()
    assert torch.equal(buffer, kept), "proving a region must not change the model's state"


def test_double_half_and_same():
    value = torch.arange(8.0).reshape(4, 2)
    assert torch.equal(double_half(value, 0), value[[0, 1, 0, 1]])
    assert double_half(value, None) is value
    assert torch.equal(double_half(value, 1), value[:, [0, 0]])
    nan = torch.tensor([1.0, float("nan")])
    assert same(nan, nan.clone())
    assert not same(nan, torch.ones(2))
    assert not same(torch.ones(2), torch.ones(2, 1))


def test_elsewhere_is_another_input_of_the_same_kind():
    value = torch.zeros(2, 3, dtype=torch.bfloat16)
    moved = elsewhere(value)
    assert moved.dtype == value.dtype
    assert moved.shape == value.shape
    assert len(moved.unique()) == 6
    assert torch.equal(elsewhere(torch.arange(3)), torch.arange(3))
    assert elsewhere(5) == 5


def gate_in_place(self, y):
    z = self.o(y)
    z *= torch.sigmoid(z.mean())
    return z


@pytest.mark.parametrize("after", [gate_in_place, lambda self, y: self.o(y).add_(y)])
def test_a_region_that_reuse_could_not_erase_is_refused(after):
    """The attention's result is changed in place and then used: reuse would be right, but compute everything."""
    torch.manual_seed(0)
    module, values = graph_of(BareAttention(after).eval(), {"x": torch.randn(2, 6, 16)})
    sites = sites_of(module, values)
    assert prove(module, sites, 0, values, Context(), rewrite).reuse == (
        "reuse would save nothing: the attention's result is written to in place and then used"
    )


def test_a_region_that_holds_another_attention_is_not_reused():
    class Twice(BareAttention):
        def forward(self, x):
            q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
            once = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            twice = torch.nn.functional.scaled_dot_product_attention(once, k, v)
            return x + self.o(twice.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    module, values = graph_of(Twice().eval(), {"x": torch.randn(2, 6, 16)})
    sites = sites_of(module, values)
    reasons = [prove(module, sites, index, values, Context(), rewrite).reuse for index in range(len(sites))]
    assert "another attention call lies within its region" in reasons


def test_proving_does_not_change_the_models_buffers():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = BareAttention()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return self.inner(x) + self.calls

    torch.manual_seed(0)
    model = Counting().eval()
    module, values = graph_of(model, {"x": torch.randn(2, 6, 16)})
    before = model.calls.clone()
    capture_of(module, values, eager)
    assert torch.equal(model.calls, before)


class Listed(torch.nn.Module):
    """Takes its batch as a list of samples, as some models do."""

    def __init__(self):
        super().__init__()
        self.attention = Attention(32, 2)

    def forward(self, x):
        return self.attention(torch.stack(x))


def test_halves_of_a_list_are_made_equal_where_they_enter_the_region():
    """The samples are inputs of their own, none of which has two halves."""
    module, values = graph_of(Listed().eval(), {"x": [torch.randn(6, 32), torch.randn(6, 32)]})
    capture = capture_of(module, values, eager, conditional_half=1)
    assert capture.verdicts.why_not(0, Decision.parse("full+cfg")) is None


def test_rounding_counts_as_agreement_only_if_contiguous_outputs_explain_it():
    one = torch.randn(4, 8)
    rounded, wrong = one * (1 + 1e-6), one + 1
    assert agree([one], [one], [rounded])
    assert agree([rounded], [one], [rounded])
    assert not agree([rounded], [one], [one])
    assert not agree([wrong], [one], [wrong])


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_want_of_memory_is_no_reason_against_a_region(error):
    """It would leave the site full for good, with a reason that the next call disproves."""
    _, _, module, values = captured_plain()

    def full_of(*_):
        raise error

    with pytest.raises(type(error)):
        prove(module, sites_of(module, values), 0, values, Context(0), full_of)


# Blocks


def plain_blocks():
    _, _, module, values = captured_plain()
    model = analyse(module, values)
    return model, module, values


def test_blocks_and_spans_prove_themselves_in_whole_graphs():
    model, _, values = plain_blocks()
    assert model.proofs == (Proof(),) * 5
    for index in range(2, 5):
        assert prove(model.canonical, model.units, index, values, Context(), rewrite) == Proof()


def test_a_block_that_lies_is_caught():
    """Told of a stream that it does not add to it proves itself all the same: it is then that plus the rest. But what
    it hands on besides, what it leaves to be computed, and what it hides, is found."""
    model, _, values = plain_blocks()
    block = model.blocks[0]
    region = block.region

    def proof(**changes):
        lie = dataclasses.replace(block, region=dataclasses.replace(region, **changes))
        return prove(model.canonical, [lie], 0, values, Context(), rewrite).reuse

    assert proof() is None
    middle = next(user for user in region.streams[0].users if op_name(user) == "add")
    assert proof(outputs=(middle,)) == "reuse would save nothing: what the block computes is used elsewhere"
    assert proof(streams=(region.attention,)).startswith("the rewritten region does not run")


def test_a_block_left_out_with_another_steps_stream_is_caught():
    """Its stream held beside what it adds, it is right with the inputs that filled the cache and with no others."""
    model, _, values = plain_blocks()
    block = model.blocks[0]
    streams = []

    def held(stream, added):
        streams.append(stream)
        return streams[0] + added

    def holding(graph, units, roles, context):
        variant = rewrite(graph, units, roles, context)
        if any(role.reads_output for role in roles):
            cache = variant.module.graph.find_nodes(op="placeholder")[-1]
            (sum_,) = cache.users
            assert op_name(sum_) == "add"
            sum_.target = held
            variant.module.recompile()
        return variant

    assert prove(model.canonical, [block], 0, values, Context(), rewrite) == Proof()
    reason = "what the block adds depends on other values of its step"
    assert prove(model.canonical, [block], 0, values, Context(), holding) == Proof(reason, reason)
    assert len(streams) == 2


def test_a_block_that_draws_numbers_is_caught():
    """What it adds differs from call to call, so no output of its own is reproduced."""

    class Noisy(Attention):
        def forward(self, x):
            return super().forward(x) + torch.rand_like(x)

    torch.manual_seed(0)
    module, values = graph_of(PlainTransformer([Noisy(32, 2)]).eval(), {"x": torch.randn(2, 3, 8, 12)})
    model = analyse(module, values)
    assert [block.path for block in model.blocks] == ["layers.0"]
    assert model.why_not(1, REUSE) == "reusing what the block itself has added does not reproduce its output"
    assert model.why_not(1, Decision.parse("forecast:1")) == model.why_not(1, REUSE)
