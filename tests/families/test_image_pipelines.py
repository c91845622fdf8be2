"""Plans on whole image pipelines of diffusers, compared with the same pipelines whose attention is altered by hand.

DiT, PixArt-Sigma, Stable Diffusion 3 (text to image, image to image) and Flux (embedded guidance; true guidance, in two
calls per step), over tiny random components.
"""

import functools
import gc
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="whole pipelines of diffusers")
pytest.importorskip("transformers", reason="text encoders of whole pipelines")

from diffusers import StableDiffusion3Img2ImgPipeline

from difa_compile import calibrate
from difa_compile.decision import FULL, Kind
from difa_compile.errors import PlanMismatchError, UnsupportedPipelineError
from difa_compile.pipeline.apply import apply, remove
from difa_compile.plan.schedule import take_rows
from tests.support.image_cases import (
    CASES,
    CLOSE,
    GUIDED_CASES,
    NEGATIVE,
    PROMPTED_CASES,
    PROMPTS,
    SD3,
    WINDOW,
    close,
    distance,
    full_rows,
    picture,
)
from tests.support.image_components import HEIGHT, WIDTH, dit

pytestmark = pytest.mark.keeps_graphs


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]


# What a plan computes


def test_full_plan_gives_the_images_of_the_unapplied_pipeline(case):
    pipe = case.make()
    before, latents = case.sample(pipe, output_type="np"), case.sample(pipe)
    assert before.shape == ((2, 8, 8, 1) if case.make is dit else (2, HEIGHT, WIDTH, 3))
    assert torch.equal(case.sample_altered(pipe, full_rows(case)), latents)
    apply(pipe, case.plan(pipe, full_rows(case)), inner="eager")
    assert np.allclose(case.sample(pipe, output_type="np"), before, rtol=0, atol=1e-6)
    assert torch.equal(case.sample(pipe), latents)
    remove(pipe)
    assert np.array_equal(case.sample(pipe, output_type="np"), before)
    assert type(pipe) is type(case.make())


def test_planned_images_are_those_of_attention_altered_by_hand(case):
    pipe = case.make()
    full = case.sample(pipe)
    wanted = case.sample_altered(pipe, case.rows)
    applied = apply(pipe, case.plan(pipe, case.rows), inner="eager")
    latents = case.sample(pipe)
    assert close(latents, wanted)
    assert distance(latents, full) > 50 * CLOSE
    assert torch.equal(case.sample(pipe), latents)
    assert [record for record in applied.records if record.outcome == "skipped"] == []
    assert len(applied.captures) == 1
    assert (applied.last_run.steps, applied.last_run.calls) == (6, 12 if case.two_calls else 6)
    remove(pipe)
    assert torch.equal(case.sample(pipe), full)


def test_every_decision_shows_in_the_altered_images(case):
    """What planned images are compared with would tell if one cell of the plan were left full, or one +cfg out."""
    pipe = case.make()
    wanted = case.sample_altered(pipe, case.rows)
    for step, row in enumerate(case.rows):
        for site, decision in enumerate(row):
            others = {FULL, replace(decision, cfg_shared=False)} - {decision}
            if decision.kind is Kind.WINDOW_RESIDUAL:
                others.add(replace(decision, kind=Kind.WINDOW))
            if site in case.textless:
                others = {other for other in others if replace(other, cfg_shared=decision.cfg_shared) != decision}
            for other in others:
                changed = [*case.rows]
                changed[step] = (*row[:site], other, *row[site + 1 :])
                assert distance(case.sample_altered(pipe, changed), wanted) > 2 * CLOSE, (step, site, str(other))


def test_other_numbers_of_steps_follow_the_resolved_plan(case):
    pipe = case.make()
    plan = case.plan(pipe, case.rows)
    wanted = {steps: case.sample_altered(pipe, plan.resolve(steps).rows) for steps in (4, 9)}
    applied = apply(pipe, plan, inner="eager")
    for steps in (9, 4, 9):
        assert close(case.sample(pipe, steps), wanted[steps])
        assert applied.last_run.steps == steps
    assert len(applied.captures) == 1


@pytest.mark.parametrize("name", PROMPTED_CASES)
def test_another_number_of_images_gets_its_own_graph(name):
    case = CASES[name]
    one = {"prompt": PROMPTS[0]}
    if "negative_prompt" in case.arguments:
        one["negative_prompt"] = NEGATIVE[0]
    if "image" in case.arguments:
        one["image"] = picture()[:1]
    pipe = case.make()
    wanted = [case.sample_altered(pipe, case.rows, **arguments) for arguments in ({}, one)]
    applied = apply(pipe, case.plan(pipe, case.rows), inner="eager")
    for arguments, latents in zip(({}, one, {}), (*wanted, wanted[0]), strict=True):
        assert close(case.sample(pipe, **arguments), latents)
    assert len(applied.captures) == 2


