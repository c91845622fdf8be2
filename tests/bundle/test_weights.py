"""The file of weights: what is written is read, by us and by safetensors, and nothing damaged is."""

import json
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_compile.bundle.weights import ALIGNMENT, DTYPES, WeightFile, bytes_of, write_weights
from difa_compile.errors import BundleError, BundleFormatError, OutputError


def tensors():
    generator = torch.Generator().manual_seed(0)
    made = {
        f"of.{dtype}".replace("torch.", ""): torch.randint(0, 2, (3, 5), generator=generator).to(dtype)
        for dtype in DTYPES
    }
    return made | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "a.weight": torch.randn(7, 3, generator=generator),
        "strided": torch.randn(4, 6, generator=generator).t(),
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


def test_what_is_written_is_read_and_begins_where_vectors_can_load_it(path):
    given = tensors()
    places = write_weights(path, given)
    found = WeightFile(path)
    assert found.places == places
    assert set(places) == set(given)
    for name, tensor in given.items():
        assert torch.equal(found[name], tensor)
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert places[name].offset % ALIGNMENT == 0 or not places[name].length
        assert found[name].data_ptr() % ALIGNMENT == 0 or not places[name].length


def test_other_tools_read_it(path):
    given = tensors()
    write_weights(path, given)
    theirs = safetensors.torch.load_file(path)
    for name, tensor in given.items():
        assert torch.equal(theirs[name], tensor), name


def test_equal_tensors_stand_in_it_once(path, tmp_path):
    weight = torch.randn(64, 64)
    places = write_weights(path, {"b": weight, "a": weight.clone(), "c": weight.reshape(32, 128), "d": weight + 1})
    assert places["a"] == places["b"]
    assert len({places[name].offset for name in "abcd"}) == 3
    assert WeightFile(path).places == places
    write_weights(tmp_path / "again", {"d": weight + 1, "c": weight.reshape(32, 128), "a": weight, "b": weight})
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_nothing_that_is_written_into_a_tensor_reaches_the_file(path):
    write_weights(path, {"a": torch.zeros(3)})
    before = path.read_bytes()
    WeightFile(path)["a"].fill_(7)
    assert path.read_bytes() == before
    assert not WeightFile(path)["a"].any()


def test_dtypes_that_cannot_be_kept_and_places_that_cannot_be_written(path):
    with pytest.raises(BundleError, match="complex64, which a file of weights cannot hold"):
        write_weights(path, {"a": torch.zeros(2, dtype=torch.complex64)})
    assert not path.exists()
    path.mkdir()
    with pytest.raises(OutputError, match="a folder stands there"):
        write_weights(path, {"a": torch.zeros(2)})
    assert not list(path.parent.glob(".difa*"))


def test_a_disk_that_is_full_leaves_the_old_file(path, monkeypatch):
    write_weights(path, {"a": torch.zeros(2)})
    before = path.read_bytes()

    def full(tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("difa_compile.bundle.weights.os.fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        write_weights(path, {"a": torch.ones(2)})
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def framed(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8) * (not isinstance(header, bytes))
    return struct.pack("<Q", len(text)) + text + data


def entry(first, last, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "shorter than any"),
        (b"\0" * 5, "shorter than any"),
        (struct.pack("<Q", 2**60), "header is said to be"),
        (struct.pack("<Q", 2) + b"{", "header is said to be"),
        (framed(b"{"), "Expecting"),
        (framed(b"\xff\xfe"), "decode"),
        (framed([]), "must be an object"),
        (framed({"a": entry(0, 4)}), "has 72 bytes, and its header tells of 76"),
        (framed({"a": entry(0, 4)}, b"\0" * 5), "header tells of"),
        (framed({"a": entry(0, 8)}, b"\0" * 8), "shape and dtype do not make"),
        (framed({"a": entry(0, 4, dtype="F4")}, b"\0" * 4), "known are F64"),
        (framed({"a": entry(4, 8)}, b"\0" * 8), "leave a gap"),
        (framed({"a": entry(0, 4), "b": entry(0, 4)}, b"\0" * 4), "overlap"),
        (framed({"a": entry(0, -4)}, b"\0" * 4), "at least 0"),
        (framed({"a": entry(0, 4, [-1])}, b"\0" * 4), "at least 0"),
        (framed({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4), "data_offsets"),
        (framed({"a": entry(0, 4, [2**40, 2**40])}, b"\0" * 4), "do not make"),
        (framed({"__metadata__": {"aliases": '{"b": "c"}'}, "a": entry(0, 4)}, b"\0" * 4), "no tensor of its own"),
        (framed({"__metadata__": {"aliases": '{"a": "a"}'}, "a": entry(0, 4)}, b"\0" * 4), "no tensor of its own"),
    ],
)
def test_damaged_files_are_refused(path, content, message):
    path.write_bytes(content)
    with pytest.raises(BundleFormatError, match=message):
        WeightFile(path)


def test_files_that_are_none(path, tmp_path):
    for wrong in (path, tmp_path, "/dev/null"):
        with pytest.raises(BundleFormatError, match="cannot be used"):
            WeightFile(wrong)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_header_is_refused_or_reads_what_is_there(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("weights") / "w"
    write_weights(path, {"a": torch.arange(6.0), "b": torch.arange(4), "c": torch.arange(6.0)})
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = WeightFile(path)
    except BundleFormatError:
        return
    for name, place in found.places.items():
        assert bytes(bytes_of(found[name])) == bytes(content[place.offset : place.offset + place.length])


def test_a_tensor_is_copied_to_a_device_once(path):
    write_weights(path, {"a": torch.ones(3), "b": torch.ones(3), "c": torch.zeros(3)})
    found, there = WeightFile(path), torch.device("meta")
    assert found.on("a", there).device == there
    assert found.on("a", there) is found.on("b", there), "equal tensors are one"
    assert found.on("a", there) is not found.on("c", there)
    assert found.on("a", torch.device("cpu")).data_ptr() == found["a"].data_ptr()
