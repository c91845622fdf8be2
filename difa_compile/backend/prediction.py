"""What the sites of an analysed model take on this machine, predicted from its profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from difa_compile.decision import Decision
from difa_compile.machine.profile import Profile, current
from difa_compile.passes.analyse.find_attention import attention_inputs
from difa_compile.passes.analysed_model import AnalysedModel
from difa_compile.passes.graph import tensor_of
from difa_compile.plan.cost import Setting, seconds_text, site_seconds, without_window
from difa_compile.plan.schedule import Role, assign_roles


class Prediction:
    """Predicted seconds of a model's sites, by index, in one call of the model."""

    def __init__(self, model: AnalysedModel) -> None:
        self._model = model
        self._seconds: dict[tuple[int, Role | Decision], float | None] = {}

    @cached_property
    def profile(self) -> Profile | None:
        """The profile of this machine, read once, so that all that is predicted for a model agrees."""
        return current(self._setting(0).device)

    def _setting(self, index: int) -> Setting:
        site = self._model.sites[index]
        _, _, value = (node.meta["example_value"] for node in attention_inputs(site.region.attention))
        attended = tensor_of(site.region.attention)  # of the dtype that is computed in, to which autocast may cast
        dtype = value.dtype if attended is None else attended.dtype
        return Setting(
            site.query_shape[0], dtype, value.device, site.key_shape[1], value.shape[-1], site.mask != "none"
        )

    def seconds(self, index: int, role: Role | Decision) -> float | None:
        """Predicted seconds of a site at one step of one call; None without a profile that can tell."""
        if self.profile is None:
            return None
        key = (index, role)
        if key not in self._seconds:
            self._seconds[key] = site_seconds(role, self._model.sites[index].info, self._setting(index), self.profile)
        return self._seconds[key]

    def why_slower(self, index: int, decision: Decision) -> str | None:
        """Both figures in words if a window is predicted to take no less than full attention, which shares as it does.

        Judged by itself, without the step that takes its residual. None also where nothing can be predicted.
        """
        window, full = (self.seconds(index, one) for one in (decision, without_window(decision)))
        if not decision.windows or window is None or full is None or window < full:
            return None
        return self._figures(index, window, full, than="no faster than")

    def _figures(self, index: int, window: float, full: float, note: str = "", than: str = "slower than") -> str:
        assert self.profile is not None
        most = self.profile.extrapolates(self._model.sites[index].info.keys, self._setting(index).dtype)
        return (
            f"predicted {than} full: {seconds_text(window)}{note} against {seconds_text(full)} on this machine"
            f"{', extrapolated from fewer tokens' if most else ''}"
        )

    def slower_windows(
        self, rows: Sequence[Sequence[Decision]], possible: Callable[[int, Decision], Decision]
    ) -> dict[tuple[int, Decision], str]:
        """The windows of ``rows[step][site]`` that are predicted to cost more than they save over this very schedule.

        By site index and decision, with both figures in words. ``possible``: what is carried out of a decision at a
        site. What taking a residual costs is set against what all its readers save. In place of a window comes full
        attention, which shares the CFG halves as the window did.
        """
        found: dict[tuple[int, Decision], str] = {}
        for index in range(len(self._model.sites)):
            column = [possible(index, row[index]) for row in rows]
            windows = [decision for decision in dict.fromkeys(column) if decision.windows]
            again = bool(windows)
            while again:  # a window left out may leave the cost of a residual to the others
                again = False
                for decision in windows:
                    without = [without_window(one) if one == decision else one for one in column]
                    now, then = self._column_seconds(index, column), self._column_seconds(index, without)
                    if now is None or then is None or then >= now:
                        continue
                    full = self.seconds(index, without_window(decision))
                    assert full is not None
                    each = full + (now - then) / column.count(decision)
                    note = " (with its residual)" if decision.kind.reads == "residual" else ""
                    figures = self._figures(index, each, full, note)
                    found[index, decision] = f"{figures}; allow_slower=True takes it anyway"
                    column, again = without, True
        return found

    def _column_seconds(self, index: int, column: Sequence[Decision]) -> float | None:
        """Predicted seconds of one site over a schedule."""
        total = 0.0
        for (role,) in assign_roles([[decision] for decision in column]):
            seconds = self.seconds(index, role)
            if seconds is None:
                return None
            total += seconds
        return total
