"""Decisions by heads on whole pipelines of diffusers, compared with the same altered by hand, head by head."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers", reason="whole pipelines of diffusers")
pytest.importorskip("transformers", reason="text encoders of whole pipelines")

from difa_compile.decision import FULL, Decision
from difa_compile.pipeline.apply import apply, remove
from tests.families.test_video_pipelines import CLOSE as CLOSE_VIDEO
from tests.families.test_video_pipelines import by_hand, error, plan_of
from tests.support.image_cases import CASES, CLOSE, close, distance
from tests.support.video_components import Altered, wan, wan_transformer

pytestmark = pytest.mark.keeps_graphs

W = "window(band:3)"
R = f"{W}+residual"
ROWS = (
    ("full", "full", f"heads(0:full;1:{W})"),
    (f"heads(0:reuse;1:{W})", f"heads(0:{R};1:full)", "heads(0:reuse;1:full)"),
    (f"heads(0:{W};1:reuse)", f"heads(0:reuse;1:{R})", f"heads(0:{R};1:reuse)"),
    ("reuse+cfg", "heads(0:full;1:reuse)", W),
    ("heads(0:full;1:reuse)+cfg", f"heads(0:{R};1:full)+cfg", "heads(0:reuse;1:full)+cfg"),
    (f"heads(0:{R};1:reuse)+cfg", "reuse", f"heads(0:{R};1:{R.replace('3', '2')})"),
    (f"heads(0:reuse;1:{W})", "full+cfg", "reuse"),
    ("reuse", f"heads(0:reuse;1:{R})", f"heads(0:{W};1:reuse)+cfg"),
)
"""Every form of a head after every other, with and without +cfg, and plain decisions before and after; two heads."""
NAMES = ("dit", "pixart_sigma", "sd3", "flux", "flux_true_cfg")


def decisions(rows, sites, *, shared=True):
    made = [[Decision.parse(text) for text in row[:sites]] for row in rows]
    return tuple(tuple(one if shared else replace(one, cfg_shared=False) for one in row) for row in made)


@pytest.fixture(params=NAMES)
def case(request):
    return CASES[request.param]


def rows_of(case):
    return decisions(ROWS, len(case.paths), shared=case.unguided is not None)


def test_planned_images_are_those_of_heads_altered_by_hand(case):
    pipe, rows = case.make(), rows_of(case)
    full = case.sample(pipe, len(rows))
    wanted = case.sample_altered(pipe, rows)
    applied = apply(pipe, case.plan(pipe, rows), inner="eager")
    images = case.sample(pipe, len(rows))
    assert close(images, wanted)
    assert distance(images, full) > 50 * CLOSE
    assert torch.equal(case.sample(pipe, len(rows)), images)
    assert [record for record in applied.records if record.outcome == "skipped"] == []
    assert applied.last_run.promotions == ()
    assert len(applied.captures) == 1
    remove(pipe)
    assert torch.equal(case.sample(pipe, len(rows)), full)


@pytest.mark.slow
def test_every_decision_shows_in_the_altered_images():
    """What planned images are compared with would tell if one cell of the plan were left full, or one +cfg out."""
    case = CASES["flux_true_cfg"]
    pipe, rows = case.make(), rows_of(case)
    wanted = case.sample_altered(pipe, rows)
    for step, row in enumerate(rows):
        for site, decision in enumerate(row):
            for other in {FULL, replace(decision, cfg_shared=False)} - {decision}:
                changed = [*rows]
                changed[step] = (*row[:site], other, *row[site + 1 :])
                assert distance(case.sample_altered(pipe, changed), wanted) > 2 * CLOSE, (step, site, str(decision))


@pytest.mark.parametrize("name", ["dit", "flux_true_cfg"])
def test_other_numbers_of_steps_follow_the_resolved_plan(name):
    case = CASES[name]
    pipe, rows = case.make(), rows_of(case)
    plan = case.plan(pipe, rows)
    wanted = {steps: case.sample_altered(pipe, plan.resolve(steps).rows) for steps in (4, 5, 11)}
    applied = apply(pipe, plan, inner="eager")
    for steps in (11, 4, 5, 11):
        assert close(case.sample(pipe, steps), wanted[steps]), steps
        assert len(applied.last_run.promotions) == len(plan.resolve(steps).promotions)
    assert plan.resolve(4).promotions
    assert len(applied.captures) == 1


@pytest.fixture
def tiny_wan(tmp_path):
    return wan(tmp_path)


def test_wan_makes_two_calls_of_a_step(tiny_wan):
    plan = plan_of(tiny_wan, decisions(ROWS, 2))
    assert plan.settings.guidance == "two-call"
    wanted = by_hand(tiny_wan, plan)
    full = tiny_wan.frames(num_inference_steps=len(ROWS))
    applied = apply(tiny_wan.pipe, plan, inner="eager")
    assert error(tiny_wan.frames(num_inference_steps=len(ROWS)), wanted) < CLOSE_VIDEO
    assert error(full, wanted) > 100 * CLOSE_VIDEO
    assert [record for record in applied.records if record.outcome == "skipped"] == []


@pytest.mark.slow
def test_wan_on_other_numbers_of_steps(tiny_wan):
    plan = plan_of(tiny_wan, decisions(ROWS, 2))
    layouts = tuple(site.layout for site in plan.sites)
    wanted = {steps: Altered(tiny_wan, plan.resolve(steps).rows, layouts).frames() for steps in (3, 5, 11)}
    apply(tiny_wan.pipe, plan, inner="eager")
    for steps in (11, 3, 5):
        assert error(tiny_wan.frames(num_inference_steps=steps), wanted[steps]) < CLOSE_VIDEO, steps


@pytest.mark.slow
def test_wan_with_a_second_transformer_follows_the_plan_with_both(tmp_path):
    """The second begins with empty caches: heads that would read the first one's are full, with all the others."""
    tiny = wan(tmp_path, "euler", transformer_2=wan_transformer(7), boundary_ratio=0.8)
    plan = plan_of(tiny, decisions(ROWS, 2))
    hand = Altered(tiny, plan.decisions, tuple(site.layout for site in plan.sites))
    wanted = hand.frames()
    assert hand.promoted
    applied = apply(tiny.pipe, plan, inner="eager")
    for _ in range(2):
        assert error(tiny.frames(num_inference_steps=len(ROWS)), wanted) < CLOSE_VIDEO
    assert {(p.step, p.site) for p in applied.last_run.promotions} == hand.promoted


@pytest.mark.slow
def test_wan_with_a_scheduler_of_second_order(tmp_path):
    tiny = wan(tmp_path, "heun")
    plan = plan_of(tiny, decisions(ROWS, 2))
    rows = plan.resolve(9).rows
    wanted = Altered(tiny, rows, tuple(site.layout for site in plan.sites)).frames(num_inference_steps=5)
    applied = apply(tiny.pipe, plan, inner="eager")
    assert error(tiny.frames(num_inference_steps=5), wanted) < CLOSE_VIDEO
    assert (applied.last_run.steps, applied.last_run.calls) == (9, 18)
