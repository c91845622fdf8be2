"""Plans serve texts of any length: guidance in two calls per step, whose texts differ in length, in every such model.

The models are those of the pipelines of diffusers that make two calls, tiny; the outputs of both calls are compared
with the same model run eagerly, its attention altered by hand.
"""

import copy
import gc
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from benchmarks.model_survey import Altered
from benchmarks.zoo.check import tensors
from benchmarks.zoo.registry import build
from difa_compile.calibration.calibrate import calibrate
from difa_compile.decision import FULL, Decision
from difa_compile.errors import CalibrationError, PlanMismatchError
from difa_compile.pipeline.apply import apply, remove
from difa_compile.plan.guidance import TWO_CALLS, Guidance
from difa_compile.plan.plan import Cell
from tests.support.tiny_models import Attention, PlainTransformer

TEXT, SHORTER = 7, 5
"""Tokens of the texts. Nothing else in the inputs has such a size."""

MODELS = {
    "bria_fibo2": ["BriaFibo2Transformer2DModel"],
    "chroma": ["ChromaTransformer2DModel"],
    "chronoedit": [],  # text and image embeddings are told apart by a text of 512 tokens
    "cogview4": ["CogView4Transformer2DModel"],
    "cosmos": ["CosmosTransformer3DModel", "Cosmos3OmniTransformer"],
    "joyimage": ["JoyImageEditTransformer3DModel"],
    "flux": ["FluxTransformer2DModel"],
    "flux2": ["Flux2Transformer2DModel"],
    "glm_image": ["GlmImageTransformer2DModel"],
    "helios": ["HeliosTransformer3DModel"],
    "hunyuan_image": ["HunyuanImageTransformer2DModel"],
    "hunyuan_video": ["HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"],
    "hunyuan_video1_5": ["HunyuanVideo15Transformer3DModel"],
    "kandinsky5": ["Kandinsky5Transformer3DModel"],
    "kandinsky6": ["Kandinsky6Transformer3DModel"],
    "krea2": ["Krea2Transformer2DModel"],
    "longcat_audio_dit": ["LongCatAudioDiTTransformer"],
    "longcat_image": ["LongCatImageTransformer2DModel"],
    "lucy": ["WanTransformer3DModel"],
    "lumina2": ["Lumina2Transformer2DModel"],
    "motif_video": ["MotifVideoTransformer3DModel"],
    "nucleusmoe_image": ["NucleusMoEImageTransformer2DModel"],
    "ovis_image": ["OvisImageTransformer2DModel"],
    "qwenimage": ["QwenImageTransformer2DModel"],
    "qwenimage21": ["QwenImage21Transformer2DModel"],
    "skyreels_v2": ["SkyReelsV2Transformer3DModel"],
    "wan": ["WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimate2Transformer3DModel"],
}
"""Transformers by the folders of the pipelines that make two calls."""

MASKED = (
    "HunyuanImageTransformer2DModel",
    "HunyuanVideo15Transformer3DModel",
    "HunyuanVideoFramepackTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "LongCatAudioDiTTransformer",
    "Lumina2Transformer2DModel",
)
"""Those that take texts padded to one length, and a mask that says how long each is."""

WITHOUT_LAYOUT = ("QwenImage21Transformer2DModel", "WanAnimate2Transformer3DModel")
CLOSE = 1e-5
"""Relative to the largest output; windows written out by hand add up in another order."""


def test_every_pipeline_with_two_calls_is_here():
    assert set(MODELS) == TWO_CALLS


# A model whose text no layout tells apart


