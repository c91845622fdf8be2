"""Decisions: what a plan says for one site at one step.

Definitions follow DiTFastAttn (arXiv 2406.08552) and CLEAR (arXiv 2412.16112):

============================ ==========================================================================
full                         the attention as the model computes it
window                       keys limited to a neighbourhood of the query; text sees and is seen by everything
window+residual              window attention plus ``full - window`` of the last full step (WA-RS)
reuse                        the region's output of an earlier step; nothing is computed (AST)
...+cfg                      the conditional half of the batch is computed and copied to the other (ASC)
============================ ==========================================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from difa_compile.errors import DecisionError
from difa_compile.wording import quoted

_WINDOW = r"([a-z]+):([0-9]+)"


class WindowShape(StrEnum):
    """Form of a neighbourhood. ``band`` is 1-D over the sequence of image tokens, the others live on the grid."""

    BAND = "band"
    """``|i - j| <= radius`` over the flattened image tokens (DiTFastAttn)."""
    DISC = "disc"
    """``dy^2 + dx^2 < radius^2``, strict; with time ``dt^2`` is added (CLEAR)."""
    BOX = "box"
    """``|dy| <= radius`` and ``|dx| <= radius``; with time also ``|dt| <= radius``."""


MAX_RADIUS = 2**63 - 1
"""Plans, graphs and kernels hold a radius in 64 bits."""


@dataclass(frozen=True, order=True)
class Window:
    """A neighbourhood of ``radius`` tokens (1 to 2^63 - 1) around each image token; one that covers the grid is full
    attention."""

    shape: WindowShape | str
    radius: int

    def __post_init__(self) -> None:
        whole = isinstance(self.radius, int) and not isinstance(self.radius, bool)
        if not whole or not 1 <= self.radius <= MAX_RADIUS:
            raise DecisionError(
                f"window radius is {quoted(self.radius)}; give a whole number of tokens, at least 1, at most 2^63 - 1 "
                "(one of the grid's size covers all)"
            )
        if not isinstance(self.shape, str) or self.shape not in list(WindowShape):
            raise DecisionError(f"window shape {quoted(self.shape)} is unknown; choose one of {', '.join(WindowShape)}")
        object.__setattr__(self, "shape", WindowShape(self.shape))

    def __str__(self) -> str:
        return f"{self.shape}:{self.radius}"

    def scaled(self, old: Sequence[int], new: Sequence[int]) -> Window:
        """The window that covers on grid ``new`` the share that this one covers on grid ``old``.

        A band's radius counts tokens and grows with their number; that of a disc or box grows with the mean side.
        """
        ratio = math.prod(new) / math.prod(old)
        factor = ratio if self.shape is WindowShape.BAND else ratio ** (1 / max(len(old), len(new)))
        return Window(self.shape, min(max(1, round(self.radius * factor)), MAX_RADIUS))

    def within(self, grid: Sequence[int]) -> Window:
        """The same window on ``grid`` with no larger radius than makes a difference there.

        What computes with a radius does so after this: its square then is at most that of the grid's diagonal.
        """
        if self.shape is WindowShape.BAND:
            covering = math.prod(grid) - 1
        elif self.shape is WindowShape.BOX:
            covering = max(grid) - 1
        else:
            covering = math.isqrt(sum((size - 1) ** 2 for size in grid)) + 1
        return self if self.radius <= covering else Window(self.shape, max(1, covering))

    @classmethod
    def parse(cls, text: str) -> Window:
        """Read ``"band:128"``; the inverse of ``str``. Raises :class:`DecisionError`."""
        match = re.fullmatch(_WINDOW, text)
        if not match:
            raise DecisionError(
                f"window {quoted(text)} is not of the form SHAPE:RADIUS, for instance band:128 or disc:8"
            )
        return cls(match[1], _radius(match[2]))


def _radius(digits: str) -> int:
    """The number, or one that is above every limit: Python refuses to read numbers of thousands of digits."""
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) <= len(str(MAX_RADIUS)) else MAX_RADIUS + 1


class Kind(StrEnum):
    """What is computed at a site."""

    FULL = "full"
    WINDOW = "window"
    WINDOW_RESIDUAL = "window+residual"
    REUSE = "reuse"

    @property
    def windowed(self) -> bool:
        """Whether it has a window."""
        return self in (Kind.WINDOW, Kind.WINDOW_RESIDUAL)

    @property
    def reads(self) -> str | None:
        """The cache of the site that it reads: its ``"output"``, its ``"residual"``, or none."""
        return _READS.get(self)

    def fills(self, cache: str | None) -> bool:
        """Whether a step of this kind has what goes into a cache: its ``"output"``, or its ``"residual"``."""
        return self is Kind.FULL if cache == "residual" else self is not Kind.REUSE


_READS = {Kind.WINDOW_RESIDUAL: "residual", Kind.REUSE: "output"}


@dataclass(frozen=True, order=True)
class Decision:
    """What one site does at one step.

    ``window`` is given for the two window kinds and for no other. ``cfg_shared``: only the conditional half of a
    classifier-free-guidance batch is computed; the other half receives a copy.
    """

    kind: Kind
    window: Window | None = None
    cfg_shared: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in list(Kind):
            raise DecisionError(f"decision kind {quoted(self.kind)} is unknown; choose one of {', '.join(Kind)}")
        object.__setattr__(self, "kind", Kind(self.kind))
        if self.kind.windowed and self.window is None:
            raise DecisionError(f"decision {self.kind} needs a window, for instance Window('band', 128)")
        if not self.kind.windowed and self.window is not None:
            raise DecisionError(f"decision {self.kind} takes no window, but {self.window} was given")

    def __str__(self) -> str:
        text = str(self.kind)
        if self.window is not None:
            text = text.replace("window", f"window({self.window})")
        return text + ("+cfg" if self.cfg_shared else "")

    @classmethod
    def parse(cls, text: str) -> Decision:
        """Read what ``str`` writes: ``"full"``, ``"window(band:128)+residual+cfg"``, ``"reuse"``."""
        return _parsed(text)

    @property
    def is_full(self) -> bool:
        """Whether every key is attended to in this step (full or full+cfg), so that a residual can be taken."""
        return self.kind is Kind.FULL


@lru_cache(maxsize=4096)  # a plan repeats a few decisions in all its cells
def _parsed(text: str) -> Decision:
    match = re.fullmatch(rf"(full|reuse|window\(({_WINDOW})\)(\+residual)?)(\+cfg)?", text)
    if not match:
        raise DecisionError(
            f"decision {quoted(text)} is not understood; write full, reuse, window(SHAPE:RADIUS) or "
            "window(SHAPE:RADIUS)+residual, each with +cfg if the CFG halves are shared"
        )
    _, window, shape, radius, residual, shared = match.groups()
    if window is None:
        return Decision(Kind(match[1]), None, bool(shared))
    kind = Kind.WINDOW_RESIDUAL if residual else Kind.WINDOW
    return Decision(kind, Window(shape, _radius(radius)), bool(shared))


FULL = Decision(Kind.FULL)
REUSE = Decision(Kind.REUSE)
