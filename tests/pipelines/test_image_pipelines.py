"""Plans on whole image pipelines of diffusers, compared with the same pipelines whose attention is altered by hand.

DiT, PixArt-Sigma, Stable Diffusion 3 (text to image, image to image) and Flux (embedded guidance; true guidance, in two
calls per step), over tiny random components.
"""

import functools
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="whole pipelines of diffusers")
pytest.importorskip("transformers", reason="text encoders of whole pipelines")

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    UniPCMultistepScheduler,
)

from difa_compile import calibrate
from difa_compile.decision import FULL, Decision, Kind, Window
from difa_compile.errors import PlanMismatchError, UnsupportedPipelineError
from difa_compile.layout import Layout
from difa_compile.pipeline import apply, remove
from difa_compile.plan import Plan
from difa_compile.schedule import take_rows
from tests.pipelines.image_components import (
    HEIGHT,
    IMAGE,
    IMAGE_THEN_TEXT,
    TEXT_THEN_IMAGE,
    TEXT_TOKENS,
    WIDTH,
    Altered,
    add_lora,
    all_full,
    dit,
    flux,
    flux_img2img,
    pixart_sigma,
    sd3,
    sd3_img2img,
    take_lora_off,
)

WINDOW = Window("band", 3)
W = f"window({WINDOW})"
R = f"{W}+residual"
GUIDED = (
    ("full", "full", "full"),
    ("reuse", R, W),
    (R, "reuse", "full"),
    ("full+cfg", f"{R}+cfg", "reuse+cfg"),
    (R, f"{W}+cfg", R),
    ("reuse+cfg", "full+cfg", "full+cfg"),
)
"""Every kind of decision with and without +cfg, each reader after its filler; the third site only SD3 has."""
UNGUIDED = (
    ("full", "full", "full"),
    ("reuse", R, W),
    (R, "reuse", "full"),
    ("full", W, "reuse"),
    (R, "full", R),
    ("reuse", R, W),
)
PROMPTS, NEGATIVE = ("a red house", "two small boats"), ("blurred", "grey")
PROMPTED = {
    "prompt": list(PROMPTS),
    "height": HEIGHT,
    "width": WIDTH,
    "max_sequence_length": TEXT_TOKENS,
    "output_type": "latent",
}
"""Arguments that all pipelines take whose images are of prompts."""
CLOSE = 1e-5
"""Of the largest latent: what the order of float32 additions makes of six steps stays far below, a decision above."""


@dataclass(frozen=True)
class Case:
    """A pipeline, the arguments of its call, and what is known of its transformer's attention without the package.

    ``paths`` and ``layouts`` of the sites; ``calls``: the number of each site's attention call. ``asked``: steps to ask
    for where the pipeline makes one. ``unguided``: arguments that switch guidance off. ``textless``: sites before any
    text has come in, at which the guidance halves are equal. ``threshold``: at which calibration takes some decisions.
    """

    make: Callable
    paths: tuple[str, ...]
    layouts: tuple[Layout, ...]
    calls: tuple[int, ...]
    arguments: Mapping = field(default_factory=dict)
    half: int | None = None
    two_calls: bool = False
    asked: int = 1
    prompted: Mapping = field(default_factory=lambda: PROMPTED)
    unguided: Mapping | None = None
    threshold: float = 0.1
    textless: tuple[int, ...] = ()

    @property
    def rows(self):
        table = GUIDED if self.unguided is not None else UNGUIDED
        return tuple(tuple(Decision.parse(text) for text in row[: len(self.paths)]) for row in table)

    def inputs(self, **arguments):
        """Arguments of a call, but for the steps."""
        return {**self.prompted, **self.arguments, **arguments}

    def sample(self, pipe, steps=6, **arguments):
        """Latents, or with ``output_type="np"`` images (of DiT always); the same for the same arguments."""
        generator = torch.Generator().manual_seed(3)
        call = {"num_inference_steps": steps * self.asked, "generator": generator}
        images = pipe(**{**self.inputs(), **call, **arguments}).images
        return images if isinstance(images, torch.Tensor) else torch.from_numpy(images)

    def sample_altered(self, pipe, rows, made=None, **arguments):
        """Latents with the attention altered by hand; ``made``: steps made, if fewer than there are rows."""
        altered = Altered(rows, self.layouts, WINDOW, calls=self.calls, half=self.half, two_calls=self.two_calls)
        with altered.of(pipe):
            latents = self.sample(pipe, **{"steps": len(rows), **arguments})
        steps = len(rows) if made is None else made
        assert altered.made == (2 * steps if self.two_calls else steps)
        return latents

    def plan(self, pipe, rows):
        """A plan written by hand; made once for all tests, since nothing but the pipeline's sizes enters."""
        key = (self.make, self.two_calls, rows)
        if key not in PLANS:
            plan = Plan.from_rule(
                pipe, len(rows), lambda step, site: rows[step][self.paths.index(site.path)], inputs=self.inputs()
            )
            assert [(site.path, site.layout) for site in plan.sites] == list(zip(self.paths, self.layouts, strict=True))
            guidance = "two-call" if self.two_calls else plan.settings.guidance
            PLANS[key] = replace(plan, settings=replace(plan.settings, guidance=guidance))
        return PLANS[key]


