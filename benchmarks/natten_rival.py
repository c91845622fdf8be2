"""NATTEN as a rival: neighbourhood attention on the CPU, where a version that has such kernels is installed.

Those are the releases before 0.20; the last is 0.17.5, a source distribution that compiles itself. NATTEN's window has
the same size everywhere: near a border it is shifted inwards, where a ``box`` is cut off. So it computes something else
there, and is compared with its own definition, :func:`sees`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from importlib import metadata
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from difa_compile.decision import Window, WindowShape

DEFINITION = "box, shifted at borders"


def why_not(window: Window, side: int, text: int, dtype: torch.dtype) -> str | None:
    """The reason why NATTEN does not compute this window over ``side`` x ``side`` tokens here, or None."""
    if importlib.util.find_spec("natten") is None:
        return "natten is not installed"
    version = metadata.version("natten")
    if tuple(int(part) for part in version.split(".")[:2]) >= (0, 20):
        return f"natten {version} has no kernels for CPUs"
    if window.shape is not WindowShape.BOX:
        return "its windows are boxes"
    if text:
        return "it takes no tokens beside the image's"
    if dtype != torch.float32:
        return "its CPU kernels take float32"
    if 2 * window.radius + 1 > side:
        return "the window is larger than the image"
    return None


def name() -> str:
    """How the installed version is called in rows."""
    return f"NATTEN {metadata.version('natten')}"


def sees(side: int, radius: int, query: Tensor, key: Tensor) -> Tensor:
    """Whether the key's token is in the query's window, as NATTEN defines it; int64 token numbers, broadcast.

    Along each axis ``2 * radius + 1`` places, begun at ``position - radius`` but kept within the image.
    """
    result = torch.ones(torch.broadcast_shapes(query.shape, key.shape), dtype=torch.bool)
    for q, k in ((query // side, key // side), (query % side, key % side)):
        start = (q - radius).clamp(0, side - 2 * radius - 1)
        result &= (k >= start) & (k <= start + 2 * radius)
    return result


def implementation(window: Window, side: int, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Attention of (1, H, side * side, D); what takes the grid apart is a view."""
    functional = _functional()
    size = 2 * window.radius + 1
    scale = q.shape[-1] ** -0.5
    query, key, value = (x.unflatten(2, (side, side)) for x in (q, k, v))

    def run() -> Tensor:
        scores = functional.na2d_qk(query * scale, key, kernel_size=size, dilation=1)
        out: Tensor = functional.na2d_av(scores.softmax(-1), value, kernel_size=size, dilation=1)
        return out.flatten(2, 3)

    return run


def _functional() -> Any:
    """NATTEN's functions. Imported with two things it expects of torch: a name that is gone from newer ones, and a CUDA
    device whose capability can be asked for."""
    with (
        mock.patch.object(torch.cuda, "_device_t", torch.types.Device, create=True),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(0, 0)),
    ):
        return importlib.import_module("natten.functional")
