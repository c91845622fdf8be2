"""How much each head loses in each window: measured in a short call of the pipeline, before what is proposed is tried.

Every call of the transformer is computed in full, and keeps for each window, besides the heads' outputs, what they
leave out in it (the caches of single heads, :class:`~difa_compile.plan.schedule.HeadCache`). The error of a head is the
squared size of what is left out, relative to that of its output, averaged over the calls (DiTFastAttnV2,
arXiv 2503.22796).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from difa_compile.backend.capture import Capture
from difa_compile.backend.run import Run
from difa_compile.calibration.search import check_finite
from difa_compile.decision import FULL, REUSE, Decision, Window
from difa_compile.errors import CalibrationError, LayoutError
from difa_compile.ops.pairs import visible_pairs
from difa_compile.passes.caches import CacheName
from difa_compile.plan.data import SiteInfo
from difa_compile.plan.schedule import FULL_ROLE, HeadCache, Role
from difa_compile.planner.effects import Array

RANKED_STEPS = 6
"""Steps of the short call: heads keep their habits, so few of them, spread over the schedule, are enough."""


def reusable_sites(capture: Capture) -> tuple[int, ...]:
    """The attention sites that are measured together, by number: those that can be reused."""
    model = capture.model
    return tuple(i for i in range(len(model.sites)) if model.why_not(i, REUSE) is None)


class HeadRanking:
    """One pass through a schedule in which all heads are looked at in all ``windows``."""

    def __init__(self, models: Sequence[nn.Module], windows: Sequence[Window]) -> None:
        self.models = tuple(models)
        self.progress: tuple[float, ...] = ()
        self.done = 0
        self._windows = tuple(windows)
        self._sites: tuple[SiteInfo, ...] = ()
        self._errors: list[Array] = []
        """(H, W) of each call; infinite where a window cannot be taken."""

    def open(self, progress: tuple[float, ...], guided: bool | None) -> Run:
        """The run for one pass through the schedule."""
        self.progress = progress
        return _RankingRun(progress, self)

    def close(self) -> None:
        """Nothing is held beyond a call."""

    @property
    def errors(self) -> Array:
        """(H, W): of all heads, site after site, the error in each window. Raises :class:`CalibrationError` if the
        pipeline made no call."""
        if not self._errors:
            raise CalibrationError("the pipeline made no call of its model, so nothing is known of its heads")
        return np.asarray(np.mean(self._errors, axis=0))

    @property
    def saved(self) -> Array:
        """(H, W): the operations of attention that each head saves in each window."""
        rows = []
        for site in self._sites:
            pairs = [_pairs(site, window) for window in self._windows]
            rows += [[(site.tokens * site.keys - count) * site.head_dim * 4.0 for count in pairs]] * site.heads
        return np.array(rows).reshape(-1, len(self._windows))

    def call(self, capture: Capture, args: list[Any], step: int) -> list[Any]:
        """One transformer call: in full, once for each window."""
        sites = reusable_sites(capture)
        infos = tuple(capture.model.sites[i].info for i in sites)
        if self._sites and infos != self._sites:
            raise CalibrationError(
                "the transformer was called with inputs of other sizes in mid-run, so that its attention changed; "
                "measure with inputs of one size"
            )
        self._sites = infos
        found = np.full((sum(site.heads for site in infos), len(self._windows)), np.inf)
        outputs: list[Any] = []
        for place, window in enumerate(self._windows):
            roles = {i: _keeping(capture, i, window) for i in sites}
            row = tuple(roles.get(i, FULL_ROLE) for i in range(len(capture.model.units)))
            outputs, written = capture.execute(args, row, {})
            check_finite(outputs, f"step {step}, all sites full")
            parts = [_errors_of(infos[k], roles[i], written) for k, i in enumerate(sites)]
            found[:, place] = np.concatenate(parts) if parts else []
        self._errors.append(found)
        self.done = step + 1
        return outputs


class _RankingRun(Run):
    """A run in which every call is computed in full and its heads are looked at."""

    def __init__(self, progress: tuple[float, ...], ranking: HeadRanking) -> None:
        super().__init__(ranking.models[0], len(progress), progress=progress, experts=ranking.models[1:])
        self._ranking = ranking

    def call(self, capture: Capture, args: list[Any]) -> list[Any]:
        self.calls += 1
        return self._ranking.call(capture, args, self.index)


def _keeping(capture: Capture, site: int, window: Window) -> Role:
    """The role of a site that keeps what its heads give, and leave out in a window; full where it can take none."""
    heads = capture.model.sites[site].info.heads
    one = Decision.of_heads([Decision.parse(f"window({window})"), *[FULL] * (heads - 1)])
    if capture.model.why_not(site, one) is not None:
        return FULL_ROLE
    every = tuple(range(heads))
    return Role(FULL, head_writes=(HeadCache(every), HeadCache(every, window)))


def _errors_of(site: SiteInfo, role: Role, written: Mapping[CacheName, Tensor]) -> Array:
    """(heads,): the errors of one site's heads; infinite where nothing was kept."""
    if not role.head_writes:
        return np.full(site.heads, np.inf)
    every = tuple(range(site.heads))
    output, lost = (
        written[CacheName.heads(site.path, every, residual=residual)].double().square().sum((0, 1, 3))
        for residual in (False, True)
    )
    return np.asarray((lost / output.clamp_min(1e-30)).cpu().numpy(), dtype=np.float64)


def _pairs(site: SiteInfo, window: Window) -> int:
    try:
        return visible_pairs(site.layout, window, site.tokens)
    except LayoutError:  # no window can be taken there
        return site.tokens * site.keys
