"""Layouts: where image, text and register tokens stand in an attention sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass

from difa_compile.errors import LayoutError
from difa_compile.wording import shown

MAX_TOKENS = 2**31 - 1
"""Of one sequence: their pairs, and the squared distances on any grid of so many, are numbers of 64 bits."""


@dataclass(frozen=True)
class Layout:
    """Tokens of one attention sequence, in order: ``before`` other tokens, the image grid row-major, ``after`` others.

    ``grid`` is ``(H, W)`` for an image, ``(T, H, W)`` for a video, ``(L,)`` for audio. "Other" tokens are text,
    registers, time tokens: they see everything and are seen by everything.
    """

    grid: tuple[int, ...]
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(int(size) for size in self.grid))
        if not 1 <= len(self.grid) <= 3 or min(self.grid) < 1:
            raise LayoutError(
                f"grid {shown(self.grid)} must have one to three sizes of at least 1: (H, W) or (T, H, W)"
            )
        if self.before < 0 or self.after < 0:
            raise LayoutError(
                f"token counts before ({shown(self.before)}) and after ({shown(self.after)}) must not be negative"
            )
        if max(*self.grid, self.before, self.after, self.tokens) > MAX_TOKENS:
            raise LayoutError(
                f"grid {shown(self.grid)} with {shown(self.before)} tokens before and {shown(self.after)} after is "
                "over 2^31 - 1 tokens, the most that one sequence may have; give the sizes in tokens, not in pixels"
            )

    @property
    def image_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        return self.before + self.image_tokens + self.after

    def holds(self, queries: int) -> bool:
        """Whether ``queries`` may attend in this layout: as many as :meth:`rows` finds the place of."""
        return queries in (self.tokens, self.image_tokens, self.image_tokens + self.after)

    def rows(self, queries: int) -> slice:
        """Which tokens so many queries are: all, the image's alone, or the image's and those after it.

        The others are keys only: text that is not computed on, or a history of earlier frames. Raises
        :class:`LayoutError` for another number.
        """
        if not self.holds(queries):
            raise LayoutError(
                f"{queries} queries are neither all tokens of the layout {self} ({self.tokens}), nor the image's "
                f"({self.image_tokens}), nor these and the tokens after them ({self.image_tokens + self.after}); give "
                "the grid and the numbers of other tokens that add up to it"
            )
        start = 0 if queries == self.tokens else self.before
        return slice(start, start + queries)

    def check(self, tokens: int, where: str) -> None:
        """Raise :class:`LayoutError` unless this layout has ``tokens`` tokens; ``where`` names the site."""
        if self.tokens != tokens:
            raise LayoutError(
                f"{where}: the layout {self} has {self.tokens} tokens but the attention sequence has {tokens}; "
                "give the grid and the number of text tokens that add up to it"
            )

    def __str__(self) -> str:
        text = "x".join(map(str, self.grid))
        return (f"{self.before}+" if self.before else "") + text + (f"+{self.after}" if self.after else "")
