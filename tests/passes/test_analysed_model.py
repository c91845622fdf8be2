"""The analysed model: what can be done at its sites, what it holds for, what makes two of them the same."""

import dataclasses

import pytest
import torch
from torch._inductor import compile_fx

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import InputValuesError
from difa_compile.passes.graph import is_parameter
from difa_compile.passes.order import analyse
from difa_compile.passes.proofs import Proof
from difa_compile.passes.variant import Context
from tests.support.tiny_models import captured, captured_plain, graph_of, plain

D = Decision.parse
WINDOW, RESIDUAL = D("window(box:1)"), D("window(box:1)+residual")
EVERY_KIND = [FULL, WINDOW, RESIDUAL, REUSE]
UNKNOWN = "which half of the batch is conditional is not known; the plan does not say"


def shared(decision):
    return D(f"{decision}+cfg")


def analysed(context=Context(), **options):  # noqa: B008 (frozen)
    model, inputs = plain(**options)
    return analyse(*graph_of(model, inputs), context)


@pytest.fixture(scope="module")
def unguided():
    return analysed()


@pytest.fixture(scope="module")
def batched():
    return analysed(Context(0))


@pytest.fixture(scope="module")
def two_call():
    return analysed(Context(None, two_call=True))


# --- why not ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decision", EVERY_KIND, ids=str)
def test_where_nothing_stands_against_it_every_decision_can_be_carried_out(decision, unguided, batched, two_call):
    for site in (0, 1):
        for model in (unguided, batched, two_call):
            assert model.why_not(site, decision) is None
        assert unguided.why_not(site, shared(decision)) == UNKNOWN
        assert batched.why_not(site, shared(decision)) is None
        assert two_call.why_not(site, shared(decision)) is None, "across calls, sharing is reuse within the step"


def test_a_proof_that_failed_is_the_reason_for_what_it_was_to_prove(batched, two_call):
    proofs = (Proof("not reused", "not shared"), Proof(None, "not shared"))
    one, two = (dataclasses.replace(model, proofs=proofs) for model in (batched, two_call))
    assert [one.why_not(0, decision) for decision in EVERY_KIND] == [None, None, None, "not reused"]
    halves = [one.why_not(0, shared(decision)) for decision in EVERY_KIND]
    assert halves == ["not shared", "not shared", "not shared", "not reused"]
    assert [one.why_not(1, shared(decision)) for decision in EVERY_KIND] == ["not shared"] * 4
    assert [two.why_not(0, decision) for decision in EVERY_KIND] == [None, None, None, "not reused"]
    assert [two.why_not(0, shared(decision)) for decision in EVERY_KIND] == ["not reused"] * 4
    assert [two.why_not(1, shared(decision)) for decision in EVERY_KIND] == [None] * 4


def test_a_site_without_windows_can_still_be_reused_and_shared():
    model = analysed(Context(1), masks=("causal", "none"))
    assert [model.why_not(0, decision) for decision in EVERY_KIND] == [
        None,
        "the attention is causal",
        "the attention is causal",
        None,
    ]
    assert model.why_not(0, shared(FULL)) is None
    assert model.why_not(0, shared(WINDOW)) == "the attention is causal"
    assert [model.why_not(1, decision) for decision in EVERY_KIND] == [None] * 4


def test_halves_that_are_none_are_a_reason_in_one_call_only():
    for context, reason in ((Context(0), "a batch of 3 has no two CFG halves"), (Context(None, two_call=True), None)):
        model = analysed(context, batch=3)
        assert [model.why_not(0, shared(decision)) for decision in EVERY_KIND] == [reason] * 4
        assert [model.why_not(0, decision) for decision in EVERY_KIND] == [None] * 4


def test_a_reason_is_found_once(batched, monkeypatch):
    model = dataclasses.replace(batched)
    assert model.why_not(0, shared(WINDOW)) is None
    monkeypatch.setattr("difa_compile.passes.analysed_model.why_not_shared", lambda *_: "asked again")
    assert model.why_not(0, shared(WINDOW)) is None
    assert model.why_not(1, shared(WINDOW)) == "asked again"


