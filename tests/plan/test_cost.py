"""The cost model against brute force and against the tables of both papers."""

from __future__ import annotations

from dataclasses import replace
from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difa_compile.decision import FULL, REUSE, Decision, Kind, Window, WindowShape
from difa_compile.layout import Layout
from difa_compile.plan.cost import (
    Flops,
    attention_flops,
    cost_breakdown,
    flops_saved,
    full_flops,
    plan_flops,
    row_flops,
    site_flops,
    without_window,
)
from difa_compile.plan.plan import Cell, ModelInfo, Plan, Settings, SiteInfo
from difa_compile.plan.schedule import HeadCache, Role, uniform_progress
from tests.support.two_attentions import RESIDUAL, SHARED, D

layouts = st.builds(
    Layout, st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), st.integers(0, 3), st.integers(0, 3)
)
windows = st.builds(Window, st.sampled_from(WindowShape), st.integers(1, 9))


# DiTFastAttn, table 2: share of attention FLOPs, projections included, d = 1152, band of N/8 per side. The window
# column is known to three digits, the others as printed.
@pytest.mark.parametrize(
    ("side", "printed_window", "printed_window_cfg"), [(32, "76.5", "38"), (64, "51.0", "26"), (128, "32.9", "16")]
)
def test_ditfastattn_table_2(side: int, printed_window: str, printed_window_cfg: str) -> None:
    tokens = side * side
    site = SiteInfo("blocks.0.attn1", "self", 16, 72, tokens, 1152, Layout((side, side)))
    window = Window(WindowShape.BAND, tokens // 8)

    def share(decision: Decision) -> float:
        return 100 * site_flops(decision, site).total / full_flops(site).total

    assert f"{share(Decision(Kind.WINDOW_RESIDUAL, window)):.1f}" == printed_window
    assert f"{share(Decision(Kind.WINDOW_RESIDUAL, window, True)):.0f}" == printed_window_cfg
    assert share(Decision(Kind.FULL, None, True)) == 50
    assert share(REUSE) == 0
    assert share(FULL) == 100


# CLEAR, GFLOPs per layer of FLUX: 4 * sum(mask) * c with c = 3072, 512 text tokens, 16 pixels per token. The 8192
# column is printed in tens (dense: with five digits), rounded from whole GFLOPs: 13 084.97 -> 13 085 -> 13 090.
@pytest.mark.parametrize(
    ("radius", "printed"),
    [
        (None, ["260.9", "3507.9", "53604.4", "847730"]),
        (8, ["63.5", "246.2", "979.3", "3920"]),
        (16, ["86.6", "352.6", "1433.2", "5790"]),
        (32, ["154.1", "724.3", "3141.7", "13090"]),
    ],
)
def test_clear_gflops_table(radius: int | None, printed: list[str]) -> None:
    decision = FULL if radius is None else Decision(Kind.WINDOW, Window(WindowShape.DISC, radius))
    found = []
    for pixels in (1024, 2048, 4096, 8192):
        layout = Layout((pixels // 16, pixels // 16), before=512)
        flops = attention_flops(decision, tokens=layout.tokens, layout=layout, heads=24, head_dim=128, width=3072)
        gflops = Decimal(flops.attention) / 10**9
        if pixels < 8192:
            found.append(str(gflops.quantize(Decimal("0.1"))))
        else:
            whole = gflops.quantize(Decimal(1), ROUND_HALF_UP)
            found.append(str(int((whole / 10).quantize(Decimal(1), ROUND_HALF_UP)) * 10))
    assert found == printed


def test_projections_and_attention_are_counted_apart() -> None:
    site = SiteInfo("a", "joint", 3, 5, 8, 7, Layout((2, 3), before=2))
    assert full_flops(site) == Flops(attention=4 * 64 * 15, projections=8 * 8 * 7 * 15)
    assert site_flops(FULL, site) == full_flops(site)
    assert full_flops(site).count(False) == 3840
    assert full_flops(site).count(True) == 3840 + 6720


def test_taking_a_residual_costs_the_window_attention() -> None:
    site = SiteInfo("a", "self", 2, 4, 16, 8, Layout((4, 4)))
    window = Window(WindowShape.BAND, 3)
    plain = site_flops(FULL, site)
    taking = site_flops(Role(FULL, emit_residual=True, residual_window=window), site)
    assert taking.projections == plain.projections
    windowed = site_flops(Decision(Kind.WINDOW, window), site)
    assert taking.attention == plain.attention + windowed.attention
    shared = Decision(Kind.FULL, None, True)
    assert 2 * site_flops(Role(shared, emit_residual=True, residual_window=window), site).total == taking.total


def test_each_head_costs_what_its_form_costs() -> None:
    """DiTFastAttnV2 (arXiv 2503.22796): its heads' candidates are reuse and windows of 1/8, 1/16, 1/32 of the image."""
    site = SiteInfo("a", "joint", 4, 8, 72, 32, Layout((8, 8), after=8))
    forms = [FULL, REUSE, D("window(band:4)"), D("window(band:2)+residual")]
    decision = Decision.of_heads(forms)
    found = site_flops(decision, site)
    assert found.attention * 4 == sum(site_flops(form, site).attention for form in forms)
    assert found.projections == full_flops(site).projections, "weights are whole, whatever is reused"
    shared = site_flops(replace(decision, cfg_shared=True), site)
    assert 2 * shared.total == found.total
    one, other = Window(WindowShape.BAND, 2), Window(WindowShape.DISC, 3)
    caches = (HeadCache((0, 2), one), HeadCache((1,), other), HeadCache((3,)))
    taking = site_flops(Role(FULL, head_writes=caches), site)
    near = [site_flops(Decision(Kind.WINDOW, window), site).attention // 4 for window in (one, other)]
    assert taking.attention == full_flops(site).attention + 2 * near[0] + near[1]
    assert without_window(decision) == FULL
    reusing = Decision.of_heads([FULL, REUSE])
    assert without_window(reusing) == reusing
    unknown = replace(site, layout=None, tokens=72)
    assert site_flops(decision, unknown) == full_flops(unknown)


def test_where_no_layout_is_known_a_window_counts_as_full() -> None:
    site = SiteInfo("a", "self", 2, 4, 16, 8, None)
    assert site_flops(Decision(Kind.WINDOW, Window(WindowShape.BAND, 3)), site) == full_flops(site)
    assert flops_saved(Decision(Kind.WINDOW, Window(WindowShape.BAND, 3), True), site) == 0.5


@given(layouts, windows, st.booleans())
def test_saved_is_a_share(layout: Layout, window: Window, shared: bool) -> None:
    site = SiteInfo("a", "self", 2, 4, layout.tokens, 8, layout)
    for decision in (Decision(Kind.FULL, None, shared), Decision(Kind.WINDOW, window, shared), REUSE):
        saved = flops_saved(decision, site)
        assert 0 <= saved <= 1
        assert shared is False or saved >= 0.5


def small_plan() -> Plan:
    """Two sites of different size, three steps: full; full taking a residual and window; window+residual and reuse."""
    window = Window(WindowShape.BAND, 2)
    sites = (
        SiteInfo("a", "self", 2, 4, 16, 8, Layout((4, 4))),
        SiteInfo("b", "self", 1, 4, 4, 8, Layout((2, 2))),
    )
    decisions = [
        [FULL, FULL],
        [FULL, Decision(Kind.WINDOW, window, True)],
        [Decision(Kind.WINDOW_RESIDUAL, window), REUSE],
    ]
    return Plan(
        ModelInfo("Toy", "0" * 64, 10),
        Settings("rule"),
        sites,
        uniform_progress(3),
        tuple(tuple(Cell(decision) for decision in row) for row in decisions),
    )


def test_plan_flops_by_hand() -> None:
    plan = small_plan()
    cost = plan_flops(plan, with_projections=False)
    band_a = 16 * 5 - 2 * 3  # pairs of 16 tokens at most 2 apart
    band_b = 4 * 5 - 2 * 3
    full_a, full_b = 4 * 256 * 8, 4 * 16 * 4
    assert cost.full == (full_a, full_b)
    assert cost.planned == (
        (full_a, full_b),
        (full_a + 4 * band_a * 8, 2 * band_b * 4),
        (4 * band_a * 8, 0),
    )
    assert cost.residuals == ((0, 0), (4 * band_a * 8, 0), (0, 0))
    assert cost.total_residuals == 4 * band_a * 8
    assert cost.total_full == 3 * (full_a + full_b)
    assert cost.total_planned == sum(cost.planned_per_step) == sum(cost.planned_per_site)
    assert cost.full_per_site == (3 * full_a, 3 * full_b)
    assert cost.share == cost.total_planned / cost.total_full
    assert cost.planned_per_step[0] == cost.full_per_step
    assert cost.planned_per_site[1] == full_b + 2 * band_b * 4


def test_projections_add_the_same_to_full_and_window() -> None:
    plan = small_plan()
    without, with_ = (plan_flops(plan, convention) for convention in (False, True))
    projections_a, projections_b = 8 * 16 * 8 * 8, 8 * 4 * 8 * 4
    assert [a - b for a, b in zip(with_.full, without.full, strict=True)] == [projections_a, projections_b]
    added = [
        tuple(a - b for a, b in zip(x, y, strict=True)) for x, y in zip(with_.planned, without.planned, strict=True)
    ]
    assert added == [(projections_a, projections_b), (projections_a, projections_b // 2), (projections_a, 0)]
    assert with_.residuals == without.residuals


def test_breakdown_gives_both_conventions_for_plans_and_resolved_plans() -> None:
    plan = small_plan()
    breakdown = cost_breakdown(plan)
    assert breakdown.attention == plan_flops(plan, False)
    assert breakdown.with_projections == plan_flops(plan, True)
    assert cost_breakdown(plan.resolve(3)) == breakdown
    first, second = breakdown.lines()
    assert f"{100 * breakdown.attention.share:.1f} % of full" in first
    assert f"{100 * breakdown.with_projections.share:.1f} % of full" in second


def test_what_replaces_a_window_shares_as_it_did():
    assert without_window(SHARED) == D("full+cfg")
    assert without_window(RESIDUAL) == FULL
    assert without_window(REUSE) == REUSE


def test_rows_of_a_step_cost_blocks_and_attention_and_what_is_written() -> None:
    site = SiteInfo("blocks.0.attn1", "self", 4, 8, 16, 32, Layout((4, 4)))
    block = SiteInfo("blocks.0", "block", 1, 32, 16, 32, None, 10**6)
    attention = full_flops(site).total
    full, reuse, covered = Role(FULL), Role(REUSE), Role(FULL, covered=True)
    assert row_flops([full], [site]) == attention
    assert row_flops([reuse], [site]) == 0
    assert row_flops([full, full], [site, block]) == 10**6
    assert row_flops([reuse, full], [site, block]) == 10**6 - attention
    assert row_flops([covered, reuse], [site, block]) == 0
    assert row_flops([Role(FULL, emit_output=True)], [site]) == attention + 16 * 32
    taking = Role(FULL, emit_residual=True, residual_window=Window("box", 1))
    window = site_flops(taking, site).total
    assert row_flops([taking], [site]) == window + 16 * 32 > attention + 16 * 32
    heads = Role(FULL, head_writes=(HeadCache((0, 2)),))
    assert row_flops([heads], [site]) == attention + 16 * 2 * 8
