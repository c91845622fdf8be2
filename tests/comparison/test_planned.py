"""Plans held to their word: what a run makes of a promise, when another plan is tried, and what is left behind."""

import functools
import math
import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers import DiTPipeline

from difa_compile.comparison import planned
from difa_compile.comparison.kept import ROUNDS, Held
from difa_compile.comparison.planned import AGAIN, RUNS, TRIES, Trials, plan_within, psnr_of
from difa_compile.decision import Kind
from difa_compile.errors import BudgetError, ErrorTableError, ScheduleError
from difa_compile.pipeline.apply import apply_for_trials
from difa_compile.planner.make import Limit, plan_from_table
from tests.support.tables import made_table, measured_unit
from tests.support.tiny_pipelines import tiny_pipeline


@pytest.fixture
def runs(monkeypatch):
    """Stands in for running plans: gives what is in ``held``, in turn, the last again and again; notes the rest.

    A plan that is timed again shows the same, or ``later``.
    ``judged``: PSNR of plans that are not timed, in turn; worse than any when there are no more.
    """
    seen = {
        "held": [], "plans": [], "seeds": None, "judged": [], "others": [], "checked": [], "state": None,
        "again": [], "later": None,
    }  # fmt: skip

    class Fake:
        def run(self, plan, rounds=ROUNDS):
            if rounds == ROUNDS:
                seen["plans"].append(plan)
                found = seen["held"].pop(0) if len(seen["held"]) > 1 else seen["held"][0]
                seen["last"] = found(plan) if callable(found) else found
            else:
                seen["again"].append((plan, rounds))
            return seen["later"] if seen["later"] and rounds > ROUNDS else seen["last"]

        def judge(self, plan):
            seen["others"].append(plan)
            return seen["judged"].pop(0) if seen["judged"] else 0.0

    @contextmanager
    def trials(pipe, inputs, steps, seeds, held_out, table, state):
        seen.update(seeds=(tuple(seeds), tuple(held_out)), state=state)
        yield Fake()

    monkeypatch.setattr(planned, "trials", trials)
    monkeypatch.setattr(planned, "check_table", lambda *given: seen["checked"].append(given))
    return seen


def within(limit, steps=6, runs=TRIES, **options):
    return plan_within(object(), {}, limit, steps, **{"table": made_table(steps), "runs": runs, **options})


def test_the_promise_says_what_was_measured(runs):
    runs["held"] = [Held(0.49, 41.0, 39.5)]
    told = []
    plan = within(Limit(0.5), seeds=(3, 6), held_out=(4, 5), told=told.append, runs=1)
    promise = plan.settings.promise
    assert (promise.measured_share, promise.measured_psnr, promise.held_out_psnr) == (0.49, 41.0, 39.5)
    assert promise.limit == "budget 0.5"
    assert promise.predicted_share <= 0.5
    assert promise.note == ""
    assert runs["seeds"] == ((3, 6), (4, 5))
    assert len(runs["plans"]) == 1
    assert told == [str(promise)]


def test_what_is_over_the_budget_is_tried_with_less_and_said(runs):
    runs["held"] = [Held(0.9, 41.0, 39.5)]
    plan = within(Limit(0.8))
    assert 1 < len(runs["plans"]) <= TRIES
    shares = [each.settings.promise.predicted_share for each in runs["plans"]]
    assert shares[1] < shares[0]
    assert plan.settings.promise.note == (
        f"over the budget by 12 %; the limit is relaxed to 0.90 of the time: none of {len(shares)} plans that were run "
        "takes less"
    )
    assert plan.settings.promise.limit == "budget 0.8"


def test_what_a_plan_gives_up_for_the_budget_is_said(runs):
    runs["held"] = [Held(0.95, 44.0, 43.0), Held(0.78, 41.5, 41.0)]
    told = []
    plan = within(Limit(0.8), told=told.append)
    assert plan.settings.promise.note == (
        "the first choice took 0.95 of the time, at 44.0 dB; given up for the budget: 2.5 dB"
    )
    assert told == [told[0], str(plan.settings.promise)]
    assert "over the budget by 19 %" in told[0]
    runs["held"] = [Held(0.95, 41.0, 41.0), Held(0.78, 41.5, 41.0)]
    assert within(Limit(0.8)).settings.promise.note == "the first choice took 0.95 of the time"
    runs["held"] = [Held(1.2, math.inf, math.inf), Held(0.78, 41.5, 41.0)]
    assert within(Limit(0.8)).settings.promise.note == "the first choice took 1.20 of the time, at the same images"


