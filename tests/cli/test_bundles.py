"""difa export, run, bundle show and verify."""

import json
import math
import subprocess
import sys

import msgspec
import pytest
import safetensors.torch
import torch
from PIL import Image

from difa_compile.bundle.difference import BundleDifference, PlanChange, Sides, WeightChange
from difa_compile.bundle.manifest import MANIFEST, read_manifest
from difa_compile.bundle.runner import load_bundle
from difa_compile.cli.bundles import _dearer
from difa_compile.decision import FULL, Decision
from difa_compile.pipeline.apply import apply
from difa_compile.pipeline.loading import load_pipeline
from difa_compile.pipeline.rules import plan_from_rule
from difa_compile.planner.make import plan_from_table
from tests.support import bundles
from tests.support.commands import run
from tests.support.plans import plan_of
from tests.support.tables import made_table

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


def test_run_takes_prompts(tmp_path):
    folder = bundles.prompted(tmp_path)
    result = run(
        "run", folder, "-o", tmp_path / "out", "--prompt", "two", "--prompt", "One", "--negative-prompt", "zero"
    )
    assert result.exit_code == 0, result.output
    wanted = load_bundle(folder)(prompt=["two", "one"], negative_prompt="zero", seed=0).images
    for path, image in zip(sorted((tmp_path / "out").iterdir()), wanted, strict=True):
        with Image.open(path) as picture:
            assert list(picture.getdata()) == image.flatten().tolist()
    shown = " ".join(run("bundle", "show", folder).output.split())
    assert "prompts, cond: prompt by tokenizers/tokenizer-" in shown
    assert "uncond: negative_prompt by" in shown
    assert "encoded by encode" in shown
    result = run("run", bundles.kept(), "-o", tmp_path / "out", "--prompt", "two")
    assert result.exit_code == 1
    assert "has no text encoder" in " ".join(result.stderr.split())


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


def test_run_says_what_an_engine_refuses(tmp_path):
    result = run("run", bundles.kept(), "-o", tmp_path, "--labels", "99999")
    assert result.exit_code == 1
    told = " ".join(result.stderr.split())
    assert "ended row-00-" in told
    assert "a label that it does not know" in told


def test_show_and_verify(tmp_path):
    result = run("bundle", "show", bundles.kept())
    assert result.exit_code == 0, result.output
    assert "quick" in result.stdout
    assert "tokens of attention: 4x4" in result.stdout
    said = " ".join(result.stdout.replace("\N{NO-BREAK SPACE}", " ").split())
    assert "caches 4 KiB an image (8 KiB of 2 images)" in said
    assert "what an engine takes and gives, at most" in said
    result = run("bundle", "verify", bundles.kept())
    assert result.exit_code == 0, result.output
    files = read_manifest(bundles.kept()).files
    assert f"{len(files)} files are what was exported" in result.stdout
    said = " ".join(result.stdout.split())
    assert "onnx: beside what the pipeline made, the self-test's latents differ by" in said
    assert "levels" in said, "of pictures, too"


