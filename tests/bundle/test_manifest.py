"""Manifests: read as they were written, and refused where they contradict themselves, the folder, or leave it."""

import json
import random

import pytest

from difa_compile.bundle import manifest as module
from difa_compile.bundle.manifest import (
    MANIFEST,
    Adapter,
    Manifest,
    check_file,
    checked_bytes,
    file_in,
    read_manifest,
    sizes_of,
)
from difa_compile.errors import BundleFormatError, BundleIntegrityError, BundleVersionError
from tests.support import bundles


@pytest.fixture
def folder(tmp_path):
    return bundles.copy(tmp_path)


def edited(folder, change):
    """The manifest with a change, its digest right again."""
    document = json.loads((folder / MANIFEST).read_text())
    content = {name: document[name] for name in module.FORMAT.keys}
    change(content)
    return json.dumps(module.FORMAT.frame(content))


def test_what_is_written_is_read():
    found = read_manifest(bundles.kept())
    assert Manifest.from_json(json.dumps(found.to_json()), "again") == found
    assert (found.tiers, found.targets) == (("quick",), ("onnx",))
    assert [schedule.steps for schedule in found.schedules] == [bundles.STEPS]
    for name in found.files:
        check_file(bundles.kept(), name, found.files)
    assert {path.relative_to(bundles.kept()).as_posix() for path in bundles.kept().rglob("*") if path.is_file()} == {
        *found.files,
        MANIFEST,
        ".lock",
    }


def test_what_has_joined_the_format_may_be_missing(folder):
    """A bundle from before ``compared`` and an engine's ``memory``, with the digest that it has."""

    def change(content):
        content.pop("compared", None)
        for engine in content["engines"]:
            del engine["memory"], engine["unchecked"], engine["library"]
        for size in content["sizes"]:
            del size["asked"], size["layouts"]

    found = Manifest.from_json(edited(folder, change), "here")
    assert found.compared == {}
    assert all(engine.memory == {} for engine in found.engines)
    assert all((size.asked, size.layouts) == ({}, ()) for size in found.sizes)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../b", "a/b/c", "", ".", "..", "a\\b", "~x", ".x", "a/.b", "ä"]
)
def test_names_that_could_leave_the_folder(folder, name):
    def change(content):
        content["files"][name] = content["files"].pop(content["weights"])
        content["weights"] = name

    with pytest.raises(BundleFormatError, match="is no name of a file in a bundle"):
        Manifest.from_json(edited(folder, change), "here")


def test_a_library_is_for_engines_that_call_it(folder):
    def change(content):
        content["files"]["kernel-0.so"] = next(iter(content["files"].values()))
        content["engines"][0] |= {"library": {"file": "kernel-0.so", "instruction_set": "AVX2"}, "kernel": called}

    called = True
    found = Manifest.from_json(edited(folder, change), "here").engines[0]
    assert (found.library.file, found.library.instruction_set) == ("kernel-0.so", "AVX2")
    called = False
    with pytest.raises(BundleFormatError, match="has a library for local attention, and does not call it"):
        Manifest.from_json(edited(folder, change), "here")


ADAPTER = {"name": "a", "sha256": "0" * 64, "kind": "lora", "scale": 1.0, "without": [], "target": "onnx"}


