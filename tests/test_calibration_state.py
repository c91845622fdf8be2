"""The saved state of a calibration: what it belongs to, what damages it, and that it is written whole."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from difa_compile.calibration_state import (
    CalibrationState,
    default_path,
    digest_of,
    generators_in,
    weights_digest,
)
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import CalibrationStateError, OutputError
from difa_compile.plan import Cell, Trial

WINDOW = Decision.parse("window(band:4)+residual+cfg")
ROWS = [
    (Cell(FULL), Cell(FULL)),
    (
        Cell(REUSE, (Trial(REUSE, 0.0125, 0.05),), 1.0),
        Cell(FULL, (Trial(REUSE, 0.5, 0.1), Trial(WINDOW, None, 0.1, "masked")), 0.0),
    ),
]


def test_round_trip(tmp_path):
    state = CalibrationState.open(tmp_path / "deep" / "state.json", {"model": "a"})
    assert state.rows == []
    state.rows += ROWS
    state.save()
    again = CalibrationState.open(state.path, {"model": "a"})
    assert again.rows == ROWS
    assert [path.name for path in state.path.parent.iterdir()] == ["state.json"]
    again.remove()
    assert not state.path.exists()


def test_other_calibration_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "state.json"
    CalibrationState(path, {"model": "a", "inputs": "x"}, list(ROWS)).save()
    before = path.read_text()
    with pytest.raises(CalibrationStateError, match="inputs differ"):
        CalibrationState.open(path, {"model": "a", "inputs": "y"})
    with pytest.raises(CalibrationStateError, match="seed differ"):
        CalibrationState.open(path, {"model": "a", "inputs": "x", "seed": "1"})
    assert path.read_text() == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"state_version": 1}',
        '{"state_version": 1, "identity": {}, "rows": [[{"decision": "slow", "trials": [], "flops_saved": 0}]]}',
        '{"state_version": 1, "identity": {}, "rows": [[{"decision": "full"}]]}',
    ],
)
def test_damaged_file(tmp_path, text):
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(CalibrationStateError, match="delete it"):
        CalibrationState.open(path, {})


def test_truncated_file(tmp_path):
    path = tmp_path / "state.json"
    CalibrationState(path, {"model": "a"}, list(ROWS)).save()
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CalibrationStateError, match="damaged"):
        CalibrationState.open(path, {"model": "a"})


def test_other_state_version(tmp_path):
    path = tmp_path / "state.json"
    CalibrationState(path, {}, []).save()
    path.write_text(json.dumps({**json.loads(path.read_text()), "state_version": 99}))
    with pytest.raises(CalibrationStateError, match="state version 99"):
        CalibrationState.open(path, {})


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be"):
        CalibrationState.open(tmp_path / "file" / "state.json", {})


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    state = CalibrationState.open(tmp_path / "state.json", {"model": "a"})
    state.rows += ROWS[:1]
    state.save()
    state.rows += ROWS[1:]

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("difa_compile.folders.os.replace", full)
    with pytest.raises(OutputError, match="No space left"):
        state.save()
    monkeypatch.undo()
    assert CalibrationState.open(state.path, {"model": "a"}).rows == ROWS[:1]
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_default_path_differs_with_the_calibration(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFA_CACHE_DIR", str(tmp_path))
    first, second = default_path({"model": "a"}), default_path({"model": "b"})
    assert first != second
    assert first.is_relative_to(tmp_path)
    assert first == default_path({"model": "a"})


def test_digest_goes_by_content():
    tensor = torch.arange(6.0).reshape(2, 3)
    assert digest_of({"a": 1, "b": tensor}) == digest_of({"b": tensor.clone(), "a": 1})
    different = [
        1, 1.0, "1", True, None, [1], [[1]], [1, 2], {"a": 1}, tensor, tensor.to(torch.float64), tensor.reshape(3, 2),
        tensor.to(torch.bfloat16), torch.tensor(3.0), torch.zeros(0), np.arange(3), np.arange(3.0), digest_of,
        torch.float16, torch.Generator().manual_seed(1), torch.Generator().manual_seed(2),
    ]  # fmt: skip
    assert len({digest_of(value) for value in different}) == len(different)
    with pytest.raises(CalibrationStateError, match=r"the value\['x'\]\[1\] is a object"):
        digest_of({"x": [1, object()]})


def test_digest_of_weights_sees_values_names_and_buffers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = weights_digest(model)
    assert before == weights_digest(model)
    model[1].running_mean += 1
    changed = weights_digest(model)
    assert changed != before
    with torch.no_grad():
        model[0].bias[2] += 1e-3
    assert weights_digest(model) != changed
    assert weights_digest(model.to(torch.bfloat16)) != changed


def test_generators_are_found_anywhere():
    one, two = torch.Generator(), torch.Generator()
    assert generators_in({"generator": [one, two], "n": 3}) == [one, two]
    assert generators_in({"generator": one}) == [one]
    assert generators_in("text") == []
