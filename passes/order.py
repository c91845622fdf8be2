"""The whole order: what is done to a captured graph, from Dynamo's hands to a variant.

::

    graph ── PREPARATION ──►  prepared graph, which full attention runs; canonical graph, which plans rewrite
          ── ANALYSIS ─────►  facts: sites, layouts, batch, segments, proofs
          = an AnalysedModel
    roles ── REWRITES ─────►  a variant, of the whole graph or of a segment

Each kind of pass has one signature (:mod:`difa_compile.passes.facts`, :class:`~difa_compile.passes.variant.Rewrite`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from difa_compile.errors import DifaError, PassError, is_out_of_memory
from difa_compile.layout import Layout
from difa_compile.passes.analyse.batch_dims import follow_batch
from difa_compile.passes.analyse.find_attention import Sites, find_sites, hold_positions
from difa_compile.passes.analyse.find_blocks import Blocks, find_blocks
from difa_compile.passes.analyse.positions import HeldPositions
from difa_compile.passes.analyse.sample import Sample, find_sample
from difa_compile.passes.analysed_model import AnalysedModel
from difa_compile.passes.facts import Analysis, Facts, Preparation
from difa_compile.passes.graph import tensor_of
from difa_compile.passes.limit import RewriteLimit
from difa_compile.passes.prepare.arguments import name_arguments
from difa_compile.passes.prepare.canonical import Prepared, canonicalise
from difa_compile.passes.prepare.questions import Questions, answer_questions
from difa_compile.passes.prepare.specialize import specialize
from difa_compile.passes.proofs import Proofs, prove_regions
from difa_compile.passes.rewrite.emit_caches import emit_caches
from difa_compile.passes.rewrite.heads import heads
from difa_compile.passes.rewrite.reuse import forecast, reuse
from difa_compile.passes.rewrite.share_cfg import share_cfg
from difa_compile.passes.rewrite.window import window
from difa_compile.passes.segments import UNCUT, Split, cut_segments
from difa_compile.passes.site import Unit
from difa_compile.passes.trace import Trace
from difa_compile.passes.variant import Context, Rewrite, Rewritten, start_variant
from difa_compile.plan.schedule import Role

PREPARATION: tuple[Preparation, ...] = (
    name_arguments,  # first, for only while Dynamo is at it can be told which function it captured
    answer_questions,  # sizes that the inputs answer become known
    specialize,  # and those that Dynamo holds open become numbers: all that follows reads numbers
    canonicalise,  # last, on a copy: what was prepared before is kept for full attention
)

ANALYSIS: tuple[Analysis, ...] = (
    find_sample,
    follow_batch,  # from the sample
    find_sites,  # with the grids of their tokens, from the sample
    hold_positions,  # the inputs by whose values those grids were told
    find_blocks,  # that hold these sites
    cut_segments,  # around the blocks that hold sites
    prove_regions,  # segment by segment; by rewriting, so the batch is known by now
)

REWRITES: tuple[Rewrite, ...] = (
    # First, so that nothing else works on regions that go.
    Rewrite(reuse, lambda role: role.reads_output and not role.decision.order),
    Rewrite(forecast, lambda role: role.reads_output and role.decision.order > 0),
    # Before windows, so that the local attention is inserted on the halved values.
    Rewrite(share_cfg, lambda role: role.decision.cfg_shared and not role.reads_output),
    Rewrite(window, lambda role: role.decision.window is not None),
    # In place of windows where each group of heads has its own; on the halved values, too.
    Rewrite(heads, lambda role: bool(role.decision.groups)),
    # Last, so that caches hold what really leaves the region.
    Rewrite(emit_caches, lambda role: role.emit_output or role.emit_residual or bool(role.head_writes), limited=False),
)


def analyse(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    context: Context = Context(),  # noqa: B008 (frozen)
    *,
    layout: Layout | None = None,
    trace: Trace | None = None,
) -> AnalysedModel:
    """Prepare and analyse a graph as Dynamo hands it over; ``module`` itself becomes the prepared graph.

    Args:
        module: a pre-grad graph with ``example_value`` metadata. ``inputs``: real values of its inputs, in order.
        context: how guidance's halves come.
        layout: that of the attention sequence, where the graph does not show it.
        trace: where the graph is written after every pass.

    Raises:
        NoAttentionError, LayoutError, UnsupportedModelError: nothing a plan could act on, a ``layout`` that fits no
            site, sizes that are only known when the model runs.
        PassError: a pass failed, for a reason that is none of these.
    """
    facts = Facts(inputs, context, layout, rewrite)
    if trace is not None:
        trace.after("captured", module)
    for prepare in PREPARATION:
        with _named(prepare.__name__):
            module = prepare(module, facts)
        if trace is not None:
            trace.after(prepare.__name__, module)
    for find in ANALYSIS:
        with _named(find.__name__):
            fact = find(module, facts)
        if fact is not None:
            facts.keep(fact)
        if trace is not None:
            trace.after(find.__name__, module, _told(fact), _notes(facts))
    blocks = (*facts[Blocks].found, *facts[Split].spans)
    uncut = tuple((span.path, UNCUT) for span in facts[Blocks].spans if span not in blocks)
    return AnalysedModel(
        module=facts[Prepared].module,
        canonical=module,
        context=context,
        sample=facts[Sample].sizes,
        all_sites=facts[Sites].all,
        split=facts[Split],
        proofs=facts[Proofs].of_sites,
        questions=facts[Questions],
        positions=facts[HeldPositions],
        blocks=blocks,
        refused_blocks=(*facts[Blocks].refused, *uncut),
        cache_dtypes=(*map(_cache_dtypes, facts[Sites].rewritable), *map(_cache_dtypes, blocks)),
        first_parameter=next((i for i, value in enumerate(inputs) if isinstance(value, nn.Parameter)), None),
    )


def rewrite(
    module: fx.GraphModule,
    sites: Sequence[Unit],
    roles: Sequence[Role],
    context: Context,
    *,
    trace: Trace | None = None,
    limit: RewriteLimit | None = None,
) -> Rewritten:
    """Apply possible roles, one per site (attention calls, then blocks), to a copy of a graph: the whole or a segment.

    ``trace``: where the copy is written after every pass. ``limit``: which rewrites are made. Raises
    :class:`PassError`, naming the pass, the site and the node.
    """
    variant = start_variant(module, sites, roles, context)
    if trace is not None:
        told = "\n".join(f"{site.path}: {role}" for site, role in zip(sites, roles, strict=True))
        trace.after("before", variant.module, told)
    for each in REWRITES:
        for target in variant.targets:
            if not each.concerns(target.role):
                continue
            if limit is not None and each.limited and not limit.allows(each.name, target.site.path, target.role):
                continue
            variant.latest = None
            try:
                each.apply(variant, target)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                node = variant.latest if variant.latest is not None else target.attention
                raise _failed(each.name, error, f"site {target.site.path}, node {node.name}") from error
        if trace is not None:
            trace.after(each.name, variant.module)
    with _named("finish"):
        finished = variant.finish()
    moved = tuple(target.site for target in variant.targets)
    return Rewritten(finished, tuple(variant.cache_inputs), tuple(variant.cache_outputs), moved)


def _cache_dtypes(site: Unit) -> tuple[object, ...]:
    """The dtypes of what may be cached at a site, and the device."""
    values = [tensor_of(node) for node in (site.region.attention, *site.region.outputs)]
    return *(None if value is None else value.dtype for value in values), getattr(values[0], "device", None)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Within this block what goes wrong unforeseen, but for want of memory, is an error of the pass called ``name``."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DifaError) or is_out_of_memory(error):
            raise
        raise _failed(name, error) from error


def _failed(name: str, error: Exception, where: str = "") -> PassError:
    place = f" at {where}" if where else ""
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return PassError(
        f"pass {name} failed{place}: {reason}. This is a fault of difa-compile, not of the model or the plan; "
        'options={"trace": FOLDER} writes the graph as it was before, for a report'
    )


def _told(fact: object) -> str:
    """What a fact is, for the head of a traced file."""
    if isinstance(fact, Sites):
        return "\n".join(
            f"{site.path}: {site.kind}, {site.layout or site.layout_reason}"
            if site.rewritable
            else f"{site.path}: cross"
            for site in fact.all
        )
    if isinstance(fact, Blocks):
        told = [
            f"{block.path}: {len(block.region.interior)} nodes, {block.flops} operations"
            for block in (*fact.found, *fact.spans)
        ]
        return "\n".join([*told, *(f"{path}: none, {reason}" for path, reason in fact.refused)])
    if isinstance(fact, Proofs):
        return "\n".join(f"{i}: {proof}" for i, proof in enumerate(fact.of_sites))
    if isinstance(fact, Split):
        return "\n".join(
            f"{'gate' if segment.spanned else 'segment'} {i}: {segment.structure[:12]}, "
            f"sites {', '.join(map(str, segment.site_indices)) or 'none'}"
            for i, segment in enumerate(fact.segments)
        )
    return ""


def _notes(facts: Facts) -> Mapping[fx.Node, str]:
    """What facts say of single nodes."""
    notes: dict[fx.Node, str] = {}
    sample, sites = facts.get(Sample), facts.get(Sites)
    for latent in sample.latents if sample is not None else ():
        notes[latent] = "the noisy sample"
    for site in sites.all if sites is not None else ():
        for node in site.region.interior if site.rewritable else (site.region.attention,):
            part = "attention" if node is site.region.attention else "output" if node in site.region.outputs else "part"
            notes[node] = f"{part} of {site.path}"
    return notes
