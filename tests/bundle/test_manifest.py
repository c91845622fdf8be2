"""Manifests: read as they were written, and refused where they contradict themselves, the folder, or leave it."""

import json
import random

import pytest

from difa_compile.bundle import manifest as module
from difa_compile.bundle.manifest import (
    MANIFEST,
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
            del engine["memory"], engine["unchecked"]

    found = Manifest.from_json(edited(folder, change), "here")
    assert found.compared == {}
    assert all(engine.memory == {} for engine in found.engines)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../b", "a/b/c", "", ".", "..", "a\\b", "~x", ".x", "a/.b", "ä"]
)
def test_names_that_could_leave_the_folder(folder, name):
    def change(content):
        content["files"][name] = content["files"].pop(content["weights"])
        content["weights"] = name

    with pytest.raises(BundleFormatError, match="is no name of a file in a bundle"):
        Manifest.from_json(edited(folder, change), "here")


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
        (at("plans"), {}, "has no plan"),
        (at("engines", 0, "images"), [2, 1], "is for row 0 and 2 to 1 images"),
        (at("engines", 0, "row"), -2, "is for row -2"),
        (at("engines", 0, "inputs", 0, "dtype"), "complex64", "known are float64"),
        (at("engines", 0, "inputs", 0, "shape"), ["os.system"], "has the size"),
        (at("engines", 0, "inputs", 0, "shape"), [-1], "has the size -1"),
        (at("schedules", 0, "calls", 0, "row"), 99, "there is no engine"),
        (at("schedules", 0, "calls", 0, "reads"), {"cache.x.output.0": 99}, "a slot that there is not"),
        (at("schedules", 0, "calls", 0, "row"), "0", "Expected `int`"),
        (at("schedules", 0, "surprise"), 1, "unknown field"),
        (at("files", "surprise"), {"bytes": -1, "sha256": "0" * 64}, "no size and digest"),
        (at("files", "surprise"), {"bytes": 1, "sha256": "g" * 64}, "no size and digest"),
    ],
)
def test_contradictions_are_refused(folder, place, value, message):
    with pytest.raises(BundleFormatError, match=message):
        Manifest.from_json(edited(folder, lambda content: place(content, value)), "here")


def test_a_call_must_not_write_what_it_reads(folder):
    def change(content):
        call = next(call for call in content["schedules"][0]["calls"] if call["reads"])
        call["writes"] = dict.fromkeys(["cache.x.output.0"], next(iter(call["reads"].values())))

    with pytest.raises(BundleFormatError, match="reads and writes one slot"):
        Manifest.from_json(edited(folder, change), "here")


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


def test_a_folder_on_the_way_that_is_a_link(folder, tmp_path):
    (folder / "plans").rename(tmp_path / "plans")
    (folder / "plans").symlink_to(tmp_path / "plans")
    found = read_manifest(folder)
    with pytest.raises(BundleIntegrityError, match="is a link"):
        checked_bytes(folder, found.plans["quick"], found.files)


def test_sizes_for_images():
    assert sizes_of((3, "images", "2*images"), 5) == (3, 5, 10)


def fuzzed(times, seed):
    """A manifest with bytes changed, taken out or put in, ``times`` over: refused, or the same."""
    text = (bundles.kept() / MANIFEST).read_bytes()
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
    fuzzed(300, 0)


@pytest.mark.slow
def test_ten_thousand_fuzzed_manifests():
    fuzzed(10_000, 1)
