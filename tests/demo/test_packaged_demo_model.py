"""examples/package_demo_model.py: what it changes, and what it refuses."""

import json

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file

from examples.package_demo_model import package


@pytest.fixture
def trained(tmp_path):
    """Saves a pipeline of the demo model's kind in a dtype; returns its folder."""

    def save(dtype):
        transformer = DiTTransformer2DModel(
            num_attention_heads=1, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1, sample_size=8
        )
        channels = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (2,))
        blocks = dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1,))
        vae = AutoencoderTiny(in_channels=1, out_channels=1, latent_channels=1, **channels, **blocks)
        folder = tmp_path / "pipeline"
        DiTPipeline(transformer, vae, DDIMScheduler()).to(dtype).save_pretrained(folder)
        return folder

    return save


def test_adds_labels_and_keeps_the_weights(trained, tmp_path):
    source = trained(torch.float16)
    (source / "leftover.txt").write_text("not part of a pipeline")
    size = package(source, tmp_path / "model")
    assert DiTPipeline.from_pretrained(str(tmp_path / "model")).labels == {str(digit): digit for digit in range(10)}
    name = "transformer/diffusion_pytorch_model.safetensors"
    before, after = load_file(source / name), load_file(tmp_path / "model" / name)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not (tmp_path / "model" / "leftover.txt").exists()
    assert size == sum(path.stat().st_size for path in (tmp_path / "model").rglob("*") if path.is_file())
    for config in (tmp_path / "model").rglob("*.json"):
        assert "_name_or_path" not in json.loads(config.read_text())


def test_a_bad_checkpoint_leaves_the_old_one(trained, tmp_path):
    package(trained(torch.float16), tmp_path / "model")
    before = (tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="fp16"):
        package(trained(torch.float32), tmp_path / "model")
    assert (tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == before
