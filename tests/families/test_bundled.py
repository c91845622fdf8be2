"""Whole pipelines as bundles: what ONNX Runtime makes of their engines is what the pipelines make with the plan.

By the self-test of a bundle, whose latents are the pipeline's own.
"""

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from difa_compile.bundle.adapting import adapt_bundle
from difa_compile.bundle.manifest import read_manifest
from difa_compile.bundle.program import Program
from difa_compile.bundle.runner import load_bundle, seeded
from difa_compile.bundle.weights import WeightFile
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import BundleInputError
from difa_compile.exporting.probing import probe
from difa_compile.exporting.write import TEST_SEED, export, latents_of
from difa_compile.files.documents import parse_json
from difa_compile.pipeline.apply import apply, remove
from difa_compile.pipeline.rules import plan_from_rule

pytest.importorskip("onnxruntime")
pytest.importorskip("transformers", reason="text encoders of whole pipelines")

from tests.support.one_image import one_image

STEPS = 20
HEIGHT, WIDTH = 16, 24
"""Of the images of tiny pipelines, in pixels."""
WINDOW = Decision.parse("window(band:3)")
CLOSE = 1e-5
"""Of the largest latent."""


def rule(step, site):
    return FULL if step < 2 or step % 3 == 0 else Decision.parse("forecast:1") if step % 3 == 1 else REUSE


def latents(bundle, conditions, **options):
    """After each step."""
    found = []
    with seeded(TEST_SEED):
        bundle(
            seed=TEST_SEED, conditions=conditions, images=1, decode=False, **options,
            callback=lambda step, steps, latents: found.append(latents.float().clone()),
        )  # fmt: skip
    return found


def differences(found, wanted):
    """Of each step's latents, relative to the largest."""
    return [float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, wanted, strict=True)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """By name a pipeline, its arguments, a plan and a bundle of it for ONNX Runtime, each made once."""

    @functools.cache
    def made(name):
        folder = tmp_path_factory.mktemp(name)
        pipe, inputs = one_image(name, folder)
        plan = plan_from_rule(pipe, STEPS, rule, inputs=inputs)
        export(pipe, plan, folder / "bundle", inputs=inputs, steps=[STEPS], most_images=1)
        return pipe, inputs, plan, folder / "bundle"

    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixart_sigma", "sd3", "flux", "flux_true_cfg", "wan"])
def test_a_bundle_makes_what_the_pipeline_makes(name, exported, tmp_path):
    """At every step; TensorRT's engines are built, from models that make what the programs make, and not run."""
    pytest.importorskip("tensorrt_rtx")
    pipe, inputs, plan, made = exported(name)
    runs = ("onnx", "aoti") if name in ("sd3", "wan") else ("onnx",)
    folder = Path(shutil.copytree(made, tmp_path / "bundle"))
    found = export(pipe, plan, folder, inputs=inputs, steps=[STEPS], targets=[*runs, "tensorrt"], most_images=1)
    assert found.kept == sum(engine.target == "onnx" for engine in found.manifest.engines)
    assert found.engines == 4
    built = [engine for engine in found.manifest.engines if engine.target == "tensorrt"]
    assert {engine.row for engine in built} == {engine.row for engine in found.manifest.engines}
    assert all(engine.memory["activations"] and not engine.unchecked for engine in built)
    assert found.manifest.sizes[0].decode is not None
    assert found.manifest.compared.keys() == set(runs)
    probed = probe(pipe, inputs, STEPS)
    wanted = latents_of(pipe, inputs, plan, STEPS, probed.program)
    for target in runs:
        bundle = load_bundle(folder, target)
        assert bundle.self_test() < CLOSE
        assert max(differences(latents(bundle, probed.conditioning), wanted)) < CLOSE
        check_prompts(pipe, inputs, plan, bundle)
    reuse = min((engine for engine in found.manifest.engines if engine.row >= 0), key=lambda each: len(each.weights))
    left = [weight for weight in reuse.weights for site in plan.sites if weight.startswith(f"{site.path}.")]
    assert not left, "nothing of an attention is read"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixart_sigma", "flux"])
