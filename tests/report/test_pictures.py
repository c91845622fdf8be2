"""Pictures of a page: shown exactly, and how far they are apart."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from difa_compile.report.pictures import amplification, data_uri, difference


def decode(uri):
    kind, data = uri.split(",", 1)
    assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_images_are_shown_exactly(page, comparison):
    uris = [attrs["src"] for attrs in page.all("img")]
    assert len(uris) == 3 * 20
    assert all(attrs["alt"] for attrs in page.all("img"))
    assert np.array_equal(np.array(decode(uris[3])), comparison.images_full[1, :, :, 0])
    assert np.array_equal(np.array(decode(uris[4])), comparison.images_planned[1, :, :, 0])
    shown = np.array(decode(uris[5])).astype(int)
    apart = abs(comparison.images_full[1, :, :, 0].astype(int) - comparison.images_planned[1, :, :, 0])
    factor = int(re.search(r"difference ×(\d+)", page.text)[1])
    assert np.abs(shown - np.minimum(255, apart * factor)).max() <= 1


def test_large_images_are_made_smaller():
    picture = decode(data_uri(torch.rand(3, 600, 900)))
    assert picture.size == (512, 341)
    assert picture.mode == "RGB"


def test_images_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"not \(2, 8, 8\)"):
        data_uri(torch.zeros(2, 8, 8))


@pytest.mark.parametrize(("largest", "factor"), [(0.0, 50), (0.019, 50), (0.09, 10), (0.3, 2), (0.9, 1)])
def test_amplification_does_not_clip(largest, factor):
    full = torch.zeros(2, 1, 16, 16)
    planned = full + torch.linspace(0, largest, 512).view_as(full)
    assert amplification(full, planned) == factor
    assert difference(full, planned, factor).max() == pytest.approx(largest * factor)
