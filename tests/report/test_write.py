"""The page's file: it stands alone, and is written whole or not at all."""

from __future__ import annotations

import re

import pytest

from difa_compile.errors import OutputError
from difa_compile.files.writing import write_whole
from difa_compile.report import check_writable
from tests.support.pages import write


def test_path_and_nothing_else_in_the_folder(path):
    assert path.name == "index.html"
    assert list(path.parent.iterdir()) == [path]


def test_loads_nothing_from_elsewhere(page, path):
    references = [
        attrs[name] for _, attrs in page.tags for name in ("src", "href", "srcset", "action") if name in attrs
    ]
    assert len(references) > 30
    assert all(reference.startswith(("data:", "#")) for reference in references)
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|https?:|//cdn|fetch\(|XMLHttp", source)


def test_title_is_escaped(page, path):
    assert "<title>Digits &lt;faster&gt; &amp; better</title>" in path.read_text(encoding="utf-8")
    assert "Digits <faster> & better" in page.text


def test_folder_below_a_file(plan, comparison, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"the page cannot be written to .*index\.html: File exists; name a place"):
        write(tmp_path / "file", plan, comparison)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_read_only_file_system(plan, comparison):
    with pytest.raises(OutputError, match="cannot be written"):
        write("/proc/difa", plan, comparison)


def test_nothing_half_written_when_the_rename_fails(plan, comparison, tmp_path):
    (tmp_path / "index.html").mkdir()
    with pytest.raises(OutputError, match="a folder stands there"):
        write(tmp_path, plan, comparison)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "index.html"
    target.write_text("old")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("difa_compile.files.writing.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(target, b"new", "the page")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_check_writable(tmp_path):
    assert check_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []
    with pytest.raises(OutputError):
        check_writable("/proc/difa")
