"""A comparison kept in a folder: what is read is what was written, and what is damaged is refused."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from dataclasses import fields, replace

import numpy as np
import pytest

from difa_compile.errors import ComparisonFormatError, OutputError, PlanFormatError
from difa_compile.report.stored import COMPARISON, StoredComparison
from tests.support.report_sample import MACHINE, POINTS, make_comparison, make_plan


@pytest.fixture(scope="module")
def stored():
    plan = make_plan(10, 6)
    captions = tuple(f"digit {index}" for index in range(10))
    return StoredComparison(
        plan, make_comparison(plan, images=10), "A title", "difa demo", MACHINE, {"torch": "2"}, captions, POINTS
    )


@pytest.fixture
def folder(stored, tmp_path):
    stored.save(tmp_path / "kept")
    return tmp_path / "kept"


def edit(folder, change):
    """Change ``comparison.json`` and give it the digest of what it then holds."""
    path = folder / "comparison.json"
    content = json.loads(path.read_text())
    change(content)
    sealed = {name: value for name, value in content.items() if name not in ("digest", "schema_version")}
    path.write_text(json.dumps({**content, "digest": COMPARISON.digest(sealed)}))


def put_images(folder, **arrays):
    """Other images, bound to the comparison as its own are."""
    path = folder / "images.npz"
    np.savez(path, **arrays)
    edit(folder, lambda c: c.update(images=hashlib.sha256(path.read_bytes()).hexdigest()))


def test_what_is_read_is_what_was_written(stored, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.json", "images.npz", "plan.json"]
    read = StoredComparison.load(folder)
    for field in fields(StoredComparison):
        if field.name != "comparison":
            assert getattr(read, field.name) == getattr(stored, field.name)
    for field in fields(type(stored.comparison)):
        mine, theirs = getattr(read.comparison, field.name), getattr(stored.comparison, field.name)
        if field.name.startswith("images_f") or field.name == "images_planned":
            assert mine.dtype == np.uint8
            assert np.array_equal(mine, theirs)
        else:
            assert mine == theirs, field.name


def test_page_of_the_copy_is_the_page_of_the_original(stored, folder, tmp_path):
    first = stored.write_page(tmp_path / "first").read_text()
    assert StoredComparison.load(folder).write_page(tmp_path / "second").read_text() == first


def test_folder_without_comparison(tmp_path):
    with pytest.raises(ComparisonFormatError, match=r"comparison\.json cannot be read.*written by difa compare"):
        StoredComparison.load(tmp_path)


def test_truncated(folder):
    path = folder / "comparison.json"
    path.write_text(path.read_text()[:500])
    with pytest.raises(ComparisonFormatError, match=r"not valid JSON .* cut off"):
        StoredComparison.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema_version=2), "schema version 2, but this release reads version 3"),
        (lambda c: c.update(schema_version=3.0), "schema version 3.0"),
        (lambda c: c["front"][0].update(share=0), r"front\[0\].share is 0.0; it must be above 0"),
        (lambda c: c["front"][1].update(psnr="high"), r"front\[1\].psnr is a string"),
        (lambda c: c["front"][2].update(origin="luck"), "luck"),
        (lambda c: c["front"][3].pop("name"), r"front\[3\] is without the key"),
        (lambda c: c.update(front={}), "front"),
        (lambda c: c["front"][1].update(psnr=1e300), r"front\[1\] is out of the chart"),
        (lambda c: c["front"][1].update(share=1e9), r"front\[1\] is out of the chart"),
        (lambda c: c.update(extra=1), "with the unknown key 'extra'"),
        (lambda c: c.pop("machine"), "without the key 'machine'"),
        (lambda c: c["comparison"].pop("seeds"), "without the key 'seeds'"),
        (lambda c: c["comparison"]["full"].update(calls="fast"), r"comparison\.full\.calls is a string"),
        (lambda c: c["comparison"]["full"].update(calls=[]), r"comparison\.full\.calls has 0 entries"),
        (lambda c: c["comparison"]["full"].update(calls=[0]), r"comparison\.full\.calls is 0\.0; it must be above 0"),
        (lambda c: c["comparison"]["quality"].update(psnr="good"), r"comparison\.quality\.psnr is a string"),
        (lambda c: c["comparison"]["attention"].update(full_per_step=0), "full_per_step is 0; it must be at least 1"),
        (lambda c: c["comparison"].update(steps=True), r"comparison\.steps is true or false"),
        (lambda c: c["comparison"].update(seeds=[1, 2]), "captions has 10 entries for 20 images"),
        (lambda c: c["comparison"].update(images_per_call=5), "captions has 10 entries for 5 images"),
        (lambda c: c.update(captions=["a"]), "captions has 1 entries for 10 images"),
        (lambda c: c.update(captions=[], comparison=c["comparison"] | {"seeds": [1, 2]}), r"expected \(20, H, W"),
        (lambda c: c.update(machine=[]), "machine is a list; it must be an object"),
        (lambda c: c.update(title="\ud800"), "title holds half a character"),
        (lambda c: c.update(images="0" * 64), r"not the images of comparison\.json"),
    ],
)
def test_changed_content_is_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(ComparisonFormatError, match=message):
        StoredComparison.load(folder)


def test_another_plan_is_refused(folder):
    make_plan(10, 6, seed=1).save(folder / "plan.json")
    with pytest.raises(ComparisonFormatError, match="the comparison was made with plan"):
        StoredComparison.load(folder)


def test_missing_plan_is_refused(folder):
    (folder / "plan.json").unlink()
    with pytest.raises(PlanFormatError):
        StoredComparison.load(folder)


def test_an_edit_without_a_new_digest_is_refused(folder):
    path = folder / "comparison.json"
    path.write_text(path.read_text().replace("A title", "Another"))
    with pytest.raises(ComparisonFormatError, match="changed after it was written"):
        StoredComparison.load(folder)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 but not a zip", None])
def test_damaged_images_are_refused(folder, content):
    path = folder / "images.npz"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ComparisonFormatError, match=r"cannot be read|not the images of comparison\.json"):
        StoredComparison.load(folder)
    if content is not None:
        edit(folder, lambda c: c.update(images=hashlib.sha256(content).hexdigest()))
        with pytest.raises(ComparisonFormatError, match="is damaged"):
            StoredComparison.load(folder)


def test_images_of_another_comparison_are_refused(stored, folder, tmp_path):
    other = make_comparison(stored.plan, images=10, seed=1)
    replace(stored, comparison=other).save(tmp_path / "other")
    (tmp_path / "other" / "images.npz").replace(folder / "images.npz")
    with pytest.raises(ComparisonFormatError, match=r"not the images of comparison\.json"):
        StoredComparison.load(folder)


@pytest.mark.parametrize(
    ("full", "message"),
    [
        (np.array([print], dtype=object), "no array of bytes"),
        (np.zeros((10, 2, 2, 1)), "no array of bytes"),
        (np.zeros((10, 2, 2), np.uint8), "no array of bytes"),
        (np.asfortranarray(np.zeros((10, 2, 2, 3), np.uint8)), "no array of bytes"),
        (np.zeros((9, 2, 2, 1), np.uint8), r"shape \(9, 2, 2, 1\)"),
        (np.zeros((10, 2, 2, 2), np.uint8), r"shape \(10, 2, 2, 2\)"),
        (np.zeros((10, 2, 3, 1), np.uint8), "cannot be compared"),
    ],
)
def test_images_of_another_type_or_shape_are_refused(folder, full, message):
    put_images(folder, full=full, planned=np.zeros((10, 2, 2, 1), np.uint8))
    with pytest.raises(ComparisonFormatError, match=message):
        StoredComparison.load(folder)


def test_other_members_are_refused(folder):
    image = np.zeros((10, 2, 2, 1), np.uint8)
    put_images(folder, full=image, planned=image, more=image)
    with pytest.raises(ComparisonFormatError, match=r"it holds \['full\.npy'"):
        StoredComparison.load(folder)


@pytest.mark.parametrize("shape", [(10, 2, 2, 3), (10, 999999999, 999999999, 1), (10, 1, 1, 1)])
def test_an_array_that_is_not_of_the_size_it_claims_is_refused(folder, shape):
    """Among them a few bytes that claim to be an exabyte, and a member that goes on after its array."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(40)
    path = folder / "images.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("full.npy", member)
        archive.writestr("planned.npy", member)
    edit(folder, lambda c: c.update(images=hashlib.sha256(path.read_bytes()).hexdigest()))
    with pytest.raises(ComparisonFormatError, match=r"ends after 40|expected|goes on after"):
        StoredComparison.load(folder)


