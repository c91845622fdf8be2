"""NATTEN's definition of a window, and where it is a rival; the kernels themselves where they are installed."""

import pytest
import torch

from benchmarks import natten_rival
from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops import reference

SIDE, RADIUS = 7, 2
TOKENS = torch.arange(SIDE * SIDE)
BOX = Window("box", RADIUS)


def seen():
    return natten_rival.sees(SIDE, RADIUS, TOKENS[:, None], TOKENS[None])


def test_every_window_has_the_same_size_and_holds_its_query():
    table = seen()
    assert table.sum(1).tolist() == [25] * SIDE**2
    assert table.diagonal().all()


def test_windows_are_boxes_but_at_the_borders():
    ours = reference.visible_pairs(Layout((SIDE, SIDE)), BOX, TOKENS[:, None], TOKENS[None])
    same = (ours == seen()).all(1).view(SIDE, SIDE)
    inner = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inner[RADIUS:-RADIUS, RADIUS:-RADIUS] = True
    assert torch.equal(same, inner)
    assert not (ours & ~seen()).any(), "a shifted window holds the one that is cut off"


def test_the_corner_looks_inwards():
    assert seen()[0].view(SIDE, SIDE).nonzero().amax(0).tolist() == [2 * RADIUS, 2 * RADIUS]


@pytest.mark.parametrize(
    ("version", "window", "side", "text", "dtype", "reason"),
    [
        ("0.17.5", BOX, 7, 0, torch.float32, None),
        ("0.21.7", BOX, 7, 0, torch.float32, "no kernels for CPUs"),
        ("0.17.5", Window("disc", 2), 7, 0, torch.float32, "boxes"),
        ("0.17.5", BOX, 7, 3, torch.float32, "beside the image"),
        ("0.17.5", BOX, 7, 0, torch.bfloat16, "float32"),
        ("0.17.5", BOX, 4, 0, torch.float32, "larger than the image"),
    ],
)
def test_it_says_what_it_does_not_compute(monkeypatch, version, window, side, text, dtype, reason):
    monkeypatch.setattr(natten_rival.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(natten_rival.metadata, "version", lambda name: version)
    found = natten_rival.why_not(window, side, text, dtype)
    assert found is None if reason is None else reason in found


@pytest.mark.skipif(
    natten_rival.why_not(BOX, SIDE, 0, torch.float32) is not None, reason="no NATTEN with CPU kernels is installed"
)
def test_its_kernels_compute_its_definition():
    q, k, v = (torch.randn(1, SIDE * SIDE, 2, 8).transpose(1, 2) for _ in range(3))
    found = natten_rival.implementation(BOX, SIDE, q, k, v)()
    wanted = reference.attention(q.double(), k.double(), v.double(), seen())
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
