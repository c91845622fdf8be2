"""Measuring: the effects are those of the model altered by hand, an interruption changes nothing, and what is refused.

By hand: every call of the transformer in a plain run of the pipeline is made again, its blocks replaced by their input
plus what they added so many steps before.
"""

import functools
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, HeunDiscreteScheduler

from difa_compile.backend.capture import Capture
from difa_compile.calibration import measure as module
from difa_compile.calibration.measure import (
    AGES,
    ATTENTION_LAGS,
    LAGS,
    Measuring,
    Projection,
    Stream,
    guidance_scale,
    measure,
)
from difa_compile.decision import FULL, REUSE, Decision, Kind, Window
from difa_compile.errors import (
    CalibrationError,
    CalibrationStateError,
    DecisionError,
    ErrorTableError,
    NonFiniteError,
    NotAppliedError,
    OutputError,
    PipelineCallError,
    ScheduleError,
    UnsupportedPipelineError,
)
from difa_compile.passes.analysed_model import AnalysedModel
from difa_compile.passes.caches import CacheName
from difa_compile.pipeline.apply import apply, remove
from difa_compile.plan.plan import Plan
from difa_compile.planner.make import plan_from_table
from difa_compile.planner.table import ErrorTable
from tests.support.slow_search import LAYERS, inputs, interrupted_after
from tests.support.tiny_pipelines import PlainSites, sample, tiny_pipeline

STEPS = 5
BAND = Window("band", 2)
WINDOW = Decision.parse("window(band:2)")
TRIED = (
    WINDOW,
    *map(Decision.parse, ("full+cfg", "window(band:2)+cfg", "heads(0:window(band:2);1:full)")),
    Decision.parse("heads(0,2-3:window(band:2);1:full)"),  # of both sites: the second one has a window in both heads
)
RESIDUALS = tuple(map(Decision.parse, ("window(band:2)+residual", "window(band:2)+residual+cfg")))
CLOSE = 1e-4
"""Of the largest number: effects are small differences of outputs that agree to some 1e-6 in float32."""


def briefly(pipe, given=None, steps=STEPS, **options):
    """Measure with the rewritten graphs run eagerly, without progress bar."""
    return measure(pipe, given or inputs(), steps, **{"progress": False, "inner": "eager", **options})


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the usual pipeline's table lies, of blocks and attention."""
    torch._dynamo.reset()
    path = tmp_path_factory.mktemp("kept") / "errors.json"
    briefly(tiny_pipeline(layers=LAYERS), decisions=(*TRIED, *RESIDUALS), state=path)
    return path


@pytest.fixture(scope="module")
def whole(kept):
    return ErrorTable.load(kept)


@pytest.fixture
def state(kept, tmp_path):
    """A copy of that file."""
    return shutil.copy(kept, tmp_path / "errors.json")


# Projections


def test_a_projection_keeps_mean_squares_and_sums():
    project = Projection(512)
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 1, 8, 8), (1, 4, 32, 32), (2, 16, 3, 24, 24)):
        a, b = (torch.randn(shape, generator=generator) for _ in range(2))
        assert project(a).shape == (512,)
        assert project(a).dtype == torch.float64
        # Squared sizes are right to sqrt(2 / 512), six per cent; three times that is given.
        assert project(a).square().sum() == pytest.approx(a.square().mean().item(), rel=0.19)
        assert torch.allclose(project(a) + 3 * project(b), project(a + 3 * b), atol=1e-6)
        assert torch.equal(project(a), Projection(512)(a)), "it depends on more than the size"
    few = torch.randn(2, 1, 8, 8)  # fewer numbers than it keeps: nothing is lost
    assert project(few).square().sum() == pytest.approx(few.square().mean().item(), rel=1e-6)


# Effects


class Recorded:
    """Every call of a transformer in a run, with what each block added to its streams."""

    def __init__(self, model, blocks):
        self.model, self.blocks = model, blocks
        self.calls, self.deltas, self.outputs = [], [], []

    def run(self, call):
        forward = self.model.forward

        def noting(*args, **kwargs):
            copied = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
            self.calls.append((tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args), copied))
            deltas, hooks = {}, []
            for index, block in enumerate(self.blocks):
                hooks.append(block.register_forward_hook(self.noted(index, deltas), with_kwargs=True))
            output = forward(*args, **kwargs)
            for hook in hooks:
                hook.remove()
            self.deltas.append(deltas)
            self.outputs.append(first(output))
            return output

        self.model.forward = noting
        try:
            return call()
        finally:
            del self.model.forward

    def noted(self, index, deltas):
        def hook(block, args, kwargs, output):
            deltas[index] = [after - before for after, before in zip(parts(output), streams(args, kwargs), strict=True)]

        return hook

    def again(self, number, earlier):
        """What changes of the output of call ``number`` if its blocks add what they added in call ``earlier``."""
        args, kwargs = self.calls[number]
        for index, block in enumerate(self.blocks):
            block.forward = self.left_out(self.deltas[earlier][index])
        try:
            with torch.no_grad():
                return first(self.model(*args, **kwargs)) - self.outputs[number]
        finally:
            for block in self.blocks:
                del block.forward

    @staticmethod
    def left_out(deltas):
        def forward(*args, **kwargs):
            found = [before + delta for before, delta in zip(streams(args, kwargs, len(deltas)), deltas, strict=True)]
            return tuple(found) if len(found) > 1 else found[0]

        return forward


