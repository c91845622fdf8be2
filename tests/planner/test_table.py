"""Tables of errors: what comes back from a file, what is refused, and the problem that they make."""

import base64
import json
import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from difa_compile.calibration.measure import ATTENTION_LAGS, LAGS
from difa_compile.decision import FULL, REUSE, Decision, Kind, Window
from difa_compile.errors import ErrorTableError, OutputError, PlanMismatchError, ScheduleError
from difa_compile.machine.profile import machine_name
from difa_compile.plan.schedule import output_sources, take_rows
from difa_compile.planner.choice import Planner, choose
from difa_compile.planner.effects import drift_of_values
from difa_compile.planner.make import attention_alone, plan_from_table, plan_of
from difa_compile.planner.problem import outcome
from difa_compile.planner.table import TABLE, ErrorTable, MeasuredUnit
from tests.support.planner_problems import smooth_values
from tests.support.tables import SECONDS, WINDOW, made_table, measured_unit

RESIDUAL = Decision.parse("window(band:2)+residual")
GROUPS = Decision.parse("heads(0-2:window(band:2);3:full)")


@pytest.fixture
def path(tmp_path):
    made_table().save(tmp_path / "errors.json")
    return tmp_path / "errors.json"


def with_residuals(steps=8):
    """A table whose attention has a window with its residual, and groups of the heads of both its sites."""
    table = made_table(steps)
    blocks, attention = table.units
    ages = np.stack([0.1 * age * smooth_values(3, steps) for age in (1, 3)], axis=1)
    computed = {**attention.computed, GROUPS: 0.1 * smooth_values(4, steps)}
    attention = replace(attention, computed=computed, ages=(1, 3), residual={RESIDUAL: ages})
    seconds = SECONDS | {f"attention {RESIDUAL}": 0.95, "attention residual(band:2)": 1.03, f"attention {GROUPS}": 0.93}
    return replace(table, units=(blocks, attention), seconds=seconds)


def resealed(path, change):
    """Change what a file holds and give it the digest of that."""
    document = json.loads(path.read_text())
    change(document)
    content = {key: value for key, value in document.items() if key not in ("table_version", "digest")}
    path.write_text(json.dumps({**document, "digest": TABLE.digest(content)}))


# Files


def test_round_trip(path, tmp_path):
    table = replace(with_residuals(), begins=(3, 5), machine="a machine")
    table.save(path)
    again = ErrorTable.load(path)
    parts = ("model", "settings", "sites", "progress", "done", "seconds", "calls", "identity", "machine", "begins")
    assert [getattr(again, name) for name in parts] == [getattr(table, name) for name in parts]
    for read, unit in zip(again.units, table.units, strict=True):
        assert [read.name, read.sites, read.inside, read.lags] == [unit.name, unit.sites, unit.inside, unit.lags]
        assert np.array_equal(read.drift, unit.drift.astype(np.float32))
        assert np.array_equal(read.spread, unit.spread.astype(np.float32))
        assert list(read.computed) == list(unit.computed)
        for decision, values in unit.computed.items():
            assert np.array_equal(read.computed[decision], values.astype(np.float32))
        assert (read.ages, list(read.residual)) == (unit.ages, list(unit.residual))
        for decision, values in unit.residual.items():
            assert np.array_equal(read.residual[decision], values.astype(np.float32))
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["again.json", "errors.json"]


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        made_table().save(tmp_path / "file" / "errors.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"table_version": 3}', '{"units": []}'])
def test_what_is_no_table(path, text):
    path.write_text(text)
    with pytest.raises(ErrorTableError, match="restore the file, or measure again"):
        ErrorTable.load(path)


def test_a_table_that_is_cut_off(path):
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ErrorTableError, match=r"damaged or was cut off; restore the file, or measure again"):
        ErrorTable.load(path)


def test_no_table_at_all(tmp_path):
    with pytest.raises(ErrorTableError, match=r"No such file.*as written by difa measure"):
        ErrorTable.load(tmp_path / "none.json")


