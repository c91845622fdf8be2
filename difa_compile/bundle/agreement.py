"""How far what two make of the same may be apart: engines, and the pipeline that they were exported from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

LIMITS = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.3}
"""By what engines compute in: below this a difference of latents, relative to the largest, is rounding. What was
measured (``benchmarks/results/parity.json``) is 1e-5 in float32, 1e-2 in float16 and 0.1 in bfloat16, where the
pipeline's scheduler rounds at every step, too; processors add up in other orders, so some room is left. What computes
something else is off by the size of the latents."""
LEVELS = {torch.float64: 1, torch.float32: 1, torch.float16: 8, torch.bfloat16: 64}
"""The same of pictures' bytes, of the same latents decoded: in float32 a value between two levels may be rounded to
either; in half precision it is the sum of some sixty roundings, in a decoder of as many layers, of 2**-11 or 2**-8 of
255 levels each. What decodes otherwise is off by most of them."""
EXTREME = 0.01
"""The share of the bytes that may be further off in half precision: a deep decoder has a few values whose sums nearly
cancel, so that the largest difference of all says little."""


@dataclass(frozen=True)
class Tested:
    """What came of a self-test. ``latents``: the largest difference of latents, and of what prompts are encoded to,
    relative to the largest of each. ``levels``: that of pictures' bytes (:func:`levels_apart`), None where nothing is
    decoded. ``limit``, ``most_levels``: what is still rounding."""

    latents: float
    levels: int | None
    limit: float
    most_levels: int

    @property
    def passed(self) -> bool:
        return self.latents < self.limit and (self.levels is None or self.levels <= self.most_levels)

    @property
    def told(self) -> str:
        """The differences in words."""
        pictures = "" if self.levels is None else f", pictures by {self.levels} of 255 levels"
        return f"latents differ by {self.latents:.1e} of the largest{pictures}"


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that rounds most, float32 where there is none that rounds."""
    return max((dtype for dtype in dtypes if dtype in LIMITS), key=lambda dtype: LIMITS[dtype], default=torch.float32)


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest finite value of ``wanted`` (or as it is, if that
    is 0). Infinite for other shapes, and where one is not finite and the other is something else."""
    if found.shape != wanted.shape:
        return math.inf
    found, wanted = (tensor.detach().cpu().double() for tensor in (found, wanted))
    finite = wanted.isfinite() & found.isfinite()
    if not (finite | (found == wanted) | (found.isnan() & wanted.isnan())).all():
        return math.inf
    if not finite.any():
        return 0.0
    found, wanted = found[finite], wanted[finite]
    apart, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
    return apart / largest if largest else apart


def levels_apart(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> int:
    """The largest difference of two pictures in uint8 of one shape, which were decoded in ``dtype``; in half precision
    without the :data:`EXTREME` ones."""
    apart = (found.int() - wanted.int()).abs().flatten()
    few = int(EXTREME * apart.numel()) if torch.finfo(dtype).bits < 32 else 0
    return int(apart.kthvalue(apart.numel() - few).values)
