"""Bundles with other weights: they make what the pipeline makes with them, and the old bundle stays as it was."""

import errno
import hashlib
import json
import math
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from difa_compile.bundle import adapting, manifest
from difa_compile.bundle.adapting import adapt_bundle, relative_change
from difa_compile.bundle.manifest import MANIFEST, check_file, read_manifest
from difa_compile.bundle.program import Program
from difa_compile.bundle.runner import load_bundle
from difa_compile.bundle.weights import WeightFile, write_weights
from difa_compile.errors import (
    AdapterError,
    BundleFormatError,
    BundleIntegrityError,
    MissingDependencyError,
    OutputError,
    TargetError,
)
from difa_compile.exporting.targets.onnx import finished
from difa_compile.exporting.write import export, latents_of
from difa_compile.files.documents import parse_json
from tests.support import bundles

pytest.importorskip("onnxruntime")

LATENTS = f"latents.0.quick.{bundles.STEPS}"
MODULES = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2", "proj_out_1")


def lora(path, modules=MODULES, rank=4, size=0.3):
    """A LoRA of diffusers' form for the tiny pipeline's transformer."""
    generator = torch.Generator().manual_seed(11)
    weights = {name: module.weight for name, module in bundles.pipeline().transformer.named_modules()
               if name in modules}  # fmt: skip
    tensors = {}
    for name, weight in weights.items():
        out, inner = weight.shape
        tensors[f"transformer.{name}.lora_A.weight"] = size * torch.randn(rank, inner, generator=generator)
        tensors[f"transformer.{name}.lora_B.weight"] = size * torch.randn(out, rank, generator=generator)
    safetensors.torch.save_file(tensors, path)
    return path


def fused(pipe, path, scale):
    """The pipeline with a LoRA added by hand."""
    tensors = safetensors.torch.load_file(path)
    with torch.no_grad():
        for name in tensors:
            if name.endswith(".lora_A.weight"):
                module = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
                up = tensors[name.replace("lora_A", "lora_B")]
                pipe.transformer.get_submodule(module).weight += scale * up @ tensors[name]
    return pipe


def made_by(pipe):
    """The latents of a self-test, by the pipeline with its plan."""
    folder = bundles.kept()
    (schedule,) = read_manifest(folder).schedules
    program = Program.from_json(parse_json((folder / schedule.program).read_bytes()), "here")
    return latents_of(pipe, bundles.INPUTS, bundles.plan(bundles.pipeline()), bundles.STEPS, program)[-1]


