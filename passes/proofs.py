"""Let a region prove itself, on real values and eagerly, before a plan may act on it.

Finds :class:`Proofs`: for each site why it must not be reused, and why its halves must not be shared, or nothing.

1. *Reuse of its own output* must give what full attention gives, to the bit: the region is not too narrow.
2. *Reuse of another input's output* must give what the graph gives with that input's attention in place of its own, to
   the bit: the region is not too wide, nothing of the present input (a gate, a norm) is cached with the attention.
3. *Sharing of CFG halves* where the halves of what goes into the region are equal must give what not sharing gives, up
   to what another batch size does to rounding.

A cache is contiguous, and what reads it may round otherwise than where it read the same numbers with other strides:
where 1 or 2 hold up to rounding only, they must hold to the bit with the region's outputs made contiguous.

A block proves the same of what it adds to its streams: 1 and 2 hold for its outputs as its stream plus that, to the
bit, and as they are up to rounding, which ``stream + (output - stream)`` brings about.

A site that fails 1 or 2 is not reused and not shared; one that fails 3 is not shared. Windows leave the region as it
is and need none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from difa_compile.decision import FULL, REUSE
from difa_compile.errors import PassError, is_out_of_memory
from difa_compile.passes.autocast import autocast_kept
from difa_compile.passes.caches import CacheName
from difa_compile.passes.facts import Facts, Rewriter
from difa_compile.passes.graph import is_attention, is_parameter
from difa_compile.passes.replay import Replay, close, coarsest, fresh, same
from difa_compile.passes.rewrite.share_cfg import why_not_shared
from difa_compile.passes.segments import Split
from difa_compile.passes.site import Block, Region, Site, Unit
from difa_compile.passes.variant import Context, Rewritten
from difa_compile.plan.schedule import FULL_ROLE, Role


@dataclass(frozen=True)
class Proof:
    """Why a site's region must not be reused, and why its CFG halves must not be shared; None where they may."""

    reuse: str | None = None
    sharing: str | None = None


@dataclass(frozen=True)
class Proofs:
    """One proof for each attention site and block that a plan can act on."""

    of_sites: tuple[Proof, ...]


def prove_regions(module: fx.GraphModule, facts: Facts) -> Proofs:
    """Let every region prove itself, on real values; equal segments are put to the test once."""
    del module
    split = facts[Split]
    proved: dict[str, tuple[Proof, ...]] = {}
    kinds = {segment.structure for segment in split.segments if segment.sites}
    inputs = fresh(split.module, facts.inputs)  # proving must not change what the model writes to
    values: list[Any] = [*inputs, *[None] * (split.values - len(inputs))]
    with torch.no_grad():
        for segment in split.segments:
            given = [values[i] for i in segment.inputs]
            if segment.sites and segment.structure not in proved:
                proved[segment.structure] = tuple(
                    prove(segment.module, segment.sites, i, given, facts.context, facts.rewrite)
                    for i in range(len(segment.sites))
                )
                if len(proved) == len(kinds):
                    break
            for number, value in zip(segment.outputs, segment.module(*given), strict=True):
                values[number] = value
            for number in segment.last_use:
                values[number] = None
    found = {
        index: proof
        for segment in split.segments
        if segment.sites
        for index, proof in zip(segment.site_indices, proved[segment.structure], strict=True)
    }
    return Proofs(tuple(found[index] for index in sorted(found)))


def prove(
    module: fx.GraphModule,
    sites: Sequence[Unit],
    index: int,
    inputs: Sequence[Any],
    context: Context,
    rewrite: Rewriter,
) -> Proof:
    """Put site ``index`` of a graph to the test. ``inputs``: real values of the graph."""
    unit = sites[index]
    with autocast_kept():
        why_not = why_not_left_out if isinstance(unit, Block) else why_not_reused
        reason = why_not(module, sites, index, inputs, context, rewrite)
    if reason is not None or isinstance(unit, Block):
        return Proof(reason, reason)
    with autocast_kept():
        return Proof(None, why_not_halved(module, sites, index, inputs, context, rewrite))