PLANS: dict[tuple, Plan] = {}


def picture():
    """An image for each prompt."""
    return torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5))


SD3 = Case(
    sd3,
    ("transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn"),
    (IMAGE_THEN_TEXT, IMAGE, IMAGE_THEN_TEXT),
    (0, 1, 2),
    {"negative_prompt": list(NEGATIVE)},
    half=1,
    unguided={"guidance_scale": 1.0},
)
FLUX = Case(
    flux, ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"), (TEXT_THEN_IMAGE, TEXT_THEN_IMAGE), (0, 1)
)
CASES = {
    "dit": Case(
        dit,
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
        (Layout((4, 4)), Layout((4, 4))),
        (0, 1),
        {"class_labels": [1, 2], "output_type": "np"},
        half=0,
        prompted={},
        unguided={"guidance_scale": 1.0},
        threshold=0.5,
    ),
    "pixart_sigma": Case(
        pixart_sigma,
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
        (IMAGE, IMAGE),
        (0, 2),
        {"negative_prompt": list(NEGATIVE), "use_resolution_binning": False, "clean_caption": False},
        half=1,
        unguided={"guidance_scale": 1.0},
        textless=(0,),
    ),
    "sd3": SD3,
    "sd3_img2img": replace(
        SD3, make=sd3_img2img, arguments={**SD3.arguments, "image": picture(), "strength": 0.5}, asked=2
    ),
    "flux": FLUX,
    "flux_true_cfg": replace(
        FLUX,
        arguments={"negative_prompt": list(NEGATIVE), "true_cfg_scale": 3.0},
        two_calls=True,
        unguided={"true_cfg_scale": 1.0},
    ),
    "flux_img2img_true_cfg": replace(
        FLUX,
        make=flux_img2img,
        arguments={
            "negative_prompt": list(NEGATIVE),
            "true_cfg_scale": 3.0,
            "image": picture(),
            "strength": 0.5,
        },
        two_calls=True,
        asked=2,
        unguided={"true_cfg_scale": 1.0},
    ),
}
PROMPTED_CASES = [name for name in CASES if name != "dit"]
GUIDED_CASES = [name for name, each in CASES.items() if each.unguided is not None]


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path, monkeypatch):
    """Calibrations of other tests, and of the user, are not gone on with."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def distance(found, wanted):
    """Largest difference, relative to the largest latent."""
    assert torch.isfinite(found).all()
    return float((found - wanted).abs().max() / wanted.abs().max())


def close(found, wanted):
    return distance(found, wanted) < CLOSE


def full_rows(case, steps=6):
    return all_full(len(case.paths), steps)


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


# Schedules


V = {"prediction_type": "v_prediction"}
SCHEDULERS = {
    "ddim": (DDIMScheduler(clip_sample=False, **V), 6),
    "dpmsolver++": (DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, **V), 6),
    "unipc": (UniPCMultistepScheduler(**V), 6),
    "heun": (HeunDiscreteScheduler(**V), 4),
}
"""For PixArt: a scheduler and the steps to ask it for. Heun calls the model twice per step, but for the last."""


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_planned_images_with_every_scheduler(name):
    scheduler, steps = SCHEDULERS[name]
    case = CASES["pixart_sigma"]
    pipe = case.make(type(scheduler).from_config(scheduler.config))
    rows = (*case.rows, case.rows[1])[: 7 if name == "heun" else 6]
    full = case.sample(pipe, steps)
    wanted = case.sample_altered(pipe, rows, steps=steps)
    applied = apply(pipe, case.plan(pipe, rows), inner="eager")
    latents = case.sample(pipe, steps)
    assert close(latents, wanted)
    assert distance(latents, full) > 10 * CLOSE
    assert applied.last_run.steps == len(rows)
    assert applied.last_run.promotions == ()


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_calibrated_plan_has_a_row_per_call_of_every_scheduler(name):
    scheduler, _ = SCHEDULERS[name]
    case = CASES["pixart_sigma"]
    pipe = case.make(type(scheduler).from_config(scheduler.config))
    plan = calibrate(pipe, case.inputs(), steps=4, threshold=0.02, inner="eager", progress=False)
    assert plan.steps == (7 if name == "heun" else 4)
    wanted = case.sample_altered(pipe, plan.decisions, steps=4)
    apply(pipe, plan, inner="eager")
    assert close(case.sample(pipe, 4), wanted)


def test_calibrated_plan_is_carried_onto_another_scheduler():
    """By the timesteps: a plan found with DDIM follows those of Heun's calls and of more steps."""
    case = CASES["pixart_sigma"]
    pipe = case.make()
    plan = calibrate(pipe, case.inputs(), steps=4, threshold=0.02, inner="eager", progress=False)
    applied = apply(pipe, plan, inner="eager")
    for scheduler, steps in (SCHEDULERS["heun"], SCHEDULERS["dpmsolver++"]):
        pipe.scheduler = type(scheduler).from_config(scheduler.config)
        latents = case.sample(pipe, steps)
        rows = plan.resolve(steps, scheduler).rows
        assert applied.last_run.steps == len(rows)
        remove(pipe)
        assert close(latents, case.sample_altered(pipe, rows, steps=steps))
        applied = apply(pipe, plan, inner="eager")


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("shifting", [False, True])
def test_flow_matching_with_fixed_and_dynamic_shift(name, shifting):
    """A calibrated plan goes by the timesteps, which the shift moves; carried onto more steps as well."""
    case = CASES[name]
    pipe = case.make()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=shifting)
    plan = calibrate(pipe, case.inputs(), steps=4, threshold=0.05, inner="eager", progress=False)
    wanted = {4: case.sample_altered(pipe, plan.decisions)}
    assert plan.progress == pytest.approx([float(t) / 1000 for t in pipe.scheduler.timesteps], abs=1e-6)
    case.sample(pipe, 7)
    progress = [min(1.0, float(t) / 1000) for t in pipe.scheduler.timesteps]
    wanted[7] = case.sample_altered(pipe, plan.resolve(7, progress=progress).rows)
    applied = apply(pipe, plan, inner="eager")
    for steps, latents in wanted.items():
        assert close(case.sample(pipe, steps), latents)
        assert applied.last_run.steps == steps


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


