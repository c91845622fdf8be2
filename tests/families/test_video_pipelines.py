"""Plans on whole video pipelines of diffusers, tiny: Wan (two calls per step), Latte (sites along time), CogVideoX."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import difa_compile
from difa_compile.backend.run import run_of
from difa_compile.decision import FULL, Decision, Kind
from difa_compile.errors import DecisionError, PlanMismatchError, UnsupportedPipelineError
from difa_compile.pipeline.rules import plan_from_rule
from tests.support.video_components import (
    ALONG_TIME,
    COGVIDEOX_ROWS,
    LATTE_ROWS,
    TEXT_WIDTH,
    WAN_ROWS,
    WINDOW,
    Altered,
    cogvideox,
    decisions,
    latte,
    lesser_rows,
    wan,
    wan_transformer,
    without_sharing,
)

FULL_CFG = Decision(Kind.FULL, None, True)

PIPELINES = {
    "wan, UniPC": (lambda folder: wan(folder, "unipc"), WAN_ROWS),
    "wan, Euler": (lambda folder: wan(folder, "euler"), WAN_ROWS),
    "latte": (latte, LATTE_ROWS),
    "cogvideox 2b, DDIM": (lambda folder: cogvideox(folder, "2b", "ddim"), COGVIDEOX_ROWS),
    "cogvideox 5b, DPM": (lambda folder: cogvideox(folder, "5b", "dpm"), COGVIDEOX_ROWS),
    "cogvideox 1.5, DDIM": (lambda folder: cogvideox(folder, "1.5", "ddim"), COGVIDEOX_ROWS),
}

pytestmark = pytest.mark.keeps_graphs


@pytest.fixture(params=PIPELINES)
def case(request, tmp_path):
    """A tiny pipeline, unapplied, and rows for it."""
    build, rows = PIPELINES[request.param]
    return build(tmp_path), rows


@pytest.fixture(params=["wan, UniPC", "latte", "cogvideox 5b, DPM"])
def family(request, tmp_path):
    """One of each class."""
    build, rows = PIPELINES[request.param]
    return build(tmp_path), rows


def plan_of(tiny, rows, **arguments):
    """A plan written by hand; its sites must be those that the family is known to have."""
    inputs = {**tiny.arguments, "output_type": "latent", **arguments}
    plan = plan_from_rule(
        tiny.pipe, len(rows), lambda step, site: rows[step][tiny.sites.index(site.path)], inputs=inputs
    )
    assert tuple(site.path for site in plan.sites) == tiny.sites
    return plan


def by_hand(tiny, plan, *, guided=True, **arguments):
    """The video of a plan, attention altered by hand."""
    return Altered(tiny, plan.decisions, tuple(site.layout for site in plan.sites), guided).frames(**arguments)


def error(found, wanted):
    """Largest difference, relative to the largest value."""
    assert np.isfinite(found).all()
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def every_decision_shows(tiny, plan, wanted):
    """Leaving any one decision of the plan full changes the video; else a comparison could miss it.

    But before the first look at the text both halves of guidance are equal, so sharing changes nothing there.
    """
    layouts = tuple(site.layout for site in plan.sites)
    for step, site, lesser in lesser_rows(plan.decisions):
        found = error(Altered(tiny, lesser, layouts).frames(), wanted)
        if site == 0 and tiny.text_comes_later and plan.decisions[step][site] == FULL_CFG:
            assert found == 0
        else:
            assert found > 10 * CLOSE, (step, site, str(plan.decisions[step][site]))


CLOSE = 5e-6
"""Rounding: attention under a mask and on half a batch adds up in another order, and sampling carries that on. Found
were differences up to 6e-7; every single decision of the rows below changes the video by 1e-4 or more."""


def all_carried_out(applied):
    return [record for record in applied.records if record.outcome == "skipped"] == []


# Every pipeline


def test_full_plan_gives_the_same_video_and_is_taken_off(case):
    tiny, rows = case
    cls, scheduler = type(tiny.pipe), type(tiny.pipe.scheduler)
    before = tiny.frames(output_type="np")
    difa_compile.apply(tiny.pipe, plan_of(tiny, [(FULL,) * len(tiny.sites)] * len(rows)), inner="eager")
    assert np.abs(tiny.frames(output_type="np") - before).max() <= 1e-6
    difa_compile.remove(tiny.pipe)
    assert np.array_equal(tiny.frames(output_type="np"), before)
    assert (type(tiny.pipe), type(tiny.pipe.scheduler)) == (cls, scheduler)
    assert tiny.pipe.transformer._compiled_call_impl is None


def test_planned_video_is_that_of_attention_altered_by_hand(case):
    tiny, rows = case
    full = tiny.frames()
    plan = plan_of(tiny, rows)
    wanted = by_hand(tiny, plan)
    every_decision_shows(tiny, plan, wanted)
    applied = difa_compile.apply(tiny.pipe, plan, inner="eager")
    video = tiny.frames()
    assert all_carried_out(applied)
    assert error(video, wanted) < CLOSE
    assert error(full, wanted) > 100 * CLOSE
    assert np.array_equal(tiny.frames(), video)
    assert len(applied.captures) == 1
    assert applied.last_run.steps == len(rows)
    assert applied.last_run.calls == len(rows) * (2 if tiny.two_calls else 1)
    difa_compile.remove(tiny.pipe)
    assert np.array_equal(tiny.frames(), full)


def test_plan_without_sharing_with_guidance_and_without(family):
    tiny, rows = family
    plan = plan_of(tiny, without_sharing(rows))
    full = tiny.frames(guidance_scale=1.0)
    wanted = {scale: by_hand(tiny, plan, guided=scale > 1, guidance_scale=scale) for scale in (1.0, 4.0)}
    applied = difa_compile.apply(tiny.pipe, plan, inner="eager")
    for scale in (1.0, 4.0, 1.0):
        assert error(tiny.frames(guidance_scale=scale), wanted[scale]) < CLOSE
        assert all_carried_out(applied)
        assert applied.last_run.calls == len(rows) * (2 if tiny.two_calls and scale > 1 else 1)
    assert error(full, wanted[1.0]) > 100 * CLOSE
    assert len(applied.captures) == (1 if tiny.two_calls else 2)  # a batch of one half is a shape of its own


def test_plan_that_shares_is_refused_where_guidance_is_off(family):
    tiny, rows = family
    plan = plan_of(tiny, rows)
    wanted = by_hand(tiny, plan)
    difa_compile.apply(tiny.pipe, plan, inner="eager")
    with pytest.raises(PlanMismatchError, match="guidance off"):
        tiny.frames(guidance_scale=1.0)
    assert error(tiny.frames(), wanted) < CLOSE


@pytest.mark.slow
def test_calibrated_plan_applies_and_is_found_again(family, tmp_path):
    tiny, _ = family
    inputs = {name: value for name, value in tiny.arguments.items() if name != "num_inference_steps"}
    plans = [
        difa_compile.calibrate(
            tiny.pipe, inputs, steps=4, threshold=0.5, inner="eager", progress=False, state=tmp_path / f"{turn}.json"
        )
        for turn in range(2)
    ]
    assert plans[0].digest == plans[1].digest
    plan = plans[0]
    assert plan.settings.guidance == ("two-call" if tiny.two_calls else "batched")
    assert tuple(site.path for site in plan.sites) == tiny.sites
    assert {decision for row in plan.decisions for decision in row} > {FULL}
    wanted = by_hand(tiny, plan)
    applied = difa_compile.apply(tiny.pipe, plan, inner="eager")
    assert error(tiny.frames(num_inference_steps=4), wanted) < CLOSE
    assert all_carried_out(applied)


def test_calibrated_plan_that_shares_guidance(family, tmp_path):
    """With candidates that nothing but sharing can be chosen from."""
    tiny, _ = family
    inputs = {name: value for name, value in tiny.arguments.items() if name != "num_inference_steps"}
    options = {"candidates": ["window+residual+cfg", "full+cfg"], "state": tmp_path / "state.json"}
    plan = difa_compile.calibrate(tiny.pipe, inputs, 3, 10.0, inner="eager", progress=False, **options)
    assert all(decision.cfg_shared for row in plan.decisions[1:] for decision in row)
    wanted = by_hand(tiny, plan)
    applied = difa_compile.apply(tiny.pipe, plan, inner="eager")
    assert error(tiny.frames(num_inference_steps=3), wanted) < CLOSE
    assert all_carried_out(applied)


def test_error_in_mid_run_leaves_the_pipeline_usable(family):
    tiny, rows = family
    plan = plan_of(tiny, rows)
    wanted = by_hand(tiny, plan)
    difa_compile.apply(tiny.pipe, plan, inner="eager")

    def stop(pipe, step, timestep, tensors):
        if step == 2:
            raise KeyError("stop")
        return tensors

    step, count = tiny.pipe.scheduler.step, 0

    def broken(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 3:
            raise ZeroDivisionError
        return step(*args, **kwargs)

    with pytest.raises(KeyError, match="stop"):
        tiny.frames(callback_on_step_end=stop)
    assert error(tiny.frames(), wanted) < CLOSE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.pipe.scheduler, "step", broken)
        with pytest.raises(ZeroDivisionError):
            tiny.frames()
    assert error(tiny.frames(), wanted) < CLOSE


def test_error_within_the_transformer_leaves_the_pipeline_usable(family):
    """In the second half of a step, where there is one: what the first half has left must not be read."""
    tiny, rows = family
    plan = plan_of(tiny, rows)
    wanted = by_hand(tiny, plan)
    applied = difa_compile.apply(tiny.pipe, plan, inner="eager")
    tiny.frames()
    count = 0
    compiled_row = applied.captures[0].compiled_row

    def broken(roles):
        nonlocal count
        count += 1
        if count == 8 - len(rows) % 2:
            raise ZeroDivisionError
        return compiled_row(roles)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(applied.captures[0], "compiled_row", broken)
        if not tiny.two_calls:
            count = 4
        with pytest.raises(ZeroDivisionError):
            tiny.frames()
    assert error(tiny.frames(), wanted) < CLOSE


def test_other_number_of_steps(family):
    """The resolved rows, by hand: nothing of the package says what is computed."""
    tiny, rows = family
    plan = plan_of(tiny, rows)
    layouts = tuple(site.layout for site in plan.sites)
    wanted = {steps: Altered(tiny, plan.resolve(steps).rows, layouts).frames() for steps in (3, 9)}
    applied = difa_compile.apply(tiny.pipe, plan, inner="eager")
    for steps in (9, 3, 9):
        assert error(tiny.frames(num_inference_steps=steps), wanted[steps]) < CLOSE
        assert applied.last_run.steps == steps
    assert len(applied.captures) == 1


@pytest.mark.slow
def test_several_prompts_and_videos(family):
    tiny, rows = family
    plan = plan_of(tiny, rows)
    prompts = {"prompt": ["a red cat", "a green dog sleeps on grass"], "negative_prompt": ["blurry", "dark"]}
    wanted = by_hand(tiny, plan, **prompts)
    assert len(wanted) == 2
    difa_compile.apply(tiny.pipe, plan, inner="eager")
    assert error(tiny.frames(**prompts), wanted) < CLOSE
    assert error(tiny.frames(), by_hand_on_a_copy(tiny, plan)) < CLOSE


def by_hand_on_a_copy(tiny, plan, **arguments):
    """:func:`by_hand` of a pipeline that carries a plan."""
    difa_compile.remove(tiny.pipe)
    return by_hand(tiny, plan, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan, UniPC", "latte", "cogvideox 5b, DPM"])
def test_two_pipelines_of_one_class_follow_plans_of_their_own(name, tmp_path):
    """One after the other, and one within a call of the other: the second samples in the middle of the first's run."""
    build, rows = PIPELINES[name]
    one, two = (build(tmp_path) for _ in range(2))
    with torch.no_grad():
        for parameter in two.pipe.transformer.parameters():
            parameter.mul_(1.1)
    reuse = decisions(("reuse",) * len(one.sites))
    plans = plan_of(one, rows), plan_of(two, [rows[0], *reuse, rows[0], *reuse])
    wanted = [by_hand(tiny, plan) for tiny, plan in zip((one, two), plans, strict=True)]
    assert error(*wanted) > 100 * CLOSE
    difa_compile.apply(one.pipe, plans[0], inner="eager")
    difa_compile.apply(two.pipe, plans[1], inner="eager")
    inner = []

    def other(pipe, step, timestep, tensors):
        if step == 2:
            inner.append(two.frames(num_inference_steps=4))
        return tensors

    assert error(one.frames(), wanted[0]) < CLOSE
    assert error(two.frames(num_inference_steps=4), wanted[1]) < CLOSE
    assert error(one.frames(callback_on_step_end=other), wanted[0]) < CLOSE
    assert error(inner[0], wanted[1]) < CLOSE
    difa_compile.remove(one.pipe)
    assert error(two.frames(num_inference_steps=4), wanted[1]) < CLOSE


