"""What the sites of an analysed model take on this machine, predicted from its profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from difa_compile.decision import Decision
from difa_compile.machine.profile import ELEMENTWISE, LINEAR, Profile, current, elementwise_work, linear_work
from difa_compile.passes.analyse.find_attention import attention_inputs
from difa_compile.passes.analysed_model import AnalysedModel
from difa_compile.passes.graph import tensor_of
from difa_compile.plan.cost import Setting, full_flops, seconds_text, site_seconds, without_window
from difa_compile.plan.data import SiteInfo, blocks_of
from difa_compile.plan.schedule import Role, assign_roles


class Prediction:
    """Predicted seconds of a model's sites, by index, in one call of the model."""

    def __init__(self, model: AnalysedModel) -> None:
        self._model = model
        self._seconds: dict[tuple[int, Role | Decision], float | None] = {}
        self._of_units: dict[tuple[int, Role], float | None] = {}

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

    def row_seconds(self, row: Sequence[Role]) -> float | None:
        """Predicted seconds of one call with a role per unit, to compare rows by: of the attention sites, of what else
        their blocks compute, as one linear layer of as many multiply-adds, of forecasts, and of outputs that are kept.

        What stands in no block is the same in all rows and left out. None without a profile that can tell, and for
        blocks whose operations are not known.
        """
        parts = [self._unit_seconds(index, role) for index, role in enumerate(row) if not role.covered]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    def _unit_seconds(self, index: int, role: Role) -> float | None:
        """Predicted seconds of a site with what it keeps, or of a block without the units that it holds."""
        if self.profile is None:
            return None
        key = (index, role)
        if key not in self._of_units:
            info, setting = self._infos[index], self._setting(self._first_site(index))
            passes = [2.0] * (role.decision.order + 1 if role.decision.order else 0) if info.is_block else []
            passes += [1.0] * role.emit_output
            elements = setting.batch * info.tokens * info.width
            parts = [
                self.profile.seconds(
                    ELEMENTWISE, setting.dtype, elementwise_work(elements, setting.dtype, setting.device, reads)
                )
                for reads in passes
            ]
            if not info.is_block:
                parts.append(self.seconds(index, role))
            elif not role.reads_output:
                parts.append(self._rest_seconds(index, setting))
            known = [part for part in parts if part is not None]
            self._of_units[key] = sum(known) if len(known) == len(parts) else None
        return self._of_units[key]

    def _rest_seconds(self, index: int, setting: Setting) -> float | None:
        """Predicted seconds of what a block computes in full beside the units that it holds."""
        assert self.profile is not None
        info = self._infos[index]
        inside = [self._infos[each] for each, block in enumerate(self._held) if block == index]
        counts = [info.flops, *(each.flops if each.is_block else full_flops(each).total for each in inside)]
        known = [count for count in counts if count is not None]
        if len(known) < len(counts):
            return None
        rest = max(0, known[0] - sum(known[1:]))
        outputs = round(rest / (2 * info.tokens * info.width))
        work = linear_work(setting.batch * info.tokens, info.width, outputs)
        return self.profile.seconds(LINEAR, setting.dtype, work) if outputs else 0.0

    def _first_site(self, index: int) -> int:
        """The first attention site that a unit holds, or is."""
        while self._infos[index].is_block:
            index = self._held.index(index)
        return index

    @cached_property
    def _infos(self) -> list[SiteInfo]:
        return [unit.info for unit in self._model.units]

    @cached_property
    def _held(self) -> tuple[int | None, ...]:
        return blocks_of(self._infos)

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
