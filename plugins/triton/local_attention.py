"""Local attention through the Triton kernel: visits only key patches that a window touches.

It has not run on a GPU yet: numerics are tested in Triton's interpreter, code generation ahead of time.
"""

from __future__ import annotations

import importlib.util
import math
import os
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from difa_compile.decision import Window
from difa_compile.errors import LayoutError
from difa_compile.layout import Layout
from difa_compile.ops.kernels import LocalCall, LocalKernel
from difa_compile.ops.operands import check_kinds, check_sizes
from difa_compile.plugins.geometry import Geometry
from difa_compile.plugins.triton import configs
from difa_compile.plugins.triton.configs import Config, Form
from difa_compile.plugins.triton.tiling import Tiling, choose

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)
MAX_DISC = 2000
"""Largest reach whose squared distances are whole numbers of float32, tiles and three axes counted in."""
Shape = tuple[int, int, int, int]
WIDE_FROM = 2**31
"""Offsets inside a patch of keys from which they are computed in 64 bits; all others always are."""
MAX_TOKENS = 2**24
"""Offsets along a band are float32 too."""


def why_not(call: LocalCall) -> str | None:
    if call.device.type != "cuda" or torch.version.hip:
        return f"serves CUDA devices, not {'AMD' if call.device.type == 'cuda' else call.device.type}"
    return _unserved(call) or _missing(call.device) or _unasked()


def _unserved(call: LocalCall) -> str | None:
    """What of the call itself the kernel has no code for."""
    if call.dtype not in DTYPES:
        return f"dtype {call.dtype} is not float16, bfloat16 or float32"
    if max(call.shape[-1], call.value_dim) > MAX_HEAD_DIM:
        return f"head dimension {max(call.shape[-1], call.value_dim)} is over {MAX_HEAD_DIM}"
    if call.scale is not None and call.scale <= 0:
        return f"scale {call.scale} is not positive"
    if call.layout.image_tokens >= MAX_TOKENS:
        return f"{call.layout.image_tokens} image tokens: masks are exact below {MAX_TOKENS}"
    geometry = Geometry.of(call.layout, call.window)
    if geometry.disc and geometry.reach > MAX_DISC:
        return f"a disc of radius {geometry.radius}: masks are exact up to {MAX_DISC}"
    return None


def _missing(device: torch.device) -> str | None:
    """What the machine lacks."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}, at least 8.0 is needed"
    return None


def _unasked() -> str | None:
    """The kernel has not run on a GPU yet, so it serves those only who ask for it."""
    if os.environ.get("DIFA_TRITON") != "1":
        return "not measured on a GPU yet; set DIFA_TRITON=1 to use it"
    return None


def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: LocalCall) -> Tensor:
    return attend(query, key, value, call.layout, call.window, call.scale, mask)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    window: Window,
    scale: float | None = None,
    mask: Tensor | None = None,
    *,
    config: Config | None = None,
) -> Tensor:
    """Local attention, specified by :func:`difa_compile.ops.reference.local_attention`.

    Args:
        query: (B, H, L, D), L = ``layout.tokens``, or fewer, those of ``layout.rows``: the image's, with or without the
            tokens after it.
        key, value: (B, G, S, D) and (B, G, S, DV), H a multiple of G: consecutive heads share keys. Keys beyond
            ``layout.tokens`` are pooled ones: every image query sees them, no other query does.
        mask: the model's own, on top of the window; broadcasts to (B, H, L, S): bool, True = visible, or a number added
            to each score, of any dtype and strides. A query that sees no key gives 0. It is read in place.
        config: instead of the table's.

    Operands have one dtype, float16, bfloat16 or float32, and any strides; one whose last axis is not contiguous is
    copied.

    Returns:
        (B, H, L, DV), laid out in memory as (B, L, H, DV).

    Raises:
        LayoutError: token counts do not go with the layout.
        OperandError: dtypes, devices, heads or the mask do not go together.
    """
    return _launch(query, key, value, layout, window, scale, mask, config, with_full=False, residual=False)[0]


def local_and_full(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    window: Window,
    scale: float | None = None,
    mask: Tensor | None = None,
    *,
    residual: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Local and full attention in one launch, as a full step needs them that leaves a residual for later window steps.

    Attention to the window comes first and is stored; attention to the rest of the image, merged into it, makes it full
    attention. So this takes no more registers than :func:`attend`, and little more time than full attention.

    Arguments as for :func:`attend`; a mask holds for both results; pooled keys have no part in full attention and are
    refused. ``residual``: the first
    result is ``full - local`` (:func:`difa_compile.ops.reference.residual`, of the rounded outputs).

    Returns:
        (local or residual, full), each (B, H, L, DV), laid out in memory as (B, L, H, DV).
    """
    if key.shape[2] != layout.tokens:
        layout.check(key.shape[2], "full attention beside local attention")
    local, full = _launch(query, key, value, layout, window, scale, mask, config, with_full=True, residual=residual)
    return local, full


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    window: Window,
    scale: float | None,
    mask: Tensor | None,
    chosen: Config | None,
    *,
    with_full: bool,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    from triton import knobs

    from difa_compile.plugins.triton.kernels import local_attention_kernel

    check_kinds(query, key, value, mask)
    check_sizes(query, key, value, mask, layout, max(0, key.shape[2] - layout.tokens), scale)
    reason = _unserved(call_of(query, key, value, layout, window, scale, mask))
    if reason is not None:
        raise LayoutError(f"the Triton kernel does not serve local attention {window} on {layout}: {reason}")
    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    batch, heads, tokens, _ = query.shape
    kind, mask_arguments = _mask_arguments(mask, (batch, heads, tokens, key.shape[2]))
    outputs = [
        query.new_empty((batch, tokens, heads, value.shape[-1])).transpose(1, 2) for _ in range(2 if with_full else 1)
    ]
    chosen = chosen or configs.config(
        architecture(query.device),
        query.dtype,
        padded(max(query.shape[-1], value.shape[-1])),
        Form.of(with_full, mask is not None),
    )
    geometry = Geometry.of(layout, window)
    tiling = choose(geometry, chosen.block_m, chosen.block_n)
    text = tokens - layout.image_tokens
    tiles = tiling.tiles(geometry) + math.ceil(text / chosen.block_m)
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        local_attention_kernel[(tiles * batch * heads,)](
            query,
            key,
            value,
            outputs[0],
            outputs[-1],
            mask_arguments[0],
            (query.shape[-1] ** -0.5 if scale is None else scale) * math.log2(math.e),
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *outputs[0].stride()[:3],
            *outputs[-1].stride()[:3],
            *mask_arguments[1:],
            batch,
            heads,
            heads // key.shape[1],
            *geometry.sizes,
            layout.before,
            layout.tokens - layout.image_tokens,
            key.shape[2] - layout.tokens,
            layout.before - layout.rows(tokens).start,
            text,
            geometry.radius,
            *tiling.rows(geometry),
            **kernel_constants(geometry, tiling, query.shape[-1], value.shape[-1]),
            DOT="emulated" if query.dtype is torch.bfloat16 and knobs.runtime.interpret else "ieee",
            ADD_MASK=chosen.add_mask,
            MASK=kind,
            MASK_ROWS=mask_arguments[3] != 0,
            WITH_FULL=with_full,
            RESIDUAL=residual,
            WIDE=tiling.span(geometry) * max(key.stride(2), value.stride(2)) >= WIDE_FROM,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
        )
    return outputs[0], outputs[-1]