def first(output):
    return output[0] if isinstance(output, tuple) else output.sample


def parts(output):
    return output if isinstance(output, tuple) else (output,)


def streams(args, kwargs, count=None):
    """What goes into a block, in the order in which it comes out: FLUX gives the text first."""
    hidden = args[0] if args else kwargs["hidden_states"]
    text = kwargs.get("encoder_hidden_states")
    joint = text is not None and "image_rotary_emb" in kwargs
    return (text, hidden) if joint else (hidden,)


def assert_near(found, wanted):
    assert wanted.any()
    assert np.abs(found - wanted).max() <= CLOSE * np.abs(wanted).max()


def assert_drift(unit, wanted):
    """``wanted(step, lag)``: the guided change of the output."""
    project = Projection(512)
    for step in range(STEPS):
        for i, lag in enumerate(unit.lags):
            if lag <= step:
                assert_near(unit.drift[step, i], project(wanted(step, lag)).numpy())
            else:
                assert not unit.drift[step, i].any()


def test_blocks_of_a_guided_batch(pipe, whole):
    recorded = Recorded(pipe.transformer, list(pipe.transformer.transformer_blocks))
    recorded.run(lambda: pipe(**inputs(), num_inference_steps=STEPS))
    assert len(recorded.calls) == STEPS
    (unit,) = (unit for unit in whole.units if unit.name == "blocks")
    assert unit.lags == tuple(range(1, LAGS + 1))
    assert unit.inside is None
    assert [whole.sites[site].blocks for site in unit.sites] == [("transformer_blocks.0", "transformer_blocks.1")]

    def wanted(step, lag):
        conditional, other = recorded.again(step, step - lag).chunk(2)
        return 4 * conditional - 3 * other

    assert_drift(unit, wanted)
    change = wanted(3, 2)
    assert (unit.drift[3, 1] ** 2).sum() == pytest.approx(change.square().mean().item(), rel=1e-3)
    each = change.flatten(1).square().mean(1)
    assert unit.spread[3, 1] == pytest.approx((each.std(correction=0) / each.mean()).item(), rel=1e-2)


def test_attention_alone_and_other_decisions(pipe, whole):
    """Attention written out plainly: that of earlier steps in its place, only what is near, half of the batch."""
    (unit,) = (unit for unit in whole.units if unit.name == "attention")
    assert unit.lags == ATTENTION_LAGS
    assert ATTENTION_LAGS[-1] == LAGS, "as far back as blocks are"
    assert whole.units[unit.inside].name == "blocks"
    assert [whole.sites[site].path for site in unit.sites] == [
        f"transformer_blocks.{block}.attn1" for block in range(LAYERS)
    ]
    plain = PlainSites(pipe.transformer, half=0, residual_window=BAND)
    written, outputs, changes = [], [], {}

    def guided(change):
        conditional, other = change.chunk(2)
        return 4 * conditional - 3 * other

    def forward(*args, **kwargs):
        output, caches = plain.call([Decision(Kind.FULL)] * LAYERS, kwargs, {}, args)
        step = len(written)
        for lag in ATTENTION_LAGS:
            if lag <= step:
                tried, _ = plain.call([REUSE] * LAYERS, kwargs, written[-lag], args)
                changes[step, lag] = guided(tried.sample - output.sample)
        for decision in TRIED:
            tried, _ = plain.call(decision.at_sites([2] * LAYERS), kwargs, {}, args)
            changes[step, decision] = guided(tried.sample - output.sample)
        for decision in RESIDUALS:
            for age in AGES:
                if age <= step:
                    tried, _ = plain.call([decision] * LAYERS, kwargs, written[-age], args)
                    changes[step, decision, age] = guided(tried.sample - output.sample)
        written.append(caches)
        outputs.append(output.sample)
        return output

    pipe.transformer.forward = forward
    pipe(**inputs(), num_inference_steps=STEPS)
    del pipe.transformer.forward
    assert_drift(unit, lambda step, lag: changes[step, lag])
    assert list(unit.computed) == list(TRIED)
    for decision in TRIED:
        for step in range(STEPS):
            assert_near(unit.computed[decision][step], Projection(512)(changes[step, decision]).numpy())
    assert (list(unit.residual), unit.ages) == (list(RESIDUALS), AGES)
    for decision in RESIDUALS:
        for step in range(STEPS):
            for i, age in enumerate(AGES):
                if age <= step:
                    wanted = Projection(512)(changes[step, decision, age]).numpy()
                    assert_near(unit.residual[decision][step, i], wanted)
                else:
                    assert not unit.residual[decision][step, i].any()
    sizes = {decision: np.square(unit.computed[decision]).sum() for decision in TRIED}
    assert len(set(sizes.values())) == len(TRIED)


