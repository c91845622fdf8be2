"""Find the attention sites of a graph and the region of nodes that each consists of.

Finds :class:`Sites`, and :class:`~difa_compile.passes.analyse.positions.HeldPositions`: the inputs by whose values the
grids of their tokens were told.

For every scaled dot product attention node:

1. *roots*: the nearest linears backwards from query, key and value; where some lie in the attention's own module,
   only those.
2. *outputs*: forward from the attention through layout ops, dropout and scalar factors and at most one linear (the
   output projection); after that linear no further than the attention's module. Whatever else uses a value on the way
   makes that value an output.
3. *interior*: what the roots reach and what reaches the outputs, closed under in-place writes: a write into a value
   of the region, and what it needs from the roots, belongs to the region.
4. *kind*: self if query, key and value project the same one stream; joint if the same several, or if keys and values
   have the query's stream among others; else cross.

Nothing is changed. Attention without linears before it (an average pool, say) is reported as cross, not guessed at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from difa_compile.errors import LayoutError, NoAttentionError
from difa_compile.layout import Layout
from difa_compile.passes.analyse.positions import HeldPositions
from difa_compile.passes.analyse.sample import latent_inputs
from difa_compile.passes.analyse.token_grids import LayoutFinder
from difa_compile.passes.facts import Facts
from difa_compile.passes.graph import (
    REARRANGING,
    alias_root,
    argument,
    influenced_by,
    is_attention,
    is_flex,
    is_linear,
    is_parameter,
    module_path,
    mutated_argument,
    op_name,
    reachable_from,
    reaching,
    shape_of,
)
from difa_compile.passes.prepare.specialize import check_sizes
from difa_compile.passes.site import Region, Site, SiteKind


@dataclass(frozen=True)
class Sites:
    """The attention sites of a graph in execution order: ``all``, and the ``rewritable``, on which a plan acts."""

    all: tuple[Site, ...]

    @property
    def rewritable(self) -> tuple[Site, ...]:
        return tuple(site for site in self.all if site.rewritable)


def find_sites(module: fx.GraphModule, facts: Facts) -> Sites:
    """Find the attention sites, their regions and token layouts.

    Raises :class:`NoAttentionError` if a plan can act on none of them, :class:`LayoutError` if the layout that the user
    told fits none, :class:`UnsupportedModelError` if a size at one is only known when the model runs.
    """
    sites = Sites(find_attention(module, layout=facts.layout, values=facts.inputs))
    if not sites.rewritable:
        raise NoAttentionError(
            f"the graph has {len(sites.all)} attention calls, none of them self- or joint attention of the "
            "denoised tokens through scaled_dot_product_attention; there is nothing a plan could change"
        )
    first = sites.rewritable[0]
    if facts.layout is not None and all(site.layout is None for site in sites.rewritable):
        raise LayoutError(f"{first.path}: {first.layout_reason}; give the layout of the sequence")
    for site in sites.rewritable:
        check_sizes((*attention_inputs(site.region.attention), *site.region.interior))
    return sites


def hold_positions(module: fx.GraphModule, facts: Facts) -> HeldPositions:
    """Find the inputs whose values tell where tokens stand: a later call has to bring the same."""

    def layouts(values: Sequence[Any]) -> list[Layout | None]:
        return [site.layout for site in find_attention(module, layout=facts.layout, values=values)]

    return HeldPositions(module.graph, facts.inputs, layouts)


def find_attention(
    module: fx.GraphModule, *, layout: Layout | None = None, values: Sequence[Any] | None = None
) -> tuple[Site, ...]:
    """All attention sites of a captured graph in execution order, cross-attention included.

    Args:
        module: a Dynamo pre-grad graph (or an exported one) with ``example_value`` metadata.
        layout: the token layout, told by the user; overrides what the graph shows and must add up at every
            rewritable site that has its number of tokens.
        values: the real inputs of the graph, in order, among which position ids may show the grid of packed tokens.
    """
    latents = latent_inputs(module.graph)
    from_latent = influenced_by(latents)
    layouts = LayoutFinder(module.graph, latents, told=layout, values=values)
    attentions = [node for node in module.graph.nodes if is_attention(node)]
    names = site_names(attentions)
    return tuple(describe(node, name, layouts, from_latent) for node, name in zip(attentions, names, strict=True))


def site_names(attentions: list[fx.Node]) -> list[str]:
    """Module paths, made unique with ``#1``, ``#2`` where one module attends several times."""
    paths = [module_path(node) or "attention" for node in attentions]
    totals, seen = Counter(paths), Counter[str]()
    names = []
    for path in paths:
        names.append(f"{path}#{seen[path]}" if totals[path] > 1 and seen[path] else path)
        seen[path] += 1
    return names