# Wan


@pytest.fixture
def tiny_wan(tmp_path):
    return wan(tmp_path)


def test_wan_takes_the_conditional_calls_attention_for_the_other_call(tiny_wan):
    """One step after the other: what is shared is of the same step, not of an earlier one."""
    rows = decisions(("full", "full"), ("full+cfg", "full"), ("full", "full+cfg"), ("full+cfg", "full+cfg"))
    plan = plan_of(tiny_wan, rows)
    assert plan.settings.guidance == "two-call"
    wanted = by_hand(tiny_wan, plan)
    full = tiny_wan.frames(num_inference_steps=4)
    applied = difa_compile.apply(tiny_wan.pipe, plan, inner="eager")
    assert error(tiny_wan.frames(num_inference_steps=4), wanted) < CLOSE
    assert error(full, wanted) > 100 * CLOSE
    assert all_carried_out(applied)


def texts_of_two_lengths():
    generator = torch.Generator().manual_seed(5)
    lengths = {"prompt_embeds": 8, "negative_prompt_embeds": 5}
    texts = {name: torch.randn(1, length, TEXT_WIDTH, generator=generator) for name, length in lengths.items()}
    return {"prompt": None, "negative_prompt": None, **texts}


@pytest.mark.parametrize("shares", [False, True], ids=["alone", "shared"])
def test_wan_with_texts_of_two_lengths(tiny_wan, shares):
    """The two calls of a step have other shapes, hence a graph each; the image's attention is shared all the same."""
    texts = texts_of_two_lengths()
    plan = plan_of(tiny_wan, WAN_ROWS if shares else without_sharing(WAN_ROWS), **texts)
    wanted = by_hand(tiny_wan, plan, **texts)
    applied = difa_compile.apply(tiny_wan.pipe, plan, inner="eager")
    for _ in range(2):
        assert error(tiny_wan.frames(**texts), wanted) < CLOSE
    assert len(applied.captures) == 2


