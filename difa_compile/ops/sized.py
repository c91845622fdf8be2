"""``difa::sized``: a value of a size that only its values determine, held to the size it had in the capture."""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("difa", "FRAGMENT")
LIBRARY.define("sized(Tensor value, int[] shape) -> Tensor")


def _sized(value: Tensor, shape: list[int]) -> Tensor:
    if list(value.shape) != shape:
        raise RuntimeError(f"a value of shape {list(value.shape)} where {shape} was captured")
    return value.clone(memory_format=torch.contiguous_format)


def _sized_fake(value: Tensor, shape: list[int]) -> Tensor:
    return value.new_empty(shape)


LIBRARY.impl("sized", _sized, "CompositeExplicitAutograd")
torch.library.register_fake("difa::sized", _sized_fake, lib=LIBRARY)

SIZED = torch.ops.difa.sized.default
"""``sized(value, shape)``: the value itself, laid out row by row, of a size that only its values determine but that is
known; for the compiler a plain size. Raises ``RuntimeError`` if it is another."""
