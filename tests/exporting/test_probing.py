"""Probed sampling loops, replayed with the pipeline's own model, against the pipeline itself."""

import functools
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers", reason="whole pipelines of diffusers")
pytest.importorskip("transformers", reason="text encoders of whole pipelines")

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from difa_compile import apply, plan_from_rule
from difa_compile.bundle.program import Call, Clamp, Draw, Program, Sample, Scale, View, replay
from difa_compile.decision import FULL
from difa_compile.errors import NotAppliedError, NotLinearError, PipelineCallError, SamplingLoopError
from difa_compile.exporting.probing import PROBED_AT, probe
from tests.support.image_cases import CASES
from tests.support.programs import calling
from tests.support.tiny_pipelines import quiet, tiny_pipeline, tiny_transformer, two_call_pipeline
from tests.support.video_components import cogvideox, wan, wan_transformer

STEPS = 5
CLOSE = 1e-5
"""Of the largest latent. The pipelines' own rounding, which replays do not repeat, is what there is."""
EPSILON = 4
"""So many times as much for a model of noise: what it says at the first steps enters some 30 to 150 times as large."""
NO_SIZES = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
FURTHER = {"pixart_sigma": NO_SIZES}
"""Arguments that are no tensors and have no default."""


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def distance(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def latents_of(pipe, steps=STEPS, **call):
    """The final latents of a pipeline, also of one that always decodes."""
    kept = {}
    step = pipe.scheduler.step

    @functools.wraps(step)
    def watched(*args, **kwargs):
        made = step(*args, **kwargs)
        kept["last"] = made[0]
        return made

    pipe.scheduler.step = watched
    try:
        pipe(**{"generator": generator(), "num_inference_steps": steps, **call})
    finally:
        del pipe.scheduler.step
    return kept["last"]


def replayed(pipe, probed, images, further=None, scales=None):
    call = calling(pipe, **(further or {}))
    return replay(probed.program, generator(), probed.conditioning, call, images=images, scales=scales)


@pytest.mark.parametrize(
    "name",
    ["dit", "flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pixart_sigma", "sd3", "flux_true_cfg"))],
)
def test_a_probed_loop_is_the_pipelines_own(name):
    case = CASES[name]
    pipe = case.make()
    probed = probe(pipe, case.inputs(), STEPS)
    program = Program.from_json(json.loads(json.dumps(probed.program.to_json())))
    assert program == probed.program
    assert (program.steps, program.images, probed.images) == (STEPS, None, 2)
    assert (program.pipeline, program.scheduler) == (type(pipe).__name__, type(pipe.scheduler).__name__)
    assert program.error < 2e-5
    latents = replayed(pipe, probed, 2, FURTHER.get(name))
    close = CLOSE * (EPSILON if name == "dit" else 1)
    assert distance(latents, latents_of(pipe, **case.inputs())[:2]) < close
    # Guidance is chosen as it is called, by the same program.
    chosen = {scale.name: scale.value + 1.5 for scale in program.scales}
    assert chosen
    latents = replayed(pipe, probed, 2, FURTHER.get(name), chosen)
    assert distance(latents, latents_of(pipe, **{**case.inputs(), **chosen})[:2]) < close