def test_several_sizes_share_weights(name, tmp_path):
    """FLUX's packed latents of both sizes have one shape; PixArt is told the size by further conditions."""
    pipe, inputs = one_image(name, tmp_path)
    plan = plan_from_rule(
        pipe, 4, lambda step, site: FULL if step < 2 else WINDOW if step == 2 else REUSE, inputs=inputs
    )
    given = {"steps": [4], "most_images": 1}
    one = export(pipe, plan, tmp_path / "one", inputs=inputs, **given)
    sizes = [(HEIGHT, WIDTH), (WIDTH, HEIGHT)]
    both = export(pipe, plan, tmp_path / "both", inputs=inputs, sizes=sizes, **given)
    assert both.engines == 2 * one.engines
    weights = [found.manifest.files[found.manifest.weights].bytes for found in (one, both)]
    assert weights[1] < 1.1 * weights[0]
    bundle = load_bundle(tmp_path / "both")
    assert bundle.sizes == tuple(sizes)
    assert bundle.self_test() < CLOSE
    for (height, width), size in zip(sizes, both.manifest.sizes, strict=True):
        call = {**inputs, "height": height, "width": width}
        probed = probe(pipe, call, 4)
        apply(pipe, plan, inner="eager", resize="fraction")
        generator = torch.Generator().manual_seed(TEST_SEED)
        wanted = pipe(**call, num_inference_steps=4, generator=generator, output_type="np").images
        remove(pipe)
        chosen = {"height": height, "width": width}
        found = bundle(seed=TEST_SEED, conditions=probed.conditioning, images=1, **chosen).images
        assert tuple(found.shape) == (1, *size.decode.shape) == wanted.shape
        assert (found.float() - torch.from_numpy(wanted * 255).round()).abs().max() <= 1
        texts = {text: inputs[text] for text in ("prompt", "negative_prompt") if text in inputs}
        assert torch.equal(bundle(seed=TEST_SEED, **texts, **chosen).images, found)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "target", "close"), [("float16", "onnx", 2e-2), ("bfloat16", "aoti", 1e-1)])
def test_half_precision(dtype, target, close, tmp_path):
    """Against the pipeline in the same dtype, whose scheduler rounds the latents at every step."""
    pipe, inputs = one_image("pixart_sigma", tmp_path)
    pipe.to(getattr(torch, dtype))
    plan = plan_from_rule(pipe, 4, lambda step, site: FULL if step < 2 else REUSE, inputs=inputs)
    export(pipe, plan, tmp_path, inputs=inputs, steps=[4], targets=[target], most_images=1)
    found = load_bundle(tmp_path).tested()
    assert found.passed
    assert found.latents < close
    assert found.levels <= (2 if dtype == "float16" else 8), "what was measured, and a little more"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loop_of_a_pipeline_that_keeps_its_latents_wide(dtype, tmp_path):
    """Wan's latents are in float32, and rounded for the model alone."""
    pipe, inputs = one_image("wan", tmp_path)
    pipe.to(dtype)
    program = probe(pipe, inputs, 4).program
    assert program.error < 2e-6
    assert {form.sample.dtype for form in program.forms} == {str(dtype).removeprefix("torch.")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_bundle_with_a_lora_makes_what_the_pipeline_makes_with_it_fused(name, exported, tmp_path):
    """The LoRA is made by peft and saved by diffusers, with and without the component's name; the pipeline takes it
    through its own loaders."""
    peft = pytest.importorskip("peft")
    _, inputs, plan, folder = exported(name)
    manifest = read_manifest(folder)
    pipe, _ = one_image(name, tmp_path)
    trained, _ = one_image(name, tmp_path)
    torch.manual_seed(7)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_out.0", "proj_out", "proj"], rank_pattern={"to_k": 2},
        alpha_pattern={"proj_out": 3}, init_lora_weights=False,
    )  # fmt: skip
    trained.transformer.add_adapter(config)
    if name == "sd3":
        layers = peft.utils.get_peft_model_state_dict(trained.transformer)
        described = config.to_dict()
        type(pipe).save_lora_weights(tmp_path / "lora", layers, transformer_lora_adapter_metadata=described)
        pipe.load_lora_weights(str(tmp_path / "lora"))
    else:
        trained.transformer.save_lora_adapter(tmp_path / "lora")
        pipe.transformer.load_lora_adapter(str(tmp_path / "lora"), prefix=None, use_safetensors=True)
    made = adapt_bundle(folder, tmp_path / "lora", tmp_path / "adapted", 0.25)
    assert len(made.changed) > 8
    assert min(made.changed.values()) > 1e-3
    if name == "sd3":  # the patches' convolution
        weight = WeightFile(folder / manifest.weights)["transformer.pos_embed.proj.weight"]
        assert weight.ndim == 4
        assert "transformer.pos_embed.proj.weight" in made.changed

    pipe.fuse_lora(lora_scale=0.25)
    pipe.unload_lora_weights()
    (schedule,) = manifest.schedules
    program = Program.from_json(parse_json((folder / schedule.program).read_bytes()), "here")
    wanted = latents_of(pipe, inputs, plan, STEPS, program)[-1]
    latents, old = (
        load_bundle(each).self_test_data()[f"latents.0.planned.{STEPS}"] for each in (tmp_path / "adapted", folder)
    )
    assert (latents - wanted).abs().max() < CLOSE * wanted.abs().max()
    assert (old - wanted).abs().max() > 1000 * CLOSE * wanted.abs().max()


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
        wanted = latents_of(pipe, {**inputs, **given}, plan, STEPS, program)[-1]
        latents = found[prompt] = bundle(**texts, seed=TEST_SEED, decode=False).latents
        assert far(latents, wanted) < CLOSE, texts
    assert len({float(latents.flatten()[0]) for latents in found.values()}) == len(found), "prompts matter"
    # Without a negative prompt it is that of the export.
    own = {name: text if isinstance(text, str) else text[0] for name, text in inputs.items() if name == "prompt"}
    wanted = latents_of(pipe, inputs, plan, STEPS, program)[-1]
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
    pipe, inputs = one_image("flux", tmp_path)
    plan = plan_from_rule(pipe, STEPS, rule, inputs=inputs)
    export(pipe, plan, tmp_path, inputs=inputs, steps=[STEPS], most_images=2)
    assert export(pipe, plan, tmp_path, inputs=inputs, steps=[STEPS], most_images=2).made == 0
    bundle = load_bundle(tmp_path)
    program = bundle._program(bundle._schedule(None, None))
    further = {"prompt": ["two boats"], "prompt_2": ["a grey house"]}
    wanted = latents_of(pipe, {**inputs, **further}, plan, STEPS, program)[-1]
    found = bundle(prompt="two boats", prompt_2=["a grey house"], seed=TEST_SEED, decode=False).latents
    assert far(found, wanted) < CLOSE
    two = {"prompt": ["two boats", "a red house"]}
    wanted = latents_of(pipe, {**inputs, **two}, plan, STEPS, program)[-1]
    found = bundle(**two, seed=TEST_SEED, decode=False).latents
    assert far(found, wanted) < CLOSE
    same = bundle(prompt="a red house", images=2, seed=TEST_SEED, decode=False).latents
    assert far(same[1], found[1]) < CLOSE


