"""DiTFastAttn's search written independently, every trial a whole call of the model, and what it is compared with."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from difa_compile.calibration.calibrate import calibrate
from difa_compile.decision import FULL, REUSE, Decision, Kind, Window
from tests.support.tiny_pipelines import PlainSites, sample

STEPS = 6
THRESHOLD = 0.5
LAYERS = 2
WINDOW = Window("band", 2)
"""The default for 16 tokens."""


DECISIONS = [
    REUSE,
    Decision(Kind.WINDOW_RESIDUAL, WINDOW, True),
    Decision(Kind.WINDOW_RESIDUAL, WINDOW),
    Decision(Kind.FULL, None, True),
]
"""The published candidates in their order."""


def inputs(seed=3, labels=(1, 2)):
    return {"class_labels": list(labels), "generator": torch.Generator().manual_seed(seed)}


def quick(pipe, given=None, **settings):
    """Calibrate with the rewritten graphs run eagerly, without progress bar."""
    settings = {"steps": STEPS, "threshold": THRESHOLD, "progress": False, "inner": "eager", **settings}
    return calibrate(pipe, given or inputs(), **settings)


def losses(plan):
    return [[[trial.loss for trial in cell.trials] for cell in row] for row in plan.rows]


def slow_loss(a, b, form="paper"):
    a, b = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    largest = np.maximum(np.abs(a), np.abs(b)) if form == "paper" else np.maximum(a, b)
    return np.clip(np.abs((a - b) / (largest + 1e-6)), 0, 10).mean()


def slow_search(pipe, decisions=DECISIONS, form="paper", costs=None, threshold=THRESHOLD, **arguments):
    """DiTFastAttn's search with every trial a whole model call; the chosen rows, and the losses in the order tried.

    With ``costs``, shares of full attention's: all decisions that cost less than the best price so far are tried.
    """
    plain = PlainSites(pipe.transformer, half=0, residual_window=WINDOW)
    caches, rows, measured = {}, [], []

    def forward(*args, **kwargs):
        row, found = [], []
        full = plain.call([FULL] * LAYERS, kwargs, caches, args)[0].sample
        for block in range(LAYERS):
            found.append([])
            chosen, price = FULL, 1.0
            for place, decision in enumerate(decisions if rows else ()):
                if costs is not None and costs[place] >= price:
                    break  # the rest cost more yet
                trial = [*row, decision, *[FULL] * (LAYERS - block - 1)]
                loss = slow_loss(full, plain.call(trial, kwargs, caches, args)[0].sample, form)
                found[-1].append(loss)
                share = loss / ((block + 1) / LAYERS * threshold)
                if costs is None and share < 1:
                    chosen = decision
                    break
                if costs is not None and costs[place] + share < price:
                    chosen, price = decision, costs[place] + share
            row.append(chosen)
        rows.append(tuple(row))
        measured.append(found)
        output, written = plain.call(row, kwargs, caches, args)
        caches.update(written)
        return output

    pipe.transformer.forward = forward
    try:
        sample(pipe, steps=STEPS, **arguments)
    finally:
        del pipe.transformer.forward
    return tuple(rows), measured


def assert_same_search(plan, rows, measured):
    assert plan.decisions == rows
    for mine, theirs in zip(losses(plan), measured, strict=True):
        for cell, wanted in zip(mine, theirs, strict=True):
            assert cell == pytest.approx(wanted, rel=2e-3, abs=1e-5)


@contextmanager
def interrupted_after(pipe, steps, error=KeyboardInterrupt):
    """Raise at the scheduler's step that follows ``steps`` decided steps."""
    cls = type(pipe.scheduler)
    plain, count = cls.step, 0

    def step(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count > steps:
            raise error
        return plain(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "step", step)
        yield