def test_a_batched_loop_as_data():
    """DDIM on a DiT: the conditional half first, the class for none as a number, a clamp in each step."""
    pipe = tiny_pipeline()
    program = probe(pipe, {"class_labels": [1]}, 3).program
    (form,) = program.forms
    assert (form.model, form.branch, form.groups) == ("transformer", None, 2)
    assert form.sample.name == "hidden_states"
    assert [argument.name for argument in form.values] == ["timestep"]
    (labels,) = form.conditions
    assert [(row.half, row.fixed, row.numbers) for row in labels.rows] == [
        ("cond", False, None),
        ("uncond", True, (1000.0,)),
    ]
    kinds = [type(each) for each in program.operations]
    assert kinds == [Draw, *[Call, Clamp, Sample] * 3]
    pipe.scheduler.set_timesteps(3)
    times = [float(time) for time in pipe.scheduler.timesteps]
    assert [call.values for call in program.calls] == [(((time,), (time,)),) for time in times]
    assert [call.step for call in program.calls] == [0, 1, 2]
    assert {(each.low, each.high) for each in program.operations if isinstance(each, Clamp)} == {(-1.0, 1.0)}
    assert program.scales == (Scale("guidance_scale", 4.0, 1.0),)
    # What is made of the conditional output counts for nothing at a scale of 0, and of the other at a scale of 1.
    terms = {(term.value, term.group): term.factor for term in program.operations[2].inputs[0]}
    assert terms[1, 0][0] == 0.0
    assert sum(terms[1, 1]) == pytest.approx(0.0, abs=1e-6)


def test_packed_latents_are_seen_where_they_lie():
    """FLUX draws (4, 8, 12) and samples 24 tokens of 16: patches of 2 x 2."""
    case = CASES["flux"]
    program = probe(case.make(), case.inputs(), 2).program
    assert program.shape == (24, 16)
    assert program.draws == (Draw(1, (4, 8, 12), "float32", True, View((4, 6, 4, 2, 2), (24, 2, 96, 12, 1))),)
    assert program.scales == (Scale("guidance_scale", 3.5, None),)
    assert program.baked == (Scale("true_cfg_scale", 1.0),)
    (call, *_), form = program.calls, program.forms[0]
    assert dict(zip([argument.name for argument in form.values], call.values, strict=True))["guidance"] == ((0.0, 1.0),)
    unbatched = {each.argument.name for each in form.conditions if not each.argument.batched}
    assert unbatched == {"img_ids", "txt_ids"}


def test_guidance_in_two_calls_has_a_branch_for_each():
    case = CASES["flux_true_cfg"]
    program = probe(case.make(), case.inputs(), 2).program
    assert [(form.branch, form.groups) for form in program.forms] == [("cond", 1), ("uncond", 1)]
    assert [(call.form, call.step) for call in program.calls] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert {scale.name: scale.above for scale in program.scales} == {"true_cfg_scale": 1.0, "guidance_scale": None}


def test_two_calls_that_nobody_names():
    """No scale among the arguments, no latents to ask for: what there is, is baked."""
    pipe = two_call_pipeline()
    probed = probe(pipe, {"class_labels": [1, 2]}, 3)
    assert [form.branch for form in probed.program.forms] == [None, "uncond"]
    assert probed.program.scales == ()
    wanted = latents_of(pipe, 3, class_labels=[1, 2])
    assert distance(replayed(pipe, probed, 2), wanted) < CLOSE


def test_channels_that_are_dropped_are_no_part_of_the_loop():
    case = CASES["pixart_sigma"]
    program = probe(case.make(), case.inputs(), 2).program
    (form,) = program.forms
    assert (form.output, form.output_view) == ((8, 8, 12), View((4 * 8 * 12,), (1,)))
    assert [row.half for row in form.conditions[0].rows] == ["uncond", "cond"]


@pytest.mark.parametrize("off", [{"guidance_scale": 1.0}, {"guidance_scale": 0.0}])
def test_guidance_that_is_off_is_one_group_and_baked(off):
    pipe = tiny_pipeline()
    probed = probe(pipe, {"class_labels": [1, 2], **off}, 3)
    assert probed.program.forms[0].groups == 1
    assert probed.program.scales == ()
    assert [(scale.name, scale.value) for scale in probed.program.baked] == [("guidance_scale", *off.values())]
    assert distance(replayed(pipe, probed, 2), latents_of(pipe, 3, class_labels=[1, 2], **off)) < CLOSE


SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "heun": HeunDiscreteScheduler,
    "euler a": EulerAncestralDiscreteScheduler,
    "dpm++ sde": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "unipc": UniPCMultistepScheduler,
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "ddpm" else pytest.mark.slow) for name in SCHEDULERS],
)
def test_schedulers_of_every_kind(name):
    """DiT's pipeline hands its scheduler no generator, and twice the rows: noise is torch's own, one for each half."""
    pipe = tiny_pipeline(scheduler=SCHEDULERS[name]())
    inputs = {"class_labels": [1, 2]}
    probed = probe(pipe, inputs, STEPS)
    assert [draw.seeded for draw in probed.program.draws] == [True] + [False] * (len(probed.program.draws) - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        wanted = latents_of(pipe, **inputs)[:2]
        torch.manual_seed(9)
        latents = replayed(pipe, probed, 2)
    assert distance(latents, wanted) < EPSILON * CLOSE
    calls = [call.step for call in probed.program.calls]
    assert calls == list(range(2 * STEPS - 1 if name == "heun" else STEPS))


def test_a_step_reads_no_further_back_than_it_must():
    """UniPC corrects its samples and keeps that to itself, so that each is a sum over all that came before."""
    program = probe(tiny_pipeline(scheduler=UniPCMultistepScheduler()), {"class_labels": [1]}, 10).program
    samples = [index for index, each in enumerate(program.operations) if isinstance(each, Sample)]
    for number, index in enumerate(samples[3:], 3):
        reads = [term.value for row in program.operations[index].inputs for term in row]
        assert samples[number - 3] <= min(reads)
    assert max(len(values) for values in alive(program)) <= 8
    assert program.error < 2e-5


def alive(program):
    """The values that are kept after each operation."""
    kept = set()
    for index in range(len(program.operations)):
        kept.add(index)
        kept -= set(program.last_uses.get(index, ()))
        yield set(kept)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_factors_of_a_pipeline_in_half_precision_are_float32s(name, dtype):
    """Models and draws have the pipeline's dtype, and the factors are those of the pipeline in float32."""
    case = CASES[name]
    wide = probe(case.make(), case.inputs(), STEPS).program
    pipe = case.make().to(dtype)
    probed = probe(pipe, case.inputs(), STEPS)
    program = probed.program
    text = str(dtype).removeprefix("torch.")
    assert {draw.dtype for draw in program.draws} == {form.sample.dtype for form in program.forms} == {text}
    assert program.error < 2e-6
    for found, wanted in zip(program.operations, wide.operations, strict=True):
        if isinstance(found, Sample):
            assert found == wanted
    latents = replayed(pipe, probed, 2)
    wanted = latents_of(pipe, **case.inputs()).float()
    # The pipeline rounds its latents after every step, a replay does not.
    assert distance(latents, wanted) < STEPS * torch.finfo(dtype).eps


@pytest.mark.slow
def test_a_scheduler_that_is_told_what_it_predicted_before(tmp_path):
    tiny = cogvideox(tmp_path, scheduler="dpm")
    inputs = {key: value for key, value in tiny.arguments.items() if key != "num_inference_steps"}
    probed = probe(tiny.pipe, inputs, STEPS)
    wanted = latents_of(tiny.pipe, **inputs, output_type="latent")
    assert distance(replayed(tiny.pipe, probed, 1), wanted) < CLOSE


def test_another_number_of_images_and_another_label():
    pipe = tiny_pipeline()
    probed = probe(pipe, {"class_labels": [1]}, STEPS)
    given = {"cond": {"class_labels": torch.tensor([5, 6, 7])}}
    latents = replay(probed.program, generator(), given, calling(pipe), images=3)
    assert distance(latents, latents_of(pipe, class_labels=[5, 6, 7])[:3]) < EPSILON * CLOSE


@pytest.mark.slow
def test_two_experts(tmp_path):
    """Wan 2.2: the first transformer for the early steps, the second for the late ones, two calls each."""
    tiny = wan(tmp_path, transformer_2=wan_transformer(seed=4), boundary_ratio=0.7)
    inputs = {key: value for key, value in tiny.arguments.items() if key != "num_inference_steps"}
    probed = probe(tiny.pipe, inputs, STEPS)
    program = probed.program
    assert [(form.model, form.branch) for form in program.forms] == [
        (model, branch) for model in ("transformer", "transformer_2") for branch in ("cond", "uncond")
    ]
    wanted = latents_of(tiny.pipe, **inputs, output_type="latent")
    assert distance(replayed(tiny.pipe, probed, 1), wanted) < CLOSE


# --- what it leaves, what it refuses ---------------------------------------------------------------------------------


def test_the_pipeline_is_left_as_it_was():
    case = CASES["flux"]
    pipe = case.make()
    before = case.sample(pipe, 3)
    held = [dict(each.__dict__) for each in (pipe.transformer, pipe.vae, pipe.scheduler)]
    state = torch.get_rng_state()
    probe(pipe, case.inputs(), 3)
    assert torch.equal(torch.get_rng_state(), state)
    for each, kept in zip((pipe.transformer, pipe.vae, pipe.scheduler), held, strict=True):
        assert {"forward", "decode", "step", "cache_context"}.isdisjoint(each.__dict__)
        assert each.__dict__.keys() == kept.keys()
    assert torch.equal(case.sample(pipe, 3), before)


def test_the_transformer_runs_once():
    pipe = tiny_pipeline()
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    real = []
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: real.append(1))
    probe(pipe, {"class_labels": [1]}, 3)
    assert len(real) == 1
    assert len(calls) > 10