@pytest.mark.parametrize("name", PROMPTED_CASES)
def test_several_images_of_one_prompt(name):
    """Each prompt's images stand side by side within each half of the batch."""
    case = CASES[name]
    several = {"prompt": PROMPTS[0], "num_images_per_prompt": 2}
    if "negative_prompt" in case.arguments:
        several["negative_prompt"] = NEGATIVE[0]
    if "image" in case.arguments:
        several["image"] = picture()[:1]
    pipe = case.make()
    wanted = case.sample_altered(pipe, case.rows, **several)
    apply(pipe, case.plan(pipe, case.rows), inner="eager")
    latents = case.sample(pipe, **several)
    assert len(latents) == 2
    assert distance(latents[:1], latents[1:]) > 50 * CLOSE
    assert close(latents, wanted)


@pytest.mark.parametrize("name", ["pixart_sigma", "sd3", "flux_true_cfg"])
def test_planned_images_in_bfloat16(name):
    """Without windows: written out by hand they round otherwise, by as much as such decisions change."""
    case = CASES[name]
    rows = tuple(
        tuple(replace(decision, kind=Kind.FULL, window=None) if decision.window else decision for decision in row)
        for row in case.rows
    )
    pipe = case.make()
    plan = case.plan(pipe, rows)
    pipe.to(torch.bfloat16)
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}
    full, wanted = case.sample(pipe), case.sample_altered(pipe, rows)
    applied = apply(pipe, plan, inner="eager")
    latents = case.sample(pipe)
    assert latents.dtype == torch.bfloat16
    assert [record for record in applied.records if record.outcome == "skipped"] == []
    assert distance(latents, wanted) < 0.1 * distance(full, wanted)
    remove(pipe)
    assert torch.equal(case.sample(pipe), full)


@pytest.mark.parametrize("name", PROMPTED_CASES)
def test_plan_of_another_image_size_is_refused(name):
    case = CASES[name]
    pipe = case.make()
    apply(pipe, case.plan(pipe, case.rows), inner="eager")
    larger = {"width": WIDTH - 8}
    if "image" in case.arguments:
        larger["image"] = picture()[..., : WIDTH - 8]
    with pytest.raises(PlanMismatchError, match="tokens"):
        case.sample(pipe, **larger)


# Calibration


@pytest.mark.slow
def test_calibrated_plan_applies_and_comes_out_the_same_twice(case):
    pipe = case.make()
    settings = {
        "steps": 4 * case.asked,
        "threshold": case.threshold,
        "window": WINDOW,
        "inner": "eager",
        "progress": False,
    }
    plan = calibrate(pipe, case.inputs(), **settings)
    assert calibrate(pipe, case.inputs(), **settings).digest == plan.digest
    assert plan.steps == 4
    assert plan.settings.guidance == ("two-call" if case.two_calls else "none" if case.half is None else "batched")
    assert plan.settings.conditional_half == case.half
    full = case.sample(pipe, 4)
    wanted = case.sample_altered(pipe, plan.decisions)
    apply(pipe, plan, inner="eager")
    latents = case.sample(pipe, 4)
    assert close(latents, wanted)
    assert len({decision for row in plan.decisions for decision in row}) > 1
    assert distance(latents, full) > CLOSE


# Guidance


@pytest.mark.parametrize("name", GUIDED_CASES)
def test_plan_without_sharing_runs_with_guidance_off(name):
    case = CASES[name]
    pipe = case.make()
    rows = tuple(tuple(replace(decision, cfg_shared=False) for decision in row) for row in case.rows)
    alone = replace(case, two_calls=False)
    wanted = alone.sample_altered(pipe, rows, **case.unguided)
    apply(pipe, case.plan(pipe, rows), inner="eager")
    assert close(case.sample(pipe, **case.unguided), wanted)


@pytest.mark.parametrize("name", GUIDED_CASES)
def test_plan_with_sharing_is_refused_with_guidance_off(name):
    case = CASES[name]
    pipe = case.make()
    wanted = case.sample_altered(pipe, case.rows)
    apply(pipe, case.plan(pipe, case.rows), inner="eager")
    with pytest.raises(PlanMismatchError, match="guidance off"):
        case.sample(pipe, **case.unguided)
    assert close(case.sample(pipe), wanted)


def test_distilled_guidance_of_flux_makes_no_halves():
    """The scale is an input of the transformer. A plan that shares halves is refused before anything is compiled."""
    case = CASES["flux_true_cfg"]
    pipe = case.make()
    applied = apply(pipe, case.plan(pipe, case.rows), inner="eager")
    for distilled in ({"true_cfg_scale": 1.0}, {"negative_prompt": None}):
        with pytest.raises(PlanMismatchError, match=r"no CFG half; call it with true_cfg_scale > 1 and a negative_pr"):
            case.sample(pipe, guidance_scale=7.0, **distilled)
    assert applied.captures == []


