"""Plans applied to pipelines, against the same decisions written out plainly."""

import dataclasses
import json
import threading

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, HeunDiscreteScheduler

import difa_compile
from difa_compile.backend.entry import eager
from difa_compile.decision import FULL, REUSE, Decision, Kind, Window
from difa_compile.errors import (
    DecisionError,
    LayoutError,
    NotAppliedError,
    PlanFormatError,
    PlanMismatchError,
    RunError,
    SiteSkippedError,
    SitesMismatchError,
    UnsupportedPipelineError,
)
from difa_compile.layout import Layout
from difa_compile.pipeline.apply import apply, apply_for_trials, remove
from difa_compile.pipeline.rules import plan_from_rule
from difa_compile.plan.guidance import Guidance
from tests.support.tiny_pipelines import sample, sample_plainly, tiny_pipeline, tiny_transformer

WINDOW = Window("band", 3)
WINDOWED = Decision(Kind.WINDOW, WINDOW)
RESIDUAL = Decision(Kind.WINDOW_RESIDUAL, WINDOW)
RESIDUAL_CFG = Decision(Kind.WINDOW_RESIDUAL, WINDOW, True)
FULL_CFG = Decision(Kind.FULL, None, True)

ROWS = [
    (FULL, FULL),
    (REUSE, RESIDUAL),
    (RESIDUAL, REUSE),
    (FULL_CFG, RESIDUAL_CFG),
    (RESIDUAL, WINDOWED),
    (REUSE, FULL_CFG),
]
"""Every kind of decision, each reader after its filler, for two blocks."""


def plan_of(pipe, rows, conditional_half=0):
    """A plan written by hand, but with a schedule that counts by timestep."""
    return plan_from_rule(
        pipe,
        len(rows),
        lambda step, site: rows[step][int(site.path.split(".")[1])],
        inputs={"class_labels": [1, 2]},
        conditional_half=conditional_half,
    )


def close(left, right):
    return np.allclose(left, right, atol=2e-5, rtol=0)


@pytest.fixture
def pipe():
    return tiny_pipeline()


@pytest.fixture
def plan(pipe):
    return plan_of(pipe, ROWS)


def test_full_plan_is_the_unmodified_model_bitwise(pipe):
    before = sample(pipe)
    apply(pipe, plan_of(pipe, [(FULL, FULL)] * 4), inner="eager")
    assert np.array_equal(sample(pipe), before)
    remove(pipe)
    assert np.array_equal(sample(pipe), before)
    assert type(pipe) is DiTPipeline


def test_planned_images_are_those_of_the_decisions_written_out(pipe, plan):
    full = sample(pipe, steps=6)
    wanted = sample_plainly(pipe, ROWS, residual_window=WINDOW)
    applied = apply(pipe, plan, inner="eager")
    images = sample(pipe, steps=6)
    assert close(images, wanted)
    assert not close(images, full)
    assert np.array_equal(sample(pipe, steps=6), images)
    assert all(record.outcome != "skipped" for record in applied.records)
    assert len(applied.captures) == 1


@pytest.mark.slow
def test_inductor_gives_the_same_images(pipe, plan):
    wanted = sample_plainly(pipe, ROWS, residual_window=WINDOW)
    apply(pipe, plan)
    assert close(sample(pipe, steps=6), wanted)


def test_other_numbers_of_steps_follow_the_resolved_plan(pipe, plan):
    rows = {steps: plan.resolve(steps).rows for steps in (4, 9)}
    wanted = {steps: sample_plainly(pipe, rows[steps], residual_window=WINDOW) for steps in rows}
    applied = apply(pipe, plan, inner="eager")
    for steps in (9, 4, 9):
        assert close(sample(pipe, steps=steps), wanted[steps])
        assert applied.last_run.steps == steps
    assert len(applied.captures) == 1