def at(*path):
    def set_to(content, value):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return set_to


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (at("engines"), [], "at least one engine"),
        (at("schedules"), [], "at least one engine"),
        (at("weights"), "none.safetensors", "not among the files"),
        (at("engines", 0, "file"), "none.onnx", "not among the files"),
        (at("engines", 0, "library"), {"file": "none.so"}, "'none.so' is named, but not among the files"),
        (at("engines", 0, "library"), {"file": "manifest.json", "code": "x"}, "unknown field"),
        (at("plans"), {}, "has no plan"),
        (at("engines", 0, "images"), [2, 1], "is for row 0 and 2 to 1 images"),
        (at("sizes", 0, "height"), 8, "a size is 8 by 0"),
        (at("slots", 0, "dtype"), "nope", "slot 0 is of nope"),
        (at("slots", 0, "shape"), [-1], "slot 0 is of float32"),
        (at("slots", 0, "shape"), [2**41], "slot 0 is of float32"),
        (at("engines", 0, "target"), "[/x]\x1b[31m", "which is no name"),
        (at("engines", -1, "inputs"), [], "takes latents and gives pictures"),
        (at("sizes", 0, "decode", "row"), -2, "no engine that decodes"),
        (at("sizes", 0, "decode", "row"), -4, "no engine that decodes"),
        (at("sizes", 0, "decode", "row"), 0, "no engine that decodes"),
        (at("sizes"), [{}, {}], "a size stands there twice"),
        (at("sizes"), [], "is of size 0, and there are 0"),
        (at("schedules", 0, "size"), 1, "is of size 1, and there are 1"),
        (at("engines", 0, "inputs", 0, "dtype"), "complex64", "known are float64"),
        (at("engines", 0, "inputs", 0, "shape"), ["os.system"], "has the size"),
        (at("engines", 0, "inputs", 0, "shape"), [-1], "has the size -1"),
        (at("schedules", 0, "calls", 0, "row"), 99, "there is no engine"),
        (at("schedules", 0, "calls", 0, "reads"), {"cache.x.output.0": 99}, "a slot that there is not"),
        (at("schedules", 0, "calls", 0, "row"), "0", "Expected `int`"),
        (at("schedules", 0, "surprise"), 1, "unknown field"),
        (at("files", "surprise"), {"bytes": -1, "sha256": "0" * 64}, "no size and digest"),
        (at("files", "surprise"), {"bytes": 1, "sha256": "g" * 64}, "no size and digest"),
        (at("source", "card"), "about/none.md", "not among the files"),
        (at("source", "notices"), ["about/none.md"], "not among the files"),
        (at("source", "adapters"), [ADAPTER | {"sha256": "0"}], "has no digest and scale"),
        (at("source", "adapters"), [ADAPTER | {"target": "aoti"}], "by engines of aoti, which there are none of"),
        (at("source", "adapters"), [ADAPTER | {"surprise": 1}], "unknown field"),
    ],
)
def test_contradictions_are_refused(folder, place, value, message):
    with pytest.raises(BundleFormatError, match=message):
        Manifest.from_json(edited(folder, lambda content: place(content, value)), "here")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (at("prompts", "encoders"), [], "prompts are encoded for no half"),
        (at("prompts", "encoders", 0, "half"), "uncond", "prompts are encoded for uncond, uncond"),
        (at("prompts", "encoders", 0, "half"), "both", "prompts are encoded for both, uncond"),
        (at("prompts", "encoders", 0, "row"), -3, "has no engine for each target"),
        (at("prompts", "encoders", 0, "row"), 0, "has no engine for each target"),
        (at("prompts", "encoders", 0, "tokens"), [], "what it takes"),
        (at("prompts", "encoders", 0, "tokens", 0, "inputs"), {"t.ids": "ids"}, "what it takes"),
        (at("prompts", "encoders", 0, "tokens", 0, "inputs", "t.ids"), "__class__", "that is not known"),
        (at("prompts", "encoders", 0, "tokens", 0, "steps"), ["eval"], "that is not known"),
        (at("prompts", "encoders", 0, "tokens", 0, "file"), "none.json", "one of which there is not"),
        (at("prompts", "encoders", 0, "tokens", 0, "text"), "prompt_2", "one of which there is not"),
        (at("prompts", "texts", "prompt", "follows"), "prompt", "which is none of its own"),
        (at("prompts", "texts", "prompt", "follows"), "other", "which is none of its own"),
        (at("prompts", "texts", "prompt", "tested"), "\ud800", "is none that could be given"),
        (at("prompts", "texts", "prompt", "default"), "a" * 2**17, "is none that could be given"),
        (at("prompts", "encoders", 0, "tokens", 0, "before"), "\udc00", "that is no text"),
        (at("prompts", "texts", "prompt", "tested"), 3, "Expected `str"),
        (at("engines", -1, "images"), [1, 2], "one prompt at a time"),
        (at("engines", -1, "inputs", 0, "shape"), ["images", 3], "one prompt at a time"),
        (at("engines", -1, "row"), -9, "has no engine for each target"),
    ],
)
def test_contradictions_about_prompts(tmp_path, place, value, message):
    folder = bundles.prompted(tmp_path)
    with pytest.raises(BundleFormatError, match=message):
        Manifest.from_json(edited(folder, lambda content: place(content, value)), "here")