def distance(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    told = []
    found = adapt_bundle(bundles.kept(), lora(folder / "lora.safetensors"), folder / "out", 0.8, told=told.append)
    return found, folder, told


def test_it_makes_what_the_pipeline_makes_with_the_lora_fused(made):
    found, folder, told = made
    wanted = made_by(fused(bundles.pipeline(), folder / "lora.safetensors", 0.8))
    bundle = load_bundle(found.folder)
    latents = bundle.self_test_data()[LATENTS]
    assert distance(latents, wanted) < bundles.AGREE
    assert distance(load_bundle(bundles.kept()).self_test_data()[LATENTS], wanted) > 0.01
    assert bundle.self_test() < 1e-6
    assert set(found.changed) == {f"transformer.{name}.weight" for name in MODULES}
    assert told[0].startswith("onnx: in the bundle's own self-test latents differ by")


def test_what_it_says_of_itself(made):
    found, folder, _ = made
    (adapter,) = found.manifest.adapters
    assert (adapter.name, adapter.kind, adapter.scale, adapter.target) == ("lora.safetensors", "lora", 0.8, "onnx")
    assert adapter.sha256 == hashlib.sha256((folder / "lora.safetensors").read_bytes()).hexdigest()
    assert found.manifest == read_manifest(found.folder)
    assert found.manifest.tested_by == "the engines of onnx"
    assert read_manifest(bundles.kept()).tested_by == "the pipeline"
    for name in found.manifest.files:
        check_file(found.folder, name, found.manifest.files)
    there = {path.relative_to(found.folder).as_posix() for path in found.folder.rglob("*") if path.is_file()}
    assert there == {*found.manifest.files, MANIFEST}
    assert sorted(path.name for path in folder.iterdir()) == ["lora.safetensors", "out"], "nothing else is left"


def test_engines_are_the_same_but_for_the_places_of_weights(made):
    import onnx

    found, _, _ = made
    old = read_manifest(bundles.kept())
    for before, after in zip(old.engines, found.manifest.engines, strict=True):
        assert before.key == after.key
        one, other = (onnx.load_model_from_string((folder / name).read_bytes())
                      for folder, name in ((bundles.kept(), before.file), (found.folder, after.file)))  # fmt: skip
        outside = [tensor for tensor in other.graph.initializer if tensor.external_data]
        assert len(outside) == len(before.weights)
        assert {entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"} == {
            found.manifest.weights
        }
        for model in (one, other):
            for tensor in model.graph.initializer:
                del tensor.external_data[:]
        assert one == other
        places = WeightFile(found.folder / found.manifest.weights).places
        own = {name: places[stored] for name, stored in before.weights.items()}
        assert (
            finished(bundles.kept() / before.file, found.manifest.weights, own)
            == (found.folder / after.file).read_bytes()
        ), "what an export writes"
    same = [*old.plans.values(), *(schedule.program for schedule in old.schedules)]
    for name in same:
        assert os.path.samefile(bundles.kept() / name, found.folder / name)


def test_only_what_is_named_changes(made):
    """Of two names for equal numbers, which stand in the file once, the other keeps its own."""
    found, *_ = made
    old, new = (WeightFile(at / read_manifest(at).weights) for at in (bundles.kept(), found.folder))
    assert set(old.places) == set(new.places)
    changed = {name for name in old.places if not torch.equal(old[name], new[name])}
    assert changed == set(found.changed)
    for name, amount in found.changed.items():
        assert amount == pytest.approx(float((new[name] - old[name]).norm() / old[name].norm()), rel=1e-5)


def test_names_that_share_their_bytes_part(tmp_path):
    shared = torch.randn(6, 4)
    write_weights(tmp_path / "w", {"m.a.weight": shared, "m.b.weight": shared.clone(), "m.c.weight": shared + 1})
    weights = WeightFile(tmp_path / "w")
    assert weights.places["m.a.weight"] == weights.places["m.b.weight"]
    tensors = {"b.lora_A.weight": torch.randn(2, 4), "b.lora_B.weight": torch.randn(6, 2)}
    safetensors.torch.save_file(tensors, tmp_path / "lora.safetensors")
    what = adapting.changes(adapting.open_adapter(tmp_path / "lora.safetensors"), weights.places, ["m"])
    write_weights(tmp_path / "new", adapting._Changed(weights, what, 1.0))
    new = WeightFile(tmp_path / "new")
    assert torch.equal(new["m.a.weight"], shared)
    assert torch.equal(new["m.c.weight"], shared + 1)
    wanted = shared + tensors["b.lora_B.weight"] @ tensors["b.lora_A.weight"]
    assert torch.allclose(new["m.b.weight"], wanted, rtol=0, atol=1e-6)


def test_twice_and_back(made, tmp_path):
    found, folder, _ = made
    back = adapt_bundle(found.folder, folder / "lora.safetensors", tmp_path / "back", -0.8)
    assert [adapter.scale for adapter in back.manifest.adapters] == [0.8, -0.8]
    old = load_bundle(bundles.kept()).self_test_data()[LATENTS]
    assert distance(load_bundle(back.folder).self_test_data()[LATENTS], old) < bundles.AGREE


def test_whole_weights(tmp_path):
    pipe = bundles.pipeline()
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.02)
    weights = {name: tensor.contiguous() for name, tensor in pipe.transformer.state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "distilled.safetensors")
    found = adapt_bundle(bundles.kept(), tmp_path / "distilled.safetensors", tmp_path / "out")
    assert found.manifest.adapters[0].kind == "weights"
    latents = load_bundle(tmp_path / "out").self_test_data()[LATENTS]
    assert distance(latents, made_by(pipe)) < bundles.AGREE
    with pytest.raises(AdapterError, match=r"holds whole weights, which have no scale; leave 0.5 out"):
        adapt_bundle(bundles.kept(), tmp_path / "distilled.safetensors", tmp_path / "half", 0.5)


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 10**400, "1", True, None])
def test_scales_that_are_none(tmp_path, scale):
    with pytest.raises(AdapterError, match="is no finite number"):
        adapt_bundle(bundles.kept(), lora(tmp_path / "lora.safetensors"), tmp_path / "out", scale)


