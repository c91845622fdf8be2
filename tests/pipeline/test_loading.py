"""Loading pipelines and models by name or folder, and the errors for names that do not load."""

import json

import pytest
import torch

from difa_compile.errors import ModelLoadError
from difa_compile.pipeline.loading import load_model, load_pipeline

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=1, sample_size=8
    )
    vae = diffusers.AutoencoderTiny(
        in_channels=1,
        out_channels=1,
        latent_channels=1,
        encoder_block_out_channels=(2,),
        decoder_block_out_channels=(2,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
    )
    folder = tmp_path_factory.mktemp("pipeline")
    diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler()).save_pretrained(folder)
    return folder


def test_pipeline_folder_loads_in_the_dtype_asked_for(pipeline_folder):
    pipe = load_pipeline(pipeline_folder, dtype=torch.float16)
    assert type(pipe) is diffusers.DiTPipeline
    assert pipe.transformer.dtype is torch.float16
    assert load_pipeline(str(pipeline_folder)).transformer.dtype is torch.float32


def test_load_model_takes_pipelines_and_bare_models(pipeline_folder):
    assert type(load_model(pipeline_folder)) is diffusers.DiTPipeline
    model = load_model(pipeline_folder / "transformer")
    assert type(model) is diffusers.DiTTransformer2DModel
    assert not model.training


def test_bare_model_is_not_a_pipeline(pipeline_folder):
    with pytest.raises(ModelLoadError, match="single model"):
        load_pipeline(pipeline_folder / "transformer")


def test_empty_folder(tmp_path):
    with pytest.raises(ModelLoadError, match=r"no model_index\.json"):
        load_pipeline(tmp_path)
    with pytest.raises(ModelLoadError, match=r"no model_index\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["no-such-folder", "a/b/c", "/no/such/folder", "./missing"])
def test_name_that_is_neither_folder_nor_hub_id(name):
    with pytest.raises(ModelLoadError, match="there is no folder"):
        load_pipeline(name)
    with pytest.raises(ModelLoadError, match="there is no folder"):
        load_model(name)


def test_file_instead_of_folder(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(ModelLoadError, match="is a file"):
        load_pipeline(path)


def test_missing_weights_name_the_class_and_folder(pipeline_folder, tmp_path):
    (tmp_path / "model_index.json").write_text((pipeline_folder / "model_index.json").read_text())
    with pytest.raises(ModelLoadError, match=f"DiTPipeline in {tmp_path}"):
        load_pipeline(tmp_path)


def test_unknown_model_class(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "NoSuchModel"}))
    with pytest.raises(ModelLoadError, match="NoSuchModel"):
        load_model(tmp_path)


def test_hub_failure_is_a_load_error(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect\nlong explanation")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", offline)
    with pytest.raises(ModelLoadError, match="owner/name could not be loaded from the hub: We couldn't connect"):
        load_pipeline("owner/name")


def test_demo_is_the_packaged_model(monkeypatch):
    asked = []
    monkeypatch.setattr("difa_compile.pipeline.loading.load_demo", lambda dtype: asked.append(dtype) or "the demo")
    assert load_pipeline("demo", torch.bfloat16) == "the demo"
    assert load_model("demo") == "the demo"
    assert asked == [torch.bfloat16, torch.float32]
