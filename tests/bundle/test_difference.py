"""What differs between bundles: nothing of a copy; of others what was changed, and nothing else."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from difa_compile.bundle import manifest as manifests
from difa_compile.bundle.adapting import adapt_bundle
from difa_compile.bundle.difference import PlanChange, Sides, WeightChange, bundle_difference
from difa_compile.bundle.manifest import MANIFEST, File, Text, read_manifest
from difa_compile.bundle.weights import WeightFile, write_weights
from difa_compile.decision import FULL
from difa_compile.errors import BundleFormatError, BundleIntegrityError
from difa_compile.exporting.write import export
from difa_compile.pipeline.rules import plan_from_rule
from tests.support import bundles

pytest.importorskip("onnxruntime")

PARTS = ("source", "versions", "settings", "plans", "programs", "engines", "added", "removed", "changed")


def differing(found):
    return {part for part in PARTS if getattr(found, part)}


def rewritten(folder, **changes):
    """The bundle in a folder with some fields of its manifest changed."""
    changed = manifests.msgspec.structs.replace(read_manifest(folder), **changes)
    (folder / MANIFEST).write_text(json.dumps(changed.to_json()))


def exchanged(folder, name, fresh, **changes):
    """The bundle in a folder with another file in the place of one."""
    entry = File(fresh.stat().st_size, manifests.hashlib.sha256(fresh.read_bytes()).hexdigest())
    shutil.move(fresh, folder / name)
    rewritten(folder, files=read_manifest(folder).files | {name: entry}, **changes)


@pytest.fixture
def folder(tmp_path):
    return bundles.copy(tmp_path)


def test_a_copy_is_equal(folder):
    found = bundle_difference(bundles.kept(), folder)
    assert found.equal
    assert not differing(found)
    assert found.kept == len(read_manifest(folder).engines)
    assert found.bytes[0] == found.bytes[1] == sum(file.bytes for file in read_manifest(folder).files.values())


def test_an_adapted_bundle(tmp_path):
    tensors = {"proj_out_1.lora_A.weight": torch.ones(1, 16), "proj_out_1.lora_B.weight": torch.ones(32, 1)}
    weight = bundles.pipeline().transformer.proj_out_1.weight.detach()
    tensors["proj_out_1.lora_B.weight"] = torch.ones(len(weight), 1)
    safetensors.torch.save_file(tensors, tmp_path / "lora.safetensors")
    adapt_bundle(bundles.kept(), tmp_path / "lora.safetensors", tmp_path / "out", 0.5)
    found = bundle_difference(bundles.kept(), tmp_path / "out")
    assert differing(found) == {"source", "changed"}
    assert found.source == {"put in": Sides("", found.source["put in"].second)}
    assert found.source["put in"].second.startswith("lora.safetensors ")
    assert found.source["put in"].second.endswith(", scale 0.5")
    (change,) = found.changed
    assert (change.name, change.form) == ("transformer.proj_out_1.weight", "")
    assert change.amount == pytest.approx(float(0.5 * math.sqrt(weight.numel()) / weight.norm()), rel=1e-4)
    assert found.kept == len(read_manifest(bundles.kept()).engines)
    assert not found.equal


def test_weights_that_come_go_and_take_another_form(folder, tmp_path):
    old = WeightFile(folder / read_manifest(folder).weights)
    names = [name for name in sorted(old.places) if name.endswith(".weight") and old[name].any()][:3]
    tensors = {name: old[name].clone() for name in old.places}
    tensors["more"] = torch.ones(2)
    del tensors[names[0]]
    tensors[names[1]] = tensors[names[1]].half()
    tensors[names[2]] = tensors[names[2]][:1]
    write_weights(tmp_path / "fresh", tensors)
    exchanged(folder, read_manifest(folder).weights, tmp_path / "fresh")
    found = bundle_difference(bundles.kept(), folder)
    assert differing(found) == {"added", "removed", "changed"}
    assert (found.added, found.removed) == (("more",), (names[0],))
    one, other = found.changed
    assert one.name == names[1]
    assert 0 < one.amount < 1e-3
    assert one.form == f"float32 {list(old[names[1]].shape)} -> float16 {list(old[names[1]].shape)}"
    rows, *rest = old[names[2]].shape
    assert other == WeightChange(names[2], None, f"float32 {[rows, *rest]} -> float32 {[1, *rest]}")


def test_fields_of_the_manifest(folder):
    old = read_manifest(folder)
    engine = manifests.msgspec.structs.replace(old.engines[0], key="other", images=(1, 1))
    source = manifests.msgspec.structs.replace(old.source, name="another", licence="mit")
    rewritten(
        folder,
        engines=(engine, *old.engines[1:]),
        source=source,
        made_with=old.made_with | {"torch": "0"},
        slots=(*old.slots, old.slots[0]),
    )
    found = bundle_difference(bundles.kept(), folder)
    assert differing(found) == {"source", "versions", "settings", "engines", "programs"}
    assert found.source == {"name": Sides(old.source.name, "another"), "licence": Sides(old.source.licence, "mit")}
    assert found.versions == {"torch": Sides(old.made_with["torch"], "0")}
    assert set(found.settings) == {"images", "caches"}
    assert set(found.engines) == {"onnx row-00"}
    assert found.engines["onnx row-00"].second.startswith("1 images, ")
    assert found.kept == len(old.engines) - 1
    (program,) = found.programs.values()
    assert program.first.rpartition("order ")[0] == program.second.rpartition("order ")[0], (
        "the loop itself is the same"
    )


def test_another_plan(folder, tmp_path):
    pipe = bundles.pipeline()
    other = plan_from_rule(pipe, steps=bundles.STEPS, rule=lambda step, site: FULL)
    other.save(tmp_path / "plan.json")
    exchanged(folder, read_manifest(folder).plans["quick"], tmp_path / "plan.json")
    found = bundle_difference(bundles.kept(), folder)
    assert differing(found) == {"plans"}
    cells = len(other.sites) * bundles.STEPS
    assert found.plans == (PlanChange("quick", cells // 2, cells, ""),)
    longer = plan_from_rule(pipe, steps=bundles.STEPS + 1, rule=lambda step, site: FULL)
    longer.save(tmp_path / "plan.json")
    exchanged(folder, read_manifest(folder).plans["quick"], tmp_path / "plan.json")
    (change,) = bundle_difference(bundles.kept(), folder).plans
    assert change.cells is None
    assert "cannot be compared cell by cell" in change.why


def test_other_weights_of_a_forecast(folder, tmp_path):
    pipe = bundles.pipeline()
    one = plan_from_rule(pipe, 3, lambda step, site: bundles.FORECAST if step == 2 else FULL)
    rows = [[replace(cell, weights=(1.5, -0.5)) if cell.decision.order else cell for cell in row] for row in one.rows]
    second = tmp_path / "second"
    shutil.copytree(folder, second)
    for place, plan in ((folder, one), (second, replace(one, rows=tuple(map(tuple, rows))))):
        plan.save(tmp_path / "plan.json")
        exchanged(place, read_manifest(place).plans["quick"], tmp_path / "plan.json")
    cells = 3 * len(one.sites)
    changes = bundle_difference(folder, second).plans
    assert changes == (PlanChange("quick", 0, cells, "", weights=len(one.sites)),)


def test_damage_is_no_difference(folder, tmp_path):
    with pytest.raises(BundleFormatError):
        bundle_difference(bundles.kept(), tmp_path / "nowhere")
    path = folder / read_manifest(folder).weights
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleIntegrityError):
        bundle_difference(bundles.kept(), folder)


@pytest.mark.slow
def test_two_exports(tmp_path):
    """Of one model, the second with more steps: engines and weights are shared, the rest is told."""
    pipe = bundles.pipeline()
    plan = bundles.plan(pipe)
    for name, steps in (("one", [4]), ("two", [4, 6])):
        export(pipe, {"quick": plan}, tmp_path / name, inputs=bundles.INPUTS, steps=steps, most_images=1)
    found = bundle_difference(tmp_path / "one", tmp_path / "two")
    assert differing(found) == {"settings", "programs"}
    assert list(found.programs) == ["quick, 6 steps"]
    assert replace(found, settings={}, programs={}).equal


def test_how_prompts_become_numbers_is_compared(tmp_path):
    """Another text where none is given, another preparation: other images of one prompt."""
    first, second = (bundles.prompted(tmp_path / name) for name in ("one", "two"))
    assert bundle_difference(first, second).equal
    replaced = manifests.msgspec.structs.replace
    prompts = read_manifest(second).prompts
    cond, *rest = prompts.encoders
    (tokens,) = cond.tokens
    texts = replaced(prompts, texts={**prompts.texts, "negative_prompt": Text(default="two")})
    plainly, unmarked = (
        replaced(prompts, encoders=(replaced(cond, tokens=(replaced(tokens, **change),)), *rest))
        for change in ({"steps": ()}, {"special": False})
    )
    for changed, name in ((texts, "texts"), (plainly, "tokens of cond"), (unmarked, "tokens of cond")):
        rewritten(second, prompts=changed)
        found = bundle_difference(first, second)
        assert not found.equal
        assert list(found.settings) == [name]
