"""The plans of the demo model that the benchmarks go by: how they are chosen, and that the committed ones are those."""

from __future__ import annotations

import pytest

from benchmarks import _demo
from difa_compile.plan.plan import Plan

THRESHOLDS = (0.05, 0.1, 0.15)


@pytest.mark.parametrize("rank", _demo.LOSS)
def test_a_plan_is_calibrated_with_the_loss_of_its_rank(rank, monkeypatch, tmp_path):
    asked = {}
    made = Plan.load(_demo.plan_path("demo", 0.1, 50, rank))

    def calibrate(pipe, inputs, **options):
        asked.update(options)
        return made

    monkeypatch.setattr(_demo.difa_compile, "calibrate", calibrate)
    monkeypatch.setattr(_demo, "load", lambda model: None)
    monkeypatch.setattr(_demo, "PLANS", tmp_path)
    assert _demo.calibrated_plan("demo", 0.1, 50, rank) == (made, _demo.plan_path("demo", 0.1, 50, rank))
    assert (asked["rank"], asked["loss"]) == (rank, "code" if rank == "published" else "paper")
    assert [path.parent for path in tmp_path.iterdir()] == [tmp_path]


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("rank", _demo.LOSS)
def test_committed_plans_are_what_their_names_say(rank, threshold):
    settings = Plan.load(_demo.plan_path("demo", threshold, 50, rank)).settings
    method = "greedy" if rank == "published" else "weighed"
    assert (settings.method, settings.loss, settings.threshold) == (method, _demo.LOSS[rank], threshold)