@pytest.mark.slow
def test_without_guidance_nothing_is_weighed(pipe):
    table = briefly(pipe, {**inputs(), "guidance_scale": 1.0})
    assert (table.settings.guidance, table.settings.conditional_half) == ("none", None)
    recorded = Recorded(pipe.transformer, list(pipe.transformer.transformer_blocks))
    recorded.run(lambda: pipe(**inputs(), num_inference_steps=STEPS, guidance_scale=1.0))
    assert_drift(table.units[0], lambda step, lag: recorded.again(step, step - lag))


@pytest.mark.slow
def test_guidance_in_two_calls(tmp_path):
    """Wan: each call goes on from its own outputs, and both changes make that of the guided output."""
    pytest.importorskip("transformers", reason="text encoders of whole pipelines")
    from tests.support.video_components import wan

    tiny = wan(tmp_path)
    given = {name: value for name, value in tiny.arguments.items() if name != "num_inference_steps"}
    given["generator"] = torch.Generator().manual_seed(3)
    table = briefly(tiny.pipe, given)
    assert table.settings.guidance == "two-call"
    assert table.calls == 2
    recorded = Recorded(tiny.pipe.transformer, list(tiny.pipe.transformer.blocks))
    recorded.run(lambda: tiny.pipe(**given, num_inference_steps=STEPS, output_type="latent"))
    assert len(recorded.calls) == 2 * STEPS

    def wanted(step, lag):
        conditional = recorded.again(2 * step, 2 * (step - lag))
        other = recorded.again(2 * step + 1, 2 * (step - lag) + 1)
        return 4 * conditional - 3 * other

    assert_drift(table.units[0], wanted)


@pytest.mark.slow
def test_guidance_that_is_an_input_of_the_model():
    """FLUX: one call without halves, and two streams through its blocks."""
    pytest.importorskip("transformers", reason="text encoders of whole pipelines")
    from tests.support.image_cases import CASES

    case = CASES["flux"]
    pipe = case.make()
    given = {**case.inputs(), "generator": torch.Generator().manual_seed(3)}
    table = briefly(pipe, given)
    assert table.settings.guidance == "none"
    assert table.calls == 1
    transformer = pipe.transformer
    recorded = Recorded(transformer, [*transformer.transformer_blocks, *transformer.single_transformer_blocks])
    recorded.run(lambda: pipe(**given, num_inference_steps=STEPS))
    assert_drift(table.units[0], lambda step, lag: recorded.again(step, step - lag))


@pytest.mark.slow
def test_the_measured_run_is_the_plain_one(pipe, monkeypatch):
    given = inputs()
    before = given["generator"].get_state()
    seen = []
    plainly = module.sample_with
    monkeypatch.setattr(module, "sample_with", lambda *a, **k: seen.append(plainly(*a, **k)))
    briefly(pipe, given, decisions=[WINDOW])
    assert torch.equal(given["generator"].get_state(), before)
    wanted = pipe(**given, num_inference_steps=STEPS, output_type="latent")
    assert np.allclose(np.asarray(seen[0].images), np.asarray(wanted.images), atol=1e-5)


# Streams and guidance


class OwnLoop(DiTPipeline):
    """A sampling loop of its own: ``scales`` guide each step (1: one call alone), and the second transformer, where
    there is one, takes over at a step ``switch``."""

    @torch.no_grad()
    def __call__(self, class_labels, scales, switch=99, num_inference_steps=2, generator=None, output_type="pil"):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(len(class_labels), 1, 8, 8, generator=generator)
        for step, t in enumerate(self.scheduler.timesteps):
            model = self.transformer if step < switch else self.transformer_2

            def noise(labels, model=model, t=t, latents=latents):
                return first(model(latents, timestep=t.expand(len(labels)), class_labels=torch.tensor(labels)))

            guided = noise(class_labels)
            if scales[step] != 1:
                guided = scales[step] * guided + (1 - scales[step]) * noise([1000] * len(class_labels))
            latents = self.scheduler.step(guided, t, latents).prev_sample
        return (latents,)


def looped(pipe, **arguments):
    """The pipeline with this loop, and what to call it with."""
    pipe.__class__ = OwnLoop
    return pipe, {"class_labels": [1, 2], "scales": [1] * STEPS, "generator": seeded(), **arguments}


def seeded():
    return torch.Generator().manual_seed(3)


def quick_to_leave_out(table):
    """With made-up times, since those of so small a model say nothing."""
    seconds = {name: 0.1 if "reuse" in name or "forecast" in name else 1.0 for name in table.seconds} | {"pipeline": 0}
    return table.with_seconds(seconds, table.calls, table.machine)