def test_a_table_of_another_version(path):
    for version in (1, 2, 4):  # tables of version 1 hold zeros where streams begin, those of 2 have no residuals
        path.write_text(path.read_text().replace('"table_version": 3', f'"table_version": {version}'))
        message = f"has table version {version}, but this release reads version 3; .*measure again, into another file"
        with pytest.raises(ErrorTableError, match=message):
            ErrorTable.load(path)
        made_table().save(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"full": 1.0', '"full": 2.0'),
        ('"done": 8', '"done": 7'),
        ('"inputs": "a"', '"inputs": "b"'),
        ('"calls": 1', '"calls": 2'),
        ('"begins": []', '"begins": [2]'),
        ('"machine": ""', '"machine": "b"'),
        ('"lags": [1, 2, 4]', '"lags": [1, 2, 5]'),
        ("AAAAAAAA", "AAAAAABA"),
    ],
)
def test_an_edited_table_is_refused(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ErrorTableError, match="changed after it was written"):
        ErrorTable.load(path)


def packed(*values):
    return base64.b64encode(np.array(values, dtype="<f4").tobytes()).decode()


def with_nan(document):
    unit = document["units"][0]
    unit["spread"] = packed(*[np.nan] * 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_nan, "units\\[0\\].spread of the table of errors holds NaN or infinity; measure again"),
        (lambda d: d["units"][0].update(drift=packed(*[np.inf] * 8 * 4 * 6)), "holds NaN or infinity"),
        (lambda d: d["units"][0].update(drift=packed(*[1.0] * 7)), "cannot reshape"),
        (lambda d: d["units"][0].update(drift="AAA"), "not base64"),
        (lambda d: d["units"][0].update(drift="ä"), "units\\[0\\].drift|ASCII"),
        (lambda d: d["units"][0].update(drift=packed(*[1.0] * 4 * 6)), "measured over 1 steps, but the schedule has 8"),
        (lambda d: d["units"][0].update(spread=packed(*[1.0] * 4)), "do not go together"),
        (lambda d: d["units"][1]["computed"].update({str(WINDOW): packed(*[1.0] * 6)}), "do not go together"),
        (lambda d: d["units"][1]["computed"].update({"reuse": packed(*[1.0] * 48)}), "'attention reuse'|no effects"),
        (lambda d: d["units"][1]["computed"].update({"full": packed(*[1.0] * 48)}), "no seconds"),
        (lambda d: d["units"][1]["computed"].update({"cone": packed(*[1.0] * 48)}), "cone"),
        (lambda d: d["units"][0].update(lags=[1, 2, 4, 4]), "lags must ascend from 1"),
        (lambda d: d["units"][0].update(lags=[]), "lags must ascend from 1"),
        (lambda d: d["units"][0].update(lags=[0, 1, 2, 3]), "lags must ascend from 1"),
        (lambda d: d["units"][0].update(lags=[2, 3, 4, 5]), "lags must ascend from 1"),
        (lambda d: d["units"][0].update(lags=[1.0, 2, 3, 4]), "must be a whole number"),
        (lambda d: d["units"][0].update(numbers=0), "cannot"),
        (lambda d: d["units"][0].update(sites=[3]), "names no site, or one that it does not have"),
        (lambda d: d["units"][0].update(sites=[-1]), "names no site, or one that it does not have"),
        (lambda d: d["units"][0].update(sites=[]), "names no site, or one that it does not have"),
        (lambda d: d["units"][0].update(sites=[0]), "belongs to two units"),
        (lambda d: d["units"][0].update(inside=1), "must come before it"),
        (lambda d: d["units"][1].update(inside=5), "must come before it"),
        (lambda d: d["units"][1].update(name="blocks"), "a name of its own"),
        (lambda d: d.update(units=[]), "at least one"),
        (lambda d: d.update(done=9), "9 steps are said to be done, of 8"),
        (lambda d: d.update(done=-1), "-1 steps"),
        (lambda d: d.update(calls=0), "at least 1"),
        (lambda d: d.update(begins=[0]), "must ascend, from 1 to 7"),
        (lambda d: d.update(begins=[8]), "must ascend, from 1 to 7"),
        (lambda d: d.update(begins=[3, 3]), "must ascend, from 1 to 7"),
        (lambda d: d.update(begins=[2.5]), "begins\\[0\\] is .*must be a whole number"),
        (lambda d: d.update(machine=None), "machine is null; it must be a string"),
        (lambda d: d["seconds"].pop("full"), "no seconds of the row 'full'"),
        (lambda d: d["seconds"].pop("attention window(band:2)"), "no seconds of the row 'attention window"),
        (lambda d: d["seconds"].update(full=-1.0), "less than no time"),
        (lambda d: d["seconds"].update(full="1"), "must be a number"),
        (lambda d: d["seconds"].update({"blocks reuse": 1e300}), "more than thirty years"),
        (lambda d: d["units"][0].pop("spread"), "without the key 'spread'"),
        (lambda d: d["sites"].__setitem__(1, d["sites"][0]), "names site 'blocks.0.attn' twice"),
        (lambda d: d["sites"].reverse(), "out of order"),
        (lambda d: d["progress"].reverse(), "progress"),
        (lambda d: d["model"].update(parameters=-1), "parameters"),
    ],
)
def test_what_does_not_go_together_is_refused_under_a_digest_that_fits(path, change, message):
    resealed(path, change)
    with pytest.raises(ErrorTableError, match=message):
        ErrorTable.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda unit: unit.update(ages=[]), "residual|cannot reshape|ages"),
        (lambda unit: unit.update(ages=[3, 1]), "ages must ascend from 1"),
        (lambda unit: unit.update(ages=[1, 9]), "none is above its longest lag, 4"),
        (lambda unit: unit.update(residual={}), "exactly where there is a window\\+residual"),
        (lambda unit: unit["residual"].update({str(RESIDUAL): packed(*[1.0] * 12)}), "do not go together"),
        (lambda unit: unit["residual"].update({str(RESIDUAL): packed(*[np.nan] * 96)}), "holds NaN or infinity"),
        (lambda unit: unit["residual"].update({"full+cfg": packed(*[1.0] * 96)}), "no seconds|residual's age"),
        (lambda unit: unit["computed"].update({str(RESIDUAL): packed(*[1.0] * 48)}), "no effects of its own"),
        (
            lambda unit: unit["computed"].update({"heads(0-1:full;2:window(band:2))": packed(*[1.0] * 48)}),
            "unit 'attention' of the table: .*names 3 heads, but the sites have .*2, 2.*, 4 together",
        ),
    ],
)
def test_damaged_residuals_and_groups_are_refused(tmp_path, change, message):
    path = tmp_path / "errors.json"
    with_residuals().save(path)
    resealed(path, lambda document: change(document["units"][1]))
    with pytest.raises(ErrorTableError, match=message):
        ErrorTable.load(path)


