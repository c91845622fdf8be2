"""Plans from a table: what may be asked for, what comes of it, and what is said of it."""

import math
import re
import warnings
from dataclasses import replace

import pytest

from difa_compile.decision import FULL, REUSE, Kind
from difa_compile.errors import BudgetError, ErrorTableError, RowLimitError
from difa_compile.machine.profile import machine_name
from difa_compile.plan.plan import Plan
from difa_compile.planner.choice import Planner, choose
from difa_compile.planner.make import FRONT, Limit, cost_of_rows, front_of, plan_from_table, plan_of, planned_from
from difa_compile.planner.problem import FORECAST, additive_error, psnr
from difa_compile.planner.rows import FewRows, distinct, limit_rows
from tests.support.planner_problems import make_problem
from tests.support.tables import made_table

STEPS = 8


@pytest.fixture(scope="module")
def table():
    return made_table(STEPS)


@pytest.fixture(scope="module")
def problem(table):
    return table.problem()


# Limits


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing is given to plan for; give one of budget"),
        ({"max_rows": 3}, "nothing is given to plan for"),
        ({"budget": 0.5, "psnr": 30}, "budget and psnr is given"),
        ({"budget": 0.5, "psnr": 30, "error": 0.1}, "budget and psnr and error is given"),
        *[
            ({"budget": value}, r"the budget is .*above 0 and at most 1")
            for value in (0, 0.0, -0.1, 1.0001, math.nan, math.inf, True, "0.5", 10**400)
        ],
        *[({"psnr": value}, "above 0 and at most 200") for value in (0, -3, 201, math.nan, math.inf, True, "30")],
        *[
            ({"error": value}, "give a positive mean squared error")
            for value in (0, -1, math.nan, math.inf, True, "1", 10**400)
        ],
    ],
)
def test_limits_that_make_no_sense(given, message, table):
    with pytest.raises(BudgetError, match=message):
        Limit(**given)
    with pytest.raises(BudgetError, match=message):
        plan_from_table(table, **given)


@pytest.mark.parametrize("rows", [0, -1, 1.5, True, "2", math.nan])
def test_limits_on_rows_are_refused_before_anything_is_measured(rows):
    with pytest.raises(RowLimitError, match="whole number, at least 1"):
        Limit(0.5, max_rows=rows)


def test_limits_in_words_and_as_errors():
    assert str(Limit(0.5)) == "budget 0.5"
    assert str(Limit(psnr=40, max_rows=3)) == "40 dB, at most 3 distinct rows"
    assert str(Limit(error=1e-4)) == "error 0.0001"
    assert Limit(0.5).mean_squared is None
    assert Limit(psnr=40).mean_squared == pytest.approx(1e-4)
    assert Limit(error=0.25).mean_squared == 0.25
    assert Limit(1) == Limit(1.0)
    assert str(Limit(0.5, max_rows=3, blocks=False)) == "budget 0.5, at most 3 distinct rows, attention alone"


# Plans


@pytest.mark.parametrize("budget", [0.35, 0.5, 0.8])
def test_a_plan_keeps_to_its_budget_and_can_be_run(table, budget, tmp_path):
    plan = plan_from_table(table, budget=budget)
    promise = plan.settings.promise
    assert plan.settings == replace(table.settings, promise=promise)
    assert (plan.model, plan.sites, plan.progress) == (table.model, table.sites, table.progress)
    assert promise.limit == f"budget {budget}"
    assert 0.5 * budget < promise.predicted_share <= budget
    assert promise.predicted_psnr > 0
    assert (promise.measured_share, promise.measured_psnr, promise.held_out_psnr, promise.note) == (*[None] * 3, "")
    assert {decision.kind for decision in plan.decisions[0]} <= {Kind.FULL, Kind.WINDOW}
    left_out = [row[2] for row in plan.decisions if row[2] != FULL]
    assert left_out
    assert all(decision.kind in (Kind.REUSE, Kind.FORECAST) for decision in left_out)
    for row, cells in zip(plan.decisions, plan.rows, strict=True):
        if row[2] != FULL:
            assert row[:2] == (FULL, FULL), "covered"
        assert all((cell.flops_saved > 0) == (cell.decision != FULL) for cell in cells[:2])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.resolve(STEPS).steps == STEPS


def test_the_whole_budget_leaves_nothing_out(table):
    plan = plan_from_table(table, budget=1.0)
    assert {decision for row in plan.decisions for decision in row} == {FULL}
    assert (plan.settings.promise.predicted_share, plan.settings.promise.predicted_psnr) == (1.0, None)