def rows_of_a_run(pipe, plan, call, monkeypatch):
    """What each call of the model did at each site of the plan, and what had to be promoted."""
    rows = []
    compiled_row = Capture.compiled_row

    def noting(self, roles):
        rows.append(tuple(role.decision for role in roles))
        return compiled_row(self, roles)

    monkeypatch.setattr(Capture, "compiled_row", noting)
    applied = apply(pipe, plan, inner="eager")
    call()
    monkeypatch.undo()
    remove(pipe)
    assert [record for record in applied.records if record.outcome == "skipped"] == []
    return rows, applied.last_run.promotions


def assert_promises_are_kept(pipe, table, call, monkeypatch):
    """Plans of many budgets compute in a run what they said they would, at every step and site."""
    table = quick_to_leave_out(table)
    for budget in (0.5, 0.7, 0.85):
        plan = plan_from_table(table, budget=budget)
        assert all(plan.decisions[begin] == (FULL,) * len(plan.sites) for begin in table.begins)
        assert any(decision.kind.reads == "output" for row in plan.decisions for decision in row)
        rows, promoted = rows_of_a_run(pipe, plan, call, monkeypatch)
        assert promoted == ()
        assert rows == [row for row in plan.decisions for _ in range(table.calls)]


def test_another_model_that_takes_over_begins_anew(pipe, monkeypatch):
    """Measured, planned and run: nothing is read across the step at which the second model begins."""
    pipe.transformer_2 = tiny_pipeline(seed=5, layers=LAYERS).transformer
    pipe, given = looped(pipe, switch=2)
    table = briefly(pipe, given)
    assert table.begins == (2,)
    (unit,) = table.units
    tried = (unit.drift != 0).any(2)
    assert [row[:4].tolist() for row in tried] == [
        [False] * 4,
        [True, False, False, False],
        [False] * 4,
        [True, False, False, False],
        [True, True, False, False],
    ]
    assert_promises_are_kept(pipe, table, lambda: pipe(**given, num_inference_steps=STEPS), monkeypatch)


@pytest.mark.slow
def test_the_two_experts_of_wan(tmp_path, monkeypatch):
    """With a scale of its own for the second one, which no argument tells of both."""
    pytest.importorskip("transformers", reason="text encoders of whole pipelines")
    from tests.families.test_video_pipelines import wan_with_experts

    tiny = wan_with_experts(tmp_path)
    given = {name: value for name, value in tiny.arguments.items() if name != "num_inference_steps"}
    given |= {"generator": seeded(), "guidance_scale_2": 2.5}
    steps = 6
    table = briefly(tiny.pipe, given, steps=steps)
    (begin,) = table.begins
    assert 0 < begin < steps - 1
    assert table.calls == 2
    (unit,) = table.units
    assert not unit.drift[begin].any()
    call = {**given, "num_inference_steps": steps, "output_type": "latent"}
    early, late = (Recorded(model, list(model.blocks)) for model in (tiny.pipe.transformer, tiny.pipe.transformer_2))
    early.run(lambda: late.run(lambda: tiny.pipe(**call)))
    for recorded, first_step, count, scale in ((early, 0, begin, 4.0), (late, begin, steps - begin, 2.5)):
        for step in range(count):
            for lag in range(1, step + 1):
                conditional = recorded.again(2 * step, 2 * (step - lag))
                other = recorded.again(2 * step + 1, 2 * (step - lag) + 1)
                wanted = Projection(512)(scale * conditional + (1 - scale) * other).numpy()
                assert_near(unit.drift[first_step + step, lag - 1], wanted)
    assert_promises_are_kept(tiny.pipe, table, lambda: tiny.pipe(**call), monkeypatch)


@pytest.mark.slow
def test_guidance_in_an_interval(pipe, monkeypatch):
    """The other call begins at the third step, and ends; each step is guided as what the scheduler gets shows."""
    scales = [1, 1, 3.0, 5.0, 1]
    pipe, given = looped(pipe, scales=scales)
    table = briefly(pipe, given)
    assert table.begins == (2,)
    recorded = Recorded(pipe.transformer, list(pipe.transformer.transformer_blocks))
    recorded.run(lambda: pipe(**given, num_inference_steps=STEPS))
    calls = {0: [0], 1: [1], 2: [2, 3], 3: [4, 5], 4: [6]}
    (unit,) = table.units
    project = Projection(512)
    assert_near(unit.drift[1, 0], project(recorded.again(1, 0)).numpy())
    guided = 5 * recorded.again(4, 2) - 4 * recorded.again(5, 3)
    assert_near(unit.drift[3, 0], project(guided).numpy())
    assert_near(unit.drift[4, 1], project(recorded.again(calls[4][0], calls[2][0])).numpy())
    assert not unit.drift[2].any()
    plan = plan_from_table(quick_to_leave_out(table), budget=0.7)
    rows, promoted = rows_of_a_run(pipe, plan, lambda: pipe(**given, num_inference_steps=STEPS), monkeypatch)
    assert promoted == ()
    assert rows == [row for row, each in zip(plan.decisions, calls.values(), strict=True) for _ in each]


