"""``difa demo``: search, comparison and page in one go; the long work is replaced."""

from __future__ import annotations

import importlib
import importlib.util
import re

import pytest

from difa_compile.cli.demo import require
from difa_compile.errors import MissingDependencyError
from difa_compile.plan.plan import Plan
from difa_compile.report.stored import StoredComparison
from tests.support.commands import fails, run
from tests.support.report_sample import POINTS


def test_demo_goes_all_the_way(planning, search, measure, plan, tmp_path):
    result = run("demo", "--output", tmp_path / "out", "--samples", 20, "--budget", 0.4, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert (planning["steps"], planning["limit"]) == (50, "budget 0.4")
    assert (planning["seeds"], planning["held_out"]) == ((3, 4), (5,))
    assert planning["trials"] == tmp_path / "out" / "trying-50-steps-seed-3.json"
    assert planning["others"] == {"DiTFastAttn": plan}
    assert (search["rank"], search["loss"], search["steps"]) == ("published", "code", 50)
    assert len(measure["seeds"]) == 2
    assert measure["reference"].shape == (20, 1, 32, 32)
    assert measure["reference"].min() >= 0
    assert Plan.load(tmp_path / "out" / "plan.json") == plan
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "comparison.json",
        "errors.json",
        "images.npz",
        "index.html",
        "plan.json",
    ]
    page = tmp_path / "out" / "index.html"
    assert "digit 9" in page.read_text()
    assert "What a budget buys" in page.read_text()
    assert StoredComparison.load(tmp_path / "out").front == POINTS
    assert page.resolve().as_uri() in result.stdout
    assert re.search(r"1 of 4.*2 of 4.*tried \[one\].*3 of 4.*4 of 4.*1\.54×", result.stdout, re.DOTALL)


def test_demo_for_a_first_look_leaves_the_search_out(planning, search, measure, tmp_path):
    assert run("demo", "--output", tmp_path / "out", "--quick").exit_code == 0
    assert (planning["steps"], planning["others"]) == (20, {})
    assert search == {}


def test_demo_interrupted_in_each_part(planning, search, measure, plan, tmp_path):
    output = tmp_path / "out"
    planning["raises"] = KeyboardInterrupt()
    assert "Nothing was measured yet" in fails("demo", "--output", output, code=130)
    assert list(output.iterdir()) == []
    del planning["raises"]
    search["raises"] = KeyboardInterrupt()
    assert f"What was measured is in {output / 'measuring-50-steps-seed-0.json'}" in fails(
        "demo", "--output", output, code=130
    )
    del search["raises"]
    planning["stops"] = KeyboardInterrupt()
    message = fails("demo", "--output", output, "--quick", code=130)
    assert f"What was measured is in {output / 'measuring-20-steps-seed-0.json'}; the same command goes on" in message
    assert (output / "trying-20-steps-seed-0.json").is_file()
    del planning["stops"]
    measure["raises"] = KeyboardInterrupt()
    message = fails("demo", "--output", output, "--quick", code=130)
    assert f"difa demo --plan {output / 'plan.json'} goes on from there" in message
    del measure["raises"]
    planning.clear()
    result = run("demo", "--output", output, "--plan", output / "plan.json")
    assert result.exit_code == 0
    assert (output / "measuring-50-steps-seed-0.json").is_file()  # of the call before --quick
    assert planning == {}
    assert "1 of 2" in result.stdout


def test_demo_into_a_folder_that_cannot_be_written(planning):
    assert fails("demo", "--output", "/proc/difa").startswith("output error")
    assert planning == {}


def test_demo_without_scikit_learn_says_what_is_left_out(planning, measure, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else real(name))
    result = run("demo", "--output", tmp_path / "out", "--quick")
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
