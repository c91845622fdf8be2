"""``difa tune``, and measuring what a calibration needs to know; the measurement is replaced."""

from __future__ import annotations

import importlib
import importlib.util
import re

import pytest
import torch
from rich.console import Console

from difa_compile.cli.tune import measure_if_unknown
from difa_compile.machine.profile import current
from tests.support.commands import fails, run
from tests.support.profiles import made_up


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Measuring is replaced by a made-up profile; the dtypes asked for so far."""
    asked = []

    def made(device, dtypes, *, quick=False, progress):
        progress(1, 1)
        asked.append((str(device), [str(dtype) for dtype in dtypes], quick))
        return made_up()

    monkeypatch.setattr(importlib.import_module("difa_compile.cli.tune"), "tune", made)
    monkeypatch.setenv("DIFA_PROFILE", str(tmp_path / "profile.json"))
    return asked


def test_tune_measures_keeps_and_shows(tuned, tmp_path):
    result = run("tune", "--device", "cpu", "--quick")
    assert result.exit_code == 0, result.output
    assert tuned == [("cpu", ["torch.float32", "torch.bfloat16"], True)]
    assert current("cpu") == made_up()
    assert re.search(r"local CPU +float32 +1 .*0\.0 %", result.stdout)
    assert str(tmp_path / "profile.json") in result.stdout


def test_tune_says_what_it_cannot_do(tuned, monkeypatch):
    assert "is no dtype of attention; choose from float32, bfloat16" in run("tune", "--dtype", "float33").output
    monkeypatch.setenv("DIFA_PROFILE", "off")
    assert "DIFA_PROFILE is off" in fails("tune")
    assert tuned == []


def test_a_profile_is_measured_once_before_calibrating(tuned):
    console = Console(quiet=True)
    for _ in range(2):
        measure_if_unknown(console, torch.nn.Linear(2, 2))
    assert tuned == [("cpu", ["torch.float32"], False)]
    measure_if_unknown(console, torch.nn.Linear(2, 2).half())
    assert tuned[1:] == [("cpu", ["torch.float16"], False)]


def test_without_profiles_nothing_is_measured(tuned, monkeypatch):
    measure_if_unknown(Console(quiet=True), torch.nn.Linear(2, 2, device="meta"))
    monkeypatch.setenv("DIFA_PROFILE", "off")
    measure_if_unknown(Console(quiet=True), torch.nn.Linear(2, 2))
    assert tuned == []


def test_what_stops_a_measurement_does_not_stop_the_calibration(tuned, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFA_PROFILE", str(tmp_path / "file" / "profile.json"))
    measure_if_unknown(Console(width=400), torch.nn.Linear(2, 2))
    assert "going on without predicted times: the profile cannot be written to" in capsys.readouterr().out