@pytest.mark.slow
def test_wan_two_sizes_one_after_the_other(tiny_wan):
    """(64, 96) is the plan's own size; windows keep their radius on the others."""
    sizes = [{"height": 64, "width": 96}, {"height": 96, "width": 48}, {"num_frames": 5}]
    plans = [plan_of(tiny_wan, WAN_ROWS, **size) for size in sizes]
    wanted = [by_hand(tiny_wan, plan, **size) for plan, size in zip(plans, sizes, strict=True)]
    applied = difa_compile.apply(tiny_wan.pipe, plans[0], inner="eager", resize="tokens")
    for turn in (0, 1, 0, 2, 1, 2, 0):
        assert error(tiny_wan.frames(**sizes[turn]), wanted[turn]) < CLOSE, turn
        assert all_carried_out(applied)
    assert len(applied.captures) == 3


def test_wan_other_size_is_refused_unless_it_is_asked_for(tiny_wan):
    plan = plan_of(tiny_wan, WAN_ROWS)
    wanted = by_hand(tiny_wan, plan)
    difa_compile.apply(tiny_wan.pipe, plan, inner="eager")
    for _ in range(2):
        with pytest.raises(PlanMismatchError, match="tokens"):
            tiny_wan.frames(height=96, width=48)
        assert error(tiny_wan.frames(), wanted) < CLOSE