@pytest.mark.slow
def test_guidance_by_scales_that_no_call_tells(pipe):
    """One batch, guided by another scale for each image and step, against what is stated."""
    scales = torch.tensor([2.0, 6.0]).reshape(2, 1, 1, 1)

    class PerImage(DiTPipeline):
        @torch.no_grad()
        def __call__(self, class_labels, guidance_scale, num_inference_steps=2, generator=None):
            self.scheduler.set_timesteps(num_inference_steps)
            latents = torch.randn(2, 1, 8, 8, generator=generator)
            labels = torch.tensor([*class_labels, 1000, 1000])
            for number, t in enumerate(self.scheduler.timesteps):
                noise = self.transformer(torch.cat([latents] * 2), timestep=t.expand(4), class_labels=labels).sample
                conditional, other = noise.chunk(2)
                scale = torch.tensor(guidance_scale).reshape(2, 1, 1, 1) + number
                latents = self.scheduler.step(other + scale * (conditional - other), t, latents).prev_sample

    pipe.__class__ = PerImage
    given = {"class_labels": [1, 2], "guidance_scale": [2.0, 6.0], "generator": seeded()}
    table = briefly(pipe, given)
    recorded = Recorded(pipe.transformer, list(pipe.transformer.transformer_blocks))
    recorded.run(lambda: pipe(**given, num_inference_steps=STEPS))

    def wanted(number, lag):
        conditional, other = recorded.again(number, number - lag).chunk(2)
        return other + (scales + number) * (conditional - other)

    assert_drift(table.units[0], wanted)


class TwoOutputs(DiTTransformer2DModel):
    """A model with something beside its sample."""

    def forward(self, *args, **kwargs):
        sample = super().forward(*args, **kwargs).sample
        return sample, 3 * sample[:, :, :4, 0]


@pytest.fixture
def with_sound(pipe):
    pipe.transformer.__class__ = TwoOutputs
    return pipe


def test_a_second_output_counts_as_much_as_the_first(with_sound):
    pipe, given = looped(with_sound)
    table = briefly(pipe, given, steps=2)
    recorded = Recorded(pipe.transformer, list(pipe.transformer.transformer_blocks))
    recorded.run(lambda: pipe(**given, num_inference_steps=2))
    change = recorded.again(1, 0)
    sizes = change.square().mean(), (3 * change[:, :, :4, 0]).square().mean()
    assert sizes[1] > 2 * sizes[0]
    found = np.square(table.units[0].drift[1, 0]).sum()
    assert found == pytest.approx(sum(sizes).item() / 2, rel=0.2)  # few of its numbers fall into one


def test_several_outputs_that_are_guided_are_refused(with_sound):
    pipe, given = looped(with_sound, scales=[4.0] * STEPS)
    with pytest.raises(CalibrationError, match=r"TwoOutputs gives 2 outputs .*measure it without guidance"):
        briefly(pipe, given)


def test_what_no_trial_takes_any_more_is_let_go():
    """Outputs of attention after as many steps as attention is tried, those of blocks later."""
    stream = Stream(0)
    block, attention = CacheName.output("blocks.0", 0), CacheName.output("blocks.0.attn", 0)
    for step in range(6):
        written = {block: torch.full((1,), step), attention: torch.full((1,), step)}
        stream.keep(step, written, [(4, {"blocks.0"}), (2, {"blocks.0.attn"})])
    assert stream.last == 5
    assert [{name: value.item() for name, value in outputs.items()} for outputs in stream.history] == [
        {block: 5, attention: 5},
        {block: 4, attention: 4},
        {block: 3},
        {block: 2},
    ]
    alone = Stream(0)
    for step in range(6):
        alone.keep(step, {attention: torch.zeros(1)}, [(2, {"blocks.0.attn"})])
    assert len(alone.history) == 2


# The table


def test_the_table_makes_plans_that_run(pipe, whole):
    assert whole.complete
    pipe.scheduler.set_timesteps(STEPS)
    assert whole.progress == tuple(t / 1000 for t in pipe.scheduler.timesteps.tolist())
    assert set(whole.seconds) >= {"full", "blocks filled", "blocks reuse", "attention reuse", "pipeline"}
    assert all(value >= 0 for value in whole.seconds.values())
    assert (whole.settings.method, whole.settings.guidance, whole.settings.conditional_half) == (
        "planned",
        "batched",
        0,
    )
    # Times of so small a model say nothing: made-up ones stand for them.
    seconds = {name: 0.1 if "reuse" in name or "forecast" in name else 1.0 for name in whole.seconds} | {"pipeline": 0}
    seconds |= {name: 0.8 for name in seconds if name.startswith("attention ")}
    plan = plan_from_table(replace(whole, seconds=seconds), budget=0.7)
    assert isinstance(plan, Plan)
    assert any(decision.kind.reads == "output" for row in plan.decisions for decision in row)
    full = sample(pipe, steps=STEPS)
    applied = apply(pipe, plan, inner="eager")
    assert not np.array_equal(sample(pipe, steps=STEPS), full)
    assert [record for record in applied.records if record.outcome == "skipped"] == []


