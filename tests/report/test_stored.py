"""A comparison kept in a folder: what is read is what was written, and what is damaged is refused."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest

from difa_compile.errors import ComparisonFormatError, OutputError, PlanFormatError
from difa_compile.report.stored import StoredComparison
from tests.report.sample import MACHINE, make_comparison, make_plan


@pytest.fixture(scope="module")
def stored():
    plan = make_plan(10, 6)
    captions = tuple(f"digit {index}" for index in range(10))
    return StoredComparison(
        plan, make_comparison(plan, images=10), "A title", "difa demo", MACHINE, {"torch": "2"}, captions
    )


@pytest.fixture
def folder(stored, tmp_path):
    stored.save(tmp_path / "kept")
    return tmp_path / "kept"


def edit(folder, change):
    path = folder / "comparison.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


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
    with pytest.raises(ComparisonFormatError, match="not JSON, or is truncated"):
        StoredComparison.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema_version=2), "schema version 2, this release reads 1"),
        (lambda c: c.update(extra=1), "has unknown extra"),
        (lambda c: c.pop("machine"), "lacks machine"),
        (lambda c: c["comparison"].pop("seeds"), "lacks seeds"),
        (lambda c: c["comparison"]["full"].update(calls="fast"), "value of the wrong type.*'fast'"),
        (lambda c: c["comparison"]["quality"].update(psnr="good"), "value of the wrong type.*'good'"),
        (lambda c: c["comparison"].update(steps=True), "value of the wrong type.*True"),
        (lambda c: c["comparison"].update(seeds=[1, 2]), "10 images and 10 captions for 2 seeds"),
        (lambda c: c.update(captions=["a"]), "10 images and 1 captions"),
        (lambda c: c.update(machine=[]), "value of the wrong type"),
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


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 but not a zip", None])
def test_damaged_images_are_refused(folder, content):
    path = folder / "images.npz"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ComparisonFormatError, match="missing or damaged"):
        StoredComparison.load(folder)


def test_pickled_images_are_refused(folder):
    np.savez(folder / "images.npz", full=np.array([print], dtype=object), planned=np.zeros(1))
    with pytest.raises(ComparisonFormatError, match="missing or damaged"):
        StoredComparison.load(folder)


def test_images_of_another_type_are_refused(folder):
    np.savez(folder / "images.npz", full=np.zeros((1, 2, 2, 1)), planned=np.zeros((1, 2, 2, 1)))
    with pytest.raises(ComparisonFormatError, match=r"holds float64 \(1, 2, 2, 1\)"):
        StoredComparison.load(folder)


def test_folder_that_cannot_be_written(stored):
    with pytest.raises(OutputError):
        stored.save("/proc/difa")
