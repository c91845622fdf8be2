"""``difa::local_attention`` in plain tensor operations, for runtimes that have no kernel of ours.

Two forms, both exact (:func:`difa_compile.ops.reference.local_attention`):

* *masked*: scores of all pairs, those outside of the window hidden. As much work as full attention.
* *tiled*: queries in tiles of neighbours on the grid, each with the patch of keys that its window touches. The patch is
  moved into the image at the borders, so all tiles have equally many keys and one gather finds them; what is in the
  patch and not in the window is hidden by one of a few masks. Other tokens are keys of every tile, and as queries see
  everything in an attention of their own.

:func:`form_for` chooses by the work that is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difa_compile.decision import Window, WindowShape
from difa_compile.layout import Layout
from difa_compile.ops.reference import visible_pairs

FEW_TOKENS = 255
"""Up to so many tokens all pairs are computed: fewer than 256 were not measured."""
WORTH = 0.6
"""Tiles are taken where they have at most this share of all pairs: in ONNX Runtime they take less time than a mask then
(``benchmarks/results/plain_attention.json``)."""
TILE = 8
"""Tokens along a side of a tile on a grid of two or three dimensions; a line has tiles of its square."""
_HIDDEN = -1e4
"""Added to the scores of hidden pairs: finite, so that no runtime makes a NaN of it, and within float16."""


@dataclass(frozen=True)
class Tiling:
    """``queries`` (tiles, q) and ``keys`` (tiles, k): numbers of image tokens, counted from the first image token.

    ``masks`` (m, q, k): which keys of a patch a query sees, and ``mask_of`` (tiles,) which of them is a tile's.
    ``place`` (image tokens,): where in the flattened ``queries`` a token stands first.
    """

    queries: Tensor
    keys: Tensor
    masks: Tensor
    mask_of: Tensor
    place: Tensor


def sizes(layout: Layout, window: Window) -> tuple[tuple[int, ...], list[int], list[int]]:
    """The grid that tiles lie on (a line for a band), the sides of a tile, and those of its patch of keys."""
    grid = (layout.image_tokens,) if window.shape is WindowShape.BAND else layout.grid
    side = TILE * TILE if len(grid) == 1 else TILE
    reach = _reach(layout, window)
    tiles = [min(side, size) for size in grid]
    return grid, tiles, [min(size, tile + 2 * reach) for size, tile in zip(grid, tiles, strict=True)]


def _reach(layout: Layout, window: Window) -> int:
    """How many tokens away along a side the farthest visible key is."""
    return window.within(layout.grid).radius - (1 if window.shape is WindowShape.DISC else 0)


def tiling(layout: Layout, window: Window) -> Tiling:
    """The tiles of a layout's image for a window."""
    grid, tiles, patches = sizes(layout, window)
    reach = _reach(layout, window)
    starts = [
        [min(first, size - tile) for first in range(0, size, tile)] for size, tile in zip(grid, tiles, strict=True)
    ]
    queries, keys = [], []
    masks: list[Tensor] = []
    number: dict[tuple[int, ...], int] = {}
    mask_of = []
    for corner in product(*starts):
        moved = tuple(
            min(max(0, first - reach), size - patch) for first, size, patch in zip(corner, grid, patches, strict=True)
        )
        queries.append(_box(grid, corner, tiles))
        keys.append(_box(grid, moved, patches))
        offset = tuple(first - start for first, start in zip(corner, moved, strict=True))  # all that a mask depends on
        if offset not in number:
            number[offset] = len(masks)
            masks.append(visible_pairs(Layout(layout.grid), window, queries[-1][:, None], keys[-1][None, :]))
        mask_of.append(number[offset])
    of_query = torch.stack(queries)
    flat = of_query.flatten()
    place = torch.full((layout.image_tokens,), flat.numel(), dtype=torch.int64)
    place.scatter_reduce_(0, flat, torch.arange(flat.numel()), "amin")
    return Tiling(of_query, torch.stack(keys), torch.stack(masks), torch.tensor(mask_of), place)


def _box(grid: tuple[int, ...], corner: tuple[int, ...] | list[int], sizes: list[int]) -> Tensor:
    """The numbers of the tokens in a box of a grid, row-major."""
    number = torch.zeros((), dtype=torch.int64)
    for size, first, count in zip(grid, corner, sizes, strict=True):
        number = number[..., None] * size + torch.arange(first, first + count)
    return number.flatten()


