"""CFG sharing: compute the conditional half of the batch, copy it to the other half (ASC, arXiv 2406.08552).

Before: ``y = region(x)`` on a batch [a, b]. After: ``h = region(x[half]); y = h, twice``.

1. Region inputs that carry the batch (:mod:`difa_compile.passes.analyse.batch_dims`) are cut to the conditional half.
2. Batch sizes that Dynamo baked into reshapes inside the region are halved.
3. Every value of the region is recomputed on fake tensors; one whose shape is not exactly the old one with the batch
   halved stops the rewrite (:func:`why_not_shared` says so before a plan is accepted).
4. Outputs are doubled back behind the region.

Values of the region that are used outside it, other than its outputs, are computed whole, and halved behind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from difa_compile.passes.analyse.batch_dims import why_not_followed
from difa_compile.passes.analyse.find_attention import attention_inputs
from difa_compile.passes.graph import is_parameter, mutated_argument, op_name, reaching, shape_of, tensor_of
from difa_compile.passes.site import Region, Site
from difa_compile.passes.variant import Context, Target, Variant, start_variant
from difa_compile.plan.schedule import FULL_ROLE


class HalvingError(Exception):
    """A region that can't be computed on half a batch; the message is the reason given to the user."""


def why_not_shared(module: fx.GraphModule, site: Site, context: Context) -> str | None:
    """The reason why the CFG halves can't be shared at a site, or None."""
    if context.conditional_half is None:
        return "which half of the batch is conditional is not known; the plan does not say"
    problem = eligible(site)
    if problem is not None:
        return problem
    variant = start_variant(module, [site], [FULL_ROLE], context)
    try:
        share_cfg(variant, variant.targets[0])
    except HalvingError as error:
        return str(error)
    return None


def eligible(site: Site) -> str | None:
    batch = site.query_shape[0]
    if batch < 2 or batch % 2:
        return f"a batch of {batch} has no two CFG halves"
    streams = attention_inputs(site.region.attention)
    if any(stream.meta.get("batch_dim") != 0 for stream in streams):
        return f"the batch can't be followed from the noisy sample to this attention{why_not_followed(streams)}"
    if any("batch_dim" not in node.meta for node in site.region.outputs):
        return "an output of the region does not carry the batch"
    return None


def narrow_to_half(variant: Variant, place: fx.Node, value: fx.Node, dim: int) -> fx.Node:
    """The conditional half of ``value`` along its batch dimension."""
    which = variant.context.conditional_half
    assert which is not None, "why_not_shared admits no sharing where it is not known"
    half = shape_of(value)[dim] // 2
    return variant.call_after(place, torch.narrow, (value, dim, which * half, half))


def twice(variant: Variant, place: fx.Node, half: fx.Node, dim: int) -> fx.Node:
    """``half`` in both halves along its batch dimension.

    By ``repeat``: what ``cat`` is given autocast promotes, and it refuses the one half-precision dtype under the other.
    """
    return variant.call_after(place, "repeat", (half, *(1 + (i == dim) for i in range(len(shape_of(half))))))


def shared_part(region: Region) -> tuple[fx.Node, ...]:
    """The nodes of a region that nothing outside needs: those to compute on half the batch.

    A projection that serves more than this attention (fused with an MLP's, or with another attention's) stays whole,
    with what it needs; so does an element of a tuple that stays whole.
    """
    inside = set(region.interior)
    escaping = [
        node
        for node in region.interior
        if node not in region.outputs and any(user not in inside for user in node.users)
    ]
    whole = reaching(escaping) & inside
    for node in region.interior:
        if op_name(node) == "getitem" and node.args[0] in whole and tensor_of(node.args[0]) is None:  # type: ignore[arg-type]
            whole.add(node)
    return tuple(node for node in region.interior if node not in whole)


def share_cfg(variant: Variant, target: Target) -> None:
    """Compute a site's region on the conditional half and double its outputs. Raises :class:`HalvingError`."""
    region = target.site.region
    part = shared_part(region)
    if region.attention not in part or any(output not in part for output in region.outputs):
        raise HalvingError("the attention's own value is used outside its region")
    whole = {node: shape_of(node) for node in part}
    inside = set(part)
    for source in dict.fromkeys(source for node in part for source in node.all_input_nodes if source not in inside):
        dim = source.meta.get("batch_dim")
        if dim is None or is_parameter(source) or tensor_of(source) is None:
            continue
        if shape_of(source)[dim] % 2:
            raise HalvingError(f"{source.name} has an odd batch of {shape_of(source)[dim]}")
        first = next(node for node in part if source in node.all_input_nodes)
        half = narrow_to_half(variant, first.prev, source, dim)
        for node in part:
            node.replace_input_with(source, half)
    for node in part:
        halve_constants(node, whole[node])
        try:
            variant.refresh(node)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise HalvingError(f"{op_name(node)} ({node.name}) does not run on half a batch: {reason}") from error
        check_half(node, whole[node])
    for output in region.outputs:
        dim = output.meta["batch_dim"]
        doubled = twice(variant, output, output, dim)
        going_on = {*part, doubled}  # the region itself goes on with the half
        for user in [user for user in output.users if user not in going_on]:
            user.replace_input_with(output, doubled)
        doubled.meta["batch_dim"] = dim
        variant.exchanged(output, doubled)
    target.halved = True


def halve_constants(node: fx.Node, whole: tuple[int, ...]) -> None:
    """Halve a batch size that stands as a number among a reshape's sizes."""
    dim = node.meta.get("batch_dim")
    name = op_name(node)
    if dim is None or name not in ("view", "reshape", "expand"):
        return

    def patched(sizes: Any) -> Any:
        changed = list(sizes)
        if isinstance(changed[dim], int) and changed[dim] != -1:
            changed[dim] //= 2
        return type(sizes)(changed)

    if "shape" in node.kwargs:
        node.kwargs = {**node.kwargs, "shape": patched(node.kwargs["shape"])}
    elif len(node.args) > 1 and isinstance(node.args[1], (tuple, list)):
        node.args = (node.args[0], patched(node.args[1]), *node.args[2:])
    else:
        node.args = (node.args[0], *patched(tuple(node.args[1:])))


def check_half(node: fx.Node, whole: tuple[int, ...]) -> None:
    if tensor_of(node) is None or mutated_argument(node) is not None:
        return
    dim = node.meta.get("batch_dim")
    expected = whole if dim is None else (*whole[:dim], whole[dim] // 2, *whole[dim + 1 :])
    if shape_of(node) != expected:
        raise HalvingError(f"{node.name} has shape {shape_of(node)} on half a batch, {expected} was expected")