# Weights that come and go


@pytest.mark.parametrize("name", ["sd3", "flux_true_cfg"])
def test_model_offload(name):
    """Weights are moved by a hook around each component, which the pipeline renews after every call."""
    case = CASES[name]
    pipe = case.make()
    wanted, full = case.sample_altered(pipe, case.rows), case.sample(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    applied = apply(pipe, case.plan(pipe, case.rows), inner="eager")
    for _ in range(2):
        assert close(case.sample(pipe), wanted)
    assert [record for record in applied.records if record.outcome == "skipped"] == []
    remove(pipe)
    assert torch.equal(case.sample(pipe), full)
    plan = calibrate(pipe, case.inputs(), steps=4, threshold=0.1, inner="eager", progress=False)
    pipe.remove_all_hooks()
    again = calibrate(pipe, case.inputs(), steps=4, threshold=0.1, inner="eager", progress=False)
    assert plan.digest == again.digest


# Weights that change


@pytest.fixture(params=["sd3", "flux_true_cfg"])
def lora_case(request):
    return CASES[request.param]


def test_lora_loaded_before_apply(lora_case):
    case = lora_case
    pipe = case.make()
    bare = case.sample_altered(pipe, case.rows)
    added = add_lora(pipe.transformer)
    assert len(added) >= 8
    full, wanted = case.sample(pipe), case.sample_altered(pipe, case.rows)
    assert distance(wanted, bare) > 50 * CLOSE
    applied = apply(pipe, case.plan(pipe, case.rows), inner="eager")
    latents = case.sample(pipe)
    assert [record for record in applied.records if record.outcome == "skipped"] == []
    assert close(latents, wanted)
    assert distance(latents, full) > 50 * CLOSE
    remove(pipe)
    assert torch.equal(case.sample(pipe), full)


def test_lora_loaded_changed_and_taken_off_after_apply(lora_case):
    case = lora_case
    pipe = case.make()
    wanted = {"bare": case.sample_altered(pipe, case.rows)}
    added = add_lora(pipe.transformer)
    wanted["loaded"] = case.sample_altered(pipe, case.rows)
    for lora in added.values():
        lora.scaling = 0.5
    wanted["scaled"] = case.sample_altered(pipe, case.rows)
    for lora in added.values():
        lora.lora_B["default"].weight.mul_(-1.0)
    wanted["other weights"] = case.sample_altered(pipe, case.rows)
    take_lora_off(pipe.transformer, added)
    plan = case.plan(pipe, case.rows)

    apply(pipe, plan, inner="eager")
    found = {"bare": case.sample(pipe)}
    added = add_lora(pipe.transformer)
    found["loaded"] = case.sample(pipe)
    for lora in added.values():
        lora.scaling = 0.5
    found["scaled"] = case.sample(pipe)
    for lora in added.values():
        lora.lora_B["default"].weight.mul_(-1.0)
    found["other weights"] = case.sample(pipe)
    take_lora_off(pipe.transformer, added)
    found["taken off"] = case.sample(pipe)
    wanted["taken off"] = wanted["bare"]
    for name, latents in wanted.items():
        assert close(found[name], latents), name
    assert distance(wanted["loaded"], wanted["scaled"]) > 10 * CLOSE
    assert distance(wanted["scaled"], wanted["other weights"]) > 10 * CLOSE


def test_lora_fused_into_the_weights_after_apply(lora_case):
    """In place, as ``fuse_lora`` does it: the same graph, other values."""
    case = lora_case
    pipe = case.make()
    wanted = case.sample_altered(pipe, case.rows)
    applied = apply(pipe, case.plan(pipe, case.rows), inner="eager")
    before = case.sample(pipe)
    added = add_lora(pipe.transformer)
    take_lora_off(pipe.transformer, added)
    with torch.no_grad():
        for lora in added.values():
            lora.base_layer.weight.add_(lora.delta())
    fused = case.sample(pipe)
    assert len(applied.captures) == 1
    remove(pipe)
    assert close(fused, case.sample_altered(pipe, case.rows))
    assert close(before, wanted)
    assert distance(fused, before) > 50 * CLOSE


def test_calibration_follows_the_lora(lora_case):
    case = lora_case
    pipe = case.make()
    settings = {"steps": 4, "threshold": 0.02, "inner": "eager", "progress": False}
    bare = calibrate(pipe, case.inputs(), **settings)
    add_lora(pipe.transformer)
    plan = calibrate(pipe, case.inputs(), **settings)
    assert plan.rows != bare.rows
    wanted = case.sample_altered(pipe, plan.decisions)
    apply(pipe, plan, inner="eager")
    assert close(case.sample(pipe, 4), wanted)


# LoRA, by peft


@pytest.fixture
def lora_weights(lora_case):
    """Two sets of LoRA weights for the attention, as files of them hold them."""
    peft = pytest.importorskip("peft", reason="load_lora_weights needs peft")
    transformer = lora_case.make().transformer
    names = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_v_proj"]
    transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=names))
    shapes = {name: value.shape for name, value in peft.get_peft_model_state_dict(transformer).items()}
    assert len(shapes) >= 16
    generator = torch.Generator().manual_seed(8)
    return [
        {f"transformer.{name}": 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(2)
    ]


def lora_life(pipe, one, two):
    """What users do with LoRA, in turn: (what was done, whether it changes the images)."""
    yield "nothing", False
    pipe.load_lora_weights(dict(one), adapter_name="one")
    yield "loaded", True
    pipe.load_lora_weights(dict(two), adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.5, -0.5])
    yield "two at once", True
    pipe.set_adapters(["two"], [0.7])
    yield "scaled", True
    pipe.disable_lora()
    yield "disabled", False
    pipe.enable_lora()
    pipe.fuse_lora(components=["transformer"])
    yield "fused", True
    pipe.unfuse_lora(components=["transformer"])
    pipe.delete_adapters("one")
    yield "unfused", True
    pipe.unload_lora_weights()
    yield "unloaded", False