def test_another_plan_goes_on_with_what_is_compiled(pipe, plan):
    other = plan_of(pipe, [ROWS[0], ROWS[1], *ROWS[:4]])
    wanted = [sample_plainly(pipe, rows, residual_window=WINDOW) for rows in (ROWS, other.decisions)]
    applied = apply_for_trials(pipe, plan, inner="eager")
    assert close(sample(pipe, steps=6), wanted[0])
    compiled = applied.captures[0].compiled_variants
    applied.follow(other)
    assert close(sample(pipe, steps=6), wanted[1])
    assert applied.captures[0].plan == applied.plan == other
    assert len(applied.captures) == 1
    assert applied.captures[0].compiled_variants - compiled <= 1  # rows alone that the first plan has not
    applied.follow(plan)
    assert close(sample(pipe, steps=6), wanted[0])
    with pytest.raises(SitesMismatchError):
        applied.follow(plan_of(tiny_pipeline(layers=3), [(FULL, FULL, FULL)]))


def test_what_was_followed_is_gone_when_an_equal_plan_is_applied(pipe, plan):
    other = plan_of(pipe, [ROWS[0]] * 6)
    wanted = sample_plainly(pipe, ROWS, residual_window=WINDOW)
    applied = apply_for_trials(pipe, plan, inner="eager")
    sample(pipe, steps=6)
    applied.follow(other)
    assert not close(sample(pipe, steps=6), wanted)
    remove(pipe)
    alone = apply(pipe, plan, inner="eager")
    assert close(sample(pipe, steps=6), wanted)
    with pytest.raises(NotAppliedError, match="applied alone"):
        alone.follow(other)


def test_a_plan_that_shares_other_halves_is_not_followed(pipe, plan):
    applied = apply_for_trials(pipe, plan_of(pipe, [(FULL, FULL)] * 6), inner="eager")
    assert not applied.one_call_each
    applied.follow(plan)
    assert applied.one_call_each
    assert applied.halves
    other = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, conditional_half=1))
    with pytest.raises((PlanMismatchError, DecisionError)):
        applied.follow(other)