def test_run_writes_previews(tmp_path):
    result = run("run", bundles.kept(), "-o", tmp_path, "--labels", "1,2", "--preview", 3)
    assert result.exit_code == 0, result.output
    names = [f"{image}{step}.png" for image in ("0000", "0001") for step in ("", "-step-3", "-step-4")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    last, final = (Image.open(tmp_path / name) for name in ("0001-step-4.png", "0001.png"))
    assert list(last.getdata()) == list(final.getdata()), "what is made after the last step is the image"
    assert list(Image.open(tmp_path / "0001-step-3.png").getdata()) != list(final.getdata())


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
    assert "nor was it run when the bundle was written" in said
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


def lora(folder):
    rows = len(bundles.pipeline().transformer.proj_out_1.weight)
    factors = {"proj_out_1.lora_A.weight": torch.ones(1, 16), "proj_out_1.lora_B.weight": torch.ones(rows, 1)}
    more = {"text_encoder.q.lora_A.weight": torch.ones(1, 2), "text_encoder.q.lora_B.weight": torch.ones(2, 1)}
    safetensors.torch.save_file(factors | more, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def test_adapt_and_diff(tmp_path, monkeypatch):
    result = run("bundle", "adapt", bundles.kept(), lora(tmp_path), "--out", tmp_path / "out", "--scale", 0.5)
    assert result.exit_code == 1
    assert "leave them out, if that is meant" in " ".join(result.stderr.split())
    options = ("--out", tmp_path / "out", "--scale", 0.5, "--without", "text_encoder")
    result = run("bundle", "adapt", bundles.kept(), lora(tmp_path), *options)
    assert result.exit_code == 0, result.output
    assert "1 weights changed" in result.stdout
    (adapter,) = read_manifest(tmp_path / "out").adapters
    assert (adapter.scale, adapter.without) == (0.5, ("text_encoder",))
    result = run("bundle", "show", tmp_path / "out")
    assert "lora.safetensors" in result.stdout
    result = run("bundle", "verify", tmp_path / "out")
    assert "beside what the engines of onnx made" in " ".join(result.stdout.split())

    result = run("bundle", "diff", bundles.kept(), tmp_path / "out", COLUMNS="80")
    assert result.exit_code == 3, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "transformer.proj_out_1.weight" in result.stdout
    result = run("bundle", "diff", bundles.kept(), tmp_path / "out", "--json")
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert found["equal"] is False
    assert [change["name"] for change in found["changed"]] == ["transformer.proj_out_1.weight"]
    result = run("bundle", "diff", bundles.kept(), bundles.kept())
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("the same; ")
    assert run("bundle", "diff", bundles.kept(), tmp_path).exit_code == 1


def test_diff_tells_of_everything(monkeypatch):
    """A table for each part; what has no number is null in JSON."""
    made = BundleDifference(
        source={"name": Sides("one", "other")},
        versions={"torch": Sides("1", "2")},
        settings={"images": Sides("1-2", "1-8")},
        plans=(
            PlanChange("fast", 3, 8, ""),
            PlanChange("slow", None, 8, "other sites"),
            PlanChange("best", 0, 8, ""),
            PlanChange("mild", 0, 8, "", 2),
            PlanChange("mixed", 1, 8, "", 3),
        ),
        programs={"fast, 4 steps": Sides("DDIM", "Euler")},
        engines={"onnx row-00": Sides("121 weights", "")},
        kept=2,
        added=("new",),
        removed=("old",),
        changed=(*(WeightChange(f"w{i}", i / 10, "") for i in range(30)), WeightChange("inf", math.inf, "a -> b")),
        bytes=(1000, 2000),
    )
    monkeypatch.setattr("difa_compile.bundle.difference.bundle_difference", lambda first, second: made)
    result = run("bundle", "diff", "a", "b")
    assert result.exit_code == 3
    lines = " ".join(result.stdout.split())
    for text in (
        "name one other", "torch 1 2", "images 1-2 1-8", "fast 3 of 8 decisions", "slow other sites",
        "best figures and settings alone", "mild weights of 2 forecasts",
        "mixed 1 of 8 decisions, weights of 3 forecasts", "fast, 4 steps DDIM Euler", "onnx row-00 121 weights",
        "old in A alone", "new in B alone", "inf inf a -> b", "w29 2.9", "and 13 more (--json has all)",
        "31 weights changed; 2 engines in both; 0.977 KiB and 1.95 KiB on the disk",
    ):  # fmt: skip
        assert text in lines.replace("\N{NO-BREAK SPACE}", " "), (text, lines)
    found = json.loads(run("bundle", "diff", "a", "b", "--json").stdout)
    assert found["changed"][-1] == {"name": "inf", "amount": None, "form": "a -> b"}


def test_export_passes_options_on(tmp_path, monkeypatch):
    seen = {}

    class Made:
        engines, made, kept, bytes, cost, weighed = 3, 2, 1, 1000, 1.25, "operations"

    def export(pipe, plans, out, **options):
        seen.update(options, plans=plans, out=out)
        options["told"]("a line")
        return Made

    class Pipe:
        def set_progress_bar_config(self, disable):
            pass

    def opened(model, device, call, dtype):
        seen["dtype"] = dtype
        return Pipe()

    monkeypatch.setattr("difa_compile.cli.bundles.open_pipeline", opened)
    monkeypatch.setattr("difa_compile.exporting.write.export", export)
    monkeypatch.setattr("difa_compile.exporting.write.library", lambda: "it")
    monkeypatch.setattr("difa_compile.exporting.write.capabilities", lambda *given: seen.update(built_for=given))
    pipe = bundles.pipeline()
    bundles.plan(pipe).save(tmp_path / "quick.json")
    options = (
        "--plan",
        f"fast={tmp_path / 'quick.json'}",
        "--plan",
        tmp_path / "quick.json",
        "--target",
        "onnx, tensorrt",
        "--gpus",
        "8.9, 12.0",
    )
    more = ("--steps", "4,6", "--batch", "1:2:3", "--max-engines", 5, "--portable", "--labels", "1,2", "--guidance", 3)
    more += ("--size", "64x96, 32x32", "--dtype", "bfloat16")
    result = run("export", "demo", "-o", tmp_path / "out", *options, *more)
    assert result.exit_code == 0, result.output
    assert list(seen["plans"]) == ["fast", "quick"]
    assert (seen["targets"], seen["steps"]) == (["onnx", "tensorrt"], [4, 6])
    assert (seen["usual_images"], seen["most_images"]) == (2, 3)
    assert (seen["max_engines"], seen["portable"], seen["name"]) == (5, True, "demo")
    assert (seen["sizes"], seen["dtype"]) == ([(64, 96), (32, 32)], torch.bfloat16)
    assert seen["gpus"] == ["8.9", "12.0"]
    assert seen["built_for"] == ("it", ["8.9", "12.0"]), "refused before the model is loaded"
    assert seen["inputs"] == {"class_labels": [1], "guidance_scale": 3.0}, "engines for more images follow from --batch"
    assert "a line" in result.stdout
    assert "3 engines (2 files made, 1 kept)" in " ".join(result.stdout.split())
    assert "At most 5 engines cost 25.0 % more operations.\n" in result.stdout


def test_export_names_the_planners_way_where_a_limit_on_engines_costs_much():
    free, few = (plan_from_table(made_table(), budget=0.5, max_rows=rows) for rows in (None, 2))
    rows = len(set(free.decisions))
    assert rows > 2
    found = _dearer(2, 1.2, "predicted time", {"free": free, "few": few})
    assert found.startswith("At most 2 engines cost 20.0 % more predicted time. The planner can keep to budget 0.5")
    assert "difa plan TABLE --max-rows 2 with the same limit" in found
    for plans, cost, most in (({"few": few}, 1.2, 2), ({"free": free}, 1.02, 2), ({"free": free}, 1.2, rows)):
        assert _dearer(most, cost, "operations", plans).endswith("% more operations.")
    by_hand = plan_of("F.FW", "FFF.")
    assert _dearer(2, 1.2, "operations", {"by hand": by_hand}).endswith("20.0 % more operations.")


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
@pytest.mark.parametrize("target", ["onnx", "aoti"])
def test_the_demo_model_exported_and_run_by_a_process_without_diffusers(target, tmp_path):
    """The commands of the README."""
    forecast = Decision.parse("forecast:1")
    pipe = load_pipeline("demo")
    plan = plan_from_rule(
        pipe, 6, lambda step, site: FULL, spans=lambda step, span: FULL if step < 2 or step == 4 else forecast
    )
    plan.save(tmp_path / "plan.json")
    digits = tmp_path / "digits"
    chosen = ("--target", target, "--steps", "6")
    result = run("export", "demo", "--plan", tmp_path / "plan.json", *chosen, "-o", digits)
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
