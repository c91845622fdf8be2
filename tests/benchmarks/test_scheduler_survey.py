"""The table of schedulers in the documents is what the schedulers of the installed diffusers do."""

import re

import pytest

pytest.importorskip("diffusers", reason="the schedulers are those of diffusers")

from benchmarks.scheduler_survey import OTHER_LOOPS, PAGE, Loop, page, reach, schedulers, tried
from difa_compile.exporting.probing import probe

TOLD = re.compile(r"\| \de-\d\d \|")
"""Errors, which are of a machine's rounding."""


def test_some_schedulers():
    heun = tried("HeunDiscreteScheduler", {})
    assert (heun.reach, heun.clamps, heun.reason) == (1, 0, "")
    assert heun.error < 2e-6
    assert tried("DDIMScheduler", {}).clamps == 12
    assert "dynamic thresholding" in tried("DDPMScheduler", {"thresholding": True}).reason
    assert "learned variance" in tried("DDPMScheduler", {"variance_type": "learned_range"}).reason


def test_reach_counts_calls():
    from diffusers import DPMSolverMultistepScheduler

    program = probe(Loop(DPMSolverMultistepScheduler(solver_order=3)), {}, 8).program
    assert reach(program) == 2


def test_every_class_has_a_row():
    text = PAGE.read_text()
    names = {name for name, _ in schedulers()}
    assert {name for name in names if f"`{name}`" not in text} == set()
    assert set(OTHER_LOOPS) <= names


@pytest.mark.slow
def test_the_table_is_what_the_schedulers_do():
    rows = [tried(name, settings) for name, settings in schedulers()]
    assert TOLD.sub("| |", page(rows)) == TOLD.sub("| |", PAGE.read_text())
    assert max(row.error for row in rows if row.error is not None) < 2e-5
    assert sum(row.error is not None for row in rows) > 40
