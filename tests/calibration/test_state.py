"""The saved state of a calibration: what it belongs to, what damages it, and that it is written whole."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from difa_compile.calibration.state import (
    CalibrationState,
    default_path,
    digest_of,
    generators_in,
    weights_digest,
)
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import CalibrationStateError, OutputError
from difa_compile.plan.plan import Cell, Trial

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

    monkeypatch.setattr("difa_compile.files.writing.os.replace", full)
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


def test_nothing_is_written_before_the_first_row(tmp_path):
    """A calibration that ends before it (a mistyped argument) leaves nothing that refuses the next one."""
    path = tmp_path / "state.json"
    CalibrationState.open(path, {"model": "a"})
    assert list(tmp_path.iterdir()) == []
    state = CalibrationState.open(path, {"model": "b"})
    state.rows += ROWS[:1]
    state.save()
    assert CalibrationState.open(path, {"model": "b"}).rows == ROWS[:1]


def test_a_state_without_rows_refuses_nobody(tmp_path):
    path = tmp_path / "state.json"
    CalibrationState(path, {"model": "a"}, []).save()
    state = CalibrationState.open(path, {"model": "b"})
    state.rows += ROWS
    state.save()
    assert CalibrationState.open(path, {"model": "b"}).rows == ROWS


def test_opening_leaves_the_file_as_it_is(tmp_path):
    path = tmp_path / "state.json"
    CalibrationState(path, {"model": "a"}, list(ROWS)).save()
    before = path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns
    CalibrationState.open(path, {"model": "a"})
    assert (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"reuse", "loss": 0.0125', '"reuse", "loss": 0.0124'),
        ('"decision": "reuse"', '"decision": "full"'),
        ('"model": "a"', '"model": "b"'),
        ("masked", "masket"),
        ('"flops_saved": 1.0', '"flops_saved": 0.9'),
    ],
)
def test_an_edited_state_is_refused(tmp_path, old, new):
    path = tmp_path / "state.json"
    CalibrationState(path, {"model": "a"}, list(ROWS)).save()
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(CalibrationStateError, match=r"changed after it was written.*delete it"):
        CalibrationState.open(path, {"model": "a"})


def test_equal_calibrations_share_a_file_which_holds_the_longer_one(tmp_path):
    path = tmp_path / "state.json"
    first, second = (CalibrationState.open(path, {"model": "a"}) for _ in range(2))
    first.rows += ROWS
    first.save()
    second.rows += ROWS[:1]
    second.save()
    assert CalibrationState.open(path, {"model": "a"}).rows == ROWS
    second.rows += [*ROWS[1:], *ROWS[1:]]
    second.save()
    assert len(CalibrationState.open(path, {"model": "a"}).rows) == 3
    first.remove()  # the other is still at work, and has come further
    assert path.exists()
    second.remove()
    assert not path.exists()
    second.remove()


def test_another_calibration_does_not_write_over_the_rows_of_the_first(tmp_path):
    path = tmp_path / "state.json"
    first, second = (CalibrationState.open(path, {"model": name}) for name in "ab")
    first.rows += ROWS[:1]
    first.save()
    second.rows += ROWS
    with pytest.raises(CalibrationStateError, match="belongs to another calibration: model differ"):
        second.save()
    second.remove()
    assert CalibrationState.open(path, {"model": "a"}).rows == ROWS[:1]
    first.remove()
    second.save()
    assert CalibrationState.open(path, {"model": "b"}).rows == ROWS


def test_a_state_that_cannot_be_deleted_does_not_cost_the_plan(tmp_path, monkeypatch):
    state = CalibrationState(tmp_path / "state.json", {}, list(ROWS))
    state.save()

    def refused(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(state.path), "unlink", refused)
    with pytest.warns(UserWarning, match=r"state\.json is done with but cannot be deleted"):
        state.remove()


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_state(tmp_path):
    """A process that saves states of one to many rows without end is killed, at once or in the middle."""
    path = tmp_path / "state.json"
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.calibration.test_state import ROWS, CalibrationState\n"
        f"state = CalibrationState(Path({str(path)!r}), {{}}, list(ROWS))\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    state.rows += ROWS[1:] * 20\n"
        "    state.save()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        while not path.exists():
            assert process.poll() is None
        for _ in range(20):
            rows = CalibrationState.open(path, {}).rows
            assert len(rows) % 20 == 2
        process.kill()
    rows = CalibrationState.open(path, {}).rows
    assert len(rows) % 20 == 2
    assert len(list(tmp_path.iterdir())) <= 2  # at most what was being written
