"""Tables of errors without a measurement: two attentions in two blocks that are left out together."""

from difa_compile.decision import Decision
from difa_compile.layout import Layout
from difa_compile.plan.data import ModelInfo, Settings, SiteInfo
from difa_compile.planner.effects import drift_of_values
from difa_compile.planner.table import ErrorTable, MeasuredUnit
from tests.support.planner_problems import smooth_values

WINDOW = Decision.parse("window(band:2)")
SITES = (
    SiteInfo("blocks.0.attn", "self", 2, 8, 16, 16, Layout((4, 4))),
    SiteInfo("blocks.1.attn", "self", 2, 8, 16, 16, Layout((4, 4))),
    SiteInfo("blocks.0..blocks.1", "block", 1, 16, 16, 16, blocks=("blocks.0", "blocks.1")),
)
SECONDS = {
    "full": 1.0,
    "blocks filled": 1.01,
    "blocks reuse": 0.1,
    "blocks forecast": 0.12,
    "attention filled": 1.02,
    "attention reuse": 0.7,
    "attention forecast": 0.71,
    "attention window(band:2)": 0.9,
    "pipeline": 0.05,
}


def measured_unit(name, sites, inside, lags, steps, size=6, seed=0, decisions=()):
    drift = drift_of_values(smooth_values(seed, steps, size), max(lags))[:, list(lags)]
    computed = {decision: 0.1 * smooth_values(seed + 5, steps, size) for decision in decisions}
    return MeasuredUnit(name, tuple(sites), inside, tuple(lags), drift, drift[:, :, 0] * 0 + 0.25, computed)


def made_table(steps=8, done=None, seconds=SECONDS, calls=1, identity=None, size=6):
    """A table whose effects change smoothly over the steps; ``size``: numbers of an effect."""
    units = (
        measured_unit("blocks", [2], None, (1, 2, 3, 4), steps, size),
        measured_unit("attention", [0, 1], 0, (1, 2, 4), steps, size, seed=1, decisions=[WINDOW]),
    )
    settings = Settings("planned", guidance="batched", conditional_half=0, torch="2", diffusers=None, sample=(1, 8, 8))
    progress = tuple((steps - step) / steps for step in range(steps))
    model = ModelInfo("Model", "ab" * 32, 10)
    done = steps if done is None else done
    return ErrorTable(model, settings, SITES, progress, units, done, seconds, calls, identity or {"inputs": "a"})
