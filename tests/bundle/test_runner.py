"""Bundles that are run: what the pipeline with the plan makes, without diffusers, and what is refused."""

import hashlib
import math
import subprocess
import sys
import threading
from dataclasses import replace

import msgspec
import pytest
import torch

from difa_compile.bundle.agreement import LIMITS
from difa_compile.bundle.manifest import ENCODES, File, Prompts, Text, read_manifest
from difa_compile.bundle.program import Argument, Condition, ConditionRow, Draw
from difa_compile.bundle.runner import Bundle, _check_given, _noise, load_bundle
from difa_compile.bundle.weights import write_weights
from difa_compile.errors import (
    BundleInputError,
    BundleIntegrityError,
    MissingDependencyError,
    ReplayError,
    SamplingCancelledError,
    TargetError,
)
from difa_compile.pipeline.apply import apply, remove
from tests.support import bundles
from tests.support.programs import small_program


@pytest.fixture(scope="module")
def bundle():
    return load_bundle(bundles.kept())


def sampled(labels, seed, guidance=3.0):
    """What the pipeline makes with the plan: pictures in bytes."""
    pipe = bundles.pipeline()
    apply(pipe, bundles.plan(pipe), inner="eager")
    images = pipe(
        class_labels=labels,
        guidance_scale=guidance,
        num_inference_steps=bundles.STEPS,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    remove(pipe)
    return torch.from_numpy(images * 255).round()


@pytest.mark.parametrize(("labels", "seed", "guidance"), [([1], 0, 3.0), ([2, 0], 5, 3.0), ([1], 7, 6.5)])
def test_it_makes_what_the_pipeline_makes(bundle, labels, seed, guidance):
    found = bundle(class_labels=labels, seed=seed, guidance=guidance)
    wanted = sampled(labels, seed, guidance)
    assert found.images.shape == wanted.shape
    assert found.images.dtype == torch.uint8
    assert (found.images.float() - wanted).abs().max() <= 1


def test_the_self_test(bundle):
    assert 0 <= bundle.self_test() < bundles.AGREE
    found = bundle.tested()
    assert found.passed
    assert found.levels is not None, "pictures are compared, too"
    assert (found.limit, found.most_levels) == (LIMITS[torch.float32], 1)


def with_self_test(folder, tensors):
    """A copy of the bundle whose self-test is ``tensors``; its manifest is not written."""
    folder = bundles.copy(folder)
    manifest = read_manifest(folder)
    write_weights(folder / manifest.self_test, tensors)
    content = (folder / manifest.self_test).read_bytes()
    entry = File(len(content), hashlib.sha256(content).hexdigest())
    return Bundle(
        folder, manifest=msgspec.structs.replace(manifest, files={**manifest.files, manifest.self_test: entry})
    )


RUN = f"0.quick.{bundles.STEPS}"
LATENTS = {"seed": torch.tensor(0), f"latents.{RUN}": torch.zeros(1, 1, 8, 8)}


def test_what_is_off_by_more_than_rounding_fails(tmp_path, bundle):
    """By a hundredth of the latents, and by two levels of pictures: what a wrong engine or decoder can look like."""
    data = {name: tensor.clone() for name, tensor in bundle.self_test_data().items()}
    found = with_self_test(tmp_path / "latents", {**data, f"latents.{RUN}": data[f"latents.{RUN}"] * 1.01}).tested()
    assert not found.passed
    assert found.latents == pytest.approx(0.01, rel=0.1)
    pictures = data[f"images.{RUN}"]
    pictures[..., 0, 0] += 2 if int(pictures[..., 0, 0].max()) < 128 else -2 % 256
    found = with_self_test(tmp_path / "pictures", {**data, f"images.{RUN}": pictures}).tested()
    assert not found.passed
    assert found.levels in (2, 3)


def test_a_self_test_without_pictures_is_taken(tmp_path, bundle):
    """Of a bundle that does not decode, or from before they were in it; pictures that nothing decodes are damage."""
    data = bundle.self_test_data()
    loaded = with_self_test(tmp_path / "none", {name: data[name] for name in data if not name.startswith("images.")})
    found = loaded.tested()
    assert found.passed
    assert found.levels is None
    (size,) = loaded.manifest.sizes
    size = msgspec.structs.replace(size, decode=None)
    blind = with_self_test(tmp_path / "blind", data)
    blind.manifest = msgspec.structs.replace(blind.manifest, sizes=(size,))
    with pytest.raises(BundleIntegrityError, match="the bundle does not decode"):
        blind.tested()


def test_what_is_rounding_follows_from_the_dtypes(bundle, monkeypatch):
    monkeypatch.setattr(Bundle, "self_test", lambda self: 0.01)
    for dtype in ("float16", "bfloat16"):
        engines = []
        for engine in bundle.manifest.engines:
            outputs = tuple(msgspec.structs.replace(port, dtype=dtype) for port in engine.outputs)
            engines.append(msgspec.structs.replace(engine, outputs=outputs) if engine.row >= 0 else engine)
        manifest = msgspec.structs.replace(bundle.manifest, engines=tuple(engines))
        found = Bundle(bundle.folder, manifest=manifest).tested()
        assert found.passed
        assert (found.limit, found.most_levels) == (LIMITS[getattr(torch, dtype)], 1)
    assert not bundle.tested().passed
    rough = Bundle(bundle.folder, manifest=bundle.manifest)
    monkeypatch.setattr(Bundle, "pictures_of", lambda *_: {})
    rough.target = "tensorrt"
    assert rough.tested().limit == LIMITS[torch.float16], "its float32 is multiplied as TF32"


def test_a_generator_is_used_as_the_pipeline_uses_it(bundle):
    generator = torch.Generator().manual_seed(3)
    one = bundle(class_labels=[1], generator=generator).latents
    assert torch.equal(one, bundle(class_labels=[1], seed=3).latents)
    assert not torch.equal(one, bundle(class_labels=[1], generator=generator).latents)
    assert not torch.equal(bundle(class_labels=[1]).latents, bundle(class_labels=[1]).latents)


def test_conditions_of_both_halves(bundle):
    """Where both halves are of one label, guidance changes nothing; else it does."""
    label = torch.tensor([1])
    same = {"cond": {"class_labels": label}, "uncond": {"class_labels": label}}
    alone, more = (bundle(conditions=same, seed=0, guidance=scale).latents for scale in (2.0, 6.0))
    torch.testing.assert_close(alone, more, atol=bundles.AGREE, rtol=0)
    one, other = (bundle(class_labels=[1], seed=0, guidance=scale).latents for scale in (2.0, 6.0))
    assert (one - other).abs().max() > 0.01


def test_callbacks_see_every_step_and_can_end_it(bundle):
    seen = []
    bundle(class_labels=[1], seed=0, callback=lambda step, steps, latents: seen.append((step, steps, latents.shape)))
    assert [each[:2] for each in seen] == [(step + 1, bundles.STEPS) for step in range(bundles.STEPS)]
    with pytest.raises(SamplingCancelledError, match="after step 2"):
        bundle(class_labels=[1], callback=lambda step, *_: step < 2)
    assert torch.equal(bundle(class_labels=[1], seed=0).latents, bundle(class_labels=[1], seed=0).latents)


def test_previews_are_what_the_latents_so_far_decode_to(bundle):
    seen = []

    def note(step, steps, latents, pictures):
        wanted = bundle.decode(latents.float())
        seen.append(pictures is not None and torch.equal(pictures, wanted))

    bundle(class_labels=[1, 2], seed=0, callback=note, preview=True, decode=False)
    assert seen == [True] * bundles.STEPS
    seen.clear()
    bundle(class_labels=[1], seed=0, callback=note, preview=3)
    assert seen == [False, False, True, True], "every third and the last"
    with pytest.raises(SamplingCancelledError, match="after step 1"):
        bundle(class_labels=[1], callback=lambda step, steps, latents, pictures: False, preview=2)


def test_a_generator_for_each_image(bundle):
    pipe = bundles.pipeline()
    apply(pipe, bundles.plan(pipe), inner="eager")
    call = {"class_labels": [2, 0], "guidance_scale": 3.0, "num_inference_steps": bundles.STEPS, "output_type": "np"}
    wanted = pipe(**call, generator=[torch.Generator().manual_seed(seed) for seed in (5, 7)]).images
    remove(pipe)
    given = [torch.Generator().manual_seed(seed) for seed in (5, 7)]
    found = bundle(class_labels=[2, 0], generator=given)
    assert (found.images.float() - torch.from_numpy(wanted * 255).round()).abs().max() <= 1
    alone = bundle(class_labels=[0], generator=[torch.Generator().manual_seed(7)]).latents
    torch.testing.assert_close(found.latents[1:], alone, atol=bundles.AGREE, rtol=0)


def test_noise_for_both_halves_at_once_takes_one_generator():
    both = small_program(operations=(Draw(2, (2, 3), "float32", True), *small_program().operations[1:]))
    generators = [torch.Generator(), torch.Generator()]
    with pytest.raises(BundleInputError, match="both halves of guidance at once"):
        _noise(both, generators, 2)
    drawn = _noise(small_program(), generators, 2)
    torch.manual_seed(0)
    wanted = torch.randn(2, 2, 3)
    torch.manual_seed(0)
    assert torch.equal(drawn(Draw(1, (2, 3), "float32", False), 2), wanted), "what takes no generator is torch's own"


@pytest.mark.parametrize(
    ("conditions", "named", "message"),
    [
        ({"negative": {"labels": [1]}}, {}, "of the half 'negative', and the call that was exported has cond, uncond"),
        ({"uncond": {"ids": [1.0]}}, {}, "takes 'ids' of the cond half alone, not of the uncond half"),
        ({"cond": {"text": [1]}}, {}, "takes no 'text'; it is conditioned on labels, ids"),
        ({"cond": {"labels": [1]}}, {"labels": [2]}, "labels is given by name and among the conditions of the cond"),
        ({}, {"text": [1]}, "takes no 'text'; it is conditioned on labels, ids"),
        ({"cond": torch.zeros(1)}, {}, "give tensors by half and name"),
        ([1], {}, "give tensors by half and name"),
    ],
)
def test_no_condition_is_left_out_without_a_word(conditions, named, message):
    with pytest.raises(BundleInputError, match=message):
        _check_given(small_program(), conditions, named)


def test_a_half_that_the_export_did_not_have_is_refused():
    (form,) = small_program().forms
    alone = Condition(Argument("labels", "int64", ()), (ConditionRow("cond"), ConditionRow("cond")))
    program = replace(small_program(), forms=(replace(form, conditions=(alone,)),))
    _check_given(program, {"cond": {"labels": [1]}}, {})
    with pytest.raises(BundleInputError, match="half 'uncond', and the call that was exported has cond; leave"):
        _check_given(program, {"uncond": {"labels": [1]}}, {})


def test_conditions_that_a_graph_follows_from_are_those_of_the_export(tmp_path):
    folder = bundles.copy(tmp_path)
    manifest = read_manifest(folder)
    (size,) = manifest.sizes
    asked = msgspec.structs.replace(size, asked={"cond": {"class_labels": "asked.0.cond.class_labels"}})
    asking = msgspec.structs.replace(manifest, sizes=(asked,))
    with pytest.raises(BundleIntegrityError, match=r"the manifest speaks of asked\.0\.cond\.class_labels"):
        Bundle(folder, manifest=asking)
    loaded = Bundle(folder)
    wanted = loaded(class_labels=[1, 1], seed=0).latents
    loaded.manifest = asking
    loaded._weights._tensors["asked.0.cond.class_labels"] = torch.tensor([1])
    assert torch.equal(loaded(class_labels=[1, 1], seed=0).latents, wanted)
    for labels in ([2], [1, 2]):
        with pytest.raises(BundleInputError, match="class_labels of the cond half is another one than in the call"):
            loaded(class_labels=labels)


def test_threads_share_a_bundle(bundle):
    wanted = {seed: bundle(class_labels=[1], seed=seed).latents for seed in range(4)}
    found = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: bundle(class_labels=[1], seed=seed).latents}))
        for seed in wanted
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], wanted[seed]) for seed in wanted)