def test_rows_are_timed_all_over_the_run(pipe, monkeypatch):
    monkeypatch.setattr(module, "ROUNDS", 2)
    steps = []
    rows = Measuring._timed_rows
    monkeypatch.setattr(Measuring, "_timed_rows", lambda self, *given: steps.append(self._step) or rows(self, *given))
    briefly(pipe)
    assert steps == [1, 3]


def test_rows_are_timed_where_another_graph_takes_over_at_once(pipe):
    config = {**tiny_pipeline(layers=LAYERS).transformer.config, "activation_fn": "geglu"}
    pipe.transformer_2 = DiTTransformer2DModel.from_config(config).eval()
    pipe, given = looped(pipe, switch=1)
    assert "full" in briefly(pipe, given).seconds


@pytest.mark.parametrize("calls", [1, 2])
def test_what_measuring_does_is_no_time_of_the_pipeline(pipe, monkeypatch, calls):
    """By a clock on which a step of the scheduler takes 1, and working out an effect 100."""
    clock = SimpleNamespace(now=1.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def taking(seconds, function):
        @functools.wraps(function)
        def call(*given, **named):
            clock.now += seconds
            return function(*given, **named)

        return call

    monkeypatch.setattr(module, "guided_change", taking(100, module.guided_change))
    scheduler = type(pipe.scheduler)
    monkeypatch.setattr(scheduler, "step", taking(1, scheduler.step))
    table = briefly(*looped(pipe, scales=[4.0 if calls == 2 else 1.0] * STEPS))
    assert table.calls == calls
    assert table.seconds["pipeline"] == pytest.approx(1 + 1 / STEPS)


def test_one_image_has_no_spread_and_its_table_is_read_again(pipe, tmp_path):
    table = briefly(pipe, inputs(labels=[1]), steps=3, state=tmp_path / "errors.json")
    assert not any(unit.spread.any() for unit in table.units)
    assert ErrorTable.load(tmp_path / "errors.json").complete


@pytest.mark.slow
def test_one_step_has_nothing_to_reuse(pipe):
    table = briefly(pipe, steps=1)
    assert table.complete
    assert not table.units[0].drift.any()
    assert "full" in table.seconds


@pytest.mark.slow
def test_a_scheduler_of_second_order_has_a_step_per_call(pipe):
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    assert len(briefly(pipe, steps=3).progress) == 5


@pytest.mark.slow
def test_attention_is_measured_where_it_is_asked_for(pipe):
    assert [unit.name for unit in briefly(pipe, steps=2).units] == ["blocks"]
    units = briefly(pipe, steps=2, attention=True).units
    assert [(unit.name, [str(each) for each in unit.computed]) for unit in units] == [
        ("blocks", []),
        ("attention", ["full+cfg"]),
    ]
    (unit,) = briefly(pipe, steps=2, decisions=["window(band:2)"], attention=False).units
    assert unit.name == "blocks"


@pytest.mark.slow
def test_attention_is_measured_where_no_block_can_be_left_out(pipe, monkeypatch):
    only(monkeypatch, lambda model, unit: unit < len(model.sites))
    (unit,) = briefly(pipe, steps=3).units
    assert (unit.name, unit.inside) == ("attention", None)
    assert unit.drift[2, 0].any()


def only(monkeypatch, able):
    """Units for which ``able(model, unit)`` is false refuse everything."""
    why_not = AnalysedModel.why_not

    def asked(self, unit, decision):
        return why_not(self, unit, decision) if able(self, unit) else "it is told to refuse"

    monkeypatch.setattr(AnalysedModel, "why_not", asked)


# Going on


def without_times(table):
    content = table._content()
    return {**content, "seconds": sorted(content["seconds"])}


@pytest.mark.parametrize("done", [3, *[pytest.param(each, marks=pytest.mark.slow) for each in (0, 1)]])
def test_goes_on_after_an_interrupt_as_if_nothing_had_happened(pipe, whole, tmp_path, monkeypatch, done):
    state = tmp_path / "errors.json"
    with interrupted_after(pipe, done), pytest.raises(KeyboardInterrupt) as caught:
        briefly(pipe, decisions=(*TRIED, *RESIDUALS), state=state)
    assert f"measurement interrupted after {done} of {STEPS} steps" in caught.value.__notes__[0]
    assert (str(state) in caught.value.__notes__[0]) == (done > 0)
    assert state.exists() == (done > 0)
    assert type(pipe) is DiTPipeline
    tried, rounds = [], []
    finished = Measuring.finished
    monkeypatch.setattr(Measuring, "finished", lambda self: rounds.append(self._rounds) or finished(self))
    try_all = Measuring._try_all
    monkeypatch.setattr(Measuring, "_try_all", lambda self, *given: tried.append(given[4]) or try_all(self, *given))
    assert without_times(briefly(pipe, decisions=(*TRIED, *RESIDUALS), state=state)) == without_times(whole)
    assert tried == list(range(done, STEPS))
    assert rounds == [module.ROUNDS], "those of before the interruption were not all"
    assert without_times(ErrorTable.load(state)) == without_times(whole)
    monkeypatch.setattr(Measuring, "call", lambda *_: pytest.fail("what is complete is measured again"))
    assert without_times(briefly(pipe, decisions=(*TRIED, *RESIDUALS), state=state)) == without_times(whole)
    assert state.exists()


def test_groups_of_heads_are_ranked_once_and_tried(pipe, tmp_path, monkeypatch):
    """Beside the decisions that are named, and no others after an interruption, when nothing is ranked again."""
    state = tmp_path / "errors.json"
    given = {"decisions": ["full+cfg"], "heads": ["band:2", "band:4"], "steps": 3, "state": state}
    with interrupted_after(pipe, 5), pytest.raises(KeyboardInterrupt):  # three steps are of the short call
        briefly(pipe, **given)
    begun = ErrorTable.load(state)
    assert not begun.complete
    monkeypatch.setattr(module, "HeadRanking", lambda *given: pytest.fail("heads are ranked again"))
    table = briefly(pipe, **given)
    (unit,) = (unit for unit in table.units if unit.name == "attention")
    (before,) = (unit for unit in begun.units if unit.name == "attention")
    assert list(unit.computed) == list(before.computed)
    shared, *groups = unit.computed
    assert str(shared) == "full+cfg"
    assert groups
    assert all(decision.windows and len(decision.forms) == 2 * LAYERS for decision in groups)
    assert all(values[-1].any() for values in unit.computed.values())


@pytest.mark.slow
def test_a_measurement_that_is_done_is_not_made_again(pipe, whole, state, monkeypatch):
    monkeypatch.setattr(Measuring, "_try_all", lambda *given: pytest.fail("it is measured"))
    assert briefly(pipe, decisions=(*TRIED, *RESIDUALS), state=state)._content() == whole._content()


@pytest.mark.slow
def test_the_default_state_is_found_again_and_deleted(pipe, whole, cache_home):
    with interrupted_after(pipe, 3), pytest.raises(KeyboardInterrupt):
        briefly(pipe, decisions=(*TRIED, *RESIDUALS))
    assert len(list(cache_home.rglob("*.json"))) == 1
    assert without_times(briefly(pipe, decisions=(*TRIED, *RESIDUALS))) == without_times(whole)
    assert not list(cache_home.rglob("*.json"))


def test_a_table_of_another_measurement_is_refused_and_left_alone(pipe, state):
    before = state.read_bytes()
    same = {"decisions": (*TRIED, *RESIDUALS), "state": state}
    for what, call in {
        "settings": lambda: briefly(pipe, state=state),
        "settings differ": lambda: briefly(pipe, steps=3, **same),
        "inputs": lambda: briefly(pipe, inputs(seed=4), **same),
        "weights": lambda: briefly(tiny_pipeline(seed=9, layers=LAYERS), **same),
        "model config_digest": lambda: briefly(tiny_pipeline(layers=3), **same),
        "scheduler": lambda: briefly(tiny_pipeline(layers=LAYERS, scheduler=HeunDiscreteScheduler()), **same),
    }.items():
        with pytest.raises(CalibrationStateError, match=f"{what}.*name another file, or delete it"):
            call()
    assert state.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: {"progress": tuple(0.99 * each for each in table.progress)}, "has another schedule than this"),
        (lambda table: {"sites": (replace(table.sites[0], tokens=17, layout=None), *table.sites[1:])}, "other sites"),
    ],
)
def test_a_table_of_another_schedule_or_grid_is_not_gone_on_with(pipe, whole, tmp_path, change, message):
    """Under the same identity: what a pipeline makes of the same call may have changed."""
    replace(whole, done=2, **change(whole)).save(tmp_path / "errors.json")
    with pytest.raises(CalibrationStateError, match=f"{message}.*; name another file, or delete it"):
        briefly(pipe, decisions=(*TRIED, *RESIDUALS), state=tmp_path / "errors.json")


