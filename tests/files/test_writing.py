"""Writing files: whole or not at all, to the disk before the rename, and never over what is no file."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from difa_compile.errors import OutputError
from difa_compile.files import writing
from difa_compile.files.writing import (
    check_new,
    check_target,
    check_writable,
    link_or_copy,
    new_folder,
    write_together,
    write_whole,
)


def test_bytes_and_text_are_written_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_whole(tmp_path / "a" / "text", "grün\n", "it")
    write_whole(tmp_path / "a" / "bytes", b"\xff\0", "it")
    write_whole(tmp_path / "a" / "bytes", b"\xfe", "it")
    assert (tmp_path / "a" / "text").read_bytes() == "grün\n".encode()
    assert (tmp_path / "a" / "bytes").read_bytes() == b"\xfe"
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_a_name_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_whole(path, "text", "it")
    assert path.read_text() == "text"
    with pytest.raises(OutputError, match="File name too long; give a shorter name"):
        write_whole(tmp_path / ("n" * 256), "text", "it")


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    for text in ("one", "two"):
        write_whole(tmp_path / "link", text, "it")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / "file").read_text() == text
    assert len(list(tmp_path.rglob("*"))) == 3


def test_everything_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(writing.os, "fsync", lambda d: (done.append("fsync"), fsync(d)))
    monkeypatch.setattr(writing.os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    write_together({tmp_path / "a": "1", tmp_path / "b": b"2"}, "it")
    assert done == ["fsync", "fsync", "replace", "replace", "fsync"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full .*free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full .*free some space"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system; name a place in a folder you may"),
        (KeyboardInterrupt(), ""),
    ],
)
def test_a_failure_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, failure: BaseException, message: str
) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_text("old")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(writing.os, call, fail)
    expected = OutputError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match=message):
        write_together(dict.fromkeys(paths, "new"), "it")
    assert sorted(tmp_path.iterdir()) == paths
    assert [path.read_text() for path in paths] == ["old", "old"]


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a folder": (folder, "a folder stands there"),
    "a pipe": (pipe, "a pipe stands there"),
    "a device": (lambda path: Path("/dev/null"), "a device stands there"),
    "a link to itself": (loop, "Too many levels of symbolic links"),
    "below a file": (lambda path: Path(__file__) / "file", "Not a directory|File exists"),
    "a zero byte": (lambda path: path.with_name("a\0b"), "null byte"),
    "no text": (lambda path: path.with_name("a\ud800b"), "surrogates not allowed"),
    "no name": (lambda path: Path(), "a folder stands there"),
    "a name of control characters": (lambda path: Path(__file__) / "\x1b[31m", r"\\x1b\[31m"),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_place_for_a_file_is_refused_and_left_alone(place: str, tmp_path: Path) -> None:
    make, message = PLACES[place]
    path = make(tmp_path / "file")
    before = [entry.lstat().st_ino for entry in tmp_path.iterdir()]
    for write in (lambda: write_whole(path, "text", "it"), lambda: check_target(path, "it")):
        with pytest.raises(OutputError, match=message) as caught:
            write()
        assert str(caught.value).isprintable()
        assert str(caught.value).startswith("it cannot be written to ")
    assert [entry.lstat().st_ino for entry in tmp_path.iterdir()] == before


def test_text_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="surrogates not allowed"):
        write_whole(tmp_path / "file", "a \ud800", "it")
    assert list(tmp_path.iterdir()) == []


def test_trying_a_place_leaves_no_file(tmp_path: Path) -> None:
    check_target(tmp_path / "deep" / "file", "it")
    assert check_writable(tmp_path / "deep" / "er") == tmp_path / "deep" / "er"
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []


def test_a_full_disk_is_found_when_a_place_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full"):
        check_target(tmp_path / "file", "it")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_takes_its_name_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "a" / "new", tmp_path / "empty"):
        with new_folder(place, "it") as fresh:
            assert fresh.parent == place.parent
            (fresh / "inside").mkdir()
            (fresh / "inside" / "file").write_text("text")
            assert not place.exists() or not any(place.iterdir())
        assert (place / "inside" / "file").read_text() == "text"
        assert list(place.parent.glob(".difa-*")) == []
    with pytest.raises(FileExistsError), new_folder(tmp_path / "broken", "it") as fresh:
        fresh.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]


def test_a_folder_is_not_made_over_anything(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "full", "link"):
        for attempt in (check_new, lambda path, what: new_folder(path, what).__enter__()):
            with pytest.raises(OutputError, match="something stands there already; name a new folder"):
                attempt(tmp_path / name, "it")
    for place in (tmp_path / "file" / "new", Path("/proc/difa"), tmp_path / ("n" * 256), tmp_path / "\0"):
        with pytest.raises(OutputError, match="it cannot be written to"):
            check_new(place, "it")
    check_new(tmp_path / "new", "it")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "link"]


@pytest.mark.parametrize("code", [None, errno.EXDEV, errno.EPERM])
def test_a_second_name_or_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None) -> None:
    (tmp_path / "one").write_bytes(b"\xff" * 5000)

    def link(*arguments: object, **options: object) -> None:
        assert code is not None
        raise OSError(code, "no")

    if code is not None:
        monkeypatch.setattr(os, "link", link)
    link_or_copy(tmp_path / "one", tmp_path / "a" / "two", "it")
    assert (tmp_path / "a" / "two").read_bytes() == b"\xff" * 5000
    assert os.path.samefile(tmp_path / "one", tmp_path / "a" / "two") == (code is None)
    with pytest.raises(OutputError, match="File exists"):
        link_or_copy(tmp_path / "one", tmp_path / "a" / "two", "it")
