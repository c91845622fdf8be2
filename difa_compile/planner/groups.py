"""Which heads take which window: for a few shares of the work that windows can save, the assignment of least error.

Each head has its own error in each window, the relative squared error of its output (DiTFastAttnV2,
arXiv 2503.22796), and each window saves so much. Heads are taken one after the other, always the step that costs the
least error for what it saves, along the lower convex hull of each head's options; so no assignment that saves as much
as one that is found has a smaller sum of errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from difa_compile.decision import FULL, Decision, Window
from difa_compile.errors import CalibrationError
from difa_compile.planner.effects import Array

LEVELS = (0.25, 0.5, 0.75)
"""What share of all that windows can save the groups of heads that are proposed save, at least."""


def head_groups(
    errors: Array, saved: Array, windows: Sequence[Window], levels: Sequence[float] = LEVELS
) -> tuple[Decision, ...]:
    """The decision for each level in which heads take the windows that cost the least error, each once.

    ``errors`` (H, W): of H heads, those of all sites one after the other, in each window; infinite where it cannot be
    taken. ``saved`` (H, W): work saved, in any unit. Levels are shares of what is saved if every head takes the window
    that saves most; a window whose error is not below that of one that saves as much is never taken.

    Raises :class:`CalibrationError` for errors that are NaN or negative, or where no head can take any window.
    """
    if errors.shape != saved.shape or errors.shape[1:] != (len(windows),):
        raise CalibrationError(
            f"errors of heads have the shape {errors.shape}, what they save {saved.shape}, for {len(windows)} windows"
        )
    if np.isnan(errors).any() or (errors < 0).any():
        raise CalibrationError("the error of a head in a window is NaN or negative; load the model in float32")
    saves = np.where(np.isfinite(errors), saved, 0).clip(min=0)
    most = float(saves.max(axis=1).sum())
    if not most > 0:
        raise CalibrationError("no head can take any of the windows, or none of them saves anything; leave them out")
    steps = sorted(
        (error / gain, head, option, gain) for head in range(len(errors))
        for option, gain, error in _steps(errors[head], saves[head])
    )  # fmt: skip
    forms = [FULL] * len(errors)
    done, found = 0.0, []
    wanted = sorted(levels)
    for _, head, option, gain in steps:
        while wanted and done >= wanted[0] * most:
            found.append(Decision.of_heads(forms))
            wanted.pop(0)
        forms[head] = Decision.parse(f"window({windows[option]})")
        done += gain
    if wanted:  # what is left asks for all that can be saved, or nearly
        found.append(Decision.of_heads(forms))
    return tuple(each for each in dict.fromkeys(found) if each != FULL)


def _steps(errors: Array, saved: Array) -> list[tuple[int, float, float]]:
    """From full to the window that saves most along the lower hull of one head's options: the window, what the step to
    it saves, and what it costs in error."""
    options = [(0.0, 0.0, -1)]
    hull: list[tuple[float, float, int]] = []
    options += [(float(saved[i]), float(errors[i]), i) for i in range(len(errors)) if saved[i] > 0]
    for gain, error, option in sorted(options):
        if hull and gain == hull[-1][0]:
            continue  # of those that save as much the first has the least error
        while len(hull) > 1 and _slope(hull[-2], (gain, error)) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append((gain, error, option))
    return [(after[2], after[0] - before[0], after[1] - before[1]) for before, after in pairwise(hull)]


def _slope(one: Sequence[float], other: Sequence[float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])
