"""Find the noisy sample among the inputs of a graph: the value that a pipeline denoises.

Finds :class:`Sample`, by the names of the model's arguments. Everything else follows from it: the batch is its first
dimension, the grid its last ones, self-attention is what attends among its tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from difa_compile.passes.facts import Facts
from difa_compile.passes.graph import is_parameter, shape_of, tensor_of
from difa_compile.passes.prepare.arguments import argument_name


@dataclass(frozen=True)
class Sample:
    """``latents``: the placeholders of the noisy sample, several where the model takes a list of samples.

    ``sizes``: those behind the first dimension; None where the samples of a list differ in them.
    """

    latents: tuple[fx.Node, ...]
    sizes: tuple[int, ...] | None


def find_sample(module: fx.GraphModule, facts: Facts) -> Sample:
    """Find the noisy sample."""
    del facts
    latents = latent_inputs(module.graph)
    return Sample(latents, sample_sizes(latents))


def latent_inputs(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """The placeholders of the noisy sample: by their usual name; else, of inputs that come in without names, as
    ``*args`` that nothing tells apart, the first, as is usual too; else the largest floating-point input.

    Several where the model takes a list of samples.
    """
    inputs = [
        node
        for node in graph.nodes
        if node.op == "placeholder"
        and not is_parameter(node)
        and (value := tensor_of(node)) is not None
        and value.is_floating_point()
        and value.ndim >= 2
    ]
    named = {node: argument_name(node) for node in inputs}
    for wanted in ("hidden_states", "sample", "latents", "latent", "x"):
        found = tuple(node for node in inputs if named[node] == wanted)
        if found:
            return found
    for wanted in ("hidden_states", "sample", "latent", "x_"):
        for node in inputs:
            if named[node].startswith(wanted):
                return (node,)
    for node in inputs:
        if named[node].endswith("latents"):
            return (node,)
    chosen = min(inputs, key=_position, default=None)
    if chosen is None or math.isinf(_position(chosen)):
        chosen = max(inputs, key=lambda node: math.prod(shape_of(node)), default=None)
    return () if chosen is None else tuple(node for node in inputs if named[node] == named[chosen])


def _position(node: fx.Node) -> float:
    """Where an input without a name stands among ``*args``; infinity for those that have a name."""
    found = re.fullmatch(r"\w+\[(\d+)\]", argument_name(node))
    return int(found[1]) if found else math.inf


def sample_sizes(latents: Sequence[fx.Node]) -> tuple[int, ...] | None:
    """Sizes of the noisy sample behind its first dimension (the batch; of the samples in a list, the channels)."""
    found = {shape_of(latent)[1:] for latent in latents}
    return found.pop() if len(found) == 1 else None