def test_seconds_of_taking_residuals_must_be_there(tmp_path):
    with pytest.raises(ErrorTableError, match=r"no seconds of the row 'attention residual\(band:2\)'"):
        replace(with_residuals(), seconds=SECONDS | {f"attention {RESIDUAL}": 1.0, f"attention {GROUPS}": 1.0})


def test_residuals_and_groups_in_the_problem():
    unit = with_residuals().problem().units[1]
    own, costs = unit.effects, unit.costs
    assert own.ages(RESIDUAL) == 3
    assert costs.computed[FULL] - costs.computed[RESIDUAL] == pytest.approx(0.05)
    assert costs.computed[FULL] - costs.computed[GROUPS] == pytest.approx(0.07)
    assert costs.residual == {Window("band", 2): pytest.approx(0.03)}
    assert np.allclose(own.residual[RESIDUAL][5, 2], 2 * own.residual[RESIDUAL][5, 1]), "ages between are interpolated"


def test_residuals_of_a_step_are_added():
    empty = MeasuredUnit.empty("attention", [0], None, (1, 2), [WINDOW, RESIDUAL], 3, 4, ages=(1, 2))
    assert (list(empty.computed), list(empty.residual)) == ([WINDOW], [RESIDUAL])
    assert MeasuredUnit.empty("attention", [0], None, (1, 2), [WINDOW], 3, 4, ages=(1, 2)).ages == ()
    found = {("attention", WINDOW): np.ones(3), ("attention", (RESIDUAL, 1)): np.full(3, 5.0)}
    unit = empty.with_step(2, found, {})
    assert (unit.residual[RESIDUAL][2] == [[5, 5, 5], [0, 0, 0]]).all()
    assert not empty.residual[RESIDUAL].any(), "the unit before was changed"


