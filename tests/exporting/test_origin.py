"""Cards and licences are found beside a pipeline on this machine, and travel in its bundle."""

import os

import pytest
from torch import nn

from difa_compile.bundle.manifest import check_file, read_manifest
from difa_compile.demo.checkpoint import demo_model_path
from difa_compile.exporting import write
from difa_compile.exporting.origin import CARD, MOST_BYTES, MOST_FILES, Origin, folder_of, origin_of
from difa_compile.exporting.write import export
from difa_compile.pipeline.loading import load_pipeline
from tests.support import bundles

CONTENT = "---\nlicense: openrail++\ntags: [a]\n---\n# A model\n"


class Pipe:
    """Stands in for a pipeline that was loaded from ``place``, its model from ``inner``."""

    def __init__(self, place, inner=None):
        self.name_or_path = place
        model = nn.Module()
        model.config = type("Config", (), {"_name_or_path": inner})()
        self.components = {"scheduler": None, "transformer": model}


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "model"
    place.mkdir()
    (place / "model_index.json").write_text("{}")
    (place / CARD).write_text(CONTENT)
    return place


def told_of(folder):
    lines = []
    return origin_of(Pipe(str(folder)), lines.append), lines


def test_a_local_folder(folder):
    (folder / "LICENSE.md").write_text("you may")
    (folder / "Notice").write_text("note")
    (folder / "licenses_of_others.txt").write_text("they may")
    (folder / "other.md").write_text("nothing of it")
    found, lines = told_of(folder)
    assert found == Origin(
        "openrail++",
        CONTENT.encode(),
        {"LICENSE.md": b"you may", "Notice": b"note", "licenses_of_others.txt": b"they may"},
    )
    assert lines == []


def test_the_cache_of_the_hub(folder, tmp_path):
    """Its files are links to blobs; a pipeline by id is known by where its models were read."""
    blob = tmp_path / "blob"
    os.replace(folder / CARD, blob)
    (folder / CARD).symlink_to(blob)
    pipe = Pipe("owner/name", str(folder / "transformer"))
    assert folder_of(pipe) == folder
    assert origin_of(pipe).licence == "openrail++"


def test_nothing_is_found_where_nothing_is(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *arguments: pytest.fail("the network was asked"))
    for pipe in (Pipe(None), Pipe(""), Pipe("owner/name"), Pipe(str(tmp_path)), Pipe("x", "owner/name"), object()):
        assert origin_of(pipe) == Origin()
    (folder / CARD).unlink()
    assert origin_of(Pipe(str(folder))) == Origin()


@pytest.mark.parametrize(
    ("matter", "licence"),
    [
        ("license: mit", "mit"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("license: other\nlicense_name: ours\nlicense_link: LICENSE.md", "other (ours, LICENSE.md)"),
        ("tags: [a]", ""),
        ("license:", ""),
    ],
)
def test_what_the_front_matter_says(folder, matter, licence):
    (folder / CARD).write_text(f"---\n{matter}\n---\ntext")
    found, lines = told_of(folder)
    assert found.licence == licence
    assert found.card is not None
    assert lines == []


@pytest.mark.parametrize("content", [b"---\na: [\n---\n", b"---\n- a\n---\n"])
def test_front_matter_that_cannot_be_read_is_told(folder, content):
    (folder / CARD).write_bytes(content)
    found, lines = told_of(folder)
    assert (found.licence, found.card) == ("", content)
    assert len(lines) == 1
    assert "front matter cannot be read" in lines[0]


def test_a_card_without_any(folder):
    (folder / CARD).write_bytes(b"\xff\x00 no card")
    assert told_of(folder) == (Origin("", b"\xff\x00 no card"), [])


def test_files_that_are_not_taken_along_are_told(folder):
    with (folder / "LICENSE").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    os.mkfifo(folder / "LICENSE.pipe")
    (folder / "NOTICE").mkdir()
    (folder / "COPYING").symlink_to(folder / "nowhere")
    found, lines = told_of(folder)
    assert found.notices == {}
    assert sorted(line.split(" is not taken along: ")[0] for line in lines) == [
        "COPYING", "LICENSE", "LICENSE.pipe", "NOTICE",
    ]  # fmt: skip
    for number in range(MOST_FILES + 2):
        (folder / f"LICENSE-{number:02}").write_text("x")
    (folder / "COPYING").unlink()
    assert sum("more than" in line for line in told_of(folder)[1]) > 0


def test_the_demo_model_has_a_card():
    pipe = load_pipeline("demo")
    assert folder_of(pipe) == demo_model_path()
    assert origin_of(pipe).licence == "apache-2.0"
    assert b"CC BY 4.0" in origin_of(pipe).card


def test_they_are_files_of_the_bundle(folder, tmp_path):
    (folder / "LICENSE-MODEL v2.txt").write_text("you may")
    pipe = bundles.pipeline()
    pipe.register_to_config(_name_or_path=str(folder))
    lines, files = [], {}
    exporting = write._Exporting.__new__(write._Exporting)
    exporting.pipe, exporting.models, exporting.folder = pipe, {"transformer": pipe.transformer}, tmp_path / "bundle"
    exporting.name, exporting.told = "owner/name", lines.append
    source = exporting._source(files)
    assert (source.name, source.licence) == ("owner/name", "openrail++")
    assert set(files) == {source.card, *source.notices}
    assert check_file(tmp_path / "bundle", source.card, files).read_text() == CONTENT
    assert lines == ["licence: openrail++, 2 files of it"]
    assert all(write.OURS.fullmatch(name) for name in files), "a later export may delete them"


@pytest.mark.slow
def test_they_travel_in_the_bundle(folder, tmp_path, monkeypatch):
    """With an export in which nothing is compiled: the engines are those of a bundle that is there."""
    pytest.importorskip("onnxruntime")
    (folder / "LICENSE-MODEL v2.txt").write_text("you may")
    pipe = bundles.pipeline()
    pipe.register_to_config(_name_or_path=str(folder))
    place = bundles.copy(tmp_path)
    again = lambda: export(  # noqa: E731
        pipe, {"quick": bundles.plan(pipe)}, place, inputs=bundles.INPUTS, steps=[bundles.STEPS], most_images=2
    )
    manifest = again().manifest
    source = manifest.source
    assert source.licence == "openrail++"
    assert manifest == read_manifest(place)
    assert check_file(place, source.card, manifest.files).read_text() == CONTENT
    (notice,) = manifest.notices
    assert notice.startswith("about/LICENSE-MODEL_v2-")
    assert check_file(place, notice, manifest.files).read_text() == "you may"
    assert str(folder) not in (place / "manifest.json").read_text(), "where it lay is nobody's business"
    (folder / "LICENSE-MODEL v2.txt").unlink()
    assert again().manifest.notices == ()
    assert not (place / notice).exists(), "what earlier exports left goes"
