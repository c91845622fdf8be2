"""Blocks and spans in plans: what holds what, roles, other schedules, cost, texts, files."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import DecisionError, PlanDigestError, PlanFormatError, ScheduleError
from difa_compile.plan.cost import (
    block_flops,
    contributions,
    cost_breakdown,
    flops_saved,
    full_flops,
    plan_flops,
    site_flops,
)
from difa_compile.plan.data import Cell, SiteInfo, blocks_of
from difa_compile.plan.plan import Plan
from difa_compile.plan.schedule import COVERED_ROLE, FULL_ROLE, Role, assign_roles, take_rows, uniform_progress
from tests.support.plans import GREEDY, LETTERS, MODEL, letters, site

FORECAST = Decision.parse("forecast:1")
WORDS = {**LETTERS, "P": FORECAST}
ATTENTION = full_flops(site(0)).total
BLOCK = 3 * ATTENTION


def block(index: int, flops: int | None = BLOCK) -> SiteInfo:
    return SiteInfo(f"blocks.{index}", "block", 1, 384, 256, 384, None, flops)


def span(*indices: int, flops: int | None = 2 * BLOCK + 1000) -> SiteInfo:
    names = tuple(f"blocks.{index}" for index in indices)
    return SiteInfo(f"{names[0]}..{names[-1]}", "block", 1, 384, 256, 384, None, flops, names)


EVERY = (site(0), site(1), block(0), block(1), span(0, 1))
HELD = (2, 3, 4, 4, None)


def rows_of(*columns: str) -> tuple[tuple[Decision, ...], ...]:
    return tuple(tuple(WORDS[letter] for letter in row) for row in zip(*columns, strict=True))


def plan_of(*columns: str, sites: tuple[SiteInfo, ...] = EVERY) -> Plan:
    cells = tuple(tuple(Cell(decision) for decision in row) for row in rows_of(*columns))
    return Plan(MODEL, GREEDY, sites, uniform_progress(len(cells)), cells)


# What holds what


def test_each_site_is_held_by_the_innermost_that_is_named() -> None:
    assert blocks_of(EVERY) == HELD
    assert blocks_of((site(0), site(1), span(0, 1))) == (2, 2, None)
    assert blocks_of((site(0), site(1), block(1))) == (None, 2, None)
    assert blocks_of((site(0), site(1), block(1), span(0, 1))) == (3, 2, 3, None)
    assert blocks_of((site(0), site(1), site(10), block(1))) == (None, 3, None, None), "blocks.10 is not in blocks.1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "self", "blocks": ("blocks.0",)}, "names blocks, which only a span has"),
        ({"layout": site(0).layout}, "a block has no layout"),
        ({"blocks": (3,)}, "it must be a string"),
        ({"flops": -1}, "flops is -1; it must be a whole number, at least 0"),
        ({"flops": 1.5}, "flops is 1.5; it must be a whole number"),
    ],
)
def test_odd_blocks_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(PlanFormatError, match=message):
        dataclasses.replace(span(0, 1), **change)  # type: ignore[arg-type]


def test_shapes_in_words() -> None:
    assert block(0).shape == "block, 256 tokens, width 384"
    assert span(0, 1).shape == "span of 2 blocks, 256 tokens, width 384"


def test_attention_sites_come_first_and_there_is_one() -> None:
    with pytest.raises(PlanFormatError, match=r"'blocks\.0\.attn1' is out of order"):
        plan_of("FF", "FF", sites=(block(0), site(0)))
    with pytest.raises(PlanFormatError, match=r"'blocks\.0' is out of order"):
        plan_of("FF", sites=(block(0),))


# Roles


def test_what_a_left_out_block_holds_is_covered() -> None:
    roles = assign_roles(rows_of("FFFF", "FFFF", "F.FF", "FFF.", "FFFF"), HELD)
    assert [str(role) for role in roles[0]] == ["full", "full", "full >output", "full", "full"]
    assert [str(role) for role in roles[1]] == ["covered", "full", "reuse", "full", "full"]
    assert [str(role) for role in roles[2]] == ["full", "full", "full", "full >output", "full"]
    assert [str(role) for role in roles[3]] == ["full", "covered", "full", "reuse", "full"]
    roles = assign_roles(rows_of("FF", "FF", "FF", "FF", "F."), HELD)
    assert roles[1] == (*[COVERED_ROLE] * 4, Role(REUSE)), "a span covers blocks, and what these hold"
    assert COVERED_ROLE != FULL_ROLE
    assert str(COVERED_ROLE) == "covered"


@pytest.mark.parametrize("letter", ["f", ".", "R", "W"])
def test_covered_cells_must_be_full(letter: str) -> None:
    message = "step 1, site 0: .* is asked for, but the block that holds the site is left out"
    with pytest.raises(ScheduleError, match=message):
        assign_roles(rows_of(f"F{letter}F", "FFF", "F.F", "FFF", "FFF"), HELD)
    with pytest.raises(ScheduleError, match=message.replace("site 0", "site 2")):
        assign_roles(rows_of("FFF", "FFF", "F.F", "FFF", "F.F"), HELD)
    with pytest.raises(ScheduleError, match="step 1, site 0"):
        plan_of(f"F{letter}F", "FFF", "F.F", "FFF", "FFF")


def test_a_covered_role_does_nothing() -> None:
    for arguments in ((REUSE,), (FULL, True)):
        with pytest.raises(DecisionError, match="whose block is left out does nothing"):
            Role(*arguments, covered=True)  # type: ignore[arg-type]


def test_a_covered_step_fills_no_cache() -> None:
    """The attention's reader at step 2 reads what step 0 has written, for at step 1 it did not run."""
    roles = assign_roles(rows_of("FF.", "FFF", "F.F", "FFF", "FFF"), HELD)
    assert [str(row[0]) for row in roles] == ["full >output", "covered", "reuse"]
    with pytest.raises(
        ScheduleError, match="step 1, site 4: forecast:1 needs the outputs of 2 earlier steps, but only"
    ):
        assign_roles(rows_of("FF", "FF", "FF", "FF", "FP"), HELD)
    with pytest.raises(ScheduleError, match="step 2, site 2: forecast:1 needs"):
        assign_roles(rows_of("FFF", "FFF", "F.P", "FFF", "FFF"), HELD)
    with pytest.raises(ScheduleError, match="step 2, site 2: forecast:1 needs"):
        assign_roles(rows_of("FFF", "FFF", "FFP", "FFF", "F.F"), HELD)
    assign_roles(rows_of("FFFF", "FFFF", "FFFP", "FFFF", "F.FF"), HELD)


