"""Pieces of an export are made once: those that are there are found again, those that are damaged made anew."""

import errno
import re
from types import SimpleNamespace

import pytest
import torch

from difa_compile.bundle.manifest import Port, read_manifest
from difa_compile.errors import TargetError
from difa_compile.exporting import pieces as module
from difa_compile.exporting.lowered import Lowered, table_name
from difa_compile.exporting.pieces import PIECES, Draft, Made, Pieces, digest_of, form_of
from tests.support import bundles

TABLE = torch.arange(3.0)


@pytest.fixture(scope="module")
def draft():
    torch.manual_seed(0)
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    ports = tuple(Port(name, "float32", (1, 2)) for name in ("value", "output"))
    return Draft("row-00", program, (), ports[:1], ports[1:], (1, 1), component="model")


@pytest.fixture
def target(monkeypatch):
    """A target whose pieces say what they are for; how often it was asked."""
    asked = []

    def lowered(wanted, path):
        asked.append(wanted)
        file = path.with_suffix(".onnx")
        file.write_text("an engine")
        weights = {"a": "weight", "b": "bias", "c": table_name(TABLE)}
        return Lowered(file, weights, {weights["c"]: TABLE}, {"it": "1"}, unchecked="it was not run")

    monkeypatch.setattr(module, "target_of", lambda name: SimpleNamespace(lowered=lowered))
    return asked


def test_a_piece_is_made_once_and_found_again(tmp_path, draft, target):
    told = []
    first = Pieces(tmp_path, {"model.bias": "model.first"}, Made(2, True, ("8.9",)), told.append)
    (made,) = first.of("onnx", 3, {"is": 1}, lambda: [draft])
    assert made.lowered.weights == {"a": "model.weight", "b": "model.first", "c": table_name(TABLE)}
    assert (made.row, made.target, made.label, made.images) == (3, "onnx", "row-03", (1, 1))
    assert told == [
        "onnx: row-00, 2 weights, images a call: 1",
        "onnx: row-00: its model was not compared with the program: it was not run",
    ]
    (wanted,) = target
    assert (wanted.program, wanted.usual, wanted.portable, wanted.gpus) == (draft.program, 2, True, ("8.9",))

    def never():
        raise AssertionError("it is there")

    second = Pieces(tmp_path, {}, Made(2, True, ("8.9",)), told.append)
    (found,) = second.of("onnx", 5, {"is": 1}, never)
    assert (found.row, found.label, found.lowered.file.read_text()) == (5, "row-05", "an engine")
    assert found.lowered.weights == made.lowered.weights
    assert torch.equal(found.lowered.tables[table_name(TABLE)], TABLE)
    assert ((first.made, first.kept), (second.made, second.kept)) == ((1, 0), (0, 1))
    second.of("onnx", 5, {"is": 2}, lambda: [draft, draft])
    assert (second.made, len(target)) == (2, 3)
    second.clear()
    assert not (tmp_path / PIECES).exists()


def test_what_is_half_made_or_damaged_is_made_anew(tmp_path, draft, target):
    def stopped():
        yield draft
        raise KeyboardInterrupt

    pieces = Pieces(tmp_path, {}, Made(), print)
    with pytest.raises(KeyboardInterrupt):
        pieces.of("onnx", 0, {}, stopped)
    (made,) = pieces.of("onnx", 0, {}, lambda: [draft])
    assert len(target) == 2
    made.lowered.file.write_text("something else")
    pieces.of("onnx", 0, {}, lambda: [draft])
    assert (len(target), pieces.kept) == (3, 0)


def test_engines_of_the_bundle_that_is_there(tmp_path, draft, request, monkeypatch):
    """Unless they or their weights are not what the manifest says."""
    folder = bundles.copy(tmp_path)
    request.getfixturevalue("target")
    manifest = read_manifest(folder)
    engine = manifest.engines[0]
    monkeypatch.setattr(Made, "key", lambda *_: engine.key)
    (found,) = Pieces(folder, {}, Made(), print).of(engine.target, 7, {}, lambda: [])
    assert (found.lowered.file, found.lowered.weights) == (folder / engine.file, engine.weights)
    assert found.label.startswith("row-07")
    (folder / manifest.weights).write_bytes(b"")
    pieces = Pieces(folder, {}, Made(), print)
    assert len(pieces.of(engine.target, 7, {}, lambda: [draft])) == 1
    assert (pieces.made, pieces.kept) == (1, 0)


@pytest.mark.parametrize(
    ("error", "wanted", "message"),
    [
        (RuntimeError("no such operation"), TargetError, "onnx does not take row-00: RuntimeError: no such operation"),
        (TargetError("as it says"), TargetError, "as it says"),
        (OSError(errno.ENOSPC, "No space left on device"), OSError, "No space left on device"),
        (FileNotFoundError(errno.ENOENT, "no compiler"), TargetError, "onnx does not take row-00: FileNotFoundError"),
        (MemoryError("no more"), MemoryError, "no more"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_what_a_target_has_against_an_engine(tmp_path, draft, monkeypatch, error, wanted, message):
    def refused(*_):
        raise error

    monkeypatch.setattr(module, "target_of", lambda name: SimpleNamespace(lowered=refused))
    with pytest.raises(wanted, match=re.escape(message)):
        Pieces(tmp_path, {}, Made(), print).of("onnx", 0, {}, lambda: [draft])


def test_a_mistake_of_ours_is_no_refusal(tmp_path):
    def wrong():
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        Pieces(tmp_path, {}, Made(), print).of("onnx", 0, {}, wrong)


def test_what_a_key_depends_on(monkeypatch):
    pytest.importorskip("onnxscript")
    described = {"graph": "a"}
    plain = Made().key("onnx", described)
    assert plain == Made(usual=3, gpus=("8.9",)).key("onnx", described), "TensorRT's alone"
    assert plain == Made(portable=True).key("onnx", described), "AOTInductor's alone"
    others = [Made(portable=each).key("aoti", described) for each in (False, True)] + [Made().key("onnx", {})]
    monkeypatch.setattr(module, "library", lambda: SimpleNamespace(name="tensorrt-rtx", version="1"))
    others += [how.key("tensorrt", described) for how in (Made(), Made(usual=3), Made(gpus=("8.9",)))]
    monkeypatch.setattr(module, "_sources", lambda: "changed code")
    others.append(Made().key("onnx", described))
    assert len({plain, *others}) == 1 + len(others)


def test_what_an_engine_depends_on(draft):
    """Weights' numbers are another file's; constants' numbers and weights' sizes are in the engine."""
    described = draft.described()
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    assert not torch.equal(program.state_dict["weight"], draft.program.state_dict["weight"])
    alike = Draft("row-01", program, (), draft.inputs, draft.outputs, draft.images)
    assert alike.described() == described
    held = Draft("row-01", program, ("bias",), draft.inputs, draft.outputs, draft.images)
    assert held.described() != described
    assert Draft("row-01", program, (), draft.inputs, draft.outputs, (1, 2)).described() != described
    transposed = torch.zeros(3, 2).T
    assert form_of(transposed) != form_of(torch.zeros(2, 3))
    assert form_of(3) == "3"
    assert digest_of([transposed]) == digest_of([torch.zeros(2, 3)]) != digest_of([torch.zeros(2, 3), TABLE])
