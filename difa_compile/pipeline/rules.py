"""A plan written by hand: a rule says what every site does at every step."""

from __future__ import annotations

from collections.abc import Callable

from difa_compile.decision import FULL, Decision
from difa_compile.errors import DecisionError
from difa_compile.pipeline.inspection import ModelInspection, inspect_model
from difa_compile.plan.cost import flops_saved
from difa_compile.plan.data import Cell, Settings, SiteInfo, blocks_of, model_digest
from difa_compile.plan.guidance import StatedGuidance, settle
from difa_compile.plan.plan import Plan
from difa_compile.plan.schedule import check_steps, uniform_progress


def plan_from_rule(
    model_or_pipe: object,
    steps: int,
    rule: Callable[[int, SiteInfo], Decision],
    *,
    inputs: dict[str, object] | None = None,
    conditional_half: int | None = None,
    guidance: str | None = None,
    blocks: Callable[[int, SiteInfo], Decision] | None = None,
) -> Plan:
    """Write a plan by hand: ``rule(step, site)`` is asked for every step and every attention site, steps outer.

    ``blocks(step, block)``: asked before that for every block; where its answer leaves a block out (reuse, forecast),
    the rule is not asked for the sites in it. Without it no block is left out.
    ``inputs``: keyword arguments of one call, as for :func:`difa_compile.pipeline.inspection.inspect_model`.
    ``conditional_half`` and ``guidance`` are for rules that share guidance halves, where the pipeline's way is not
    known: which half of a batched call is conditional (0 or 1), or ``"two-call"``. Such a plan has seen no
    schedule: its progress is uniform, and :meth:`Plan.resolve` goes by the position in the run. Raises
    :class:`ScheduleError` for a reader without filler or a wrong number of steps, :class:`DecisionError` if the
    rule returns no decision or what is said of guidance contradicts the pipeline, and what inspecting raises.
    """
    check_steps(steps)
    cfg = settle(model_or_pipe, StatedGuidance(guidance, conditional_half))
    inspection = inspect_model(model_or_pipe, inputs)
    sites = (*inspection.site_infos, *(inspection.blocks if blocks is not None else ()))
    if blocks is not None and not inspection.blocks:
        raise DecisionError(_no_block(inspection))
    rows = tuple(_row(step, sites, rule, blocks) for step in range(steps))
    settings = Settings(
        method="rule",
        guidance="none" if cfg.form == "unknown" else cfg.form,
        conditional_half=cfg.conditional_half,
        sample=inspection.sample,
    )
    return Plan(model_digest(inspection.model), settings, sites, uniform_progress(steps), rows)


def _row(
    step: int,
    sites: tuple[SiteInfo, ...],
    rule: Callable[[int, SiteInfo], Decision],
    blocks: Callable[[int, SiteInfo], Decision] | None,
) -> tuple[Cell, ...]:
    cells = {site.path: _cell(blocks(step, site), step, site) for site in sites if blocks is not None and site.is_block}
    for site, block in zip(sites, blocks_of(sites), strict=True):
        if not site.is_block:
            covered = block is not None and cells[sites[block].path].decision.kind.reads == "output"
            cells[site.path] = _cell(FULL if covered else rule(step, site), step, site)
    return tuple(cells[site.path] for site in sites)


def _no_block(inspection: ModelInspection) -> str:
    records = inspection.block_records
    why = f": {records[0].site}: {records[0].reason}" if records else ""
    return (
        f"{type(inspection.model).__name__} has no block that can be left out as a whole{why}. Write a plan for its "
        "attention sites alone"
    )


def _cell(decision: object, step: int, site: SiteInfo) -> Cell:
    if not isinstance(decision, Decision):
        raise DecisionError(f"the rule returned {decision!r} for step {step}, site {site.path}; it must be a Decision")
    return Cell(decision, (), flops_saved(decision, site))