# --- a value ---------------------------------------------------------------------------------------------------------


def test_nothing_in_it_changes(batched):
    with pytest.raises(dataclasses.FrozenInstanceError):
        batched.proofs = ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        batched.context.conditional_half = 1
    assert isinstance(batched.all_sites, tuple)
    assert isinstance(batched.split.segments, tuple)


def test_asking_leaves_the_graphs_as_they_are(batched):
    before = [str(batched.canonical.graph), *(str(segment.module.graph) for segment in batched.split.segments)]
    model = dataclasses.replace(batched)
    for decision in EVERY_KIND:
        model.why_not(0, decision), model.why_not(1, shared(decision))
    assert [str(model.canonical.graph), *(str(segment.module.graph) for segment in model.split.segments)] == before


def test_no_compiler_is_in_it(monkeypatch):
    model, inputs = plain()
    module, values = graph_of(model, inputs)

    def fail(*args, **kwargs):
        raise AssertionError("something was compiled")

    monkeypatch.setattr(compile_fx, "compile_fx", fail)
    monkeypatch.setattr(torch, "compile", fail)
    found = analyse(module, values, Context(0))
    assert [found.why_not(1, shared(decision)) for decision in EVERY_KIND] == [None] * 4


def test_where_its_sites_stand(batched):
    assert [site.path for site in batched.sites] == ["layers.0.attention", "layers.1.attention"]
    for index in (0, 1):
        segment = batched.split.segments[batched.segment_of(index)]
        assert segment.site_indices == (index, 2 + index), "the site, and the block that holds it"
        assert segment.sites[0].path == batched.sites[index].path
    assert batched.batch == 2
    assert batched.sample == (3, 8, 12)
    assert batched.cache_dtypes[0] == (torch.float32, torch.float32, torch.device("cpu"))


def test_cross_attention_is_known_and_not_acted_on():
    pytest.importorskip("diffusers")
    _, _, module, values = captured("pixart")
    model = analyse(module, values)
    assert len(model.all_sites) == 4
    assert [site.path for site in model.sites] == [f"transformer_blocks.{i}.attn1" for i in range(2)]
    assert model.segment_of(1) > model.segment_of(0)


def test_the_model_that_makes_a_call_is_known_by_a_parameter(batched):
    _, _, module, values = captured_plain()
    parameter = batched.parameter(values)
    assert isinstance(parameter, torch.nn.Parameter)
    assert is_parameter(module.graph.find_nodes(op="placeholder")[batched.first_parameter])
    assert dataclasses.replace(batched, first_parameter=None).parameter(values) is None


# --- the same function -----------------------------------------------------------------------------------------------


def test_two_captures_of_a_model_are_the_same(batched):
    again = analysed(Context(0))
    assert again is not batched
    assert again.identity == batched.identity
    assert hash(again.identity) == hash(batched.identity)


@pytest.mark.parametrize(
    "options", [{"batch": 4}, {"size": (12, 8)}, {"masks": ("none", "causal")}, {"rotate": True}], ids=str
)
def test_another_batch_size_or_model_is_another(options, batched):
    assert analysed(Context(0), **options).identity != batched.identity


def test_it_holds_for_the_answers_that_it_was_made_with():
    class Shown(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = plain()[0]

        def forward(self, x, mask):
            tokens = mask.nonzero().shape[0]
            return self.inner(x) * tokens

    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 3, 8, 12), "mask": torch.tensor([True, True, False])}
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        module, values = graph_of(Shown().eval(), inputs)
    model = analyse(module, values)
    model.check(values)
    place = next(i for i, value in enumerate(values) if value.dtype == torch.bool)
    same, other = list(values), list(values)
    same[place] = torch.tensor([False, True, True])
    other[place] = torch.tensor([True, True, True])
    model.check(same)
    with pytest.raises(InputValuesError, match="how many tokens a mask shows"):
        model.check(other)
