"""A plan written by hand: a rule says what every site does at every step."""

from __future__ import annotations

from collections.abc import Callable

from difa_compile.decision import Decision
from difa_compile.errors import DecisionError
from difa_compile.pipeline.inspection import inspect_model
from difa_compile.plan.cost import flops_saved
from difa_compile.plan.data import Cell, Settings, SiteInfo, model_digest
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
) -> Plan:
    """Write a plan by hand: ``rule(step, site)`` is asked for every step and every site, steps outer.

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
    sites = tuple(inspection.site_infos)
    rows = tuple(tuple(_cell(rule(step, site), step, site) for site in sites) for step in range(steps))
    settings = Settings(
        method="rule",
        guidance="none" if cfg.form == "unknown" else cfg.form,
        conditional_half=cfg.conditional_half,
        sample=inspection.sample,
    )
    return Plan(model_digest(inspection.model), settings, sites, uniform_progress(steps), rows)


def _cell(decision: object, step: int, site: SiteInfo) -> Cell:
    if not isinstance(decision, Decision):
        raise DecisionError(f"the rule returned {decision!r} for step {step}, site {site.path}; it must be a Decision")
    return Cell(decision, (), flops_saved(decision, site))