def wan_with_experts(folder, boundary_ratio=0.8, seed=7):
    """As in Wan 2.2: ``transformer`` makes the first steps, ``transformer_2`` the others."""
    return wan(folder, "euler", transformer_2=wan_transformer(seed), boundary_ratio=boundary_ratio)


def test_wan_with_a_second_transformer_follows_the_plan_with_both(tmp_path):
    """The second begins with empty caches: what would read the first one's is full instead, and said to be."""
    tiny = wan_with_experts(tmp_path)
    full = tiny.frames()
    plan = plan_of(tiny, WAN_ROWS)
    layouts = tuple(site.layout for site in plan.sites)
    hand = Altered(tiny, plan.decisions, layouts)
    wanted = hand.frames()
    models = {model for model, _, _ in hand.outputs}
    assert models == {tiny.pipe.transformer, tiny.pipe.transformer_2}
    assert hand.promoted
    every_decision_shows(tiny, plan, wanted)
    applied = difa_compile.apply(tiny.pipe, plan, inner="eager")
    for _ in range(2):
        assert error(tiny.frames(), wanted) < CLOSE
    assert error(full, wanted) > 100 * CLOSE
    assert all_carried_out(applied)
    assert len(applied.captures) == 1  # models of one class share what was captured, but no caches
    assert applied.last_run.calls == 2 * len(WAN_ROWS)
    assert {(p.step, p.site) for p in applied.last_run.promotions} == hand.promoted
    difa_compile.remove(tiny.pipe)
    assert np.array_equal(tiny.frames(), full)
    for model in models:
        assert model._compiled_call_impl is None
        assert "cache_context" not in vars(model)


