"""Example inputs run through tiny models of every family they are known for."""

import pytest
import torch
from torch import nn

from difa_compile.errors import ExampleInputsError
from difa_compile.pipeline.example_inputs import example_inputs, pipeline_inputs

diffusers = pytest.importorskip("diffusers")


def tiny_dit():
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8
    )


def tiny_pixart(sample_size=8):
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        cross_attention_dim=24,
        caption_channels=24,
        sample_size=sample_size,
        patch_size=2 if sample_size < 64 else 16,
    )


def tiny_sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
    )


def tiny_flux(guidance_embeds=False):
    return diffusers.FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )


def tiny_wan():
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        ffn_dim=32,
        num_layers=1,
    )


MODELS = {
    "dit": tiny_dit,
    "pixart": tiny_pixart,
    "pixart with sizes": lambda: tiny_pixart(128),
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "flux with guidance": lambda: tiny_flux(True),
    "wan": tiny_wan,
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("batch", [1, 2])
def test_forward_accepts_them(family, batch):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    inputs = example_inputs(model, batch)
    with torch.no_grad():
        output = model(**inputs)[0]
    hidden = inputs["hidden_states"]
    assert output.shape[0] == batch
    assert output.shape[-1] == hidden.shape[-1] or family.startswith("flux")
    assert torch.isfinite(output).all()


def test_same_values_every_time_in_the_models_dtype():
    model = tiny_dit().to(torch.float64)
    first, second = example_inputs(model), example_inputs(model)
    assert first["hidden_states"].dtype is torch.float64
    assert torch.equal(first["hidden_states"], second["hidden_states"])
    assert torch.equal(first["class_labels"], second["class_labels"])


def test_subclasses_count_and_others_are_refused():
    class MyDiT(diffusers.DiTTransformer2DModel):
        pass

    model = MyDiT(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8)
    assert set(example_inputs(model)) == {"hidden_states", "timestep", "class_labels", "return_dict"}
    with pytest.raises(ExampleInputsError, match="Linear"):
        example_inputs(nn.Linear(2, 2))
    with pytest.raises(ExampleInputsError, match="at least 1"):
        example_inputs(model, batch=0)


def test_pipeline_inputs_by_signature():
    class Classes:
        def __call__(self, class_labels, generator=None, num_inference_steps=50, output_type="pil"): ...

    class Text:
        def __call__(self, prompt=None, height=None, num_inference_steps=50): ...

    class FromImage:
        def __call__(self, image, prompt=None): ...

    inputs = pipeline_inputs(Classes())
    assert inputs.pop("generator").initial_seed() == 0
    assert inputs == {"class_labels": [0], "num_inference_steps": 1, "output_type": "latent"}
    assert pipeline_inputs(Text()) == {"prompt": "", "num_inference_steps": 1}
    with pytest.raises(ExampleInputsError, match="needs image"):
        pipeline_inputs(FromImage())
