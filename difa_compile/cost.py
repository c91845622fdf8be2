"""Cost model: floating-point operations of attention, counted from the decisions alone.

Two conventions are in use and both are given everywhere:

* *attention*: ``4 * sum(mask) * inner``, the products q k^T and p v only (CLEAR, arXiv 2412.16112);
* *with projections*: that plus ``8 * tokens * width * inner`` for q, k, v and output projection (DiTFastAttn,
  arXiv 2406.08552, table 2).

``inner`` is heads x head_dim; one multiply-add is two operations; softmax, norms and copies are not counted. All counts
are whole numbers for ONE element of the batch. Where the CFG halves share one computation, an element costs half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from difa_compile.decision import Decision, Kind, Window, WindowShape
from difa_compile.errors import LayoutError
from difa_compile.layout import Layout
from difa_compile.plan_data import SiteInfo
from difa_compile.schedule import Role


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


def visible_pairs(layout: Layout | None, window: Window | None, tokens: int) -> int:
    """Number of (query, key) pairs that may attend: ``sum(mask)``. Exact, without building the mask.

    ``tokens`` queries: all of the layout's or those of ``layout.rows``. Without window they see every key. With one,
    text sees and is seen by everything and image tokens see the image tokens of their neighbourhood. Work grows with
    the grid's height (times its length in time), not with the number of pairs.
    Raises :class:`LayoutError` if a window meets no layout, or a layout of another number of tokens.
    """
    if window is None:
        return tokens * (tokens if layout is None else layout.tokens)
    if layout is None:
        raise LayoutError(f"the window {window} needs a token layout, but none is known; give the grid of the image")
    if not layout.holds(tokens):
        layout.check(tokens, f"window {window}")
    image = layout.image_tokens
    other = layout.tokens - image
    return (tokens - image) * layout.tokens + image * other + _image_pairs(layout.grid, window)


@lru_cache(maxsize=1024)
def _image_pairs(grid: tuple[int, ...], window: Window) -> int:
    """Pairs of image tokens that see each other."""
    radius = window.radius
    if window.shape is WindowShape.BAND:
        return _axis_pairs(math.prod(grid), radius)
    if window.shape is WindowShape.BOX:
        return math.prod(_axis_pairs(size, radius) for size in grid)
    return _disc_pairs(grid, radius * radius - 1)


def _axis_pairs(size: int, reach: int) -> int:
    """Pairs (i, j) in ``range(size)`` with ``|i - j| <= reach``: sum over offsets o of ``size - |o|``."""
    reach = min(reach, size - 1)
    return size * (2 * reach + 1) - reach * (reach + 1)


def _disc_pairs(grid: tuple[int, ...], budget: int) -> int:
    """Pairs of grid tokens whose squared offsets add up to at most ``budget`` (>= 0); the last axis in closed form."""
    reach = math.isqrt(budget)
    if len(grid) == 1:
        return _axis_pairs(grid[0], reach)
    size, rest = grid[0], grid[1:]
    pairs = size * _disc_pairs(rest, budget)
    for offset in range(1, min(reach, size - 1) + 1):
        pairs += 2 * (size - offset) * _disc_pairs(rest, budget - offset * offset)
    return pairs


def window_keys(window: Window, dims: int = 2) -> int:
    """Image keys that an interior token sees on an unbounded grid of ``dims`` dimensions, itself included.

    A disc of radius 8, 16, 32 on an image has 193, 793, 3205. A band is 1-D whatever the grid.
    """
    side = 2 * window.radius + 1
    if window.shape is WindowShape.BAND:
        return side
    if window.shape is WindowShape.BOX:
        return int(side**dims)
    return _ball(dims, window.radius * window.radius - 1)


def _ball(dims: int, budget: int) -> int:
    """Whole-number points of a ``dims``-dimensional ball of squared radius ``budget``."""
    reach = math.isqrt(budget)
    if dims == 1:
        return 2 * reach + 1
    return sum(_ball(dims - 1, budget - offset * offset) for offset in range(-reach, reach + 1))


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
    (:class:`difa_compile.schedule.Role`). ``width`` is the input width of the projections. Reuse costs nothing; CFG
    sharing costs half. Raises :class:`LayoutError` as :func:`visible_pairs` does.
    """
    if decision.kind is Kind.REUSE:
        return Flops(0, 0)
    inner = heads * head_dim
    pairs = visible_pairs(layout, decision.window, tokens)
    if residual_window is not None:
        pairs += visible_pairs(layout, residual_window, tokens)
    halves = 1 if decision.cfg_shared else 2
    return Flops(2 * halves * pairs * inner, 4 * halves * tokens * width * inner)


