"""Handwritten digits rendered as training images for the demo model and its judge.

The source is scikit-learn's ``load_digits`` (1797 real digits of 8 x 8 pixels, from the UCI optical recognition
data set). Each is drawn larger on a 32 x 32 canvas, shifted, scaled, rotated and sheared, over a background with a
random grating and gradient, so that an image has local texture (the grating, the stroke's edge) and global shape
(which digit it is, and that the grating continues across the canvas).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from difa_compile.errors import MissingDependencyError

IMAGE_SIZE = 32
NUM_CLASSES = 10
HELD_OUT = 0.2


@dataclass(frozen=True)
class DigitSplit:
    """Digits and labels of one split: ``digits`` (N, 1, 8, 8) float32 in [0, 1], ``labels`` (N,) int64."""

    digits: Tensor
    labels: Tensor


def load_split(held_out: bool, seed: int = 0) -> DigitSplit:
    """The training split (80 %) or the held-out split (20 %) of ``load_digits``.

    Raises :class:`MissingDependencyError` without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            'the handwritten digits come with scikit-learn, which is not installed; pip install "difa-compile[train]"'
        ) from error

    data = load_digits()
    digits = torch.tensor(data.images, dtype=torch.float32).div_(16).unsqueeze(1)
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cut = int(len(labels) * HELD_OUT)
    chosen = order[:cut] if held_out else order[cut:]
    return DigitSplit(digits[chosen], labels[chosen])


def render(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw digits (N, 1, 8, 8) in [0, 1] as images (N, 1, 32, 32) in [-1, 1], each with its own geometry and ground."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(digits), generator=generator) * (high - low) + low

    size = IMAGE_SIZE
    angle, shear = uniform(-0.2, 0.2), uniform(-0.12, 0.12)
    # affine_grid maps canvas coordinates to source coordinates, so a larger factor draws a smaller digit.
    scale_x, scale_y = uniform(1.1, 1.4), uniform(1.05, 1.3)
    cos, sin = angle.cos(), angle.sin()
    shift_x, shift_y = uniform(-0.16, 0.16), uniform(-0.12, 0.12)
    theta = torch.stack(
        [
            torch.stack([scale_x * cos, scale_x * (shear - sin), shift_x], -1),
            torch.stack([scale_y * sin, scale_y * cos, shift_y], -1),
        ],
        1,
    )
    sharp = F.interpolate(digits, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
    grid = F.affine_grid(theta, [len(digits), 1, size, size], align_corners=False)
    stroke = F.grid_sample(sharp, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    stroke = torch.sigmoid((stroke - 0.52) * 11)

    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    direction, phase = uniform(0, math.pi), uniform(0, 2 * math.pi)
    frequency, amplitude = uniform(1.5, 4.5), uniform(0.05, 0.22)
    along = direction.cos()[:, None, None] * x + direction.sin()[:, None, None] * y
    grating = (math.pi * frequency[:, None, None] * along + phase[:, None, None]).sin() * amplitude[:, None, None]
    tilt = uniform(-0.2, 0.2)[:, None, None] * x + uniform(-0.2, 0.2)[:, None, None] * y
    ground = (uniform(-0.75, -0.35)[:, None, None] + grating + tilt).unsqueeze(1)
    ink = uniform(0.7, 1.0)[:, None, None, None]
    return (ground * (1 - stroke) + ink * stroke).clamp(-1, 1)


def sample_batch(split: DigitSplit, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random batch: images (size, 1, 32, 32) in [-1, 1] and labels (size,)."""
    index = torch.randint(len(split.labels), (size,), generator=generator)
    return render(split.digits[index], generator), split.labels[index]