def test_a_call_must_not_write_what_it_reads(folder):
    def change(content):
        call = next(call for call in content["schedules"][0]["calls"] if call["reads"])
        call["writes"] = dict.fromkeys(["cache.x.output.0"], next(iter(call["reads"].values())))

    with pytest.raises(BundleFormatError, match="reads and writes one slot"):
        Manifest.from_json(edited(folder, change), "here")


CACHES = [f"cache.transformer_blocks.{block}.attn1.output.0" for block in (0, 1)]


def call_of(content, number):
    """Of the only schedule: full, full with caches written, and two steps that read them."""
    return content["schedules"][0]["calls"][number]


def rename_a_read(content):
    reads = call_of(content, 2)["reads"]
    reads["cache.other.output.0"] = reads.pop(CACHES[0])


def rename_a_write(content):
    call_of(content, 1)["writes"] = {"output.0": 0}


def give_weights(content):
    call_of(content, 2)["weights"] = {"cache.other.weights": [0.5, 0.5]}


def give_weights_of_another_number(content):
    call = call_of(content, 2)
    call["weights"] = {CACHES[0]: [0.5, 0.5]}


def read_before_it_is_written(content):
    calls = content["schedules"][0]["calls"]
    calls[1], calls[2] = calls[2], calls[1]


def write_to_one_slot(content):
    call_of(content, 1)["writes"] = dict.fromkeys(CACHES, 0)


def write_every_output(content):
    call_of(content, 1)["writes"]["output"] = None


def another_dtype(content):
    content["slots"][1]["dtype"] = "float16"


def another_shape(content):
    content["slots"][1]["shape"] = [2, 16, 32]


def another_rank(content):
    content["slots"][1]["shape"] = [2, 256]


def for_one_image_alone(content):
    """Sizes for two images, in an engine of no other number."""
    engine = next(engine for engine in content["engines"] if engine["row"] == 1)
    engine["images"] = [1, 1]
    for port in engine["outputs"][1:]:
        port["shape"] = [4, 16, 16]


def another_target_for_some_rows(content):
    engine = next(engine for engine in content["engines"] if engine["row"] == 0)
    content["engines"].append({**engine, "target": "aoti"})


def another_target_but_for_decoding(content):
    content["engines"] += [{**engine, "target": "aoti"} for engine in content["engines"] if engine["row"] >= 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_a_read, "call 2 of schedule 'quick' of 4 steps reads cache.other.output.0, of which row-02"),
        (rename_a_write, "call 1 of .* writes output.0, of which row-01-.* knows nothing"),
        (give_weights, "call 2 of .* weights cache.other.weights, of which row-02"),
        (give_weights_of_another_number, "call 2 of .* has 2 weights for cache.transformer_blocks.0"),
        (read_before_it_is_written, "call 1 of .* reads .* from slot 0, which no call before it has written"),
        (write_to_one_slot, "call 1 of .* writes two caches into one slot"),
        (write_every_output, "call 1 of .* leaves row-01-.* no output but caches"),
        (another_dtype, "call 1 of .*: cache.transformer_blocks.1.* of row-01-.* does not fit slot 1"),
        (another_shape, "does not fit slot 1"),
        (another_rank, "does not fit slot 1"),
        (for_one_image_alone, "of row-01-.* does not fit slot 0"),
        (another_target_for_some_rows, "row 1 has no engine for aoti, which others have"),
        (another_target_but_for_decoding, "no engine that decodes for each target"),
        (lambda content: content["engines"].pop(), "there is no engine that decodes; restore"),
    ],
)
def test_calls_that_do_not_fit_their_engines_are_refused(folder, change, message):
    with pytest.raises(BundleFormatError, match=message):
        Manifest.from_json(edited(folder, change), "here")


