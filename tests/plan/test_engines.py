"""The engines that an export of a plan needs, from the plan alone."""

from dataclasses import replace

import pytest

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.plan.cost import plan_flops
from difa_compile.plan.data import SiteInfo
from difa_compile.plan.engines import CacheUse, engine_of_steps, engines_of, what_is_counted
from difa_compile.plan.plan import Cell, Plan
from tests.support.plans import GREEDY, MODEL, plan_of, site

VALUES = 256 * 384


def test_one_for_each_distinct_row_of_roles():
    """Full steps of which one keeps an output, one a residual and one nothing are three."""
    plan = plan_of("FWRF.F", "F....F")
    found = engines_of(plan)
    assert engine_of_steps(found) == (0, 1, 2, 3, 4, 5)
    assert [str(each) for each in found] == [
        *("2 full", "1 reuse, 1 window(band:32)", "1 reuse, 1 window(band:32)+residual"),
        *("1 full, 1 reuse", "2 reuse", "2 full"),
    ]
    again = engines_of(plan_of("F..F..F.", "F..F..F."))
    assert [each.steps for each in again] == [(0, 3, 6), (1, 2, 4, 5, 7)]


def test_shares_and_caches():
    plan = plan_of("FR.F", "F..F")
    first, second, third, last = engines_of(plan)
    assert (first.reads, first.writes) == (CacheUse(0, 0), CacheUse(2, 2 * VALUES))  # a residual, and an output
    assert (second.reads, second.writes) == (CacheUse(2, 2 * VALUES), CacheUse(1, VALUES))
    assert (third.reads, third.writes) == (CacheUse(2, 2 * VALUES), CacheUse(0, 0))
    assert (last.reads, last.writes) == (CacheUse(0, 0), CacheUse(0, 0))
    assert last.call == 1 < first.call, "taking a residual and keeping caches comes on top"
    assert third.call == 0
    assert sum(each.share for each in (first, second, third, last)) == pytest.approx(1)
    assert plan_flops(plan, True).total_planned / plan_flops(plan, True).total_full == pytest.approx(
        sum(each.call * len(each.steps) for each in (first, second, third, last)) / 4, rel=1e-2
    )
    assert engines_of(plan_of("FFP"))[-1].reads == CacheUse(2, 2 * VALUES)


def test_caches_of_heads_and_what_a_block_covers():
    heads = Decision.parse("heads(0-2:reuse;3-5:full)")
    block = SiteInfo("blocks.0", "block", 1, 384, 256, 384, None, 10**9)
    rows = [(FULL, FULL), (heads, FULL), (FULL, REUSE)]
    cells = tuple(tuple(map(Cell, row)) for row in rows)
    found = engines_of(Plan(MODEL, GREEDY, (site(0), block), (1.0, 0.6, 0.3), cells))
    assert [str(each) for each in found] == ["2 full", "1 full, 1 heads(...)", "2 reuse"]
    assert found[1].reads == CacheUse(1, 256 * 3 * 64)
    assert found[0].writes == CacheUse(1, 256 * 3 * 64)
    assert found[1].writes == found[2].reads == CacheUse(1, VALUES)
    assert found[2].call == 0


def test_what_is_counted_is_said_where_calls_share():
    plan = plan_of("Ff")
    assert what_is_counted(plan, "batched") == ""
    assert "becomes two, one for each call" in what_is_counted(plan, "two-call")
    assert what_is_counted(plan_of("F."), "two-call") == ""
    two = replace(plan, settings=replace(plan.settings, guidance="two-call"))
    assert what_is_counted(plan, "two-call") in two.summary()
    assert what_is_counted(plan, "two-call") not in plan.summary()
