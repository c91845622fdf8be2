"""Tables are named by what they hold; pieces are found again as they were kept, damaged ones are not."""

import pytest
import torch

from difa_compile.bundle.manifest import Port
from difa_compile.exporting.lowered import TABLE, Lowered, Piece, keep, kept_in, renumbered, table_name


def test_equal_tables_have_one_name():
    table = torch.arange(6.0).reshape(2, 3)
    assert table_name(table) == table_name(table.clone().t().contiguous().t())
    others = (table + 1, table.reshape(3, 2), table.double(), table.to(torch.int32).view(torch.float32))
    names = {table_name(each) for each in (table, *others)}
    assert len(names) == 5
    assert all(name.startswith(TABLE) for name in names)


def piece(folder):
    table = torch.arange(300.0)
    file = folder / "0.onnx"
    file.write_bytes(b"engine")
    name = table_name(table)
    lowered = Lowered(file, {"w": "transformer.w", "t": name}, {name: table}, {"onnx": "1"}, "AVX2", True)
    port = Port("x", "float32", ("2*images", 3))
    return Piece("k", 3, "onnx", "row-03-1", lowered, (port,), (port,), (1, 1), "a reason")


def test_pieces_are_found_as_they_were_kept(tmp_path):
    made = piece(tmp_path)
    keep(made, tmp_path / "0.json")
    (found,) = kept_in(tmp_path, 7)
    assert (found.key, found.row, found.label, found.inputs) == ("k", 7, "row-07-1", made.inputs)
    assert (found.target, found.images, found.why_static, found.outputs) == ("onnx", (1, 1), "a reason", made.outputs)
    assert (found.lowered.weights, found.lowered.versions) == (made.lowered.weights, made.lowered.versions)
    assert (found.lowered.instruction_set, found.lowered.kernel) == ("AVX2", True)
    (name,) = made.lowered.tables
    assert torch.equal(found.lowered.tables[name], made.lowered.tables[name])


@pytest.mark.parametrize("file", ["0.onnx", "0.json", "0.tables"])
def test_damaged_pieces_are_not_taken(tmp_path, file):
    keep(piece(tmp_path), tmp_path / "0.json")
    (tmp_path / file).write_bytes(b"")
    with pytest.raises((OSError, ValueError, KeyError, TypeError)):
        kept_in(tmp_path, 0)


def test_labels_follow_rows():
    assert [renumbered(label, 12) for label in ("row-03", "row-03-8", "decode-2")] == ["row-12", "row-12-8", "decode-2"]