def test_a_call_without_a_seed_leaves_torchs_generator_alone(bundle):
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    bundle(class_labels=[1], decode=False)
    bundle.self_test()
    assert torch.equal(torch.rand(3), wanted)


def test_latents_of_another_size_are_not_decoded(bundle):
    with pytest.raises(BundleInputError, match="cannot be decoded"):
        bundle.decode(torch.zeros(1, 1, 3, 3))
    with pytest.raises(BundleInputError, match="cannot be decoded"):
        bundle.decode(torch.zeros(0, *bundle(class_labels=[1]).latents.shape[1:]))


def test_a_size_is_chosen_by_what_is_said_of_it(tmp_path):
    """Two sizes that are told apart by name alone: latents of both have one shape, as packed ones can."""
    folder = bundles.copy(tmp_path)
    manifest = read_manifest(folder)
    (own,) = manifest.sizes
    low, wide = (msgspec.structs.replace(own, height=height, width=width) for height, width in ((32, 32), (32, 64)))
    other = tuple(msgspec.structs.replace(schedule, size=1) for schedule in manifest.schedules)
    manifest = msgspec.structs.replace(manifest, sizes=(low, wide), schedules=(*manifest.schedules, *other))
    loaded = Bundle(folder, manifest=manifest)
    assert loaded.sizes == ((32, 32), (32, 64))
    assert loaded.steps() == (bundles.STEPS,)
    wanted = loaded(class_labels=[1], seed=0)
    for chosen in ({"height": 32, "width": 32}, {"height": 32, "width": 64}, {"width": 64}, {"height": 32}):
        assert torch.equal(loaded(class_labels=[1], seed=0, **chosen).images, wanted.images)
    assert torch.equal(loaded.decode(wanted.latents, width=64), wanted.images)
    with pytest.raises(BundleInputError, match="are those of several sizes, 32x32, 32x64; say which"):
        loaded.decode(wanted.latents)
    with pytest.raises(BundleInputError, match="height 64 and width None: the bundle was exported for 32x32, 32x64"):
        loaded(class_labels=[1], height=64)


