"""How far two sets of images are apart, and whether they show what was asked.

PSNR and SSIM compare image with image (full against planned, same seeds); the Frechet distance compares
distributions; a judge (a classifier of the domain) says whether an image still shows the class that was asked for.
torchmetrics does the arithmetic and is imported when a function is called.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from difa_compile.errors import MissingDependencyError


class Judge(Protocol):
    """A classifier on the CPU of images (N, C, H, W) in [-1, 1], as :class:`difa_compile.demo.judge.DigitJudge`."""

    num_features: int

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (N, classes)."""

    def features(self, images: Tensor) -> Tensor:
        """Features (N, num_features)."""


def _missing(error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f"image metrics need torchmetrics and it cannot be imported ({error}); install difa-compile[report]"
    )


def _check_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both batches in float32 on the CPU; ``ValueError`` unless they are pairs of non-empty images in [0, 1]."""
    if first.shape != second.shape:
        raise ValueError(f"images cannot be compared in pairs: shapes {tuple(first.shape)} and {tuple(second.shape)}")
    return _check(first), _check(second)


def _check(images: Tensor) -> Tensor:
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"expected a non-empty batch of images (N, C, H, W), got shape {tuple(images.shape)}")
    images = images.detach().float().cpu()
    # `not (... and ...)` so that NaN is refused too.
    if not (images.min().item() >= 0 and images.max().item() <= 1):
        raise ValueError(f"images must lie in [0, 1], got {images.min().item():.3g} to {images.max().item():.3g}")
    return images


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of images, in dB for a peak of 1; higher is closer.

    ``first`` and ``second`` are (N, C, H, W) in [0, 1]; the result is (N,) float32, infinite where a pair is equal.
    """
    first, second = _check_pair(first, second)
    try:
        from torchmetrics.functional.image import peak_signal_noise_ratio
    except ImportError as error:
        raise _missing(error) from error
    result: Tensor = peak_signal_noise_ratio(first, second, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return result


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, Gaussian window of 11 pixels) of each pair of images; 1 is equal.

    ``first`` and ``second`` are (N, C, H, W) in [0, 1] with H and W of at least 11; the result is (N,) float32.
    """
    first, second = _check_pair(first, second)
    if min(first.shape[2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 x 11 pixels, got {tuple(first.shape[2:])}")
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise _missing(error) from error
    result = cast(Tensor, structural_similarity_index_measure(first, second, data_range=1.0, reduction="none"))
    return result.reshape(len(first))


class _Features(nn.Module):
    """The feature half of a judge, in the form torchmetrics asks for: images in [0, 1] to (N, num_features)."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.num_features = judge.num_features
        self.judge = judge

    def forward(self, images: Tensor) -> Tensor:
        return self.judge.features(images * 2 - 1)


@torch.no_grad()
def frechet_distance(real: Tensor, generated: Tensor, judge: Judge, batch: int = 256) -> float:
    """Frechet distance (Heusel et al., arXiv 1706.08500) between two sets of images in the judge's feature space.

    ``real`` (N, C, H, W) and ``generated`` (M, C, H, W) in [0, 1]; 0 is equal.
    The estimate is biased upwards for few images: give several times more than ``judge.num_features``, and the same
    number in distances that are to be compared. ``ValueError`` for fewer than two images in a set.
    """
    real, generated = _check(real), _check(generated)
    if min(len(real), len(generated)) < 2:
        raise ValueError(f"a Frechet distance needs two images in each set, got {len(real)} and {len(generated)}")
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise _missing(error) from error
    # With a module as extractor torchmetrics needs neither Inception weights nor torch-fidelity.
    metric = FrechetInceptionDistance(feature=_Features(judge), normalize=True)
    for images, is_real in ((real, True), (generated, False)):
        for part in images.split(batch):
            metric.update(part, real=is_real)
    # The distance is not negative; rounding of equal sets can be.
    return max(0.0, float(metric.compute()))


@torch.no_grad()
def judged_classes(images: Tensor, judge: Judge, batch: int = 256) -> Tensor:
    """Class (N,) int64 that the judge reads in each of the images (N, C, H, W) in [0, 1]."""
    return torch.cat([judge(part * 2 - 1).argmax(1) for part in _check(images).split(batch)])


def judged_right(images: Tensor, labels: Tensor, judge: Judge) -> float:
    """Share of images (N, C, H, W) in [0, 1] that the judge reads as the class asked for, ``labels`` (N,) int."""
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images but labels of shape {tuple(labels.shape)}; give one label per image")
    return float((judged_classes(images, judge) == labels.cpu()).float().mean())


def judge_agreement(first: Tensor, second: Tensor, judge: Judge) -> float:
    """Share of pairs of images (N, C, H, W) in [0, 1] in which the judge reads the same class."""
    first, second = _check_pair(first, second)
    return float((judged_classes(first, judge) == judged_classes(second, judge)).float().mean())
