"""What tests of the command line share: a plan, a comparison, and stand-ins for the long work."""

from __future__ import annotations

import pytest

from difa_compile.report.stored import StoredComparison
from tests.support.commands import Loaded
from tests.support.report_sample import MACHINE, make_comparison, make_plan


@pytest.fixture(scope="module")
def plan():
    return make_plan(10, 6)


@pytest.fixture
def plan_file(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.fixture
def folder(plan, tmp_path):
    stored = StoredComparison(plan, make_comparison(plan, images=10), "Kept", "difa demo", MACHINE, {"torch": "2"})
    stored.save(tmp_path / "kept")
    return tmp_path / "kept"


@pytest.fixture
def search(monkeypatch, plan):
    """Replaces the search by one that returns a plan; the dictionary it gives holds the arguments."""
    seen = {}

    def calibrate(pipe, inputs, **options):
        seen.update(options, inputs=inputs)
        if isinstance(seen.get("raises"), BaseException):
            raise seen["raises"]
        return plan

    monkeypatch.setattr("difa_compile.pipeline.loading.load_pipeline", lambda name: Loaded())
    monkeypatch.setattr("difa_compile.calibration.calibrate.calibrate", calibrate)
    return seen


@pytest.fixture
def measure(monkeypatch, plan):
    """Replaces the measurement by the sample comparison; the dictionary it gives holds the arguments."""
    seen = {}

    def compare(pipe, chosen, inputs, **options):
        seen.update(options, plan=chosen, inputs=inputs)
        if isinstance(seen.get("raises"), BaseException):
            raise seen["raises"]
        return make_comparison(chosen, images=10 * len(options["seeds"]))

    import difa_compile.comparison.compare

    monkeypatch.setattr("difa_compile.pipeline.loading.load_pipeline", lambda name: Loaded())
    monkeypatch.setattr(difa_compile.comparison.compare, "compare", compare)
    return seen


@pytest.fixture
def kept(tmp_path):
    """A small comparison on disk, in the folder ``kept``."""
    plan = make_plan(4, 2)
    StoredComparison(plan, make_comparison(plan, images=10), "Kept", "difa", MACHINE, {}).save(tmp_path / "kept")
    return tmp_path / "kept"
