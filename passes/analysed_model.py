"""The analysed model: what there is to know of a captured graph before anything is compiled.

Made by :func:`difa_compile.passes.order.analyse`; the backend runs it, calibration asks it, export takes variants of
the whole from it. Nothing in it changes, and no compiler is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from difa_compile.decision import Decision
from difa_compile.passes.analyse.positions import HeldPositions
from difa_compile.passes.prepare.questions import Questions
from difa_compile.passes.proofs import Proof
from difa_compile.passes.rewrite.heads import why_not_heads
from difa_compile.passes.rewrite.reuse import why_not_forecast
from difa_compile.passes.rewrite.share_cfg import why_not_shared
from difa_compile.passes.rewrite.window import why_not_window
from difa_compile.passes.segments import Segment, Split, structure_of
from difa_compile.passes.site import Block, Site, Unit
from difa_compile.passes.variant import Context


@dataclass(frozen=True, eq=False)
class AnalysedModel:
    """A captured graph of a model, prepared and analysed.

    Attributes:
        module: the prepared graph; what full attention runs.
        canonical: the graph that plans rewrite, with all attention in one form; ``module`` itself where it is so there.
        context: how guidance's halves come.
        sample: sizes of the noisy sample behind its first dimension, None where the samples of a list differ in them.
        all_sites: every attention call of ``canonical`` in execution order, cross-attention included.
        split: ``canonical`` cut into segments.
        blocks: the blocks that hold sites, then spans of them, as units of their own.
        refused_blocks: path and reason of those that are no units.
        proofs: for each of ``units``, why it must not be reused or shared.
        questions, positions: what of the inputs' values the graph holds for.
        cache_dtypes: for each of ``units`` the dtypes of what may be cached there, as its shapes
            (:attr:`Site.cache_shapes`), and the device. Read once: a fake value says ``meta`` for its device while
            another thread computes with values of its graph.
        first_parameter: where the first parameter of the model stands among the inputs, None if there is none.
    """

    module: fx.GraphModule
    canonical: fx.GraphModule
    context: Context
    sample: tuple[int, ...] | None
    all_sites: tuple[Site, ...]
    blocks: tuple[Block, ...]
    refused_blocks: tuple[tuple[str, str], ...]
    split: Split
    proofs: tuple[Proof, ...]
    questions: Questions
    positions: HeldPositions
    first_parameter: int | None
    cache_dtypes: tuple[tuple[object, ...], ...]
    _reasons: dict[tuple[int, Decision], str | None] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The attention sites a plan can act on (self- and joint attention), in execution order."""
        return tuple(site for site in self.all_sites if site.rewritable)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """All that a plan can act on: the attention sites, then the blocks."""
        return (*self.sites, *self.blocks)

    @property
    def batch(self) -> int:
        """That of the first site's attention; where attention is over parts of a sample, a multiple of the samples."""
        return self.sites[0].query_shape[0]

    def why_not(self, site: int, decision: Decision) -> str | None:
        """The reason why ``decision`` can't be carried out at a site (an index into ``units``), or None.

        Guidance's halves are judged as ``context`` says they come: halves of a batch, or two calls, across which
        sharing is reuse within the step.
        """
        key = (site, decision)
        if key not in self._reasons:
            self._reasons[key] = self._why_not(site, decision)
        return self._reasons[key]

    def _why_not(self, site: int, decision: Decision) -> str | None:
        segment, place = self._place(site)
        unit = segment.sites[place]
        if isinstance(unit, Block) and (decision.groups or decision.window is not None or decision.cfg_shared):
            if decision.groups:
                what = "a whole block has no heads"
            elif decision.cfg_shared:
                what = "the halves of a whole block are not shared"
            else:
                what = "a whole block has no window"
            return f"{what}; decide so for its attention"
        proof = self.proofs[site]
        across_calls = decision.cfg_shared and self.context.two_call
        halved = decision.cfg_shared and not self.context.two_call
        reason = proof.reuse if decision.kind.reads == "output" or across_calls else None
        if reason is None and decision.order:
            reason = why_not_forecast(unit)
        if reason is None and halved:
            reason = proof.sharing
        if reason is None and decision.window is not None and isinstance(unit, Site):
            reason = why_not_window(unit)
        if reason is None and decision.groups and isinstance(unit, Site):
            reason = why_not_heads(unit, decision)
        if reason is None and halved and isinstance(unit, Site):
            reason = why_not_shared(segment.module, unit, self.context)
        return reason

    def _place(self, site: int) -> tuple[Segment, int]:
        """The segment that holds a site, and which of its sites it is there."""
        segment = self.split.segments[self.segment_of(site)]
        return segment, segment.site_indices.index(site)

    def segment_of(self, site: int) -> int:
        """The index of the segment that holds a site."""
        return self._segment_of[site]

    @cached_property
    def _segment_of(self) -> dict[int, int]:
        return {index: i for i, segment in enumerate(self.split.segments) for index in segment.site_indices}

    def check(self, args: Sequence[Any]) -> None:
        """Raise :class:`InputValuesError` if the graph does not hold for inputs of these values.

        A model may ask its inputs how many tokens a mask shows, or branch on them; the graph holds for the answers with
        which it was made, and for the positions of tokens that it was given.
        """
        self.questions.check(args)
        self.positions.check(args)

    @cached_property
    def identity(self) -> tuple[object, ...]:
        """Equal for models that compute the same function of the same inputs, in the same segments."""
        inputs = tuple(str(node.target) for node in self.module.graph.find_nodes(op="placeholder"))
        pieces = tuple((segment.structure, segment.inputs, segment.outputs) for segment in self.split.segments)
        return structure_of(self.module), inputs, pieces, self.split.results

    def parameter(self, args: Sequence[Any]) -> Tensor | None:
        """A parameter of the model that makes a call with ``args``, or None if it has none.

        Dynamo shares one graph among models of a class, whose parameters are inputs of the graph.
        """
        return None if self.first_parameter is None else args[self.first_parameter]