# Other schedules


def test_a_block_whose_filler_fell_out_is_full_and_so_is_what_it_holds() -> None:
    plan = plan_of("FFFFRF", "FFFFFF", "FFP.FF", "FFFFFF", "FFFFFF")
    rows, promotions = take_rows(plan.decisions, (0, 2, 3, 5), plan.blocks)
    assert [str(row[2]) for row in rows] == ["full", "full", "reuse", "full"]
    assert [letters(rows, index) for index in (0, 1)] == ["FFFF", "FFFF"]
    (promotion,) = promotions
    assert (promotion.step, promotion.site, promotion.wanted) == (1, 2, FORECAST)
    assert (
        promotion.reason == "it reads the output of the plan's step 1, which no earlier step of this schedule follows"
    )
    assert [row[0].covered for row in assign_roles(rows, plan.blocks)] == [False, False, True, False]


def test_what_a_block_holds_takes_its_own_row_where_the_block_runs() -> None:
    plan = plan_of("FF.F", "FFFF", "F.F.", "FFFF", "FFFF")
    rows, promotions = take_rows(plan.decisions, (1, 2, 3), plan.blocks)
    assert [str(row[2]) for row in rows] == ["full", "full", "reuse"]
    assert [str(row[0]) for row in rows] == ["full", "reuse", "full"]
    assert [(p.step, p.site) for p in promotions] == [(0, 2)], "its attention has computed at step 0, with the block"
    assign_roles(rows, plan.blocks)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[tuple[Decision, ...], ...], tuple[int, ...]]:
    """A plan of two sites in two blocks in a span, and the rows that another schedule follows."""
    steps = draw(st.integers(1, 8))
    words = [FULL, FULL, REUSE, FORECAST]
    rows = []
    for _ in range(steps):
        row = [draw(st.sampled_from(words)) for _ in EVERY]
        for index in (3, 2, 1, 0):
            held: int | None = HELD[index]
            while held is not None:
                if row[held].kind.reads == "output":
                    row[index] = FULL
                held = HELD[held]
        rows.append(row)
    while True:  # readers without fillers become full, the outermost first
        try:
            assign_roles(rows, HELD)
            break
        except ScheduleError as error:
            step, index = (int("".join(filter(str.isdigit, part))) for part in str(error).split(":")[0].split(","))
            rows[step][index] = FULL
    sources = tuple(sorted(draw(st.lists(st.integers(0, steps - 1), min_size=1, max_size=10))))
    return tuple(map(tuple, rows)), sources