def form_for(layout: Layout, window: Window, queries: int, masked: bool, pooled: int) -> str:
    """``"tiled"`` or ``"masked"``. A mask of the model's own and pooled keys are for the masked form."""
    if masked or pooled or layout.tokens <= FEW_TOKENS:
        return "masked"
    grid, tiles, patches = sizes(layout, window)
    others = layout.tokens - layout.image_tokens
    count = math.prod(-(-size // tile) for size, tile in zip(grid, tiles, strict=True))
    pairs = count * math.prod(tiles) * (math.prod(patches) + others) + (queries - layout.image_tokens) * layout.tokens
    return "tiled" if pairs <= WORTH * queries * layout.tokens else "masked"


class PlainLocalAttention(nn.Module):
    """``difa::local_attention`` of one geometry. ``form``: ``"masked"``, ``"tiled"``, None for :func:`form_for`'s.

    ``forward(query, key, value, mask=None)``: shapes as the op has them; scores are computed in the operands' dtype.
    """

    def __init__(
        self,
        layout: Layout,
        window: Window,
        queries: int,
        scale: float | None = None,
        masked: bool = False,
        pooled: int = 0,
        form: str | None = None,
    ) -> None:
        super().__init__()
        self.layout, self.window, self.scale = layout, window, scale
        self.rows = layout.rows(queries)
        self.form = form or form_for(layout, window, queries, masked, pooled)
        if self.form == "tiled":
            if masked or pooled:
                raise ValueError("tiles know no masks and no pooled keys")
            found = tiling(layout, window)
            self.tiles, self.patch = found.keys.shape
            self.tile = found.queries.shape[1]
            others = layout.tokens - layout.image_tokens
            before = torch.arange(layout.before)
            after = torch.arange(layout.tokens - layout.after, layout.tokens)
            self.register_buffer("query_tokens", (found.queries + layout.before - self.rows.start).flatten())
            other = torch.cat([before, after]).expand(self.tiles, others)
            self.register_buffer("key_tokens", torch.cat([found.keys + layout.before, other], 1).flatten())
            seen = torch.cat([found.masks, torch.ones(*found.masks.shape[:2], others, dtype=torch.bool)], 2)
            self.register_buffer("masks", torch.zeros(seen.shape).masked_fill_(~seen, _HIDDEN))
            self.register_buffer("mask_of", found.mask_of)
            self.register_buffer("place", found.place)
        else:
            tokens = torch.arange(self.rows.start, self.rows.stop)
            seen = visible_pairs(layout, window, tokens[:, None], torch.arange(layout.tokens + pooled)[None, :])
            self.register_buffer("masks", seen)  # a byte a pair: there are tokens**2 of them

    masks: Tensor
    query_tokens: Tensor
    key_tokens: Tensor
    mask_of: Tensor
    place: Tensor

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, H, L, E)."""
        sharing = query.shape[1] // key.shape[1]
        if sharing > 1:
            key, value = key.repeat_interleave(sharing, 1), value.repeat_interleave(sharing, 1)
        if self.form == "tiled":
            return self._tiled(query, key, value)
        return self._masked(query, key, value, mask)

    def _masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        bias = self.masks
        if mask is not None and mask.dtype == torch.bool:
            bias = bias & mask
        elif mask is not None:
            bias = mask.to(query.dtype).masked_fill(~bias, -math.inf)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale)

    def _tiled(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads = query.shape[:2]
        own = query.index_select(2, self.query_tokens).reshape(-1, self.tiles, self.tile, query.shape[3])
        near, seen = (
            each.index_select(2, self.key_tokens).reshape(-1, self.tiles, each_keys, each.shape[3])
            for each, each_keys in ((key, self._keys), (value, self._keys))
        )
        bias = self.masks.to(query.dtype).index_select(0, self.mask_of)
        found = F.scaled_dot_product_attention(own, near, seen, attn_mask=bias[None], scale=self.scale)
        found = found.reshape(batch, heads, self.tiles * self.tile, value.shape[3]).index_select(2, self.place)
        first = self.layout.before - self.rows.start
        last = query.shape[2] - first - self.layout.image_tokens
        parts = [found]
        if first:
            before = query[:, :, :first]
            parts.insert(0, F.scaled_dot_product_attention(before, key, value, scale=self.scale))
        if last:
            after = query[:, :, query.shape[2] - last :]
            parts.append(F.scaled_dot_product_attention(after, key, value, scale=self.scale))
        return torch.cat(parts, 2) if len(parts) > 1 else found

    @property
    def _keys(self) -> int:
        """Keys of a tile, other tokens included."""
        return self.patch + self.layout.tokens - self.layout.image_tokens