def describe(node: fx.Node, name: str, layouts: LayoutFinder, from_latent: set[fx.Node]) -> Site:
    query, key, value = attention_inputs(node)
    path = module_path(node)
    roots = {part: first_linears(nearest_linears(part, path), path) for part in (query, key, value)}
    region = find_region(node, {root for found in roots.values() for root in found})
    kind = classify(node, [streams_of(roots[part]) for part in (query, key, value)], from_latent)
    query_shape, key_shape = shape_of(query), shape_of(key)
    flex = is_flex(node)
    mask = None if flex else argument(node, 3, "attn_mask")
    causal = not flex and bool(argument(node, 5, "is_causal", False))
    found, reason = None, "cross-attention has no image grid"
    if kind is not SiteKind.CROSS:
        found, reason = layouts.of(key, key_shape[2])
        if found is not None:
            own, reason = layouts.of(query, query_shape[2])
            if own is not None and own not in (found, Layout(found.grid), Layout(found.grid, after=found.after)):
                own, reason = None, f"queries stand as {own}, keys as {found}"
            found = None if own is None else found
    first = next(iter(roots[query]), None)
    scale = argument(node, 5 if flex else 6, "scale")
    return Site(
        path=name,
        kind=kind,
        query_shape=query_shape,  # type: ignore[arg-type]
        key_shape=key_shape,  # type: ignore[arg-type]
        scale=None if scale is None else float(scale),
        mask="function" if flex else "causal" if causal else "none" if mask is None else "mask",
        width=shape_of(first.args[0])[-1] if first is not None and isinstance(first.args[0], fx.Node) else 0,
        layout=found,
        layout_reason=reason,
        region=region,
    )


def attention_inputs(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Query, key and value of an attention node, however they were passed."""
    return argument(node, 0, "query"), argument(node, 1, "key"), argument(node, 2, "value")


def nearest_linears(start: fx.Node, path: str) -> tuple[fx.Node, ...]:
    """The linears first met backwards from a node; those inside module ``path`` only, if there are any."""
    found: list[fx.Node] = []
    seen, todo = {start}, [start]
    while todo:
        node = todo.pop()
        if is_linear(node):
            found.append(node)
            continue
        for source in node.all_input_nodes:
            if source not in seen and not is_parameter(source):
                seen.add(source)
                todo.append(source)
    own = [node for node in found if within(node, path)]
    return tuple(own or found)


def first_linears(linears: tuple[fx.Node, ...], path: str) -> tuple[fx.Node, ...]:
    """Where chains of linears inside the attention's module begin: low-rank projections, adapters beside a linear."""
    found: dict[fx.Node, None] = {}
    for linear in linears:
        node = first = linear
        while within(first, path) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
            if is_linear(node) and within(node, path):
                first = node
            elif op_name(node) not in REARRANGING | {"dropout", "layer_norm", "rms_norm", "mul"} or node in linears:
                break
        found[first] = None
    return tuple(found)


def within(node: fx.Node, path: str) -> bool:
    """Whether a node was made by the module at ``path`` or one inside it."""
    place = module_path(node)
    return place == path or place.startswith(path + ".")


def streams_of(linears: tuple[fx.Node, ...]) -> frozenset[fx.Node]:
    """The streams that linears project: their inputs, seen through casts and layout ops."""
    found = set()
    for linear in linears:
        node = linear.args[0]
        while isinstance(node, fx.Node) and op_name(node) in REARRANGING and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        if isinstance(node, fx.Node):
            found.add(node)
    return frozenset(found)


def classify(node: fx.Node, streams: list[frozenset[fx.Node]], from_latent: set[fx.Node]) -> SiteKind:
    query, key, value = streams
    if not query or key != value or not query <= key or node not in from_latent:
        return SiteKind.CROSS
    return SiteKind.SELF if len(key) == 1 else SiteKind.JOINT


def find_region(attention: fx.Node, roots: set[fx.Node]) -> Region:
    outputs = find_outputs(attention)
    from_roots = reachable_from(roots | {attention})
    interior = from_roots & reaching(outputs)
    writes = [node for node in attention.graph.nodes if mutated_argument(node) is not None]
    while True:
        joining = [node for node in writes if node not in interior and alias_root(node) in interior]
        if not joining:
            break
        interior |= (reaching(joining) & from_roots) | set(joining)
    ordered = tuple(node for node in attention.graph.nodes if node in interior)
    inputs = dict.fromkeys(source for node in ordered for source in node.all_input_nodes if source not in interior)
    return Region(attention, ordered, tuple(inputs), outputs)


def find_outputs(attention: fx.Node) -> tuple[fx.Node, ...]:
    path = module_path(attention)
    outputs: dict[fx.Node, None] = {}
    todo: list[tuple[fx.Node, bool]] = [(attention, False)]
    while todo:
        node, projected = todo.pop()
        for user in node.users:
            if is_linear(user) and user.args[0] is node and not projected:
                todo.append((user, True))
            elif passes_on(user, node) and (not projected or within(user, path)):
                todo.append((user, projected))
            else:
                outputs[node] = None
    order = {node: i for i, node in enumerate(attention.graph.nodes)}
    return tuple(sorted(outputs, key=order.__getitem__))


def passes_on(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` merely moves, casts or scales ``node``."""
    if not user.args or user.args[0] is not node:
        return False
    name = op_name(user)
    if name in ("mul", "truediv", "div"):
        return not isinstance(user.args[1], fx.Node)
    return name in REARRANGING or name == "dropout"