@given(cases())
def test_any_rows_onto_any_others(case: tuple[tuple[tuple[Decision, ...], ...], tuple[int, ...]]) -> None:
    rows, sources = case
    taken, promotions = take_rows(rows, sources, HELD)
    roles = assign_roles(taken, HELD)  # raises if a reader lacks its filler, or a covered cell is not full
    promoted = {(promotion.step, promotion.site) for promotion in promotions}
    for step, source in enumerate(sources):
        for index, role in enumerate(roles[step]):
            if (step, index) in promoted:
                assert taken[step][index] == FULL != rows[source][index]
            else:
                assert taken[step][index] == rows[source][index]
            assert not (role.covered and (step, index) in promoted)
    assert take_rows(rows, tuple(range(len(rows))), HELD) == (rows, ())


def test_a_resolved_plan_covers_too() -> None:
    plan = plan_of("FFFF", "FFFF", "FFFF", "FFFF", "F.F.")
    resolved = plan.resolve(8)
    assert [row[0].covered for row in resolved.roles] == [False, False, True, True, False, False, True, True]
    assert resolved.promotions == ()


# Cost


def test_a_block_counts_all_or_nothing_and_no_attention() -> None:
    assert flops_saved(REUSE, block(0)) == flops_saved(FORECAST, span(0, 1)) == 1.0
    assert flops_saved(FULL, block(0)) == 0.0
    assert site_flops(REUSE, block(0)).total == full_flops(block(0)).total == 0
    assert site_flops(COVERED_ROLE, site(0)).total == 0
    assert site_flops(FULL_ROLE, site(0)).total == ATTENTION


def test_operations_of_blocks_by_hand() -> None:
    """Step by step: all; block 0 left out; the span; attention of block 0 left out; block 1, and attention of 0."""
    plan = plan_of("FFF..", "FFFFF", "F.FFF", "FFFF.", "FF.FF")
    cost = block_flops(plan)
    assert cost is not None
    whole = 2 * BLOCK + 1000
    assert cost.full == (whole,)
    assert [row[0] for row in cost.planned] == [
        whole,
        whole - BLOCK,
        0,
        whole - ATTENTION,
        whole - BLOCK - ATTENTION,
    ]
    attention = plan_flops(plan, True)
    assert attention.planned_per_step == tuple(ATTENTION * count for count in (2, 1, 0, 1, 0))
    assert attention.total_residuals == 0
    (line,) = [line for line in cost_breakdown(plan).lines() if line.startswith("FLOPs of the blocks")]
    assert f" {100 * cost.share:.1f} % of full " in line


def test_operations_of_blocks_need_blocks_whose_own_are_known() -> None:
    assert block_flops(plan_of("F.", sites=(site(0),))) is None
    assert block_flops(plan_of("FF", "F.", sites=(site(0), block(0, None)))) is None
    only = block_flops(plan_of("FF", "FF", "F.", sites=(site(0), site(1), block(1))))
    assert only is not None
    assert only.planned == ((BLOCK,), (0,)), "of the other block nothing is known"
    assert not any("blocks" in line for line in cost_breakdown(plan_of("F.", sites=(site(0),))).lines())


