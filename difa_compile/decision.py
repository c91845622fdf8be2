"""Decisions: what a plan says for one site at one step.

Definitions follow DiTFastAttn (arXiv 2406.08552), CLEAR (arXiv 2412.16112) and TaylorSeer (arXiv 2503.06923):

============================ ==========================================================================
full                         the attention as the model computes it
window                       keys limited to a neighbourhood of the query; text sees and is seen by everything
window+residual              window attention plus ``full - window`` of the last full step (WA-RS)
reuse                        the region's output of an earlier step; nothing is computed (AST)
forecast:k                   the region's output, extrapolated from its last k + 1 computed ones; nothing is computed
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
_FORECAST = r"forecast:([0-9]{1,4})(\(([a-z]+)\))?(\+cfg)?"


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
    FORECAST = "forecast"

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
        return self is Kind.FULL if cache == "residual" else self.reads != "output"


_READS = {Kind.WINDOW_RESIDUAL: "residual", Kind.REUSE: "output", Kind.FORECAST: "output"}


class Basis(StrEnum):
    """In what coordinate of the steps a forecast extrapolates: outputs are taken for a polynomial in it."""

    PROGRESS = "progress"
    """Progress through the schedule, the normalised timestep: uneven steps count as far as they go."""
    STEP = "step"
    """The number of the step: all steps count alike (TaylorSeer, arXiv 2503.06923)."""


MAX_ORDER = 3
"""A forecast of order k keeps k + 1 outputs of a site; higher ones amplify what is noise in them."""


@dataclass(frozen=True, order=True)
class Decision:
    """What one site does at one step.

    ``window`` is given for the two window kinds and for no other. ``cfg_shared``: only the conditional half of a
    classifier-free-guidance batch is computed; the other half receives a copy. ``order`` (1 to 3) and ``basis`` are
    given for a forecast and for no other: the degree of the polynomial through the last ``order + 1`` computed outputs,
    and the coordinate that it is one in.
    """

    kind: Kind
    window: Window | None = None
    cfg_shared: bool = False
    order: int = 0
    basis: Basis | str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in list(Kind):
            raise DecisionError(f"decision kind {quoted(self.kind)} is unknown; choose one of {', '.join(Kind)}")
        object.__setattr__(self, "kind", Kind(self.kind))
        if self.kind.windowed and self.window is None:
            raise DecisionError(f"decision {self.kind} needs a window, for instance Window('band', 128)")
        if not self.kind.windowed and self.window is not None:
            raise DecisionError(f"decision {self.kind} takes no window, but {self.window} was given")
        if self.kind is Kind.FORECAST:
            if isinstance(self.order, bool) or not isinstance(self.order, int) or not 1 <= self.order <= MAX_ORDER:
                raise DecisionError(
                    f"the order of a forecast is {quoted(self.order)}; give a whole number from 1 (a line through the "
                    f"last two outputs) to {MAX_ORDER}, or use reuse"
                )
            basis = Basis.PROGRESS if self.basis is None else self.basis
            if not isinstance(basis, str) or basis not in list(Basis):
                raise DecisionError(f"the basis of a forecast is {quoted(basis)}; choose one of {', '.join(Basis)}")
            object.__setattr__(self, "basis", Basis(basis))
        elif self.order != 0 or self.basis is not None:
            raise DecisionError(f"decision {self.kind} takes no order and no basis; only a forecast has them")

    def __str__(self) -> str:
        text = str(self.kind)
        if self.kind is Kind.FORECAST:
            text += f":{self.order}" + ("" if self.basis is Basis.PROGRESS else f"({self.basis})")
        if self.window is not None:
            text = text.replace("window", f"window({self.window})")
        return text + ("+cfg" if self.cfg_shared else "")

    @classmethod
    def parse(cls, text: str) -> Decision:
        """Read what ``str`` writes: ``"full"``, ``"window(band:128)+residual+cfg"``, ``"reuse"``, ``"forecast:1"``."""
        return _parsed(text)

    @classmethod
    def example(cls, kind: Kind, cfg_shared: bool = False) -> Decision:
        """A decision of a kind, with the smallest window or the lowest order where it has one."""
        window = Window(WindowShape.BAND, 1) if kind.windowed else None
        return cls(kind, window, cfg_shared, 1 if kind is Kind.FORECAST else 0)

    @property
    def is_full(self) -> bool:
        """Whether every key is attended to in this step (full or full+cfg), so that a residual can be taken."""
        return self.kind is Kind.FULL


@lru_cache(maxsize=4096)  # a plan repeats a few decisions in all its cells
def _parsed(text: str) -> Decision:
    forecast = re.fullmatch(_FORECAST, text)
    if forecast:
        order, _, basis, shared = forecast.groups()
        return Decision(Kind.FORECAST, None, bool(shared), int(order), basis or Basis.PROGRESS)
    match = re.fullmatch(rf"(full|reuse|window\(({_WINDOW})\)(\+residual)?)(\+cfg)?", text)
    if not match:
        raise DecisionError(
            f"decision {quoted(text)} is not understood; write full, reuse, forecast:ORDER, window(SHAPE:RADIUS) or "
            "window(SHAPE:RADIUS)+residual, each with +cfg if the CFG halves are shared"
        )
    _, window, shape, radius, residual, shared = match.groups()
    if window is None:
        return Decision(Kind(match[1]), None, bool(shared))
    kind = Kind.WINDOW_RESIDUAL if residual else Kind.WINDOW
    return Decision(kind, Window(shape, _radius(radius)), bool(shared))


FULL = Decision(Kind.FULL)
REUSE = Decision(Kind.REUSE)
