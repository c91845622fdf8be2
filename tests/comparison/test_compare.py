"""compare(): same seeds on both sides, honest counts, and a pipeline left as it was found."""

import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

from difa_compile.comparison import compare as module
from difa_compile.comparison.compare import Comparison, compare
from difa_compile.decision import FULL, REUSE
from difa_compile.errors import ComparisonError, ScheduleError, UnsupportedPipelineError
from difa_compile.layout import Layout
from difa_compile.pipeline.rules import plan_from_rule
from difa_compile.plan.data import Cell, Settings, SiteInfo, model_digest
from difa_compile.plan.plan import Plan
from difa_compile.plan.schedule import uniform_progress

STEPS = 4
INPUTS = {"class_labels": [1, 2], "guidance_scale": 4.0}


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=2, sample_size=16
    )
    channels = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (16,))
    blocks = dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1,))
    vae = AutoencoderTiny(in_channels=1, out_channels=1, latent_channels=1, **channels, **blocks)
    # The decoder is a random one, enlarged until its images span grey values: they follow the latents all the same.
    with torch.no_grad():
        vae.decoder.layers[-1].weight.mul_(20)
    return DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())


@pytest.fixture
def plan(pipe):
    """Half of the cells reuse: step 1 and 3."""
    sites = tuple(
        SiteInfo(f"transformer_blocks.{index}.attn1", "self", 2, 8, 64, 16, Layout((8, 8))) for index in range(2)
    )
    rows = tuple((Cell(REUSE if step % 2 else FULL),) * 2 for step in range(STEPS))
    settings = Settings("rule", guidance="batched", conditional_half=0)
    return Plan(model_digest(pipe.transformer), settings, sites, uniform_progress(STEPS), rows)


@dataclass
class Wiring:
    """Stands in for apply and remove: calls of the wired pipeline scale the transformer's output."""

    factor: float = 1.0
    records: tuple = ()
    log: list = field(default_factory=list)
    error: Exception | None = None
    active: bool = False
    allow_slower: bool | None = None

    def apply(self, pipe, plan, *, allow_slower):
        if self.error:
            raise self.error
        self.allow_slower = allow_slower
        self.log.append("apply")
        plain = self.plain = type(pipe)
        wiring = self

        class Wired(plain):
            def __call__(self, **inputs):
                wiring.active = True
                try:
                    return plain.__call__(self, **inputs)
                finally:
                    wiring.active = False

        def scale(module, args, output):
            self.log.append("planned" if self.active else "full")
            if self.active:
                output.sample.mul_(self.factor)

        pipe.__class__ = Wired
        self.handle = pipe.transformer.register_forward_hook(scale)
        skipped = {(record.site, str(record.decision)) for record in self.records if record.outcome == "skipped"}

        def effective(site, decision):
            return FULL if (plan.sites[site].path, str(decision)) in skipped else decision

        captures = [SimpleNamespace(verdicts=SimpleNamespace(effective=effective))]
        return SimpleNamespace(records=self.records, last_run=SimpleNamespace(peak_cache_bytes=4096), captures=captures)

    def remove(self, pipe):
        self.log.append("remove")
        self.handle.remove()
        pipe.__class__ = self.plain


@pytest.fixture
def wiring(monkeypatch):
    stand_in = Wiring()
    monkeypatch.setattr(module, "apply", stand_in.apply)
    monkeypatch.setattr(module, "remove", stand_in.remove)
    return stand_in


def sample(pipe, plan, **changes) -> Comparison:
    settings = {"steps": STEPS, "seeds": (3, 4), "repeats": 2, "backend_full": "eager", "progress": False}
    return compare(pipe, plan, INPUTS, **(settings | changes))


