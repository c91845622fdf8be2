"""Rows merged until there are few enough of them."""

import math
import random
from dataclasses import replace
from functools import partial
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import RowLimitError, ScheduleError
from difa_compile.exporting import merging
from difa_compile.exporting.merging import Guided, merged, packed, united, widened
from difa_compile.plan.cost import row_flops
from difa_compile.plan.data import SiteInfo, blocks_of
from difa_compile.plan.schedule import HeadCache, Role, assign_roles
from difa_compile.planner.make import plan_from_table
from tests.support.plans import BAND, site
from tests.support.tables import made_table


def block(path, blocks=()):
    return SiteInfo(path, "block", 1, 384, 256, 384, None, 10**9 * max(1, len(blocks)), tuple(blocks))


INFOS = (site(0), site(1), block("blocks.0"), block("blocks.1"), block("blocks.0..blocks.1", ("blocks.0", "blocks.1")))
HELD = blocks_of(INFOS)
OTHER = "window(band:4)+residual"
OF_SITES = [
    *("full", "full", "full+cfg", "window(band:32)", "window(band:32)+residual", OTHER, "reuse", "reuse+cfg"),
    *("forecast:1", "heads(0-2:reuse;3-5:full)", "heads(0-3:window(band:32)+residual;4-5:reuse)"),
]
OF_BLOCKS = ["full", "full", "full", "reuse", "forecast:2"]


@st.composite
def schedules(draw):
    """Rows of a schedule of two blocks, in which whatever can be run of what was drawn is."""
    rows = []
    for _ in range(draw(st.integers(1, 7))):
        row = [FULL] * len(INFOS)
        for i in (4, 2, 3, 0, 1):
            tried = list(row)
            tried[i] = Decision.parse(draw(st.sampled_from(OF_BLOCKS if i > 1 else OF_SITES)))
            try:
                assign_roles([*rows, tried], HELD)
            except ScheduleError:
                continue
            row = tried
        rows.append(tuple(row))
    return tuple(rows)


def engines_needed(rows, guided):
    """How many engines run schedules at least, by the caches that they read and the residuals that they take."""
    found = set()
    for roles in (row for each in rows for row in assign_roles(each, HELD)):
        shares = guided.two_call and any(role.decision.cfg_shared for role in roles)
        found.add((tuple((role.decision, role.covered, role.head_reads) for role in roles), shares))
    return len(found)


@settings(max_examples=60)
@given(st.lists(schedules(), min_size=1, max_size=2), st.integers(1, 6), st.booleans())
def test_merged_rows_can_run_compute_no_less_and_need_few_engines(rows, most, two_call):
    guided = Guided(two_call)
    found = merged(rows, INFOS, most, guided=guided)
    assert found.engines <= most
    assert engines_needed(found.rows, guided) <= most
    if found.rows == tuple(rows):
        assert found.before == found.after
    for before, after in zip(rows, found.rows, strict=True):
        old, new = assign_roles(before, HELD), assign_roles(after, HELD)
        for was, now in ((a, b) for one, two in zip(old, new, strict=True) for a, b in zip(one, two, strict=True)):
            assert was.covered or not now.covered
            if not was.covered and now.decision != was.decision:
                alone = replace(was.decision, cfg_shared=False)
                assert now.decision.is_full or (two_call and now.decision == alone)
                assert was.decision.cfg_shared or not now.decision.cfg_shared
    most = sum(len(set(assign_roles(each, HELD))) for each in rows)
    assert merged(rows, INFOS, 2 * most, guided=guided).rows == tuple(rows)


def test_what_costs_least_is_merged():
    """Of three rows that differ, the two whose common row computes the least more."""
    near, far = Decision.parse("window(band:32)"), Decision.parse("window(band:64)")
    rows = [(FULL, FULL), (near, near), (near, near), (REUSE, far), (REUSE, near)]

    def cost_of(full, window):
        prices = {FULL: full, near: window, far: window, REUSE: 0.0}
        return lambda row: sum(prices[role.decision] for role in row)

    found = merged([rows], INFOS[:2], 3, cost=cost_of(10.0, 1.0))
    assert (found.engines, found.before, found.after) == (3, 26.0, 44.0)
    assert found.rows[0] == (*rows[:3], (REUSE, FULL), (REUSE, FULL))
    found = merged([rows], INFOS[:2], 3, cost=lambda row: cost_of(10.0, 1.0)(row[:1]) + cost_of(40.0, 39.5)(row[1:]))
    assert found.rows[0] == (*rows[:3], (REUSE, FULL), (REUSE, FULL))
    found = merged([rows], INFOS[:2], 3, cost=lambda row: cost_of(10.0, 9.5)(row[:1]) + cost_of(40.0, 39.5)(row[1:]))
    assert found.after - found.before == 1.0
    found = merged([rows], INFOS[:2], 3, cost=lambda row: cost_of(10.0, 9.8)(row[:1]) + cost_of(40.0, 10.0)(row[1:]))
    assert found.rows[0] == (rows[0], (FULL, near), (FULL, near), rows[3], (FULL, near))