def test_texts_are_encoded_once_for_each_call_that_asks_otherwise():
    """As given, with others in their place, and for twice the images."""
    case = CASES["flux"]
    pipe = case.make()
    calls = []
    pipe.text_encoder_2.register_forward_hook(lambda *_: calls.append(1))
    probe(pipe, case.inputs(), 3)
    assert len(calls) == 3
    assert "encode_prompt" not in pipe.__dict__


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
def test_dynamic_thresholding_is_refused_by_name(scheduler):
    pipe = tiny_pipeline(scheduler=scheduler(thresholding=True))
    with pytest.raises(NotLinearError, match="dynamic thresholding"):
        probe(pipe, {"class_labels": [1]}, 3)


class Learned(tiny_pipeline().__class__):
    """Hands its scheduler all that the model gives, the variance with it."""

    @torch.no_grad()
    def __call__(self, class_labels, num_inference_steps=3, generator=None):
        latents = torch.randn(len(class_labels), 1, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            given = self.transformer(latents, timestep=t.expand(len(latents)), class_labels=torch.tensor(class_labels))
            latents = self.scheduler.step(torch.cat([given[0], given[0]], 1), t, latents, generator=generator)[0]
        return (latents,)


def test_a_learned_variance_is_refused_by_name():
    pipe = tiny_pipeline(scheduler=DDPMScheduler(variance_type="learned_range", clip_sample=False))
    pipe.__class__ = Learned
    with pytest.raises(NotLinearError, match="variance"):
        probe(pipe, {"class_labels": [1]}, 3)


class Strange:
    """A loop of one model, changed in one place: ``what`` says how."""

    def __init__(self, what):
        self.what = what
        self.transformer = tiny_transformer()
        self.scheduler = DDIMScheduler(clip_sample=False)

    @torch.no_grad()
    def __call__(self, class_labels, num_inference_steps=3, generator=None):
        rows = len(class_labels)
        latents = torch.randn(rows, 1, 8, 8, generator=generator)
        if self.what == "begins with an image":
            latents = latents + 1
        if self.what == "draws otherwise":
            latents = torch.rand(rows, 1, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            labels = torch.tensor(class_labels)
            given = self.transformer(latents, timestep=t.expand(rows), class_labels=labels, return_dict=False)[0]
            if self.what == "rescales":
                given = given / (1 + given.std())
            if self.what == "squares":
                given = given**2
            if self.what == "mixes images":
                given = given - given.mean(0, keepdim=True)
            if self.what == "mixes elements":
                given = given.flip(-1)
            latents = self.scheduler.step(given, t, latents)[0]
        return (latents,)


STRANGE = {
    "begins with an image": (SamplingLoopError, "neither noise nor the model's output|beside the sample"),
    "draws otherwise": (SamplingLoopError, "torch's rand"),
    "rescales": (NotLinearError, "is not linear"),
    "squares": (NotLinearError, "is not linear"),
    "mixes images": (SamplingLoopError, "batch|linear"),
    "mixes elements": (NotLinearError, "moves elements|linear"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_loop_that_is_no_table_is_refused(what):
    kind, message = STRANGE[what]
    with pytest.raises(kind, match=message):
        probe(Strange(what), {"class_labels": [1, 2]}, 3)


def test_the_loop_that_the_strange_ones_differ_from():
    probed = probe(Strange(""), {"class_labels": [1, 2]}, 3)
    assert probed.program.error < 2e-5


def test_a_pipeline_that_begins_with_an_image_is_refused():
    case = CASES["sd3_img2img"]
    with pytest.raises(SamplingLoopError, match=r"noise|beside"):
        probe(case.make(), case.inputs(), 4)


def test_a_planned_pipeline_is_refused():
    pipe = tiny_pipeline()
    apply(pipe, plan_from_rule(pipe, 3, lambda step, site: FULL), inner="eager")
    with pytest.raises(NotAppliedError, match="carries a plan"):
        probe(pipe, {"class_labels": [1]}, 3)


def test_arguments_that_the_pipeline_does_not_take_are_said():
    with pytest.raises(PipelineCallError, match=r"does not take this call|argument"):
        probe(tiny_pipeline(), {"class_labels": [1], "prompt": "a"}, 3)


def test_a_scale_that_is_not_affine_is_baked(monkeypatch):
    """Guidance by the square of the scale: two probes fit a line through it, the further ones see that it is none."""
    pipe = two_call_pipeline(Squared)
    probed = probe(pipe, {"class_labels": [1, 2], "guidance_scale": 3.0}, 3)
    assert probed.program.scales == ()
    assert probed.program.baked == (Scale("guidance_scale", 3.0),)
    wanted = latents_of(pipe, 3, class_labels=[1, 2], guidance_scale=3.0)
    assert distance(replayed(pipe, probed, 2), wanted) < CLOSE
    assert 3.0 not in PROBED_AT


class Squared(type(two_call_pipeline())):
    @torch.no_grad()
    def __call__(self, class_labels, generator=None, num_inference_steps=4, guidance_scale=2.0, output_type="latent"):
        latents = torch.randn(len(class_labels), 1, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            both = [
                self.transformer(latents, timestep=t.expand(len(latents)), class_labels=classes)[0]
                for classes in (torch.tensor(class_labels), torch.full((len(class_labels),), 1000))
            ]
            guided = both[1] + guidance_scale**2 * (both[0] - both[1])
            latents = self.scheduler.step(guided, t, latents).prev_sample
        return (latents,)


def test_a_false_factor_is_noticed(monkeypatch):
    """The verification is what accepts a program: one thousandth in one factor is too much."""
    from difa_compile.exporting import probing

    plain = probing._Probing._operations

    def altered(self, reads):
        made = plain(self, reads)
        last = made[-1]
        (first, *others), *rows = last.inputs
        wrong = replace(first, factor=tuple(1.001 * each for each in first.factor))
        return [*made[:-1], replace(last, inputs=((wrong, *others), *rows))]

    monkeypatch.setattr(probing._Probing, "_operations", altered)
    with pytest.raises(NotLinearError, match="rounding"):
        probe(quiet(tiny_pipeline()), {"class_labels": [1]}, 3)