def run_with(
    module: fx.GraphModule,
    sites: Sequence[Unit],
    index: int,
    role: Role,
    values: Sequence[Any],
    caches: Mapping[CacheName, Tensor],
    context: Context,
    rewrite: Rewriter,
) -> tuple[list[Any], dict[CacheName, Tensor]]:
    """Outputs and written caches with ``role`` at one site and all others full."""
    variant = rewrite(module, sites, [role if i == index else FULL_ROLE for i in range(len(sites))], context)
    results = variant.module(*fresh(module, values), *[caches[name] for name in variant.cache_inputs])
    cut = len(results) - len(variant.cache_outputs)
    return list(results[:cut]), dict(zip(variant.cache_outputs, results[cut:], strict=True))


def why_not_reused(
    module: fx.GraphModule,
    sites: Sequence[Unit],
    index: int,
    inputs: Sequence[Any],
    context: Context,
    rewrite: Rewriter,
) -> str | None:
    region = sites[index].region
    if any(is_attention(node) for node in region.interior if node is not region.attention):
        return "another attention call lies within its region"
    other = moved(module, inputs)
    try:
        expected, caches = run_with(module, sites, index, Role(FULL, emit_output=True), inputs, {}, context, rewrite)
        found, _ = run_with(module, sites, index, Role(REUSE), inputs, caches, context, rewrite)
        attended = Replay(module)
        attended.run(*fresh(module, inputs))
        stored = dict.fromkeys(region.outputs, contiguous)
        packed = Replay(module, changed=stored).run(*fresh(module, inputs))
        given = {region.attention: attended.values[region.attention]}
        foreign = Replay(module, given).run(*fresh(module, other))
        foreign_packed = Replay(module, given, stored).run(*fresh(module, other))
        taken, _ = run_with(module, sites, index, Role(REUSE), other, caches, context, rewrite)
        row = [Role(REUSE) if i == index else FULL_ROLE for i in range(len(sites))]
        left = rewrite(module, sites, row, context).module
    except Exception as error:  # whatever a model's ops raise is the reason, shown to the user
        return does_not_run(error)
    dtype = coarsest(module)
    if not agree(found, expected, packed, dtype):
        return "reusing the region's own output does not reproduce the full output"
    if sum(map(is_attention, left.graph.nodes)) >= sum(map(is_attention, module.graph.nodes)):
        return "reuse would save nothing: the attention's result is written to in place and then used"
    if not agree(taken, foreign, foreign_packed, dtype):
        return "the region holds more than its attention: what is reused depends on other values of its step"
    return None


def why_not_left_out(
    module: fx.GraphModule,
    sites: Sequence[Unit],
    index: int,
    inputs: Sequence[Any],
    context: Context,
    rewrite: Rewriter,
) -> str | None:
    """:func:`why_not_reused` for a block, of which the sum that it adds to its streams is cached."""
    region = sites[index].region
    other = moved(module, inputs)
    try:
        expected, caches = run_with(module, sites, index, Role(FULL, emit_output=True), inputs, {}, context, rewrite)
        found, _ = run_with(module, sites, index, Role(REUSE), inputs, caches, context, rewrite)
        added: dict[int, Tensor] = {}
        summed = replay_sums(module, region, inputs, lambda i, x, y: x + added.setdefault(i, y - x))
        taken, _ = run_with(module, sites, index, Role(REUSE), other, caches, context, rewrite)
        foreign = replay_sums(module, region, other, lambda i, x, y: x + added[i])
        row = [Role(REUSE) if i == index else FULL_ROLE for i in range(len(sites))]
        left = rewrite(module, sites, row, context).module
    except Exception as error:  # whatever a model's ops raise is the reason, shown to the user
        return does_not_run(error)
    dtype = coarsest(module)
    exact = all(same(a, b) for a, b in zip(found, summed, strict=True))
    if not exact or not all(close(a, b, dtype) for a, b in zip(found, expected, strict=True)):
        return "reusing what the block itself has added does not reproduce its output"
    if len(left.graph.nodes) > len(module.graph.nodes) - len(region.interior) + 2 * len(region.outputs):
        return "reuse would save nothing: what the block computes is used elsewhere"
    if not all(same(a, b) for a, b in zip(taken, foreign, strict=True)):
        return "what the block adds depends on other values of its step"
    return None