def test_weights_that_are_not_in_the_file(tmp_path):
    folder = bundles.copy(tmp_path)
    manifest = read_manifest(folder)
    (size,) = manifest.sizes
    size = msgspec.structs.replace(size, conditions={"uncond": {"class_labels": "condition.none"}})
    with pytest.raises(BundleIntegrityError, match=r"the manifest speaks of condition\.none and 0 more tensors"):
        Bundle(folder, manifest=msgspec.structs.replace(manifest, sizes=(size,)))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no seed"),
        ({"seed": torch.tensor(0)}, "holds no run"),
        ({"seed": torch.tensor(0), "condition.0.x": torch.zeros(1)}, "holds condition.0.x, which it cannot"),
        ({"seed": torch.tensor(0), f"latents.0.quick.{bundles.STEPS}": torch.tensor(1.0)}, "which it cannot"),
        ({"seed": torch.tensor(0), f"images.{RUN}": torch.zeros(1, 2, 2, 1, dtype=torch.uint8)}, "which it cannot"),
        ({**LATENTS, f"images.{RUN}": torch.zeros(1, 2, 2, 1)}, "which it cannot"),
    ],
)
def test_a_self_test_that_is_none(tmp_path, tensors, message):
    with pytest.raises(BundleIntegrityError, match=message):
        with_self_test(tmp_path, tensors).tested()


