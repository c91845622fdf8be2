"""How a pipeline guides: by which weights what its scheduler is given is a sum of the outputs of its model.

What the call names as scales tells that for most pipelines. It does not where scales are lists, change over the steps,
are another one for the second model of Wan 2.2, or are set to one beyond an interval; what the scheduler is given shows
it in every case, as the solution of least squares, image by image:

    given = sum over calls c and parts p of w[c, p] output[c, p]

where an output of a batch that is n times as large as what is given has n parts (the halves of guidance).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difa_compile.errors import CalibrationError

EXPLAINED = 0.01
"""The share of what is given, squared, that weights may leave unexplained where nothing is stated of them."""
AS_GOOD = 4.0
"""Stated weights that leave no more than so many times as much are taken as they are, without rounding of their own."""
ROUNDING = 1e-9
_SINGULAR = 1e-10
"""Outputs that differ by a smaller share, squared, do not tell their weights; then those stated stand."""


@dataclass(frozen=True)
class GuidedCall:
    """A call of the model: its branch of guidance (``cond``, ``uncond``, None), and its output (n B, ...)."""

    branch: str | None
    output: Tensor


@dataclass(frozen=True)
class StatedWeights:
    """What the call says: the weights of the conditional half and of the other, None where it does not; which half of a
    batch is conditional (None: there are none, or it is not known), and whether they are two calls."""

    weights: tuple[float, float] | None
    half: int | None = None
    two_call: bool = False

    def of(self, calls: Sequence[GuidedCall], parts: int) -> list[float] | None:
        """The weights of all parts of all calls in order, ``parts`` of each; None where they cannot be told."""
        if len(calls) * parts == 1:
            return [1.0]
        if self.weights is None or len(calls) * parts != 2:
            return None
        conditional, other = self.weights
        if self.two_call and parts == 1:
            return [other if call.branch == "uncond" else conditional for call in calls]
        if self.half is not None and parts == 2:
            return [other, conditional] if self.half else [conditional, other]
        return None


def floats_of(outputs: Sequence[Any]) -> list[Tensor]:
    """The outputs of a model that are numbers; a list of samples of one size is one output with these as its batch."""
    found = [value for value in outputs if isinstance(value, Tensor) and value.is_floating_point()]
    if len(found) > 1 and len({value.shape for value in found}) == 1:
        return [torch.stack(found)]
    return found


def guiding_weights(
    calls: Sequence[GuidedCall], given: Tensor | None, stated: StatedWeights, where: str
) -> list[Tensor]:
    """For each call the weights (B, n) of its n parts in what the scheduler is given, of each image; float64, CPU.

    ``given`` (B, ...), None where it is not known. Stated weights stand where they explain it, or where no weights do
    (the pipeline turns outputs into something else for its scheduler). Raises :class:`CalibrationError` where nothing
    is stated and nothing explains it.
    """
    given = None if given is None else _once(given, calls)
    parts = None if given is None else _parts(calls, given)
    if given is not None and parts is not None:
        prior = stated.of(calls, len(parts) // len(calls))
        weights = _solved(torch.stack(parts), given.reshape(len(given), -1).double(), prior, where)
    else:
        batch = len(calls[0].output)
        halves = stated.half is not None and not stated.two_call and batch % 2 == 0
        told = stated.of(calls, 2 if halves else 1)
        if told is None:
            raise _untold(where)
        weights = torch.tensor(told, dtype=torch.float64).expand(batch // 2 if halves else batch, -1)
    return list(weights.chunk(len(calls), 1))


def guided_change(changes: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """What changes (n B, ...) of the outputs of each call, by the weights (B, n), make of what is given, (B, ...)."""
    total: Tensor | None = None
    for change, own in zip(changes, weights, strict=True):
        images, parts = own.shape
        scale = own.T.to(change).reshape(parts, images, *[1] * (change.ndim - 1))
        guided = (change.reshape(parts, images, *change.shape[1:]) * scale).sum(0)
        total = guided if total is None else total + guided
    assert total is not None
    return total


def _once(given: Tensor, calls: Sequence[GuidedCall]) -> Tensor:
    """Half of what is given, where a pipeline samples on with both halves of its batch and gives both the same."""
    if not _repeats(given) or any(_repeats(call.output) for call in calls):
        return given
    return given.chunk(2)[0]


def _repeats(value: Tensor) -> bool:
    return value.ndim > 0 and len(value) > 0 and len(value) % 2 == 0 and torch.equal(*value.chunk(2))


def _parts(calls: Sequence[GuidedCall], given: Tensor) -> list[Tensor] | None:
    """The parts (B, D) of all calls, in order; None where they are not of the size of what is given."""
    sizes = {(len(call.output), call.output.numel()) for call in calls}
    if len(sizes) != 1 or not given.ndim or not given.numel():
        return None
    images, (batch, numbers) = len(given), next(iter(sizes))
    if batch % images or numbers * images != batch * given.numel():
        return None
    return [part for call in calls for part in call.output.reshape(batch // images, images, -1).double()]


def _solved(parts: Tensor, given: Tensor, prior: list[float] | None, where: str) -> Tensor:
    """The weights (B, N) of parts (N, B, D) in what is given (B, D)."""
    gram = torch.einsum("nbd,mbd->bnm", parts, parts).cpu()
    right = torch.einsum("nbd,bd->bn", parts, given).cpu()
    size = given.square().sum(1).cpu().clamp_min(1e-300)
    start = torch.tensor(prior or [0.0] * len(parts), dtype=torch.float64).expand(len(size), -1)
    rest = right - torch.einsum("bnm,bm->bn", gram, start)
    inverse = torch.linalg.pinv(gram, rtol=_SINGULAR, hermitian=True)
    found = start + torch.einsum("bnm,bm->bn", inverse, rest)

    def left(weights: Tensor) -> Tensor:
        """The share of what is given that weights leave unexplained, squared, (B,)."""
        summed = torch.einsum("nbd,bn->bd", parts, weights.to(parts))
        return (given - summed).square().sum(1).cpu() / size

    unexplained = left(found)
    explains = unexplained <= EXPLAINED
    if prior is None:
        if not bool(explains.all()):
            raise _untold(where)
        return found
    stands = (left(start) <= AS_GOOD * unexplained + ROUNDING) | ~explains
    return torch.where(stands[:, None], start, found)


def _untold(where: str) -> CalibrationError:
    return CalibrationError(
        f"{where}: how the outputs of the model are guided cannot be told: the call gives no one number for it, and "
        "what the scheduler is given is no sum of them. Give one number as guidance_scale, and where the conditional "
        "half of a batch stands (conditional_half=0 or 1)"
    )
