"""The rewrite pipeline: from a graph and one role per site to a variant.

The order matters: reuse first, so that nothing else works on regions that go; CFG sharing before windows, so that the
local attention is inserted on the halved values; caches last, so that they hold what really leaves the region.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from difa_compile.passes.rewrite.emit_caches import emit_caches
from difa_compile.passes.rewrite.reuse import reuse
from difa_compile.passes.rewrite.share_cfg import share_cfg
from difa_compile.passes.rewrite.window import window
from difa_compile.passes.site import Site
from difa_compile.passes.variant import Context, start_variant
from difa_compile.plan.schedule import Role

PASSES = (reuse, share_cfg, window, emit_caches)


@dataclass(frozen=True)
class Rewritten:
    """A finished variant: its graph takes the original inputs, then ``cache_inputs``; it returns the original outputs,
    then ``cache_outputs`` (names, in order). ``sites``: those of the copied graph, as they were before the passes."""

    module: fx.GraphModule
    cache_inputs: tuple[str, ...]
    cache_outputs: tuple[str, ...]
    sites: tuple[Site, ...]


def rewrite(module: fx.GraphModule, sites: Sequence[Site], roles: Sequence[Role], context: Context) -> Rewritten:
    """Apply one role per site to a copy of a graph. The roles must have been found possible before."""
    variant = start_variant(module, sites, roles)
    for each in PASSES:
        each(variant, context)
    finished = variant.finish()
    moved = tuple(target.site for target in variant.targets)
    return Rewritten(finished, tuple(variant.cache_inputs), tuple(variant.cache_outputs), moved)
