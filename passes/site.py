"""Sites: the attention calls of a graph and its blocks, the regions around them, and what is known about each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from torch import fx

from difa_compile.layout import Layout
from difa_compile.passes.graph import shape_of
from difa_compile.plan.data import SiteInfo


class SiteKind(StrEnum):
    """Where queries and keys come from."""

    SELF = "self"
    """One stream: queries, keys and values are projections of the same tokens."""
    JOINT = "joint"
    """Several streams in keys and values, all of them (MMDiT: image and text) or one in the queries."""
    CROSS = "cross"
    """Keys from elsewhere than the queries (text conditioning); left alone."""
    BLOCK = "block"
    """A whole block: norms, attention, MLP and gates."""


@dataclass(frozen=True)
class Region:
    """The nodes of a site: what reuse skips.

    ``interior`` holds every node from the q/k/v projections to ``outputs`` (after the output projection where it
    belongs to the attention module), closed under in-place writes. ``inputs`` are values from outside that it reads.
    Of a block, ``interior`` is all its nodes, ``attention`` the first attention inside, and
    ``streams`` has for each output the input that it is added to: what is cached is the difference. An attention's
    region has no streams: its outputs are cached as they are.
    """

    attention: fx.Node
    interior: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    streams: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Site:
    """One attention call of a graph.

    ``query_shape`` and ``key_shape`` are (batch, heads, tokens, head_dim). ``mask`` says whether the call carries an
    attention mask (``"none"``, ``"mask"``, ``"causal"``, or ``"function"``: FlexAttention's). ``width`` is the input
    width of the query projection.
    ``layout`` is that of the keys; queries are all of them or those of ``layout.rows``. It is None where the graph does
    not show it; ``layout_reason`` then says why.
    """

    path: str
    kind: SiteKind
    query_shape: tuple[int, int, int, int]
    key_shape: tuple[int, int, int, int]
    scale: float | None
    mask: str
    width: int
    layout: Layout | None
    layout_reason: str
    region: Region

    @property
    def tokens(self) -> int:
        return self.query_shape[2]

    @property
    def info(self) -> SiteInfo:
        """What a plan records about this site."""
        _, heads, tokens, head_dim = self.query_shape
        return SiteInfo(self.path, str(self.kind), heads, head_dim, tokens, self.width, self.layout)

    @property
    def cache_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of what may be cached: the residual of the attention, and what leaves the region."""
        return self.query_shape, *(shape_of(output) for output in self.region.outputs)

    @property
    def rewritable(self) -> bool:
        """Whether a plan can act on this site at all: self- and joint attention of the denoised stream."""
        return self.kind is not SiteKind.CROSS


@dataclass(frozen=True)
class Block:
    """A block of a graph that holds sites, or a span of blocks: all that it adds to its one or two streams.

    ``flops``: operations (two per multiply-add) of its linears, convolutions and attention for one element of the
    batch. ``blocks``: the paths of a span's blocks, in order; none for a single block.
    """

    path: str
    region: Region
    flops: int
    blocks: tuple[str, ...] = ()

    @property
    def kind(self) -> SiteKind:
        return SiteKind.BLOCK

    @property
    def tokens(self) -> int:
        """Tokens of all its streams together, of one element of the batch."""
        shapes = [shape_of(output) for output in self.region.outputs]
        return sum(math.prod(shape[1:-1]) for shape in shapes)

    @property
    def info(self) -> SiteInfo:
        """What a plan records about this block."""
        width = shape_of(self.region.outputs[0])[-1]
        return SiteInfo(self.path, str(self.kind), 1, width, self.tokens, width, None, self.flops, self.blocks)

    @property
    def cache_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of what may be cached, after one that stands where an attention has its residual's."""
        return (), *(shape_of(output) for output in self.region.outputs)


Unit = Site | Block
"""What a plan decides on: an attention call or a whole block."""