def test_a_time_that_was_not_expected_is_measured_again(runs):
    runs["held"] = [Held(0.9, 41.0, 39.5)]
    runs["later"] = Held(0.79, 41.0, 39.5)
    plan = within(Limit(0.8))
    assert plan.settings.promise.measured_share == 0.79
    assert [rounds for _, rounds in runs["again"]] == [AGAIN]
    assert len(runs["plans"]) == 1
    expected = plan.settings.promise.predicted_share
    runs.update(held=[Held(expected * 1.04, 41.0, 39.5)], again=[])
    within(Limit(0.8), runs=1)
    assert not runs["again"]


def test_times_that_all_differ_from_the_prediction_are_expected(runs):
    runs["held"] = [lambda plan: Held(1.3 * plan.settings.promise.predicted_share, 41.0, 39.5)]
    within(Limit(0.8))
    assert len(runs["plans"]) > 1
    assert len(runs["again"]) == 1


def test_a_time_within_what_timings_differ_by_is_said(runs):
    runs["held"] = [Held(0.82, 41.0, 41.0)]
    note = "over the budget by 2 %, which is within what timings differ by"
    assert within(Limit(0.8), runs=1).settings.promise.note == note
    runs["held"] = [Held(0.803, 41.0, 41.0)]
    assert within(Limit(0.8), runs=1).settings.promise.note == ""


def test_of_one_plan_nothing_else_is_said_but_that(runs):
    runs["held"] = [Held(0.9, 41.0, 39.5)]
    note = "over the budget by 12 %; the limit is relaxed to 0.90 of the time: no other plan was run"
    assert within(Limit(0.8), runs=1).settings.promise.note == note


def test_the_first_plan_stays_where_less_time_is_not_possible(runs):
    least = 0.45
    runs["held"] = [Held(0.9, 41.0, 39.5)]
    plan = within(Limit(least))
    assert plan.settings.promise.note == (
        "over the budget by 100 %; the limit is relaxed to 0.90 of the time: no other plan was run, and the table has "
        "none that would take little enough"
    )


def test_a_budget_that_is_not_possible_at_all(runs):
    with pytest.raises(BudgetError, match="the least is"):
        within(Limit(0.05))
    assert runs["plans"] == []


def test_the_best_that_keeps_to_the_limit_is_taken(runs):
    runs["held"] = [Held(0.6, 30.0, 30.0), Held(0.78, 44.0, 44.0)]
    plan = within(Limit(0.8))
    assert plan.settings.promise.measured_psnr == 44.0
    assert len(runs["plans"]) == 2


def test_a_quality_is_rescaled_to_what_was_measured(runs):
    runs["held"] = [Held(0.5, 30.0, 30.0), Held(0.8, 40.5, 40.0)]
    plan = within(Limit(psnr=40.0))
    first, second = runs["plans"]
    assert second.settings.promise.predicted_share > first.settings.promise.predicted_share
    assert plan.settings.promise.measured_psnr == 40.5
    assert plan.settings.promise.note == (
        "the first choice came to 30.0 dB, at 0.50 of the time; given up for the quality: 0.30 of it"
    )


def test_what_is_below_the_quality_is_said(runs):
    runs["held"] = [Held(0.5, 37.5, 37.0)]
    note = within(Limit(psnr=40.0)).settings.promise.note
    first, _, second = note.partition("; ")
    assert first == "2.5 dB below what was asked for"
    assert second == f"the limit is relaxed to 37.5 dB: none of {len(runs['plans'])} plans that were run comes closer"
    assert len(runs["plans"]) > 1


