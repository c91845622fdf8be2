"""Models that Dynamo does not capture as one graph: whoever compiles one is told so, where, and what to do."""

import gc
import re

import pytest
import torch

import difa_compile
from benchmarks.zoo.check import call
from benchmarks.zoo.registry import build
from difa_compile.decision import FULL, REUSE
from difa_compile.errors import SitesMismatchError, UnsupportedModelError
from difa_compile.pipeline.inspection import inspect_model
from difa_compile.pipeline.rules import plan_from_rule
from difa_compile.plan.plan import Cell, ModelInfo, Plan, Settings, SiteInfo
from tests.support.tiny_models import Attention, PlainTransformer

pytest.importorskip("diffusers")

NAMED = (
    r"(?s)not capture the model as one graph.* of this piece, .*\.py:\d+, in .*"
    r"Use difa_compile\.apply\(pipe, plan\), .*fullgraph=True"
)


def compiled(model, plan):
    torch._dynamo.reset()
    return torch.compile(model, backend="difa", options={"plan": plan, "inner": "eager"})


def reusing(model, inputs):
    return plan_from_rule(model, 2, lambda step, _: REUSE if step else FULL, inputs=dict(inputs))


class Broken(PlainTransformer):
    """Breaks its graph where it is told to."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__([Attention(32, 2), Attention(32, 2)])
        self.where = ""

    def forward(self, x):
        if self.where == "begin":
            torch._dynamo.graph_break()
        y = self.patch(x).flatten(2).transpose(1, 2)
        if self.where == "between":
            y = self.layers[0](y)
            torch._dynamo.graph_break()
            y = self.layers[1](y)
        else:
            y = self.through_layers(y)
        y = self.head(y).unflatten(1, (4, 6)).unflatten(-1, (2, 2, 3))
        y = y.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
        if self.where == "end":
            torch._dynamo.graph_break()
        return y

    def through_layers(self, y):
        for layer in self.layers:
            y = layer(y)
            if self.where == "loop":
                torch._dynamo.graph_break()
        return y


@pytest.fixture(scope="module")
def broken():
    model = Broken().eval()
    inputs = {"x": torch.randn(2, 3, 8, 12)}
    return model, inputs, reusing(model, inputs)


@pytest.fixture(autouse=True)
def _whole(broken):
    yield
    broken[0].where = ""


def test_a_model_in_one_piece_follows_the_plan(broken):
    model, inputs, plan = broken
    function = compiled(model, plan)
    with torch.no_grad(), difa_compile.sampling(function, steps=2) as run:
        run.step(0)
        assert torch.equal(function(**inputs), model(**inputs))


@pytest.mark.parametrize("where", ["between", "loop"])
def test_pieces_without_all_sites_are_no_models(broken, where):
    model, inputs, plan = broken
    model.where = where
    function = compiled(model, plan)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=NAMED) as told:
        function(**inputs)
    assert "test_graph_breaks.py:" in str(told.value)
    if where == "between":
        assert "it ends in a graph break" in str(told.value)
        assert "torch._dynamo.graph_break()" in str(told.value)


def test_a_break_before_all_sites_or_behind_them_is_none_of_ours(broken):
    """The piece that holds the model's attention is all that a plan needs."""
    model, inputs, plan = broken
    for where in ("begin", "end"):
        model.where = where
        function = compiled(model, plan)
        with torch.no_grad(), difa_compile.sampling(function, steps=2) as run:
            run.step(0)
            assert torch.equal(function(**inputs), model(**inputs))
            run.step(1)
            moved = {"x": inputs["x"] + 1}
            assert not torch.equal(function(**moved), model(**moved))


def test_a_plan_for_another_model_is_not_taken_for_a_break(broken):
    _, inputs, plan = broken
    other = PlainTransformer([Attention(32, 2)]).eval()
    with torch.no_grad(), pytest.raises(SitesMismatchError, match="the plan names 2 sites, the model has 1"):
        compiled(other, plan)(**inputs)


def test_inspection_names_the_break(broken):
    model, inputs, _ = broken
    model.where = "loop"
    with pytest.raises(
        UnsupportedModelError, match=r"Broken cannot be captured as one graph: .*\(test_graph_breaks\.py:\d+, "
    ):
        inspect_model(model, inputs)


# The zoo

WHOLE = (
    "CogVideoXTransformer3DModel",
    "DiTTransformer2DModel",
    "FluxTransformer2DModel",
    "Kandinsky6SRTransformer3DModel",
    "WanTransformer3DModel",
)
BROKEN = (
    "GlmImageTransformer2DModel",
    "Lumina2Transformer2DModel",
    "MochiTransformer3DModel",
    "OmniGenTransformer2DModel",
)
EITHER = (
    "BriaFibo2Transformer2DModel",
    "HunyuanVideo15Transformer3DModel",
    "QwenImage21Transformer2DModel",
    "WanAnimate2Transformer3DModel",
    "ZImageTransformer2DModel",
)
"""Captured in pieces by Dynamo; that matters only where no piece has all the attention."""
REFUSED = {
    "HiDreamImageTransformer2DModel": (
        r"cannot be captured as one graph: .*the weights send to an expert \(.*hidream_image\.py:\d+, in moe_infer: "
    ),
    "SanaTransformer2DModel": "none of them self- or joint attention",
    "SanaVideoTransformer3DModel": "none of them self- or joint attention",
}
"""Classes that no plan can be made for, and what is said of them."""


@pytest.mark.parametrize(
    "name",
    [
        "GlmImageTransformer2DModel",
        "Lumina2Transformer2DModel",
        "OmniGenTransformer2DModel",
        pytest.param("MochiTransformer3DModel", marks=pytest.mark.slow),
        pytest.param("HiDreamImageTransformer2DModel", marks=pytest.mark.slow),
    ],
)
def test_bare_compile_names_the_break(name):
    """Already the first piece is enough to tell, whatever the plan says of the model."""
    example = build(name)
    model = ModelInfo(name, "", 1)
    site = SiteInfo("blocks.0.attn", "self", 2, 16, 24, 32)
    plan = Plan(model, Settings("rule"), (site,), (1.0,), ((Cell(FULL),),))
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=NAMED):
        call(example, compiled(example.model, plan))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WHOLE, *BROKEN, *EITHER, *REFUSED])
def test_bare_compile_plans_all_sites_or_names_the_break(name):
    example = build(name)
    if name in REFUSED:
        with pytest.raises(difa_compile.errors.DifaError, match=REFUSED[name]):
            reusing(example.model, example.inputs)
        with torch.no_grad(), pytest.raises(difa_compile.errors.DifaError) as told:
            call(example, compiled(example.model, None))
        assert ("as one graph" in str(told.value)) == ("as one graph" in REFUSED[name])
        return
    plan = reusing(example.model, example.inputs)
    function = compiled(example.model, plan)
    refusal, sites = None, None
    try:
        with torch.no_grad(), difa_compile.sampling(function, steps=2) as run:
            call(example, function)
            (kept,) = run._all_parts()
            sites = [site.path for site in kept.capture.model.sites]
    except UnsupportedModelError as error:
        refusal = str(error)
    if name not in EITHER:
        assert (refusal is not None) == (name in BROKEN)
    if refusal is None:
        assert sites == [site.path for site in plan.sites]
    else:
        assert re.search(NAMED, refusal), refusal
    gc.collect()
