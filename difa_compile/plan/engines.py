"""The engines that an export of a plan would need, worked out from the plan alone: one for each distinct row of roles.

That is what an export makes on the plan's own steps where a step of guidance is one call of one transformer and all of
the plan can be carried out. Where guidance is two calls, a step that shares their halves takes two engines; each
transformer of several has its own; on other numbers of steps promotions may add some.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from difa_compile.decision import FULL, Decision
from difa_compile.plan.cost import Costed, row_flops
from difa_compile.plan.data import SiteInfo, blocks_of
from difa_compile.plan.schedule import Role, buckets, in_effect


@dataclass(frozen=True)
class CacheUse:
    """So many caches, with so many ``values`` in all (for one element of the batch)."""

    caches: int
    values: int


@dataclass(frozen=True)
class EngineUse:
    """An engine and what it is for.

    ``steps``: that run it, ascending. ``decisions``: what happens at its sites, and at how many, the most first; what a
    block that is left out covers counts as that block. ``call``: operations of one call, as a share of one in full;
    ``share``: those of all its calls, of all that the plan computes. Caches that are written count as operations.
    """

    steps: tuple[int, ...]
    decisions: tuple[tuple[Decision, int], ...]
    call: float
    share: float
    reads: CacheUse
    writes: CacheUse

    def __str__(self) -> str:
        """The decisions in words, ``16 full, 12 reuse``; those by heads together, whatever they say of which."""
        counts: Counter[str] = Counter()
        for decision, count in self.decisions:
            name = f"heads(...){'+cfg' if decision.cfg_shared else ''}" if decision.groups else str(decision)
            counts[name] += count
        return ", ".join(f"{count} {name}" for name, count in counts.items())


def engines_of(plan: Costed) -> tuple[EngineUse, ...]:
    """The engines of a plan, in the order in which they are first run."""
    sites = plan.sites
    found = buckets(plan.roles)
    costs = [row_flops(bucket.row, sites) for bucket in found]
    full = row_flops([Role(FULL)] * len(sites), sites)
    total = sum(cost * len(bucket.steps) for cost, bucket in zip(costs, found, strict=True))
    return tuple(
        EngineUse(
            bucket.steps,
            _decisions(bucket.row, sites),
            cost / full if full else 1.0,
            cost * len(bucket.steps) / total if total else 0.0,
            *_caches(bucket.row, sites),
        )
        for cost, bucket in zip(costs, found, strict=True)
    )


def engine_of_steps(engines: Sequence[EngineUse]) -> tuple[int, ...]:
    """By step the number of its engine."""
    of = {step: number for number, engine in enumerate(engines) for step in engine.steps}
    return tuple(of[step] for step in sorted(of))


def what_is_counted(plan: Costed, guidance: str) -> str:
    """Where an export needs more engines than :func:`engines_of` counts, in words; empty where it does not."""
    shares = guidance == "two-call" and any(role.decision.cfg_shared for row in plan.roles for role in row)
    return "guidance is two calls: an engine that shares their halves becomes two, one for each call" if shares else ""


def _decisions(row: Sequence[Role], sites: Sequence[SiteInfo]) -> tuple[tuple[Decision, int], ...]:
    (done,) = in_effect([[role.decision for role in row]], blocks_of(sites))
    return tuple(sorted(Counter(done).items(), key=lambda item: (-item[1], str(item[0]))))


def _caches(row: Sequence[Role], sites: Sequence[SiteInfo]) -> tuple[CacheUse, CacheUse]:
    """What a row reads and writes."""
    reads: list[int] = []
    writes: list[int] = []
    for role, site in zip(row, sites, strict=True):
        output, residual = site.tokens * site.width, site.tokens * site.inner
        if role.reads_output:
            reads += [output] * (role.decision.order + 1)
        if role.reads_residual:
            reads.append(residual)
        reads += [site.tokens * site.head_dim * len(cache.heads) for cache in role.head_reads]
        writes += [output] * role.emit_output + [residual] * role.emit_residual
        writes += [site.tokens * site.head_dim * len(cache.heads) for cache in role.head_writes]
    return CacheUse(len(reads), sum(reads)), CacheUse(len(writes), sum(writes))