def test_images_that_are_nothing_are_said(runs):
    runs["held"] = [Held(0.4, 0.0, 0.0)]
    assert "hold NaN or infinity" in within(Limit(0.8), runs=1).settings.promise.note


def test_the_same_images_end_the_search(runs):
    runs["held"] = [Held(1.0, math.inf, math.inf)]
    plan = within(Limit(psnr=40.0))
    assert len(runs["plans"]) == 1
    assert (plan.settings.promise.measured_psnr, plan.settings.promise.held_out_psnr) == (None, None)


def test_psnr_is_of_the_pairs_that_differ():
    full = torch.zeros(2, 1, 4, 4)
    assert psnr_of([(full, full)]) == math.inf
    other = full.clone()
    other[0] += 0.1
    assert psnr_of([(full, full), (full, other)]) == pytest.approx(20.0, abs=1e-3)


def single(steps=16):
    """A table of blocks alone, whose steps may be moved."""
    table = made_table(steps)
    return replace(table, units=table.units[:1])


def same_images(plan):
    """What plans that make the same images have in common."""
    return plan.decisions, tuple(plan.fitted.items())


@pytest.mark.parametrize("fits", [False, True])
def test_weights_are_fitted_where_that_comes_closer(runs, fits, monkeypatch):
    """A plan with fitted weights is kept, and so are those of its neighbours, where it is closer, and only there."""
    runs["held"] = [Held(0.5, 40.0, 39.0), Held(0.5, 43.0, 42.0)]

    class Gains(list):
        def pop(self, _):
            return 41.0 + 0.01 * len(runs["others"]) if bool(runs["others"][-1].fitted) == fits else 39.0

    runs["judged"] = Gains([0])
    plan = within(Limit(0.5), 16, runs=14, table=single())
    assert any(each.fitted for each in runs["others"])
    assert not all(each.fitted for each in runs["others"])
    assert bool(plan.fitted) == fits
    assert bool(runs["others"][-1].fitted) == fits, "a neighbour"
    assert plan.settings.promise.measured_psnr == 43.0
    if fits:
        assert all(sum(weights) == pytest.approx(1) for _, weights in plan.fitted.values())


@pytest.mark.parametrize("most", [3, 4])
def test_fitted_weights_take_no_more_rows_than_there_may_be(runs, most):
    """Forecasts are raised to order 2 where a row for them is left, and fitted as they are where none is."""
    runs["held"] = [Held(0.5, 40.0, 39.0)]
    runs["judged"] = [45.0] * 20
    table = replace(made_table(16), units=(measured_unit("blocks", [2], None, tuple(range(1, 9)), 16),))
    plan = within(Limit(0.5, max_rows=most), 16, runs=9, table=table)
    fitted = [each for each in runs["others"] if each.fitted]
    assert fitted
    orders = {cell.decision.order for each in fitted for row in each.rows for cell in row}
    assert (2 in orders) == (most > 3)
    for each in (plan, *runs["others"]):
        assert len(set(each.decisions)) <= most


def test_for_a_quality_fitted_weights_are_tried(runs):
    runs["held"] = [Held(0.5, 50.5, 50.0), Held(0.4, 50.2, 50.0)]

    class Gains(list):
        def pop(self, _):
            return 60.0 if runs["others"][-1].fitted else 40.0

    runs["judged"] = Gains([0])
    plan = within(Limit(psnr=50.0), 16, runs=9, table=single())
    assert plan.fitted
    assert plan.settings.promise.measured_share == 0.4
    assert plan.settings.promise.predicted_psnr == pytest.approx(50.0, abs=1.5), "by what fitted ones were measured at"


def test_a_quicker_plan_that_misses_the_quality_is_tried_again_with_more_time(runs):
    runs["held"] = [Held(0.5, 50.5, 50.0), Held(0.3, 44.0, 44.0), Held(0.42, 50.2, 50.0)]
    runs["judged"] = [58.0]
    plan = within(Limit(psnr=50.0), 16, runs=9, table=single())
    shares = [each.settings.promise.predicted_share for each in runs["plans"]]
    assert len(shares) == 3
    assert shares[1] < shares[2] < shares[0]
    assert plan.settings.promise.measured_share == 0.42


