"""A plan written by hand: a rule says what every site does at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    spans: Callable[[int, SiteInfo], Decision] | None = None,
) -> Plan:
    """Write a plan by hand: ``rule(step, site)`` is asked for every step and every attention site, steps outer.

    ``blocks(step, block)`` and ``spans(step, span)``: asked before that for every block, and every span of blocks;
    where the answer leaves one out (reuse, forecast), nothing is asked for what it holds. Without them no block and no
    span is left out, and the plan names none.
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
    named = [block for block in inspection.blocks if (spans if block.blocks else blocks) is not None]
    sites = (*inspection.site_infos, *named)
    if not named and (blocks is not None or spans is not None):
        raise DecisionError(_no_block(inspection))
    asked = {False: blocks or rule, True: spans or rule}
    rows = tuple(
        _row(step, sites, lambda step, site: (asked[bool(site.blocks)] if site.is_block else rule)(step, site))
        for step in range(steps)
    )
    settings = Settings(
        method="rule",
        guidance="none" if cfg.form == "unknown" else cfg.form,
        conditional_half=cfg.conditional_half,
        sample=inspection.sample,
    )
    return Plan(model_digest(inspection.model), settings, sites, uniform_progress(steps), rows)


def _row(step: int, sites: Sequence[SiteInfo], rule: Callable[[int, SiteInfo], Decision]) -> tuple[Cell, ...]:
    held = blocks_of(sites)
    cells: dict[int, Cell] = {}
    left_out: dict[int | None, bool] = {None: False}

    def decide(index: int) -> None:
        block = held[index]
        if block is not None and block not in cells:
            decide(block)
        cell = _cell(FULL if left_out[block] else rule(step, sites[index]), step, sites[index])
        cells[index] = cell
        left_out[index] = left_out[block] or cell.decision.kind.reads == "output"

    for index in range(len(sites)):
        if index not in cells:
            decide(index)
    return tuple(cells[index] for index in range(len(sites)))


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
