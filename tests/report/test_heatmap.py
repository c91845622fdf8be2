"""The map of a plan, step by site: its cells, their colours and what they tell."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.plan.engines import engine_of_steps, engines_of
from difa_compile.plan.plan import Cell, Plan, SiteInfo, Trial
from difa_compile.report.heatmap import heat_map
from tests.support.pages import write
from tests.support.plans import plan_of
from tests.support.report_sample import make_comparison, make_plan


@pytest.mark.parametrize(("steps", "sites"), [(1, 1), (20, 6), (50, 57)])
def test_heat_map_has_one_cell_per_step_and_site(steps, sites, tmp_path):
    made = make_plan(steps, sites)
    tags = write(tmp_path, made, make_comparison(made, images=10)).all("td")
    assert sum("title" in attrs for attrs in tags) == steps * sites


def test_cell_tells_the_losses_of_every_tried_candidate(plan):
    made = heat_map(plan)
    step, site = next(
        (step, site) for step in range(50) for site in range(6) if len(plan.rows[step][site].trials) == 4 and site != 2
    )
    cell = plan.rows[step][site]
    lines = made.rows[site].cells[step].text.split("\n")
    assert lines[0] == f"step {step} · transformer_blocks.{site}.attn1"
    assert lines[1] == str(cell.decision)
    assert f"{100 * cell.flops_saved:.0f}\u00a0%" in lines[2] or "saves nothing" in lines[2]
    assert len(lines) == 3 + 4
    for line, trial in zip(lines[3:], cell.trials, strict=True):
        name, loss, limit, verdict = line.split("\t")
        assert name == str(trial.decision)
        assert float(loss.removeprefix("loss ")) == pytest.approx(trial.loss, rel=5e-3)
        assert float(limit.removeprefix("limit ")) == pytest.approx(trial.threshold, rel=5e-3)
        assert (verdict == "over the limit") == (trial.loss >= trial.threshold)


def test_the_plan_says_how_its_cells_were_chosen(plan):
    assert "Each cell is the first candidate, in the order tried" in heat_map(plan).intro
    weighed = replace(plan, settings=replace(plan.settings, method="weighed"))
    assert "Each cell is the candidate with the lowest sum of cost" in heat_map(weighed).intro
    by_hand = replace(plan, settings=replace(plan.settings, method="rule"))
    assert "nothing was measured" in heat_map(by_hand).intro


def test_cell_tells_the_cost_where_it_was_weighed(plan):
    decision = Decision.parse("full+cfg")
    trials = (Trial(REUSE, 0.05, 0.1, cost=0.0), Trial(decision, 0.06, 0.1, cost=0.5), Trial(FULL, 0.2, 0.1, cost=1.0))
    cell = Cell(REUSE, trials, 1.0)
    weighed = replace(plan, rows=(plan.rows[0], (cell, *plan.rows[1][1:]), *plan.rows[2:]))
    lines = heat_map(weighed).rows[0].cells[1].text.split("\n")[3:]
    assert lines == [
        "reuse\tloss 0.05\tlimit 0.1, takes 0\u00a0%\tchosen",
        "full+cfg\tloss 0.06\tlimit 0.1, takes 50\u00a0%\tsaves too little for it",
        "full\tloss 0.2\tlimit 0.1, takes 100\u00a0%\tover the limit",
    ]


def test_cell_tells_why_a_candidate_does_not_apply(plan):
    texts = [cell.text for cell in heat_map(plan).rows[2].cells]
    assert any("a mask stands on this attention\t\tnot tried" in text for text in texts)


def test_cell_tells_fitted_weights(plan):
    rows = [[FULL] * 6, [FULL] * 6, [Decision.parse("forecast:1")] * 6]
    cells = [[Cell(decision) for decision in row] for row in rows]
    cells[2][1] = replace(cells[2][1], weights=(1.25, -0.25))
    made = heat_map(Plan(plan.model, plan.settings, plan.sites, (1.0, 0.8, 0.5), tuple(map(tuple, cells))))
    assert "weights fitted\t1.25, -0.25, the newest first" in made.rows[1].cells[2].text
    assert "fitted" not in made.rows[0].cells[2].text


def test_groupings_of_heads_share_a_colour_and_a_cell_tells_them(plan):
    def colours(*texts):
        decisions = [Decision.parse(text) for text in texts]
        rows = [[FULL] * 6, (decisions * 6)[:6]]
        cells = tuple(tuple(Cell(decision) for decision in row) for row in rows)
        return heat_map(Plan(plan.model, plan.settings, plan.sites, (1.0, 0.5), cells))

    one, other = (f"heads(0-3:window(band:8);4:reuse;5:{form})" for form in ("full", "window(disc:3)"))
    alone = colours(one, f"{one}+cfg")
    assert [colour.name for colour in alone.colours] == ["full", one, f"{one}+cfg"]
    assert [line for line in alone.rows[0].cells[1].text.split("\n") if "\t" in line] == [
        "window(band:8)\theads 0-3",
        "reuse\theads 4",
        "full\theads 5",
    ]
    several = colours(one, other, f"{one}+cfg")
    assert [(colour.name, colour.count) for colour in several.colours] == [
        ("full", 6),
        ("heads(...)", 4),
        (f"{one}+cfg", 2),
    ]
    assert other in several.rows[1].cells[1].text


def test_each_decision_has_a_colour_of_its_own_and_its_count(plan):
    windows = [Decision.parse(f"window(band:{radius})") for radius in (8, 16, 32)]
    forecasts = [Decision.parse(f"forecast:{text}") for text in ("1", "1(step)", "2")]
    rows = [[FULL] * 6, [*windows, *windows], [FULL] * 6, [*forecasts, *forecasts]]
    cells = tuple(tuple(replace(plan.rows[0][0], decision=decision) for decision in row) for row in rows)
    made = heat_map(Plan(plan.model, plan.settings, plan.sites, (1.0, 0.8, 0.5, 0.2), cells))
    assert [(colour.name, colour.count) for colour in made.colours] == [
        ("full", 12),
        ("window(band:8)", 2),
        ("window(band:16)", 2),
        ("window(band:32)", 2),
        ("forecast:1", 2),
        ("forecast:1(step)", 2),
        ("forecast:2", 2),
    ]
    for mode in ("light", "dark"):
        assert len({getattr(colour, mode) for colour in made.colours}) == 7


def test_rule_plans_do_not_claim_measurements(plan):
    by_rule = replace(plan, settings=replace(plan.settings, method="rule", threshold=None, loss=None, candidates=()))
    assert "nothing was measured" in heat_map(by_rule).intro


@pytest.mark.parametrize(
    ("blocks", "name"),
    [
        (("transformer_blocks.0", "transformer_blocks.5"), "blocks 0 to 5"),
        (("first.1", "second.3"), "first.1 to second.3"),
    ],
)
def test_a_span_is_named_by_its_blocks_and_the_sites_as_without_it(plan, blocks, name):
    span = SiteInfo(f"{blocks[0]}..{blocks[-1]}", "block", 1, 8, 256, 8, None, 1, blocks)
    rows = tuple((*row, Cell(FULL)) for row in plan.rows)
    made = heat_map(replace(plan, sites=(*plan.sites, span), rows=rows))
    assert [row.name for row in made.rows] == [*(row.name for row in heat_map(plan).rows), name]


def test_each_step_tells_its_engine_and_each_engine_what_it_does(plan, page):
    found = heat_map(plan)
    used = engines_of(plan)
    assert [engine.number for engine in found.run] == list(engine_of_steps(used))
    assert (
        len({engine.light for engine in found.engines}) == len({engine.dark for engine in found.engines}) == len(used)
    )
    for engine, use in zip(found.engines, used, strict=True):
        assert engine.line[:2] == (str(engine.number), str(len(use.steps)))
        assert engine.line[-1] == str(use)
    strip = [attrs for attrs in page.all("th") if re.match(r"step \d+: engine \d+, ", attrs.get("title", ""))]
    assert len(strip) == plan.steps
    assert f"The engines of an export: {len(used)}" in page.text
    assert f"the plan needs {len(used)} engine" in page.text


def test_caches_of_engines_are_written_with_three_digits():
    found = heat_map(plan_of("FFP."))
    assert [engine.line[4:6] for engine in found.engines] == [
        ("–", "1 (98.3k\u00a0values)"),
        ("2 (197k\u00a0values)", "–"),
        ("1 (98.3k\u00a0values)", "–"),
    ]
