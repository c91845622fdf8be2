"""Whole pipelines as bundles: what ONNX Runtime makes of their engines is what the pipelines make with the plan.

By the self-test of a bundle, whose latents are the pipeline's own.
"""

import subprocess
import sys

import pytest

from difa_compile.bundle.runner import load_bundle
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import BundleInputError
from difa_compile.export.write import TEST_SEED, export_bundle, latents_of
from difa_compile.pipeline.rules import plan_from_rule

pytest.importorskip("onnxruntime")
pytest.importorskip("transformers", reason="text encoders of whole pipelines")

STEPS = 4
CLOSE = 1e-5
"""Of the largest latent."""


def rule(step, site):
    return FULL if step < 2 else Decision.parse("forecast:1") if step == 2 else REUSE


def prompted(name):
    from tests.support.image_cases import CASES

    case = CASES[name]
    inputs = case.inputs()
    inputs.pop("output_type", None)
    for text in ("prompt", "negative_prompt"):
        if isinstance(inputs.get(text), list):
            inputs[text] = inputs[text][:1]
    return case.make(), inputs


def video(folder):
    from tests.support.video_components import wan

    tiny = wan(folder)
    given = {"generator", "output_type", "num_inference_steps"}
    return tiny.pipe, {name: value for name, value in tiny.arguments.items() if name not in given}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixart_sigma", "sd3", "flux", "flux_true_cfg", "wan"])
def test_a_bundle_makes_what_the_pipeline_makes(name, tmp_path):
    pipe, inputs = video(tmp_path) if name == "wan" else prompted(name)
    plan = plan_from_rule(pipe, STEPS, rule, inputs=inputs)
    found = export_bundle(pipe, plan, tmp_path / "bundle", inputs=inputs, steps=[STEPS], most_images=1)
    assert found.engines == 3
    assert found.manifest.decode is not None
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.self_test() < CLOSE
    check_prompts(pipe, inputs, plan, bundle)
    reuse = min((engine for engine in found.manifest.engines if engine.row >= 0), key=lambda each: len(each.weights))
    left = [weight for weight in reuse.weights for site in plan.sites if weight.startswith(f"{site.path}.")]
    assert not left, "nothing of an attention is read"


PROMPTS = (
    ("", "grey"),
    ("  A RED\tcat &amp; two small boats  ", ""),
    ("a red house walks on grass, a small cat sleeps in a red house, and so on, na\u00efve \U0001f98a", "A  Dog"),
)
"""Other prompts than that of the export: empty, with capitals and spaces, too long."""


def check_prompts(pipe, inputs, plan, bundle):
    """Latents of prompts are those of the pipeline with the plan; negative prompts where there is guidance."""
    assert bundle.manifest.prompts is not None
    guided = "negative_prompt" in inputs
    program = bundle._program(bundle._schedule(None, None))
    found = {}
    for prompt, negative in PROMPTS:
        texts = {"prompt": prompt, **({"negative_prompt": negative} if guided else {})}
        given = {name: [text] if isinstance(inputs["prompt"], list) else text for name, text in texts.items()}
        wanted = latents_of(pipe, {**inputs, **given}, plan, STEPS, program)
        latents = found[prompt] = bundle(**texts, seed=TEST_SEED, decode=False).latents
        assert far(latents, wanted) < CLOSE, texts
    assert len({float(latents.flatten()[0]) for latents in found.values()}) == len(found), "prompts matter"
    # Without a negative prompt it is that of the export.
    own = {name: text if isinstance(text, str) else text[0] for name, text in inputs.items() if name == "prompt"}
    wanted = latents_of(pipe, inputs, plan, STEPS, program)
    latents = bundle(**own, seed=TEST_SEED, decode=False).latents
    assert far(latents, wanted) < CLOSE
    if not guided:
        with pytest.raises(BundleInputError, match="no unconditional half"):
            bundle(prompt="a", negative_prompt="b")


def far(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.slow
def test_further_prompts(tmp_path):
    """A text of its own for the second tokenizer, else it follows the prompt; several images."""
    pipe, inputs = prompted("flux")
    plan = plan_from_rule(pipe, STEPS, rule, inputs=inputs)
    export_bundle(pipe, plan, tmp_path, inputs=inputs, steps=[STEPS], most_images=2)
    assert export_bundle(pipe, plan, tmp_path, inputs=inputs, steps=[STEPS], most_images=2).made == 0
    bundle = load_bundle(tmp_path)
    program = bundle._program(bundle._schedule(None, None))
    further = {"prompt": ["two boats"], "prompt_2": ["a grey house"]}
    wanted = latents_of(pipe, {**inputs, **further}, plan, STEPS, program)
    found = bundle(prompt="two boats", prompt_2=["a grey house"], seed=TEST_SEED, decode=False).latents
    assert far(found, wanted) < CLOSE
    two = {"prompt": ["two boats", "a red house"]}
    wanted = latents_of(pipe, {**inputs, **two}, plan, STEPS, program)
    found = bundle(**two, seed=TEST_SEED, decode=False).latents
    assert far(found, wanted) < CLOSE
    same = bundle(prompt="a red house", images=2, seed=TEST_SEED, decode=False).latents
    assert far(same[1], found[1]) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_prompts_by_aotinductor(name, tmp_path):
    """Constants of text encoders, and embeddings that are cut to the length of a text."""
    pipe, inputs = video(tmp_path / "parts") if name == "wan" else prompted(name)
    plan = plan_from_rule(pipe, STEPS, lambda step, site: FULL, inputs=inputs)
    export_bundle(pipe, plan, tmp_path / "bundle", inputs=inputs, steps=[2], most_images=1, targets=["aoti"])
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.manifest.prompts is not None
    assert bundle.self_test() < CLOSE
    program = bundle._program(bundle._schedule(None, None))
    for prompt, negative in PROMPTS:
        given = {"prompt": prompt, "negative_prompt": negative}
        texts = {key: [text] if isinstance(inputs["prompt"], list) else text for key, text in given.items()}
        wanted = latents_of(pipe, {**inputs, **texts}, plan, 2, program)
        assert far(bundle(**given, seed=TEST_SEED, decode=False).latents, wanted) < CLOSE


@pytest.mark.slow
def test_prompts_need_neither_diffusers_nor_transformers(tmp_path):
    pipe, inputs = video(tmp_path / "parts")
    plan = plan_from_rule(pipe, STEPS, rule, inputs=inputs)
    export_bundle(pipe, plan, tmp_path / "bundle", inputs=inputs, steps=[STEPS], most_images=1)
    code = f"""
import sys
for name in ("diffusers", "transformers"):
    sys.modules[name] = None
import difa_compile
bundle = difa_compile.load_bundle({str(tmp_path / "bundle")!r})
assert bundle(prompt="a red cat", seed=0).images.shape[0] == 1
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
