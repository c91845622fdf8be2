"""Windows in the terms of kernels: whatever can be merged or left out of a grid is, whatever shape it was given as."""

from __future__ import annotations

import math
from dataclasses import dataclass

from difa_compile.decision import Window, WindowShape
from difa_compile.layout import Layout

Sizes = tuple[int, int, int]
"""Along (frames, height, width)."""


@dataclass(frozen=True)
class Geometry:
    """A window on a grid in the terms of kernels: three axes, of which the last ``rank`` are in use.

    A band is a box on a grid of one axis, and so is a disc there; a window that covers the whole grid is a band that
    covers it. Axes of one token are left out.
    """

    sizes: Sizes
    rank: int
    disc: bool
    radius: int

    @classmethod
    def of(cls, layout: Layout, window: Window) -> Geometry:
        """The geometry of ``window`` on the image of ``layout``."""
        window = window.within(layout.grid)
        grid = tuple(size for size in layout.grid if size > 1) or (1,)
        radius, disc = window.radius, window.shape is WindowShape.DISC
        if window.shape is WindowShape.BAND or _covers(grid, window):
            grid = (math.prod(grid),)
            radius, disc = (radius if window.shape is WindowShape.BAND else grid[0]), False
        if len(grid) == 1 and disc:
            radius, disc = radius - 1, False
        padded = (1, 1, *grid)[-3:]
        return cls((padded[0], padded[1], padded[2]), len(grid), disc, min(radius, max(grid)) if not disc else radius)

    @property
    def reach(self) -> int:
        """The largest offset along one axis."""
        return self.radius - 1 if self.disc else self.radius


def _covers(grid: tuple[int, ...], window: Window) -> bool:
    """Whether the two farthest tokens of the grid see each other."""
    if window.shape is WindowShape.DISC:
        return sum((size - 1) ** 2 for size in grid) < window.radius**2
    return window.shape is WindowShape.BOX and max(grid) - 1 <= window.radius