def test_engines_that_make_nan_fail_the_self_test(monkeypatch):
    damaged = load_bundle(bundles.kept())
    call = type(damaged).__call__
    monkeypatch.setattr(
        type(damaged), "__call__", lambda *a, **k: replace(call(*a, **k), latents=torch.full((1, 1, 8, 8), torch.nan))
    )
    assert damaged.self_test() == math.inf


def test_a_bundle_is_found_after_the_folder_was_changed(monkeypatch, tmp_path):
    monkeypatch.chdir(bundles.kept().parent)
    found = load_bundle(bundles.kept().name)
    monkeypatch.chdir(tmp_path)
    assert found(class_labels=[1], seed=0).images.shape[0] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tier": "slow"}, "has no tier 'slow'; it has quick"),
        ({"steps": 5}, "was not exported for 5 steps; it was for 4"),
        ({"class_labels": [1, 2, 3]}, "3 images at once were asked for; the bundle's engines serve"),
        ({"seed": 1, "generator": torch.Generator()}, "give one of them"),
        ({"seed": "one"}, "the seed is 'one'; give a whole number"),
        ({"seed": 1.5}, "the seed is 1.5; give a whole number"),
        ({"seed": True}, "the seed is True; give a whole number"),
        ({"seed": 2**64}, "give a whole number from -9223372036854775808 to 18446744073709551615"),
        ({"generator": 3}, "give a torch.Generator, or one for each image"),
        ({"generator": []}, "give a torch.Generator, or one for each image"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "2 generators are given for 1 images"),
        ({"preview": True}, "previews are given to a callback, and there is none"),
        ({"preview": 0, "callback": print}, "preview is 0; give True, or after how many steps"),
        ({"preview": "yes", "callback": print}, "preview is 'yes'"),
        ({"class_labels": [1], "conditions": {"cond": {"class_labels": [1]}}}, "class_labels is given by name and"),
        ({"class_labels": [1], "conditions": {"negative": {"class_labels": [1]}}}, "of the half 'negative'"),
        ({"prompt": "a cat"}, "takes no 'prompt'; it is conditioned on class_labels"),
        ({"negative_prompt": ["a cat"]}, "takes no 'negative_prompt'; .* has no text encoder"),
        ({"class_labels": "one"}, "which is no tensor"),
        ({"class_labels": [1.5]}, "whole numbers are wanted"),
        ({"guidance": "much"}, "is no number"),
        ({"class_labels": [[1]]}, r"has the shape \(1, 1\); it must be \(images, \)"),
        ({"class_labels": 1}, "has the shape"),
        ({"conditions": {"cond": {"text": torch.zeros(1)}}}, "takes no 'text'"),
        ({"images": 0}, "0 is no number of images"),
        ({"images": 1.5}, "1.5 is no number of images"),
        ({"height": 8}, "height 8 and width None: the bundle was exported for the pipeline's own size"),
    ],
)
def test_what_was_not_exported_is_refused(bundle, options, message):
    with pytest.raises(BundleInputError, match=message):
        bundle(**({} if "class_labels" in options or "conditions" in options else {"class_labels": [1]}) | options)


