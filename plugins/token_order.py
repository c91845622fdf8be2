"""Orders of the tokens in which every 128 in a row are a compact patch of the grid, for kernels that skip blocks.

A kernel that goes through blocks of consecutive tokens loses most of what a window saves while the tokens stand row by
row: a block is a few whole rows of the image, and sees a few rows more on each side. So the image is cut into strips
some rows high (tubes, some frames and rows thick, in a video), each strip goes column by column, and the next one goes
back the other way. Any 128 tokens in a row are then about as wide as they are high, for every size of the image. Other
tokens and pooled keys keep their places before and after the image's.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from difa_compile.decision import Window, WindowShape
from difa_compile.layout import Layout

BLOCK = 128
"""Tokens of a block, FlexAttention's default."""
_THICKNESSES = (4, 8, 16, 32)
"""Tokens in the cross-section of a strip that are tried."""
_WORTH_IT = 0.9
"""Tokens are put into another order for at most this share of the blocks that their own order takes."""
_FAR = 1 << 40
_CHUNK = 512
"""Blocks of queries that are compared with all blocks of keys at a time."""


@dataclass(frozen=True)
class Strips:
    """A way to cut the image into strips: ``frames`` and ``rows`` of the grid that go through a strip side by side."""

    frames: int
    rows: int

    def order(self, layout: Layout) -> Tensor:
        """All tokens of ``layout`` as they stand in this order: their places in the model's order, (tokens,) int64."""
        _, height, width = _sizes(layout)
        token = torch.arange(layout.image_tokens)
        x, y, t = token % width, token // width % height, token // (width * height)
        down, along = y // self.rows, t // self.frames
        strips = -(-height // self.rows)
        strip = along * strips + torch.where(along % 2 == 0, down, strips - 1 - down)
        column = torch.where(strip % 2 == 0, x, width - 1 - x)
        place = ((strip * width + column) * self.frames + t % self.frames) * self.rows + y % self.rows
        image = place.argsort() + layout.before
        before, after = torch.arange(layout.before), torch.arange(layout.before + layout.image_tokens, layout.tokens)
        return torch.cat([before, image, after])


@lru_cache(maxsize=1024)
def best(layout: Layout, window: Window, queries: int, pooled: int = 0) -> tuple[Strips | None, int]:
    """The order that takes the fewest blocks, None for the model's own, and how many pairs of blocks it takes.

    ``queries`` and ``pooled`` as in :class:`~difa_compile.ops.kernels.LocalCall`. The model's own order is kept unless
    another one takes clearly fewer.
    """
    window = window.within(layout.grid)
    own = visited_blocks(layout, window, None, queries, pooled)
    found = {strips: visited_blocks(layout, window, strips, queries, pooled) for strips in _candidates(layout, window)}
    if not found:
        return None, own
    strips = min(found, key=lambda one: (found[one], one.frames, one.rows))
    return (strips, found[strips]) if found[strips] <= _WORTH_IT * own else (None, own)


def visited_blocks(layout: Layout, window: Window, strips: Strips | None, queries: int, pooled: int = 0) -> int:
    """Pairs of a block of queries and a block of keys that may hold a visible pair.

    Judged by the boxes on the grid that the blocks' tokens span, so no fewer than those that do hold one.
    """
    window = window.within(layout.grid)
    keys = _Blocks.of(layout, window, strips, slice(0, layout.tokens), pooled)
    mine = _Blocks.of(layout, window, strips, layout.rows(queries), 0)
    count = 0
    for first in range(0, len(mine.image), _CHUNK):
        count += int(mine.part(slice(first, first + _CHUNK)).sees(keys, window).sum())
    return count


def _sizes(layout: Layout) -> tuple[int, int, int]:
    frames, height, width = (1, 1, *layout.grid)[-3:]
    return frames, height, width


def _candidates(layout: Layout, window: Window) -> list[Strips]:
    if window.shape is WindowShape.BAND or len(layout.grid) == 1:  # near in the sequence is near in the model's order
        return []
    frames, height, _ = _sizes(layout)
    sides = [1 << bit for bit in range(max(_THICKNESSES).bit_length())]
    return [
        Strips(thick, high)
        for thick, high in itertools.product(sides, sides)
        if thick * high in _THICKNESSES and thick < 2 * frames and high < 2 * height
    ]


@dataclass(frozen=True)
class _Blocks:
    """What is known of blocks of tokens: (blocks, axes) corners of the box that their image tokens span; what they hold
    (blocks,) bool: tokens of the image, other tokens, pooled keys."""

    low: Tensor
    high: Tensor
    image: Tensor
    other: Tensor
    pooled: Tensor

    @classmethod
    def of(cls, layout: Layout, window: Window, strips: Strips | None, tokens: slice, pooled: int) -> _Blocks:
        order = torch.arange(layout.tokens) if strips is None else strips.order(layout)
        token = torch.cat([order[tokens], torch.arange(layout.tokens, layout.tokens + pooled)])
        place = token - layout.before
        image = (place >= 0) & (place < layout.image_tokens)
        axes = []
        sizes = (layout.image_tokens,) if window.shape is WindowShape.BAND else layout.grid
        for size in reversed(sizes):
            axes.append(place % size)
            place = place // size
        where = torch.stack(axes, -1)
        low = _in_blocks(where.masked_fill(~image[:, None], _FAR), _FAR).amin(1)
        high = _in_blocks(where.masked_fill(~image[:, None], -_FAR), -_FAR).amax(1)
        kinds = (image, ~image & (token < layout.tokens), token >= layout.tokens)
        return cls(low, high, *(_in_blocks(kind, False).any(1) for kind in kinds))

    def part(self, blocks: slice) -> _Blocks:
        return _Blocks(*(x[blocks] for x in (self.low, self.high, self.image, self.other, self.pooled)))

    def sees(self, keys: _Blocks, window: Window) -> Tensor:
        """(blocks, blocks of keys) bool: a pair in them may be visible."""
        apart = torch.maximum(self.low[:, None] - keys.high, keys.low - self.high[:, None])
        gaps = apart.clamp(min=0, max=window.radius + 1)  # out of reach is far enough: no square overflows
        if window.shape is WindowShape.DISC:
            near = (gaps * gaps).sum(-1) < window.radius * window.radius
        else:
            near = (gaps <= window.radius).all(-1)
        near &= self.image[:, None] & keys.image
        texts = self.other[:, None] & (keys.image | keys.other)
        return near | texts | (self.image[:, None] & (keys.other | keys.pooled))


def _in_blocks(values: Tensor, fill: float) -> Tensor:
    """(tokens, ...) as (blocks, BLOCK, ...), the last block filled up."""
    rest = -len(values) % BLOCK
    filler = torch.full((rest, *values.shape[1:]), fill, dtype=values.dtype)
    return torch.cat([values, filler]).view(-1, BLOCK, *values.shape[1:])