def test_a_damaged_state_is_refused(pipe, state):
    document = json.loads(state.read_text())
    state.write_text(json.dumps({**document, "done": 1}))
    with pytest.raises(ErrorTableError, match="changed after it was written"):
        briefly(pipe, decisions=(*TRIED, *RESIDUALS), state=state)


# What goes wrong


@pytest.mark.parametrize("steps", [0, -3, 2.5, True, math.nan])
def test_no_steps(pipe, steps):
    with pytest.raises(ScheduleError, match="at least 1"):
        briefly(pipe, steps=steps)


@pytest.mark.parametrize("decision", ["32", "window(cone:3)", "window(band:0)", "heads(0:full)", ""])
def test_decisions_that_do_not_exist(pipe, decision):
    with pytest.raises(DecisionError):
        briefly(pipe, decisions=[decision])


@pytest.mark.parametrize("decision", ["full", "reuse", "forecast:1"])
def test_decisions_that_are_measured_in_any_case(pipe, decision):
    with pytest.raises(DecisionError, match="part of every measurement"):
        briefly(pipe, decisions=[decision])


@pytest.mark.parametrize("decision", ["heads(0:window(band:2)+residual;1:full)", "heads(0:reuse;1:full)"])
def test_decisions_by_heads_that_read_caches_are_not_planned(pipe, decision):
    with pytest.raises(DecisionError, match="which is not planned"):
        briefly(pipe, decisions=[decision])