def test_more_time_never_costs_quality(table):
    found = [plan_from_table(table, budget=budget).settings.promise.predicted_psnr for budget in (0.35, 0.5, 0.7, 0.9)]
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_a_budget_that_is_not_possible_names_the_least(table, problem):
    least = front_of(problem)[0].share
    with pytest.raises(
        BudgetError, match=r"is not possible with this table: the least is 0\.\d+ of the full"
    ) as caught:
        plan_from_table(table, budget=least / 2)
    named = float(str(caught.value).split("the least is ")[1].split()[0])
    assert named == pytest.approx(least, abs=1e-3)
    assert plan_from_table(table, budget=named).settings.promise.predicted_share <= named


@pytest.mark.parametrize("asked", [35.0, 45.0])
def test_a_quality_is_kept_to_and_no_more_time_taken_than_for_a_better_one(asked):
    table = made_table(5)
    plan = plan_from_table(table, psnr=asked)
    assert plan.settings.promise.predicted_psnr >= asked
    assert plan.settings.promise.limit == f"{asked:g} dB"
    better = plan_from_table(table, psnr=asked + 6).settings.promise
    assert plan.settings.promise.predicted_share <= better.predicted_share
    same = plan_from_table(table, error=10 ** (-asked / 10))
    assert same.decisions == plan.decisions


def test_few_rows_and_what_they_cost(table):
    free = plan_from_table(table, budget=0.5)
    assert len(set(free.decisions)) > 2
    limited = plan_from_table(table, budget=0.5, max_rows=2)
    assert len(set(limited.decisions)) <= 2
    assert limited.settings.promise.limit == "budget 0.5, at most 2 distinct rows"
    promise, unlimited = limited.settings.promise, free.settings.promise
    assert promise.predicted_psnr <= unlimited.predicted_psnr
    assert promise.note.startswith(
        f"any number of rows would give {unlimited.predicted_psnr:.1f} dB at {unlimited.predicted_share:.2f} of the "
        f"time, where these give {promise.predicted_psnr:.1f} dB at {promise.predicted_share:.2f}; if errors of "
        "different steps did not cancel, that limit would cost "
    )
    enough = plan_from_table(table, budget=0.5, max_rows=STEPS)
    assert enough.decisions == free.decisions
    assert enough.settings.promise.note == ""


def test_few_rows_for_a_quality():
    table = made_table(5)
    free = plan_from_table(table, psnr=40)
    limited = plan_from_table(table, psnr=40, max_rows=2)
    assert len(set(limited.decisions)) <= 2
    assert limited.settings.promise.predicted_psnr >= 40
    assert limited.settings.promise.predicted_share >= free.settings.promise.predicted_share - 1e-9


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("asked", [25, 30, 40, 60])
def test_for_a_quality_there_is_a_plan_of_any_number_of_rows(asked, most):
    """At most budgets few rows are not possible: the search goes on to those where they are."""
    plan = plan_from_table(made_table(6), psnr=asked, max_rows=most)
    promise = plan.settings.promise
    assert len(set(plan.decisions)) <= most
    assert promise.predicted_psnr is None or promise.predicted_psnr >= asked
    if most == 1:
        assert (round(promise.predicted_share, 9), promise.predicted_psnr) == (1.0, None)
        assert promise.note.endswith("where these give the same images at 1.00") == (asked < 60)  # for 60 dB so do all


def test_a_plan_of_few_rows_that_suffices_is_the_plan():
    table = made_table(6)
    free = plan_from_table(table, psnr=30)
    enough = plan_from_table(table, psnr=30, max_rows=len(set(free.decisions)))
    assert enough.decisions == free.decisions
    assert enough.settings.promise.note == ""


def test_what_few_rows_cost_at_most_is_said_where_it_is_known():
    problem = make_problem(steps=16, units=4, readers=(FORECAST,))
    planner = Planner(problem)
    free, limited = planner.choose(0.5), limit_rows(problem, 0.5, 2)
    few = FewRows(planner, 2)
    text = cost_of_rows(few, limited, free)
    said = r"any number .* at 0\.\d\d; if .* that limit would cost (\d+\.\d) to (\d+\.\d) dB"
    least, most = map(float, re.fullmatch(said, text).groups())
    lost = 10 * math.log10(additive_error(problem, limited.columns) / additive_error(problem, free.columns))
    assert least <= lost <= most + 0.05
    assert cost_of_rows(few, free, free) == ""