def test_what_each_decision_leaves_out_by_hand() -> None:
    reuse, full = contributions(plan_of("FFF..", "FFFFF", "F.FFF", "FFFF.", "FF.FF"))
    whole = 2 * BLOCK + 1000
    assert (reuse.decision, reuse.cells) == (REUSE, 5)
    assert reuse.share == pytest.approx((2 * BLOCK + whole + 2 * ATTENTION) / (5 * whole))
    assert (full.decision, full.cells, full.share) == (FULL, 14, 0)


def test_of_blocks_of_unknown_operations_attention_is_counted() -> None:
    full, forecast = sorted(
        contributions(plan_of("FFF", "FFP", sites=(site(0), block(0, None)))), key=lambda each: each.share
    )
    assert (forecast.decision, forecast.cells) == (FORECAST, 1)
    assert forecast.share == pytest.approx(1 / 3)
    assert (full.cells, full.share) == (2, 0)


# Texts and files


MAP = """\
step                0
blocks.0.attn1      FF-.-
blocks.1.attn1      FF-F-
blocks.0            FF-FP
blocks.1            FF-F.
blocks.0..blocks.1  FF.FF
engine              01234
LEGEND  - its block is left out
"""
LEGEND = (
    "F full  W window  R window+residual  H by heads  . reuse  P forecast; "
    "f w r h , p the same with the CFG halves shared"
)


def test_the_map_tells_what_is_covered() -> None:
    plan = plan_of("FFF.F", "FFFFF", "FFFFP", "FFFF.", "FF.FF")
    text = plan.summary()
    assert text.endswith(MAP.replace("LEGEND", LEGEND))
    assert (
        "5 sites: 2 x (self, 6 heads x 64, 256 tokens (16x16), width 384); 2 x (block, 256 tokens, width 384)" in text
    )
    assert "1 x (span of 2 blocks, 256 tokens, width 384)" in text
    assert "its block is left out" not in plan_of("F.", "FF", "FF", "FF", "FF").summary()
    assert plan.resolve(5).summary().endswith(text.partition("step ")[2])


def test_plans_with_blocks_are_written_and_read(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for sites in (EVERY, (*EVERY[:2], span(0, 1)), (*EVERY[:2], block(1, None))):
        columns = ["FFFF"] * (len(sites) - 1) + ["FFP."]
        plan = plan_of(*columns, sites=sites)
        again = Plan.from_json(plan.to_json())
        assert again == plan
        assert again.digest == plan.digest
        assert again.blocks == plan.blocks
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan
    written = json.loads(plan_of("FF", "FF", "FF", "FF", "FF").to_json())["sites"]
    assert [set(entry) - {"flops", "blocks"} == set(written[0]) for entry in written] == [True] * 5
    assert [entry.get("flops") for entry in written] == [None, None, BLOCK, BLOCK, 2 * BLOCK + 1000]
    assert [entry.get("blocks") for entry in written] == [None] * 4 + [["blocks.0", "blocks.1"]]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"blocks": "blocks.0"}, PlanFormatError, r"sites\[4\]\.blocks is a string; it must be a list"),
        ({"blocks": [1]}, PlanFormatError, r"sites\[4\]\.blocks is 1.*text|string"),
        ({"flops": "many"}, PlanFormatError, r"sites\[4\]\.flops"),
        ({"flops": 7}, PlanDigestError, "was edited|digest"),
        ({"blocks": ["blocks.0"]}, PlanDigestError, "digest"),
    ],
)
def test_damaged_blocks_are_refused(changes: dict[str, object], error: type[Exception], message: str) -> None:
    written = json.loads(plan_of("FF", "FF", "FF", "FF", "F.").to_json())
    written["sites"][4] |= changes
    with pytest.raises(error, match=message):
        Plan.from_json(json.dumps(written))