def test_an_engine_of_one_number_of_images_has_sizes_for_these(folder):
    def change(content):
        for engine in content["engines"]:
            if engine["row"] >= 0:
                engine["images"] = [2, 2]
                for port in (*engine["inputs"], *engine["outputs"]):
                    port["shape"] = [4 if size == "2*images" else size for size in port["shape"]]

    assert Manifest.from_json(edited(folder, change), "here").slots[0].shape == (2, 16, 16)


def test_what_was_put_in_since_the_export_stands_in_it_only_then(folder):
    """So that manifests without it keep their digest."""
    document = json.loads((folder / MANIFEST).read_text())
    assert not {"adapters", "notices"} & set(document["source"])
    assert read_manifest(folder).adapters == read_manifest(folder).notices == ()
    found = Manifest.from_json(edited(folder, lambda content: at("source", "adapters")(content, [ADAPTER])), "here")
    assert found.adapters == (Adapter("a", "0" * 64, "lora", 1.0, (), "onnx"),)
    assert found.tested_by == "the engines of onnx"


def test_an_edit_and_another_version_are_told_apart(folder):
    path = folder / MANIFEST
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"plans": {"quick": document["weights"]}}))
    with pytest.raises(BundleIntegrityError, match="was changed after it was written"):
        read_manifest(folder)
    path.write_text(json.dumps(document | {"schema_version": 2}))
    with pytest.raises(BundleVersionError, match="this release reads version 1"):
        read_manifest(folder)
    path.unlink()
    with pytest.raises(BundleFormatError, match="cannot be read"):
        read_manifest(folder)


def test_files_that_are_not_what_was_exported(folder):
    files = read_manifest(folder).files
    name = next(name for name in files if name.startswith("row-"))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(BundleIntegrityError, match="it was cut off or exchanged"):
        check_file(folder, name, files)
    (folder / name).write_bytes(content[:-1] + b"?")
    for read in (check_file, checked_bytes):
        with pytest.raises(BundleIntegrityError, match="is not what was exported"):
            read(folder, name, files)
    (folder / name).rename(folder / "elsewhere")
    with pytest.raises(BundleIntegrityError, match="No such file"):
        check_file(folder, name, files)
    (folder / name).symlink_to(folder / "elsewhere")
    with pytest.raises(BundleIntegrityError, match="is a link"):
        check_file(folder, name, files)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(BundleIntegrityError, match="no plain file"):
        file_in(folder, name)


def test_a_manifest_that_is_a_link(folder, tmp_path):
    (folder / MANIFEST).rename(tmp_path / MANIFEST)
    (folder / MANIFEST).symlink_to(tmp_path / MANIFEST)
    with pytest.raises(BundleIntegrityError, match="is a link, which could lead anywhere"):
        read_manifest(folder)


def test_a_folder_on_the_way_that_is_a_link(folder, tmp_path):
    (folder / "plans").rename(tmp_path / "plans")
    (folder / "plans").symlink_to(tmp_path / "plans")
    found = read_manifest(folder)
    with pytest.raises(BundleIntegrityError, match="is a link"):
        checked_bytes(folder, found.plans["quick"], found.files)


