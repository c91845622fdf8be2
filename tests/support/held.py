"""Plans that are held to a limit by trials that are made up."""

from dataclasses import replace

from difa_compile.comparison.holding import TRIES
from difa_compile.comparison.planned import plan_within
from tests.support.tables import made_table


def within(limit, steps=6, runs=TRIES, **options):
    return plan_within(object(), {}, limit, steps, **{"table": made_table(steps), "runs": runs, **options})


def single(steps=16):
    """A table of blocks alone, whose steps may be moved."""
    table = made_table(steps)
    return replace(table, units=table.units[:1])


def same_images(plan):
    """What plans that make the same images have in common."""
    return plan.decisions, tuple(plan.fitted.items())
