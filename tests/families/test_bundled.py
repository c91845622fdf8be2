"""Whole pipelines as bundles: what ONNX Runtime makes of their engines is what the pipelines make with the plan.

By the self-test of a bundle, whose latents are the pipeline's own.
"""

import pytest
import torch

from difa_compile.bundle.adapting import adapt_bundle
from difa_compile.bundle.program import Program
from difa_compile.bundle.runner import load_bundle
from difa_compile.bundle.weights import WeightFile
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.export.write import export_bundle, latents_of
from difa_compile.files.documents import parse_json
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
    reuse = min((engine for engine in found.manifest.engines if engine.row >= 0), key=lambda each: len(each.weights))
    left = [weight for weight in reuse.weights for site in plan.sites if weight.startswith(f"{site.path}.")]
    assert not left, "nothing of an attention is read"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_bundle_with_a_lora_makes_what_the_pipeline_makes_with_it_fused(name, tmp_path):
    """The LoRA is made by peft and saved by diffusers, with and without the component's name; the pipeline takes it
    through its own loaders."""
    peft = pytest.importorskip("peft")
    pipe, inputs = prompted(name)
    plan = plan_from_rule(pipe, STEPS, rule, inputs=inputs)
    found = export_bundle(pipe, plan, tmp_path / "bundle", inputs=inputs, steps=[STEPS], most_images=1)

    trained, _ = prompted(name)
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
    made = adapt_bundle(tmp_path / "bundle", tmp_path / "lora", tmp_path / "adapted", 0.25)
    assert len(made.changed) > 8
    assert min(made.changed.values()) > 1e-3
    if name == "sd3":  # the patches' convolution
        weight = WeightFile(tmp_path / "bundle" / found.manifest.weights)["transformer.pos_embed.proj.weight"]
        assert weight.ndim == 4
        assert "transformer.pos_embed.proj.weight" in made.changed

    pipe.fuse_lora(lora_scale=0.25)
    pipe.unload_lora_weights()
    (schedule,) = found.manifest.schedules
    program = Program.from_json(parse_json((tmp_path / "bundle" / schedule.program).read_bytes()), "here")
    wanted = latents_of(pipe, inputs, plan, STEPS, program)
    latents, old = (
        load_bundle(tmp_path / folder).self_test_data()[f"latents.planned.{STEPS}"] for folder in ("adapted", "bundle")
    )
    assert (latents - wanted).abs().max() < CLOSE * wanted.abs().max()
    assert (old - wanted).abs().max() > 1000 * CLOSE * wanted.abs().max()
