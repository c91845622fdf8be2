"""Exports: what is written, what a second one makes, what an interrupted one leaves, and what is refused."""

import errno
import fcntl
import importlib.util
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from torch._inductor import config

import difa_compile
from difa_compile.bundle.manifest import DECODES, ENCODES, MANIFEST, Encoder, read_manifest
from difa_compile.bundle.program import Argument, Condition, ConditionRow
from difa_compile.bundle.runner import load_bundle
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import (
    BeforeLoopError,
    BundleInputError,
    EngineRunError,
    ExportError,
    KernelBuildError,
    OutputError,
    TargetError,
)
from difa_compile.exporting import pieces
from difa_compile.exporting import write as module
from difa_compile.exporting.pieces import PIECES, Made, Pieces
from difa_compile.exporting.targets import tensorrt
from difa_compile.exporting.write import export, latents_of, run_of
from difa_compile.files import writing
from difa_compile.pipeline.inspection import inspect_model
from difa_compile.pipeline.rules import plan_from_rule
from difa_compile.plan.engines import engine_of_steps, engines_of
from difa_compile.plan.plan import Plan
from tests.support import bundles
from tests.support.asking import TOKENS, asking_pipeline
from tests.support.places import ROOT

pytest.importorskip("onnxruntime")

SHAPE = (1, 8, 8)
"""Of a tiny pipeline's latents."""


@pytest.fixture
def pipe():
    return bundles.pipeline()


def exported(pipe, folder, plans=None, **options):
    given = {"inputs": bundles.INPUTS, "steps": [bundles.STEPS], "most_images": 1, **options}
    return export(pipe, bundles.plan(pipe) if plans is None else plans, folder, **given)


@pytest.mark.slow
def test_a_second_export_makes_what_is_new_alone(pipe, tmp_path):
    """A further tier over the same folder; what the first one needed is there."""
    first = exported(pipe, tmp_path)
    assert (first.made, first.kept) == (first.engines + 1, 0)
    plans = {"planned": bundles.plan(pipe), "forecast": bundles.plan(pipe, bundles.FORECAST)}
    second = exported(pipe, tmp_path, plans)
    assert second.kept == first.made
    assert second.made == second.engines - first.engines > 0
    assert second.manifest.tiers == ("planned", "forecast")
    bundle = load_bundle(tmp_path)
    program = bundle._program(bundle._schedule("forecast", bundles.STEPS))
    for tier, plan in plans.items():
        wanted = latents_of(pipe, bundles.INPUTS, plan, bundles.STEPS, program)[-1]
        found = bundle(class_labels=[1], tier=tier, seed=module.TEST_SEED).latents
        torch.testing.assert_close(found, wanted, atol=bundles.AGREE, rtol=0)
    assert not (tmp_path / PIECES).exists()
    on_disk = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert on_disk == {*second.manifest.files, MANIFEST, ".lock"}, "nothing is left of the first"


@pytest.mark.slow
def test_an_export_that_is_stopped_goes_on_and_the_old_bundle_stays_whole(pipe, tmp_path, monkeypatch):
    folder = bundles.copy(tmp_path)
    old = read_manifest(folder)
    plan = bundles.plan(pipe, bundles.FORECAST)
    lower = Pieces._lowered
    lowered = []

    def stopped(self, target, draft, place):
        if len(lowered) == 1:
            raise KeyboardInterrupt
        lowered.append(draft.label)
        return lower(self, target, draft, place)

    monkeypatch.setattr(Pieces, "_lowered", stopped)
    with pytest.raises(KeyboardInterrupt):
        exported(pipe, folder, {"other": plan})
    assert read_manifest(folder) == old
    assert load_bundle(folder).self_test() < bundles.AGREE
    monkeypatch.setattr(Pieces, "_lowered", lower)
    found = exported(pipe, folder, {"other": plan})
    assert found.kept == 1
    assert load_bundle(folder).self_test() < bundles.AGREE
    assert found.manifest.tiers == ("other",)


