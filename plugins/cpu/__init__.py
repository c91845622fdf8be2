"""Local attention on the CPU in C++: only the keys near a tile of queries are touched (``local_attention.h``).

Serves float32, bfloat16 and float16 in any layout, window, mask and stride. It is compiled when first needed
(:mod:`difa_compile.plugins.cpu.build`), for the machine it runs on.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from difa_compile.decision import WindowShape
from difa_compile.ops.kernels import LocalCall, LocalKernel
from difa_compile.ops.reference import default_scale
from difa_compile.plugins.cpu.build import why_not_built
from difa_compile.plugins.geometry import Geometry

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The bounds of local_attention.h, which are checked there.
MAX_HEAD_DIM = 1024
MAX_PLACE = 2**24
"""Places on the grid are counted in float32 inside the kernel, which is exact up to here."""
MAX_RADIUS = 4096
"""A disc's squared radius is counted in float32 inside the kernel, too, unless the disc covers the grid."""
MAX_OTHERS = 2**30
"""Other tokens on either side of the image, and pooled keys."""
MAX_SCALE = 1e38


def why_not(call: LocalCall) -> str | None:
    if call.device.type != "cpu":
        return "runs on the CPU"
    if call.dtype not in DTYPES:
        return f"not for {call.dtype}"
    if not 1 <= call.shape[-1] <= MAX_HEAD_DIM or call.value_dim > MAX_HEAD_DIM:
        return f"head dimension {max(call.shape[-1], call.value_dim)} is not 1 to {MAX_HEAD_DIM}"
    if call.layout.image_tokens > MAX_PLACE:
        return f"{call.layout.image_tokens} image tokens are over {MAX_PLACE}"
    if max(call.layout.before, call.layout.after, call.pooled) > MAX_OTHERS:
        return f"{max(call.layout.before, call.layout.after, call.pooled)} other tokens are over {MAX_OTHERS}"
    geometry = Geometry.of(call.layout, call.window)
    if geometry.disc and geometry.radius > MAX_RADIUS:
        return f"a disc of radius {geometry.radius} is over {MAX_RADIUS}"
    if call.scale is not None and abs(call.scale) > MAX_SCALE:
        return f"scale {call.scale} is over {MAX_SCALE}"
    return why_not_built()


def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: LocalCall, tile: int = 0) -> Tensor:
    """``tile``: queries that are worked on together, 16, 32 or 64; 0 lets the kernel choose."""
    layout, window = call.layout, call.window
    scale = default_scale(call.shape[-1]) if call.scale is None else call.scale
    if mask is not None and mask.dtype not in (torch.bool, *DTYPES):
        mask = mask.float()
    disc = window.shape is WindowShape.DISC
    out: Tensor = torch.ops.difa.local_attention_cpu(
        query, key, value, grid(call), layout.before, layout.after, call.pooled, disc, window.radius, scale, mask, tile
    )
    return out


def grid(call: LocalCall) -> list[int]:
    """The grid as the kernel sees it: a band, on the sequence of image tokens, is a box on a grid of one dimension."""
    banded = call.window.shape is WindowShape.BAND
    return [call.layout.image_tokens] if banded else list(call.layout.grid)


@lru_cache(maxsize=1024)
def work(call: LocalCall) -> tuple[int, int]:
    """Pairs and keys of one head, as the tiles of the kernel have them."""
    layout, window = call.layout, call.window
    disc = window.shape is WindowShape.DISC
    tile, _, keys = torch.ops.difa.local_attention_cpu_work(
        grid(call), layout.before, layout.after, call.pooled, call.shape[2], disc, window.radius, call.dtype
    )
    return tile * keys, keys


KERNEL = LocalKernel("CPU", why_not, run, work)
