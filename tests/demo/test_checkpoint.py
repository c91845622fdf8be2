"""Finding and loading the demo pipeline."""

import logging

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.utils import logging as diffusers_logging

from difa_compile.demo import checkpoint, demo_model_path, load_demo
from difa_compile.errors import ModelLoadError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained pipeline of the demo model's kind, saved in fp16 without labels."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1, sample_size=8
    )
    channels = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (2,))
    blocks = dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1,))
    vae = AutoencoderTiny(in_channels=1, out_channels=1, latent_channels=1, **channels, **blocks)
    path = tmp_path_factory.mktemp("demo")
    DiTPipeline(transformer, vae, DDIMScheduler()).to(torch.float16).save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_in_the_asked_dtype_with_labels(folder, dtype):
    pipe = load_demo(dtype, folder)
    assert isinstance(pipe, DiTPipeline)
    assert pipe.transformer.dtype == pipe.vae.dtype == dtype
    assert pipe.get_label_ids(["7", "0"]) == [7, 0]
    assert len(pipe.labels) == 10


def test_only_the_known_notice_is_silenced(folder, monkeypatch):
    """Notices are caught where diffusers logs them: its loggers do not propagate to pytest's handler."""
    seen = []

    class Catch(logging.Handler):
        def emit(self, record):
            seen.append(record.getMessage())

    diffusers_logging.set_verbosity_warning()  # the command line quietens diffusers for its process
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    catch = Catch()
    logger.addHandler(catch)
    try:
        DiTPipeline.from_pretrained(str(folder))
        assert any(message.startswith("Expected types for vae") for message in seen)
        seen.clear()
        filters = list(logger.filters)

        def noisy(*args, **kwargs):
            logger.warning("something else")
            return original(*args, **kwargs)

        original = DiTPipeline.from_pretrained
        monkeypatch.setattr(DiTPipeline, "from_pretrained", noisy)
        load_demo(folder=folder)
        assert seen == ["something else"]
        assert logger.filters == filters
    finally:
        logger.removeHandler(catch)


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(ModelLoadError, match=r"model_index\.json"):
        load_demo(folder=tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline", "vae": ["diffusers", "Nothing"]}')
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load_demo(folder=tmp_path)


def test_missing_demo_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.resources, "files", lambda package: tmp_path)
    with pytest.raises(ModelLoadError, match="missing from this installation"):
        demo_model_path()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    assert demo_model_path() == tmp_path / "model"