def test_graphs_of_two_branches_need_an_engine_each():
    rows = [(FULL, FULL), (REUSE, FULL), (FULL, REUSE)]
    assert merged([rows], INFOS[:2], 9, guided=Guided(False, 2)).engines == 6
    assert merged([rows], INFOS[:2], 2, guided=Guided(False, 2)).rows == (((FULL, FULL),) * 3,)
    with pytest.raises(RowLimitError, match="have 2 graphs, each of which needs one; allow at least 2"):
        merged([rows], INFOS[:2], 1, guided=Guided(False, 2))


def test_calls_of_guidance_that_share_are_two_rows_and_may_stop_sharing():
    shared = Decision.parse("window(band:32)+cfg")
    rows = [(FULL, FULL), (shared, shared), (shared, shared)]
    assert merged([rows], INFOS[:2], 9, guided=Guided(True)).engines == 3
    found = merged([rows], INFOS[:2], 2, guided=Guided(True))
    window = replace(shared, cfg_shared=False)
    assert found.rows == (((FULL, FULL), (window, window), (window, window)),)
    assert merged([rows], INFOS[:2], 2).rows == (tuple(rows),)


def test_rows_that_write_other_caches_are_one():
    plain, emitting = Role(FULL), Role(FULL, emit_output=True)
    taking = Role(FULL, emit_residual=True, residual_window=BAND)
    other = replace(taking, residual_window=Decision.parse(OTHER).window)
    heads = [Role(FULL, head_writes=(HeadCache((head,)),)) for head in (0, 1)]
    assert united((plain,), (emitting,)) == (emitting,)
    assert united((emitting,), (taking,)) == (replace(taking, emit_output=True),)
    assert united((taking,), (other,)) is None
    assert united((plain,), (Role(REUSE),)) is None
    assert united((heads[0],), (heads[1],)) == (Role(FULL, head_writes=(HeadCache((0,)), HeadCache((1,)))),)
    assert packed([(plain,), (taking,), (Role(REUSE),), (other,), (emitting,)]) == (
        ((plain,), (taking,), (emitting,)),
        ((Role(REUSE),),),
        ((other,),),
    )


def test_as_few_rows_are_widened_as_it_takes():
    plain, emitting = (Role(FULL),), (Role(FULL, emit_output=True),)
    taking = (Role(FULL, emit_residual=True, residual_window=BAND),)
    cost = partial(row_flops, sites=[site(0)])
    rows = {(0, plain): 5, (0, emitting): 1, (0, taking): 1, (1, plain): 1}
    assert widened(rows, 4, cost) == {}
    assert widened(rows, 3, cost) == {(0, plain): emitting}
    both = united(emitting, taking)
    assert widened(rows, 2, cost) == {(0, plain): both, (0, emitting): both, (0, taking): both}
    assert widened(rows, 1, cost) == widened(rows, 2, cost), "the other graph keeps its engine"


# How near to the least

SOME_SITES = ("full", "window(band:32)", "window(band:32)+residual", "reuse", "reuse", "reuse+cfg", "forecast:1")
SOME_BLOCKS = ("full", "full", "reuse", "forecast:1")


def some_rows(seed, most, steps=14):
    """A schedule of at most so many distinct rows, of six sites or of four in two blocks."""
    choose = random.Random(seed)
    held = [block(f"blocks.{i}") for i in range(2)] if seed % 2 else [site(4), site(5)]
    infos = (*map(site, range(4)), *held)
    blocks = blocks_of(infos)
    rows, known = [(FULL,) * len(infos)], [(FULL,) * len(infos)]
    while len(rows) < steps:
        tried = choose.sample(known, len(known))
        if len(known) < most and choose.random() < 0.6:
            row = [FULL] * len(infos)
            for i in range(5, -1, -1):
                other = list(row)
                other[i] = Decision.parse(choose.choice(SOME_BLOCKS if infos[i].is_block else SOME_SITES))
                row = other if can_run([*rows, other], blocks) else row
            tried = [tuple(row)]
        row = next(row for row in tried if can_run([*rows, row], blocks))
        known += [row] * (row not in known)
        rows.append(row)
    return tuple(rows), infos


def can_run(rows, blocks):
    try:
        assign_roles(rows, blocks)
    except ScheduleError:
        return False
    return True


def groupings(items):
    """All ways to put items into groups."""
    if not items:
        yield ()
        return
    first, *others = items
    for groups in groupings(others):
        yield ((first,), *groups)
        for i, group in enumerate(groups):
            yield (*groups[:i], (first, *group), *groups[i + 1 :])


