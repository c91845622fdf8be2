"""Verdicts: what of a plan is carried out at each site of an analysed model, and the records that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from difa_compile.backend.prediction import Prediction
from difa_compile.decision import FULL, Decision
from difa_compile.errors import SiteSkippedError
from difa_compile.passes.analysed_model import AnalysedModel
from difa_compile.plan.cost import without_window
from difa_compile.plan.plan import Plan


@dataclass(frozen=True)
class Record:
    """What became of a decision at a site: ``outcome`` is ``"rewritten"``, ``"full"`` (as decided) or ``"skipped"``.

    Skipped are decisions that cannot be carried out and windows that are predicted slower than full attention.
    """

    site: str
    decision: str
    outcome: str
    reason: str


class Verdicts:
    """What is carried out of the decisions of a plan.

    ``plan``: fits the model, or None: then anything that is possible is carried out. ``units``: for each site of the
    plan its number among the model's. ``strict``: a decision that cannot be carried out is a
    :class:`SiteSkippedError`, raised here. ``allow_slower``: windows are carried out even where the machine's profile
    says that they take longer than full attention. ``why_unshared``: why no halves are shared at all.

    Attributes:
        records: what became of each decision of the plan at each site; empty without a plan.
    """

    def __init__(
        self,
        model: AnalysedModel,
        prediction: Prediction,
        plan: Plan | None = None,
        units: Sequence[int] | None = None,
        *,
        strict: bool = False,
        allow_slower: bool = False,
        why_unshared: str | None = None,
    ) -> None:
        self._model = model
        self._prediction = prediction
        self._plan = plan
        self._units = range(len(model.units)) if units is None else units
        self._allow_slower = allow_slower
        self.strict = strict
        self.why_unshared = why_unshared
        self._slower: dict[tuple[int, Decision], str] = {}
        self.records: tuple[Record, ...] = ()
        if plan is None:
            return
        if strict:
            self._check(plan)
        if not allow_slower:
            self._slower = prediction.slower_windows(plan.decisions, self.effective)
        self.records = tuple(
            self._record(index, decision)
            for index in range(len(plan.sites))
            for decision in dict.fromkeys(row[index] for row in plan.decisions)
        )

    def of(self, plan: Plan, units: Sequence[int]) -> Verdicts:
        """What is carried out of another plan, on the same terms. Raises as the constructor does."""
        return Verdicts(
            self._model,
            self._prediction,
            plan,
            units,
            strict=self.strict,
            allow_slower=self._allow_slower,
            why_unshared=self.why_unshared,
        )

    def unshared(self, reason: str) -> Verdicts:
        """The verdicts where no decision that shares the CFG halves can be carried out, for this reason.

        Raises :class:`SiteSkippedError` if the plan has such decisions and skips are errors.
        """
        return Verdicts(
            self._model,
            self._prediction,
            self._plan,
            self._units,
            strict=self.strict,
            allow_slower=self._allow_slower,
            why_unshared=reason,
        )

    def why_not(self, index: int, decision: Decision) -> str | None:
        """The reason why ``decision`` can't be carried out at a site or block (by index), or None."""
        if decision.cfg_shared and self.why_unshared is not None:
            return self.why_unshared
        return self._model.why_not(self._units[index], decision)

    def effective(self, index: int, decision: Decision) -> Decision:
        """The decision itself, or full: where it can't be carried out, and for a window that is predicted slower.

        In place of such a window full attention shares the CFG halves as the decision says.
        """
        if self.why_not(index, decision) is not None:
            return FULL
        return without_window(decision) if (index, decision) in self._slower else decision

    def _check(self, plan: Plan) -> None:
        impossible = [
            (site.path, decision, reason)
            for index, site in enumerate(plan.sites)
            for decision in dict.fromkeys(row[index] for row in plan.decisions)
            if (reason := self.why_not(index, decision)) is not None
        ]
        if impossible:
            path, decision, reason = impossible[0]
            raise SiteSkippedError(
                f"{path}: {decision} can't be carried out: {reason} ({len(impossible)} such "
                "decisions in all). Take the decision out of the plan, or compile with strict=False to leave these "
                "sites full"
            )

    def _record(self, index: int, decision: Decision) -> Record:
        reason = self.why_not(index, decision) or self._slower.get((index, decision))
        outcome = "skipped" if reason else "full" if decision == FULL else "rewritten"
        return Record(self._model.units[self._units[index]].path, str(decision), outcome, reason or "")
