"""The judge: its weights, its accuracy on digits nobody was trained on, and its errors."""

import json
from importlib import resources

import pytest
import torch

from difa_compile.demo.digits import load_split, render
from difa_compile.demo.judge import WEIGHTS_NAME, DigitJudge, load_judge, save_judge
from difa_compile.errors import ModelLoadError


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.fixture(scope="module")
def held_out():
    split = load_split(held_out=True)
    return render(split.digits, torch.Generator().manual_seed(123)), split.labels


def test_reads_held_out_digits(judge, held_out):
    images, labels = held_out
    with torch.no_grad():
        right = (judge(images).argmax(1) == labels).float().mean()
    assert right >= 0.985


def test_reads_slightly_spoiled_digits(judge, held_out):
    images, labels = held_out
    noisy = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right = (judge(noisy.clamp(-1, 1)).argmax(1) == labels).float().mean()
    assert right >= 0.97


def test_is_not_sure_of_an_empty_ground(judge):
    blank = render(torch.zeros(100, 1, 8, 8), torch.Generator().manual_seed(0))
    digits = render(load_split(True).digits[:100], torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert judge(blank).softmax(1).amax(1).mean() < judge(digits).softmax(1).amax(1).mean() - 0.1


def test_recorded_accuracy_is_the_one_it_has(judge):
    record = json.loads(resources.files("difa_compile.demo").joinpath("judge.json").read_text())
    split = load_split(held_out=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        right = sum((judge(render(split.digits, generator)).argmax(1) == split.labels).sum() for _ in range(10))
    # Another processor may round a borderline digit the other way.
    assert record["held_out_accuracy"] == pytest.approx(float(right) / (10 * len(split.labels)), abs=2e-3)
    assert record["held_out_digits"] == len(split.labels)


def test_loads_in_eval_mode_without_gradients(judge):
    assert not judge.training
    assert not any(parameter.requires_grad for parameter in judge.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in judge.parameters())


def test_features_feed_the_head(judge, held_out):
    images = held_out[0][:5]
    with torch.no_grad():
        features = judge.features(images)
        assert features.shape == (5, judge.num_features)
        torch.testing.assert_close(judge.head(features), judge(images))


def test_weights_are_small():
    assert len(resources.files("difa_compile.demo").joinpath(WEIGHTS_NAME).read_bytes()) < 1_000_000


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 16, 16), (1, 32, 32)])
def test_refuses_other_shapes(judge, shape):
    with pytest.raises(ValueError, match=r"\(N, 1, 32, 32\)"):
        judge(torch.zeros(shape))


def test_save_and_load(tmp_path, held_out):
    torch.manual_seed(0)
    fresh = DigitJudge().eval()
    save_judge(fresh, tmp_path / "judge.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["judge.safetensors"]
    again = load_judge(tmp_path / "judge.safetensors")
    images = held_out[0][:4]
    with torch.no_grad():
        # fp16 on disk: 11 bits in each of eight layers.
        torch.testing.assert_close(again(images), fresh(images), atol=8 * 2**-11, rtol=8 * 2**-11)


def test_load_names_what_is_wrong(tmp_path):
    with pytest.raises(ModelLoadError, match="cannot be read"):
        load_judge(tmp_path / "none.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"not safetensors")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        load_judge(damaged)
    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    with pytest.raises(ModelLoadError, match="does not hold a digit judge"):
        load_judge(other)
