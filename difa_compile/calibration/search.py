"""DiTFastAttn's greedy search for a plan (Yuan et al. 2024, arXiv 2406.08552, section 3.4), and a choice of our own.

Steps outer, in sampling order; sites inner, in execution order. At every step but the first each site takes one of the
candidates whose loss is below its threshold, else it stays full. Published: the first of them, in a fixed order. Ours
(``rank`` other than ``"published"``): the one with the lowest price,

    price = cost / cost of full attention + loss / threshold,

if that is below 1, the price of full attention. So a decision has to save more of the site's cost than it uses up of
the site's threshold, and of two that save about as much the one that changes less is taken. Cost is predicted time on
this machine, or operations with projections.

1. the loss compares the WHOLE output of the model with the output in which every site is full at this step; earlier
   sites of the step already have their decisions, later sites are full;
2. site i of L (from 0) has the threshold ``(i + 1) / L * delta``, the same at every step;
3. the row so chosen fills the caches and gives the output with which sampling goes on, so that later steps see what
   earlier choices did.

Where guidance is two calls per step, sites are searched on the conditional call without sharing; then, on the
unconditional one, each site that is not reused also tries to take the conditional call's output of this step, by the
same rule and threshold, with the loss of the unconditional output.

The future is unknown during the search, so each step keeps whatever a later step might read: the output of every site
that is not reused and the residual of every full one. The part of the network before the site at hand is not computed
again for each candidate, and candidates run compiled variants that are built once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from difa_compile.backend.capture import Capture, State
from difa_compile.backend.run import Run
from difa_compile.backend.two_calls import alone, take_over
from difa_compile.calibration.state import CalibrationState
from difa_compile.decision import FULL, REUSE, Decision, Kind, Window, WindowShape
from difa_compile.errors import CalibrationError, NonFiniteError, ScheduleError, UnsupportedPipelineError
from difa_compile.passes.caches import CacheName
from difa_compile.plan.cost import flops_saved
from difa_compile.plan.plan import Cell, Plan, Settings, SiteInfo, Trial, model_digest, same_but_for_text
from difa_compile.plan.schedule import Role

CANDIDATES: Mapping[str, tuple[Kind, bool]] = MappingProxyType(
    {
        "reuse": (Kind.REUSE, False),
        "reuse+cfg": (Kind.REUSE, True),
        "window+residual+cfg": (Kind.WINDOW_RESIDUAL, True),
        "window+residual": (Kind.WINDOW_RESIDUAL, False),
        "window+cfg": (Kind.WINDOW, True),
        "window": (Kind.WINDOW, False),
        "full+cfg": (Kind.FULL, True),
    }
)
"""Candidates by name: what is computed, and whether the guidance halves share it."""

PUBLISHED_CANDIDATES = ("reuse", "window+residual+cfg", "window+residual", "full+cfg")
"""DiTFastAttn's, in its order: AST, WA-RS+ASC, WA-RS, ASC."""

MAX_THRESHOLD = 10.0
"""Losses are clipped to this, so a threshold above it would admit everything."""


def loss_of(form: str, full: Sequence[Any], tried: Sequence[Any]) -> float:
    """Relative distance of two model outputs, in [0, 10]: the mean over the elements of each output, then over outputs.

    With a = full, b = tried: ``"paper"`` is ``clip(|a - b| / (max(|a|, |b|) + 1e-6), 0, 10)``; ``"code"``, the
    published program's, is ``clip(|(a - b) / (max(a, b) + 1e-6)|, 0, 10)``, which differs where values are negative: it
    is larger there, so that less passes the same threshold.
    NaN in, NaN out.
    """
    means = []
    for a, b in zip(full, tried, strict=True):
        if not (isinstance(a, Tensor) and a.is_floating_point()):
            continue
        a, b = (x if x.dtype == torch.float64 else x.float() for x in (a, b))
        largest = torch.maximum(a.abs(), b.abs()) if form == "paper" else torch.maximum(a, b)
        means.append(((a - b) / (largest + 1e-6)).abs().clamp(0.0, MAX_THRESHOLD).mean())
    return float(torch.stack(means).mean())


