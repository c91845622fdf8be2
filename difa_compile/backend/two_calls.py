"""Sharing the halves of guidance where they are two calls of a step: the second takes what the first has computed.

The conditional call goes first. At a site that shares it computes as if nothing were shared, and its output is kept
(:func:`conditional_role`). The unconditional call reads that output like one of an earlier step (what the conditional
one has forecast it forecasts from the same outputs), and takes over the caches that its own later steps will read
(:func:`take_over`). Who decides what is shared, a run of a plan or the search
for one, does it by these two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from difa_compile.decision import REUSE, Decision
from difa_compile.passes.caches import CacheName
from difa_compile.plan.schedule import HeadCache, Role


def heads_of(path: str, caches: Sequence[HeadCache]) -> frozenset[CacheName]:
    """The names of caches of single heads at the site called ``path``."""
    return frozenset(CacheName.heads(path, cache.heads, residual=cache.window is not None) for cache in caches)


def alone(decision: Decision) -> Decision:
    """The decision without sharing."""
    return replace(decision, cfg_shared=False) if decision.cfg_shared else decision


def unshared(role: Role) -> Role:
    """The role without sharing."""
    return replace(role, decision=alone(role.decision))


def conditional_role(role: Role) -> Role:
    """The conditional call's role where the other call takes its output: not halved, and the output kept."""
    decision = alone(role.decision)
    return replace(role, decision=decision, emit_output=decision.kind.fills("output"))


@dataclass(frozen=True)
class TakenOver:
    """What the unconditional call does: a role per site, the caches it reads, and those that become its own."""

    roles: tuple[Role, ...]
    read: Mapping[CacheName, Tensor]
    kept: Mapping[CacheName, Tensor]


def take_over(
    paths: Sequence[str],
    roles: Sequence[Role],
    shared: Sequence[bool],
    own: Mapping[CacheName, Tensor],
    conditional: Mapping[CacheName, Tensor],
) -> TakenOver:
    """The unconditional call of a step in which some sites share.

    Args:
        paths, roles, shared: of each site its module path, what it would do alone, with the caches that later steps
            want of it, and whether it takes the conditional call's output instead.
        own: the caches of the unconditional branch. ``conditional``: those of the conditional branch, after its call of
            this step.
    """
    row = tuple(taking_role(role) if share else role for role, share in zip(roles, shared, strict=True))
    sharing = {path: role for path, role, share in zip(paths, roles, shared, strict=True) if share}
    read, kept = dict(own), {}
    for name, value in conditional.items():
        role = sharing.get(name.site)
        if role is None:
            continue
        if name.of_heads:
            if name in heads_of(name.site, role.head_writes):
                kept[name] = value
            continue
        if name.kind != "residual":
            read[name] = value
        if (
            role.emit_residual
            if name.kind == "residual"
            else role.emit_output and name.kind == "output" and not name.age
        ):
            kept[name] = value
    return TakenOver(row, read, kept)


def taking_role(role: Role) -> Role:
    """The unconditional call's role where it takes the conditional call's output."""
    return Role(alone(role.decision) if role.decision.order else REUSE)