def test_it_is_said_how_far_the_best_of_so_few_rows_can_be():
    problem = make_problem(steps=7, seed=7, readers=(REUSE, FORECAST))
    planner = Planner(problem)
    few, free = FewRows(planner, 2), planner.choose(0.5)
    text = cost_of_rows(few, few.choose(0.5), free)
    assert re.search(
        r"would cost \d+\.\d to \d+\.\d dB, and no plan of as few rows .* more than \d+\.\d dB better", text
    )


def test_one_row_is_the_full_model(table):
    assert len(set(plan_from_table(table, budget=1.0, max_rows=1).decisions)) == 1
    with pytest.raises(RowLimitError, match="allow 2 rows, or a budget of 1"):
        plan_from_table(table, budget=0.5, max_rows=1)


def test_sites_in_no_unit_stay_full(table):
    alone = replace(table, units=(table.units[0],))
    plan = plan_from_table(alone, budget=0.5)
    assert {decision for row in plan.decisions for decision in row[:2]} == {FULL}
    assert {row[2] for row in plan.decisions} != {FULL}


def test_attention_alone(table):
    plan = plan_from_table(table, budget=0.85, blocks=False)
    assert {row[2] for row in plan.decisions} == {FULL}
    chosen = {decision for row in plan.decisions for decision in row[:2]}
    assert chosen - {FULL}
    promise = plan.settings.promise
    assert promise.limit == "budget 0.85, attention alone"
    assert 0.7 < promise.predicted_share <= 0.85
    with_blocks = plan_from_table(table, budget=0.85).settings.promise
    assert with_blocks.predicted_psnr >= promise.predicted_psnr
    with pytest.raises(BudgetError, match="is not possible with this table"):
        plan_from_table(table, budget=0.5, blocks=False)
    assert plan.resolve(STEPS).steps == STEPS
    assert plan_from_table(table, psnr=40, blocks=False).settings.promise.predicted_psnr >= 40


def test_attention_alone_costs_what_a_row_of_it_takes(table):
    """A step in which attention is reused takes as long as it was timed, blocks and all."""
    problem, seconds = planned_from(table, Limit(0.5, blocks=False)).problem(), table.seconds
    full = seconds["full"] + seconds["pipeline"]
    assert problem.full_cost == pytest.approx(STEPS * full)
    assert problem.base == pytest.approx(full - problem.units[0].costs.computed[FULL])
    assert problem.base + problem.units[0].costs.read == pytest.approx(seconds["attention reuse"] + seconds["pipeline"])
    assert planned_from(table, Limit(0.5)) is table


def test_attention_alone_needs_it_measured(table):
    with pytest.raises(ErrorTableError, match=r"holds blocks alone.*difa measure --attention"):
        plan_from_table(replace(table, units=table.units[:1]), budget=0.5, blocks=False)


def test_errors_that_no_image_can_have_are_promised_as_0_db(table, problem):
    least = front_of(problem)[0]
    plan = plan_of(table, replace(least, error=7.0), Limit(0.5))
    assert psnr(7.0) < 0
    assert plan.settings.promise.predicted_psnr == 0.0


def test_a_measurement_that_was_interrupted_makes_no_plan():
    with pytest.raises(ErrorTableError, match="start difa measure with the same arguments again"):
        plan_from_table(made_table(STEPS, done=3), budget=0.5)


def test_another_machines_seconds_are_told_where_a_budget_of_time_is_planned(table):
    elsewhere = replace(table, machine="an abacus")
    with pytest.warns(UserWarning, match="measured on an abacus, and this is .*held to its budget"):
        plan = plan_from_table(elsewhere, budget=0.5)
    assert plan.decisions == plan_from_table(table, budget=0.5).decisions
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_from_table(elsewhere, psnr=40)
        plan_from_table(replace(table, machine=machine_name("cpu")), budget=0.5)


# The front


def plan_error(problem, budget):
    return choose(problem, budget).error


def test_the_front_goes_from_the_least_that_is_possible_on(problem):
    found = front_of(problem)
    shares, errors = [each.share for each in found], [each.error for each in found]
    assert shares == sorted(shares)
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == len(errors)
    assert 3 < len(found) <= 1 + sum(budget > shares[0] for budget in FRONT)
    for budget in (each for each in FRONT if each > shares[0]):
        best = min(each.error for each in found if each.share <= budget)
        assert best <= plan_error(problem, budget)
    assert all(1 < distinct(each.columns) <= STEPS for each in found)
    assert front_of(problem, ()) == found[:1]
