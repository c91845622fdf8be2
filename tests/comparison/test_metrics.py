"""Metrics against values worked out by hand or by another road."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from difa_compile.comparison.metrics import frechet_distance, judge_agreement, judged_classes, judged_right, psnr, ssim


class BrightestPixel(nn.Module):
    """A judge of 1 x 2 x 2 images: the class is the index of the brightest pixel, the features are the pixels."""

    num_features = 4

    def features(self, images):
        return images.flatten(1)

    def forward(self, images):
        return self.features(images)


def pixels(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 1, 2, 2)


def test_psnr_of_a_constant_difference():
    first = torch.full((3, 1, 4, 4), 0.5)
    second = first + torch.tensor([0.1, 0.01, 0.0]).reshape(3, 1, 1, 1)
    result = psnr(first, second)
    torch.testing.assert_close(result[:2], torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)
    assert result[2] == torch.inf


def test_ssim_of_equal_and_of_constant_images():
    image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ssim(image, image), torch.ones(2))
    # For constant images only the luminance term is left: (2ab + c) / (a^2 + b^2 + c), c = 0.01^2.
    first, second = torch.full((1, 1, 16, 16), 0.4), torch.full((1, 1, 16, 16), 0.8)
    expected = (2 * 0.4 * 0.8 + 1e-4) / (0.4**2 + 0.8**2 + 1e-4)
    assert ssim(first, second).item() == pytest.approx(expected, abs=1e-3)
    assert ssim(first, second).shape == (1,)


def test_ssim_falls_with_noise():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 32, 32, generator=generator)
    noise = torch.randn(image.shape, generator=generator)
    little, much = ((image + scale * noise).clamp(0, 1) for scale in (0.02, 0.2))
    assert 1 > ssim(image, little).item() > ssim(image, much).item()


def test_frechet_distance_agrees_with_scipy():
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(400, 1, 2, 2, generator=generator)
    generated = torch.rand(300, 1, 2, 2, generator=generator) ** 2
    first, second = ((x * 2 - 1).flatten(1).double().numpy() for x in (real, generated))
    root = scipy.linalg.sqrtm(np.cov(first.T) @ np.cov(second.T)).real
    expected = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(np.cov(first.T) + np.cov(second.T) - 2 * root)
    # Uneven batches: statistics must add up over them.
    assert frechet_distance(real, generated, BrightestPixel(), batch=77) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_equal_sets_is_zero():
    images = torch.rand(50, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert 0 <= frechet_distance(images, images.flip(0), BrightestPixel()) < 1e-4


def test_frechet_distance_needs_two_images():
    images = torch.rand(4, 1, 2, 2)
    with pytest.raises(ValueError, match="two images"):
        frechet_distance(images, images[:1], BrightestPixel())


def test_frechet_distance_needs_no_inception(monkeypatch):
    import torchmetrics.image.fid as fid

    monkeypatch.setattr(fid, "_TORCH_FIDELITY_AVAILABLE", False)
    images = torch.rand(8, 1, 2, 2)
    assert frechet_distance(images, images, BrightestPixel()) < 1e-4


def test_judged_shares():
    images = pixels([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1])
    other = pixels([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1])
    judge = BrightestPixel()
    assert judged_classes(images, judge, batch=3).tolist() == [0, 1, 2, 3]
    assert judged_right(images, torch.tensor([0, 1, 2, 0]), judge) == 0.75
    assert judge_agreement(images, other, judge) == 0.75


def test_judge_sees_images_from_minus_one_to_one():
    class Range(BrightestPixel):
        def forward(self, images):
            self.seen = images.min().item(), images.max().item()
            return super().forward(images)

    judge = Range()
    judged_classes(pixels([0, 0.5, 0.5, 1]), judge)
    assert judge.seen == (-1, 1)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_pairs_must_match_and_lie_in_unit_range(metric):
    image = torch.rand(2, 1, 16, 16)
    with pytest.raises(ValueError, match="in pairs"):
        metric(image, image[:1])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        metric(image, image + 1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        metric(image, image * torch.nan)
    with pytest.raises(ValueError, match="non-empty"):
        metric(image[:0], image[:0])


def test_small_images_and_missing_labels_are_named():
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="one label per image"):
        judged_right(pixels([1, 0, 0, 0]), torch.tensor([0, 1]), BrightestPixel())


def test_missing_torchmetrics_names_the_extra(monkeypatch):
    import sys

    from difa_compile.errors import MissingDependencyError

    for name in ("torchmetrics.functional.image", "torchmetrics.image.fid"):
        monkeypatch.setitem(sys.modules, name, None)
    images = torch.rand(2, 1, 16, 16)
    for call in (
        lambda: psnr(images, images),
        lambda: ssim(images, images),
        lambda: frechet_distance(images, images, BrightestPixel()),
    ):
        with pytest.raises(MissingDependencyError, match=r"difa-compile\[report\]"):
            call()
