"""Trials of a pipeline's plans: what they are given, and what is left behind."""

import functools
import math
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import DiTPipeline

from difa_compile.comparison import planned
from difa_compile.comparison.kept import Held
from difa_compile.comparison.planned import Trials, plan_within, psnr_of
from difa_compile.decision import Kind
from difa_compile.errors import ErrorTableError, ScheduleError
from difa_compile.pipeline.apply import apply_for_trials
from difa_compile.planner.make import Limit, plan_from_table
from tests.support.held import within
from tests.support.tables import made_table
from tests.support.tiny_pipelines import tiny_pipeline


def test_psnr_is_of_the_pairs_that_differ():
    full = torch.zeros(2, 1, 4, 4)
    assert psnr_of([(full, full)]) == math.inf
    other = full.clone()
    other[0] += 0.1
    assert psnr_of([(full, full), (full, other)]) == pytest.approx(20.0, abs=1e-3)


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