def least(rows, infos, limits):
    """By limit the least that grouped rows cost, by the evaluation that merging has, over all groupings there are."""
    blocks = blocks_of(infos)
    covered = {
        row: [role.covered for role in roles] for row, roles in zip(rows, assign_roles(rows, blocks), strict=True)
    }
    found = dict.fromkeys(limits, math.inf)
    for groups in groupings(list(dict.fromkeys(rows))):
        if len(groups) > max(limits):
            continue
        for lenient in (True, False):
            of = {}
            for group in groups:
                said = []
                for i in range(len(infos)):
                    here = {FULL if covered[row][i] else row[i] for row in group if not (lenient and covered[row][i])}
                    said.append(here.pop() if len(here) == 1 else FULL)
                of |= dict.fromkeys(group, tuple(said))
            if can_run(changed := [of[row] for row in rows], blocks):
                break
        result = merged([changed], infos, 1000)
        found |= {most: min(found[most], result.after) for most in limits if result.engines <= most}
    return found


def greedily(rows, infos, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging._Regrouping, "found", lambda *_: ())
        return merged([rows], infos, most)


@pytest.mark.parametrize(
    ("seeds", "most"), [(range(10), 5), pytest.param(range(100, 116), 7, marks=pytest.mark.slow)], ids=["few", "more"]
)
def test_merged_rows_cost_hardly_more_than_the_least_there_is(seeds, most):
    worse = 0
    for seed in seeds:
        rows, infos = some_rows(seed, most)
        limits = range(1, len(set(rows)))
        bound = least(rows, infos, limits)
        for limit in limits:
            found = merged([rows], infos, limit)
            assert found.engines <= limit
            assert bound[limit] * (1 - 1e-9) <= found.after <= bound[limit] * 1.05, (seed, limit)
            worse += found.after > bound[limit] * (1 + 1e-9)
    assert worse <= len(seeds) / 10


def test_one_engine_is_full_and_more_engines_never_cost_more():
    rows, infos = some_rows(3, 8, steps=24)
    full = tuple(map(Role, [FULL] * len(infos)))
    found = [merged([rows, rows[:9]], infos, limit).after for limit in range(1, 10)]
    assert found[0] == 33 * row_flops(full, infos)
    assert all(few >= more for few, more in pairwise(found))
    assert found[-1] == merged([rows, rows[:9]], infos, 100).before


def test_grouping_anew_is_better_than_merging_greedily_and_never_worse():
    better = 0
    for seed in range(8):
        rows, infos = some_rows(seed, 9, steps=20)
        for limit in (2, 4):
            found, greedy = merged([rows], infos, limit).after, greedily(rows, infos, limit).after
            assert found <= greedy
            better += found < greedy
    assert better


@pytest.mark.parametrize("two_call", [False, True])
def test_an_order_is_cut_where_it_costs_least(two_call):
    """Beside all cuts; where guidance is two calls a group that shares takes two engines, or one and stops sharing."""
    rows, infos = some_rows(4, 6)
    price = partial(row_flops, sites=infos)
    guided, blocks = Guided(two_call), blocks_of(infos)
    grouping = merging._Regrouping(merging._State.of([rows], blocks, guided, price), blocks, guided, price)
    count = len(grouping._held)
    assert count == 6
    assert any(len(grouping._ways(held)) == 2 for held in grouping._held) == two_call

    def costs(groups):
        """Of groups by the engines that they take."""
        ways = []
        for group in groups:
            held, calls = grouping._whole(group), sum(grouping._counts[row] for row in group)
            ways.append([(engines, calls * grouping._cost(held, shares)) for engines, shares in grouping._ways(held)])
        return [tuple(map(sum, zip(*chosen, strict=True))) for chosen in product(*ways)]

    order = list(range(count))[::-1]
    cuts = []
    for marks in product((False, True), repeat=count - 1):
        groups = [[order[0]]]
        for row, mark in zip(order[1:], marks, strict=True):
            groups = [*groups, [row]] if mark else [*groups[:-1], [*groups[-1], row]]
        cuts += costs(groups)
    for limit in range(1, count + 1):
        found = grouping.cut(order, limit)
        assert sorted(row for group in found for row in group.rows) == sorted(order)
        ways = [grouping._ways(grouping._whole(group.rows)) for group in found]
        taken = [
            {shares: engines for engines, shares in way}[group.shares] for way, group in zip(ways, found, strict=True)
        ]
        assert sum(taken) <= limit
        cost = sum(
            sum(grouping._counts[row] for row in group.rows) * grouping._cost(grouping._whole(group.rows), group.shares)
            for group in found
        )
        assert cost == pytest.approx(min(cost for engines, cost in cuts if engines <= limit))


def test_rows_of_the_planners_choice_under_as_many_rows_stay_as_they_are():
    table = made_table(steps=12)
    for most in (2, 3):
        plan = plan_from_table(table, budget=0.4, max_rows=most)
        found = merged([plan.decisions], plan.sites, most)
        assert found.rows == (plan.decisions,)
        assert found.engines <= most
