"""difa export, run, bundle show and verify."""

import json
import subprocess
import sys

import msgspec
import pytest
import safetensors.torch
import torch
from PIL import Image

from difa_compile.bundle.manifest import MANIFEST, read_manifest
from difa_compile.bundle.runner import load_bundle
from difa_compile.decision import FULL, Decision
from difa_compile.pipeline.apply import apply
from difa_compile.pipeline.loading import load_pipeline
from difa_compile.pipeline.rules import plan_from_rule
from tests.support import bundles
from tests.support.commands import run

pytest.importorskip("onnxruntime")


def test_run_writes_what_the_bundle_makes(tmp_path):
    result = run("run", bundles.kept(), "-o", tmp_path / "out", "--labels", "1,2", "--seed", 4, "--guidance", 2.5)
    assert result.exit_code == 0, result.output
    wanted = load_bundle(bundles.kept())(class_labels=[1, 2], seed=4, guidance=2.5).images
    found = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in found] == ["0000.png", "0001.png"]
    for path, image in zip(found, wanted, strict=True):
        with Image.open(path) as picture:
            assert list(picture.getdata()) == image.flatten().tolist()


def test_run_takes_conditions_from_a_file(tmp_path):
    path = tmp_path / "conditions.safetensors"
    safetensors.torch.save_file({"cond.class_labels": torch.tensor([2])}, path)
    result = run("run", bundles.kept(), "-o", tmp_path / "out", "--conditions", path)
    assert result.exit_code == 0, result.output
    safetensors.torch.save_file({"text": torch.tensor([2])}, path)
    result = run("run", bundles.kept(), "-o", tmp_path / "out", "--conditions", path)
    assert result.exit_code == 2
    assert "name tensors cond.NAME or uncond.NAME" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tier", "slow"), "has no tier 'slow'"),
        (("--steps", "5"), "was not exported for 5 steps"),
        (("--target", "aoti"), "has no engines for 'aoti'"),
    ],
)
def test_run_says_what_a_bundle_has_not(tmp_path, options, message):
    result = run("run", bundles.kept(), "-o", tmp_path, "--labels", "1", *options)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


def test_show_and_verify(tmp_path):
    result = run("bundle", "show", bundles.kept())
    assert result.exit_code == 0, result.output
    assert "quick" in result.stdout
    assert "weights" in result.stdout
    result = run("bundle", "verify", bundles.kept())
    assert result.exit_code == 0, result.output
    files = read_manifest(bundles.kept()).files
    assert f"{len(files)} files are what was exported" in result.stdout
    assert "onnx: the self-test's latents differ by" in " ".join(result.stdout.split())