def test_wan_with_a_second_transformer_alone(tmp_path):
    """``boundary_ratio`` 1 leaves all steps but the very first to the second."""
    tiny = wan_with_experts(tmp_path, boundary_ratio=1.0)
    plan = plan_of(tiny, WAN_ROWS)
    wanted = by_hand(tiny, plan)
    difa_compile.apply(tiny.pipe, plan, inner="eager")
    assert error(tiny.frames(), wanted) < CLOSE


def test_caches_of_a_transformer_that_is_done_are_let_go(tmp_path):
    """The first transformer's caches are dropped once a step is over in which the second was called instead."""
    tiny = wan_with_experts(tmp_path)
    reuse = [(FULL, FULL), *[decisions(("reuse", "reuse"))[0]] * 5]
    plan = plan_of(tiny, reuse)
    applied = difa_compile.apply(tiny.pipe, plan, inner="eager")
    held = []

    def look(pipe, step, timestep, tensors):
        held.append(call_in_progress(pipe).cache_bytes())
        return tensors

    tiny.frames(callback_on_step_end=look)
    assert 0 < applied.last_run.promotions[0].step < 5
    assert held[0] > 0
    assert held == [held[0]] * 5 + [0]
    assert applied.last_run.peak_cache_bytes == 2 * held[0]  # within the step of the change


def call_in_progress(pipe):
    """The run of a pipeline's call that is in progress."""
    return run_of(pipe.transformer)


@pytest.mark.slow
def test_wan_with_a_second_transformer_calibrated(tmp_path):
    tiny = wan_with_experts(tmp_path)
    inputs = {name: value for name, value in tiny.arguments.items() if name != "num_inference_steps"}
    plans = [
        difa_compile.calibrate(
            tiny.pipe, inputs, steps=5, threshold=0.6, inner="eager", progress=False, state=tmp_path / f"{turn}.json"
        )
        for turn in range(2)
    ]
    assert plans[0].digest == plans[1].digest
    plan = plans[0]
    begins = [
        step
        for step, row in enumerate(plan.rows)
        if any("begin at this step" in trial.reason for cell in row for trial in cell.trials)
    ]
    assert len(begins) == 1
    readers = (Kind.REUSE, Kind.WINDOW_RESIDUAL)
    assert not any(decision.kind in readers for decision in plan.decisions[begins[0]])
    assert any(decision.kind in readers for row in plan.decisions[begins[0] :] for decision in row)
    wanted = by_hand(tiny, plan)
    applied = difa_compile.apply(tiny.pipe, plan, inner="eager")
    assert error(tiny.frames(num_inference_steps=5), wanted) < CLOSE
    assert applied.last_run.promotions == ()