@dataclass(frozen=True)
class Candidate:
    """A decision that may be tried at a site. ``reason``: why it cannot be, or None. ``cost``: share of full's."""

    decision: Decision
    reason: str | None
    cost: float


def _slower(capture: Capture, index: int, decision: Decision) -> str | None:
    figures = capture.prediction.why_slower(index, decision)
    return None if figures is None else f'{figures}; rank="published" tries it anyway'


def default_window(site: SiteInfo) -> Window:
    """DiTFastAttn's: a band of N/8 tokens on each side, N being the number of image tokens."""
    tokens = site.layout.image_tokens if site.layout is not None else site.tokens
    return Window(WindowShape.BAND, max(1, tokens // 8))


@dataclass(frozen=True)
class SearchSettings:
    threshold: float
    loss: str
    window: Window | None
    candidates: tuple[str, ...]
    conditional_half: int | None
    cfg_reason: str
    """Why guidance halves cannot be shared in this pipeline; empty if they can."""
    rank: str = "published"
    """By what candidates are weighed: ``"time"`` or ``"flops"``; ``"published"``: the first below the threshold, which
    is the choice of the published program if ``loss`` is its too (``"code"``)."""
    profile: str | None = None
    """Digest of the machine profile that times are predicted with."""

    def identity(self) -> dict[str, object]:
        return {**asdict(self), "window": str(self.window)}

    def window_at(self, site: SiteInfo) -> Window:
        return self.window if self.window is not None else default_window(site)

    def decisions_at(self, site: SiteInfo) -> list[Decision]:
        """The candidates at a site, in the order tried."""
        made = []
        for name in self.candidates:
            kind, shared = CANDIDATES[name]
            made.append(Decision(kind, self.window_at(site) if kind.windowed else None, shared))
        return made


class Search:
    """The search over one pass through the schedule.

    Each call of the transformer arrives at :meth:`call`; the row of its step is searched if it is not known from an
    earlier, interrupted calibration, and then carried out. A row is saved once the next step begins: by then it is
    final.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        settings: SearchSettings,
        saved: CalibrationState,
        make_bar: Callable[[int, int], Any] | None,
        form: str,
    ) -> None:
        self.models = tuple(models)
        self.settings = settings
        self.saved = saved
        self._form = form
        """How the pipeline guides; :attr:`guidance` is how it does in the call at hand."""
        self.guidance = "none"
        self.cfg_reason = settings.cfg_reason
        self.progress: tuple[float, ...] = ()
        self._row: tuple[Cell, ...] | None = None
        """The row of the step in progress, if it was searched now."""
        self._sites: tuple[SiteInfo, ...] = ()
        self._candidates: list[list[Candidate]] = []
        self._captures: list[Capture] = []
        self._streams: dict[tuple[int, int, str | None], _Stream] = {}
        """By capture, model and branch: calls that keep caches for each other."""
        self._step = -1
        self._branches: tuple[str | None, ...] = ()
        """The calls made in this step so far."""
        self._conditional: dict[CacheName, Tensor] = {}
        """Caches of the conditional call of this step, for the other call."""
        self._two_calls = False
        self._shares = False
        """Whether an unconditional call has followed a conditional one."""
        self._make_bar = make_bar
        self._bar: Any = None

    @property
    def _weighed(self) -> bool:
        """Whether candidates are weighed, or the first below the threshold is taken."""
        return self.settings.rank != "published"

    @property
    def done(self) -> int:
        """Number of steps that are decided and saved."""
        return len(self.saved.rows)

    def open(self, progress: tuple[float, ...], guided: bool | None) -> Run:
        """The run for one pass through the schedule. ``guided``: whether guidance is on in this call, if known."""
        if guided is False:
            self.cfg_reason = self.cfg_reason or "guidance is off in this call, so its batch has no halves"
        elif self._form in ("two-call", "batched"):
            self.guidance = self._form
        if self.progress:
            raise UnsupportedPipelineError(
                "the pipeline goes through its schedule more than once in a call (set_timesteps is called again), "
                "which calibration does not support; calibrate with inputs that take one pass"
            )
        if self.done > len(progress):
            raise ScheduleError(
                f"the saved calibration has {self.done} steps, but the schedule has {len(progress)}; delete "
                f"{self.saved.path} to start from the beginning"
            )
        self.progress = progress
        return SearchRun(progress, self)

    def plan(self) -> Plan:
        """The plan found. Raises :class:`CalibrationError` if the pipeline stopped early."""
        self._finish_row()
        if not self._sites or self.done != len(self.progress):
            raise CalibrationError(
                f"the pipeline ended after {self.done} of {len(self.progress)} steps; calibrate with inputs that go "
                "through the whole schedule"
            )
        chosen = {str(self.settings.window_at(site)) for site in self._sites}
        windowed = any("window" in name for name in self.settings.candidates)
        settings = Settings(
            method="weighed" if self._weighed else "greedy",
            threshold=self.settings.threshold,
            loss=self.settings.loss,
            window=(chosen.pop() if len(chosen) == 1 else "band:N/8") if windowed else None,
            candidates=self.settings.candidates,
            guidance="none" if self.guidance == "two-call" and not self._two_calls else self.guidance,
            conditional_half=self.settings.conditional_half if self.guidance == "batched" else None,
            sample=self._captures[0].model.sample,
        )
        return Plan(model_digest(self.models[0]), settings, self._sites, self.progress, tuple(self.saved.rows))

    def close(self) -> None:
        """Stop showing progress and let the caches go."""
        self._streams.clear()
        self._conditional = {}
        if self._bar is not None:
            self._bar.close()

    def call(self, capture: Capture, args: list[Any], step: int, branch: str | None) -> list[Any]:
        """One transformer call: search its row if need be, carry it out, keep its caches."""
        self._meet(capture)
        if step > self.done:
            self._finish_row()
        if step != self._step:
            self._step, self._branches, self._conditional = step, (), {}
            for place, left in list(self._streams.items()):
                if left.last < step - 1:  # it has left out a step: what it holds is of another time
                    del self._streams[place]
        second = self.guidance == "two-call" and branch == "uncond" and self._branches == ("cond",)
        self._branches += (branch,)
        self._two_calls = self._two_calls or len(self._branches) == 2
        self._shares = self._shares or second
        start = capture.begin(args)
        place = (id(capture), id(capture.model.parameter(args)), branch)
        stream = self._streams.setdefault(place, _Stream())
        stream.last = step
        caches = stream.caches
        if step == self.done and self._row is None:
            self._row, state = self._search_step(capture, start, caches, step)
            written = state.caches_out
        else:
            cells = self._row if step == self.done else self.saved.rows[step]
            assert cells is not None
            if second and step == self.done and step > 0:
                cells = self._row = self._search_sharing(capture, start, caches, step, cells)
            decisions = [cell.decision for cell in cells]
            state, written = self._carry_out(capture, start, caches, decisions, second=second)
        caches.update(written)
        if branch == "cond":
            self._conditional = caches
        return capture.outputs(state)

    def _finish_row(self) -> None:
        """The step in progress is over: save its row."""
        if self._row is None:
            return
        row = self._row
        if self.guidance == "two-call" and not self._shares and self.done > 0:
            row = tuple(self._unshared(index, cell) for index, cell in enumerate(row))
        self.saved.rows.append(row)
        self._row = None
        self.saved.save()

    def _unshared(self, index: int, cell: Cell) -> Cell:
        """The cell with a note on the sharing candidates, which had no second call to be tried on."""
        reason = "no unconditional call, known to be that, followed the conditional one"
        shared = [c.decision for c in self._candidates[index] if c.reason is None and c.decision.cfg_shared]
        return replace(cell, trials=(*cell.trials, *(Trial(d, None, self._limit(index), reason) for d in shared)))

    def _meet(self, capture: Capture) -> None:
        """Note the sites of the first graph, and what cannot be done in any; later graphs must have the same sites."""
        if any(known is capture for known in self._captures):
            return
        self._captures.append(capture)
        sites = tuple(site.info for site in capture.model.sites)
        if not self._sites:
            self._sites = sites
            for index, site in enumerate(sites):
                wanted = self.settings.decisions_at(site)
                candidates = [(decision, self._why_not(capture, index, decision)) for decision in wanted]
                self._candidates.append(self._costed(capture, index, candidates))
            if self._make_bar is not None:
                self._bar = self._make_bar(len(sites) * len(self.progress), len(sites) * self.done)
        elif not same_but_for_text(sites, self._sites, (capture.model.sample, self._captures[0].model.sample)):
            raise CalibrationError(
                "the transformer was called with inputs of other sizes in mid-run, so that its attention sites "
                "changed; calibrate with inputs of one size"
            )
        elif self.settings.conditional_half is not None and capture.model.batch != self._captures[0].model.batch:
            raise CalibrationError(
                f"the transformer was called with a batch of {capture.model.batch} in its attention, after one of "
                f"{self._captures[0].model.batch}: guidance is left out at some steps or in some calls, so its halves "
                "cannot be shared; leave the +cfg candidates out, or the option that makes such calls (an interval of "
                "guidance, perturbed or skipped-layer guidance)"
            )
        else:
            self._candidates = [
                [replace(one, reason=one.reason or self._why_not(capture, index, one.decision)) for one in known]
                for index, known in enumerate(self._candidates)
            ]

    def _why_not(self, capture: Capture, index: int, decision: Decision) -> str | None:
        if not decision.cfg_shared:
            return capture.model.why_not(index, decision)
        if self.cfg_reason:
            return self.cfg_reason
        if self.guidance != "two-call":
            return capture.model.why_not(index, decision)
        # Across calls sharing is reuse of the output that the other call of this step has computed.
        if capture.model.sites[index].cache_shapes != self._captures[0].model.sites[index].cache_shapes:
            return "the two calls have texts of different lengths, so the output of one does not fit the other"
        return capture.model.why_not(index, alone(decision)) or capture.model.why_not(index, REUSE)

    def _costed(self, capture: Capture, index: int, candidates: list[tuple[Decision, str | None]]) -> list[Candidate]:
        """The candidates of a site with their cost, a share of full attention's, the cheapest first; ties keep their
        order. With a reason: those that cannot be carried out, and windows that are predicted no faster than full.

        Operations are counted where times are not asked for, or one of them cannot be predicted. For the published
        search: as they are, at no cost.
        """
        if not self._weighed:
            return [Candidate(decision, reason, 0.0) for decision, reason in candidates]
        if self.settings.rank == "time":
            candidates = [
                (decision, reason if reason is not None else _slower(capture, index, decision))
                for decision, reason in candidates
            ]
        decisions = [decision for decision, _ in candidates]
        site = self._sites[index]
        costs = [1.0 - flops_saved(decision, site) for decision in decisions]
        if self.settings.rank == "time":
            seconds = [capture.prediction.seconds(index, decision) for decision in (FULL, *decisions)]
            known = [time for time in seconds if time is not None]
            if len(known) == len(seconds) and known[0] > 0:
                costs = [time / known[0] for time in known[1:]]
        found = [Candidate(*pair, cost) for pair, cost in zip(candidates, costs, strict=True)]
        return sorted(found, key=lambda candidate: candidate.cost)

    def _role(self, site: int, decision: Decision) -> Role:
        """``decision`` and all caches that a later step, or the other call of this step, might read."""
        usable = [candidate.decision for candidate in self._candidates[site] if candidate.reason is None]
        across = self.guidance == "two-call" and any(candidate.cfg_shared for candidate in usable)
        kept = across or any(candidate.kind.reads == "output" for candidate in usable)
        residual = decision.is_full and any(candidate.kind.reads == "residual" for candidate in usable)
        return Role(
            decision,
            emit_output=kept and decision.kind.fills("output"),
            emit_residual=residual,
            residual_window=self.settings.window_at(self._sites[site]) if residual else None,
        )

    def _carry_out(
        self,
        capture: Capture,
        start: State,
        caches: Mapping[CacheName, Tensor],
        decisions: Sequence[Decision],
        *,
        second: bool = False,
        stop: int | None = None,
    ) -> tuple[State, Mapping[CacheName, Tensor]]:
        """Run with these decisions, up to site ``stop``; the state reached and the caches filled so far.

        Across calls (``second``: the unconditional one) shared sites take the conditional call's caches of this step.
        """
        paths = [site.path for site in self._sites]
        if self.guidance != "two-call":
            found = [d if readable(d, path, caches) else FULL for d, path in zip(decisions, paths, strict=True)]
            roles = [self._role(site, decision) for site, decision in enumerate(found)]
            state = capture.advance(start, roles, caches, stop=stop)
            return state, state.caches_out
        shared = [second and decision.cfg_shared for decision in decisions]
        found = [
            alone(d) if share or readable(alone(d), path, caches) else FULL
            for d, path, share in zip(decisions, paths, shared, strict=True)
        ]
        roles = [self._role(site, decision) for site, decision in enumerate(found)]
        taken = take_over(paths, roles, shared, caches, self._conditional)
        state = capture.advance(start, taken.roles, taken.read, stop=stop)
        return state, {**taken.kept, **state.caches_out}

    def _search_step(
        self, capture: Capture, start: State, caches: Mapping[CacheName, Tensor], step: int
    ) -> tuple[tuple[Cell, ...], State]:
        """Decide every site of one step; also the state at the end of the chosen row."""
        count = len(self._sites)
        reference: list[Any] = []
        if step > 0:
            reference = capture.outputs(capture.advance(start, [Role(FULL)] * count, caches))
            check_finite(reference, f"step {step}, all sites full")
        state = start
        roles: list[Role] = []
        cells: list[Cell] = []
        for index, site in enumerate(self._sites):
            rest = [Role(FULL)] * (count - index - 1)
            limit = self._limit(index)
            # A segment may hold several sites: then the state stays before it until the last of them is decided.
            state = capture.advance(state, [*roles, Role(FULL), *rest], caches, stop=index)
            trials: list[Trial] = []
            role = self._role(index, FULL)
            ahead: State | None = None
            lowest = 1.0
            for candidate in self._candidates[index] if step > 0 else ():
                decision = candidate.decision
                if candidate.reason is not None:
                    trials.append(Trial(decision, None, limit, candidate.reason))
                    continue
                if decision.cfg_shared and self.guidance == "two-call":
                    continue  # tried on the other call
                if not readable(decision, site.path, caches):
                    trials.append(Trial(decision, None, limit, "nothing is cached yet: these calls begin at this step"))
                    continue
                if candidate.cost >= lowest:
                    continue  # whatever its loss
                tried = self._role(index, decision)
                row = [*roles, tried, *rest]
                beyond = capture.advance(state, row, caches, stop=index + 1) if rest else state
                measured = self._measure(capture, beyond, row, caches, reference, step, decision, site)
                trial = Trial(decision, measured, limit, cost=candidate.cost if self._weighed else None)
                trials.append(trial)
                if measured < limit and not self._weighed:
                    role, ahead = tried, beyond
                    break
                if trial.price is not None and trial.price < lowest:
                    role, ahead, lowest = tried, beyond, trial.price
            roles.append(role)
            if ahead is not None:
                state = ahead
            cells.append(Cell(role.decision, tuple(trials), flops_saved(role.decision, site)))
            if self._bar is not None:
                self._bar.update(1)
        state = capture.advance(state, roles, caches)
        if step == 0:
            check_finite(capture.outputs(state), "step 0, all sites full")
        return tuple(cells), state

    def _search_sharing(
        self, capture: Capture, start: State, caches: Mapping[CacheName, Tensor], step: int, cells: tuple[Cell, ...]
    ) -> tuple[Cell, ...]:
        """Decide which sites of the unconditional call take the conditional call's output."""
        count = len(cells)
        reference = capture.outputs(capture.advance(start, [Role(FULL)] * count, caches))
        check_finite(reference, f"step {step}, unconditional call, all sites full")
        found = list(cells)
        state = start
        for index, (cell, site) in enumerate(zip(cells, self._sites, strict=True)):
            shared = replace(cell.decision, cfg_shared=True)
            usable = [candidate.decision for candidate in self._candidates[index] if candidate.reason is None]
            if cell.decision.kind.reads == "output" or shared not in usable:
                continue
            limit = self._limit(index)
            row = [*(done.decision for done in found[:index]), shared, *[FULL] * (count - index - 1)]
            state, _ = self._carry_out(capture, state, caches, row, second=True, stop=index)
            end, _ = self._carry_out(capture, state, caches, row, second=True)
            outputs = capture.outputs(end)
            check_finite(outputs, f"step {step}, unconditional call, site {site.path}, candidate {shared}")
            measured = loss_of(self.settings.loss, reference, outputs)
            trial = Trial(shared, measured, limit, cost=0.0 if self._weighed else None)  # of this call: a copy
            own = next((t.price for t in cell.trials if t.decision == cell.decision and t.price is not None), 1.0)
            wins = measured < limit if trial.price is None else trial.price < own
            decision = shared if wins else cell.decision
            found[index] = Cell(decision, (*cell.trials, trial), flops_saved(decision, site))
        return tuple(found)

    def _limit(self, index: int) -> float:
        """The depth-scaled threshold of a site."""
        return (index + 1) / len(self._sites) * self.settings.threshold

    def _measure(
        self,
        capture: Capture,
        state: State,
        row: Sequence[Role],
        caches: Mapping[CacheName, Tensor],
        reference: Sequence[Any],
        step: int,
        decision: Decision,
        site: SiteInfo,
    ) -> float:
        """Loss of the model's output when ``row`` is run on from ``state``."""
        outputs = capture.outputs(capture.advance(state, row, caches))
        check_finite(outputs, f"step {step}, site {site.path}, candidate {decision}")
        return loss_of(self.settings.loss, reference, outputs)


@dataclass
class _Stream:
    """The caches of one branch of one model in one capture, and the latest step in which it was called."""

    caches: dict[CacheName, Tensor] = field(default_factory=dict)
    last: int = -1


def readable(decision: Decision, path: str, caches: Mapping[CacheName, Tensor]) -> bool:
    """Whether the caches hold what ``decision`` reads at the site called ``path``."""
    reads = decision.kind.reads
    return reads is None or any(name.kind == reads and name.site == path for name in caches)


class SearchRun(Run):
    """A run in which the search decides what each call of the model does."""

    def __init__(self, progress: tuple[float, ...], search: Search) -> None:
        super().__init__(search.models[0], len(progress), progress=progress, experts=search.models[1:])
        self._search = search

    def call(self, capture: Capture, args: list[Any]) -> list[Any]:
        self.calls += 1
        return self._search.call(capture, args, self.index, self.current_branch)


def check_finite(outputs: Sequence[Any], where: str) -> None:
    for output in outputs:
        if isinstance(output, Tensor) and output.is_floating_point() and not bool(torch.isfinite(output).all()):
            raise NonFiniteError(
                f"{where}: the model's output holds NaN or infinity; check the weights and the inputs, and use a wider "
                "dtype (bfloat16 or float32) if this one overflows"
            )
