"""``difa demo``: search, comparison and page in one go; the long work is replaced."""

from __future__ import annotations

import importlib
import importlib.util
import re

import pytest

from difa_compile.cli.demo import require
from difa_compile.errors import MissingDependencyError
from difa_compile.plan.plan import Plan
from tests.support.commands import fails, run


def test_demo_goes_all_the_way(search, measure, plan, tmp_path):
    result = run("demo", "--output", tmp_path / "out", "--quick", "--samples", 20)
    assert result.exit_code == 0, result.output
    assert (search["steps"], search["threshold"]) == (20, 0.1)
    assert search["state"] == tmp_path / "out" / "calibration.json"
    assert len(measure["seeds"]) == 2
    assert measure["reference"].shape == (20, 1, 32, 32)
    assert measure["reference"].min() >= 0
    assert Plan.load(tmp_path / "out" / "plan.json") == plan
    page = tmp_path / "out" / "index.html"
    assert "digit 9" in page.read_text()
    assert page.resolve().as_uri() in result.stdout
    assert re.search(r"1 of 3.*2 of 3.*3 of 3.*1\.54×", result.stdout, re.DOTALL)


def test_demo_interrupted_in_each_part(search, measure, plan, tmp_path):
    output = tmp_path / "out"
    search["raises"] = KeyboardInterrupt()
    assert "Nothing was measured yet" in fails("demo", "--output", output, code=130)
    assert list(output.iterdir()) == []
    del search["raises"]
    measure["raises"] = KeyboardInterrupt()
    message = fails("demo", "--output", output, code=130)
    assert f"difa demo --plan {output / 'plan.json'} goes on from there" in message
    del measure["raises"]
    search.clear()
    assert run("demo", "--output", output, "--plan", output / "plan.json").exit_code == 0
    assert search == {}


def test_demo_into_a_folder_that_cannot_be_written(search):
    assert fails("demo", "--output", "/proc/difa").startswith("output error")
    assert search == {}


def test_demo_without_scikit_learn_says_what_is_left_out(search, measure, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else real(name))
    result = run("demo", "--output", tmp_path / "out")
    assert "no Fréchet distance to real digits" in result.stdout
    assert "difa-compile[train]" in result.stdout
    assert measure["reference"] is None


def test_missing_packages_name_their_extras(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingDependencyError, match=r'Pillow is not installed; run: pip install "difa-compile\[report\]"'
    ):
        require("PIL")
    with pytest.raises(MissingDependencyError, match=r"diffusers and jinja2 are .*\[diffusers,report\]"):
        require("diffusers", "jinja2")
