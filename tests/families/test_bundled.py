"""Whole pipelines as bundles: what ONNX Runtime makes of their engines is what the pipelines make with the plan.

By the self-test of a bundle, whose latents are the pipeline's own.
"""

import pytest

from difa_compile.bundle.runner import load_bundle
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.export.write import export_bundle
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
    """TensorRT's engines are built, from models that make what the programs make; they do not run here."""
    pytest.importorskip("tensorrt_rtx")
    pipe, inputs = video(tmp_path) if name == "wan" else prompted(name)
    plan = plan_from_rule(pipe, STEPS, rule, inputs=inputs)
    found = export_bundle(
        pipe, plan, tmp_path / "bundle", inputs=inputs, steps=[STEPS], most_images=1, targets=["onnx", "tensorrt"]
    )
    assert found.engines == 3
    built = [engine for engine in found.manifest.engines if engine.target == "tensorrt"]
    assert len(built) == 4, "with the one that decodes"
    assert all(engine.memory["activations"] and not engine.unchecked for engine in built)
    assert found.manifest.decode is not None
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.self_test() < CLOSE
    reuse = min((engine for engine in found.manifest.engines if engine.row >= 0), key=lambda each: len(each.weights))
    left = [weight for weight in reuse.weights for site in plan.sites if weight.startswith(f"{site.path}.")]
    assert not left, "nothing of an attention is read"
