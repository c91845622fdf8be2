"""The calls of a pipeline's transformers, captured for engines."""

import pytest
import torch

pytest.importorskip("diffusers", reason="pipelines of diffusers are captured")
pytest.importorskip("transformers", reason="text encoders of whole pipelines")

from difa_compile.decision import FULL, Decision
from difa_compile.errors import EngineError, NoAttentionError, NotAppliedError, PlanMismatchError
from difa_compile.exporting.captured import captured, images_of, more_images, owned_names, progress_of
from difa_compile.pipeline.apply import apply, remove
from difa_compile.pipeline.rules import plan_from_rule
from difa_compile.pipeline.wiring import wiring_of
from difa_compile.plan.schedule import scheduler_progress
from tests.support.image_cases import CASES
from tests.support.tiny_pipelines import TwoCalls, sample, tiny_pipeline, two_call_pipeline

LABELS = {"class_labels": [1, 2, 3]}


SHARED = Decision.parse("reuse+cfg")


@pytest.fixture(scope="module")
def dit():
    """A pipeline and a plan for it."""
    pipe = tiny_pipeline()
    return pipe, plan_from_rule(pipe, 2, lambda step, _: SHARED if step else FULL, inputs=LABELS)


def test_a_batched_call_is_captured_as_the_pipeline_makes_it(dit):
    pipe, plan = dit
    before = sample(pipe)
    (call,) = captured(pipe, {**LABELS, "generator": torch.Generator().manual_seed(1)}, plan)
    assert (call.images, call.expert, call.branch) == (3, 0, None)
    assert call.model is pipe.transformer
    assert call.capture.model.batch == 6
    assert call.capture.model.context.conditional_half == 0
    assert call.capture.verdicts.effective(0, SHARED) == SHARED
    own = owned_names(pipe.transformer)
    assert {own[id(value)] for value in call.args if id(value) in own} >= dict(
        pipe.transformer.named_parameters()
    ).keys()
    assert wiring_of(pipe) is None
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    sizes = [value for value in call.args if value.shape == (6, 1, 8, 8)]
    assert len(sizes) == 1
    assert torch.equal(sizes[0], torch.cat([noise, noise])), "kept as it was when the call was made"
    assert (sample(pipe) == before).all()


def test_two_calls_of_a_step_are_told_apart_also_for_a_plan_that_need_not():
    pipe = two_call_pipeline(TwoCalls)
    plan = plan_from_rule(pipe, 2, lambda *_: FULL, inputs=LABELS)
    calls = captured(pipe, LABELS, plan)
    assert [(call.expert, call.branch, call.images) for call in calls] == [(0, None, 3), (0, "uncond", 3)]
    assert calls[0].capture is calls[1].capture


def test_a_pipeline_with_a_plan_and_a_plan_of_another_model_are_refused(dit):
    pipe, plan = dit
    apply(pipe, plan, inner="eager")
    with pytest.raises(NotAppliedError, match="already carries a plan"):
        captured(pipe, LABELS, plan)
    with pytest.raises(NotAppliedError, match="carries a plan"):
        progress_of(pipe, LABELS, 4)
    remove(pipe)
    with pytest.raises(PlanMismatchError, match="another configuration"):
        captured(tiny_pipeline(layers=3), LABELS, plan)


def test_a_call_under_autocast_is_refused(dit):
    pipe, plan = dit
    under = r"DiTPipeline calls its transformer under torch\.autocast \(cpu torch\.bfloat16\)"
    with torch.autocast("cpu"), pytest.raises(EngineError, match=under):
        captured(pipe, LABELS, plan)
    assert wiring_of(pipe) is None


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_progress_is_that_of_the_schedule(dit, steps):
    pipe, _ = dit
    assert progress_of(pipe, LABELS, steps) == scheduler_progress(pipe.scheduler, steps)
    assert wiring_of(pipe) is None


def test_progress_of_a_pipeline_that_enters_the_schedule_half_way():
    case = CASES["sd3_img2img"]
    pipe = case.make()
    assert len(progress_of(pipe, case.inputs(), 8)) == 4


def test_a_pipeline_that_calls_no_transformer_has_no_progress():
    class Silent(TwoCalls):
        def __call__(self, num_inference_steps=4):
            return ([],)

    with pytest.raises(NoAttentionError, match="returned without calling its transformer"):
        progress_of(two_call_pipeline(Silent), {}, 4)


def test_the_number_of_images_is_that_of_the_result():
    pipe = tiny_pipeline()
    assert images_of(pipe, (torch.zeros(5, 3),)) == 5
    for result in (None, (), (3,), {"images": []}):
        with pytest.raises(EngineError, match=r"how many images a call of DiTPipeline makes cannot be told from its"):
            images_of(pipe, result)


def test_more_images_are_asked_for_by_prompt_or_by_label():
    labelled = tiny_pipeline()
    assert more_images(labelled, {"class_labels": [1, 2], "guidance_scale": 4.0}, 2) == {
        "class_labels": [1, 1, 2, 2],
        "guidance_scale": 4.0,
    }
    prompted = CASES["sd3"].make()
    assert more_images(prompted, {"prompt": "a"}, 3) == {"prompt": "a", "num_images_per_prompt": 3}
    assert more_images(prompted, {"num_images_per_prompt": 2}, 3)["num_images_per_prompt"] == 6
    with pytest.raises(EngineError, match="takes neither class_labels nor any of num_images_per_prompt"):
        more_images(labelled, {}, 2)


@pytest.mark.slow
def test_experts_are_captured_each_and_one_that_is_not_called_is_an_error(tmp_path):
    from tests.families.test_video_pipelines import wan_with_experts

    tiny = wan_with_experts(tmp_path)
    inputs = {key: value for key, value in tiny.arguments.items() if key != "num_inference_steps"}
    plan = plan_from_rule(tiny.pipe, 2, lambda *_: FULL, inputs=inputs)
    calls = captured(tiny.pipe, inputs, plan)
    assert [(call.expert, call.branch) for call in calls] == [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond")]
    assert {call.model for call in calls[:2]} == {tiny.pipe.transformer}
    assert {call.model for call in calls[2:]} == {tiny.pipe.transformer_2}
    assert len({call.capture for call in calls}) == 1, "models of one class share what was captured"
    tiny.pipe.register_to_config(boundary_ratio=0.0)
    with pytest.raises(EngineError, match="has 2 transformers, but in 8 steps 1 of them were called"):
        captured(tiny.pipe, inputs, plan)
    assert wiring_of(tiny.pipe) is None
