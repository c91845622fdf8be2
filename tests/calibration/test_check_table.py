"""A table of errors is taken for the model, weights, scheduler, grid and schedule that it was measured with."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, HeunDiscreteScheduler

from difa_compile.calibration.check_table import check_table
from difa_compile.calibration.measure import measure
from difa_compile.calibration.sampling import identity_of_scheduler, identity_of_weights
from difa_compile.errors import (
    CalibrationError,
    ErrorTableError,
    NotAppliedError,
    PipelineCallError,
    PlanMismatchError,
    ScheduleError,
)
from difa_compile.pipeline.inspection import inspect_model
from difa_compile.plan.data import Settings, model_digest
from difa_compile.plan.schedule import scheduler_progress
from difa_compile.planner.table import ErrorTable, MeasuredUnit
from tests.support.slow_search import LAYERS, inputs
from tests.support.tiny_pipelines import tiny_pipeline, tiny_transformer

STEPS = 3


@pytest.fixture(scope="module")
def sites():
    """Of the usual pipeline."""
    torch._dynamo.reset()
    return inspect_model(tiny_pipeline(layers=LAYERS), inputs()).site_infos


def table_of(pipe, sites, progress):
    """A table as measuring would leave it, but for what was measured."""
    identity = {"weights": identity_of_weights([pipe.transformer]), "scheduler": identity_of_scheduler(pipe)}
    unit = MeasuredUnit.empty("attention", range(len(sites)), None, [1], [], 2, len(progress))
    settings = Settings("planned", guidance="batched", conditional_half=0, sample=(1, 8, 8))
    model = model_digest(pipe.transformer)
    seconds = {"full": 1.0, "attention filled": 1.0, "attention reuse": 0.1}
    return ErrorTable(model, settings, sites, tuple(progress), (unit,), len(progress), seconds, identity=identity)


def progress_of(pipe, steps=STEPS):
    return scheduler_progress(pipe.scheduler, steps)


@pytest.fixture
def table(pipe, sites):
    return table_of(pipe, sites, progress_of(pipe))


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [DDIMScheduler, HeunDiscreteScheduler])
def test_what_was_measured_with_the_pipeline(pipe, scheduler, tmp_path):
    """As it is in memory and as it comes out of its file."""
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    options = {"attention": True, "progress": False, "inner": "eager", "state": tmp_path / "errors.json"}
    check_table(measure(pipe, inputs(), STEPS, **options), pipe, inputs(seed=8, labels=[5]), STEPS)
    check_table(ErrorTable.load(tmp_path / "errors.json"), pipe, inputs(), STEPS)


def test_other_inputs_of_the_same_sizes_are_no_difference(pipe, table):
    given = inputs(seed=8, labels=[5])
    before = given["generator"].get_state()
    check_table(table, pipe, given, STEPS)
    assert torch.equal(given["generator"].get_state(), before)
    assert type(pipe) is DiTPipeline
    assert pipe.transformer._compiled_call_impl is None


def test_a_measurement_that_was_interrupted(pipe, table):
    with pytest.raises(ErrorTableError, match=r"holds 2 of 3 steps: the measurement was interrupted"):
        check_table(replace(table, done=2), pipe, inputs(), STEPS)


def test_another_model(table):
    with pytest.raises(PlanMismatchError, match=r"the table of errors is of DiTTransformer2DModel.*measure this model"):
        check_table(table, tiny_pipeline(layers=LAYERS + 1), inputs(), STEPS)


def test_other_weights(pipe, table):
    with torch.no_grad():
        pipe.transformer.proj_out_2.bias += 1e-3
    with pytest.raises(
        PlanMismatchError, match=r"other weights than those of this DiTTransformer2DModel.*plan_from_table"
    ):
        check_table(table, pipe, inputs(), STEPS)


def test_another_scheduler_over_as_many_steps(pipe, table):
    for scheduler in (
        DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing"),
        HeunDiscreteScheduler.from_config(pipe.scheduler.config),
    ):
        pipe.scheduler = scheduler
        with pytest.raises(ScheduleError, match=f"another scheduler than this pipeline's {type(scheduler).__name__}"):
            check_table(table, pipe, inputs(), STEPS)


def test_other_steps(pipe, table):
    with pytest.raises(ScheduleError, match=r"a schedule of 3 steps, and this call, asked for 4, goes through 4; ask"):
        check_table(table, pipe, inputs(), STEPS + 1)


def test_other_timesteps_of_the_same_scheduler(pipe, table):
    shifted = replace(table, progress=tuple(0.9 * value for value in table.progress))
    with pytest.raises(ScheduleError, match=r"other timesteps: at step 0 its progress is 0\.\d+, this call's"):
        check_table(shifted, pipe, inputs(), STEPS)
    rounded = replace(table, progress=tuple(value * (1 - 1e-7) for value in table.progress))
    check_table(rounded, pipe, inputs(), STEPS)


def test_a_scheduler_of_second_order_has_more_calls_than_steps(pipe, sites):
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    table = table_of(pipe, sites, progress_of(pipe))
    assert len(table.progress) == 2 * STEPS - 1
    check_table(table, pipe, inputs(), STEPS)
    with pytest.raises(ScheduleError, match=r"a schedule of 5 steps, and this call, asked for 5, goes through 9"):
        check_table(table, pipe, inputs(), 2 * STEPS - 1)


class HalfWay(DiTPipeline):
    """Enters its schedule at a strength, as pipelines from image to image do."""

    @torch.no_grad()
    def __call__(self, class_labels, num_inference_steps=4, strength=0.5, size=8, calls=True):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.ones(1, 1, size, size)
        for t in self.scheduler.timesteps[round(num_inference_steps * (1 - strength)) :] if calls else ():
            latents = self.scheduler.scale_model_input(latents, t)
            noise = self.transformer(latents, timestep=t[None], class_labels=torch.tensor(class_labels)).sample
            latents = self.scheduler.step(noise, t, latents).prev_sample


@pytest.fixture
def half_way(pipe):
    pipe.__class__ = HalfWay
    return pipe


def test_from_image_to_image_a_call_goes_through_some_of_the_steps(half_way, sites):
    given = {"class_labels": [1]}
    table = table_of(half_way, sites, progress_of(half_way, 4)[2:])
    check_table(table, half_way, given, 4)
    with pytest.raises(ScheduleError, match="goes through 3"):
        check_table(table, half_way, {**given, "strength": 0.75}, 4)


def test_a_pipeline_that_calls_no_model(half_way, table):
    with pytest.raises(CalibrationError, match="HalfWay returned without calling its transformer"):
        check_table(table, half_way, {"class_labels": [1], "calls": False}, STEPS)
    assert type(half_way) is HalfWay


def test_another_token_grid(sites):
    """The model goes by its name and digest, so that the sites alone tell."""
    pipe = tiny_pipeline(layers=LAYERS)
    pipe.transformer = tiny_transformer(layers=LAYERS, sample_size=12)
    table = table_of(pipe, sites, progress_of(pipe))
    with pytest.raises(PlanMismatchError, match=r"sizes: transformer_blocks\.0\.attn1 is .* 16 tokens.* 36 tokens"):
        check_table(table, pipe, inputs(), STEPS)
    other = replace(table, sites=(replace(sites[0], path="transformer_blocks.0.attn0"), *sites[1:]))
    with pytest.raises(PlanMismatchError, match=r"measured at transformer_blocks\.0\.attn0, which this DiTT"):
        check_table(other, pipe, inputs(), STEPS)


def test_what_cannot_be_called_or_carries_a_plan(pipe, table):
    from difa_compile.pipeline.apply import apply

    with pytest.raises(PipelineCallError):
        check_table(table, pipe, {**inputs(), "no_such_argument": 1}, STEPS)
    apply(pipe, table.full_plan(), inner="eager")
    with pytest.raises(NotAppliedError, match="carries a plan"):
        check_table(table, pipe, inputs(), STEPS)
