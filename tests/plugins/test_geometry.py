"""Windows in the terms of kernels: the same neighbourhoods, whatever axes were merged or left out."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops import reference
from difa_compile.plugins.geometry import Geometry

grids = st.one_of(
    st.tuples(st.integers(1, 200)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
)


windows = st.builds(Window, st.sampled_from(["band", "disc", "box"]), st.integers(1, 30))


@given(grids, windows)
@settings(max_examples=200)
def test_geometry_keeps_the_window(grid, window):
    """The kernel's terms describe the same neighbourhoods, whatever axes were merged or left out."""
    layout = Layout(grid)
    geometry = Geometry.of(layout, window)
    assert math.prod(geometry.sizes) == layout.image_tokens
    assert all(size == 1 for size in geometry.sizes[: 3 - geometry.rank])
    flat = torch.arange(layout.image_tokens)
    squared, most, rest = 0, 0, flat
    for size in reversed(geometry.sizes):
        distance = (rest % size)[:, None] - (rest % size)[None, :]
        squared, most = squared + distance**2, torch.maximum(torch.as_tensor(most), distance.abs())
        rest = rest // size
    near = squared < geometry.radius**2 if geometry.disc else most <= geometry.radius
    assert torch.equal(near, reference.visible(layout, window))
