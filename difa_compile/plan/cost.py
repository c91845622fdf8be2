"""Cost model: operations of attention, counted from the decisions alone, and seconds, predicted from a machine profile.

Two conventions are in use and both are given everywhere:

* *attention*: ``4 * sum(mask) * inner``, the products q k^T and p v only (CLEAR, arXiv 2412.16112);
* *with projections*: that plus ``8 * tokens * width * inner`` for q, k, v and output projection (DiTFastAttn,
  arXiv 2406.08552, table 2).

``inner`` is heads x head_dim; one multiply-add is two operations; softmax, norms and copies are not counted. All counts
are whole numbers for ONE element of the batch. Where the CFG halves share one computation, an element costs half.

Seconds (:func:`site_seconds`) are of a whole batch on one machine, and need its profile
(:mod:`difa_compile.machine.profile`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from difa_compile.decision import FULL, Decision, Kind, Window
from difa_compile.layout import Layout
from difa_compile.machine.profile import ELEMENTWISE, LINEAR, FullCall, Profile, elementwise_work, linear_work
from difa_compile.ops.heads import slices_of
from difa_compile.ops.kernels import LocalCall
from difa_compile.ops.pairs import visible_pairs
from difa_compile.plan.data import SiteInfo, blocks_of
from difa_compile.plan.schedule import COVERED_ROLE, HeadCache, Role, in_effect


@dataclass(frozen=True)
class Flops:
    """Operations of one site at one step: q k^T and p v (``attention``); q, k, v and output ``projections``."""

    attention: int
    projections: int

    @property
    def total(self) -> int:
        """Operations with projections."""
        return self.attention + self.projections

    def count(self, with_projections: bool) -> int:
        """Operations in one of the two conventions."""
        return self.total if with_projections else self.attention


def attention_flops(
    decision: Decision,
    *,
    tokens: int,
    layout: Layout | None,
    heads: int,
    head_dim: int,
    width: int,
    residual_window: Window | None = None,
) -> Flops:
    """Operations of one site at one step, for one element of the batch.

    ``residual_window``: the step also takes a residual against this window, hence computes window attention too
    (:class:`difa_compile.plan.schedule.Role`). ``width`` is the input width of the projections. Reuse costs nothing,
    forecasts too (elementwise work is not counted), that of single heads their projections; CFG sharing costs half.
    Raises :class:`LayoutError` as :func:`visible_pairs` does.
    """
    if decision.kind.reads == "output":
        return Flops(0, 0)
    inner = heads * head_dim
    groups = [(len(group.heads), group.form) for group in decision.groups] or [(heads, decision)]
    pairs = sum(
        count * visible_pairs(layout, form.window, tokens) for count, form in groups if form.kind is not Kind.REUSE
    )  # of all heads
    if residual_window is not None:
        pairs += heads * visible_pairs(layout, residual_window, tokens)
    halves = 1 if decision.cfg_shared else 2
    return Flops(2 * halves * pairs * head_dim, 4 * halves * tokens * width * inner)


def site_flops(role: Role | Decision, site: SiteInfo) -> Flops:
    """:func:`attention_flops` of a role (taking a residual counted in) or of a bare decision at ``site``.

    Where the layout is unknown no window can be carried out, so a windowed site counts as the full one that will run.
    A site that its block covers costs nothing. A block has no attention but that of its sites: it counts none.
    """
    if site.is_block or (isinstance(role, Role) and role.covered):
        return Flops(0, 0)
    decision, residual_window = _carried_out(role, site)
    flops = attention_flops(
        decision,
        tokens=site.tokens,
        layout=site.layout,
        heads=site.heads,
        head_dim=site.head_dim,
        width=site.width,
        residual_window=residual_window,
    )
    halves = 1 if decision.cfg_shared else 2
    pairs = sum(
        len(cache.heads) * visible_pairs(site.layout, cache.window, site.tokens)
        for cache in _head_caches(role)
        if cache.window is not None and site.layout is not None
    )
    return Flops(flops.attention + 2 * halves * pairs * site.head_dim, flops.projections)


def _head_caches(role: Role | Decision) -> tuple[HeadCache, ...]:
    """The caches of single heads that a step writes."""
    return role.head_writes if isinstance(role, Role) else ()


def _carried_out(role: Role | Decision, site: SiteInfo) -> tuple[Decision, Window | None]:
    """The decision that will run and the window its residual is taken against: none where the layout is unknown."""
    decision, residual_window = (role.decision, role.residual_window) if isinstance(role, Role) else (role, None)
    if site.layout is not None:
        return decision, residual_window
    return without_window(decision), None


def without_window(decision: Decision) -> Decision:
    """Full attention in place of a window, be it of some heads, sharing the CFG halves as before; any other decision as
    it is."""
    return Decision(Kind.FULL, None, decision.cfg_shared) if decision.windows else decision


def full_flops(site: SiteInfo) -> Flops:
    """Operations of ``site`` as the model computes it; none for a block, whose attention is that of its sites."""
    if site.is_block:
        return Flops(0, 0)
    return Flops(4 * site.tokens * site.keys * site.inner, 8 * site.tokens * site.width * site.inner)


def flops_saved(decision: Decision, site: SiteInfo) -> float:
    """Share of the site's operations, projections included, that ``decision`` does not compute; in [0, 1]. Of a block
    all or nothing."""
    if site.is_block:
        return float(decision.kind.reads == "output")
    return 1.0 - site_flops(decision, site).total / full_flops(site).total


@dataclass(frozen=True)
class Setting:
    """What a prediction needs to know beside the site: ``batch`` elements (both CFG halves), dtype, device.

    ``key_heads``, ``value_dim``: as in :class:`~difa_compile.ops.kernels.LocalCall`. ``masked``: the attention has a
    mask of its own.
    """

    batch: int
    dtype: torch.dtype
    device: torch.device
    key_heads: int | None = None
    value_dim: int = 0
    masked: bool = False


def site_seconds(role: Role | Decision, site: SiteInfo, setting: Setting, profile: Profile) -> float | None:
    """Predicted seconds of one site at one step, for the whole batch: projections, attention, what residuals take.

    A role that takes a residual computes its window as well. Reuse takes no time, nor does a site that its block covers
    (a block's own work is not predicted); CFG sharing that of half the batch and a copy; a forecast that of its sum.
    Groups of heads take their attention, slice by slice, and one pass to join them. None where the profile cannot tell:
    a dtype or kernel that was not measured, attention under a mask.
    """
    if site.is_block or (isinstance(role, Role) and role.covered):
        return 0.0
    decision, residual_window = _carried_out(role, site)
    if decision.kind is Kind.REUSE:
        return 0.0
    if decision.kind is Kind.FORECAST:
        elements = setting.batch * site.tokens * site.width
        sums = [_passes(profile, setting, elements, 2) for _ in range(decision.order + 1)]
        return _total(sums)
    if setting.masked:
        return None
    batch = max(1, setting.batch // 2) if decision.cfg_shared else setting.batch
    dtype, device = setting.dtype, setting.device

    sharing = site.heads // (setting.key_heads or site.heads)

    def attention(window: Window | None, heads: int = site.heads) -> float | None:
        keys = None if setting.key_heads is None else max(1, heads // sharing)
        if window is None:
            call = FullCall(batch, heads, site.tokens, site.keys, site.head_dim, setting.value_dim, keys)
            return profile.full_seconds(call, dtype)
        assert site.layout is not None
        shape = (batch, heads, site.tokens, site.head_dim)
        return profile.local_seconds(
            LocalCall(site.layout, window, None, shape, dtype, device, False, keys, setting.value_dim)
        )

    def attention_of(heads: tuple[int, ...], window: Window | None) -> list[float | None]:
        return [attention(window, cut.count) for cut in slices_of(heads, sharing)]

    def passes(elements: int, reads: float) -> float | None:
        return _passes(profile, setting, elements, reads)

    into = profile.seconds(LINEAR, dtype, linear_work(batch * site.tokens, site.width, site.inner))
    out = profile.seconds(LINEAR, dtype, linear_work(batch * site.tokens, site.inner, site.width))
    parts = [into, into, into, out]
    if decision.groups:
        for group in decision.groups:
            if group.form.kind is not Kind.REUSE:
                parts += attention_of(group.heads, group.form.window)
        added = sum(len(group.heads) for group in decision.groups if group.form.kind is Kind.WINDOW_RESIDUAL)
        parts.append(passes(batch * site.tokens * site.inner, 1 + added / site.heads))  # joins them
    else:
        parts.append(attention(decision.window))
    if decision.kind is Kind.WINDOW_RESIDUAL:
        parts.append(passes(batch * site.tokens * site.inner, 2))
    if residual_window is not None:
        parts += [attention(residual_window), passes(batch * site.tokens * site.inner, 2)]
    for cache in _head_caches(role):
        if cache.window is not None and site.layout is not None:
            parts += attention_of(cache.heads, cache.window)
        parts.append(passes(batch * site.tokens * len(cache.heads) * site.head_dim, 2 if cache.window else 1))
    if decision.cfg_shared:
        parts.append(passes(setting.batch * site.tokens * site.width, 0.5))
    return _total(parts)


def _passes(profile: Profile, setting: Setting, elements: int, reads: float) -> float | None:
    """Seconds of one elementwise operation that reads its ``elements`` so many times."""
    work = elementwise_work(elements, setting.dtype, setting.device, reads)
    return profile.seconds(ELEMENTWISE, setting.dtype, work)


def _total(parts: Sequence[float | None]) -> float | None:
    """The sum; None where a part is not known."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


class Costed(Protocol):
    """What can be costed: a plan or a resolved plan."""

    @property
    def sites(self) -> tuple[SiteInfo, ...]: ...

    @property
    def roles(self) -> tuple[tuple[Role, ...], ...]: ...


@dataclass(frozen=True)
class PlanCost:
    """Operations of a whole run in one convention, for one element of the batch.

    ``full[site]``: of the unmodified model, the same at every step. ``planned[step][site]``: with the plan, residuals
    counted in. ``residuals[step][site]``: the part of ``planned`` spent on taking residuals.
    """

    with_projections: bool
    full: tuple[int, ...]
    planned: tuple[tuple[int, ...], ...]
    residuals: tuple[tuple[int, ...], ...]

    @property
    def steps(self) -> int:
        return len(self.planned)

    @property
    def full_per_step(self) -> int:
        """Operations of the unmodified model in any one step."""
        return sum(self.full)

    @property
    def full_per_site(self) -> tuple[int, ...]:
        """Operations of the unmodified model over the whole run, per site."""
        return tuple(flops * self.steps for flops in self.full)

    @property
    def planned_per_step(self) -> tuple[int, ...]:
        return tuple(sum(row) for row in self.planned)

    @property
    def planned_per_site(self) -> tuple[int, ...]:
        return tuple(sum(column) for column in zip(*self.planned, strict=True))

    @property
    def total_full(self) -> int:
        return self.full_per_step * self.steps

    @property
    def total_planned(self) -> int:
        return sum(self.planned_per_step)

    @property
    def total_residuals(self) -> int:
        """Operations spent on taking residuals; part of ``total_planned``."""
        return sum(map(sum, self.residuals))

    @property
    def share(self) -> float:
        """Planned over full: 1 computes everything, 0 nothing."""
        return self.total_planned / self.total_full


def plan_flops(plan: Costed, with_projections: bool) -> PlanCost:
    """Operations of a :class:`Plan` or :class:`ResolvedPlan` over its schedule, in one of the two conventions."""
    sites = plan.sites
    planned = []
    residuals = []
    for row in plan.roles:
        bare = [
            site_flops(COVERED_ROLE if role.covered else role.decision, site).count(with_projections)
            for role, site in zip(row, sites, strict=True)
        ]
        with_residual = [site_flops(role, site).count(with_projections) for role, site in zip(row, sites, strict=True)]
        planned.append(tuple(with_residual))
        residuals.append(tuple(all_ - part for all_, part in zip(with_residual, bare, strict=True)))
    full = tuple(full_flops(site).count(with_projections) for site in sites)
    return PlanCost(with_projections, full, tuple(planned), tuple(residuals))


def block_flops(plan: Costed) -> PlanCost | None:
    """Operations of a plan's blocks, over its schedule: their linears, convolutions and attention.

    A block that is reused or forecast computes nothing; of one that is full is left out what its attention sites leave
    out. None where the plan names no block or does not know their operations.
    """
    held = blocks_of(plan.sites)
    blocks = [index for index, site in enumerate(plan.sites) if site.is_block and held[index] is None]
    known = [plan.sites[index].flops for index in blocks]
    full = tuple(flops for flops in known if flops is not None)
    if not full or len(full) < len(blocks):
        return None
    planned = [
        tuple(
            max(0, flops - _left_out(row, plan.sites, held, block)) for block, flops in zip(blocks, full, strict=True)
        )
        for row in plan.roles
    ]
    return PlanCost(True, full, tuple(planned), tuple((0,) * len(blocks) for _ in planned))


def _left_out(row: Sequence[Role], sites: Sequence[SiteInfo], held: Sequence[int | None], site: int) -> int:
    """Operations of a site, or of a block with all that it holds, that a row of roles does not compute."""
    info = sites[site]
    if row[site].covered:
        return 0
    if not info.is_block:
        return full_flops(info).total - site_flops(row[site], info).total
    if row[site].reads_output:
        return info.flops or 0
    return sum(_left_out(row, sites, held, inner) for inner, block in enumerate(held) if block == site)


def row_flops(row: Sequence[Role], sites: Sequence[SiteInfo]) -> int:
    """Operations of one step, for one element of the batch: of the blocks that ``sites`` name and of the attention
    outside of them, and one for each number of a cache that is written. To compare rows of one model by."""
    held = blocks_of(sites)
    outermost = [index for index, block in enumerate(held) if block is None]
    full = sum((sites[i].flops or 0) if sites[i].is_block else full_flops(sites[i]).total for i in outermost)
    written = sum(
        site.tokens * (role.emit_output * site.width + role.emit_residual * site.inner)
        + site.tokens * site.head_dim * sum(len(cache.heads) for cache in role.head_writes)
        for role, site in zip(row, sites, strict=True)
    )
    return full - sum(_left_out(row, sites, held, i) for i in outermost) + written


@dataclass(frozen=True)
class Contribution:
    """What a decision leaves out: at how many ``cells`` (sites, blocks) it stands, and the ``share`` of the full run's
    operations that it does not compute, of its blocks or of its attention."""

    decision: Decision
    cells: int
    share: float


def counts_blocks(plan: Costed) -> bool:
    """Whether a plan names blocks and knows the operations of each that is in no other."""
    held = blocks_of(plan.sites)
    blocks = [site for site, block in zip(plan.sites, held, strict=True) if block is None and site.is_block]
    return bool(blocks) and all(site.flops is not None for site in blocks)


def contributions(plan: Costed) -> tuple[Contribution, ...]:
    """What each decision of a plan leaves out, the most first. The full run's operations are those of the blocks that
    the plan names and of the attention sites outside of them; of attention alone unless :func:`counts_blocks`."""
    sites, held = plan.sites, blocks_of(plan.sites)
    outermost = [index for index, block in enumerate(held) if block is None]
    by_blocks = counts_blocks(plan)
    counted = [i for i in range(len(sites)) if by_blocks or not sites[i].is_block]
    total = sum(
        (sites[i].flops or 0) if sites[i].is_block else full_flops(sites[i]).total
        for i in (outermost if by_blocks else counted)
    )
    cells: dict[Decision, int] = {}
    left_out: dict[Decision, int] = {}
    done = in_effect([[role.decision for role in row] for row in plan.roles], held)
    for row, seen in zip(plan.roles, done, strict=True):
        for index in counted:
            role, decision = row[index], seen[index]
            if role.covered and by_blocks:
                continue  # the block's
            cells[decision] = cells.get(decision, 0) + 1
            if role.covered:
                left_out[decision] = left_out.get(decision, 0) + full_flops(sites[index]).total
            elif role.reads_output or not sites[index].is_block:  # of a full block, what is in it leaves something out
                left_out[decision] = left_out.get(decision, 0) + _left_out(row, sites, held, index)
    found = [
        Contribution(decision, count, max(0, left_out.get(decision, 0)) / (total * len(plan.roles)))
        for decision, count in cells.items()
    ]
    return tuple(sorted(found, key=lambda each: (-each.share, str(each.decision))))


@dataclass(frozen=True)
class PlanSeconds:
    """Predicted seconds of a whole run's attention sites on one machine, with projections, for ``batch`` elements."""

    dtype: torch.dtype
    batch: int
    full: float
    planned: float
    extrapolated: bool
    """Whether a site has more tokens than were measured."""


def plan_seconds(plan: Costed, profile: Profile, dtype: torch.dtype, batch: int) -> PlanSeconds | None:
    """Predicted seconds of a plan over its schedule; None where the profile cannot tell. Masks are not known here."""
    setting = Setting(batch, dtype, torch.device(profile.machine.device))
    known: dict[tuple[SiteInfo, Role | Decision], float | None] = {}

    def seconds(role: Role | Decision, site: SiteInfo) -> float | None:
        if (site, role) not in known:
            known[site, role] = site_seconds(role, site, setting, profile)
        return known[site, role]

    planned = [seconds(role, site) for row in plan.roles for role, site in zip(row, plan.sites, strict=True)]
    full = [seconds(FULL, site) for site in plan.sites]
    totals = [sum(part for part in parts if part is not None) for parts in (full, planned)]
    if None in planned or None in full:
        return None
    extrapolated = any(profile.extrapolates(site.keys, dtype) for site in plan.sites)
    return PlanSeconds(dtype, batch, totals[0] * len(plan.roles), totals[1], extrapolated)


@dataclass(frozen=True)
class CostBreakdown:
    """The cost of a plan in both conventions, and in predicted seconds per dtype measured, if there is a profile."""

    attention: PlanCost
    with_projections: PlanCost
    seconds: tuple[PlanSeconds, ...] = ()
    blocks: PlanCost | None = None
    """Operations of whole blocks, where the plan names them."""

    def lines(self) -> tuple[str, ...]:
        """Lines of text: share of full and operations of a run, for one image of a batch; then predicted seconds."""
        counted = tuple(
            f"{name:<32} {100 * cost.share:5.1f} % of full  ({_scaled(cost.total_planned)} of "
            f"{_scaled(cost.total_full)}, {_scaled(cost.total_residuals)} of it for residuals)"
            for name, cost in (
                ("attention FLOPs, q k^T and p v", self.attention),
                ("attention FLOPs with projections", self.with_projections),
            )
        )
        if self.blocks is not None:
            counted += (
                f"{'FLOPs of the blocks':<32} {100 * self.blocks.share:5.1f} % of full  "
                f"({_scaled(self.blocks.total_planned)} of {_scaled(self.blocks.total_full)})",
            )
        predicted = tuple(
            f"{'predicted time, ' + str(one.dtype).removeprefix('torch.'):<32} {100 * one.planned / one.full:5.1f} % "
            f"of full  ({seconds_text(one.planned)} of {seconds_text(one.full)} on this machine, batch of {one.batch}"
            f"{', extrapolated' if one.extrapolated else ''})"
            for one in self.seconds
        )
        return counted + predicted


def cost_breakdown(plan: Costed, profile: Profile | None = None, batch: int = 1) -> CostBreakdown:
    """The cost of a plan or resolved plan in both conventions, per step and per site.

    With a ``profile`` also the predicted seconds for a batch of ``batch`` in each dtype that it covers.
    """
    found = [plan_seconds(plan, profile, dtype, batch) for dtype in profile.dtypes] if profile is not None else []
    seconds = tuple(one for one in found if one is not None)
    return CostBreakdown(plan_flops(plan, False), plan_flops(plan, True), seconds, block_flops(plan))


def seconds_text(seconds: float) -> str:
    """``seconds`` with a unit: ``3.1 ms``."""
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def _scaled(flops: int) -> str:
    """``flops`` with a unit: ``12.3 GFLOP``."""
    value = float(flops)
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} PFLOP"
