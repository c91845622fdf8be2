"""Which patch of the grid one program takes, and in which patches it visits keys."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch

from difa_compile.plugins.geometry import Geometry, Sizes


@dataclass(frozen=True)
class Tiling:
    """``tile``: the patch of queries of one program. ``patch``: the keys it takes at a time. Powers of two."""

    tile: Sizes
    patch: Sizes

    def rows(self, geometry: Geometry) -> tuple[int, int]:
        """The most slabs (along frames) and rows (along height) of patches that any tile visits."""
        slabs, rows = (
            math.ceil(min(size, tile + 2 * geometry.reach) / patch)
            for size, tile, patch in zip(geometry.sizes[:2], self.tile[:2], self.patch[:2], strict=True)
        )
        return slabs, rows

    def tiles(self, geometry: Geometry) -> int:
        """Programs that the grid takes per head."""
        return math.prod(math.ceil(size / side) for size, side in zip(geometry.sizes, self.tile, strict=True))

    def span(self, geometry: Geometry) -> int:
        """Tokens between the first and the last key of a patch, both counted."""
        _, height, width = geometry.sizes
        frames, rows, columns = (side - 1 for side in self.patch)
        return (frames * height + rows) * width + columns + 1

    def visits(self, geometry: Geometry) -> tuple[int, int]:
        """Patches of keys that all tiles of the grid visit for the window, and keys in them.

        Exact, tile by tile as the kernel goes, but tiles that lie alike to both borders of an axis are counted once.
        """
        if not geometry.disc:
            axes = [
                _along(_places(size, tile, geometry.reach), patch, geometry.reach)
                for size, tile, patch in zip(geometry.sizes, self.tile, self.patch, strict=True)
            ]
            return math.prod(patches for patches, _ in axes), math.prod(keys for _, keys in axes)
        axis = 3 - geometry.rank
        places = tuple(
            _places(size, tile, geometry.reach)
            for size, tile in zip(geometry.sizes[axis:], self.tile[axis:], strict=True)
        )
        return _disc_visits_of_all(geometry.radius**2 - 1, places, self.patch[axis:])


Place = tuple[int, int, int]
"""A tile's place along one axis: tokens before it, tokens of it, tokens after it, those beyond any reach left out."""


@lru_cache(maxsize=1024)
def _places(size: int, tile: int, reach: int) -> tuple[tuple[Place, int], ...]:
    """The places of the tiles along one axis, each with the number of tiles it is that of."""
    found = Counter(
        (min(corner, reach), min(tile, size - corner), min(max(size - corner - tile, 0), reach))
        for corner in range(0, size, tile)
    )
    return tuple(found.items())


@lru_cache(maxsize=4096)
def _along(places: tuple[tuple[Place, int], ...], patch: int, reach: int) -> tuple[int, int]:
    """Patches and keys within ``reach`` of the tiles along one axis, summed over them."""
    spans = [(min(before, reach) + tile + min(after, reach), count) for (before, tile, after), count in places]
    return sum(-(-span // patch) * count for span, count in spans), sum(span * count for span, count in spans)


@lru_cache(maxsize=4096)
def _disc_visits_of_all(
    budget: int, places: tuple[tuple[tuple[Place, int], ...], ...], patch: tuple[int, ...]
) -> tuple[int, int]:
    """Patches and keys within a squared distance of at most ``budget`` (>= 0) of tiles at ``places``, one per axis."""
    reach = math.isqrt(budget)
    if len(places) == 1:
        return _along(places[0], patch[0], reach)
    patches = keys = 0
    for (before, tile, after), count in places[0]:
        end = tile + min(after, reach)
        for first in range(-min(before, reach), end, patch[0]):
            beyond = min(first + patch[0], end)
            gap = max(1 - beyond, first - tile + 1, 0)
            inner, inside = _disc_visits_of_all(budget - gap * gap, places[1:], patch[1:])
            patches += count * inner
            keys += count * (beyond - first) * inside
    return patches, keys


@lru_cache(maxsize=1024)
def choose(geometry: Geometry, block_m: int, block_n: int) -> Tiling:
    """The tiling that visits the fewest patches; among equals the squarest, then the one that reads the longest rows.

    ``block_m`` queries and ``block_n`` keys, powers of two. Visits are exact for a box; for a disc they are those of
    its box times the share that an interior tile of the disc has of them.
    """
    visits = {
        Tiling(tile, patch): math.prod(
            _visits(size, part, step, geometry.reach)
            for size, part, step in zip(geometry.sizes, tile, patch, strict=True)
        )
        for tile, patch in itertools.product(_shapes(block_m, geometry.rank), _shapes(block_n, geometry.rank))
    }
    fewest = min(visits.values())
    axis = 3 - geometry.rank

    def cost(tiling: Tiling) -> tuple[float, int, int]:
        share = _disc_share(geometry.radius, tiling.tile[axis:], tiling.patch[axis:]) if geometry.disc else 1.0
        spread = sum(max(sides[axis:]) - min(sides[axis:]) for sides in (tiling.tile, tiling.patch))
        return visits[tiling] * share, spread, -tiling.tile[2] - tiling.patch[2]

    # A disc leaves out a fifth of its box in two dimensions, and half in three.
    return min((tiling for tiling, count in visits.items() if count <= 1.5 * fewest), key=cost)


def _shapes(count: int, rank: int) -> list[Sizes]:
    """All shapes of ``count`` tokens (a power of two) with powers of two as sides, over the last ``rank`` axes."""
    powers = [1 << bit for bit in range(count.bit_length())]
    sides = [powers if axis >= 3 - rank else [1] for axis in range(3)]
    return [(t, y, x) for t, y, x in itertools.product(*sides) if t * y * x == count]


@lru_cache(maxsize=4096)
def _visits(size: int, tile: int, patch: int, reach: int) -> int:
    """Patches visited along one axis, summed over the tiles of that axis."""
    corner = torch.arange(0, size, tile)
    spans = (corner + tile + reach).clamp(max=size) - (corner - reach).clamp(min=0)
    return int(((spans + patch - 1) // patch).sum())


def _disc_share(radius: int, tile: tuple[int, ...], patch: tuple[int, ...]) -> float:
    """Patches that a tile far from any edge visits for a disc, over those it would visit for the disc's box."""
    box = math.prod(math.ceil((side + 2 * (radius - 1)) / step) for side, step in zip(tile, patch, strict=True))
    return _disc_visits(radius * radius - 1, tile, patch) / box


@lru_cache(maxsize=1 << 16)
def _disc_visits(budget: int, tile: tuple[int, ...], patch: tuple[int, ...]) -> int:
    """Patches within a squared distance of at most ``budget`` (>= 0) of a tile, row by row as the kernel goes."""
    reach = math.isqrt(budget)
    end = tile[0] + reach
    if len(tile) == 1:
        return math.ceil((end + reach) / patch[0])
    total = 0
    for first in range(-reach, end, patch[0]):
        gap = max(1 - min(first + patch[0], end), first - tile[0] + 1, 0)
        total += _disc_visits(budget - gap * gap, tile[1:], patch[1:])
    return total