def test_conditions_and_scales_that_the_program_cannot_take(bundle):
    with pytest.raises(ReplayError):
        bundle(images=1)
    with pytest.raises(ReplayError):
        bundle(class_labels=[1], guidance=0.5)
    with pytest.raises(ReplayError):
        bundle(class_labels=[1], guidance={"other": 2.0})


def test_targets_that_are_not_there(tmp_path):
    with pytest.raises(BundleInputError, match="has no engines for 'aoti'; it has them for onnx"):
        load_bundle(bundles.kept(), "aoti")


def test_nothing_damaged_is_loaded(tmp_path):
    """Each file is checked before it is used for the first time."""
    manifest = read_manifest(bundles.kept())
    program = manifest.schedules[0].program
    for number, name in enumerate([manifest.weights, program, *(engine.file for engine in manifest.engines)]):
        folder = bundles.copy(tmp_path / str(number))
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(BundleIntegrityError, match="is not what was exported"):
            load_bundle(folder)(class_labels=[1])


def test_an_engine_in_another_ones_place(tmp_path):
    folder = bundles.copy(tmp_path)
    one, other = [engine.file for engine in read_manifest(folder).engines if engine.row >= 0][:2]
    (folder / one).rename(folder / "kept")
    (folder / other).rename(folder / one)
    (folder / "kept").rename(folder / other)
    with pytest.raises(BundleIntegrityError):
        load_bundle(folder)(class_labels=[1])


def test_without_onnxruntime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(TargetError, match="pip install onnxruntime"):
        load_bundle(bundles.kept())(class_labels=[1])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return load_bundle(bundles.prompted(tmp_path_factory.mktemp("prompted")))


