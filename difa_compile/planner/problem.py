"""What is chosen from, and what comes of a choice: effects, costs and response in; decisions, share and error out.

A *unit* is one site, or sites that share one path (all blocks of a network). A unit may lie inside another (attention
inside its block): it then exists only at steps where that one is computed. Costs are in one unit of one's choice
(seconds, operations); shares are of a full run. The error is the mean squared error of an image in [0, 1] against that
of the full model, and the PSNR is ``-10 log10`` of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from difa_compile.decision import FULL, Basis, Decision, Kind, Window
from difa_compile.errors import DecisionError, ErrorTableError
from difa_compile.plan.schedule import output_sources
from difa_compile.planner.effects import Array, Effects, reader_effect, total_error, weights_of
from difa_compile.wording import quoted

FORECAST = Decision(Kind.FORECAST, order=1, basis=Basis.PROGRESS)

Weights = tuple[tuple[tuple[float, ...], ...], ...]
"""By unit and step those of a forecast, the newest source first; () where they are the polynomial's. () for no unit."""

COHERENCE = 0.97
"""How alike errors of neighbouring steps act on the image: 1 is as one, 0 not at all. Chosen on the demo model."""


@dataclass(frozen=True)
class Costs:
    """What the decisions of a unit cost at one step, without the units inside it.

    ``computed``: of each decision that may be chosen where the unit is computed; FULL is one of them. ``read``: for
    each output that a reader sums (reuse one, forecast:k k + 1). ``fill``: to keep an output that a later step reads.
    ``residual``: to take and keep a residual, by the window that it is taken against.
    """

    computed: Mapping[Decision, float]
    read: float = 0.0
    fill: float = 0.0
    residual: Mapping[Window, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Unit:
    """``sites``: the columns of the plan that it decides; ``inside``: the index of the unit that holds it."""

    sites: tuple[int, ...]
    effects: Effects
    costs: Costs
    inside: int | None = None


@dataclass(frozen=True)
class Problem:
    """``progress`` (T,) of the steps (1 at pure noise); ``response`` (T,) the image's root mean square error for an
    error of 1 in the model's output at each step (:func:`flat_response` where nothing is known); ``base`` the cost of a
    step outside all units.

    ``readers``: what a step that is not computed may take; the one of least error is chosen cell by cell, and reuse
    where a forecast has too few outputs. ``coherence`` as in :func:`difa_compile.planner.effects.total_error`.
    ``begins``: the steps, ascending, at which what was kept before is gone (another model takes over, or a call of
    guidance begins), so that all units are computed there and nothing reads across.
    ``allowed``: for each unit the only decisions that may be chosen; None: all. Where a unit is covered by the one
    around it, it is FULL all the same.
    """

    progress: tuple[float, ...]
    units: tuple[Unit, ...]
    response: Array
    base: float = 0.0
    readers: tuple[Decision, ...] = (FORECAST,)
    coherence: float = COHERENCE
    begins: tuple[int, ...] = ()
    allowed: tuple[frozenset[Decision], ...] | None = None

    def __post_init__(self) -> None:
        steps = len(self.progress)
        object.__setattr__(self, "response", np.asarray(self.response, dtype=np.float64))
        check_begins(self.begins, steps)
        if self.response.shape != (steps,) or not np.isfinite(self.response).all() or (self.response < 0).any():
            raise ErrorTableError(f"the response must be {steps} finite numbers, one for each step, none negative")
        if not self.units or not steps:
            raise ErrorTableError("there is nothing to choose: a table of errors needs at least one step and one site")
        if not 0 <= self.coherence <= 1:
            raise ErrorTableError(f"the coherence of errors is {self.coherence}; it lies in [0, 1]")
        if not self.readers or any(each.kind.reads != "output" or each.cfg_shared for each in self.readers):
            raise DecisionError("readers of a problem are reuse and forecasts, at least one of them")
        if max(each.order for each in self.readers) > 2:
            raise DecisionError("the planner chooses among forecasts of order 1 and 2")
        size = self.units[0].effects.size
        for index, unit in enumerate(self.units):
            if unit.effects.steps != steps or unit.effects.size != size:
                raise ErrorTableError(
                    f"unit {index} has effects of {unit.effects.steps} steps in {unit.effects.size} numbers, the "
                    f"schedule has {steps} steps and the first unit {size} numbers"
                )
            _check_costs(index, unit)
            outer = unit.inside
            if outer is not None and (not 0 <= outer < index or self.units[outer].inside is not None):
                raise ErrorTableError(
                    f"unit {index} is inside unit {outer}, which must come before it and be in no other"
                )
        if not math.isfinite(self.base) or self.base < 0:
            raise ErrorTableError(f"the cost of a step outside of all sites is {self.base}; it must not be negative")
        if not self.full_cost > 0:
            raise ErrorTableError("a full run costs nothing, so there is no share of it")
        if self.allowed is not None:
            self._check_allowed(self.allowed)
        taken = [site for unit in self.units for site in unit.sites]
        if len(set(taken)) != len(taken) or any(site < 0 for site in taken):
            raise ErrorTableError("a site belongs to two units of the table of errors")

    def _check_allowed(self, allowed: Sequence[frozenset[Decision]]) -> None:
        if len(allowed) != len(self.units):
            raise ErrorTableError(f"decisions are allowed for {len(allowed)} units, and there are {len(self.units)}")
        for index in range(len(self.units)):
            if not any(each.kind is not Kind.WINDOW_RESIDUAL for each in self.computed(index)):
                raise ErrorTableError(f"unit {index} is allowed nothing that needs no earlier step, so it cannot begin")

    def allows(self, unit: int, decision: Decision) -> bool:
        """Whether a unit may take a decision."""
        return self.allowed is None or decision in self.allowed[unit]

    def computed(self, unit: int) -> tuple[Decision, ...]:
        """The decisions that a unit may take where it is computed."""
        return tuple(each for each in self.units[unit].costs.computed if self.allows(unit, each))

    @property
    def steps(self) -> int:
        """T."""
        return len(self.progress)

    @cached_property
    def streams(self) -> tuple[int, ...]:
        """For each step the number of streams that have begun after the first: a step may read those of its own."""
        return tuple(sum(begin <= step for begin in self.begins) for step in range(self.steps))

    @cached_property
    def full_cost(self) -> float:
        """The cost of a run in which everything is full."""
        return self.steps * (self.base + sum(unit.costs.computed[FULL] for unit in self.units))

    def children(self, index: int) -> list[int]:
        """The units inside a unit."""
        return [child for child, unit in enumerate(self.units) if unit.inside == index]


def check_begins(begins: Sequence[int], steps: int) -> None:
    """Raise :class:`ErrorTableError` unless streams begin at steps behind the first, one after the other."""
    if any(not before < step < steps for before, step in pairwise((0, *begins))):
        raise ErrorTableError(
            f"streams are said to begin at steps {quoted(list(begins))}; they must ascend, from 1 to {steps - 1}"
        )


@dataclass(frozen=True)
class Outcome:
    """``columns[unit][step]``: the decisions of each unit, FULL where it is covered by the unit around it.

    ``share``: predicted cost over that of a full run. ``error``: predicted mean squared error of the image.
    ``weights[unit][step]``: those of forecasts, where they were fitted (:mod:`difa_compile.planner.fitting`), else ().
    """

    columns: tuple[tuple[Decision, ...], ...]
    share: float
    error: float
    weights: Weights = ()

    @property
    def psnr(self) -> float:
        """The predicted PSNR in dB; infinite where nothing is left out."""
        return psnr(self.error)

    def decisions(self, problem: Problem) -> tuple[tuple[Decision, ...], ...]:
        """``decisions[step][site]``; sites that belong to no unit are full."""
        sites = 1 + max(site for unit in problem.units for site in unit.sites)
        rows = [[FULL] * sites for _ in range(problem.steps)]
        for unit, column in zip(problem.units, self.columns, strict=True):
            for step, decision in enumerate(column):
                for site in unit.sites:
                    rows[step][site] = decision
        return tuple(map(tuple, rows))


def psnr(error: float) -> float:
    """``-10 log10 error`` dB, for images in [0, 1]."""
    return math.inf if error <= 0 else -10 * math.log10(error)


def flat_response(steps: int, level: float = 0.025, last: float = 2.5) -> Array:
    """The response (T,) of a sampler that corrects itself: ``level`` everywhere, ``last`` times as much at the last
    step, which no later one corrects, and half the way there (as a factor) at the last but one.

    Its form is that of the demo model. A joint run gives the true level (:func:`rescaled`); the choice for a budget of
    time does not depend on it.
    """
    response = np.full(steps, level)
    response[-1] *= last
    if steps > 1:
        response[-2] *= last**0.25
    return response


def rescaled(problem: Problem, predicted: float, measured: float) -> Problem:
    """The problem with its response scaled so that an outcome's ``predicted`` error becomes what was ``measured``."""
    if not (predicted > 0 and measured > 0 and math.isfinite(predicted) and math.isfinite(measured)):
        raise ErrorTableError(
            f"errors of {predicted} and {measured} say nothing of the response; both must be positive"
        )
    return replace(problem, response=problem.response * math.sqrt(measured / predicted))


@dataclass(frozen=True)
class Accounts:
    """What a plan costs and does: ``cost`` of the run, ``effects`` (units, T, K)."""

    cost: float
    effects: Array = field(repr=False)


def accounts(problem: Problem, columns: Sequence[Sequence[Decision]], weights: Weights = ()) -> Accounts:
    """The cost and the effects of ``columns[unit][step]``, which must be a plan that can be run.

    A reader's effect is that of its sources' drift, plus by the same weights what the sources' own decisions did.
    Raises :class:`ErrorTableError` for a decision, or for a lag, that was not measured, and for what reads across a
    step at which a stream begins.
    """
    cost = problem.base * problem.steps
    effects = []
    for index, (unit, column) in enumerate(zip(problem.units, columns, strict=True)):
        covered = covered_steps(unit, columns)
        cost += cost_of(unit, column, covered)
        effects.append(effects_of(problem, unit, column, covered, weights[index] if weights else ()))
    return Accounts(cost, np.stack(effects))


def covered_steps(unit: Unit, columns: Sequence[Sequence[Decision]]) -> list[bool]:
    """At which steps a unit is covered by the one around it, which is not computed there."""
    if unit.inside is None:
        return [False] * unit.effects.steps
    return [decision.kind.reads == "output" for decision in columns[unit.inside]]


def cost_of(unit: Unit, column: Sequence[Decision], covered: Sequence[bool]) -> float:
    """What one unit's decisions cost; nothing at ``covered`` steps."""
    costs = unit.costs
    cost = 0.0
    kept: set[int] = set()
    residuals: dict[int, Window | None] = {}
    last_full = -1
    for step, sources in enumerate(output_sources(column, covered)):
        decision = column[step]
        if covered[step]:
            continue
        if decision.kind.reads == "output":
            cost += costs.read * len(sources)
            kept.update(sources)
            continue
        if decision not in costs.computed:
            raise ErrorTableError(f"step {step}: {decision} has no cost in the table")
        cost += costs.computed[decision]
        if decision.kind is Kind.WINDOW_RESIDUAL:
            if residuals.setdefault(last_full, decision.window) != decision.window:
                raise ErrorTableError(
                    f"step {step}: {decision} reads the residual of step {last_full}, which keeps that against "
                    f"{residuals[last_full]}; a full step keeps one"
                )
        elif decision.is_full:
            last_full = step
    taken = sum(costs.residual[window] for window in residuals.values() if window is not None)
    return cost + costs.fill * len(kept) + taken


def effects_of(
    problem: Problem,
    unit: Unit,
    column: Sequence[Decision],
    covered: Sequence[bool],
    fitted: Sequence[tuple[float, ...]] = (),
) -> Array:
    """The effects (T, K) of one unit's decisions; zero at ``covered`` steps. ``fitted``: by step the weights of a
    forecast that are not the polynomial's."""
    own = unit.effects
    done = np.zeros((problem.steps, own.size))
    last_full = -1
    for step, sources in enumerate(output_sources(column, covered)):
        decision = column[step]
        if covered[step]:
            continue
        if decision.kind.reads == "output":
            if len(sources) <= decision.order:
                raise ErrorTableError(f"step {step}: {decision} needs more computed steps before it than there are")
            lags = [step - source for source in sources]
            if max(lags) > own.lags:
                raise ErrorTableError(f"step {step}: {decision} reads {max(lags)} steps back; {own.lags} were measured")
            _check_stream(problem, step, min(sources), decision)
            weights = fitted[step] if fitted else ()
            weights = weights or weights_of(decision, problem.progress, step, sources)
            done[step] = reader_effect(own.drift, weights, lags, step) + np.asarray(weights) @ done[list(sources)]
        elif decision.kind is Kind.WINDOW_RESIDUAL:
            ages = own.ages(decision)
            if last_full < 0 or step - last_full > ages:
                raise ErrorTableError(f"step {step}: {decision} has no full step at most {ages} steps before it")
            _check_stream(problem, step, last_full, decision)
            done[step] = own.residual[decision][step, step - last_full]
        elif decision != FULL:
            done[step] = own.computed[decision][step]
        if decision.is_full:
            last_full = step
    return done


def _check_stream(problem: Problem, step: int, source: int, decision: Decision) -> None:
    if problem.streams[source] != problem.streams[step]:
        begin = max(begin for begin in problem.begins if begin <= step)
        raise ErrorTableError(
            f"step {step}: {decision} reads what step {source} has kept, which is gone at step {begin}: another model "
            "takes over there, or a call of guidance begins"
        )


def outcome(problem: Problem, columns: Sequence[Sequence[Decision]], weights: Weights = ()) -> Outcome:
    """What ``columns[unit][step]`` are predicted to cost and to do."""
    found = accounts(problem, columns, weights)
    error = total_error(found.effects.sum(0), problem.response, problem.coherence)
    share = found.cost / problem.full_cost
    if math.isclose(share, 1.0, rel_tol=1e-12):  # the same sum, rounded in another order
        share = 1.0
    return Outcome(tuple(map(tuple, columns)), share, error, weights)


def _check_costs(index: int, unit: Unit) -> None:
    costs = unit.costs
    numbers = (*costs.computed.values(), costs.read, costs.fill, *costs.residual.values())
    if FULL not in costs.computed or not all(math.isfinite(each) and each >= 0 for each in numbers):
        raise ErrorTableError(f"the costs of unit {index} must be finite, not negative, and tell what full costs")
    for decision in costs.computed:
        measured = decision == FULL or decision in unit.effects.computed or decision in unit.effects.residual
        if not measured:
            raise ErrorTableError(f"unit {index}: {decision} has a cost, but its effects were not measured")
        if decision.kind is Kind.WINDOW_RESIDUAL and decision.window not in costs.residual:
            raise ErrorTableError(f"unit {index}: nobody knows what taking the residual of {decision} costs")


def additive_error(problem: Problem, columns: Sequence[Sequence[Decision]]) -> float:
    """``sum over units and steps of response^2 |effect|^2``: the error if all cells' errors were unrelated, which is
    what paths make least."""
    effects = accounts(problem, columns).effects
    return float(((effects**2).sum(2) * problem.response**2).sum())