def replay_sums(
    module: fx.GraphModule, region: Region, inputs: Sequence[Any], made: Callable[[int, Tensor, Tensor], Tensor]
) -> Sequence[Any]:
    """Outputs of a graph in which each output y of a block, by number and with its stream x, is what ``made`` says."""
    streams: dict[fx.Node, Tensor] = {}

    def noted(node: fx.Node, value: Tensor) -> Tensor:
        streams[node] = value
        return value

    def exchanged(i: int, value: Tensor) -> Tensor:
        return made(i, streams[region.streams[i]], value)

    changed: dict[fx.Node, Callable[[Any], Any]] = {node: partial(noted, node) for node in region.streams}
    changed |= {output: partial(exchanged, i) for i, output in enumerate(region.outputs)}
    result: Sequence[Any] = Replay(module, changed=changed).run(*fresh(module, inputs))
    return result


def moved(module: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Other inputs of the same shapes, for the same model."""
    placeholders = module.graph.find_nodes(op="placeholder")
    return [
        elsewhere(value) if not is_parameter(node) else value for node, value in zip(placeholders, inputs, strict=True)
    ]


def why_not_halved(
    module: fx.GraphModule,
    sites: Sequence[Unit],
    index: int,
    inputs: Sequence[Any],
    context: Context,
    rewrite: Rewriter,
) -> str | None:
    shared = Role(replace(FULL, cfg_shared=True))
    site = sites[index]
    assert isinstance(site, Site)
    if context.conditional_half is None or why_not_shared(module, site, context) is not None:
        return None  # said when sharing is asked for
    roles = [shared if i == index else FULL_ROLE for i in range(len(sites))]
    try:
        expected = with_equal_halves(rewrite(module, sites, [FULL_ROLE] * len(sites), context), index, inputs)
        found = with_equal_halves(rewrite(module, sites, roles, context), index, inputs)
    except Exception as error:  # as above
        return does_not_run(error)
    dtype = coarsest(module)
    if not all(close(a, b, dtype) for a, b in zip(expected, found, strict=True)):
        return "sharing the CFG halves of a batch with equal halves does not reproduce the full output"
    return None


def with_equal_halves(variant: Rewritten, index: int, inputs: Sequence[Any]) -> Sequence[Any]:
    """Outputs where what goes into a site's region has its first half of the batch in both halves."""
    into = [node for node in variant.sites[index].region.inputs if not is_parameter(node)]
    doubled = {node: partial(double_half, dim=node.meta.get("batch_dim")) for node in into}
    result: Sequence[Any] = Replay(variant.module, changed=doubled).run(*fresh(variant.module, inputs))
    return result


def agree(
    found: Sequence[Any], expected: Sequence[Any], packed: Sequence[Any], dtype: torch.dtype = torch.float64
) -> bool:
    """Whether results are those expected: to the bit, or up to the rounding that contiguous outputs bring about.

    ``packed``: the results with the region's outputs made contiguous. ``dtype``: the coarsest that they were made in.
    """
    if all(same(a, b) for a, b in zip(found, expected, strict=True)):
        return True
    exact = all(same(a, b) for a, b in zip(found, packed, strict=True))
    return exact and all(close(a, b, dtype) for a, b in zip(found, expected, strict=True))


def contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def elsewhere(value: Any) -> Any:
    """Another input of the same shape: floating-point values are moved, by an amount that differs from row to row."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    moves = torch.linspace(-0.5, 0.5, value.numel(), dtype=torch.float32, device=value.device)
    return (value.float() + moves.reshape(value.shape)).to(value.dtype)


def double_half(value: Any, dim: int | None) -> Any:
    """A value whose first half of the batch stands in both halves."""
    if dim is None or not isinstance(value, Tensor) or value.shape[dim] % 2:
        return value
    half = value.narrow(dim, 0, value.shape[dim] // 2)
    return half.repeat(*(1 + (i == dim % value.ndim) for i in range(value.ndim)))  # cat is autocast's business


def does_not_run(error: Exception) -> str:
    """The reason where a region's variant cannot be made or run. Want of memory says nothing of it, and is raised."""
    if is_out_of_memory(error):
        raise error
    cause = error.__cause__ if isinstance(error, PassError) and error.__cause__ is not None else error
    return f"the rewritten region does not run: {type(cause).__name__}: {first_line(cause)}"


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else ""
