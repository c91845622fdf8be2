"""Tiles and patches of the Triton kernel: their sizes, and which patches a tile visits."""

from __future__ import annotations

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.plugins.geometry import Geometry
from difa_compile.plugins.triton.tiling import choose

grids = st.one_of(
    st.tuples(st.integers(1, 200)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
)


windows = st.builds(Window, st.sampled_from(["band", "disc", "box"]), st.integers(1, 30))


@given(grids, windows, st.sampled_from([(16, 16), (64, 32), (128, 64)]))
@settings(max_examples=100)
def test_tilings_have_the_block_sizes_asked_for_and_keep_to_axes_in_use(grid, window, blocks):
    geometry = Geometry.of(Layout(grid), window)
    tiling = choose(geometry, *blocks)
    assert (math.prod(tiling.tile), math.prod(tiling.patch)) == blocks
    for side, size in zip(tiling.tile + tiling.patch, geometry.sizes * 2, strict=True):
        assert side & (side - 1) == 0
        assert side == 1 or size > 1 or geometry.rank == 1
    # No tile spans more rows of patches than the kernel is told.
    slabs, rows = tiling.rows(geometry)
    for axis, bound in ((0, slabs), (1, rows)):
        size, tile, patch = geometry.sizes[axis], tiling.tile[axis], tiling.patch[axis]
        for corner in range(0, size, tile):
            first = max(corner - geometry.reach, 0)
            end = min(min(corner + tile, size) - 1 + geometry.reach + 1, size)
            assert math.ceil((end - first) / patch) <= bound


@given(grids, windows, st.sampled_from([(16, 16), (64, 32), (128, 64)]))
@settings(max_examples=100)
def test_visits_are_those_of_a_walk_over_all_tiles(grid, window, blocks):
    """Key by key: a tile reads a row of a row of patches as far as the nearest key of these patches lets it see."""
    geometry = Geometry.of(Layout(grid), window)
    tiling = choose(geometry, *blocks)

    def walk(corners, axis, budget):
        if axis == 3:
            return 1, 1
        size, reach = geometry.sizes[axis], math.isqrt(budget) if geometry.disc else geometry.radius
        queries = range(corners[axis], min(corners[axis] + tiling.tile[axis], size))
        near = [key for key in range(size) if any(abs(key - query) <= reach for query in queries)]
        patches = keys = 0
        for place in range(0, len(near), tiling.patch[axis]):
            patch = near[place : place + tiling.patch[axis]]
            nearest = min(abs(key - query) for key in (patch[0], patch[-1]) for query in queries)
            nearest = 0 if set(patch) & set(queries) else nearest
            more, read = walk(corners, axis + 1, budget - nearest**2)
            patches, keys = patches + more, keys + len(patch) * read
        return patches, keys

    tiles = itertools.product(*(range(0, size, tile) for size, tile in zip(geometry.sizes, tiling.tile, strict=True)))
    walked = [walk(corners, 0, geometry.radius**2 - 1) for corners in tiles]
    assert tiling.visits(geometry) == tuple(map(sum, zip(*walked, strict=True)))


def test_flux_tiles_are_square_patches_and_bands_are_runs():
    square = choose(Geometry.of(Layout((64, 64), 512), Window("disc", 8)), 128, 64)
    assert (square.tile, square.patch) == ((1, 8, 16), (1, 8, 8))
    run = choose(Geometry.of(Layout((64, 64), 512), Window("band", 512)), 128, 64)
    assert (run.tile, run.patch) == ((1, 1, 128), (1, 1, 64))
