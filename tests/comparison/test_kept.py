"""Trials that are kept: none is run twice, in one process or the next, and none serves what it does not belong to."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from difa_compile.comparison.kept import (
    ROUNDS,
    TRIALS,
    Held,
    KeptTrials,
    as_stored,
    delete_kept,
    digest_of_table,
    identity_of_trials,
    read_trials,
    trials_file,
)
from difa_compile.errors import CalibrationStateError, OutputError
from difa_compile.planner.make import Limit, plan_from_table
from difa_compile.planner.table import ErrorTable
from tests.support.tables import made_table
from tests.support.tiny_pipelines import tiny_pipeline

IDENTITY = {"inputs": "a", "machine": "one"}


class Runs:
    """Counts what is run; every plan is a little better than the one before."""

    def __init__(self):
        self.judged = self.ran = 0

    def judge(self, plan):
        self.judged += 1
        return 40.0 + self.judged

    def run(self, plan, rounds=3):
        self.ran += 1
        return Held(0.5, math.inf, 30.0 + self.ran)


@pytest.fixture(scope="module")
def plans():
    table = made_table(6)
    return [plan_from_table(table, budget=budget) for budget in (0.5, 0.7)]


def test_nothing_is_run_twice(tmp_path, plans):
    first, second = plans
    runs = Runs()
    trials = KeptTrials.open(runs, tmp_path / "trials", IDENTITY)
    assert not (tmp_path / "trials").exists()
    found = [trials.run(first, 1), trials.run(second), trials.run(first), trials.judge(first), trials.judge(second)]
    assert found[:3] == [Held(0.5, math.inf, 31.0), Held(0.5, math.inf, 32.0), Held(0.5, math.inf, 33.0)]
    assert found[3:] == [41.0, 42.0]
    for again in (trials, KeptTrials.open(runs, tmp_path / "trials", dict(reversed(IDENTITY.items())))):
        assert [again.run(first), again.run(second), again.run(second, 1)] == [found[2], found[1], found[1]]
        assert again.run(first, 1) == found[2], "what was timed more often serves as well"
        assert [again.judge(first), again.judge(second)] == found[3:]
    assert (runs.ran, runs.judged) == (3, 2)


def test_plans_are_known_by_what_they_do(tmp_path, plans):
    """What is promised of a plan, for which limit, makes no other trial."""
    runs = Runs()
    trials = KeptTrials.open(runs, tmp_path / "trials", IDENTITY)
    plan = plans[0]
    trials.run(plan)
    promise = replace(plan.settings.promise, limit="another", note="something")
    trials.run(replace(plan, settings=replace(plan.settings, promise=promise)))
    assert runs.ran == 1


def test_each_result_is_on_the_disk_before_the_next_plan_is_run(tmp_path, plans):
    runs = Runs()
    trials = KeptTrials.open(runs, tmp_path / "trials", IDENTITY)
    trials.run(plans[0])

    def stopped(plan, rounds):
        raise KeyboardInterrupt

    runs.run = stopped
    with pytest.raises(KeyboardInterrupt):
        trials.run(plans[1])
    identity, tried = read_trials(tmp_path / "trials")
    assert identity == IDENTITY
    assert list(tried.values()) == [(0.5, math.inf, 31.0)]


@pytest.mark.parametrize(
    "identity",
    [{**IDENTITY, "machine": "other"}, {"inputs": "a"}, {**IDENTITY, "more": "b"}],
    ids=["other", "less", "more"],
)
def test_trials_of_another_search_are_refused_and_left_alone(identity, tmp_path, plans):
    path = tmp_path / "trials"
    KeptTrials.open(Runs(), path, IDENTITY).judge(plans[0])
    before = path.read_bytes()
    with pytest.raises(CalibrationStateError, match=r"is of others: (machine|more) differ; delete it"):
        KeptTrials.open(Runs(), path, identity)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "results",
    [{"x 3": [0.5, 40]}, {"x 0": []}, {"x 0": [1, 2, 3]}, {"x 3": [None, 40, 40]}, {"x 0": [-1]}, {"x 0": ["a"]}, []],
    ids=str,
)
def test_results_that_are_none(results, tmp_path):
    (tmp_path / "trials").write_text(json.dumps(TRIALS.frame({"identity": IDENTITY, "tried": results})))
    with pytest.raises(CalibrationStateError, match="delete it to run the plans again"):
        KeptTrials.open(Runs(), tmp_path / "trials", IDENTITY)


def test_an_edited_record_is_refused(tmp_path, plans):
    path = tmp_path / "trials"
    KeptTrials.open(Runs(), path, IDENTITY).judge(plans[0])
    path.write_text(path.read_text().replace("41.0", "91.0"))
    with pytest.raises(CalibrationStateError, match="was changed after it was written"):
        KeptTrials.open(Runs(), path, IDENTITY)


def test_a_place_that_cannot_be_written_shows_before_anything_is_run(tmp_path):
    with pytest.raises(OutputError, match="the record of trials cannot be written"):
        KeptTrials.open(Runs(), tmp_path / ("a" * 300), IDENTITY)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="a folder stands there"):
        KeptTrials.open(Runs(), tmp_path / "folder", IDENTITY)


def test_it_stands_beside_the_state(tmp_path):
    assert trials_file(tmp_path / "plan.json.state") == tmp_path / "plan.json.state.trials"
    assert trials_file(Path("/")) == Path("/.trials")


def test_what_is_done_with_is_deleted_or_told(tmp_path):
    (tmp_path / "state").write_text("{}")
    (tmp_path / "folder").mkdir()
    with pytest.warns(UserWarning, match="folder.* is done with but cannot be deleted"):
        delete_kept(tmp_path / "folder", tmp_path / "state", tmp_path / "none")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_table_and_its_file_make_the_same_plans(tmp_path):
    table = made_table(8)
    table.save(tmp_path / "errors.json")
    loaded = ErrorTable.load(tmp_path / "errors.json")
    assert digest_of_table(table) == digest_of_table(loaded) == digest_of_table(as_stored(table))
    assert (table.units[0].drift != loaded.units[0].drift).any()
    stored = as_stored(table)
    for own, other in zip(stored.units, loaded.units, strict=True):
        assert (own.drift == other.drift).all()
        assert (own.spread == other.spread).all()
        assert all((values == other.computed[decision]).all() for decision, values in own.computed.items())
    problems = stored.problem(), loaded.problem()
    assert (problems[0].units[0].effects.drift == problems[1].units[0].effects.drift).all()


def test_tables_have_digests_of_their_own():
    table = made_table(6)
    others = [
        made_table(5),
        replace(table, seconds={**table.seconds, "full": 1.5}),
        replace(table, calls=2),
        replace(table, units=table.units[:1]),
        replace(table, units=(replace(table.units[0], drift=table.units[0].drift * 1.01), table.units[1])),
    ]
    assert len({digest_of_table(each) for each in [table, *others]}) == 6


def test_what_trials_depend_on():
    table, pipe = made_table(6), tiny_pipeline()
    given = (pipe, {"class_labels": [1]}, 6, (0, 1), (2,), table)

    def differing(**changes):
        names = ("pipe", "inputs", "steps", "seeds", "held_out", "table")
        one, other = identity_of_trials(*given), identity_of_trials(**dict(zip(names, given, strict=True)) | changes)
        return {name for name in one if one[name] != other[name]}

    assert differing() == set()
    assert differing(inputs={"class_labels": [2]}) == {"inputs"}
    assert differing(steps=7) == {"settings"}
    assert differing(seeds=(0, 3)) == differing(held_out=(3,)) == {"settings"}
    assert differing(table=made_table(5)) == {"table of errors"}
    threads = torch.get_num_threads()
    before = identity_of_trials(*given)
    torch.set_num_threads(threads + 1)
    try:
        assert {name for name, value in identity_of_trials(*given).items() if before[name] != value} == {"machine"}
    finally:
        torch.set_num_threads(threads)
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(1.0)
    assert {name for name, value in identity_of_trials(*given).items() if before[name] != value} == {"weights"}


def test_an_interrupted_search_goes_on_where_it_was(tmp_path):
    """The whole way: the plans of the second search are those of the first, so it runs what is left of them."""
    from difa_compile.comparison.holding import held_to

    table = replace(made_table(16), units=made_table(16).units[:1])
    ran = []

    class Stops:
        left = 3

        def judge(self, plan):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            ran.append((plan.decisions, str(plan.fitted)))
            return 39.0 + len(ran)

        def run(self, plan, rounds=ROUNDS):
            if rounds == ROUNDS:  # more of them are of a plan that was run
                self.left -= 1
                ran.append((plan.decisions, str(plan.fitted)))
            return Held(0.5, 40.0, 39.0)

    stops = Stops()
    with pytest.raises(KeyboardInterrupt):
        held_to(table, Limit(0.5), KeptTrials.open(stops, tmp_path / "trials", IDENTITY), 6)
    stops.left = 100
    plan = held_to(table, Limit(0.5), KeptTrials.open(stops, tmp_path / "trials", IDENTITY), 6)
    whole = held_to(table, Limit(0.5), KeptTrials.open(stops, tmp_path / "trials", IDENTITY), 6)
    assert whole == plan
    assert len(ran) == 6
    assert len(set(ran)) == 5, "the closest of those judged was timed"