def test_the_memory_of_a_call():
    """Of the tiny model: a sample of 8 x 8 in float32 for both halves, its label and timestep, and as much out of it,
    or of the decoder; caches of 2 blocks, 16 tokens, 16 channels for both halves."""
    found = read_manifest(bundles.kept())
    assert found.most_images == 2
    assert found.cache_bytes() == 2 * 2 * 16 * 16 * 4
    per_image = 2 * (2 * 8 * 8 * 4) + 2 * (8 + 8)
    assert [found.port_bytes(images) for images in (1, 2, 3)] == [per_image, 2 * per_image, 0]
    assert found.sizes[0].layouts == ("4x4",)


def test_sizes_for_images():
    assert sizes_of((3, "images", "2*images"), 5) == (3, 5, 10)


def fuzzed(times, seed, folder):
    """A manifest with bytes changed, taken out or put in, ``times`` over: refused, or the same."""
    text = (folder / MANIFEST).read_bytes()
    whole = Manifest.from_json(text, "here")
    chance = random.Random(seed)
    for _ in range(times):
        content = bytearray(text)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(content))
            action = chance.randrange(3)
            if action == 0:
                content[place] = chance.choice(b'0123456789"{}[],:.-eE\\ \x00\xffntx')
            elif action == 1:
                del content[place : place + chance.randint(1, 40)]
            else:
                content[place:place] = content[chance.randrange(len(content)) :][: chance.randint(1, 40)]
        try:
            found = Manifest.from_json(bytes(content), "here")
        except BundleFormatError:
            continue
        assert found == whole


def test_fuzzed_manifests():
    fuzzed(300, 0, bundles.kept())


def test_fuzzed_manifests_with_prompts(tmp_path):
    fuzzed(300, 2, bundles.prompted(tmp_path))


VALUES = (
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, "", "0", "images", "2*images",
    "../x", "cond", "uncond", "float32", "onnx", "a" * 300, "\x1b[31m", [], {}, [0], ["a"], [[]], {"": 0}, {"a": "b"},
)  # fmt: skip
"""Put in the place of others."""


def revalued(times, seed, folder):
    """A manifest with one or two values exchanged, for strange ones or for others out of it, and its digest right
    again: refused, or read as it stands there. How many were read."""
    document = json.loads((folder / MANIFEST).read_text())
    content = {name: document[name] for name in (*module.FORMAT.keys, *module.FORMAT.optional) if name in document}
    chance = random.Random(seed)
    text = json.dumps(content)
    read = 0
    for _ in range(times):
        changed = json.loads(text)
        places = list(values_in(changed))
        for _ in range(chance.randint(1, 2)):
            owner, key = chance.choice(places)
            other, name = chance.choice(places)
            value = chance.choice(VALUES) if chance.random() < 0.7 else json.loads(json.dumps(other[name]))
            owner[key] = value
        try:
            found = Manifest.from_json(json.dumps(module.FORMAT.frame(changed)), "here")
        except BundleFormatError:
            continue
        assert holds(json.loads(json.dumps(found.content())), changed)
        read += 1
    return read


def holds(found, given):
    """Whether a document is another one, with what may be missing in that filled in."""
    if isinstance(given, dict) and isinstance(found, dict):
        return given.keys() <= found.keys() and all(holds(found[name], given[name]) for name in given)
    if isinstance(given, list) and isinstance(found, list):
        return len(found) == len(given) and all(map(holds, found, given))
    return found == given and isinstance(found, bool) is isinstance(given, bool)


def values_in(content):
    """All values of a document, as what holds them and where."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield content, key
        yield from values_in(value)


def test_values_exchanged_in_manifests(tmp_path):
    assert 0 < revalued(300, 0, bundles.kept()) < 300
    assert 0 < revalued(300, 1, bundles.prompted(tmp_path)) < 300


@pytest.mark.slow
def test_ten_thousand_manifests_with_values_exchanged(tmp_path):
    assert 0 < revalued(10_000, 2, bundles.prompted(tmp_path)) < 10_000


@pytest.mark.slow
def test_ten_thousand_fuzzed_manifests():
    fuzzed(10_000, 1, bundles.kept())