def test_plans_have_what_each_site_does():
    """Groups that are chosen for all heads come apart site by site: the first has its window in both heads."""
    table = attention_alone(with_residuals())
    columns = ((FULL, GROUPS, RESIDUAL, *[REUSE] * 3, FULL, REUSE),)
    plan = plan_of(table, outcome(table.problem(), columns))
    first, second = (plan.sites.index(site) for site in table.sites[:2])
    assert str(plan.decisions[1][first]) == "window(band:2)"
    assert str(plan.decisions[1][second]) == "heads(0:window(band:2);1:full)"
    assert plan.decisions[2][first] == plan.decisions[2][second] == RESIDUAL
    assert plan.roles[0][first].emit_residual
    assert 0 < plan.rows[1][second].flops_saved < plan.rows[1][first].flops_saved


def test_few_rows_of_residuals_and_groups():
    table = attention_alone(with_residuals(16))
    for most in (2, 3):
        plan = plan_from_table(table, budget=0.9, max_rows=most)
        assert len(set(plan.decisions)) <= most
    every = {decision.kind for row in plan.decisions for decision in row}
    assert every <= set(Kind)


def test_parts_that_do_not_go_together_in_python():
    table = made_table()
    other = measured_unit("blocks", [2], None, (1, 2, 3, 4), 8, size=5)
    with pytest.raises(ErrorTableError, match=r"in 6 numbers.*first unit 5 numbers"):
        replace(table, units=(other, table.units[1])).problem()
    with pytest.raises(ErrorTableError, match="schedule has 7"):
        replace(table, progress=table.progress[1:], done=7)


# Half a measurement


@pytest.mark.parametrize(("done", "seconds"), [(0, {}), (3, SECONDS), (8, {})])
def test_a_table_that_is_not_complete_says_how_to_go_on(done, seconds, tmp_path):
    made_table(done=done, seconds=seconds).save(tmp_path / "errors.json")
    table = ErrorTable.load(tmp_path / "errors.json")
    assert table.complete == (done == 8)
    message = rf"holds {done} of 8 steps.*interrupted; start difa measure with the same arguments again to go on"
    with pytest.raises(ErrorTableError, match=message):
        table.check_complete(tmp_path / "errors.json")
    with pytest.raises(ErrorTableError, match=message):
        table.problem()


def test_steps_are_added_one_by_one():
    empty = MeasuredUnit.empty("blocks", [2], None, (1, 2), [WINDOW], 3, 8)
    table = replace(made_table(), units=(empty,), done=0, seconds={})
    found = {("blocks", 1): np.ones(3), ("blocks", WINDOW): np.full(3, 4.0), ("other", 2): np.full(3, 9.0)}
    table = table.with_step({**found, ("blocks", WINDOW): np.zeros(3)}, {}).with_step(found, {("blocks", 1): 0.5})
    unit = table.units[0]
    assert table.done == 2
    assert (unit.drift[1] == [[1, 1, 1], [0, 0, 0]]).all()
    assert (unit.spread[1] == [0.5, 0]).all()
    assert (unit.computed[WINDOW][:2] == [[0, 0, 0], [4, 4, 4]]).all()
    assert not unit.drift[2:].any()
    assert not empty.drift.any(), "the unit before was changed"
    assert table.begins == ()
    assert table.with_step(found, {}, begins=True).with_step(found, {}).begins == (2,)


def test_a_table_of_another_model_is_refused():
    table = made_table()
    table.check_model(table.model)
    table.check_model(replace(table.model, parameters=11))
    for other in (replace(table.model, class_name="\x1b[31m"), replace(table.model, config_digest="cd" * 32)):
        with pytest.raises(PlanMismatchError, match="measure this model"):
            table.check_model(other)
    with pytest.raises(PlanMismatchError) as caught:
        replace(table, model=replace(table.model, class_name="\x1b[31m")).check_model(table.model)
    assert str(caught.value).isprintable()


# Lags


def straight(lags, steps=10):
    """A unit whose effects are in proportion to the lag, and differ from step to step."""
    drift = np.zeros((steps, len(lags), 2))
    for step in range(steps):
        for i, lag in enumerate(lags):
            if lag <= step:
                drift[step, i] = lag * np.array([1 + step, -2.0])
    return MeasuredUnit("blocks", (0,), None, tuple(lags), drift, drift[..., 0] * 0, {})


