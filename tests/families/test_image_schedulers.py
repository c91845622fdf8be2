"""Plans on image pipelines with every kind of scheduler: steps of first and second order, flow matching, shifts."""

import pytest

pytest.importorskip("diffusers", reason="whole pipelines of diffusers")
pytest.importorskip("transformers", reason="text encoders of whole pipelines")

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from difa_compile import calibrate
from difa_compile.pipeline.apply import apply, remove
from tests.support.image_cases import CASES, CLOSE, close, distance

pytestmark = pytest.mark.keeps_graphs

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


@pytest.mark.slow
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
