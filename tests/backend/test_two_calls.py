"""Guidance in two calls per step: which call is which is known, or sharing is left out, on record."""

from contextlib import nullcontext

import numpy as np
import pytest

from difa_compile.calibration.calibrate import calibrate
from difa_compile.decision import FULL, Decision
from difa_compile.errors import SiteSkippedError
from difa_compile.pipeline.apply import apply, remove
from difa_compile.pipeline.rules import plan_from_rule
from difa_compile.plan.guidance import Guidance
from tests.support.tiny_pipelines import NamedCalls, TwoCalls, sample, two_call_pipeline

D = Decision.parse
W, R = "window(band:3)", "window(band:3)+residual"
ROWS = (("full", "full"), ("full+cfg", f"{R}+cfg"), ("reuse", f"{W}+cfg"), (R, "full+cfg"))


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def order_is_known(monkeypatch):
    """All pipelines are taken for ones of diffusers that make the conditional call first."""
    monkeypatch.setattr(
        "difa_compile.plan.guidance.guidance_of", lambda pipe: Guidance("two-call", conditional_first=True)
    )


@pytest.fixture(autouse=True)
def _cache_context(monkeypatch):
    """The tiny transformer takes names, as those of pipelines with two calls do."""
    cls = type(two_call_pipeline().transformer)
    monkeypatch.setattr(cls, "cache_context", lambda self, name: nullcontext(), raising=False)


def plan_of(pipe, rows):
    return plan_from_rule(
        pipe,
        len(rows),
        lambda step, site: D(rows[step][int(site.path.split(".")[1])]),
        inputs={"class_labels": [1, 2]},
        guidance="two-call",
    )


def planned(cls, rows=ROWS, **options):
    """Images of a pipeline under a plan, and the records."""
    pipe = two_call_pipeline(cls)
    applied = apply(pipe, plan_of(pipe, rows), inner="eager", **options)
    return sample(pipe), applied.records


def skipped(records):
    return {record.decision: record.reason for record in records if record.outcome == "skipped"}


def test_calls_in_a_known_order_share_as_named_ones_do(order_is_known):
    named, records = planned(NamedCalls, strict=True)
    unnamed, its_records = planned(TwoCalls, strict=True)
    assert np.array_equal(unnamed, named)
    assert its_records == records
    assert not skipped(records)
    assert not np.allclose(named, planned(NamedCalls, [[t.replace("+cfg", "") for t in row] for row in ROWS])[0])


def test_calibration_shares_across_calls_in_a_known_order(order_is_known):
    settings = {"steps": 3, "threshold": 10.0, "candidates": ["full+cfg"], "progress": False, "inner": "eager"}
    plans = [calibrate(two_call_pipeline(cls), {"class_labels": [1, 2]}, **settings) for cls in (NamedCalls, TwoCalls)]
    assert plans[0].rows == plans[1].rows
    assert {str(decision) for row in plans[1].decisions[1:] for decision in row} == {"full+cfg"}


def test_calls_that_nothing_tells_apart_share_nothing_and_it_is_on_record():
    found, records = planned(TwoCalls)
    wanted, _ = planned(TwoCalls, [["full" if "+cfg" in text else text for text in row] for row in ROWS])
    assert np.array_equal(found, wanted)
    reasons = skipped(records)
    assert set(reasons) == {text for row in ROWS for text in row if "+cfg" in text}
    assert all("nothing says which of them is the conditional one" in reason for reason in reasons.values())
    assert {record.decision for record in records if record.outcome == "rewritten"} == {"reuse", R}


def test_they_are_refused_where_skips_are_errors():
    pipe = two_call_pipeline()
    plain = sample(pipe)
    apply(pipe, plan_of(pipe, ROWS), inner="eager", strict=True)
    for _ in range(2):
        with pytest.raises(SiteSkippedError, match=r"full\+cfg can't be carried out: the pipeline makes two calls"):
            sample(pipe)
    remove(pipe)
    assert np.array_equal(sample(pipe), plain)


def test_a_plan_that_shares_nothing_needs_no_names():
    rows = [[text.replace("+cfg", "") for text in row] for row in ROWS]
    found, records = planned(TwoCalls, rows, strict=True)
    assert np.array_equal(found, planned(NamedCalls, rows)[0])
    assert not skipped(records)


def test_names_that_a_pipeline_of_its_own_gives_are_enough():
    found, records = planned(NamedCalls, strict=True)
    assert not skipped(records)
    assert not np.array_equal(found, planned(NamedCalls, [["full", "full"]] * 4)[0])
    assert FULL in {D(record.decision) for record in records}


def test_what_a_pipeline_leaves_unshared_is_left_to_itself():
    """Two pipelines of equal transformers and plans: Dynamo would take the graph of the one for the other."""
    named, unnamed = two_call_pipeline(NamedCalls), two_call_pipeline(TwoCalls)
    plan = plan_of(named, ROWS)
    applied = apply(named, plan, inner="eager")
    before = sample(named)
    apply(unnamed, plan, inner="eager")
    other = sample(unnamed)
    assert not np.array_equal(other, before)
    assert np.array_equal(sample(named), before)
    assert not skipped(applied.records)