def test_plan_file(pipe, plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    apply(pipe, tmp_path / "plan.json", inner="eager")
    images = sample(pipe, steps=6)
    remove(pipe)
    apply(pipe, str(tmp_path / "plan.json"), inner="eager")
    assert np.array_equal(sample(pipe, steps=6), images)


def test_statistics_of_a_run(pipe, plan):
    applied = apply(pipe, plan, inner="eager")
    assert applied.last_run is None
    assert applied.records == ()
    sample(pipe, steps=6)
    stats = applied.last_run
    assert (stats.steps, stats.calls) == (6, 6)
    # One block's cache: 4 batch entries x 16 tokens x 16 wide x 4 bytes; at least an output and a residual at once.
    assert 2 * 4 * 16 * 16 * 4 <= stats.peak_cache_bytes <= 4 * 4 * 16 * 16 * 4


def test_switching_never_recompiles_and_new_batches_get_their_own_graph(pipe, plan):
    wanted = {n: sample_plainly(pipe, ROWS, residual_window=WINDOW, labels=range(n)) for n in (2, 3)}
    applied = apply(pipe, plan, inner="eager")
    assert close(sample(pipe, steps=6, labels=range(2)), wanted[2])
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert close(sample(pipe, steps=6, labels=range(2)), wanted[2])
        sample(pipe, steps=4, labels=range(2))
    assert len(applied.captures) == 1
    assert close(sample(pipe, steps=6, labels=range(3)), wanted[3])
    assert len(applied.captures) == 2
    assert close(sample(pipe, steps=6, labels=range(2)), wanted[2])
    assert len(applied.captures) == 2


def test_interrupted_run_does_not_poison_the_next(pipe, plan):
    wanted = sample_plainly(pipe, ROWS, residual_window=WINDOW)
    apply(pipe, plan, inner="eager")
    for error in (RuntimeError, KeyboardInterrupt):
        plain, calls = pipe.scheduler.scale_model_input, []

        def breaking(value, t, error=error, plain=plain, calls=calls):
            calls.append(t)
            if len(calls) == 4:
                raise error
            return plain(value, t)

        pipe.scheduler.scale_model_input = breaking
        with pytest.raises(error):
            sample(pipe, steps=6)
        del pipe.scheduler.scale_model_input
        assert close(sample(pipe, steps=6), wanted)


def test_start_half_way_follows_the_rest_of_the_schedule(plan):
    class HalfWay(DiTPipeline):
        """Enters the schedule at a given step, as image-to-image pipelines do."""

        @torch.no_grad()
        def __call__(self, class_labels, begin=0, num_inference_steps=6):
            labels = torch.tensor([*class_labels, *[1000] * len(class_labels)])
            latents = torch.randn(len(class_labels), 1, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(
                2, 1, 1, 1
            )
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps[begin:]:
                latents = self.scheduler.scale_model_input(latents, t)
                noise = self.transformer(latents, timestep=t.expand(len(latents)), class_labels=labels).sample
                latents = self.scheduler.step(noise, t, latents).prev_sample
            return latents

    pipe = tiny_pipeline()
    pipe.__class__ = HalfWay
    full = pipe([1, 2], begin=2)
    applied = apply(pipe, plan, inner="eager")
    planned = pipe([1, 2], begin=2)
    assert applied.last_run.steps == 4
    # A plan written by a rule is stretched over what is left: its first step is full, and nothing reads an empty cache.
    assert not torch.allclose(planned, full, atol=1e-5)
    assert torch.isfinite(planned).all()


def test_second_order_scheduler_has_a_row_per_call(pipe):
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    rows = [(FULL, FULL), (REUSE, REUSE), (FULL, RESIDUAL), (REUSE, REUSE), (FULL, FULL)]
    plan = plan_of(pipe, rows)
    applied = apply(pipe, plan, inner="eager")
    sample(pipe, steps=3)
    assert applied.last_run.steps == 5
    assert applied.last_run.promotions == ()


def test_two_pipelines_share_a_transformer_in_two_threads():
    transformer = tiny_transformer()
    pipes = [tiny_pipeline(transformer=transformer) for _ in range(2)]
    tables = [ROWS, [(FULL, FULL), (WINDOWED, REUSE), (REUSE, FULL_CFG), (FULL, WINDOWED)]]
    wanted = [sample_plainly(pipe, rows, residual_window=WINDOW) for pipe, rows in zip(pipes, tables, strict=True)]
    plans = [plan_of(pipe, rows) for pipe, rows in zip(pipes, tables, strict=True)]
    applied = [apply(pipe, plan, inner="eager") for pipe, plan in zip(pipes, plans, strict=True)]
    images = {}
    failures = []
    start = threading.Barrier(2, timeout=60)

    def work(index):
        try:
            start.wait()
            for turn in range(4):  # the first captures
                images[index, turn] = sample(pipes[index], steps=len(tables[index]))
        except BaseException as error:
            failures.append(error)
            start.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [len(each.captures) for each in applied] == [1, 1]
    assert len(images) == 8
    for (index, _), image in images.items():
        assert close(image, wanted[index])


def test_transformer_driven_by_hand_follows_the_plan_in_a_sampling_block(pipe):
    rows = [(FULL, FULL), (REUSE, REUSE)]
    apply(pipe, plan_of(pipe, rows), inner="eager")
    generator = torch.Generator().manual_seed(0)
    calls = [
        {
            "hidden_states": torch.randn(4, 1, 8, 8, generator=generator),
            "timestep": torch.full((4,), 900 - 400 * step),
            "class_labels": torch.tensor([1, 2, 1000, 1000]),
        }
        for step in range(2)
    ]
    with torch.no_grad():
        plain = [pipe.transformer(**call).sample for call in calls]
        with difa_compile.sampling(pipe.transformer, 2) as run:
            planned = []
            for step, call in enumerate(calls):
                run.step(step)
                planned.append(pipe.transformer(**call).sample)
    assert torch.equal(planned[0], plain[0])
    assert not torch.allclose(planned[1], plain[1], atol=1e-5)


# Bad input


def test_applying_twice_and_removing_nothing(pipe, plan):
    with pytest.raises(NotAppliedError, match="carries no plan"):
        remove(pipe)
    apply(pipe, plan)
    with pytest.raises(NotAppliedError, match="already carries a plan"):
        apply(pipe, plan)
    remove(pipe)
    with pytest.raises(NotAppliedError, match="carries no plan"):
        remove(pipe)
    apply(pipe, plan)


def test_plan_for_another_model(plan):
    deeper = tiny_pipeline(layers=3)
    with pytest.raises(PlanMismatchError, match="another configuration"):
        apply(deeper, plan)
    assert type(deeper) is DiTPipeline


def test_plan_for_another_grid(plan):
    """The same model at another size: only the first call shows it."""

    class Larger(DiTPipeline):
        @torch.no_grad()
        def __call__(self):
            self.scheduler.set_timesteps(2)
            t = self.scheduler.timesteps[0]
            return self.transformer(
                torch.zeros(2, 1, 12, 12), timestep=t.expand(2), class_labels=torch.tensor([1, 1000])
            )

    pipe = tiny_pipeline()
    pipe.__class__ = Larger
    try:
        pipe()
    except RuntimeError:
        pytest.skip("this diffusers' DiT takes one size only")
    apply(pipe, plan, inner="eager")
    with pytest.raises(PlanMismatchError, match="tokens"):
        pipe()


def test_guidance_off_with_a_plan_that_shares_it(pipe, plan):
    apply(pipe, plan, inner="eager")
    with pytest.raises(PlanMismatchError, match="guidance off"):
        sample(pipe, steps=6, guidance_scale=1.0)
    sample(pipe, steps=6)


def test_guidance_off_is_fine_for_other_plans(pipe):
    rows = [(FULL, FULL), (REUSE, RESIDUAL)]
    wanted = sample_plainly(pipe, rows, residual_window=WINDOW, guidance_scale=1.0)
    apply(pipe, plan_of(pipe, rows), inner="eager")
    assert close(sample(pipe, steps=2, guidance_scale=1.0), wanted)


def says_of_guidance(plan, guidance, conditional_half=None):
    """The same plan with other words about guidance."""
    settings = dataclasses.replace(plan.settings, guidance=guidance, conditional_half=conditional_half)
    return dataclasses.replace(plan, settings=settings)


def test_guidance_that_contradicts_the_pipeline(pipe, plan):
    with pytest.raises(PlanMismatchError, match="conditional half at position 1"):
        apply(pipe, says_of_guidance(plan, "batched", 1))
    with pytest.raises(PlanMismatchError, match="as two-call calls have them, but DiTPipeline makes batched ones"):
        apply(pipe, says_of_guidance(plan, "two-call"))
    with pytest.raises(DecisionError, match="contradicts DiTPipeline"):
        plan_of(pipe, ROWS, conditional_half=1)


def test_conditional_half_is_taken_from_the_pipeline(pipe, monkeypatch):
    plan = plan_of(pipe, ROWS, conditional_half=None)
    assert (plan.settings.guidance, plan.settings.conditional_half) == ("batched", 0)
    plan = says_of_guidance(plan, "none")
    wanted = sample_plainly(pipe, ROWS, residual_window=WINDOW)
    apply(pipe, plan, inner="eager")
    assert close(sample(pipe, steps=6), wanted)
    remove(pipe)
    monkeypatch.setattr("difa_compile.plan.guidance.guidance_of", lambda pipe: Guidance("unknown"))
    with pytest.raises(UnsupportedPipelineError, match="not known which half"):
        apply(pipe, plan)


def test_pipelines_without_transformer_or_scheduler(pipe, plan):
    class Unet:
        def __init__(self):
            self.components = {"unet": None, "vae": None}

    with pytest.raises(UnsupportedPipelineError, match=r"no transformer \(components: unet, vae\)"):
        apply(Unet(), plan)
    bare = tiny_pipeline()
    bare.scheduler = None
    with pytest.raises(UnsupportedPipelineError, match="no scheduler"):
        apply(bare, plan)
    with pytest.raises(UnsupportedPipelineError, match="no scheduler"):
        apply(tiny_transformer(), plan)


def test_plan_file_that_is_no_plan(pipe, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(PlanFormatError):
        apply(pipe, tmp_path / "plan.json")
    with pytest.raises(PlanFormatError):
        apply(pipe, tmp_path / "missing.json")
    assert type(pipe) is DiTPipeline


def test_strict_and_layout_reach_the_backend(pipe):
    """Odd batches have no halves: the decision cannot be carried out."""
    rows = [(FULL, FULL), (FULL_CFG, FULL)]
    plan = plan_of(pipe, rows)
    apply(pipe, plan, layout=Layout((3, 3)), inner="eager")
    with pytest.raises((LayoutError, PlanMismatchError)):
        sample(pipe, steps=2)
    remove(pipe)

    class OddBatch(DiTPipeline):
        @torch.no_grad()
        def __call__(self):
            self.scheduler.set_timesteps(2)
            for t in self.scheduler.timesteps:
                labels = torch.tensor([1, 2, 1000])
                noise = self.transformer(torch.zeros(3, 1, 8, 8), timestep=t.expand(3), class_labels=labels).sample
                self.scheduler.step(noise, t, torch.zeros(3, 1, 8, 8))

    pipe.__class__ = OddBatch
    applied = apply(pipe, plan, inner="eager")
    pipe()
    (skipped,) = [record for record in applied.records if record.outcome == "skipped"]
    assert skipped.site == "transformer_blocks.0.attn1"
    remove(pipe)
    apply(pipe, plan, strict=True, inner="eager")
    with pytest.raises(SiteSkippedError, match=r"transformer_blocks\.0\.attn1"):
        pipe()


def test_what_inductor_is_asked_reaches_the_backend_or_is_refused_at_once(pipe, monkeypatch):
    given = []

    def watched(module, inputs, config):
        given.append(dict(config))
        return eager(module, inputs)

    monkeypatch.setattr("difa_compile.backend.entry.inductor", watched)
    plan = plan_of(pipe, [(FULL, FULL)])
    for wrong in ({"mode": "fastest"}, {"inductor_options": {"fast": 1}}, {"inner": "eager", "mode": "max-autotune"}):
        with pytest.raises(DecisionError, match=r"fastest|'fast'|inner='eager'"):
            apply(pipe, plan, **wrong)
        assert type(pipe) is DiTPipeline
    apply(pipe, plan, mode="max-autotune", inductor_options={"triton.cudagraphs": False})
    sample(pipe, steps=1)
    assert given == [{"max_autotune": True, "coordinate_descent_tuning": True, "triton.cudagraphs": False}]


def test_gradients_are_refused(pipe):
    class WithGradients(DiTPipeline):
        def __call__(self):
            self.scheduler.set_timesteps(1)
            t = self.scheduler.timesteps[0]
            return self.transformer(torch.zeros(2, 1, 8, 8), timestep=t.expand(2), class_labels=torch.tensor([1, 2]))

    plan = plan_of(pipe, [(FULL, FULL)])
    pipe.__class__ = WithGradients
    apply(pipe, plan, inner="eager")
    with pytest.raises(RunError, match="gradients"):
        pipe()


def test_a_transformer_wrapped_by_torch_compile_is_refused(pipe, plan):
    """A plan would be bypassed: the wrapper calls the module's own forward."""
    pipe.register_modules(transformer=torch.compile(pipe.transformer, backend="eager"))
    with pytest.raises(UnsupportedPipelineError, match=r"_orig_mod"):
        apply(pipe, plan, inner="eager")