@pytest.mark.parametrize("begins", [(), (4,), (1, 6)])
@pytest.mark.parametrize("lags", [(1,), (1, 2), (1, 3), (1, 2, 3, 5, 8), (1, 9)])
def test_effects_in_proportion_to_the_lag_come_out_at_every_lag(lags, begins):
    """Between lags that were tried, and at steps before which the longer ones do not reach in their stream."""
    unit = straight(lags)
    since = [step - max([0, *(begin for begin in begins if begin <= step)]) for step in range(10)]
    for step in range(10):
        for i, lag in enumerate(lags):
            unit.drift[step, i] *= lag <= since[step]  # as measured: zero where there was nothing to take
    drift = unit.effects(begins).drift
    assert drift.shape == (10, lags[-1] + 1, 2), "beyond the longest lag nothing is known"
    for step in range(10):
        for lag in range(lags[-1] + 1):
            expected = lag * np.array([1 + step, -2.0]) if lag <= since[step] else np.zeros(2)
            assert np.allclose(drift[step, lag], expected), (step, lag)


def test_lags_that_were_tried_are_taken_as_they_are_and_those_between_lie_between():
    unit = measured_unit("blocks", [0], None, (1, 2, 4, 8), 12, seed=3)
    drift = unit.effects().drift
    for i, lag in enumerate(unit.lags):
        assert np.array_equal(drift[lag:, lag], unit.drift[lag:, i])
        assert not drift[:lag, lag].any()
    assert np.allclose(drift[8:, 6], (unit.drift[8:, 2] + unit.drift[8:, 3]) / 2)
    # Step 6 has no output of eight steps before: from there the line through lags 2 and 4 goes on.
    assert np.allclose(drift[6, 6], 2 * unit.drift[6, 2] - unit.drift[6, 1])
    assert np.allclose(drift[1, 1], unit.drift[1, 0])


# The problem


def test_costs_are_seconds_of_a_step():
    problem = made_table(calls=2).problem()
    blocks, attention = problem.units
    assert problem.readers[0].order == 1
    assert blocks.inside is None
    assert attention.inside == 0
    # full 1, without the blocks 0.1; a forecast reads one output more than reuse, for 0.02; attention is 0.3 of them
    assert blocks.costs.computed[FULL] == pytest.approx(2 * (1.0 - 0.1 + 0.02 - 0.3))
    assert blocks.costs.read == pytest.approx(2 * 0.02)
    assert blocks.costs.fill == pytest.approx(2 * 0.01)
    assert attention.costs.computed[FULL] == pytest.approx(2 * (1.0 - 0.7 + 0.01))
    assert attention.costs.computed[FULL] - attention.costs.computed[WINDOW] == pytest.approx(2 * 0.1)
    assert problem.full_cost / problem.steps == pytest.approx(2 * 1.0 + 0.05, rel=0.03)
    assert attention.effects.lags == blocks.effects.lags == 4


def test_without_forecasts_steps_reuse():
    seconds = {name: value for name, value in SECONDS.items() if "forecast" not in name}
    problem = made_table(seconds=seconds).problem()
    assert problem.readers == (REUSE,)
    assert problem.units[0].costs.read == 0


def test_smooth_effects_stay_smooth():
    """What is interpolated is close to what was left out, where effects are smooth."""
    steps = 50
    values = smooth_values(7, steps)
    all_lags = measured_unit("blocks", [0], None, range(1, LAGS + 1), steps, seed=7)
    few = measured_unit("blocks", [0], None, ATTENTION_LAGS, steps, seed=7)
    gap = np.abs(all_lags.effects().drift - few.effects().drift)[LAGS:].max()
    assert 0 < gap < 0.25 * np.abs(values).max()


def test_attention_is_planned_no_further_back_than_it_was_tried():
    """Blocks may be left out for longer; what they hold is then covered, and computed where they are."""
    steps = 20
    units = (
        measured_unit("blocks", [2], None, range(1, 13), steps),
        measured_unit("attention", [0, 1], 0, (1, 2, 3), steps, seed=1, decisions=[WINDOW]),
    )
    problem = replace(made_table(steps), units=units).problem()
    assert [unit.effects.lags for unit in problem.units] == [12, 3]
    planner = Planner(problem)
    widest = 0
    for budget in (planner.least.share, 0.3, 0.4, 0.6, 0.8):
        blocks, attention = planner.choose(budget).columns
        active = [step for step in range(steps) if blocks[step].kind.reads != "output"]
        widest = max(widest, *(b - a for a, b in pairwise(active)))
        sources = output_sources(attention, [step not in active for step in range(steps)])
        for step in active:
            assert all(step - source <= 3 for source in sources[step])
    assert widest > 4, "no block was left out for longer than attention was tried"


