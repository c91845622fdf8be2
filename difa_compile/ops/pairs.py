"""How many (query, key) pairs attend in a window: counted exactly from the geometry, without building a mask."""

from __future__ import annotations

import math
from functools import lru_cache

from difa_compile.decision import Window, WindowShape
from difa_compile.errors import LayoutError
from difa_compile.layout import Layout


def visible_pairs(layout: Layout | None, window: Window | None, tokens: int) -> int:
    """Number of (query, key) pairs that may attend: ``sum(mask)``. Exact, without building the mask.

    ``tokens`` queries: all of the layout's or those of ``layout.rows``. Without window they see every key. With one,
    text sees and is seen by everything and image tokens see the image tokens of their neighbourhood. Work grows with
    all sides of the grid but the longest, not with the number of pairs.
    Raises :class:`LayoutError` if a window meets no layout, or a layout of another number of tokens.
    """
    if window is None:
        return tokens * (tokens if layout is None else layout.tokens)
    if layout is None:
        raise LayoutError(f"the window {window} needs a token layout, but none is known; give the grid of the image")
    if not layout.holds(tokens):
        layout.check(tokens, f"window {window}")
    image = layout.image_tokens
    other = layout.tokens - image
    grid = tuple(sorted(size for size in layout.grid if size > 1)) or (1,)  # the order of the axes changes no count
    near = _image_pairs(grid, window.within(grid))
    return (tokens - image) * layout.tokens + image * other + near


@lru_cache(maxsize=1024)
def _image_pairs(grid: tuple[int, ...], window: Window) -> int:
    """Pairs of image tokens that see each other."""
    radius = window.radius
    if window.shape is WindowShape.BAND:
        return _axis_pairs(math.prod(grid), radius)
    if window.shape is WindowShape.DISC and radius * radius > sum((size - 1) ** 2 for size in grid):
        return math.prod(grid) ** 2
    if window.shape is WindowShape.BOX:
        return math.prod(_axis_pairs(size, radius) for size in grid)
    return _disc_pairs(tuple(sorted(grid)), radius * radius - 1)  # a disc is the same from all sides


def _axis_pairs(size: int, reach: int) -> int:
    """Pairs (i, j) in ``range(size)`` with ``|i - j| <= reach``: sum over offsets o of ``size - |o|``."""
    reach = min(reach, size - 1)
    return size * (2 * reach + 1) - reach * (reach + 1)


def _disc_pairs(grid: tuple[int, ...], budget: int) -> int:
    """Pairs of grid tokens whose squared offsets add up to at most ``budget`` (>= 0); the last axis in closed form."""
    reach = math.isqrt(budget)
    if len(grid) == 1:
        return _axis_pairs(grid[0], reach)
    size, rest = grid[0], grid[1:]
    pairs = size * _disc_pairs(rest, budget)
    for offset in range(1, min(reach, size - 1) + 1):
        pairs += 2 * (size - offset) * _disc_pairs(rest, budget - offset * offset)
    return pairs