def test_arrays_that_lie_otherwise_in_memory_are_kept_all_the_same(stored, tmp_path):
    comparison = replace(stored.comparison, images_full=np.asfortranarray(stored.comparison.images_full))
    replace(stored, comparison=comparison).save(tmp_path)
    assert np.array_equal(StoredComparison.load(tmp_path).comparison.images_full, stored.comparison.images_full)


def test_a_command_line_of_other_bytes_than_text_is_kept_escaped(stored, tmp_path):
    """Python gives bytes of a command line that are no UTF-8 as lone surrogates, which cannot be written."""
    odd = replace(stored, command="difa compare \udcff", captions=("\ud800",) * 10, machine={"\udc80": "\udc81"})
    odd.save(tmp_path)
    read = StoredComparison.load(tmp_path)
    assert read.command == r"difa compare \udcff"
    assert (read.captions, read.machine) == (odd.captions, odd.machine)
    read.write_page(tmp_path)


def test_a_kill_between_the_files_cannot_mix_two_comparisons(stored, folder, monkeypatch):
    """Whatever was renamed before the kill: what is there is the old comparison, the new one, or refused."""
    new = replace(stored, title="New", comparison=make_comparison(stored.plan, images=10, seed=1))
    rename, done = os.replace, []

    def killed(source, target):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(target)
        rename(source, target)

    monkeypatch.setattr("difa_compile.files.writing.os.replace", killed)
    for stop in range(3):
        done.clear()
        with pytest.raises(KeyboardInterrupt):
            new.save(folder)
        assert sorted(path.name for path in folder.iterdir()) == ["comparison.json", "images.npz", "plan.json"]
        if stop == 0:
            assert StoredComparison.load(folder).title == "A title"
        else:
            with pytest.raises(ComparisonFormatError, match="not the images"):
                StoredComparison.load(folder)
    stop = 3
    done.clear()
    new.save(folder)
    assert StoredComparison.load(folder).title == "New"


def test_folder_that_cannot_be_written(stored):
    with pytest.raises(OutputError):
        stored.save("/proc/difa")
