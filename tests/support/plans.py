"""Small plans over made-up sites, a letter a decision."""

from __future__ import annotations

from torch import nn

from difa_compile.decision import FULL, REUSE, Basis, Decision, Kind, Window, WindowShape
from difa_compile.layout import Layout
from difa_compile.plan.plan import Cell, ModelInfo, Plan, Settings, SiteInfo, Trial
from difa_compile.plan.schedule import uniform_progress

BAND = Window(WindowShape.BAND, 32)
LETTERS = {
    "F": FULL,
    "f": Decision(Kind.FULL, None, True),
    "W": Decision(Kind.WINDOW, BAND),
    "R": Decision(Kind.WINDOW_RESIDUAL, BAND),
    ".": REUSE,
    "P": Decision(Kind.FORECAST, order=1),
    "p": Decision(Kind.FORECAST, None, True, 2, Basis.STEP),
}
MODEL = ModelInfo("DiTTransformer2DModel", "ab" * 32, 1234567)
GREEDY = Settings("greedy", 0.05, "paper", "band:32", ("reuse", "full+cfg"), "batched", 1, "2.13.0", "0.42.1")


def site(index: int, side: int = 16) -> SiteInfo:
    return SiteInfo(f"blocks.{index}.attn1", "self", 6, 64, side * side, 384, Layout((side, side)))


def plan_of(*columns: str, settings: Settings = GREEDY, progress: tuple[float, ...] | None = None) -> Plan:
    """A plan from one string per site, one letter per step."""
    rows = tuple(tuple(Cell(LETTERS[letter]) for letter in letters) for letters in zip(*columns, strict=True))
    sites = tuple(site(index) for index in range(len(columns)))
    return Plan(MODEL, settings, sites, progress or uniform_progress(len(rows)), rows)


def letters(rows: tuple[tuple[Decision, ...], ...], index: int = 0) -> str:
    names = {decision: letter for letter, decision in LETTERS.items()}
    return "".join(names[row[index]] for row in rows)


def measured_plan() -> Plan:
    trials = (
        Trial(REUSE, 0.25, 0.025),
        Trial(LETTERS["R"], None, 0.025, "attention mask at this site"),
        Trial(LETTERS["f"], 0.0125, 0.025),
    )
    cells = (Cell(FULL), Cell(LETTERS["f"], trials, 0.5))
    text = SiteInfo("joint.0.attn", "joint", 24, 128, 28, 3072, Layout((4, 6), before=3, after=1))
    return Plan(MODEL, GREEDY, (site(0), text), (1.0, 0.98), (cells, cells))


class Configured(nn.Module):
    def __init__(self, **config: object) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(3, 2)


class Plain(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2)