def test_what_was_not_run_is_said(tmp_path, monkeypatch):
    """Engines of another machine: what the export says of them, and their memory."""
    folder = bundles.copy(tmp_path)
    manifest = read_manifest(folder)
    engines = tuple(
        msgspec.structs.replace(engine, target="tensorrt", memory={"activations": 3 * 2**20})
        for engine in manifest.engines
    )
    elsewhere = msgspec.structs.replace(manifest, engines=engines, compared={})
    (folder / MANIFEST).write_text(json.dumps(elsewhere.to_json()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("bundle", "verify", folder)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "tensorrt: not run: engines of the target tensorrt run on an NVIDIA GPU" in said
    assert "nor was it run when it was exported" in said
    shown = run("bundle", "show", folder)
    assert "activations" in shown.stdout
    assert "3 MiB" in " ".join(shown.stdout.split())
    assert "activations" not in run("bundle", "show", bundles.kept()).stdout


def test_verify_tells_of_a_damaged_file(tmp_path):
    folder = bundles.copy(tmp_path)
    name = read_manifest(folder).weights
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    result = run("bundle", "verify", folder)
    assert result.exit_code == 1
    assert "it was cut off or exchanged" in " ".join(result.stderr.split())
    result = run("bundle", "show", tmp_path)
    assert result.exit_code == 1
    assert "manifest.json" in result.stderr


def test_export_passes_options_on(tmp_path, monkeypatch):
    seen = {}

    class Made:
        engines, made, kept, bytes, cost = 3, 2, 1, 1000, 1.25

    def export_bundle(pipe, plans, out, **options):
        seen.update(options, plans=plans, out=out)
        options["told"]("a line")
        return Made

    class Pipe:
        def set_progress_bar_config(self, disable):
            pass

    monkeypatch.setattr("difa_compile.cli.bundles.open_pipeline", lambda model, device, call: Pipe())
    monkeypatch.setattr("difa_compile.export.write.export_bundle", export_bundle)
    pipe = bundles.pipeline()
    bundles.plan(pipe).save(tmp_path / "quick.json")
    options = (
        "--plan",
        f"fast={tmp_path / 'quick.json'}",
        "--plan",
        tmp_path / "quick.json",
        "--target",
        "onnx, aoti",
        "--gpus",
        "8.9, 12.0",
    )
    more = ("--steps", "4,6", "--batch", 3, "--max-engines", 5, "--portable", "--labels", "1,2", "--guidance", 3)
    result = run("export", "demo", "-o", tmp_path / "out", *options, *more)
    assert result.exit_code == 0, result.output
    assert list(seen["plans"]) == ["fast", "quick"]
    assert (seen["targets"], seen["steps"], seen["most_images"]) == (["onnx", "aoti"], [4, 6], 3)
    assert (seen["max_engines"], seen["portable"], seen["name"]) == (5, True, "demo")
    assert seen["gpus"] == ["8.9", "12.0"]
    assert seen["inputs"] == {"class_labels": [1], "guidance_scale": 3.0}, "engines for more images follow from --batch"
    assert "a line" in result.stdout
    assert "3 engines (2 files made, 1 kept)" in " ".join(result.stdout.split())
    assert "25 % more work" in " ".join(result.stdout.split())


@pytest.mark.parametrize("steps", ["", "0", "4,", "4;6", "ten", "10001"])
def test_export_steps_that_are_none(tmp_path, steps):
    bundles.plan(bundles.pipeline()).save(tmp_path / "plan.json")
    result = run("export", "demo", "--plan", tmp_path / "plan.json", "--steps", steps)
    assert result.exit_code == 2
    assert "no list of numbers" in " ".join(result.stderr.split())


def test_export_takes_each_tier_once(tmp_path):
    bundles.plan(bundles.pipeline()).save(tmp_path / "plan.json")
    result = run("export", "demo", "--plan", tmp_path / "plan.json", "--plan", f"plan={tmp_path / 'plan.json'}")
    assert result.exit_code == 2
    assert "is given twice" in result.stderr


@pytest.mark.slow
def test_the_demo_model_exported_and_run_by_a_process_without_diffusers(tmp_path):
    """The commands of the README."""
    forecast = Decision.parse("forecast:1")
    pipe = load_pipeline("demo")
    plan = plan_from_rule(
        pipe, 6, lambda step, site: FULL, spans=lambda step, span: FULL if step < 2 or step == 4 else forecast
    )
    plan.save(tmp_path / "plan.json")
    digits = tmp_path / "digits"
    result = run("export", "demo", "--plan", tmp_path / "plan.json", "--steps", "6", "-o", digits)
    assert result.exit_code == 0, result.output
    assert json.loads((digits / MANIFEST).read_text())["source"]["name"] == "demo"
    code = """
import sys
for name in ("diffusers", "transformers"):
    sys.modules[name] = None
from difa_compile.cli import main
main()
"""
    command = [sys.executable, "-c", code, "run", str(digits), "-o", str(tmp_path / "images"), "--labels", "3,8"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    images = [Image.open(path) for path in sorted((tmp_path / "images").iterdir())]
    assert [image.size for image in images] == [(32, 32), (32, 32)]
    apply(pipe, plan, inner="eager")
    generator = torch.Generator().manual_seed(0)
    wanted = pipe(class_labels=[3, 8], guidance_scale=4.0, num_inference_steps=6, generator=generator).images
    for image, one in zip(images, wanted, strict=True):
        differences = [abs(a - b) for a, b in zip(image.getdata(), one.convert("L").getdata(), strict=True)]
        assert max(differences) <= 1