def test_a_plan_alone_tells_how_many_engines_are_exported():
    manifest = read_manifest(bundles.kept())
    plan = Plan.load(bundles.kept() / manifest.plans["quick"])
    told = engines_of(plan)
    assert {engine.row for engine in manifest.engines} == {*range(len(told)), DECODES}
    assert [call.row for call in manifest.schedules[0].calls] == list(engine_of_steps(told)) == [0, 1, 2, 2]


@pytest.mark.slow
def test_few_engines_compute_more(pipe, tmp_path):
    plans = {"reuse": bundles.plan(pipe), "forecast": bundles.plan(pipe, bundles.FORECAST)}
    free = exported(pipe, tmp_path / "free", plans)
    few = exported(pipe, tmp_path / "few", plans, max_engines=2)
    assert few.engines <= 2 < free.engines
    assert free.cost == 1 < few.cost
    assert few.weighed == "operations", "no profile is in force"
    alone = exported(pipe, tmp_path / "alone", {"forecast": plans["forecast"]})
    assert alone.engines == len(engines_of(plans["forecast"])) == 2
    assert load_bundle(tmp_path / "few").self_test() < bundles.AGREE


BARE = """
import sys
from difa_compile.bundle.runner import load_bundle
assert load_bundle(sys.argv[1]).self_test() < float(sys.argv[2])
assert "diffusers" not in sys.modules
"""


@pytest.mark.slow
def test_aotinductor_gives_what_the_pipeline_gives(pipe, tmp_path):
    """Its kernel for windows lies beside the engines: in a process without a compiler and a cache they run, too."""
    steps = (FULL, Decision.parse("window(box:1)"), REUSE, REUSE)
    plan = plan_from_rule(pipe, steps=bundles.STEPS, rule=lambda step, site: steps[step])
    manifest = exported(pipe, tmp_path / "bundle", plan, targets=["aoti"], most_images=2).manifest
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.target == "aoti"
    assert bundle.self_test() < bundles.AGREE
    assert bundle(class_labels=[1, 2], seed=0).images.shape[0] == 2
    program = bundle._program(bundle._schedule(None, None))
    wanted = latents_of(pipe, {**bundles.INPUTS, "class_labels": [1, 2]}, plan, bundles.STEPS, program)[-1]
    found = bundle(class_labels=[1, 2], seed=module.TEST_SEED).latents
    torch.testing.assert_close(found, wanted, atol=bundles.AGREE, rtol=0)
    with pytest.raises(EngineRunError, match=r"ended row-.* with an error"):
        bundle(class_labels=[10**6])
    no_place_of_this_machine(tmp_path / "bundle")
    assert [engine.library is not None for engine in manifest.engines] == [engine.kernel for engine in manifest.engines]
    (library,) = {engine.library for engine in manifest.engines if engine.kernel}
    assert library.file in manifest.files
    (tmp_path / "cache").mkdir(mode=0o700)
    bare = os.environ | {"CXX": "no-such-compiler", "DIFA_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", BARE, str(tmp_path / "bundle"), str(bundles.AGREE)]
    subprocess.run(command, env=bare, cwd=ROOT, check=True, timeout=300)