class Joint(PlainTransformer):
    """Text stands among the tokens of the image in an order that no layout can have."""

    def forward(self, x, text):
        image = self.patch(x).flatten(2).transpose(1, 2)
        half = image.shape[1] // 2
        y = torch.cat([image[:, half:], text, image[:, :half]], 1)
        for layer in self.layers:
            y = layer(y)
        y = torch.cat([y[:, -half:], y[:, : image.shape[1] - half]], 1)
        y = self.head(y).unflatten(1, (x.shape[-2] // 2, x.shape[-1] // 2)).unflatten(-1, (2, 2, 3))
        return (y.permute(0, 5, 1, 3, 2, 4).reshape(x.shape),)


def joint():
    torch.manual_seed(0)
    pipe = TwoTexts(Joint([Attention(32, 2), Attention(32, 2)]).eval(), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    image, text = torch.randn(2, 3, 8, 12), torch.randn(2, TEXT, 32)
    pipe.texts, pipe.latent = {"cond": {"x": image, "text": text}, "uncond": {"x": image, "text": text[:, :5]}}, "x"
    return Case(pipe, "Joint")


def test_sites_without_a_layout_take_texts_of_two_lengths(monkeypatch):
    monkeypatch.setattr(f"{__name__}.WITHOUT_LAYOUT", ("Joint",))
    check(joint())


def test_another_image_is_refused_where_no_layout_tells():
    """The same number of tokens more may be a text; the noisy sample says that it is not."""
    case = joint()
    pipe = case.pipe
    found = calibrate(pipe, {}, 2, 10.0, candidates=["reuse"], inner="eager", progress=False)
    assert found.settings.sample == (3, 8, 12)
    apply(pipe, found, inner="eager")
    for inputs in pipe.texts.values():
        inputs["x"] = torch.randn(2, 3, 8, 14)
    with pytest.raises(PlanMismatchError, match="resize="):
        pipe()
    remove(pipe)
    apply(pipe, found, inner="eager", resize="tokens")
    assert len(pipe()) == 4
    remove(pipe)
    pipe.texts["uncond"]["x"] = torch.randn(2, 3, 8, 12)
    with pytest.raises(CalibrationError, match="inputs of other sizes in mid-run"):
        calibrate(pipe, {}, 2, 10.0, candidates=["reuse"], inner="eager", progress=False)


# Inputs


def shorter(value):
    """An input with a text of fewer tokens, all others as they were."""
    if isinstance(value, torch.Tensor):
        for dim in range(value.ndim):
            if value.shape[dim] == TEXT:
                value = value.narrow(dim, 0, SHORTER)
        return value
    return type(value)(map(shorter, value)) if type(value) in (list, tuple) else value


def with_shorter_text(name, inputs, latent):
    gone = TEXT - SHORTER
    found = {key: value if key == latent else shorter(value) for key, value in inputs.items()}
    if name == "Krea2Transformer2DModel":
        found["position_ids"] = inputs["position_ids"][gone:]
    elif name == "QwenImage21Transformer2DModel":
        found["img_mask"] = inputs["img_mask"][:, gone:]
    elif name == "Cosmos3OmniTransformer":
        found |= {key: inputs[key] - gone for key in ("vision_sequence_indexes", "vision_mse_loss_indexes")}
        found |= {"position_ids": inputs["position_ids"][:, gone:], "und_len": SHORTER}
        found["sequence_length"] = inputs["sequence_length"] - gone
    return found


def with_masked_text(inputs):
    mask = inputs["encoder_attention_mask"].clone()
    mask[:, SHORTER:] = 0
    return {**inputs, "encoder_attention_mask": mask}


def at_step(value, step):
    """The noisy sample as it is at a step."""
    if isinstance(value, (list, tuple)):
        return type(value)(at_step(each, step) for each in value)
    return value * 0.9**step + 0.05 * step


class TwoTexts(DiffusionPipeline):
    """Calls a transformer twice per step, each time with a text of its own; gives all outputs."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, num_inference_steps=2, around=None):
        self.scheduler.set_timesteps(num_inference_steps)
        outputs = []
        for step, t in enumerate(self.scheduler.timesteps):
            for branch, inputs in self.texts.items():
                given = copy.deepcopy(inputs)  # some models write to what they are given
                given[self.latent] = at_step(given[self.latent], step)
                with nullcontext() if around is None else around(branch, step):
                    outputs += tensors(self.transformer(**given))
            self.scheduler.step(torch.zeros(1), t, torch.zeros(1))
        return outputs


@dataclass
class Case:
    pipe: TwoTexts
    name: str

    def by_hand(self, captures, decisions):
        """All outputs where the k-th attention call takes the decisions of its site, as far as they can be taken."""
        altered = {
            branch: Altered(
                {
                    number: (capture.verdicts.effective(index, decisions[index]), site.layout)
                    for number, site in enumerate(capture.model.all_sites)
                    for index in [capture.model.sites.index(site) if site in capture.model.sites else -1]
                    if index >= 0
                }
            )
            for branch, capture in captures.items()
        }
        made = {}

        def around(branch, step):
            made[branch] = altered[branch].calls
            return altered[branch].step(first=step == 0)

        outputs = self.pipe(around=around)
        assert {branch: len(capture.model.all_sites) for branch, capture in captures.items()} == {
            branch: altered[branch].calls() for branch in altered
        }
        return outputs


def case_of(name, *, masked=False):
    example = build(name)
    pipe = TwoTexts(example.model, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    cut = with_masked_text(example.inputs) if masked else with_shorter_text(name, example.inputs, example.latent)
    pipe.texts, pipe.latent = {"cond": dict(example.inputs), "uncond": cut}, example.latent
    return Case(pipe, name)


@pytest.fixture(autouse=True)
def _two_calls(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "difa_compile.plan.guidance.guidance_of", lambda pipe: Guidance("two-call", conditional_first=True)
    )
    torch._dynamo.reset()
    yield
    gc.collect()


def decisions_for(sites):
    """Reuse, a window and a window with residual by turns; reuse where there is no layout."""
    kinds = ("reuse", "window(band:3)+residual", "window(band:3)")
    return [Decision.parse(kinds[i % 3] if site.layout else "reuse") for i, site in enumerate(sites)]


def error(found, wanted):
    assert len(found) == len(wanted)
    scale = max(float(value.abs().max()) for value in wanted)
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) / scale


def check(case):
    pipe = case.pipe
    full = pipe()
    candidates = ["window+residual", "window", "reuse"]
    settings = {"steps": 2, "threshold": 10.0, "rank": "published", "inner": "eager", "progress": False}
    found = calibrate(pipe, {}, candidates=candidates, window="band:3", **settings)
    assert any(decision != FULL for decision in found.decisions[1])
    rows = [tuple(Cell(FULL) for _ in found.sites), tuple(Cell(d) for d in decisions_for(found.sites))]
    plan = replace(found, rows=rows)
    applied = apply(pipe, plan, inner="eager")
    outputs = pipe()
    assert applied.last_run.calls == 4
    assert [record for record in applied.records if record.outcome == "skipped"] == []
    captures = {"cond": applied.captures[0], "uncond": applied.captures[-1]}  # one, where a mask changes no size
    remove(pipe)
    wanted = case.by_hand(captures, plan.decisions[1])
    assert error(outputs, wanted) < CLOSE
    assert error(full, wanted) > 100 * CLOSE
    for one, other in zip(captures["cond"].model.sites, captures["uncond"].model.sites, strict=True):
        assert (one.layout is None) == (other.layout is None) == (case.name in WITHOUT_LAYOUT or no_layout(one))
        assert one.tokens - other.tokens in (0, TEXT - SHORTER)
        assert one.layout is None or one.layout.grid == other.layout.grid


def no_layout(site):
    """Sites of sound beside the video, or of text alone: not of the noisy sample."""
    return "audio" in site.layout_reason or site.mask == "causal"


NAMES = sorted({name for names in MODELS.values() for name in names})


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_texts_of_two_lengths(name):
    check(case_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKED)
def test_texts_that_a_mask_makes_differ(name):
    check(case_of(name, masked=True))
