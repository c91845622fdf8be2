"""How cases are put in groups, what is kept of an earlier run, and how recipes are compared with ours beside them."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("diffusers", reason="the rivals run on its pipelines")
from benchmarks import planner, planning
from benchmarks.peers import Case
from difa_compile import Plan


def case(name, tool="x"):
    return Case(name, tool, {}, print)


def test_the_quick_cases_are_of_all_tools_and_techniques():
    everything = [found.name for found in planner.wanted_cases(planner.parse_arguments([]))]
    quick = [found.name for found in planner.wanted_cases(planner.parse_arguments(["--quick"]))]
    assert set(quick) < set(everything)
    for order in ("reuse", "forecast of order 1", "forecast of order 2"):
        assert {f"uniform {order}, every {n}" for n in range(2, 7)} <= set(quick)
    techniques = {name.split(",")[0].split(" + ")[0] for name in everything if not name.startswith("difa")}
    assert techniques == {name.split(",")[0].split(" + ")[0] for name in quick if not name.startswith("difa")}
    assert {name for name in everything if name.startswith("difa")} <= set(quick)


def test_a_quick_run_has_fewer_rounds_and_images_unless_told():
    assert planner.parse_arguments(["--quick"]).repeats < planner.parse_arguments([]).repeats
    assert planner.parse_arguments(["--quick", "--images", "40"]).images == 40


def test_methods_are_tools_of_their_own():
    plans = planner.parse_arguments([]).plans
    assert {planner.tool_of(Plan.load(path)) for path in plans} >= {"difa", "difa, weighed", "difa, greedy"}
    shares = planner.shares_of_ours(plans)
    assert shares["difa, planner-budget-0.2-steps-50"] < shares["difa, planner-budget-0.5-steps-50"] < 1
    assert not any("threshold" in name for name in shares)


def test_plans_nearest_in_time_stand_beside_each_group():
    ours = [case(name, "difa") for name in ("fast", "middle", "slow")]
    others = [case(str(n)) for n in range(5)]
    shares = {"fast": 0.2, "middle": 0.4, "slow": 0.7, "0": 0.9, "1": 0.25, "2": 0.8, "3": 0.3, "4": 0.22}
    groups = planner.grouped(ours, others, shares, ours, 3)
    names = [([each.name for each in group], sorted(each.name for each in beside)) for group, beside in groups]
    assert names == [
        (["fast", "middle", "slow"], []),
        (["4", "1"], ["fast", "middle"]),
        (["3", "2", "0"], ["middle", "slow"]),
    ]


ROWS = [
    {"case": "inductor, full", "group": 1, "ratio_to_inductor": 1.0},
    {"case": "p", "tool": "difa", "group": 1, "ratio_to_inductor": 0.2, "psnr_db": 40.0},
    {"case": "q", "tool": "difa", "group": 1, "ratio_to_inductor": 0.5, "psnr_db": 50.0},
    {"case": "inductor, full", "group": 2, "ratio_to_inductor": 1.0},
    {"case": "q", "tool": "difa", "group": 2, "beside": True, "ratio_to_inductor": 0.4, "psnr_db": 50.0},
    {"case": "a", "tool": "x", "group": 2, "ratio_to_inductor": 0.3, "psnr_db": 43.0},
    {"case": "b", "tool": "x", "group": 2, "ratio_to_inductor": 0.6, "psnr_db": 56.0},
    {"case": "c", "tool": "x", "group": 2, "ratio_to_inductor": 0.1, "psnr_db": 30.0},
]


def test_ours_at_the_time_of_a_recipe():
    """Of its own group's time where the plan is in it, between two plans in a straight line."""
    found = {row["case"]: row for row in planner.compared(ROWS)}
    assert (found["a"]["ours_at_equal_time_db"], found["a"]["ours_over_it_db"]) == (45.0, 2.0)
    assert (found["b"]["ours_at_equal_time_db"], found["b"]["ours_over_it_db"]) == (50.0, -6.0)
    assert "ours_at_equal_time_db" not in found["c"]
    assert "ours_at_equal_time_db" not in found["p"]


def test_a_plan_in_several_groups_takes_the_median_of_its_times():
    assert planner.share_of(ROWS, "q") == pytest.approx(0.45)
    within = [(row["tool"], row["case"]) for row in planner.best(ROWS, (0.44,))]
    assert within == [("difa", "q"), ("x", "a")]  # give or take 3 %


def test_what_is_not_asked_for_stays(tmp_path):
    kept = {"steps": 50, "batch": 8, "ratio_of_calls": 1.0}
    (tmp_path / "planner.json").write_text(
        json.dumps({"rows": [{"case": "x", "note": "no"}, {"case": "old", "group": 1}, *(kept | row for row in ROWS)]})
    )
    args = planner.parse_arguments(["--output", str(tmp_path)])
    rows = planner.earlier(tmp_path, args)
    assert [row["case"] for row in rows] == [row["case"] for row in ROWS]
    left = planner.without(rows, ["a", "p", "q"])
    assert [(row["case"], row["group"]) for row in left] == [("inductor, full", 2), ("q", 2), ("b", 2), ("c", 2)]
    assert planner.without(rows, ["a", "b", "c"]) == rows[:3]
    with pytest.raises(SystemExit, match="another --output"):
        planner.earlier(tmp_path, planner.parse_arguments(["--steps", "20"]))
    assert planner.earlier(tmp_path / "none", args) == []


def test_plans_are_made_within_their_limits(monkeypatch, tmp_path):
    asked = []
    made = Plan.load(planner.parse_arguments([]).plans[0])

    def plan_within(pipe, inputs, limit, steps, **options):
        asked.append((limit.budget, limit.psnr, limit.blocks, options["seeds"]))
        return made

    monkeypatch.setattr(planning, "plan_within", plan_within)
    monkeypatch.setattr(planning._demo, "load", lambda model: None)
    monkeypatch.setattr(planning, "generation", lambda args: pytest.fail("that comes later"))
    place = ["--plans", str(tmp_path / "plans"), "--state", str(tmp_path / "state")]
    planning.make(planning.parse_arguments(["--make", "--attention", "--budgets", "0.5", "0.2", *place]))
    assert asked == [
        (0.485, None, True, (1234, 1235)),
        (0.194, None, True, (1234, 1235)),
        (None, 33.0, False, (1234, 1235)),
    ]
    assert sorted(path.name for path in (tmp_path / "plans").iterdir()) == [
        "planner-attention-33-db-steps-50.json",
        "planner-budget-0.2-steps-50.json",
        "planner-budget-0.5-steps-50.json",
    ]


def test_a_choice_is_timed_by_the_clock_and_by_the_processors():
    row = planning.timed("plan", lambda: sum(range(1000)), 2)
    assert row["repeats"] == 2
    assert 0 <= row["seconds"] < 60
    assert 0 <= row["cpu_seconds"] < 60