def site_flops(role: Role | Decision, site: SiteInfo) -> Flops:
    """:func:`attention_flops` of a role (taking a residual counted in) or of a bare decision at ``site``.

    Where the layout is unknown no window can be carried out, so a windowed site counts as the full one that will run.
    """
    decision, residual_window = (role.decision, role.residual_window) if isinstance(role, Role) else (role, None)
    if site.layout is None and decision.window is not None:
        decision = Decision(Kind.FULL, None, decision.cfg_shared)
    if site.layout is None:
        residual_window = None
    return attention_flops(
        decision,
        tokens=site.tokens,
        layout=site.layout,
        heads=site.heads,
        head_dim=site.head_dim,
        width=site.width,
        residual_window=residual_window,
    )


def full_flops(site: SiteInfo) -> Flops:
    """Operations of ``site`` as the model computes it."""
    return Flops(4 * site.tokens * site.keys * site.inner, 8 * site.tokens * site.width * site.inner)


def flops_saved(decision: Decision, site: SiteInfo) -> float:
    """Share of the site's operations, projections included, that ``decision`` does not compute; in [0, 1]."""
    return 1.0 - site_flops(decision, site).total / full_flops(site).total


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

    @property
    def share_per_step(self) -> tuple[float, ...]:
        return tuple(flops / self.full_per_step for flops in self.planned_per_step)

    @property
    def share_per_site(self) -> tuple[float, ...]:
        full = self.full_per_site
        return tuple(planned / whole for planned, whole in zip(self.planned_per_site, full, strict=True))


def plan_flops(plan: Costed, with_projections: bool) -> PlanCost:
    """Operations of a :class:`Plan` or :class:`ResolvedPlan` over its schedule, in one of the two conventions."""
    sites = plan.sites
    planned = []
    residuals = []
    for row in plan.roles:
        bare = [site_flops(role.decision, site).count(with_projections) for role, site in zip(row, sites, strict=True)]
        with_residual = [site_flops(role, site).count(with_projections) for role, site in zip(row, sites, strict=True)]
        planned.append(tuple(with_residual))
        residuals.append(tuple(all_ - part for all_, part in zip(with_residual, bare, strict=True)))
    full = tuple(full_flops(site).count(with_projections) for site in sites)
    return PlanCost(with_projections, full, tuple(planned), tuple(residuals))


@dataclass(frozen=True)
class CostBreakdown:
    """The cost of a plan in both conventions."""

    attention: PlanCost
    with_projections: PlanCost

    def lines(self) -> tuple[str, ...]:
        """Two lines of text: share of full and operations of a run, for one image of a batch."""
        return tuple(
            f"{name:<32} {100 * cost.share:5.1f} % of full  ({_scaled(cost.total_planned)} of "
            f"{_scaled(cost.total_full)}, {_scaled(cost.total_residuals)} of it for residuals)"
            for name, cost in (
                ("attention FLOPs, q k^T and p v", self.attention),
                ("attention FLOPs with projections", self.with_projections),
            )
        )


def cost_breakdown(plan: Costed) -> CostBreakdown:
    """The cost of a plan or resolved plan in both conventions, per step and per site."""
    return CostBreakdown(plan_flops(plan, False), plan_flops(plan, True))


def _scaled(flops: int) -> str:
    """``flops`` with a unit: ``12.3 GFLOP``."""
    value = float(flops)
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} PFLOP"