def test_other_plans_of_the_same_time_are_tried_and_the_closest_kept(runs):
    runs["held"] = [Held(0.5, 40.0, 39.0), Held(0.5, 43.0, 42.0)]
    runs["judged"] = [39.0, 42.0, 41.0, 43.0]
    told = []
    plan = within(Limit(0.5), 16, runs=9, table=single(), told=told.append)
    assert plan.settings.promise.measured_psnr == 43.0
    assert plan.settings.promise.held_out_psnr == 42.0
    assert plan.decisions == runs["others"][3].decisions
    assert len(runs["others"]) == 7
    assert len({same_images(each) for each in runs["others"]}) == 7
    assert len(runs["plans"]) + len(runs["others"]) == 9
    assert "42.0 dB" in told[2]
    assert "not the 42.0 so far" in told[3]


def test_the_first_is_kept_where_none_is_closer(runs):
    runs["held"] = [Held(0.5, 40.0, 39.0)]
    plan = within(Limit(0.5), 16, runs=4, table=single())
    assert len(runs["plans"]) == 1
    assert len(runs["others"]) == 2, "one run is left for a closer one"
    assert plan.decisions == runs["plans"][0].decisions


@pytest.mark.parametrize("count", [1, 2, 3, RUNS])
@pytest.mark.parametrize("limit", [Limit(0.5), Limit(psnr=50.0)], ids=str)
def test_no_more_plans_are_run_than_was_said(runs, count, limit):
    runs["held"] = [Held(0.5, 51.0, 50.0)]
    runs["judged"] = [52.0 + number for number in range(count)]
    within(limit, 16, runs=count, table=single())
    assert 1 <= len(runs["plans"]) + len(runs["others"]) <= count


def test_for_a_quality_a_quicker_way_is_looked_for(runs):
    runs["held"] = [Held(0.5, 50.5, 50.0), Held(0.4, 50.2, 50.0)]
    runs["judged"] = [70.0]
    plan = within(Limit(psnr=50.0), 16, runs=6, table=single())
    first, second = runs["plans"]
    assert plan.settings.promise.measured_share == 0.4
    assert second.settings.promise.predicted_share < first.settings.promise.predicted_share


def test_a_table_is_held_against_the_pipeline_before_anything_is_run(runs, monkeypatch):
    runs["held"] = [Held(0.5, 41.0, 39.5)]
    pipe, given, table = object(), {"prompt": "a"}, made_table(6)
    plan_within(pipe, given, Limit(0.5), 6, table=table, runs=1)
    ((checked, *others),) = runs["checked"]
    assert checked is table
    assert others == [pipe, given, 6]

    def refuses(*given):
        raise ScheduleError("other steps")

    monkeypatch.setattr(planned, "check_table", refuses)
    with pytest.raises(ScheduleError, match="other steps"):
        within(Limit(0.5))
    assert len(runs["plans"]) == 1


def test_a_budget_of_another_machines_seconds_is_told(runs):
    runs["held"] = [Held(0.5, 41.0, 39.5)]
    table = replace(made_table(6), machine="an abacus")
    with pytest.warns(UserWarning, match="measured on an abacus, and this is"):
        within(Limit(0.5), table=table)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        within(Limit(psnr=40.0), table=table)
        within(Limit(0.5))


def test_seeds_and_runs_that_make_no_sense(runs):
    with pytest.raises(ValueError, match="0 runs"):
        within(Limit(0.5), runs=0)
    with pytest.raises(ValueError, match=r"seeds \[1\] are held out"):
        within(Limit(0.5), seeds=(0, 1), held_out=(1,))
    with pytest.raises(ValueError, match="0 held out"):
        within(Limit(0.5), held_out=())