def test_groups_of_heads_that_do_not_add_up(pipe):
    with pytest.raises(DecisionError, match=r"names 3 heads, but the sites have .*2, 2.*, 4 together"):
        briefly(pipe, decisions=["heads(0:window(band:2);1-2:full)"])


def test_windows_of_heads_that_make_no_sense(pipe):
    with pytest.raises(DecisionError, match="cone"):
        briefly(pipe, heads=["cone:2"])
    with pytest.raises(DecisionError, match="attention is not to be measured"):
        briefly(pipe, heads=["band:2"], attention=False)


def test_halves_that_do_not_come_as_one_batch_cannot_be_shared(pipe):
    with pytest.raises(CalibrationError, match="no batch of two halves"):
        briefly(pipe, {**inputs(), "guidance_scale": 1.0}, decisions=["full+cfg"])


def test_a_window_that_cannot_be_tried_is_refused_with_the_reason(pipe, monkeypatch):
    why_not = AnalysedModel.why_not

    def no_windows(self, unit, decision):
        return "an attention mask" if unit == 1 and decision.window else why_not(self, unit, decision)

    monkeypatch.setattr(AnalysedModel, "why_not", no_windows)
    with pytest.raises(CalibrationError, match=r"window\(band:2\) cannot be tried at .*1\.attn1: an attention mask"):
        briefly(pipe, decisions=[WINDOW])


def test_a_model_of_which_nothing_can_be_reused(pipe, monkeypatch):
    only(monkeypatch, lambda model, unit: False)
    with pytest.raises(CalibrationError, match="nothing in this model can be reused"):
        briefly(pipe)
    assert type(pipe) is DiTPipeline


def test_nan_in_the_model_names_the_step(pipe):
    with torch.no_grad():
        pipe.transformer.proj_out_2.bias[0] = math.nan
    with pytest.raises(NonFiniteError, match="step 0, all sites full"):
        briefly(pipe)
    assert type(pipe) is DiTPipeline


def test_a_call_that_the_pipeline_does_not_take(pipe, tmp_path):
    with pytest.raises(PipelineCallError):
        briefly(pipe, {**inputs(), "no_such_argument": 1}, state=tmp_path / "errors.json")
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_cannot_be_written_shows_at_once(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((OutputError, ErrorTableError)):
        briefly(pipe, state=tmp_path / "file" / "errors.json")


def test_a_pipeline_with_a_plan(pipe, whole):
    apply(pipe, plan_from_table(whole, budget=1.0), inner="eager")
    with pytest.raises(NotAppliedError, match="call remove"):
        briefly(pipe)


@pytest.mark.slow
def test_pipelines_that_do_not_go_through_the_schedule_once(pipe):
    class Stops(DiTPipeline):
        @torch.no_grad()
        def __call__(self, class_labels, num_inference_steps=2, turns=1, most=1):
            for _ in range(turns):
                self.scheduler.set_timesteps(num_inference_steps)
                latents = torch.zeros(2, 1, 8, 8)
                for t in self.scheduler.timesteps[:most]:
                    labels = torch.tensor([1, 1000])
                    noise = self.transformer(latents, timestep=t.expand(2), class_labels=labels).sample
                    latents = self.scheduler.step(noise, t, latents).prev_sample

    pipe.__class__ = Stops
    with pytest.raises(CalibrationError, match=f"ended after 1 of {STEPS} steps"):
        briefly(pipe, {"class_labels": [1]})
    with pytest.raises(UnsupportedPipelineError, match="more than once"):
        briefly(pipe, {"class_labels": [1], "turns": 2, "most": 9})


# Scales


class Scaled:
    def __call__(self, prompt, guidance_scale=7.5):
        pass


class Unscaled:
    def __call__(self, prompt):
        pass


class TrueScale:
    def __call__(self, prompt, true_cfg_scale=1.0, guidance_scale=3.5):
        pass


@pytest.mark.parametrize(
    ("pipe", "call", "scale"),
    [
        (Scaled(), {}, 7.5),
        (Scaled(), {"guidance_scale": 2}, 2.0),
        (Scaled(), {"guidance_scale": [1, 2]}, None),
        (Scaled(), {"guidance_scale": None}, None),
        (TrueScale(), {"guidance_scale": 9.0}, 1.0),
        (TrueScale(), {"true_cfg_scale": 4.0}, 4.0),
        (Unscaled(), {"guidance_scale": 4.0}, 1.0),
    ],
)
def test_the_scale_of_guidance(pipe, call, scale):
    assert guidance_scale(pipe, call) == scale
