"""Images for the page: data URIs, and the amplified difference of two images."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import torch
from torch import Tensor

from difa_compile.errors import MissingDependencyError

LARGEST = 512
"""Longest side of an embedded image in pixels; larger ones are scaled down for the page."""
SMALL = 128
"""Up to this longest side an image is shown with its pixels as squares."""
_FACTORS = (1, 2, 5, 10, 20, 50)


@dataclass(frozen=True)
class Panel:
    """One image: what stands under it, its text for those who can't see it, the data URI."""

    name: str
    alt: str
    uri: str


@dataclass(frozen=True)
class Picture:
    """The images of one seed next to each other, with a caption and the measure of their distance."""

    panels: tuple[Panel, ...]
    caption: str
    measure: str
    width: int
    height: int
    pixels: bool


def data_uri(image: Tensor) -> str:
    """Encode ``image`` (C, H, W), C 1 or 3, float in [0, 1] (values outside are cut off), as a PNG or JPEG data URI."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            f"images on the report page need Pillow and it cannot be imported ({error}); install difa-compile[report]"
        ) from error
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image is (1, H, W) or (3, H, W), not {tuple(image.shape)}")
    image = image.detach().float().cpu()
    small = max(image.shape[1:]) <= SMALL
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    size = (image.shape[2], image.shape[1])
    picture = Image.frombytes("L" if image.shape[0] == 1 else "RGB", size, bytes(pixels.flatten().tolist()))
    if max(size) > LARGEST:
        picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    if small:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=90)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def difference(full: Tensor, planned: Tensor, factor: int) -> Tensor:
    """``factor * |full - planned|`` of images in [0, 1] of equal shape, cut off at 1."""
    return ((full.float() - planned.float()).abs() * factor).clamp(0, 1)


def amplification(full: Tensor, planned: Tensor) -> int:
    """One factor for all pairs (N, C, H, W): the largest of 1, 2, 5, ... 50 that cuts off at most 1 % of the values."""
    distance = (full.float() - planned.float()).abs().flatten()
    rank = max(1, min(len(distance), round(0.99 * len(distance))))
    high = distance.kthvalue(rank).values.item()
    return max((factor for factor in _FACTORS if factor * high <= 1), default=1)