def test_places_that_are_taken(tmp_path):
    path, folder = lora(tmp_path / "lora.safetensors"), bundles.copy(tmp_path)
    before = sorted(folder.rglob("*"))
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, folder / ".." / "bundle", folder / "inside", tmp_path / "link"):
        with pytest.raises(OutputError, match="the bundle itself or a part of it"):
            adapt_bundle(folder, path, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for out in (tmp_path / "full", path):
        with pytest.raises(OutputError, match="something stands there already"):
            adapt_bundle(folder, path, out)
    assert sorted(folder.rglob("*")) == before
    assert (tmp_path / "full" / "mine").read_text() == "mine"


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    path = lora(tmp_path / "lora.safetensors")

    def link(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OutputError, match="the disk is full"):
        adapt_bundle(bundles.kept(), path, tmp_path / "out")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["lora.safetensors"]


def test_a_broken_bundle_is_not_adapted(tmp_path, monkeypatch):
    path = lora(tmp_path / "lora.safetensors")
    with pytest.raises(BundleFormatError, match="cannot be read"):
        adapt_bundle(tmp_path / "nowhere", path, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(adapting.Bundle, "self_test", lambda self: 0.5)
        with pytest.raises(
            BundleIntegrityError, match="do not make what the pipeline made when the bundle was written"
        ):
            adapt_bundle(bundles.kept(), path, tmp_path / "out")

    def refuse(self):
        raise TargetError("it is not installed")

    monkeypatch.setattr(adapting.Bundle, "self_test", refuse)
    with pytest.raises(TargetError, match=r"no engines of .* run here, .*: onnx: it is not installed"):
        adapt_bundle(bundles.kept(), path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_was_changed_is_not_taken_along(tmp_path):
    folder = bundles.copy(tmp_path)
    plan = folder / read_manifest(folder).plans["quick"]
    plan.write_text(plan.read_text().replace("reuse", "REUSE"))
    with pytest.raises(BundleIntegrityError, match="is not what was exported"):
        adapt_bundle(folder, lora(tmp_path / "lora.safetensors"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_latents_that_are_not_finite(tmp_path, monkeypatch):
    path = lora(tmp_path / "lora.safetensors")
    monkeypatch.setattr(
        adapting.Bundle, "short_runs", lambda self, data: {LATENTS: torch.full_like(data[LATENTS], math.nan)}
    )
    monkeypatch.setattr(adapting.Bundle, "self_test", lambda self: 0.0)
    with pytest.raises(AdapterError, match="make latents that are not finite"):
        adapt_bundle(bundles.kept(), path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_whose_numbers_an_engine_holds_as_a_table(tmp_path):
    """An exporter may turn a weight into a constant; such a constant would keep the old numbers."""
    weight = torch.randn(6, 4)
    tensors = {"m.a.weight": weight, "table.0": weight.t().contiguous(), "table.1": torch.randn(6, 4)}
    write_weights(tmp_path / "w", tensors)
    weights = WeightFile(tmp_path / "w")
    given = {"a.lora_A.weight": torch.randn(2, 4), "a.lora_B.weight": torch.randn(6, 2)}
    safetensors.torch.save_file(given, tmp_path / "lora.safetensors")
    what = adapting.changes(adapting.open_adapter(tmp_path / "lora.safetensors"), weights.places, ["m"])
    old = read_manifest(bundles.kept())
    engine = manifest.Engine("onnx", "row.onnx", 0, (1, 1), (), (), {"a": "m.a.weight", "t": "table.0"})
    one = manifest.msgspec.structs.replace(old, engines=(engine,))
    with pytest.raises(AdapterError, match=r"row.onnx reads the numbers of m.a.weight as a constant of its own"):
        adapting._check_apart(one, weights, what)
    write_weights(tmp_path / "other", tensors | {"table.0": weight.t() + 1})
    adapting._check_apart(one, WeightFile(tmp_path / "other"), what)


def test_targets_that_take_no_other_weights(tmp_path, monkeypatch):
    monkeypatch.delitem(adapting.MOVED, "onnx")
    with pytest.raises(AdapterError, match="is of the target onnx, and other weights go into bundles of aoti"):
        adapt_bundle(bundles.kept(), lora(tmp_path / "lora.safetensors"), tmp_path / "out")


@pytest.mark.parametrize("missing", ["onnx", "safetensors"])
def test_packages_that_are_not_there(tmp_path, monkeypatch, missing):
    path = lora(tmp_path / "lora.safetensors")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingDependencyError, match=f"{missing}, which is not installed"):
        adapt_bundle(bundles.kept(), path, tmp_path / "out")


def test_diffusers_is_not_needed(tmp_path):
    path = lora(tmp_path / "lora.safetensors")
    code = """
import sys
for name in ("diffusers", "transformers", "peft"):
    sys.modules[name] = None
import difa_compile
difa_compile.adapt_bundle(*sys.argv[1:4])
"""
    command = [sys.executable, "-c", code, str(bundles.kept()), str(path), str(tmp_path / "out")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["source"]["adapters"][0]["scale"] == 1.0


def test_relative_change():
    one = torch.tensor([3.0, 4.0])
    assert relative_change(one, one) == 0
    assert relative_change(one, one * 1.5) == pytest.approx(0.5)
    assert relative_change(torch.zeros(2), one) == math.inf
    assert relative_change(torch.zeros(2), torch.zeros(2)) == 0


@pytest.mark.slow
def test_aotinductor_takes_the_weights_by_name(tmp_path):
    """The packages are the same files; what they make agrees with ONNX Runtime and with the pipeline."""
    pipe = bundles.pipeline()
    with torch.no_grad():  # two weights of equal numbers, of which one changes
        pipe.transformer.transformer_blocks[1].attn1.to_q.weight.copy_(
            pipe.transformer.transformer_blocks[0].attn1.to_q.weight
        )
    plan = bundles.plan(pipe)
    folder = tmp_path / "bundle"
    export(
        pipe, {"quick": plan}, folder, inputs=bundles.INPUTS, steps=[bundles.STEPS], targets=["aoti", "onnx"],
        most_images=1,
    )  # fmt: skip
    told = []
    path = lora(tmp_path / "lora.safetensors")
    found = adapt_bundle(folder, path, tmp_path / "out", 0.8, told=told.append)
    assert found.target == "aoti"
    assert any("a short run's latents differ by" in line for line in told)
    for engine in found.manifest.engines:
        if engine.target == "aoti":
            assert os.path.samefile(folder / engine.file, tmp_path / "out" / engine.file)
    (schedule,) = found.manifest.schedules
    program = Program.from_json(parse_json((folder / schedule.program).read_bytes()), "here")
    wanted = latents_of(fused(pipe, path, 0.8), bundles.INPUTS, plan, bundles.STEPS, program)[-1]
    assert distance(load_bundle(found.folder).self_test_data()[LATENTS], wanted) < bundles.AGREE
    for target in ("aoti", "onnx"):
        assert load_bundle(found.folder, target).self_test() < bundles.AGREE