def test_true_guidance_of_flux_does_not_depend_on_the_embedded_scale():
    case = CASES["flux_true_cfg"]
    pipe = case.make()
    wanted = case.sample_altered(pipe, case.rows, guidance_scale=1.0)
    apply(pipe, case.plan(pipe, case.rows), inner="eager")
    assert close(case.sample(pipe, guidance_scale=1.0), wanted)
    remove(pipe)
    plan = calibrate(pipe, case.inputs(guidance_scale=1.0), steps=4, threshold=0.02, inner="eager", progress=False)
    reasons = {trial.reason for row in plan.rows for cell in row for trial in cell.trials}
    assert reasons == {""}


def cut_off(pipe, step, timestep, tensors):
    """Guidance for two steps, as diffusers' own SD3CFGCutoffCallback ends it."""
    if step == 1:
        pipe._guidance_scale = 0.0
        return {name: value[-len(value) // 2 :] for name, value in tensors.items() if name != "latents"}
    return {}


CUT_OFF = {
    "callback_on_step_end": cut_off,
    "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "pooled_prompt_embeds"],
}


def test_guidance_switched_off_in_mid_run_begins_with_empty_caches():
    """The batch is halved in the middle, which gives another graph; readers there are made full."""
    pipe = SD3.make()
    rows = tuple(tuple(replace(decision, cfg_shared=False) for decision in row) for row in SD3.rows)
    later, promotions = take_rows(rows, range(2, 6))
    assert promotions
    wanted = SD3.sample_altered(pipe, (*rows[:2], *later), **CUT_OFF)
    applied = apply(pipe, SD3.plan(pipe, rows), inner="eager")
    assert close(SD3.sample(pipe, **CUT_OFF), wanted)
    assert len(applied.captures) == 2


def test_guidance_switched_off_in_mid_run_is_refused_by_a_plan_that_shares_it():
    """Of two images without guidance neither is the other's half."""
    pipe = SD3.make()
    wanted = SD3.sample_altered(pipe, SD3.rows)
    apply(pipe, SD3.plan(pipe, SD3.rows), inner="eager")
    with pytest.raises(PlanMismatchError, match="guidance off"):
        SD3.sample(pipe, **CUT_OFF)
    assert close(SD3.sample(pipe), wanted)


def test_skipped_layer_guidance_is_refused():
    """A further call per step, on half the batch, in which a block is left out."""
    pipe = SD3.make()
    wanted = SD3.sample_altered(pipe, SD3.rows)
    apply(pipe, SD3.plan(pipe, SD3.rows), inner="eager")
    with pytest.raises((PlanMismatchError, UnsupportedPipelineError)):
        SD3.sample(pipe, skip_guidance_layers=[0])
    assert close(SD3.sample(pipe), wanted)


# Runs that end early


def breaking_step(pipe, at):
    """A scheduler step that raises at its ``at``-th call; put the returned one back."""
    plain, made = pipe.scheduler.step, []

    @functools.wraps(plain)
    def step(*args, **kwargs):
        made.append(1)
        if len(made) == at:
            raise RuntimeError("broken step")
        return plain(*args, **kwargs)

    pipe.scheduler.step = step


def test_step_that_raises_leaves_the_pipeline_usable(case):
    pipe = case.make()
    wanted = case.sample_altered(pipe, case.rows)
    apply(pipe, case.plan(pipe, case.rows), inner="eager")
    for at in (1, 4):
        breaking_step(pipe, at)
        with pytest.raises(RuntimeError, match="broken step"):
            case.sample(pipe)
        del pipe.scheduler.step
        assert close(case.sample(pipe), wanted)


@pytest.mark.parametrize("name", PROMPTED_CASES)
def test_callback_that_raises_leaves_the_pipeline_usable(name):
    case = CASES[name]

    def raising(*args):
        step = next(value for value in args if isinstance(value, int))
        if step == 2:
            raise KeyboardInterrupt
        return {}

    pipe = case.make()
    wanted = case.sample_altered(pipe, case.rows)
    apply(pipe, case.plan(pipe, case.rows), inner="eager")
    callback = "callback" if name == "pixart_sigma" else "callback_on_step_end"
    with pytest.raises(KeyboardInterrupt):
        case.sample(pipe, **{callback: raising})
    assert close(case.sample(pipe), wanted)


@pytest.mark.parametrize("name", ["sd3", "flux_true_cfg"])
def test_unconditional_call_that_raises_leaves_the_pipeline_usable(name):
    """In the middle of a step, between the two calls where there are two."""
    case = CASES[name]
    pipe = case.make()
    wanted = case.sample_altered(pipe, case.rows)
    apply(pipe, case.plan(pipe, case.rows), inner="eager")
    made = []

    def raising(*_):
        made.append(1)
        if len(made) == 4:
            raise RuntimeError("broken call")

    handle = pipe.transformer.register_forward_pre_hook(raising)
    with pytest.raises(RuntimeError, match="broken call"):
        case.sample(pipe)
    handle.remove()
    assert close(case.sample(pipe), wanted)


@pytest.mark.parametrize("name", ["sd3", "sd3_img2img", "flux", "flux_true_cfg"])
def test_interrupted_run_ends_where_it_was_interrupted(name):
    """diffusers' own way to stop: the remaining steps are passed over."""

    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step == 2
        return {}

    case = CASES[name]
    pipe = case.make()
    wanted = case.sample_altered(pipe, case.rows)
    stopped = case.sample_altered(pipe, case.rows, made=3, callback_on_step_end=interrupt)
    applied = apply(pipe, case.plan(pipe, case.rows), inner="eager")
    assert close(case.sample(pipe, callback_on_step_end=interrupt), stopped)
    assert applied.last_run.steps == 3
    assert close(case.sample(pipe), wanted)


# Image to image


def test_rule_is_stretched_over_what_image_to_image_leaves_of_the_schedule():
    """A plan by hand knows no timesteps: its first row stands for the first step that is made."""
    case = replace(CASES["sd3_img2img"], asked=1)
    pipe = case.make()
    plan = case.plan(pipe, case.rows)
    wanted = case.sample_altered(pipe, plan.resolve(3).rows, steps=6)
    applied = apply(pipe, plan, inner="eager")
    assert close(case.sample(pipe, 6), wanted)
    assert applied.last_run.steps == 3


@pytest.mark.slow
def test_calibrated_plan_is_entered_half_way_by_image_to_image():
    """A plan found with text to image, on the same transformer: what it left to reuse before the entry is made full."""
    pipe = SD3.make()
    found = calibrate(pipe, SD3.inputs(), steps=6, threshold=0.5, inner="eager", progress=False)
    rows, promotions = take_rows(found.decisions, range(3, 6))
    assert promotions
    case = replace(CASES["sd3_img2img"], asked=1)
    image_pipe = case.make()
    wanted = case.sample_altered(image_pipe, rows, steps=6)
    applied = apply(image_pipe, found, inner="eager")
    assert close(case.sample(image_pipe, 6), wanted)
    assert applied.last_run.steps == 3
    assert applied.last_run.promotions == promotions


@pytest.mark.parametrize(("strength", "left"), [(0.2, 2), (1.0, 8)])
def test_strength_says_how_many_steps_are_planned(strength, left):
    case = replace(CASES["sd3_img2img"], asked=1)
    pipe = case.make()
    plan = case.plan(pipe, case.rows)
    wanted = case.sample_altered(pipe, plan.resolve(left).rows, steps=8, strength=strength)
    applied = apply(pipe, plan, inner="eager")
    assert close(case.sample(pipe, 8, strength=strength), wanted)
    assert applied.last_run.steps == left


def test_text_and_image_pipelines_over_the_same_components():
    """Made with ``from_pipe``, they share transformer and scheduler; each follows its own plan, or none."""
    image_case = CASES["sd3_img2img"]
    pipe = SD3.make()
    other = StableDiffusion3Img2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert other.transformer is pipe.transformer
    rows = (SD3.rows[0], *SD3.rows[:1:-1])
    wanted = SD3.sample_altered(pipe, SD3.rows), image_case.sample_altered(other, rows)
    full = SD3.sample(pipe), image_case.sample(other, len(rows))
    apply(pipe, SD3.plan(pipe, SD3.rows), inner="eager")
    assert torch.equal(image_case.sample(other, len(rows)), full[1])
    assert close(SD3.sample(pipe), wanted[0])
    apply(other, image_case.plan(other, rows), inner="eager")
    for _ in range(2):
        assert close(SD3.sample(pipe), wanted[0])
        assert close(image_case.sample(other, len(rows)), wanted[1])
    remove(pipe)
    assert torch.equal(SD3.sample(pipe), full[0])
    assert close(image_case.sample(other, len(rows)), wanted[1])
    remove(other)
    assert torch.equal(image_case.sample(other, len(rows)), full[1])


def test_pipeline_made_from_one_that_carries_a_plan_has_none():
    pipe = SD3.make()
    image_case = CASES["sd3_img2img"]
    full = image_case.sample(StableDiffusion3Img2ImgPipeline.from_pipe(pipe))
    apply(pipe, SD3.plan(pipe, SD3.rows), inner="eager")
    other = StableDiffusion3Img2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(image_case.sample(other), full)
    del pipe
    gc.collect()
    assert torch.equal(image_case.sample(other), full)