def test_nothing_is_planned_across_the_begin_of_a_stream():
    table = replace(made_table(12), begins=(5,))
    problem = table.problem()
    assert problem.begins == (5,)
    outcome = choose(problem, 0.5)
    assert all(column[5].kind.reads != "output" for column in outcome.columns)
    assert outcome.columns[0][6].order == 0, "a forecast needs two outputs of its own stream"
    plan = plan_of(table, outcome)
    _, promoted = take_rows(plan.decisions[5:], range(7), plan.blocks)
    assert promoted == (), "the run of another model, beginning with empty caches, follows the plan"


def test_which_machine_has_measured_is_told_elsewhere():
    table = replace(made_table(), machine="a machine\x1b[31m")
    with pytest.warns(UserWarning, match=r"measured on a machine.*, and this is .*torch") as caught:
        table.tell_machine()
    assert str(caught[0].message).isprintable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made_table().with_seconds(SECONDS, 1, machine_name("cpu")).tell_machine()
        made_table().tell_machine()  # nobody knows


def test_a_shorter_schedule_over_the_same_course():
    """Whose effects are those between the steps that are left, and whose plan computes as much as one made for it."""
    steps, size = 40, 6
    lags = (*range(1, 13),)
    whole = [smooth_values(seed, steps, size) for seed in (0, 1)]
    table = made_table(steps)
    units = tuple(
        replace(unit, lags=lags, drift=drift_of_values(values, 12)[:, 1:], spread=np.full((steps, 12), 0.25))
        for unit, values in zip(table.units, whole, strict=True)
    )
    table = replace(table, units=units)
    short = table.thinned(16)
    source = [round(step * 2.5 - 1e-9) for step in range(16)]
    assert short.progress == pytest.approx([(16 - step) / 16 for step in range(16)])
    assert short.complete
    for unit, values in zip(short.units, whole, strict=True):
        assert unit.lags == (1, 2, 3, 4), "five steps may be thirteen of the measured"
        assert np.allclose(unit.effects().drift, drift_of_values(values[source], 4), atol=1e-12, rtol=0)
        assert (unit.spread[4:] == 0.25).all()
    assert short.units[1].computed[WINDOW].tolist() == table.units[1].computed[WINDOW][source].tolist()
    assert table.thinned(40) is table
    plan = plan_from_table(table, budget=0.5, steps=16)
    assert (plan.steps, plan.settings.promise.predicted_share) == (16, pytest.approx(0.5, abs=0.06))
    carried = plan_from_table(table, budget=0.5).resolve(16)
    computed = [sum(row[-1] == FULL for row in rows) for rows in (plan.decisions, plan.resolve(16).rows, carried.rows)]
    assert computed[0] == computed[1] < computed[2], "a plan that is carried over loses what was to be read"


def test_residuals_and_streams_of_a_shorter_schedule():
    table = with_residuals(12)
    unit = table.units[1]
    short = replace(table, begins=(5,)).thinned(6)
    assert short.begins == (3,), "the first step at or behind it"
    assert short.units[1].ages == (1,)
    assert set(short.units[1].residual) == set(unit.residual)
    wanted = unit.effects((5,)).residual[RESIDUAL]
    for step in (1, 2, 4, 5):
        assert short.units[1].residual[RESIDUAL][step, 0].tolist() == wanted[2 * step, 2].tolist()
    assert table.thinned(3).units[1].ages == (), "none was tried four steps old"
    assert not table.thinned(3).units[1].residual


def test_schedules_of_which_a_table_does_not_tell():
    table = made_table(12)
    with pytest.raises(ScheduleError, match="measured over 12 steps, which say too little of 13; plan for fewer"):
        table.thinned(13)
    with pytest.raises(ScheduleError, match="looks 4 steps back at 'blocks', and those of a schedule of 2 steps"):
        table.thinned(2)
    with pytest.raises(ScheduleError, match="at least 1"):
        plan_from_table(table, budget=0.5, steps=0)
    twice = replace(table, progress=tuple(value for value in table.progress[::2] for _ in range(2)))
    with pytest.raises(ScheduleError, match="visits timesteps several times"):
        twice.thinned(6)
    with pytest.raises(ErrorTableError, match="holds 3 of 12 steps"):
        replace(table, done=3).thinned(6)