def test_prompts(texts, bundle):
    """One an image, or one for all; of a half that nobody speaks of nothing changes."""
    wanted = bundle(class_labels=[2, 3], seed=0).latents
    assert torch.equal(texts(prompt=["two", " THREE "], seed=0).latents, wanted)
    assert torch.equal(texts(class_labels=[2, 3], seed=0).latents, wanted)
    assert texts(prompt="two").latents.shape[0] == 1
    one = texts(prompt="two", images=2, seed=0).latents
    assert torch.equal(one, bundle(class_labels=[2, 2], seed=0).latents)
    both = {"cond": {"class_labels": torch.tensor([2])}, "uncond": {"class_labels": torch.tensor([1])}}
    wanted = bundle(conditions=both, seed=0).latents
    assert torch.equal(texts(prompt="two", negative_prompt="one", seed=0).latents, wanted)
    assert torch.equal(texts(class_labels=[2], negative_prompt="one", seed=0).latents, wanted)
    assert texts(class_labels=[2, 1], negative_prompt="one").latents.shape[0] == 2
    assert torch.equal(texts(prompt="two", conditions={"uncond": both["uncond"]}, seed=0).latents, wanted)


def test_a_prompt_is_encoded_once(texts, monkeypatch):
    engine = texts._serving(ENCODES["cond"], 1)
    session, seen = texts._session(engine), []
    run = type(session).run

    def counted(self, inputs, into, images):
        seen.append(self is session)
        return run(self, inputs, into, images)

    monkeypatch.setattr(type(session), "run", counted)
    texts(prompt="two", images=2, decode=False)
    assert sum(seen) == 1
    texts(prompt=["two", "one"], decode=False)
    assert sum(seen) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ["one", "two"], "images": 1}, "2 texts were given as prompt for 1 images"),
        ({"prompt": ["one", "two"], "negative_prompt": ["one", "two", "two"]}, "2 texts were given as prompt for 3"),
        ({"prompt": "one", "images": 0}, "0 is no number of images"),
        ({"prompt": "one", "images": 10**8}, "100000000 images at once were asked for"),
        ({"prompt": 3}, "must be a text, or a list of texts"),
        ({"prompt": "one", "class_labels": [1]}, "class_labels of the cond half is given, and prompt, too"),
        ({"prompt": "one", "conditions": {"cond": {"class_labels": [1]}}}, "is given, and prompt, too"),
        ({"prompt": "one", "prompt_2": "two"}, "takes no 'prompt_2'"),
        ({"prompt": ["one", "two", "three"]}, "3 images at once were asked for"),
    ],
)
def test_prompts_that_do_not_fit(texts, options, message):
    with pytest.raises(BundleInputError, match=message):
        texts(**options)


def test_the_self_test_reads_prompts(tmp_path, texts):
    assert texts.self_test() < bundles.AGREE
    folder = bundles.prompted(tmp_path)
    manifest = read_manifest(folder)
    told = {**manifest.prompts.texts, "prompt": Text(tested="three")}
    wrong = msgspec.structs.replace(manifest, prompts=Prompts(told, manifest.prompts.encoders))
    assert type(texts)(folder, manifest=wrong).self_test() == 2.0


def test_a_damaged_tokenizer_is_not_read(tmp_path):
    folder = bundles.prompted(tmp_path)
    name = next(name for name in read_manifest(folder).files if name.startswith("tokenizers/"))
    (folder / name).write_bytes(b"{}")
    with pytest.raises(BundleIntegrityError, match="cut off or exchanged"):
        load_bundle(folder)(prompt="one")


def test_prompts_without_the_library(tmp_path, monkeypatch):
    folder = bundles.prompted(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load_bundle(folder)(class_labels=[1], decode=False).latents.shape[0] == 1
    with pytest.raises(MissingDependencyError, match="pip install tokenizers"):
        load_bundle(folder)(prompt="one")


def test_prompts_need_neither_diffusers_nor_transformers(texts):
    code = f"""
import sys
for name in ("diffusers", "transformers"):
    sys.modules[name] = None
import difa_compile
bundle = difa_compile.load_bundle({str(texts.folder)!r})
assert bundle(prompt=["one"], seed=0).images.shape[0] == 1
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr


def test_it_needs_neither_diffusers_nor_transformers():
    code = f"""
import sys
for name in ("diffusers", "transformers"):
    sys.modules[name] = None
import difa_compile
bundle = difa_compile.load_bundle({str(bundles.kept())!r})
assert bundle(class_labels=[1], seed=0).images.shape[0] == 1
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
