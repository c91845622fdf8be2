"""Large plans: reading, checking, comparing and showing them takes work in proportion to their cells, no more.

Work is counted in lines of Python, which no other work on the machine disturbs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import PlanFormatError, PlanMismatchError
from difa_compile.layout import Layout
from difa_compile.plan.plan import Cell, ModelInfo, Plan, Settings, SiteInfo, Trial

WINDOW = Decision.parse("window(disc:2)+residual")
SETTINGS = Settings("greedy", 0.05, "paper", "disc:2", ("reuse",), "none", None, "2", "0")


def plan_of(steps: int, sites: int, width: int = 0) -> Plan:
    infos = tuple(
        SiteInfo(f"blocks.{index}.attn{'x' * width}", "self", 2, 8, 16, 16, Layout((4, 4))) for index in range(sites)
    )
    trials = (Trial(REUSE, 0.25, 0.05), Trial(WINDOW, 0.125, 0.05))
    kinds = [Cell(FULL, trials), Cell(WINDOW, trials, 0.5), Cell(REUSE, trials[:1], 1.0)]
    rows = tuple(tuple(kinds[(step + index) % 3 if step else 0] for index in range(sites)) for step in range(steps))
    return Plan(
        ModelInfo("Model", "ab" * 32, 1), SETTINGS, infos, tuple(1 - step / steps for step in range(steps)), rows
    )


def mismatch(plan: Plan) -> None:
    others = [SiteInfo(f"other.{index}", "self", 2, 8, 16, 16) for index in range(len(plan.sites))]
    with pytest.raises(PlanMismatchError):
        plan.validate(sites=others)


def all_full(plan: Plan) -> Plan:
    rows = tuple(tuple(Cell(FULL) for _ in plan.sites) for _ in plan.rows)
    return Plan(plan.model, plan.settings, plan.sites, plan.progress, rows)


USES: dict[str, Callable[[Plan], Any]] = {
    "read": lambda plan: Plan.from_json(plan.to_json()),
    "validate": lambda plan: plan.validate(sites=plan.sites),
    "mismatch": mismatch,
    "resolve": lambda plan: plan.resolve(plan.steps + 1),
    "resolved text": lambda plan: plan.resolve(max(1, plan.steps // 2)).summary(),
    "resize": lambda plan: plan.resized(plan.sites),
    "diff": lambda plan: plan.diff_text(all_full(plan)),
    "summary": lambda plan: plan.summary(),
}


def lines_run(work: Callable[[], object]) -> int:
    """Lines of Python carried out, each turn of a loop or comprehension on several lines counted again."""
    count = 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("sizes", [((4, 30), (4, 120)), ((30, 4), (120, 4))], ids=["sites", "steps"])
def test_work_grows_with_the_cells(use: str, sizes: tuple[tuple[int, int], ...]) -> None:
    small, large = (plan_of(*size) for size in sizes)
    for plan in (small, large):
        USES[use](plan)  # what is kept from the first time on
    few, many = (lines_run(lambda plan=plan: USES[use](plan)) for plan in (small, large))  # type: ignore[misc]
    assert many < 4.6 * few


class Counted(str):
    """A text that counts how often it is compared or hashed."""

    times = 0

    def __eq__(self, other: object) -> bool:
        Counted.times += 1
        return str.__eq__(self, other)

    def __hash__(self) -> int:
        Counted.times += 1
        return str.__hash__(self)


def test_names_of_sites_are_compared_in_proportion_to_their_number() -> None:
    """In C, where no line is counted."""
    names = [Counted(f"blocks.{index}") for index in range(500)]
    infos = tuple(SiteInfo(name, "self", 2, 8, 16, 16, Layout((4, 4))) for name in names)
    Counted.times = 0
    plan = Plan(ModelInfo("M", "a", 1), SETTINGS, infos, (1.0,), (tuple(Cell(FULL) for _ in infos),))
    plan.validate(sites=infos)
    mismatch(plan)
    plan.diff(plan)
    plan.summary()
    assert Counted.times < 60 * len(names)


@pytest.mark.slow
def test_thirty_thousand_sites_and_steps() -> None:
    """Seconds each; with the square of their number it would be many minutes."""
    for plan in (plan_of(1, 30_000), plan_of(30_000, 1)):
        read = Plan.from_json(plan.to_json())
        assert read == plan
        mismatch(read)
        assert len(read.resolve(plan.steps + 1).rows) == plan.steps + 1


def test_long_names_are_cut_in_tables() -> None:
    """Each line is as wide as the longest name: one of a megabyte would make gigabytes of a plan of many sites."""
    plan = plan_of(3, 40, width=100_000)
    for text in (plan.summary(), plan.resolve(2).summary(), plan.diff_text(all_full(plan))):
        assert max(map(len, text.splitlines())) < 300


def test_sizes_beyond_all_models_are_refused() -> None:
    """Counting what a window shows takes the longer the larger the grid."""
    for size in (2**33, 10**30):
        with pytest.raises(ValueError, match="tokens"):
            Layout((size, 1))
        with pytest.raises(PlanFormatError, match="at most"):
            SiteInfo("site", "self", 1, 1, size, 1)
    with pytest.raises(ValueError, match="over 2"):
        Layout((2**17, 2**17))
