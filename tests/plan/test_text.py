"""Plans as text for people: summaries, differences, the map of sites by steps."""

from __future__ import annotations

import dataclasses

import pytest

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import PlanMismatchError
from difa_compile.plan.plan import Cell, Difference, Plan
from difa_compile.plan.schedule import uniform_progress
from tests.support.plans import GREEDY, measured_plan, plan_of


def test_diff() -> None:
    mine, theirs = plan_of("FFFF", "F.F."), plan_of("F...", "F.F.")
    assert mine.diff(mine) == ()
    assert mine.diff(theirs) == tuple(Difference(step, 0, FULL, REUSE) for step in (1, 2, 3))
    with pytest.raises(PlanMismatchError, match="plans of 4 and 3 steps"):
        mine.diff(plan_of("FFF", "FFF"))
    with pytest.raises(PlanMismatchError, match=r"2 sites.*1 sites"):
        mine.diff(plan_of("FFFF"))


def test_diff_text() -> None:
    mine = plan_of("FFFFF", "F.F.F")
    theirs = plan_of("F..F.", "F.F.F", settings=dataclasses.replace(GREEDY, threshold=0.1))
    lines = mine.diff_text(theirs).splitlines()
    assert "settings.threshold: 0.05 -> 0.1" in lines
    assert "3 of 10 cells differ" in lines
    assert "attention FLOPs: 80.0 % -> 50.0 % of full" in lines
    assert "     3  full -> reuse" in lines
    assert "  blocks.0.attn1  steps 1-2, 4: full -> reuse" in lines
    assert mine.diff_text(mine).endswith("0 of 10 cells differ\n")


SUMMARY = """\
plan DIGEST for DiTTransformer2DModel (config abababababab, 1,234,567 parameters)
made: greedy, threshold 0.05, loss of the paper, window band:32, guidance batched (conditional half 1), VERSIONS
candidates: reuse, full+cfg
12 steps, progress 1.000 to 0.083; 2 sites, self, 6 heads x 64, 256 tokens (16x16), width 384

   decision                  cells   share
.  reuse                        13   54.2 %
F  full                          4   16.7 %
f  full+cfg                      4   16.7 %
R  window(band:32)+residual      2    8.3 %
W  window(band:32)               1    4.2 %

attention FLOPs, q k^T and p v    29.0 % of full  (699.7 MFLOP of 2.416 GFLOP, 23.94 MFLOP of it for residuals)
attention FLOPs with projections  35.4 % of full  (3.418 GFLOP of 9.664 GFLOP, 23.94 MFLOP of it for residuals)
distinct rows: 7 of 12 (each is one variant of the graph, one engine of an export)

   engine  steps  one call  of the run   reads  writes  at its sites
0       0      1   103.0 %      24.3 %       0       1  2 full
1       1      1    90.5 %      21.3 %       0       1  1 full, 1 window(band:32)
2       2      2    40.5 %      19.1 %       2       0  1 reuse, 1 window(band:32)+residual
3       3      1    50.0 %      11.8 %       0       0  2 full+cfg
4       4      1    50.0 %      11.8 %       0       2  2 full+cfg
5       5      5     0.0 %       0.0 %       2       0  2 reuse
6       6      1    50.0 %      11.8 %       1       1  1 full, 1 reuse

step            0         10
blocks.0.attn1  FWRRff......
blocks.1.attn1  FF..ff.F....
engine          012234565555
F full  W window  R window+residual  H by heads  . reuse  P forecast; f w r h , p the same with the CFG halves shared
"""


def test_summary() -> None:
    plan = plan_of("FWRRff......", "FF..ff.F....")
    assert plan.summary() == SUMMARY.replace("DIGEST", plan.digest[:12]).replace(
        "VERSIONS", "torch 2.13.0, diffusers 0.42.1"
    )


def test_summary_with_forecasts() -> None:
    lines = plan_of("FFFpPP.").summary().splitlines()
    assert "P  forecast:1                2   28.6 %" in lines
    assert "p  forecast:2(step)+cfg      1   14.3 %" in lines
    assert "blocks.0.attn1  FFFpPP." in lines
    assert (
        "distinct rows: 4 of 7 (each is one variant of the graph, one engine of an export)" in lines
    )  # one for both gaps
    assert any(line.startswith("attention FLOPs, q k^T and p v    42.9 % of full") for line in lines)


def test_summary_with_fitted_weights() -> None:
    plan = plan_of("FFPPF")
    rows = tuple(
        (dataclasses.replace(row[0], weights=(1.5, -0.5)) if step == 3 else row[0],)
        for step, row in enumerate(plan.rows)
    )
    assert "weights fitted: of 1 of 2 forecasts" in dataclasses.replace(plan, rows=rows).summary().splitlines()
    assert "fitted" not in plan.summary()
    text = plan.diff_text(dataclasses.replace(plan, rows=rows))
    assert text.endswith("0 of 5 cells differ\nforecasts with other weights: 1\n")


def test_summary_of_decisions_by_heads() -> None:
    plan = plan_of("FFFF")
    by_heads = [Decision.parse(f"heads(0-{last}:window(band:8);{last + 1}-5:reuse)+cfg") for last in range(4)]

    def summary(decisions: list[Decision]) -> str:
        rows = tuple((Cell(decision),) for decision in (FULL, *decisions))
        return Plan(plan.model, plan.settings, plan.sites, uniform_progress(len(rows)), rows).summary()

    few = summary(by_heads)
    assert "h  heads(0-2:window(band:8);3-5:reuse)+cfg      1   20.0 %" in few
    assert "blocks.0.attn1  Fhhhh" in few
    many = [Decision.of_heads([FULL] * n + [Decision.parse(f"window(band:{n})")] * (6 - n)) for n in range(1, 6)]
    text = summary(by_heads + many)
    assert "H  heads(...)      " in text
    assert "h  heads(...)+cfg  " in text
    assert "50.0 %" in text
    assert "heads(0" not in text


def test_summary_of_measurements() -> None:
    text = measured_plan().summary()
    assert "candidates measured: 4, accepted: 2, largest accepted loss 0.0125 (step 1, joint.0.attn)" in text
    assert "2 sites: 1 x (self, 6 heads x 64, 256 tokens (16x16), width 384); 1 x (joint, 24 heads" in text


def test_summary_of_a_resolved_plan_names_the_promotions() -> None:
    text = plan_of("F." * 5).resolve(4).summary()
    assert "of 10 steps on a schedule of 4" in text
    assert "fell out: 2\n" in text
    assert "  step 2, blocks.0.attn1: reuse; it reads the output of the plan's step 4" in text
    assert "blocks.0.attn1  FFFF\n" in text
