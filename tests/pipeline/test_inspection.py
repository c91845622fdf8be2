"""Looking into a model without changing it."""

import re

import pytest
import torch

from difa_compile.decision import Decision
from difa_compile.errors import ExampleInputsError, NoAttentionError, OutputError, PassError, UnsupportedPipelineError
from difa_compile.layout import Layout
from difa_compile.passes import order
from difa_compile.pipeline.inspection import inspect_model
from tests.support.tiny_models import Average, captured, dit, family_capture, pixart, plain
from tests.support.tiny_pipelines import tiny_pipeline

pytest.importorskip("diffusers")


def test_a_model_with_cross_attention():
    model, inputs = pixart()
    found = inspect_model(model, inputs)
    assert found.model is model
    assert [site.path.rpartition(".")[2] for site in found.sites] == ["attn1", "attn2"] * 2
    assert [info.path for info in found.site_infos] == [f"transformer_blocks.{i}.attn1" for i in range(2)]
    records = [(record.site, record.outcome, record.reason) for record in found.records]
    assert records == [(f"transformer_blocks.{i}.attn2", "skipped", "cross-attention is left alone") for i in range(2)]


def test_inputs_are_made_up_from_the_config():
    model, _ = dit()
    found = inspect_model(model)
    assert [info.layout for info in found.site_infos] == [Layout((4, 4))] * 2
    with pytest.raises(ExampleInputsError):
        inspect_model(plain()[0])


def test_a_pipeline_is_stopped_at_its_first_call():
    pipe = tiny_pipeline()
    found = inspect_model(pipe, {"class_labels": [1], "num_inference_steps": 2})
    assert found.model is pipe.transformer
    assert [info.tokens for info in found.site_infos] == [16, 16]
    assert not pipe.transformer._forward_pre_hooks
    assert [info.tokens for info in inspect_model(pipe).site_infos] == [16, 16]


def test_causal_attention_shows_in_the_records():
    model, inputs = plain(masks=("none", "causal"))
    found = inspect_model(model, inputs)
    assert [(r.site, r.decision, r.reason) for r in found.records] == [
        ("layers.1.attention", "window", "the attention is causal")
    ]


def test_blocks_that_can_be_left_out_and_why_others_cannot():
    model, inputs = plain(masks=("none", "none", "none"))
    found = inspect_model(model, inputs)
    assert [(info.path, info.kind, info.blocks) for info in found.blocks] == [
        *((f"layers.{i}", "block", ()) for i in range(3)),
        ("layers.0..layers.2", "block", tuple(f"layers.{i}" for i in range(3))),
    ]
    assert found.block_records == ()
    model.layers[1].forward = lambda x: model.layers[1].attention(x) * 2
    found = inspect_model(model, inputs)
    assert [info.path for info in found.blocks] == ["layers.0", "layers.2"]
    assert [(record.site, record.decision, record.outcome) for record in found.block_records] == [
        ("layers.1", "any", "skipped"),
        ("layers.0..layers.2", "any", "skipped"),
    ]
    assert all("is no sum of a value that came in" in record.reason for record in found.block_records)


class LinearAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        return self.to_q(x).relu() @ (self.to_k(x).relu().mT @ self.to_v(x))


def test_attention_without_softmax_is_said_not_guessed():
    model, inputs = plain()
    model.layers[1].attention = LinearAttention()
    found = inspect_model(model, inputs)
    assert [site.path for site in found.sites] == ["layers.0.attention"]
    (record,) = found.records
    assert (record.site, record.outcome) == ("layers.1.attention", "skipped")
    assert record.reason.startswith("LinearAttention holds no softmax attention call that ran")
    model.layers[0].attention = LinearAttention()
    with pytest.raises(NoAttentionError, match=r"layers\.0\.attention and 1 more: LinearAttention holds no softmax"):
        inspect_model(model, inputs)


def test_a_layout_can_be_told():
    model, inputs = plain()
    found = inspect_model(model, inputs, layout=Layout((2, 12)))
    assert {info.layout for info in found.site_infos} == {Layout((2, 12))}


def test_the_model_is_left_as_it_was():
    model, inputs, _, _ = captured("dit")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    model.train()
    inspect_model(model, inputs)
    assert model.training
    model.eval()
    inspect_model(model, inputs)
    assert not model.training
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_model_without_attention_is_refused():
    with pytest.raises(NoAttentionError, match="Average has no attention that a plan could act on"):
        inspect_model(Average(), {"x": torch.randn(2, 4, 8)})


def test_a_pipeline_without_transformer_is_refused():
    with pytest.raises(UnsupportedPipelineError):
        inspect_model(object())


def test_a_trace_shows_what_every_pass_makes_of_the_model(tmp_path):
    model, inputs, _, _ = captured("dit")
    inspect_model(model, inputs, trace=tmp_path)
    (capture,) = tmp_path.iterdir()
    sites = (capture / "07-find_sites.txt").read_text()
    assert "# transformer_blocks.0.attn1: self, 4x4" in sites
    assert re.search(r"^%\w+ = scaled_dot_product_attention\(.* attention of transformer_blocks\.0\.attn1", sites, re.M)
    made = {path.name[11:]: (path / "04-window.txt").read_text() for path in capture.glob("variant-*")}
    by_heads = "heads_0_window_band_1_1_full_"
    assert set(made) == {"window_band_1_", "window_band_1_+residual", "reuse", "forecast_1", by_heads}
    assert "<< window" in made["window_band_1_"]
    assert "scaled_dot_product_attention" not in made["reuse"]


def test_what_goes_wrong_in_a_pass_is_not_taken_for_a_model_without_attention(tmp_path, monkeypatch):
    model, inputs, _, _ = captured("dit")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        inspect_model(model, inputs, trace=tmp_path / "file" / "x")

    def broken(module, facts):
        raise KeyError("a fault")

    monkeypatch.setattr(order, "ANALYSIS", (broken,))
    with pytest.raises(PassError, match="pass broken failed: KeyError"):
        inspect_model(model, inputs)


def test_a_whole_block_has_no_heads():
    analysed = family_capture("dit")[0].model
    assert analysed.blocks
    for index in range(len(analysed.sites), len(analysed.units)):
        assert analysed.why_not(index, Decision.parse("heads(0:reuse;1:full)")) == (
            "a whole block has no heads; decide so for its attention"
        )