def test_life_of_a_lora_while_a_plan_is_applied(lora_case, lora_weights):
    case = lora_case
    pipe = case.make()
    wanted = {done: (case.sample_altered(pipe, case.rows), shows) for done, shows in lora_life(pipe, *lora_weights)}
    pipe = case.make()
    applied = apply(pipe, case.plan(pipe, case.rows), inner="eager")
    bare, last = wanted["nothing"][0], None
    for done, _ in lora_life(pipe, *lora_weights):
        latents, shows = wanted[done]
        assert close(case.sample(pipe), latents), done
        assert (distance(latents, bare) > 50 * CLOSE) is shows, done
        assert [record for record in applied.records if record.outcome == "skipped"] == [], done
        assert last is None or not shows or done == "unfused" or distance(latents, last) > 50 * CLOSE, done
        last = latents


@pytest.mark.parametrize("fused", [False, True])
def test_plan_applied_on_a_loaded_lora(lora_case, lora_weights, fused):
    """With and without fusing; the plan is calibrated with the LoRA, and both are taken off in either order."""
    case = lora_case
    pipe = case.make()
    bare = case.sample(pipe)
    pipe.load_lora_weights(dict(lora_weights[0]), adapter_name="one")
    if fused:
        pipe.fuse_lora(components=["transformer"])
    full = case.sample(pipe)
    plan = calibrate(pipe, case.inputs(), steps=4, threshold=0.1, inner="eager", progress=False)
    wanted = case.sample_altered(pipe, plan.decisions)
    apply(pipe, plan, inner="eager")
    assert close(case.sample(pipe, 4), wanted)
    remove(pipe)
    assert torch.equal(case.sample(pipe), full)
    if fused:
        pipe.unfuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    assert close(case.sample(pipe), bare)
