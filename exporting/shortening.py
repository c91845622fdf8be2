"""Programs made short: no sum reads further back than it must."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from difa_compile.bundle.program import Draw, Number, Operation, Program, Sample, Term

FURTHEST = 6
"""Samples back to which sums are shortened, where they can be."""


def shortened(program: Program) -> list[Operation]:
    """The operations, none of which reads further back than it must.

    A scheduler that corrects its samples keeps what it has corrected to itself, so that a sample is a sum over all
    steps before. But the samples are such sums, too: as many of the latest are added, and taken away again as sums, as
    it takes for the earlier terms to vanish.
    """
    operations = program.operations
    width = 1 + len(program.scales)
    sums: dict[tuple[int, int], dict[tuple[int, int], Tensor]] = {}
    samples: list[int] = []
    made: list[Operation] = []
    for index, operation in enumerate(operations):
        if isinstance(operation, Draw):
            made.append(operation)
            continue
        rows = []
        for group, combination in enumerate(operation.inputs):
            row = {(term.value, term.group): _padded(term.factor, width) for term in combination}
            rows.append(_short(row, samples, sums))
            if isinstance(operation, Sample):
                sums[index, group] = row
        inputs = tuple(tuple(Term(*key, trimmed(row[key].tolist())) for key in sorted(row)) for row in rows)
        made.append(replace(operation, inputs=inputs))
        if isinstance(operation, Sample):
            samples.append(index)
    return made


def _short(
    row: dict[tuple[int, int], Tensor],
    samples: Sequence[int],
    sums: Mapping[tuple[int, int], dict[tuple[int, int], Tensor]],
) -> dict[tuple[int, int], Tensor]:
    """A sum that reads nothing before the latest few samples, and is the same; the sum itself where there is none."""
    for back in range(2, min(FURTHEST, len(samples)) + 1):
        first = samples[-back]
        old = sorted(key for key in row if key[0] < first)
        if not old:
            return row
        recent = sorted(key for key in sums if first < key[0] <= samples[-1])
        keys = sorted({*old, *(key for each in recent for key in sums[each] if key[0] < first)})
        zero = torch.zeros_like(row[old[0]])
        wanted = torch.cat([row.get(key, zero) for key in keys])
        known = torch.stack([torch.cat([sums[each].get(key, zero) for key in keys]) for each in recent], 1)
        if int(torch.linalg.matrix_rank(known, rtol=1e-5)) >= int(known.any(1).logical_or(wanted != 0).sum()):
            continue  # anything could be made of so many: that would be no property of the scheduler
        weights = torch.linalg.lstsq(known, wanted, driver="gelsd").solution
        if float((known @ weights - wanted).abs().max()) > 1e-6 * float(wanted.abs().max()):
            continue
        found = {key: factor for key, factor in row.items() if key[0] >= first}
        for each, weight in zip(recent, weights, strict=True):
            one = torch.zeros_like(zero)
            one[0] = weight
            found[each] = found.get(each, zero) + one
            for key, factor in sums[each].items():
                if key[0] >= first:
                    found[key] = found.get(key, zero) - weight * factor
        return found
    return row


def _padded(factor: Number, width: int) -> Tensor:
    return torch.tensor([*factor, *(0.0,) * (width - len(factor))], dtype=torch.float64)


def trimmed(number: list[float]) -> Number:
    while len(number) > 1 and number[-1] == 0.0:
        number.pop()
    return tuple(number)