EVERY_KIND = (
    ("full", "full"),
    ("full", "full"),
    ("window(band:3)+residual", "full+cfg"),
    ("heads(0:window(band:3);1:full)", "heads(0:reuse;1:window(band:2)+residual)"),
    ("window(disc:1)+cfg", "reuse+cfg"),
    ("forecast:1", "window(box:1)+residual+cfg"),
    ("full", "full"),
    ("block", "block"),
    ("reuse", "forecast:1"),
)
"""Of each step what its attentions do; ``block``: all blocks are forecast."""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "aoti"])
def test_every_kind_of_decision_runs_from_a_bundle(pipe, tmp_path, target):
    steps, forecast = len(EVERY_KIND), Decision.parse("forecast:1")
    paths = [site.path for site in inspect_model(pipe).site_infos]
    left_out = [step for step, row in enumerate(EVERY_KIND) if "block" in row]
    plan = plan_from_rule(
        pipe,
        steps,
        lambda step, site: Decision.parse(EVERY_KIND[step][paths.index(site.path)]),
        blocks=lambda step, _: forecast if step in left_out else FULL,
    )
    asked = {str(cell.decision) for row in plan.rows for cell in row}
    assert asked >= {text for row in EVERY_KIND for text in row if text != "block"}
    export(pipe, plan, tmp_path, inputs=bundles.INPUTS, steps=[steps], targets=[target], most_images=1)
    bundle = load_bundle(tmp_path)
    (schedule,) = bundle.manifest.schedules
    program = bundle._program(schedule)
    wanted = latents_of(pipe, bundles.INPUTS, plan, steps, program)[-1]
    found = bundle(class_labels=[1], seed=module.TEST_SEED).latents
    torch.testing.assert_close(found, wanted, atol=bundles.AGREE, rtol=0)
    full = latents_of(pipe, bundles.INPUTS, plan_from_rule(pipe, steps, lambda *_: FULL), steps, program)[-1]
    assert (found - full).abs().max() > 20 * bundles.AGREE, "the plan changes what is made"


@pytest.mark.slow
def test_tensorrt_engines_of_the_demo_model(tmp_path):
    """Kinds of rows. Without a GPU their engines are built, and it is said that they were not run."""
    pytest.importorskip("tensorrt_rtx")
    demo = difa_compile.load_pipeline("demo")
    steps = ["full", "full", "window(box:3)+residual", "window(band:32)", "forecast:1"]
    plan = plan_from_rule(
        demo, steps=5, rule=lambda step, site: Decision.parse(steps[step]), inputs={"class_labels": [1]}
    )
    told = []
    options = {"inputs": {"class_labels": [1]}, "steps": [5], "most_images": 4, "targets": ["tensorrt"]}
    made = export(demo, plan, tmp_path, told=told.append, **options)
    manifest = read_manifest(tmp_path)
    assert manifest == made.manifest
    for engine in manifest.engines:
        assert engine.images == (1, 4)
        assert (engine.target, engine.unchecked) == ("tensorrt", "")
        assert set(engine.memory) == {"activations", "constants"}
        assert any(name.startswith("tensorrt") for name in engine.versions)
    model = sum(value.nbytes for value in demo.transformer.parameters())
    assert max(manifest.files[engine.file].bytes for engine in manifest.engines) < 0.9 * model
    if not torch.cuda.is_available():
        assert any(line.startswith("tensorrt: not compared with the pipeline: ") for line in told)
        assert manifest.compared == {}
    again = export(demo, plan, tmp_path, **options)
    assert (again.made, again.kept) == (0, made.made)


@pytest.mark.slow
def test_weights_stand_in_it_once_and_no_place_of_this_machine(pipe, tmp_path):
    found = exported(pipe, tmp_path)
    model = sum(value.nbytes for value in pipe.transformer.parameters())
    weights = found.manifest.files[found.manifest.weights].bytes
    assert weights < model + 100_000
    no_place_of_this_machine(tmp_path)