@pytest.mark.slow
def test_prompts_need_neither_diffusers_nor_transformers(exported):
    *_, folder = exported("wan")
    code = f"""
import sys
for name in ("diffusers", "transformers"):
    sys.modules[name] = None
import difa_compile
bundle = difa_compile.load_bundle({str(folder)!r})
assert bundle(prompt="a red cat", seed=0).images.shape[0] == 1
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
def test_other_weights_of_a_text_encoder(tmp_path):
    """Prompts are encoded with them, and the negative prompt of the export, whose encoding lies in the bundle, too."""
    pipe, inputs = one_image("pixart_sigma", tmp_path)
    del inputs["negative_prompt"]
    plan = plan_from_rule(pipe, 4, rule, inputs=inputs)
    export(pipe, plan, tmp_path / "bundle", inputs=inputs, steps=[4], most_images=1)
    old = load_bundle(tmp_path / "bundle")
    assert old.manifest.sizes[0].conditions.get("uncond"), "a negative prompt is stored"
    weights = {}
    with torch.no_grad():
        for name, value in pipe.text_encoder.named_parameters():
            if value.ndim == 2:
                weights[f"text_encoder.{name}"] = value.mul_(1.5).clone()
    safetensors.torch.save_file(weights, tmp_path / "text.safetensors")
    adapt_bundle(tmp_path / "bundle", tmp_path / "text.safetensors", tmp_path / "adapted")
    bundle = load_bundle(tmp_path / "adapted")
    assert bundle.self_test() < CLOSE
    program = bundle._program(bundle._schedule(None, None))
    for texts in ({"prompt": ["two small boats"]}, {"prompt": ["a red house"], "negative_prompt": ["grey"]}):
        wanted = latents_of(pipe, {**inputs, **texts}, plan, 4, program)[-1]
        found, before = (each(**texts, seed=TEST_SEED, decode=False).latents for each in (bundle, old))
        assert far(found, wanted) < CLOSE < 0.01 * far(before, wanted)
    own = probe(pipe, inputs, 4).conditioning["cond"]
    wanted = latents_of(pipe, inputs, plan, 4, program)[-1]
    assert far(bundle(conditions={"cond": own}, seed=TEST_SEED, decode=False).latents, wanted) < CLOSE
