"""Plans: the decisions of a model over its sampling schedule, with the measurements that justify them.

A plan is keyed by progress through the schedule, from 1 (noise) down to 0, so it outlives the run that made it:
:meth:`Plan.resolve` carries it onto another number of steps or another scheduler. It names the model, the sites and the
settings it was made for, and is refused where they differ. See contract 6 of the design.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from difa_compile.decision import Basis, Decision
from difa_compile.errors import DecisionError, PlanFormatError, PlanMismatchError, ScheduleError, SitesMismatchError
from difa_compile.files.writing import write_whole
from difa_compile.plan import json_form
from difa_compile.plan import text as plan_text
from difa_compile.plan.cost import flops_saved
from difa_compile.plan.data import (
    Cell,
    Difference,
    ModelInfo,
    Settings,
    SiteInfo,
    Sizes,
    Trial,
    blocks_of,
    model_digest,
)
from difa_compile.plan.json_form import SCHEMA_VERSION
from difa_compile.plan.schedule import (
    Bucket,
    Promotion,
    Role,
    assign_roles,
    buckets,
    check_progress,
    check_steps,
    forecast_weights,
    nearest_steps,
    output_sources,
    scheduler_progress,
    stretched,
    take_rows,
    uniform_progress,
)
from difa_compile.wording import quoted, shown

if TYPE_CHECKING:
    from torch import nn

    from difa_compile.machine.profile import Profile

__all__ = [
    "SCHEMA_VERSION",
    "Cell",
    "Difference",
    "ModelInfo",
    "Plan",
    "Promotion",
    "ResolvedPlan",
    "Settings",
    "SiteInfo",
    "Trial",
    "model_digest",
]


SAME_PROGRESS = 1.5e-3
"""How far from where they were fitted, in progress, weights are used: rounded timesteps are a thousandth off."""
RESIZES = ("fraction", "tokens")
"""How windows are carried onto another image size: see :meth:`Plan.resized`."""


@dataclass(frozen=True)
class Plan:
    """All decisions over a sampling schedule: ``rows[step][site]``: attention sites in execution order, then blocks and
    spans, if it says anything of these. Where one of them is reused or forecast, the cells of all that it holds say
    full.

    ``progress[step]`` lies in [0, 1] and never rises. A plan that exists can run: construction raises
    :class:`ScheduleError` if there is no step, progress is out of order or a reader has no earlier filler
    (:func:`difa_compile.plan.schedule.assign_roles`), and :class:`PlanFormatError` if rows, sites and progress do not
    add up.
    """

    model: ModelInfo
    settings: Settings
    sites: tuple[SiteInfo, ...]
    progress: tuple[float, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        object.__setattr__(self, "progress", check_progress(self.progress))
        if not self.sites:
            raise PlanFormatError("a plan needs at least one site, but it names none")
        if len(counts := Counter(site.path for site in self.sites)) < len(self.sites):
            twice = next(path for path, count in counts.items() if count > 1)
            raise PlanFormatError(f"the plan names site {quoted(twice)} twice; every site needs its own name")
        if len(self.rows) != len(self.progress):
            raise PlanFormatError(
                f"the plan has {len(self.rows)} rows but the progress of {len(self.progress)} steps; give one row per "
                "step"
            )
        first = next((index for index, site in enumerate(self.sites) if site.is_block), len(self.sites))
        late = next((site for site in self.sites[first:] if not site.is_block), None)
        if late is not None or first == 0:
            which = self.sites[0] if late is None else late
            raise PlanFormatError(
                f"site {quoted(which.path)} is out of order; a plan names attention sites first, then blocks"
            )
        for step, row in enumerate(self.rows):
            if len(row) != len(self.sites):
                raise PlanFormatError(
                    f"step {step} of the plan has {len(row)} cells for {len(self.sites)} sites; give one cell per site"
                )
            for cell, site in zip(row, self.sites, strict=True):
                if cell.decision.groups and site.is_block:
                    raise PlanFormatError(
                        f"step {step}: {shown(str(cell.decision))} names heads, but {shown(site.path)} is a whole "
                        "block, which has none; decide so for its attention"
                    )
                if cell.decision.groups and len(cell.decision.forms) != site.heads:
                    last = len(cell.decision.forms) - 1
                    raise PlanFormatError(
                        f"step {step}: {shown(str(cell.decision))} names heads 0 to {last}, but {shown(site.path)} has "
                        f"{site.heads} heads; name every head of the site once"
                    )
        _ = self.roles

    @property
    def steps(self) -> int:
        return len(self.rows)

    @cached_property
    def decisions(self) -> tuple[tuple[Decision, ...], ...]:
        """``decisions[step][site]``: the rows without their measurements."""
        return tuple(tuple(cell.decision for cell in row) for row in self.rows)

    @cached_property
    def roles(self) -> tuple[tuple[Role, ...], ...]:
        """``roles[step][site]``: decisions and the caches they write."""
        return assign_roles(self.decisions, self.blocks)

    @cached_property
    def blocks(self) -> tuple[int | None, ...]:
        """For each site the index of the block that holds it, None where the plan names none."""
        return blocks_of(self.sites)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Steps grouped by equal rows of roles: one variant each."""
        return buckets(self.roles)

    @cached_property
    def fitted(self) -> Mapping[tuple[int, int], tuple[tuple[int, ...], tuple[float, ...]]]:
        """By step and site of the forecasts whose weights were fitted: the steps that they read, the newest first, and
        the weights."""
        found = {}
        for site in range(len(self.sites)):
            if not any(row[site].weights for row in self.rows):
                continue
            roles = [row[site] for row in self.roles]
            sources = output_sources([role.decision for role in roles], [role.covered for role in roles])
            for step, row in enumerate(self.rows):
                if row[site].weights:
                    found[step, site] = (sources[step], row[site].weights)
        return found

    @cached_property
    def digest(self) -> str:
        """SHA-256 (64 hex digits) of the plan's canonical JSON; enters every cache key."""
        return json_form.digest(self.model, self.settings, self.sites, self.progress, self.rows)

    # --- files -------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The text of a plan file: one line per site and per cell."""
        return json_form.write(self.model, self.settings, self.sites, self.progress, self.rows)

    @classmethod
    def from_json(cls, text: str, where: str = "given") -> Plan:
        """The inverse of :meth:`to_json`; ``where`` names the source in messages.

        Raises :class:`PlanFormatError` if the text is not JSON, truncated, or has missing, unknown or ill-typed keys or
        NaN; :class:`PlanVersionError`; :class:`PlanDigestError` if it was edited; :class:`ScheduleError`.
        """
        return cls._checked(json_form.read(text, where), where)

    @classmethod
    def _checked(cls, parts: json_form.Parts, where: object) -> Plan:
        """A plan from what was read; errors name the file."""
        try:
            return cls(*parts)
        except (PlanFormatError, ScheduleError) as error:
            raise type(error)(f"the plan {shown(where)} cannot run: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan file, whole or not at all. Raises :class:`OutputError`."""
        write_whole(Path(path), self.to_json(), "the plan")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file. Raises as :meth:`from_json`, also where the file cannot be read."""
        return cls._checked(json_form.load(path), path)

    # --- fitting a model ---------------------------------------------------------------------------------------------

    def validate(self, model: nn.Module | None = None, sites: Sequence[SiteInfo] | None = None) -> None:
        """Raise :class:`PlanMismatchError`, saying what differs, unless the plan was made for this model and sites
        (:class:`SitesMismatchError` where these have other names).

        The model is compared by class and config, not by weights; the sites by path, order, kind, sizes and token grid.
        """
        differences: list[str] = []
        remedy = "calibrate a plan for this model, or load the model the plan was made for"
        if model is not None:
            here = model_digest(model)
            if here.class_name != self.model.class_name:
                differences.append(
                    f"model: the plan was made for {shown(self.model.class_name)}, this is {here.class_name}"
                )
            elif here.config_digest != self.model.config_digest:
                differences.append(
                    f"model: the plan was made for another configuration of {here.class_name} (config digest "
                    f"{shown(self.model.config_digest[:12])}, here {here.config_digest[:12]})"
                )
        if sites is not None:
            found = _site_differences(self.sites, sites)
            if found and not differences and [site.path for site in sites] == [site.path for site in self.sites]:
                remedy = (
                    "calibrate a plan at this image size, sample at the size the plan was made for, or let the plan be "
                    'carried onto other sizes with resize="fraction" (windows grow with the image) or "tokens"'
                )
            differences += found
        if differences:
            few = differences[:8]
            if len(differences) > len(few):
                few.append(f"and {len(differences) - len(few)} more")
            others = sites is not None and {site.path for site in sites} != {site.path for site in self.sites}
            mismatch = SitesMismatchError if others else PlanMismatchError
            raise mismatch(f"the plan {self.digest[:12]} does not fit: {'; '.join(few)}. Remedy: {remedy}")

    # --- other sizes and schedules -----------------------------------------------------------------------------------

    def resized(self, sites: Sequence[SiteInfo], windows: str = "fraction") -> Plan:
        """The same decisions for the same model at another image size, whose sites are ``sites``.

        ``windows``: ``"fraction"`` lets a window cover the same share of the image (a band's radius grows with the
        number of image tokens, that of a disc or box with the side of the grid), ``"tokens"`` keeps its radius. The
        losses of the plan were measured, and weights fitted, at its own size; they are left out, weights only where the
        image is another one and not just its text.

        Raises :class:`PlanMismatchError` if the sites differ in more than tokens and grid, :class:`DecisionError` for
        another word in ``windows``.
        """
        if windows not in RESIZES:
            raise DecisionError(f"windows is {windows!r}; choose one of {', '.join(RESIZES)}")
        if len(sites) == len(self.sites):
            same = [
                replace(new, tokens=old.tokens, layout=old.layout, flops=old.flops)
                for new, old in zip(sites, self.sites, strict=True)
            ]
        else:
            same = list(sites)
        self.validate(sites=same)

        same_image = same_but_for_text(sites, self.sites)

        def carried(cell: Cell, old: SiteInfo, new: SiteInfo) -> Cell:
            decision = cell.decision
            if windows == "fraction" and old.layout and new.layout:
                grids = old.layout.grid, new.layout.grid
                decision = decision.with_windows(lambda window: window.scaled(*grids))
            return Cell(decision, (), flops_saved(decision, new), cell.weights if same_image else ())

        rows = tuple(
            tuple(carried(cell, old, new) for cell, old, new in zip(row, self.sites, sites, strict=True))
            for row in self.rows
        )
        sample = self.settings.sample if same_image else None
        return replace(self, sites=tuple(sites), rows=rows, settings=replace(self.settings, sample=sample))

    def resolve(
        self, steps: int, scheduler: object | None = None, *, progress: Sequence[float] | None = None
    ) -> ResolvedPlan:
        """Carry the plan onto another schedule: every new step follows the plan step nearest in progress.

        The schedule is ``progress`` (``steps`` values falling from 1 to 0), or that of a diffusers ``scheduler``, whose
        timesteps are read if already set for ``steps`` and else found on a copy (a second-order scheduler calls the
        model more than ``steps`` times: one row per call), or, with neither, the plan's own spacing stretched to
        ``steps``. Readers whose filler fell out become full (:func:`difa_compile.plan.schedule.take_rows`). A plan
        written by a rule has no timesteps: its steps are matched by their position in the run instead. Raises
        :class:`ScheduleError`.
        """
        check_steps(steps)
        if progress is not None and scheduler is not None:
            raise ScheduleError("both a scheduler and the progress of each step are given; give one of them")
        if progress is not None:
            wanted = check_progress(progress)
            if len(wanted) != steps:
                raise ScheduleError(f"{steps} steps are asked for, but progress has {len(wanted)} values")
        elif scheduler is not None:
            wanted = scheduler_progress(scheduler, steps)
        else:
            wanted = stretched(self.progress, steps)
        if self.settings.method == "rule":
            source_steps = nearest_steps(uniform_progress(self.steps), uniform_progress(len(wanted)))
        else:
            source_steps = nearest_steps(self.progress, wanted)
        rows, promotions = take_rows(self.decisions, source_steps, self.blocks)
        return ResolvedPlan(self, wanted, source_steps, rows, promotions)

    # --- reading -----------------------------------------------------------------------------------------------------

    def diff(self, other: Plan) -> tuple[Difference, ...]:
        """Cells in which the two plans disagree, by step and site. :meth:`diff_text` is the form to read.

        Raises :class:`PlanMismatchError` if the plans have other sites or another number of steps.
        """
        if [site.path for site in self.sites] != [site.path for site in other.sites]:
            raise PlanMismatchError(
                f"plans for {shown(self.model.class_name)} ({len(self.sites)} sites) and "
                f"{shown(other.model.class_name)} ({len(other.sites)} sites) cannot be compared: their sites have "
                "other paths or another order; compare plans of one model"
            )
        if self.steps != other.steps:
            raise PlanMismatchError(
                f"plans of {self.steps} and {other.steps} steps cannot be compared cell by cell; calibrate both with "
                "the same number of steps"
            )
        return tuple(
            Difference(step, site, mine, theirs)
            for step, (my_row, their_row) in enumerate(zip(self.decisions, other.decisions, strict=True))
            for site, (mine, theirs) in enumerate(zip(my_row, their_row, strict=True))
            if mine != theirs
        )

    def other_weights(self, other: Plan) -> int:
        """How many forecasts, alike in both plans, have other weights. As :meth:`diff`, for plans of the same sites and
        steps."""
        return sum(
            mine.decision == theirs.decision and mine.weights != theirs.weights
            for my_row, their_row in zip(self.rows, other.rows, strict=True)
            for mine, theirs in zip(my_row, their_row, strict=True)
        )

    def diff_text(self, other: Plan) -> str:
        """What differs from ``other``, to read: settings, cost, which decisions became which, and where."""
        return plan_text.difference(self, other, self.diff(other), self.other_weights(other))

    def summary(self, profile: Profile | None = None) -> str:
        """The plan to read: origin, counts per decision, cost, distinct rows, and a map of sites by steps.

        With the ``profile`` of a machine (:func:`difa_compile.machine.profile.current`) also the predicted time.
        """
        return plan_text.summary(self, profile)


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan on the schedule of a run.

    ``progress[step]`` of the new schedule; ``source_steps[step]``: the plan's step it follows; ``rows[step][site]``:
    the decisions after promotion.
    """

    plan: Plan
    progress: tuple[float, ...]
    source_steps: tuple[int, ...]
    rows: tuple[tuple[Decision, ...], ...]
    promotions: tuple[Promotion, ...]

    @property
    def steps(self) -> int:
        """Model calls of a run (per CFG branch)."""
        return len(self.rows)

    @property
    def sites(self) -> tuple[SiteInfo, ...]:
        return self.plan.sites

    @property
    def decisions(self) -> tuple[tuple[Decision, ...], ...]:
        """The same as ``rows``; the name a plan uses."""
        return self.rows

    @cached_property
    def roles(self) -> tuple[tuple[Role, ...], ...]:
        """``roles[step][site]``: decisions and the caches they write."""
        return assign_roles(self.rows, self.plan.blocks)

    def weights(self, step: int, site: int, decision: Decision, sources: Sequence[int]) -> tuple[float, ...]:
        """The weights by which a forecast at ``step`` sums the outputs of ``sources``, steps of this schedule, the
        newest first: the fitted ones where these hold, else those of the polynomial (:func:`forecast_weights`)."""
        own = self.fitted_weights(step, site, sources)
        return own or forecast_weights(self.progress, step, sources, decision.basis or Basis.PROGRESS)

    def fitted_weights(self, step: int, site: int, sources: Sequence[int]) -> tuple[float, ...]:
        """The weights that the plan has fitted for a forecast at ``step`` from ``sources``, steps of this schedule; ()
        unless these are the steps that the plan's own forecast reads, and the run goes as the plan does
        (:attr:`goes_as_planned`): for others they are not right."""
        own = self.plan.fitted.get((self.source_steps[step], site))
        if own is None or not self.goes_as_planned:
            return ()
        return own[1] if tuple(self.source_steps[each] for each in sources) == own[0] else ()

    @cached_property
    def goes_as_planned(self) -> bool:
        """Whether this schedule is the plan's, or a part of it without a gap. Weights are fitted for all steps at once,
        so that the errors of one make up for those of others; on other schedules they do not."""
        first = self.source_steps[0]
        return self.source_steps == tuple(range(first, first + self.steps)) and all(
            abs(mine - self.plan.progress[step]) <= SAME_PROGRESS
            for mine, step in zip(self.progress, self.source_steps, strict=True)
        )

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Steps grouped by equal rows of roles: one variant each."""
        return buckets(self.roles)

    def summary(self) -> str:
        """The schedule to read: cost, promotions, distinct rows, and a map of sites by steps."""
        return plan_text.resolved_summary(self)


def _site_differences(plan: Sequence[SiteInfo], here: Sequence[SiteInfo]) -> list[str]:
    plan_paths, here_paths = [site.path for site in plan], [site.path for site in here]
    in_plan, in_model = set(plan_paths), set(here_paths)
    missing = [path for path in plan_paths if path not in in_model]
    extra = [path for path in here_paths if path not in in_plan]
    if missing or extra:
        parts = [f"the plan names {len(plan)} sites, the model has {len(here)}"]
        if missing:
            parts.append(f"not in the model: {_few(missing)}")
        if extra:
            parts.append(f"not in the plan: {_few(extra)}")
        return [", ".join(parts)]
    if plan_paths != here_paths:
        return [f"the sites run in another order: {_few(plan_paths)} in the plan, {_few(here_paths)} in the model"]
    return [
        f"{shown(mine.path)}: the plan was made for {mine.shape}, here it is {theirs.shape}"
        for mine, theirs in zip(plan, here, strict=True)
        if mine != theirs
    ]


def same_but_for_text(
    one: Sequence[SiteInfo], other: Sequence[SiteInfo], samples: tuple[Sizes | None, Sizes | None] = (None, None)
) -> bool:
    """Whether two models have the same sites over the same image, whatever the number of text tokens beside it.

    A site whose layout is known in both shows its image. Where it is not, nothing tells image and text tokens apart:
    then the noisy samples must be known to have the same sizes. ``samples``: those of the two (``Settings.sample``).
    """
    same_sample = samples[0] is not None and samples[0] == samples[1]

    def alike(mine: SiteInfo, theirs: SiteInfo) -> bool:
        if replace(mine, tokens=1, layout=None, flops=None) != replace(theirs, tokens=1, layout=None, flops=None):
            return False
        if mine.layout is None or theirs.layout is None:
            return mine == theirs or same_sample
        whole = (mine.tokens == mine.keys) == (theirs.tokens == theirs.keys)
        return whole and mine.layout.grid == theirs.layout.grid

    return len(one) == len(other) and all(alike(*pair) for pair in zip(one, other, strict=True))


def _few(names: Sequence[str]) -> str:
    return ", ".join(shown(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
