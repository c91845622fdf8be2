"""What tests of the command line share: a plan, a comparison, and stand-ins for the long work."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from difa_compile.report.stored import StoredComparison
from tests.support.commands import Loaded
from tests.support.report_sample import MACHINE, POINTS, make_comparison, make_plan
from tests.support.tables import made_table


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

    monkeypatch.setattr("difa_compile.pipeline.loading.load_pipeline", lambda name, dtype: Loaded())
    monkeypatch.setattr("difa_compile.calibration.calibrate.calibrate", calibrate)
    return seen


@pytest.fixture
def planning(monkeypatch, plan):
    """Replaces measuring and planning: the plan, and a front of three points. The dictionary it gives holds what was
    asked for; under ``raises`` what the measurement, or under ``stops`` what the trials, end with."""
    seen = {}

    def measured(pipe, inputs, steps, state):
        seen.update(inputs=inputs, steps=steps, state=state)
        if "raises" in seen:
            raise seen["raises"]
        state.write_text("{}")
        return made_table(5)

    @contextmanager
    def trials(pipe, inputs, steps, seeds, held_out, table, state):
        seen.update(seeds=seeds, held_out=held_out, trials=state)
        state.write_text("{}")
        yield None

    def held_to(table, limit, run, told):
        seen["limit"] = str(limit)
        if "stops" in seen:
            raise seen["stops"]
        told("tried [one]")
        return plan

    def measured_front(table, run, own, others, told):
        seen["others"] = dict(others)
        return POINTS

    monkeypatch.setattr("difa_compile.pipeline.loading.load_pipeline", lambda name, dtype: Loaded())
    monkeypatch.setattr("difa_compile.calibration.measure.measure", measured)
    monkeypatch.setattr("difa_compile.comparison.planned.trials", trials)
    monkeypatch.setattr("difa_compile.comparison.holding.held_to", held_to)
    monkeypatch.setattr("difa_compile.comparison.front.measured_front", measured_front)
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

    monkeypatch.setattr("difa_compile.pipeline.loading.load_pipeline", lambda name, dtype: Loaded())
    monkeypatch.setattr(difa_compile.comparison.compare, "compare", compare)
    return seen


@pytest.fixture
def kept(tmp_path):
    """A small comparison on disk, in the folder ``kept``."""
    plan = make_plan(4, 2)
    StoredComparison(plan, make_comparison(plan, images=10), "Kept", "difa", MACHINE, {}).save(tmp_path / "kept")
    return tmp_path / "kept"