FORECAST_ROWS = decisions(
    ("full+cfg", "full"),
    ("full", "full"),
    ("forecast:1", WINDOW),
    ("full", "forecast:1+cfg"),
    ("forecast:2+cfg", "full+cfg"),
    ("forecast:1", "forecast:2"),
    ("reuse", "forecast:1(step)"),
    ("full", "forecast:1"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unipc", "euler", "heun"])
def test_wan_with_forecasts(name, tmp_path):
    """Uneven timesteps; with Heun's method two calls to each, for the conditional and the other half."""
    tiny = wan(tmp_path, name)
    steps = 4 if name == "heun" else len(FORECAST_ROWS)
    plan = plan_of(tiny, FORECAST_ROWS)
    rows = plan.resolve(7).rows if name == "heun" else plan.decisions
    full = tiny.frames(num_inference_steps=steps)
    layouts = tuple(site.layout for site in plan.sites)
    wanted = Altered(tiny, rows, layouts).frames(num_inference_steps=steps)
    applied = difa_compile.apply(tiny.pipe, plan, inner="eager")
    assert error(tiny.frames(num_inference_steps=steps), wanted) < CLOSE
    assert error(full, wanted) > 100 * CLOSE
    assert applied.last_run.calls == 2 * len(rows)
    assert all_carried_out(applied)


@pytest.mark.slow
def test_wan_with_a_second_transformer_forecasts_from_that_ones_outputs(tmp_path):
    """The second computes until it has as many outputs of its own as a forecast reads."""
    tiny = wan_with_experts(tmp_path)
    full = tiny.frames(num_inference_steps=len(FORECAST_ROWS))
    plan = plan_of(tiny, FORECAST_ROWS)
    hand = Altered(tiny, plan.decisions, tuple(site.layout for site in plan.sites))
    wanted = hand.frames()
    assert {model for model, _, _ in hand.outputs} == {tiny.pipe.transformer, tiny.pipe.transformer_2}
    assert hand.promoted
    applied = difa_compile.apply(tiny.pipe, plan, inner="eager")
    for _ in range(2):
        assert error(tiny.frames(num_inference_steps=len(FORECAST_ROWS)), wanted) < CLOSE
    assert error(full, wanted) > 100 * CLOSE
    assert {(p.step, p.site) for p in applied.last_run.promotions} == hand.promoted


def test_transformers_that_are_not_alike_are_refused(tmp_path):
    plan = plan_of(wan(tmp_path), WAN_ROWS)
    tiny = wan(tmp_path, "euler", transformer_2=wan_transformer(layers=3), boundary_ratio=0.8)
    full = tiny.frames()
    with pytest.raises(PlanMismatchError, match="another configuration of WanTransformer3DModel"):
        difa_compile.apply(tiny.pipe, plan, inner="eager")
    with pytest.raises(UnsupportedPipelineError, match="not of one class and configuration"):
        difa_compile.calibrate(tiny.pipe, {"prompt": "a cat"}, 2, progress=False, state=tmp_path / "state.json")
    assert np.array_equal(tiny.frames(), full)


def test_wan_with_a_scheduler_of_second_order(tmp_path):
    """Heun's method calls the transformer twice per step, with guidance four times; the plan has a row for each two."""
    tiny = wan(tmp_path, "heun")
    steps = 4
    plan = plan_of(tiny, WAN_ROWS)
    rows = plan.resolve(2 * steps - 1).rows
    layouts = tuple(site.layout for site in plan.sites)
    wanted = Altered(tiny, rows, layouts).frames(num_inference_steps=steps)
    full = tiny.frames(num_inference_steps=steps)
    applied = difa_compile.apply(tiny.pipe, plan, inner="eager")
    assert error(tiny.frames(num_inference_steps=steps), wanted) < CLOSE
    assert error(full, wanted) > 100 * CLOSE
    assert (applied.last_run.steps, applied.last_run.calls) == (7, 14)


def test_plan_that_does_not_speak_of_guidance_is_taken_as_the_pipeline_does_it(tiny_wan):
    """A rule for the bare transformer cannot know how the pipeline calls it."""
    rows = decisions(("full", "full"), ("full+cfg", "full"), ("reuse+cfg", "full+cfg"))
    plan = plan_of(tiny_wan, rows)
    wanted = by_hand(tiny_wan, plan)
    silent = replace(plan, settings=replace(plan.settings, guidance="none"))
    applied = difa_compile.apply(tiny_wan.pipe, silent, inner="eager")
    assert error(tiny_wan.frames(num_inference_steps=3), wanted) < CLOSE
    assert all_carried_out(applied)


def test_plan_made_for_a_batch_of_halves_is_refused_by_wan(tiny_wan):
    plan = plan_of(tiny_wan, WAN_ROWS)
    batched = replace(plan, settings=replace(plan.settings, guidance="batched", conditional_half=0))
    with pytest.raises(PlanMismatchError, match="as batched calls have them, but WanPipeline makes two-call ones"):
        difa_compile.apply(tiny_wan.pipe, batched)
    with pytest.raises(DecisionError, match="contradicts WanPipeline"):
        plan_from_rule(tiny_wan.pipe, 2, lambda step, site: FULL, conditional_half=1)


@pytest.mark.slow
def test_wan_calibrated_with_texts_of_two_lengths(tiny_wan, tmp_path):
    texts = texts_of_two_lengths()
    unwanted = ("num_inference_steps", "prompt", "negative_prompt")
    inputs = {name: value for name, value in tiny_wan.arguments.items() if name not in unwanted} | texts
    options = {"candidates": ["window+residual+cfg", "full+cfg"], "state": tmp_path / "state.json"}
    plan = difa_compile.calibrate(tiny_wan.pipe, inputs, 3, 10.0, inner="eager", progress=False, **options)
    assert any(decision.cfg_shared for row in plan.decisions for decision in row)
    wanted = by_hand(tiny_wan, plan, **texts)
    applied = difa_compile.apply(tiny_wan.pipe, plan, inner="eager")
    assert error(tiny_wan.frames(num_inference_steps=3, **texts), wanted) < CLOSE
    assert all_carried_out(applied)


# CogVideoX and Latte


def test_cogvideox_guidance_that_grows_over_the_steps(tmp_path):
    """``use_dynamic_cfg`` changes the pipeline's guidance scale in every step; the batch keeps its halves."""
    tiny = cogvideox(tmp_path, "5b", "dpm")
    plan = plan_of(tiny, COGVIDEOX_ROWS)
    wanted = by_hand(tiny, plan, use_dynamic_cfg=True)
    difa_compile.apply(tiny.pipe, plan, inner="eager")
    assert error(tiny.frames(use_dynamic_cfg=True), wanted) < CLOSE


def test_cogvideox_with_fused_projections(tmp_path):
    tiny = cogvideox(tmp_path, "2b")
    tiny.pipe.fuse_qkv_projections()
    plan = plan_of(tiny, COGVIDEOX_ROWS)
    wanted = by_hand(tiny, plan)
    applied = difa_compile.apply(tiny.pipe, plan, inner="eager")
    assert error(tiny.frames(), wanted) < CLOSE
    assert all_carried_out(applied)


@pytest.mark.slow
def test_latte_without_its_attention_along_time(tmp_path):
    """Half of the sites are not there: a plan made so fits, one with all sites does not."""
    tiny = latte(tmp_path)
    everything = plan_of(tiny, LATTE_ROWS)
    tiny.sites, tiny.numbers = tiny.sites[::2], (0, 2)
    rows = [row[::2] for row in LATTE_ROWS]
    plan = plan_of(tiny, rows, enable_temporal_attentions=False)
    wanted = by_hand(tiny, plan, enable_temporal_attentions=False)
    difa_compile.apply(tiny.pipe, plan, inner="eager")
    assert error(tiny.frames(enable_temporal_attentions=False), wanted) < CLOSE
    difa_compile.remove(tiny.pipe)
    difa_compile.apply(tiny.pipe, everything, inner="eager")
    with pytest.raises(PlanMismatchError, match=r"not in the model: temporal_transformer_blocks"):
        tiny.frames(enable_temporal_attentions=False)


def test_latte_with_one_site_along_time_alone(tmp_path):
    """A window over frames hides frames, not places."""
    tiny = latte(tmp_path)
    rows = [(FULL,) * 4, *[(FULL, Decision.parse(ALONG_TIME), FULL, FULL)] * 3]
    plan = plan_of(tiny, rows)
    assert plan.sites[1].layout.grid == (3,)
    wanted = by_hand(tiny, plan)
    full = tiny.frames(num_inference_steps=4)
    difa_compile.apply(tiny.pipe, plan, inner="eager")
    assert error(tiny.frames(num_inference_steps=4), wanted) < CLOSE
    assert error(full, wanted) > 100 * CLOSE