def direct(pipe, seed):
    """Pixels of one plain call of the pipeline."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images = pipe(**INPUTS, num_inference_steps=STEPS, generator=generator, output_type="np").images
    return (images * 255).round().astype(np.uint8)


def rule_plan(pipe, rule):
    return plan_from_rule(pipe, STEPS, lambda step, site: rule(step), inputs=INPUTS)


@pytest.mark.slow
def test_with_the_compiler(pipe):
    """No stand-in: a plan of full changes rounding only, one of reuse is carried out, the pipeline is left clean."""
    transformer, scheduler_class = pipe.transformer, type(pipe.scheduler)
    same = sample(pipe, rule_plan(pipe, lambda step: FULL), backend_full="inductor", seeds=(3,), repeats=1)
    assert same.quality.max_difference < 1e-3
    assert same.attention.share == 1
    assert same.cache_bytes == 0
    assert np.abs(same.images_full.astype(int) - direct(pipe, 3)).max() <= 1

    reused = sample(pipe, rule_plan(pipe, lambda step: REUSE if step % 2 else FULL), repeats=1)
    assert not reused.skips
    assert reused.attention.share == reused.with_projections.share == 0.5
    # Two sites, each with the output of a guided batch of two images: 4 x 64 tokens x 16 channels in fp32.
    assert reused.cache_bytes == 2 * 4 * 64 * 16 * 4
    assert reused.quality.max_difference > same.quality.max_difference
    assert pipe.transformer is transformer
    assert type(pipe) is DiTPipeline
    assert type(pipe.scheduler) is scheduler_class
    assert transformer._compiled_call_impl is None


class FirstPixel(nn.Module):
    """A judge: class 1 if the first pixel is bright, else 2."""

    num_features = 2

    def features(self, images):
        return images.flatten(1)[:, :2]

    def forward(self, images):
        bright = self.features(images)[:, 0] > 0
        return nn.functional.one_hot(torch.where(bright, 1, 2), 3).float()


def test_a_plan_that_changes_nothing_compares_as_equal(pipe, plan, wiring):
    result = sample(pipe, plan, judge=FirstPixel())
    assert result.quality.identical == 4
    assert result.quality.max_difference == 0
    assert result.quality.psnr is None
    assert result.quality.ssim == pytest.approx(1)
    assert result.quality.frechet == pytest.approx(0, abs=1e-5)
    assert result.quality.agreement == 1
    assert result.quality.judged_right_full == result.quality.judged_right_planned
    assert np.array_equal(result.images_full, result.images_planned)


@pytest.mark.parametrize("repeats", [1, 2, 5])
def test_images_come_in_the_order_of_the_seeds(pipe, plan, wiring, repeats):
    seeds = (7, 3, 5)
    result = sample(pipe, plan, seeds=seeds, repeats=repeats)
    assert result.images_full.dtype == np.uint8
    assert result.images_full.shape == (6, 16, 16, 1)
    assert np.array_equal(result.images_full, np.concatenate([direct(pipe, seed) for seed in seeds]))
    assert len(result.full.calls) == len(result.planned.calls) == max(repeats, 2)


def test_a_plan_that_changes_the_output_is_measured(pipe, plan, wiring):
    wiring.factor = 0.5
    result = sample(pipe, plan, judge=FirstPixel(), reference=torch.rand(8, 1, 16, 16))
    full, planned = (x.astype(float) / 255 for x in (result.images_full, result.images_planned))
    errors = np.square(full - planned).mean((1, 2, 3))
    assert result.quality.identical == 0
    # Pixels are rounded to 1/255 in the images and not in the metric.
    assert result.quality.psnr == pytest.approx(float(np.mean(-10 * np.log10(errors))), abs=0.5)
    assert result.quality.psnr_worst <= result.quality.psnr
    assert result.quality.ssim_worst <= result.quality.ssim < 1
    assert result.quality.frechet > 0
    assert result.quality.frechet_full > 0
    assert result.quality.frechet_planned > 0
    bright = full[:, 0, 0, 0] > 0.5
    assert result.quality.judged_right_full == np.mean(np.where(bright, 1, 2) == [1, 2, 1, 2])
    assert np.array_equal(result.images_full[:2], direct(pipe, 3))


def test_the_sides_take_turns(pipe, plan, wiring):
    sample(pipe, plan, seeds=(0,), repeats=2)
    turns = ["planned", "full", "full", "planned", "planned", "full"]
    assert wiring.log == ["apply", *(name for name in turns for _ in range(STEPS)), "remove"]


def test_timing_covers_every_step(pipe, plan, wiring):
    result = sample(pipe, plan)
    for timing in (result.full, result.planned):
        assert len(timing.step_seconds) == STEPS
        assert min(timing.step_seconds) > 0
        assert 0 < timing.seconds_per_step * STEPS <= max(timing.calls)
        assert min(timing.calls) <= timing.call_seconds <= max(timing.calls)
        assert timing.first_call > 0
    assert result.speedup == result.full.call_seconds / result.planned.call_seconds


def test_operations_are_those_of_the_plan(pipe, plan, wiring):
    result = sample(pipe, plan)
    assert result.attention.full_per_step == 2 * 4 * 64**2 * 16
    assert result.attention.planned_per_step == (result.attention.full_per_step, 0) * 2
    assert result.attention.share == result.with_projections.share == 0.5
    assert result.cache_bytes == 4096
    assert result.plan_digest == plan.digest
    assert not result.skips


def test_a_skip_counts_as_full(pipe, plan, wiring):
    skip = SimpleNamespace(site=plan.sites[0].path, decision="reuse", outcome="skipped", reason="for the test")
    done = SimpleNamespace(site=plan.sites[1].path, decision="reuse", outcome="rewritten", reason="")
    wiring.records = (skip, done)
    result = sample(pipe, plan)
    assert result.skips == (skip,)
    assert result.attention.share == 0.75


def test_plan_is_carried_onto_the_asked_number_of_steps(pipe, plan, wiring):
    result = sample(pipe, plan, steps=8)
    assert len(result.attention.planned_per_step) == len(result.full.step_seconds) == 8


@pytest.mark.parametrize("allowed", [False, True])
def test_slower_windows_are_carried_out_only_if_asked(pipe, plan, wiring, allowed):
    sample(pipe, plan, seeds=(0,), repeats=1, allow_slower=allowed)
    assert wiring.allow_slower is allowed


def test_plan_may_be_a_file(pipe, plan, wiring, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert sample(pipe, tmp_path / "plan.json", repeats=1).plan_digest == plan.digest


def test_json_holds_everything_but_the_images(pipe, plan, wiring):
    wiring.records = (SimpleNamespace(site="a", decision=REUSE, outcome="skipped", reason="for the test"),)
    result = sample(pipe, plan)
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["seeds"] == [3, 4]
    assert data["speedup"] == result.speedup
    assert data["full"]["call_seconds"] == result.full.call_seconds
    assert data["planned"]["step_seconds"] == list(result.planned.step_seconds)
    assert data["quality"]["psnr"] is None
    assert data["attention"]["share"] == 0.5
    assert data["records"] == [{"site": "a", "decision": "reuse", "outcome": "skipped", "reason": "for the test"}]
    assert data["dtype"] == "float32"
    assert not any(key.startswith("images_") and key != "images_per_call" for key in data)


def test_inductor_compiles_the_transformer_for_the_time_being(pipe, plan, wiring, monkeypatch):
    calls = []

    def compiler(function, **settings):
        calls.append(settings)
        return lambda *args, **kwargs: calls.append("compiled call") or function(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compiler)
    sample(pipe, plan, backend_full="inductor", seeds=(0,), repeats=1)
    assert calls[0] == {"backend": "inductor", "dynamic": False, "fullgraph": True}
    # The stand-in does not keep its own side off the compiled call, the real apply does.
    assert calls[1:] == ["compiled call"] * (2 * 2 * STEPS)
    assert pipe.transformer._compiled_call_impl is None


def test_a_transformer_that_was_compiled_stays_so(pipe, plan, wiring, monkeypatch):
    def mine(*args, **kwargs):
        return pipe.transformer._call_impl(*args, **kwargs)

    pipe.transformer._compiled_call_impl = mine
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    sample(pipe, plan, backend_full="inductor", repeats=1)
    assert pipe.transformer._compiled_call_impl is mine


def left_as_found(pipe, transformer):
    return (
        pipe.transformer is transformer
        and type(pipe) is DiTPipeline
        and "step" not in vars(pipe.scheduler)
        and "set_timesteps" not in vars(pipe.scheduler)
        and pipe._progress_bar_config == {"desc": "mine"}
    )


def test_the_pipeline_is_left_as_found(pipe, plan, wiring):
    pipe.set_progress_bar_config(desc="mine")
    transformer = pipe.transformer
    sample(pipe, plan)
    assert left_as_found(pipe, transformer)


@pytest.mark.parametrize("when", ["full", "planned"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_pipeline_is_left_as_found_after_an_exception(pipe, plan, wiring, when, error):
    pipe.set_progress_bar_config(desc="mine")
    transformer = pipe.transformer

    def fail(module, args):
        if wiring.active == (when == "planned"):
            raise error("for the test")

    hook = transformer.register_forward_pre_hook(fail)
    with pytest.raises(error, match="for the test"):
        sample(pipe, plan)
    hook.remove()
    assert left_as_found(pipe, transformer)
    assert wiring.log.count("apply") == wiring.log.count("remove") == 1


def test_a_plan_that_does_not_apply_is_not_removed(pipe, plan, wiring):
    wiring.error = ScheduleError("for the test")
    with pytest.raises(ScheduleError, match="for the test"):
        sample(pipe, plan)
    assert "remove" not in wiring.log


def test_a_scheduler_that_is_already_watched_stays_so(pipe, plan, wiring):
    """Whoever follows the steps of the scheduler sees them during compare and after it."""
    seen = []
    original = pipe.scheduler.step

    def follow(*args, **kwargs):
        seen.append(1)
        return original(*args, **kwargs)

    pipe.scheduler.step = follow
    sample(pipe, plan, seeds=(0,), repeats=1)
    assert len(seen) == 4 * STEPS
    assert pipe.scheduler.step is follow


def test_progress_goes_to_the_end(pipe, plan, wiring, capsys):
    sample(pipe, plan, progress=True)
    assert "6/6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"steps": 0}, ScheduleError, "at least one step"),
        ({"seeds": ()}, ComparisonError, "seeds"),
        ({"seeds": (1, 1)}, ComparisonError, "different"),
        ({"repeats": 0}, ComparisonError, "repeats"),
        ({"backend_full": "tvm"}, ComparisonError, "inductor or eager"),
    ],
)
def test_arguments_out_of_range_are_named(pipe, plan, wiring, changes, error, match):
    with pytest.raises(error, match=match):
        sample(pipe, plan, **changes)
    assert not wiring.log


def test_inputs_that_compare_sets_are_refused(pipe, plan, wiring):
    with pytest.raises(ComparisonError, match="generator"):
        compare(pipe, plan, INPUTS | {"generator": None}, steps=STEPS)


def test_what_else_runs_on_the_machine_is_left_out_step_by_step():
    image = torch.zeros(1, 3, 8, 8)
    calls = [module.Call(9.5, (1.0, 5.0, 3.0), image), module.Call(8.25, (4.0, 2.0, 2.0), image)]
    assert module.undisturbed(calls) == 1.0 + 2.0 + 2.0 + 0.25
    assert module.undisturbed(calls[:1]) == 9.5
    with pytest.raises(ValueError, match="shorter"):
        module.undisturbed([*calls, module.Call(1.0, (1.0,), image)])


def test_video_frames_count_as_images():
    frames = torch.rand(2, 3, 1, 4, 4)
    images = module._images(SimpleNamespace(frames=frames))
    assert torch.equal(images, frames.reshape(6, 1, 4, 4))


def test_a_pipeline_without_images_is_refused():
    with pytest.raises(UnsupportedPipelineError, match="without images"):
        module._images(SimpleNamespace(audios=torch.zeros(1, 8)))