def test_attention_alone_is_planned_and_measured_for_it(runs, monkeypatch, tmp_path):
    runs["held"] = [Held(0.85, 41.0, 41.0)]
    plan = within(Limit(0.85, blocks=False))
    assert {row[2].kind for row in plan.decisions} == {Kind.FULL}
    assert plan.settings.promise.limit == "budget 0.85, attention alone"
    seen = {}

    def measured(pipe, inputs, steps, **options):
        seen.update(options)
        return made_table(steps)

    monkeypatch.setattr(planned, "measure", measured)
    assert within(Limit(0.85, blocks=False), table=None, state=tmp_path / "errors.json").decisions == plan.decisions
    assert (seen["attention"], seen["state"]) == (True, tmp_path / "errors.json")
    assert runs["state"] == tmp_path / "errors.json.trials"
    within(Limit(0.85), table=None, state=tmp_path / "errors.json")
    assert seen["attention"] is None
    seen.clear()
    with pytest.raises(ErrorTableError, match="attention is neither to be measured"):
        within(Limit(0.85, blocks=False), table=None, attention=False)
    assert seen == {}


def test_what_is_kept_by_default_is_deleted_in_the_end_and_no_sooner(runs, monkeypatch, tmp_path):
    """The measurement serves a search that is interrupted later on."""
    monkeypatch.setenv("DIFA_CACHE_DIR", str(tmp_path))
    places = []

    def measured(pipe, inputs, steps, state, **options):
        places.append(state)
        state.parent.mkdir(exist_ok=True)
        state.write_text("{}")
        return made_table(steps)

    monkeypatch.setattr(planned, "measure", measured)
    monkeypatch.setattr(planned, "models_of", lambda pipe: (pipe,))
    monkeypatch.setattr(planned, "identity_of", lambda *given: {"inputs": "a"})
    runs["held"] = [None]
    with pytest.raises(AttributeError):
        within(Limit(0.8), table=None)
    assert places[0].is_file()
    runs["held"] = [Held(0.8, 41.0, 41.0)]
    within(Limit(0.8), table=None)
    assert places[1] == places[0]
    assert not places[0].exists()
    assert runs["state"] is None
    within(Limit(0.8), table=None, state=tmp_path / "own.json")
    assert (tmp_path / "own.json").is_file()


@pytest.mark.slow
def test_a_pipeline_is_left_as_it_was_also_after_an_error(monkeypatch, tmp_path):
    from difa_compile.calibration.measure import measure

    pipe = tiny_pipeline()
    given = {"class_labels": [1, 2]}
    measured = measure(pipe, given, 4, progress=False, inner="eager")
    names = [name for name in measured.seconds if name.startswith("blocks")]
    seconds = {"full": 1.0, "pipeline": 0.0, **{name: 1.0 if "filled" in name else 0.1 for name in names}}
    table = measured.with_seconds(
        seconds, measured.calls, measured.machine
    )  # what a tiny model takes is the machine's mood
    full, half = plan_from_table(table, budget=1.0), plan_from_table(table, budget=0.7)
    eager = functools.partial(apply_for_trials, inner="eager")
    monkeypatch.setattr(planned, "apply_for_trials", eager)
    trials = Trials(pipe, given, 4, (0, 1), (2,))
    held = trials.run(full)
    assert held.share > 0
    assert held.psnr > 60
    assert held.psnr > trials.judge(half)
    images, called = trials._planned, []

    def counted(seed):
        called.append(seed)
        return images(seed)

    monkeypatch.setattr(trials, "_planned", counted)
    assert trials.judge(full) == held.psnr  # whose images are known
    assert called == []
    trials.run(half, rounds=1)
    assert called == [2, 0]  # the held-out one, and the one that is timed

    def with_nan(seed):
        call = images(seed)
        return replace(call, images=call.images * math.nan)

    monkeypatch.setattr(trials, "_planned", with_nan)
    other = plan_from_table(table, budget=0.9)
    assert other.decisions not in (full.decisions, half.decisions)
    assert trials.judge(other) == 0
    trials.close()
    assert type(pipe) is DiTPipeline
    with planned.trials(pipe, given, 4, (0,), (1,), table, tmp_path / "trials") as run:
        assert run.runs._full.pipe._progress_bar_config == {"disable": True}
        monkeypatch.setattr(run.runs, "_planned", lambda seed: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            run.run(full)
    assert not (tmp_path / "trials").exists()
    assert type(pipe) is DiTPipeline
    assert pipe.transformer._compiled_call_impl is None
