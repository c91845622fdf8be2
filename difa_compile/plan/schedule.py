"""What each site does at each step of a schedule, worked out from the decisions alone.

A *role* is a decision plus the caches the site writes for later steps, found by look-ahead (contract 2: a cache is an
input or an output of a variant, never both, so nothing is written that nobody reads). A *bucket* is the set of steps
whose rows of roles are equal and that therefore share one variant. Everything here is pure and needs no tensors.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from difa_compile.decision import FULL, Basis, Decision, Kind, Window, heads_text
from difa_compile.errors import DecisionError, ScheduleError

_SLACK = 1e-6
"""Slack allowed at both ends of [0, 1]: float timesteps may come out as 1000.0001."""
_SAME = 1e-9
"""Two values of progress this close are the same timestep; two distances this close are a tie."""


@dataclass(frozen=True)
class HeadCache:
    """A cache of some heads of a site: their attention outputs before the output projection, or, with a window, what
    they leave out in it (full - window)."""

    heads: tuple[int, ...]
    window: Window | None = None

    def __str__(self) -> str:
        what = "output" if self.window is None else f"residual({self.window})"
        return f"{what} of heads {heads_text(self.heads)}"


@dataclass(frozen=True)
class Role:
    """What a variant does at one site: the decision, and the caches it writes.

    ``emit_output``: write ``cache.<site>.output``, which a later reuse reads. ``emit_residual``: write
    ``cache.<site>.residual`` = full - window output, which a later window+residual reads. The window that is subtracted
    is the reader's, so it stands here too: ``residual_window`` is given exactly when ``emit_residual`` is true.
    ``covered``: the block that holds the site is left out, and the site with it; the decision is then full, for want of
    another, and nothing is computed.

    ``head_reads`` and ``head_writes``: the caches of single heads that it reads and writes. One variant may read those
    of some heads and write those of others, but each cache holds whole what one step has left and another one reads
    (contract 2). A decision by heads that is given no reads has one cache for each group that needs one.
    """

    decision: Decision
    emit_output: bool = False
    emit_residual: bool = False
    residual_window: Window | None = None
    covered: bool = False
    head_reads: tuple[HeadCache, ...] = ()
    head_writes: tuple[HeadCache, ...] = ()

    def __post_init__(self) -> None:
        if self.covered and (self.decision != FULL or self.emit_output or self.emit_residual or self.head_writes):
            raise DecisionError(
                f"a site whose block is left out does nothing, but {self.decision} was to be done there"
            )
        if self.emit_output and not self.decision.kind.fills("output"):
            raise DecisionError(f"a {self.decision.kind} step computes no output, so it cannot fill the output cache")
        if self.emit_residual and not self.decision.is_full:
            raise DecisionError(f"only a full step has a residual, but {self.decision} was to fill the residual cache")
        if self.emit_residual != (self.residual_window is not None):
            raise DecisionError(
                "a role that writes a residual needs the window it is taken against, and no other role has one: give "
                "emit_residual=True together with residual_window"
            )
        needed = {group.form.window: group.heads for group in self.decision.groups if group.form.reads_caches}
        if needed and not self.head_reads:
            object.__setattr__(self, "head_reads", _ordered(HeadCache(needed[window], window) for window in needed))
        found: dict[Window | None, list[int]] = {}
        for cache in self.head_reads:
            found.setdefault(cache.window, []).extend(cache.heads)
        if {window: tuple(sorted(heads)) for window, heads in found.items()} != needed:
            raise DecisionError(
                f"{self.decision} reads other heads than those of the caches {_listed(self.head_reads)}"
            )
        for cache in self.head_writes:
            for head in cache.heads:
                form = self.decision.form_of(head)
                if not (form.is_full or (cache.window is None and form.kind.windowed)):
                    raise DecisionError(f"{self.decision} has nothing for the cache {cache}: head {head} is {form}")

    @property
    def depends_on_calls(self) -> bool:
        """Whether what it computes depends on other calls of the model, through caches or a shared CFG half."""
        reads = self.decision.reads_caches or self.decision.cfg_shared
        return reads or self.emit_output or self.emit_residual or bool(self.head_writes)

    @property
    def reads_output(self) -> bool:
        """Whether ``cache.<site>.output`` is an input of the variant."""
        return self.decision.kind.reads == "output"

    @property
    def reads_residual(self) -> bool:
        """Whether ``cache.<site>.residual`` is an input of the variant."""
        return self.decision.kind.reads == "residual"

    def __str__(self) -> str:
        text = str(self.decision)
        if self.emit_output:
            text += " >output"
        if self.emit_residual:
            text += f" >residual({self.residual_window})"
        text += "".join(f" >{cache}" for cache in self.head_writes)
        return "covered" if self.covered else text


def _ordered(caches: Iterable[HeadCache]) -> tuple[HeadCache, ...]:
    return tuple(sorted(caches, key=lambda cache: (cache.heads, str(cache.window))))


def _listed(caches: Sequence[HeadCache]) -> str:
    return ", ".join(map(str, caches)) or "(none)"


FULL_ROLE = Role(FULL)
COVERED_ROLE = Role(FULL, covered=True)


@dataclass(frozen=True)
class Bucket:
    """Steps (ascending) that share one row of roles, hence one variant."""

    row: tuple[Role, ...]
    steps: tuple[int, ...]


Blocks = Sequence[int | None]
"""For each site the index of the block that holds it, or None (:func:`difa_compile.plan.data.blocks_of`)."""


def assign_roles(rows: Sequence[Sequence[Decision]], blocks: Blocks = ()) -> tuple[tuple[Role, ...], ...]:
    """Roles of ``rows[step][site]``, by look-ahead. Without ``blocks`` no site is held by another.

    A step that computes a site's output writes it iff a later step reads it: a reuse reads what the latest such step
    has computed, a forecast of order k what the latest k + 1 have. A step of kind full writes the residual cache iff a
    window+residual comes later, before the next step of kind full. So each reader reads what the latest steps that
    could fill its cache have written: DiTFastAttn's rule (arXiv 2406.08552, section 3). Of single heads the same holds
    head by head: one that is reused reads the output of the latest step that computed it, one that is window+residual
    the residual of the latest step in which it was full, in whatever decision (:class:`HeadCache`). At a step at which
    a block is reused or forecast the sites that it holds are covered: they do nothing and fill no cache, of single
    heads neither.

    Raises :class:`ScheduleError`, naming step and site index, if there is no step, if rows differ in length, if a
    reader has too few earlier fillers, if a covered site is to do something, and if two readers want residuals of the
    same full step against different windows.
    """
    if not rows:
        raise ScheduleError("a schedule needs at least one step, but there is none")
    sites = len(rows[0])
    for step, row in enumerate(rows):
        if len(row) != sites:
            raise ScheduleError(f"step {step} has decisions for {len(row)} sites, but step 0 has {sites}")
    columns = [_site_roles([row[site] for row in rows], site, _covered(rows, site, blocks)) for site in range(sites)]
    return tuple(tuple(column[step] for column in columns) for step in range(len(rows)))


def _covered(rows: Sequence[Sequence[Decision]], site: int, blocks: Blocks) -> list[bool]:
    """At which steps a site is covered by a block or span that is left out."""
    around = []
    block = blocks[site] if blocks else None
    while block is not None:
        around.append(block)
        block = blocks[block]
    return [any(row[block].kind.reads == "output" for block in around) for row in rows]


def in_effect(rows: Sequence[Sequence[Decision]], blocks: Blocks) -> tuple[tuple[Decision, ...], ...]:
    """``rows[step][site]`` with the decision of the block or span that is left out in place of what the sites that it
    covers say, which is full: what happens at each site, for people to read."""

    def at(row: Sequence[Decision], site: int) -> Decision:
        block = blocks[site] if blocks else None
        found = row[site]
        while block is not None:
            found = row[block] if row[block].kind.reads == "output" else found
            block = blocks[block]
        return found

    return tuple(tuple(at(row, site) for site in range(len(row))) for row in rows)


def _site_roles(column: Sequence[Decision], site: int, covered: Sequence[bool]) -> list[Role]:
    """Roles of one site over all steps; ``site`` is for messages."""
    residual: dict[int, tuple[Window, int]] = {}
    """Full step -> (window its residual is taken against, first step that reads it)."""
    last_full: int | None = None
    kept: set[int] = set()
    """Steps whose output is read."""
    for step, (decision, sources) in enumerate(zip(column, output_sources(column, covered), strict=True)):
        if covered[step]:
            if decision != FULL:
                raise ScheduleError(
                    f"step {step}, site {site}: {decision} is asked for, but the block that holds the site is left out "
                    "at this step; say full there, or let the block be full"
                )
            continue
        if decision.kind.reads == "output":
            if len(sources) <= decision.order:
                raise ScheduleError(
                    f"step {step}, site {site}: {decision} needs {_outputs(decision)}, but "
                    f"{_fewer(len(sources))} of this site computes one; make an earlier step full or windowed"
                )
            kept.update(sources)
            continue
        if decision.kind is Kind.WINDOW_RESIDUAL:
            assert decision.window is not None  # Decision guarantees it
            if last_full is None:
                raise ScheduleError(
                    f"step {step}, site {site}: {decision} needs the residual of an earlier full step, but there is "
                    "none; make an earlier step full, or use the window without residual"
                )
            window, reader = residual.setdefault(last_full, (decision.window, step))
            if window != decision.window:
                raise ScheduleError(
                    f"step {step}, site {site}: {decision} reads the residual of step {last_full}, which step {reader} "
                    f"reads with window {window}; a full step keeps one residual, so use one window until the next "
                    "full step"
                )
        elif decision.is_full:
            last_full = step
    roles = []
    made: dict[tuple[Decision, bool, Window | None], Role] = {}
    for step, decision in enumerate(column):
        if covered[step]:
            roles.append(COVERED_ROLE)
            continue
        taken = residual.get(step)
        form = decision, step in kept, taken[0] if taken else None
        if form not in made:
            made[form] = Role(form[0], form[1], taken is not None, form[2])
        roles.append(made[form])
    return _with_head_caches(column, covered, roles, site)


def _with_head_caches(column: Sequence[Decision], covered: Sequence[bool], roles: list[Role], site: int) -> list[Role]:
    """``roles`` with the caches of single heads that each step reads and writes; a ``covered`` step does neither.

    Heads that the same step leaves to the same readers share a cache, so there are as few as can be, and each is read
    whole or not at all.
    """
    count = _heads_in(column, site)
    readers: dict[tuple[int, Window | None], dict[int, list[int]]] = {}
    """Step that fills a cache, and the window of a residual -> head -> steps that read it."""
    for head in range(count):
        computed: int | None = None
        full: int | None = None
        taken: tuple[int, Window | None, int] | None = None
        for step, decision in enumerate(column):
            if covered[step]:
                continue
            form = decision.form_of(head)
            if decision.groups and form.kind is Kind.REUSE:
                if computed is None:
                    raise ScheduleError(
                        f"step {step}, site {site}: head {head} is reused, but no earlier step of this site computes "
                        "it; make it full or windowed in an earlier step"
                    )
                readers.setdefault((computed, None), {}).setdefault(head, []).append(step)
            elif decision.groups and form.kind is Kind.WINDOW_RESIDUAL:
                if full is None:
                    raise ScheduleError(
                        f"step {step}, site {site}: {form} needs the residual of an earlier step in which head {head} "
                        "is full, but there is none; make an earlier step full, or use the window without residual"
                    )
                if taken is not None and taken[0] == full and taken[1] != form.window:
                    raise ScheduleError(
                        f"step {step}, site {site}: {form} of head {head} reads the residual of step {full}, which "
                        f"step {taken[2]} reads with window {taken[1]}; a head keeps one residual, so use one window "
                        "until the next step in which it is full"
                    )
                taken = (full, form.window, step)
                readers.setdefault((full, form.window), {}).setdefault(head, []).append(step)
            if form.is_full or form.kind.windowed:
                computed = step
            if form.is_full:
                full = step
    reads: list[list[HeadCache]] = [[] for _ in column]
    writes: list[list[HeadCache]] = [[] for _ in column]
    for (filler, window), steps_of in readers.items():
        together: dict[tuple[int, ...], list[int]] = {}
        for head, steps in steps_of.items():
            together.setdefault(tuple(steps), []).append(head)
        for read_at, heads in together.items():
            cache = HeadCache(tuple(heads), window)
            writes[filler].append(cache)
            for step in read_at:
                reads[step].append(cache)
    return [
        replace(role, head_reads=_ordered(read), head_writes=_ordered(written)) if read or written else role
        for role, read, written in zip(roles, reads, writes, strict=True)
    ]


def _heads_in(column: Sequence[Decision], site: int) -> int:
    """How many heads the decisions of one site speak of, 0 if of none. Raises :class:`ScheduleError`."""
    counts = {len(decision.forms): step for step, decision in reversed(list(enumerate(column))) if decision.groups}
    if len(counts) > 1:
        one, other = sorted(counts.items(), key=lambda item: item[1])[:2]
        raise ScheduleError(
            f"site {site}: the decision of step {one[1]} names {one[0]} heads, that of step {other[1]} {other[0]}; "
            "name all heads of the site in both"
        )
    return next(iter(counts), 0)


def _outputs(decision: Decision) -> str:
    return f"the outputs of {decision.order + 1} earlier steps" if decision.order else "the output of an earlier step"


def _fewer(steps: int) -> str:
    return "no earlier step" if steps == 0 else f"only {steps} earlier step{'s' if steps > 1 else ''}"


def output_sources(column: Sequence[Decision], covered: Sequence[bool] = ()) -> tuple[tuple[int, ...], ...]:
    """For each step of one site the steps whose outputs it reads, the newest first; fewer than it needs if there are
    not as many before it, and none if it reads no output. ``covered``: the steps at which its block is left out."""
    computed: list[int] = []
    found: list[tuple[int, ...]] = []
    for step, decision in enumerate(column):
        if decision.kind.reads == "output":
            found.append(tuple(reversed(computed[-1 - decision.order :])))
            continue
        found.append(())
        if decision.kind.fills("output") and not (covered and covered[step]):
            computed.append(step)
    return tuple(found)


def forecast_weights(
    progress: Sequence[float], step: int, sources: Sequence[int], basis: Basis | str = Basis.PROGRESS
) -> tuple[float, ...]:
    """The weights by which the outputs of the steps ``sources`` are summed to forecast that of ``step``.

    They are those of the polynomial through the outputs, of degree ``len(sources) - 1``, at the step: with x the step's
    coordinate in ``basis`` and x_j those of the sources, ``w_j = prod over m != j of (x - x_m) / (x_j - x_m)``
    (Lagrange; the same as Newton's divided differences). They sum to 1. Where a schedule visits a timestep twice
    (second-order schedulers), sources of equal progress determine no polynomial in it, and the number of the step is
    the coordinate.
    """
    of = [float(each) for each in range(len(progress))]
    if basis is Basis.PROGRESS:
        values = [progress[each] for each in sources]
        if all(abs(a - b) > _SAME for i, a in enumerate(values) for b in values[:i]):
            of = [float(value) for value in progress]
    weights = []
    for own in sources:
        weight = 1.0
        for other in sources:
            if other != own:
                weight *= (of[step] - of[other]) / (of[own] - of[other])
        weights.append(weight)
    return tuple(weights)


def buckets(roles: Iterable[tuple[Role, ...]]) -> tuple[Bucket, ...]:
    """Steps grouped by equal rows of roles, in the order of their first step."""
    steps_of: dict[tuple[Role, ...], list[int]] = {}
    for step, row in enumerate(roles):
        steps_of.setdefault(row, []).append(step)
    return tuple(Bucket(row, tuple(steps)) for row, steps in steps_of.items())


def uniform_progress(steps: int) -> tuple[float, ...]:
    """Progress of ``steps`` evenly spaced steps, trailing spacing: ``(steps - i) / steps``, from 1 down to 1/steps."""
    check_steps(steps)
    return tuple((steps - step) / steps for step in range(steps))


def check_steps(steps: int) -> None:
    """Raise :class:`ScheduleError` unless ``steps`` is a whole number of at least 1."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ScheduleError(f"the number of steps is {steps!r}; give a whole number, at least 1")


def check_progress(progress: Sequence[float]) -> tuple[float, ...]:
    """``progress`` as a tuple of floats: at least one, each in [0, 1], never rising. Raises :class:`ScheduleError`."""
    values = tuple(float(value) for value in progress)
    if not values:
        raise ScheduleError("a schedule needs at least one step, but its progress is empty")
    for step, value in enumerate(values):
        if not 0.0 <= value <= 1.0:  # also false for NaN
            raise ScheduleError(f"step {step}: progress is {value}; it must lie in [0, 1], 1 at pure noise")
        if step and value > values[step - 1]:
            raise ScheduleError(
                f"step {step}: progress rises from {values[step - 1]} to {value}; a run goes from 1 (noise) down to 0"
            )
    return values


def normalised_progress(timesteps: Sequence[float], num_train_timesteps: int) -> tuple[float, ...]:
    """``t / num_train_timesteps`` of each step: 1 at pure noise, falling to 0. No unit, float.

    Equal neighbours (second-order schedulers call the model twice at a timestep) are kept. Timesteps that rise
    (``invert_sigmas``, Mochi) count from the other end: progress is then ``1 - t / num_train_timesteps``.
    Raises :class:`ScheduleError` if there are none, if one lies outside ``[0, num_train_timesteps]`` or if they go up
    and down.
    """
    if isinstance(num_train_timesteps, bool) or num_train_timesteps < 1:
        raise ScheduleError(f"the number of training timesteps is {num_train_timesteps!r}; it must be at least 1")
    values = [float(timestep) / num_train_timesteps for timestep in timesteps]
    for step, value in enumerate(values):
        if not -_SLACK <= value <= 1 + _SLACK:
            raise ScheduleError(
                f"step {step}: timestep {float(timesteps[step])} lies outside 0..{num_train_timesteps}; for a "
                "scheduler that counts otherwise give the progress of each step yourself, from 1 (noise) down to 0"
            )
    values = [min(1.0, max(0.0, value)) for value in values]
    if values and values[-1] > values[0]:
        values = [1.0 - value for value in values]
    return check_progress(values)


def scheduler_progress(scheduler: object, steps: int) -> tuple[float, ...]:
    """Progress of a diffusers scheduler: of its timesteps if ``steps`` are set, else of a copy set to ``steps``.

    The scheduler itself is never changed. There is one value per model call, so a second-order scheduler gives more
    than ``steps``. Raises :class:`ScheduleError` if the copy cannot be set (dynamic shifting needs the image size) and
    for the reasons of :func:`normalised_progress`.
    """
    check_steps(steps)
    name = type(scheduler).__name__
    total = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    if not isinstance(total, int) or not hasattr(scheduler, "timesteps") or not hasattr(scheduler, "set_timesteps"):
        raise ScheduleError(
            f"{name} has no timesteps, set_timesteps or config.num_train_timesteps, so its schedule is unknown; give a "
            "diffusers scheduler, or the progress of each step"
        )
    timesteps = _numbers(scheduler.timesteps)
    is_set = getattr(scheduler, "num_inference_steps", None) is not None
    if not is_set or steps not in (len(timesteps), getattr(scheduler, "num_inference_steps", None)):
        duplicate = copy.deepcopy(scheduler)
        try:
            duplicate.set_timesteps(steps)
        except (TypeError, ValueError, AttributeError) as error:
            raise ScheduleError(
                f"{name} cannot be set to {steps} steps here ({error}); set its timesteps first, as the pipeline does, "
                "or give the progress of each step"
            ) from error
        timesteps = _numbers(duplicate.timesteps)
    return normalised_progress(timesteps, total)


def _numbers(values: object) -> list[float]:
    """Floats of a 1-D tensor, array or sequence (a tensor is read in one go)."""
    listed = values.tolist() if hasattr(values, "tolist") else values
    assert isinstance(listed, Iterable)
    return [float(value) for value in listed]


def stretched(progress: Sequence[float], steps: int) -> tuple[float, ...]:
    """``progress`` read at ``steps`` evenly spaced places, linear in between and down to 0; uniform stays uniform."""
    if steps == len(progress):
        return tuple(progress)
    ends = [*progress, 0.0]
    values: list[float] = []
    for step in range(steps):
        whole, rest = divmod(step * len(progress), steps)
        value = ends[whole] + (ends[whole + 1] - ends[whole]) * rest / steps
        values.append(min(value, values[-1]) if values else value)
    return tuple(values)


def nearest_steps(own: Sequence[float], wanted: Sequence[float]) -> tuple[int, ...]:
    """For each of ``wanted`` the step of ``own`` with the nearest progress; ties go to the earlier step.

    Both fall from 1 to 0 (:func:`check_progress`). Where a scheduler visits a timestep several times, the n-th visit is
    matched with the n-th visit. The result never decreases, and ``nearest_steps(p, p)`` is ``0, 1, 2, ...``.
    """
    if tuple(own) == tuple(wanted):
        return tuple(range(len(own)))
    groups: list[list[int]] = []
    for step, value in enumerate(own):
        if step and abs(value - own[step - 1]) <= _SAME:
            groups[-1].append(step)
        else:
            groups.append([step])
    rising = [-own[group[0]] for group in groups]
    found: list[int] = []
    visit = 0
    for step, value in enumerate(wanted):
        visit = visit + 1 if step and abs(value - wanted[step - 1]) <= _SAME else 0
        below = bisect.bisect_left(
            rising, -value
        )  # the first group that is not above; the nearest is it or the one before
        near = range(max(0, below - 2), min(len(groups), below + 1))
        closest = min(abs(rising[index] + value) for index in near)
        group = groups[next(index for index in near if abs(rising[index] + value) <= closest + _SAME)]
        found.append(max(group[min(visit, len(group) - 1)], found[-1] if found else 0))
    return tuple(found)


@dataclass(frozen=True)
class Promotion:
    """A reader that became full because the step that fills its cache fell out of the schedule.

    ``step`` counts in the new schedule, ``site`` is an index; ``wanted`` is what the plan says there.
    """

    step: int
    site: int
    wanted: Decision
    reason: str


def take_rows(
    rows: Sequence[Sequence[Decision]], source_steps: Sequence[int], blocks: Blocks = ()
) -> tuple[tuple[tuple[Decision, ...], ...], tuple[Promotion, ...]]:
    """Rows of a new schedule whose step ``j`` follows row ``source_steps[j]``, and the promotions this takes.

    Contract 6. In the plan, a reuse or forecast at row ``i`` reads what the last rows before ``i`` computed that
    compute an output; a window+residual reads the residual of the last row before ``i`` of kind full. In the new
    schedule a reader keeps its decision iff the newest that it would find is at least as recent: iff an earlier new
    step that fills the cache follows that row or a later one; a decision by heads, iff that holds for every head that
    reads; a forecast of order k also needs k + 1 steps that fill it. If not, the filler fell out, and the reader
    becomes full, keeping its CFG flag. It then fills the caches itself, for the next readers of the same row: one
    promotion per gap is enough (for a forecast, up to k + 1).

    ``source_steps`` must not decrease (:func:`nearest_steps`). The result always satisfies :func:`assign_roles` if
    ``rows`` does. Raises :class:`ScheduleError` if source steps decrease or lie outside ``rows``.
    """
    for step, source in enumerate(source_steps):
        if not 0 <= source < len(rows) or (step and source < source_steps[step - 1]):
            raise ScheduleError(
                f"step {step} follows row {source}, but rows run from 0 to {len(rows) - 1} and must not go back"
            )
    columns: dict[int, list[Decision]] = {}
    promotions: list[Promotion] = []
    count = len(rows[0])
    covered: dict[int | None, list[bool]] = {None: [False] * len(source_steps)}
    """By block, at which steps what it holds is covered."""
    for site in _outermost_first(count, blocks):
        around = covered[blocks[site] if blocks else None]
        there = _covered(rows, site, blocks)
        column, promoted = _take_column([row[site] for row in rows], source_steps, site, there, around)
        columns[site] = column
        covered[site] = [one or decision.kind.reads == "output" for one, decision in zip(around, column, strict=True)]
        promotions.extend(promoted)
    promotions.sort(key=lambda promotion: (promotion.step, promotion.site))
    taken = tuple(tuple(columns[site][step] for site in range(count)) for step in range(len(source_steps)))
    return taken, tuple(promotions)


def _outermost_first(count: int, blocks: Blocks) -> list[int]:
    """All sites, each behind what holds it."""

    def depth(site: int | None) -> int:
        return 0 if site is None or not blocks else 1 + depth(blocks[site])

    return sorted(range(count), key=depth)


def _take_column(
    plan: Sequence[Decision],
    source_steps: Sequence[int],
    site: int,
    covered_there: Sequence[bool],
    covered: Sequence[bool],
) -> tuple[list[Decision], list[Promotion]]:
    """:func:`take_rows` for one site, which its block covers at these steps of the plan and of the new schedule."""
    pairs = list(zip(plan, covered_there, strict=True))
    outputs = _latest_before(decision.kind.fills("output") and not left for decision, left in pairs)
    residuals = _latest_before(decision.is_full and not left for decision, left in pairs)
    heads = _HeadRows(plan, covered_there, site)
    column: list[Decision] = []
    promotions: list[Promotion] = []
    output_row = residual_row = -1
    """The plan row followed by the latest new step that computed an output, and by the latest of kind full."""
    computed = 0
    """How many new steps have computed an output."""
    for step, source in enumerate(source_steps):
        wanted = plan[source]
        if covered[step]:
            column.append(FULL)
            continue
        decision = wanted
        needed, held, cache = -1, -1, ""
        if wanted.kind.reads == "output":
            needed, held, cache = outputs[source], output_row, "output"
        elif wanted.kind is Kind.WINDOW_RESIDUAL:
            needed, held, cache = residuals[source], residual_row, "residual"
        elif wanted.groups:
            needed, held, cache = heads.wants(source)
        reason = ""
        if held < needed:
            reason = f"it reads the {cache} of the plan's step {needed}, which no earlier step of this schedule follows"
        elif wanted.order and computed <= wanted.order:
            reason = f"it needs {_outputs(wanted)}, and in this schedule {_fewer(computed)} computes one"
        if reason:
            decision = Decision(Kind.FULL, None, wanted.cfg_shared)
            promotions.append(Promotion(step, site, wanted, reason))
        column.append(decision)
        if decision.kind.fills("output"):
            output_row = source
            computed += 1
        if decision.is_full:
            residual_row = source
        heads.follow(decision, source)
    return column, promotions


class _HeadRows:
    """For every head of a site: which rows of a plan its caches need, and which rows the new steps so far follow.

    ``covered``: the rows of the plan at which its block is left out.
    """

    def __init__(self, plan: Sequence[Decision], covered: Sequence[bool], site: int) -> None:
        self._plan = plan
        count = range(_heads_in(plan, site))
        forms = [
            [(decision.form_of(head), left) for decision, left in zip(plan, covered, strict=True)] for head in count
        ]
        self._outputs = [
            _latest_before((form.is_full or form.kind.windowed) and not left for form, left in column)
            for column in forms
        ]
        self._residuals = [_latest_before(form.is_full and not left for form, left in column) for column in forms]
        self._output_rows = [-1 for _ in count]
        self._residual_rows = [-1 for _ in count]

    def wants(self, source: int) -> tuple[int, int, str]:
        """The row that the reader in row ``source`` needs, the latest one that a step followed, and the cache, of the
        first head for which that is too early; of any head if there is none."""
        found = (-1, -1, "")
        for head, form in enumerate(self._plan[source].forms):
            if form.kind is Kind.REUSE:
                found = self._outputs[head][source], self._output_rows[head], f"output of head {head}"
            elif form.kind is Kind.WINDOW_RESIDUAL:
                found = self._residuals[head][source], self._residual_rows[head], f"residual of head {head}"
            if found[1] < found[0]:
                break
        return found

    def follow(self, decision: Decision, source: int) -> None:
        """A new step follows row ``source`` with this decision."""
        for head in range(len(self._output_rows)):
            form = decision.form_of(head)
            if form.is_full or form.kind.windowed:
                self._output_rows[head] = source
            if form.is_full:
                self._residual_rows[head] = source


def _latest_before(fills: Iterable[bool]) -> list[int]:
    """For each row the latest earlier row that fills a cache; -1 if there is none."""
    found: list[int] = []
    latest = -1
    for row, filled in enumerate(fills):
        found.append(latest)
        if filled:
            latest = row
    return found