def call_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    window: Window,
    scale: float | None,
    mask: Tensor | None,
) -> LocalCall:
    """What these operands ask for."""
    pooled, masked = key.shape[2] - layout.tokens, mask is not None
    shape = tuple(query.shape)
    return LocalCall(
        layout, window, scale, shape, query.dtype, query.device, masked, key.shape[1], value.shape[3], pooled
    )


def _mask_arguments(mask: Tensor | None, shape: Shape) -> tuple[str, tuple[Tensor | None, int, int, int, int]]:
    """The kind of a mask and its launch arguments: memory and strides, 0 along axes of ``shape`` that it broadcasts."""
    if mask is None:
        return "none", (None, 0, 0, 0, 0)
    seen = mask.expand(shape)
    kind = "bool" if mask.dtype == torch.bool else "added"
    if kind == "bool":
        seen = seen.view(torch.uint8)
    elif mask.dtype not in DTYPES:
        seen = mask.float().expand(shape)
    batch, heads, queries, keys = (stride if size > 1 else 0 for stride, size in zip(seen.stride(), shape, strict=True))
    return kind, (seen, batch, heads, queries, keys)


def padded(head_dim: int) -> int:
    """The head dimension inside the kernel: a power of two, at least 16 as tensor cores want it."""
    return max(16, 1 << (head_dim - 1).bit_length())


def architecture(device: torch.device) -> int:
    """Compute capability times ten; 90, which the interpreter takes for granted, where ``device`` is not CUDA's."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def kernel_constants(geometry: Geometry, tiling: Tiling, head_dim: int, value_dim: int) -> dict[str, Any]:
    """The compile-time arguments of the kernel that follow from the geometry, its tiling and the operands."""
    return {
        "D": head_dim,
        "DV": value_dim,
        "BLOCK_D": padded(head_dim),
        "BLOCK_DV": padded(value_dim),
        "RANK": geometry.rank,
        "DISC": geometry.disc,
        **{f"TILE_{axis}": side for axis, side in zip("TYX", tiling.tile, strict=True)},
        **{f"PATCH_{axis}": side for axis, side in zip("TYX", tiling.patch, strict=True)},
        "ROWS": 1 << (math.prod(tiling.rows(geometry)) - 1).bit_length() if geometry.disc else 1,
    }


@lru_cache(maxsize=1024)
def work(call: LocalCall) -> tuple[int, int]:
    """Pairs and keys of one head, as the tiles of the kernel have them."""
    form = Form.of(with_full=False, masked=call.masked)
    head_dim = padded(max(call.shape[-1], call.value_dim))
    chosen = configs.config(architecture(call.device), call.dtype, head_dim, form)
    return counted_work(call.layout, call.window, call.shape[2], call.pooled, chosen)


def counted_work(layout: Layout, window: Window, queries: int, pooled: int, config: Config) -> tuple[int, int]:
    """Per head, pairs of a query and a key in tiles that are multiplied, and keys that are read, again by each tile.

    ``queries``: as many as ``layout.rows`` takes. Tiles that reach over the grid's edge multiply what is not there, and
    do not read it. Counted exactly, tile by tile, but not the visits one by one.
    """
    geometry = Geometry.of(layout, window)
    tiling = choose(geometry, config.block_m, config.block_n)
    seen_by_all = layout.tokens - layout.image_tokens + pooled
    tiles, text_tiles = tiling.tiles(geometry), math.ceil((queries - layout.image_tokens) / config.block_m)
    patches, keys = tiling.visits(geometry)
    steps = patches + tiles * math.ceil(seen_by_all / config.block_n)
    steps += text_tiles * math.ceil(layout.tokens / config.block_n)
    keys += tiles * seen_by_all + text_tiles * layout.tokens
    return steps * config.block_m * config.block_n, keys


KERNEL = LocalKernel("Triton", why_not, run, work)