def no_place_of_this_machine(folder):
    """In no file of a bundle, packed or not, stands a path of the exporting machine: its own, torch's, the code's."""
    places = [os.fsencode(each) for each in (folder, Path(module.__file__).parent, ROOT, Path(torch.__file__).parent)]
    files = [path for path in folder.rglob("*.*") if path.is_file()]
    assert files
    for path in files:
        contents = [path.read_bytes()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        for content in contents:
            for place in (*places, b"/torchinductor_"):
                assert place not in content, path.name


@pytest.mark.parametrize(
    ("sizes", "message"),
    [([(8, 8)], "makes images of one size alone"), ([(8,)], "is no height and width"), ([(0, 8)], "is no height and")],
)
def test_sizes_that_cannot_be(pipe, tmp_path, sizes, message):
    with pytest.raises(BundleInputError, match=message):
        exported(pipe, tmp_path, sizes=sizes)


def test_nothing_but_its_own_files_is_deleted(pipe, tmp_path):
    """Into a folder with plans and pictures of the user's."""
    folder = bundles.copy(tmp_path)
    mine = ("plans/mine.json", "IMG-202401011234.jpg", "prompts/a.json", "notes-0123456789ab.txt")
    for name in mine:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    theirs = ("encode-0123456789ab.pt2", "tokenizers/tokenizer-0123456789ab.json", "encode-uncond-0123456789ab.onnx")
    theirs += (
        "row-07-0123456789ab.onnx",
        "kernel-0123456789ab.so",
        ".weights.tmp",
        ".difa-0123456789ab.tmp",
        "plans/old-0123456789ab.json",
    )
    for name in theirs:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("left by an export that was killed")
    exporting = module._Exporting.__new__(module._Exporting)
    exporting.folder, exporting.pieces = folder, Pieces(folder, {}, Made(), print)
    exporting._clean(read_manifest(folder))
    assert all((folder / name).read_text() == "mine" for name in mine)
    assert not any((folder / name).exists() for name in theirs)
    assert load_bundle(folder).self_test() < bundles.AGREE


def test_engines_that_make_something_else_are_told(pipe, tmp_path, monkeypatch):
    def other(*given, **options):
        latents, pictures = run_of(*given, **options)
        return [latents[-1] * 1.01], pictures

    folder = bundles.copy(tmp_path)
    monkeypatch.setattr(module, "run_of", other)
    old = read_manifest(folder)
    with pytest.raises(ExportError, match="do not make what the pipeline makes"):
        exported(pipe, folder)
    assert read_manifest(folder) == old
    assert load_bundle(folder).self_test() < bundles.AGREE


def test_targets_that_cannot_run_here_are_not_compared(monkeypatch):
    """Those of other machines are said not to be; of a target that runs anywhere that is an error."""
    exporting, told = module._Exporting.__new__(module._Exporting), []
    exporting.folder, exporting.told = bundles.kept(), told.append
    manifest = read_manifest(bundles.kept())
    assert set(exporting._compare(manifest)) == {"onnx"}
    assert set(manifest.compared) == {"onnx"}
    assert manifest.compared["onnx"] < bundles.AGREE

    def self_test(bundle):
        raise TargetError("it is not here")

    monkeypatch.setattr(module.Bundle, "self_test", self_test)
    with pytest.raises(TargetError, match="it is not here"):
        exporting._compare(manifest)
    told.clear()
    unchecked = [msgspec.structs.replace(engine, unchecked="no bfloat16") for engine in manifest.engines]
    assert exporting._compare(msgspec.structs.replace(manifest, engines=tuple(unchecked))) == {}
    assert told == ["onnx: not compared with the pipeline: it is not here"]
    monkeypatch.setattr(module, "ELSEWHERE", {"onnx"})
    assert exporting._compare(manifest) == {}
    assert len(told) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": []}, "at least one plan, one number of steps and one target"),
        ({"steps": [0]}, "is no number of steps or images"),
        ({"steps": [True]}, "is no number of steps or images"),
        ({"targets": []}, "at least one plan"),
        ({"targets": ["tensorflow"]}, "the target 'tensorflow' is unknown; known are onnx, aoti, tensorrt"),
        ({"gpus": ["8.9"]}, "which engines of the target tensorrt alone are built for"),
        ({"most_images": 0}, "is no number of steps or images"),
        ({"usual_images": 0}, "is no number of steps or images"),
        ({"usual_images": 9, "most_images": 8}, "9 images are not usual where 8 are the most"),
        ({"plans": {}}, "at least one plan"),
        ({"inputs": {"class_labels": [1, 2]}}, "the inputs make 2 images; give those of a call that makes one"),
    ],
)
def test_what_makes_no_sense_is_refused(pipe, tmp_path, options, message):
    with pytest.raises(BundleInputError, match=message):
        exported(pipe, tmp_path, **options)
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
def test_packages_that_are_missing_are_told_before_the_work(pipe, tmp_path, monkeypatch, target):
    monkeypatch.setattr(module, "library", lambda: None)
    monkeypatch.setattr(module, "capabilities", lambda *_: {})
    monkeypatch.setattr(tensorrt, "library", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    monkeypatch.setattr(module, "_Exporting", lambda *_: pytest.fail("it was begun"))
    with pytest.raises(TargetError, match="onnxscript is not installed: pip install onnxscript"):
        exported(pipe, tmp_path, targets=[target])


def test_a_compiler_that_is_missing_is_told_before_the_work(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_Exporting", lambda *_: pytest.fail("it was begun"))
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(TargetError, match="no-such-compiler"):
        exported(pipe, tmp_path, targets=["onnx", "aoti"])


def test_without_the_kernel_no_library_is_written(tmp_path, monkeypatch):
    def refuse(portable):
        raise KernelBuildError("the compiler fails")

    monkeypatch.setattr(module.build, "for_bundle", refuse)
    exporting = module._Exporting.__new__(module._Exporting)
    exporting.folder, exporting.how, exporting.told = tmp_path, Made(), print
    with pytest.raises(TargetError, match="need our kernel for local attention: the compiler fails"):
        exporting._library({})
    (tmp_path / "built.so").write_bytes(b"library")
    monkeypatch.setattr(module.build, "for_bundle", lambda portable: (tmp_path / "built.so", "AVX2"))
    files = {}
    written = exporting._library(files)
    assert (tmp_path / written.file).read_bytes() == b"library"
    assert (list(files), written.instruction_set) == ([written.file], "AVX2")
    assert module.OURS.fullmatch(written.file)


@pytest.mark.parametrize("tier", ["", "../x", "a/b", ".", "a b", "é"])
def test_tiers_are_names(pipe, tmp_path, tier):
    with pytest.raises(BundleInputError, match="is no name"):
        exported(pipe, tmp_path, {tier: bundles.plan(pipe)})


class Prompted:
    """A pipeline whose call takes a prompt."""

    def __call__(self, prompt):
        raise AssertionError("never called")


@pytest.mark.parametrize(
    ("asks", "error", "message"),
    [
        (None, BeforeLoopError("its tokenizer is none"), "embeddings, not prompts: its tokenizer is none"),
        (object(), None, "depend on values of its inputs"),
    ],
)
def test_why_a_bundle_takes_no_prompts_is_told(monkeypatch, asks, error, message):
    def refused(*_):
        raise error

    monkeypatch.setattr(module, "before_loop", refused)
    told = []
    exporting = module._Exporting.__new__(module._Exporting)
    exporting.pipe, exporting.steps, exporting.told = Prompted(), (4,), told.append
    call = SimpleNamespace(
        model=None, capture=SimpleNamespace(model=SimpleNamespace(questions=SimpleNamespace(program=asks)))
    )
    assert exporting._prompts([part_of(call)]) == (None, {}, [])
    assert len(told) == 1
    assert message in told[0]


def part_of(*calls, given=None):
    """Of one size of images: its calls, and what the call that was probed gave the model."""
    conditioning = {"cond": {"text": torch.ones(1, 3) if given is None else given}}
    return SimpleNamespace(calls=calls, inputs={}, probed={4: SimpleNamespace(program=None, conditioning=conditioning)})


def test_a_text_encoder_that_a_target_refuses_is_told_and_a_mistake_of_ours_is_not(tmp_path, monkeypatch):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    encoding = SimpleNamespace(half="cond", program=program, constants=(), inputs={}, outputs={})
    before = SimpleNamespace(prompts=SimpleNamespace(encoders=[]), tokenizers={}, encodings=[encoding])
    monkeypatch.setattr(module, "before_loop", lambda *_: before)
    exporting = module._Exporting.__new__(module._Exporting)
    told = []
    exporting.pipe, exporting.steps, exporting.told, exporting.targets = Prompted(), (4,), told.append, ("onnx",)
    exporting.pieces = Pieces(tmp_path, {}, Made(), told.append)

    def refused(*_):
        raise RuntimeError("no such operation")

    monkeypatch.setattr(pieces, "target_of", lambda name: SimpleNamespace(lowered=refused))
    assert exporting._prompts([part_of()]) == (None, {}, [])
    assert told[-1].endswith("refused: onnx does not take encode: RuntimeError: no such operation")
    monkeypatch.setattr(Made, "key", refused)
    with pytest.raises(RuntimeError):
        exporting._prompts([part_of()])


def test_prompts_whose_encoding_follows_the_size_of_images_are_left_out(monkeypatch):
    encoding = SimpleNamespace(half="cond", outputs={"text": None})
    before = SimpleNamespace(
        prompts=SimpleNamespace(encoders=[Encoder("cond", ENCODES["cond"], ())]), tokenizers={}, encodings=[encoding]
    )
    monkeypatch.setattr(module, "before_loop", lambda *_: before)
    monkeypatch.setattr(module._Exporting, "_encoders", lambda *_: ["an engine"])
    exporting = module._Exporting.__new__(module._Exporting)
    told = []
    exporting.pipe, exporting.steps, exporting.told = Prompted(), (4,), told.append
    assert exporting._prompts([part_of(), part_of()])[2] == ["an engine"]
    assert exporting._prompts([part_of(), part_of(given=torch.zeros(1, 3))]) == (None, {}, [])
    assert "text, which follows the prompt, depends on the size of the images" in told[0]


def test_a_full_disk_is_no_reason_to_leave_prompts_out(monkeypatch):
    def full(*_):
        raise OutputError("the disk is full")

    monkeypatch.setattr(module, "before_loop", full)
    exporting = module._Exporting.__new__(module._Exporting)
    exporting.pipe, exporting.steps = Prompted(), (4,)
    with pytest.raises(OutputError, match="disk is full"):
        exporting._prompts([part_of()])


def test_of_models_without_prompts_nothing_is_told(pipe):
    told = []
    exporting = module._Exporting.__new__(module._Exporting)
    exporting.pipe, exporting.told = pipe, told.append
    assert exporting._prompts([]) == (None, {}, [])
    assert not told


@pytest.mark.slow
def test_engines_hold_for_the_values_that_their_graphs_follow_from(tmp_path):
    """A mask that shows as many tokens as in the export's call is taken, any other is refused; texts are free."""
    pipe, inputs = asking_pipeline(), {"class_labels": [1]}
    plan = plan_from_rule(pipe, 3, lambda step, site: FULL if step < 2 else REUSE, inputs=inputs)
    found = exported(pipe, tmp_path, plan, inputs=inputs, steps=[3], most_images=2)
    assert {half: list(names) for half, names in found.manifest.sizes[0].asked.items()} == {
        "cond": ["mask"],
        "uncond": ["mask"],
    }
    bundle = load_bundle(tmp_path)
    program = bundle._program(bundle._schedule(None, None))
    text, mask = torch.randn(1, TOKENS), torch.arange(TOKENS)[None] < 4
    wanted = latents_of(pipe, {**inputs, "text": text}, plan, 3, program)[-1]
    both = {half: {"text": text, "mask": mask} for half in ("cond", "uncond")}
    latents = bundle(conditions=both, class_labels=[1], seed=module.TEST_SEED).latents
    torch.testing.assert_close(latents, wanted, atol=bundles.AGREE, rtol=0)
    assert (latents - bundle(class_labels=[1], seed=module.TEST_SEED).latents).abs().max() > 0.01, "texts matter"
    for half in both:
        other = {**both, half: {"text": text, "mask": torch.arange(TOKENS)[None] < 5}}
        with pytest.raises(BundleInputError, match=f"mask of the {half} half is another one than in the call that was"):
            bundle(conditions=other, class_labels=[1])


def test_sizes_that_follow_from_values_go_into_onnx_alone():
    call = SimpleNamespace(
        model=torch.nn.Identity(),
        capture=SimpleNamespace(model=SimpleNamespace(questions=SimpleNamespace(program=object()))),
    )
    exporting = module._Exporting.__new__(module._Exporting)
    exporting.targets = ("onnx", "aoti")
    with pytest.raises(TargetError, match=r"Identity's graph depend on values .* engines of aoti cannot hold; export"):
        exporting._row(0, SimpleNamespace(call=0), {1: (call,)})


def test_a_graph_that_follows_from_the_noisy_sample_is_not_exported():
    graph = torch.fx.Graph()
    for name in ("x", "mask"):
        graph.placeholder(name)
    held = SimpleNamespace(
        module=SimpleNamespace(graph=graph), questions=SimpleNamespace(positions=(1, 0)),
        positions=SimpleNamespace(inputs=frozenset()),
    )  # fmt: skip
    call = SimpleNamespace(
        capture=SimpleNamespace(model=held), model=torch.nn.Identity(), branch=None, args=(torch.ones(1), torch.ones(1))
    )
    mask = Condition(Argument("mask", "float32", (2,)), (ConditionRow("cond"),))
    form = SimpleNamespace(
        model="transformer", branch=None, sample=Argument("x", "float32", (1,)), values=(), conditions=(mask,)
    )
    given = {"cond": {"mask": torch.tensor([[1.0, 0.0], [1.0, 0.0]])}}
    probed = SimpleNamespace(program=SimpleNamespace(forms=(form,)), conditioning=given)
    with pytest.raises(ExportError, match="follows from values of 'x', which change from call to call"):
        module._asked([call], probed, 0, lambda model: "transformer")
    held.questions.positions = (1,)
    names, tensors = module._asked([call], probed, 0, lambda model: "transformer")
    assert names == {"cond": {"mask": "asked.0.cond.mask"}}
    assert torch.equal(tensors["asked.0.cond.mask"], torch.tensor([[1.0, 0.0]])), "one row"


def test_two_exports_into_one_folder(pipe, tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ExportError, match="another export is writing into"):
            exported(pipe, tmp_path)


def test_a_folder_that_cannot_be_written(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        exported(pipe, tmp_path / "file" / "bundle")


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_a_disk_that_takes_no_more_in_mid_export(pipe, tmp_path, monkeypatch, number):
    """From whichever library: torch's and ONNX's write files of their own."""
    folder = bundles.copy(tmp_path)

    def refused(*_, **__):
        raise OSError(number, os.strerror(number), str(folder / "pieces" / "0.onnx"))

    monkeypatch.setattr(Pieces, "_lowered", refused)
    monkeypatch.setattr(module._Exporting, "exported", lambda self: self.pieces._lowered("onnx", None, folder))
    with pytest.raises(OutputError, match=rf"was stopped: {os.strerror(number)} \(.*0\.onnx\); a bundle that was"):
        exported(pipe, folder)
    assert load_bundle(folder).self_test() < bundles.AGREE
    monkeypatch.setattr(Pieces, "_lowered", lambda *_: [].copy(1))
    with pytest.raises(TypeError):
        exported(pipe, folder)


def test_a_read_only_disk_is_told_before_anything_is_done(pipe, tmp_path, monkeypatch):
    folder = bundles.copy(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    def refused(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(writing, "_probe", refused)
    monkeypatch.setattr(module._Exporting, "__post_init__", lambda self: pytest.fail("it was begun"))
    with pytest.raises(OutputError, match="Read-only file system"):
        exported(pipe, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert load_bundle(folder).self_test() < bundles.AGREE


KILLED = """
import os, signal, sys
from difa_compile.exporting.pieces import Pieces
from difa_compile.exporting.write import export
from tests.support import bundles

made, lower = [], Pieces._lowered

def killed(self, target, draft, place):
    if len(made) == 1:
        (place.parent / "half written").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(draft.label)
    return lower(self, target, draft, place)

Pieces._lowered = killed
pipe = bundles.pipeline()
plan = bundles.plan(pipe, bundles.FORECAST)
export(pipe, {"other": plan}, sys.argv[1], inputs=bundles.INPUTS, steps=[bundles.STEPS], most_images=1)
"""


@pytest.mark.slow
def test_an_export_that_is_killed_goes_on_and_the_old_bundle_stays_whole(pipe, tmp_path):
    """By a signal that nothing can catch, between two engines: what was done is found by the next one."""
    folder = bundles.copy(tmp_path)
    old = read_manifest(folder)
    command = [sys.executable, "-c", KILLED, str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT)
    assert found.returncode == -signal.SIGKILL, found.stderr
    assert (folder / PIECES).exists()
    assert read_manifest(folder) == old
    assert load_bundle(folder).tested().passed
    again = exported(pipe, folder, {"other": bundles.plan(pipe, bundles.FORECAST)})
    assert again.kept == 1
    assert again.manifest.tiers == ("other",)
    assert load_bundle(folder).tested().passed
    assert not (folder / PIECES).exists()


@pytest.mark.slow
def test_tiers_and_numbers_of_steps_in_one_bundle(pipe, tmp_path):
    """Two of each: all four are what the pipeline makes, and share engines and weights."""
    plans = {"fast": bundles.plan(pipe), "good": bundles.plan(pipe, bundles.FORECAST)}
    steps = (bundles.STEPS, bundles.STEPS + 2)
    found = exported(pipe, tmp_path, plans, steps=list(steps))
    bundle = load_bundle(tmp_path)
    assert bundle.tiers == ("fast", "good")
    assert bundle.steps("fast") == bundle.steps("good") == steps
    assert len(found.manifest.schedules) == 4
    rows = [{call.row for call in schedule.calls} for schedule in found.manifest.schedules]
    assert sum(map(len, rows)) > len(set().union(*rows)) == found.engines, "engines are shared"
    made = {}
    for tier, plan in plans.items():
        for count in steps:
            program = bundle._program(bundle._schedule(tier, count))
            wanted = latents_of(pipe, bundles.INPUTS, plan, count, program)[-1]
            made[tier, count] = bundle(class_labels=[1], tier=tier, steps=count, seed=module.TEST_SEED).latents
            torch.testing.assert_close(made[tier, count], wanted, atol=bundles.AGREE, rtol=0)
    assert len({tuple(each.flatten().tolist()) for each in made.values()}) == 4
    with pytest.raises(BundleInputError, match="was not exported for 5 steps; it was for 4, 6"):
        bundle(class_labels=[1], steps=5)


def test_a_full_disk_leaves_the_old_bundle(pipe, tmp_path, monkeypatch):
    folder = bundles.copy(tmp_path)
    old = read_manifest(folder)

    def full(path, content, what):
        raise OutputError(f"{what} cannot be written to {path}: the disk is full")

    monkeypatch.setattr(module, "write_whole", full)
    with pytest.raises(OutputError, match="disk is full"):
        exported(pipe, folder)
    assert read_manifest(folder) == old
    assert load_bundle(folder).self_test() < bundles.AGREE
