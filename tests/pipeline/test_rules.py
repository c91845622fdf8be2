"""Plans written by hand."""

from dataclasses import replace

import pytest
from torch import nn

from difa_compile.backend.verdicts import Record
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import DecisionError, ScheduleError
from difa_compile.layout import Layout
from difa_compile.pipeline import rules
from difa_compile.pipeline.inspection import ModelInspection
from difa_compile.pipeline.rules import plan_from_rule
from difa_compile.plan.data import SiteInfo
from difa_compile.plan.plan import Plan
from difa_compile.plan.schedule import uniform_progress

SHARED = Decision.parse("full+cfg")
BLOCKS = (
    *(SiteInfo(f"blocks.{i}", "block", 1, 384, 256, 384, None, 10**9) for i in range(2)),
    SiteInfo("blocks.0..blocks.1", "block", 1, 384, 256, 384, None, 2 * 10**9, ("blocks.0", "blocks.1")),
)


@pytest.fixture
def inspected(monkeypatch):
    """A model whose inspection finds two sites."""
    model = nn.Linear(3, 2)
    sites = tuple(SiteInfo(f"blocks.{i}.attn1", "self", 6, 64, 256, 384, Layout((16, 16))) for i in range(2))
    found = ModelInspection(
        model, (), sites, (), (4, 32, 32), BLOCKS, (Record("blocks.2", "any", "skipped", "no sum"),)
    )
    monkeypatch.setattr(rules, "inspect_model", lambda given, inputs=None: found if given is model else None)
    return model


def test_a_rule_is_asked_for_every_step_and_site(inspected):
    asked = []

    def rule(step, at):
        asked.append((step, at.path))
        return REUSE if step % 2 and at.path == "blocks.1.attn1" else SHARED

    plan = plan_from_rule(inspected, 3, rule, conditional_half=0)
    assert [row[0] for row in plan.decisions] == [SHARED] * 3
    assert [row[1] for row in plan.decisions] == [SHARED, REUSE, SHARED]
    assert asked[:3] == [(0, "blocks.0.attn1"), (0, "blocks.1.attn1"), (1, "blocks.0.attn1")]
    assert plan.rows[1][1].flops_saved == 1
    assert plan.rows[1][0].flops_saved == 0.5
    assert plan.settings.method == "rule"
    assert (plan.settings.guidance, plan.settings.conditional_half) == ("batched", 0)
    assert plan.settings.sample == (4, 32, 32)
    assert plan.progress == uniform_progress(3)
    plan.validate(inspected)
    assert Plan.from_json(plan.to_json()) == plan


def test_rules_are_checked(inspected):
    with pytest.raises(ScheduleError, match="number of steps is 0"):
        plan_from_rule(inspected, 0, lambda step, at: FULL)
    with pytest.raises(ScheduleError, match="step 0, site 0: reuse"):
        plan_from_rule(inspected, 2, lambda step, at: REUSE)
    with pytest.raises(DecisionError, match=r"returned 'full' for step 0, site blocks\.0\.attn1"):
        plan_from_rule(inspected, 2, lambda step, at: "full")


def test_blocks_and_spans_are_asked_before_what_they_hold(inspected):
    asked = []

    def rule(step, at):
        asked.append((step, at.path))
        return SHARED

    def blocks(step, at):
        asked.append((step, at.path))
        return REUSE if step == 1 and at.path == "blocks.1" else FULL

    def spans(step, at):
        asked.append((step, at.path))
        return REUSE if step == 2 else FULL

    plan = plan_from_rule(inspected, 3, rule, blocks=blocks, spans=spans, conditional_half=0)
    assert [site.path for site in plan.sites[2:]] == ["blocks.0", "blocks.1", "blocks.0..blocks.1"]
    assert plan.decisions == (
        (SHARED, SHARED, FULL, FULL, FULL),
        (SHARED, FULL, FULL, REUSE, FULL),
        (FULL, FULL, FULL, FULL, REUSE),
    )
    assert [path for step, path in asked if step == 1] == [
        "blocks.0..blocks.1",
        "blocks.0",
        "blocks.0.attn1",
        "blocks.1",
    ]
    assert [path for step, path in asked if step == 2] == ["blocks.0..blocks.1"]
    assert [cell.flops_saved for cell in plan.rows[1]] == [0.5, 0, 0, 1, 0]
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_names_the_blocks_that_there_is_a_rule_for(inspected):
    one = plan_from_rule(inspected, 2, lambda *_: FULL, blocks=lambda step, at: REUSE if step else FULL)
    assert [site.path for site in one.sites[2:]] == ["blocks.0", "blocks.1"]
    other = plan_from_rule(inspected, 2, lambda *_: FULL, spans=lambda step, at: REUSE if step else FULL)
    assert [site.path for site in other.sites[2:]] == ["blocks.0..blocks.1"]
    assert len(plan_from_rule(inspected, 2, lambda *_: FULL).sites) == 2


def test_rules_for_blocks_are_checked(inspected, monkeypatch):
    with pytest.raises(ScheduleError, match="step 0, site 2: reuse"):
        plan_from_rule(inspected, 2, lambda *_: FULL, blocks=lambda *_: REUSE)
    with pytest.raises(DecisionError, match=r"returned None for step 0, site blocks\.0\.\.blocks\.1"):
        plan_from_rule(inspected, 2, lambda *_: FULL, spans=lambda *_: None)
    found = rules.inspect_model(inspected)
    monkeypatch.setattr(rules, "inspect_model", lambda given, inputs=None: replace(found, blocks=()))
    with pytest.raises(DecisionError, match=r"no block that can be left out as a whole: blocks\.2: no sum\. Write"):
        plan_from_rule(inspected, 2, lambda *_: FULL, blocks=lambda *_: FULL)
