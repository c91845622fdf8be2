"""Bring every written form of softmax attention into one: ``scaled_dot_product_attention`` on (B, H, L, D).

Before: ``w = softmax(matmul(q, k^T) / 8); o = matmul(w, v)``. After: ``o = scaled_dot_product_attention(q, k, v)``.

Recognised, besides that function itself:

1. *explicit*: ``softmax(q @ k^T * scale [+ mask]) @ v``, by matmul, bmm, baddbmm, or einsum with its dimensions in any
   order (``bqhd,bkhd->bhqk``), casts and dropout between;
2. ``F.multi_head_attention_forward`` (``nn.MultiheadAttention``), which becomes projections around the attention;
3. ``flash_attn_func`` and the op behind it, on (B, L, H, D);
4. FlexAttention without a score or mask function.

A form is left alone where the function cannot say the same: attention weights that are used elsewhere, biases on keys,
sliding windows, a softmax over anything but the products of two streams of tokens (a gate, a pooler). The graph that
runs a plan of full attention is never touched: this works on the copy that plans rewrite.

Autocast casts what ``scaled_dot_product_attention`` is given. Where it did not cast the form, or not in all its parts
(scores in float32, in a region of their own that turns autocast off), the function stands in such a region.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from difa_compile.passes.autocast import ENTER, EXIT, autocast_of, casts_at
from difa_compile.passes.facts import Facts
from difa_compile.passes.graph import argument, is_parameter, op_name, shape_of, tensor_of
from difa_compile.passes.replay import computes_the_same
from difa_compile.passes.variant import refresh, start_variant

SDPA = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Prepared:
    """The prepared graph as it was before attention was brought into one form; what full attention runs."""

    module: fx.GraphModule


def canonicalise(module: fx.GraphModule, facts: Facts) -> fx.GraphModule:
    """The graph that plans rewrite: with all attention in one form, if that computes the same on the example inputs.

    Keeps the graph given (:class:`Prepared`), which stays as it is.
    """
    facts.keep(Prepared(module))
    rewritten = canonical(module)
    if rewritten is module or computes_the_same(module, rewritten, facts.inputs):
        return rewritten
    warnings.warn(
        "attention written out in plain products was recognised, but as one call it does not compute the same on "
        "the example inputs; it is left alone",
        stacklevel=2,
    )
    return module


def canonical(module: fx.GraphModule) -> fx.GraphModule:
    """``module`` itself if it has no form but the canonical one, else a rewritten copy."""
    copied = start_variant(module, [], []).finish()
    if not rewrite_forms(copied.graph):
        return module
    copied.graph.lint()
    copied.recompile()
    return copied


def rewrite_forms(graph: fx.Graph) -> int:
    """Rewrite all recognised forms in place. Returns how many."""
    count = 0
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        count += any(rewrite(node) for rewrite in (rewrite_explicit, rewrite_multi_head, rewrite_flash, rewrite_flex))
    return count


class Writer:
    """Inserts calls before a node, with its module stack and their fake values."""

    def __init__(self, place: fx.Node) -> None:
        self.place = place

    def __call__(self, target: str | Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        with self.place.graph.inserting_before(self.place):
            if isinstance(target, str):
                node = self.place.graph.call_method(target, args, kwargs)
            else:
                node = self.place.graph.call_function(target, args, kwargs)
        node.meta = {key: value for key, value in self.place.meta.items() if key not in ("example_value", "val")}
        refresh(node)
        return node

    @contextmanager
    def uncast(self, like: fx.Node) -> Iterator[None]:
        """What is written within this block stands in a region without autocast on the device of ``like``."""
        settings = (device_of(like), None, False, None)
        with self.place.graph.inserting_before(self.place):
            enter = self.place.graph.call_function(ENTER, settings)
        yield
        with self.place.graph.inserting_before(self.place):
            leave = self.place.graph.call_function(EXIT, (enter,))
        for node in (enter, leave):
            node.meta = {key: value for key, value in self.place.meta.items() if key not in ("example_value", "val")}

    def attention(self, *streams: fx.Node, dtype: torch.dtype | None = None, **options: Any) -> fx.Node:
        """The attention call. ``dtype``: of its result; without autocast where that would give another. None: any."""
        query = streams[0]
        with autocast_of(self.place):
            on, lower = torch.is_autocast_enabled(device_of(query)), torch.get_autocast_dtype(device_of(query))
        if not on or dtype_of(query) == torch.float64 or dtype in (None, lower):
            return self(SDPA, *streams, **options)
        with self.uncast(query):
            return self(SDPA, *streams, **options)


# --- explicit ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """A product of two values in einsum's notation: a letter per dimension, contracted ones missing in ``out``."""

    left: fx.Node
    right: fx.Node
    left_letters: str
    right_letters: str
    out: str

    @property
    def consistent(self) -> bool:
        """Whether no letter stands twice in a factor and each has one size, so that nothing is broadcast."""
        sizes: dict[str, int] = {}
        for letters, node in ((self.left_letters, self.left), (self.right_letters, self.right)):
            shape = shape_of(node)
            if len(set(letters)) != len(letters) or len(shape) != len(letters):
                return False
            if any(sizes.setdefault(letter, size) != size for letter, size in zip(letters, shape, strict=True)):
                return False
        return len(set(self.out)) == len(self.out) and set(self.out) <= set(sizes)

    @property
    def swapped(self) -> Product:
        return Product(self.right, self.left, self.right_letters, self.left_letters, self.out)


@dataclass
class Scores:
    """What the softmax is taken of: ``product * scale + mask``, the product being of queries and keys in some order."""

    product: Product
    scale: float
    mask: fx.Node | None
    fill: float | None
    """What hidden pairs are filled with, where the mask is True; None if the mask is added."""
    chain: list[fx.Node]

    @property
    def place(self) -> fx.Node:
        """The product of queries and keys."""
        return self.chain[-1]


@dataclass(frozen=True)
class Letters:
    """Letters of a product, by what their dimensions are to the attention."""

    batch: str
    kept: str
    """Of the left factor, alone in it."""
    added: str
    """Of the right factor, alone in it."""
    contracted: str


CASTS = {"to", "float", "half", "bfloat16", "type", "type_as", "contiguous", "dropout", "clone"}
PRODUCTS = {"matmul", "bmm", "__matmul__", "einsum", "baddbmm"}


def letters_of(product: Product) -> Letters | None:
    """The letters of a product with one kept, one added and one contracted dimension, or None if it has others."""
    left, right, out = (set(letters) for letters in (product.left_letters, product.right_letters, product.out))
    kept, added, contracted = (left & out) - right, (right & out) - left, (left & right) - out
    if not len(kept) == len(added) == len(contracted) == 1 or (left ^ right) - out:
        return None
    batch = "".join(letter for letter in product.left_letters if letter in right & out)
    return Letters(batch, *kept, *added, *contracted)


def rewrite_explicit(node: fx.Node) -> bool:
    """Rewrite a product of attention weights with values. Returns whether it is one that can be."""
    product = product_of(node)
    if product is None or op_name(node) == "baddbmm" or not product.consistent:
        return False
    return any(rewrite_weighted(node, each) for each in (product, product.swapped))


def rewrite_weighted(node: fx.Node, product: Product) -> bool:
    """Rewrite the product of attention weights, on the left, with values. Returns whether that is what it is."""
    parts = letters_of(product)
    if parts is None or len(parts.batch) not in (1, 2):
        return False
    chain, weights = [node], product.left
    while op_name(weights) in CASTS and isinstance(inner := argument(weights, 0, "input"), fx.Node):
        chain.append(weights)
        weights = inner
    if op_name(weights) not in ("softmax", "_softmax"):
        return False
    if softmax_dim(weights) != product.left_letters.index(parts.contracted):
        return False
    chain.append(weights)
    scores = read_scores(argument(weights, 0, "input"), chain)
    if scores is None or len(scores.product.out) != len(product.left_letters):
        return False
    inside = set(scores.chain)
    if any(user not in inside for each in scores.chain if each is not node for user in each.users):
        return False  # the weights are used elsewhere
    named = dict(zip(product.left_letters, scores.product.out, strict=True))
    order = [named[letter] for letter in parts.batch]
    streams = queries_and_keys(scores.product, named[parts.kept], named[parts.contracted], order)
    if streams is None:
        return False
    write = Writer(node)
    query, key = (arranged(write, stream, letters, wanted) for stream, letters, wanted in streams)
    value = arranged(write, product.right, product.right_letters, parts.batch + parts.contracted + parts.added)
    mask = arranged_mask(write, scores.mask, product.left_letters, parts.batch + parts.kept + parts.contracted)
    cast = casts_at((node, scores.place), device_of(query)) is not None
    result = attention_of(write, query, key, value, mask, scores, cast)
    result = arranged(write, result, parts.batch + parts.kept + parts.added, product.out)
    result = converted(write, result, dtype_of(node))
    node.replace_all_uses_with(result)
    for each in scores.chain:
        if not each.users:
            node.graph.erase_node(each)
    return True


def queries_and_keys(product: Product, query: str, key: str, batch: list[str]) -> list[tuple[fx.Node, str, str]] | None:
    """The factors of scores as (value, its letters, those wanted), queries first; None if it is another product."""
    if not product.consistent:
        return None
    if query not in product.left_letters:
        product = product.swapped
    parts = letters_of(product)
    if parts is None or (parts.kept, parts.added, set(parts.batch)) != (query, key, set(batch)):
        return None
    leading = "".join(batch)
    return [
        (product.left, product.left_letters, leading + query + parts.contracted),
        (product.right, product.right_letters, leading + key + parts.contracted),
    ]


def arranged(write: Writer, node: fx.Node, letters: str, wanted: str) -> fx.Node:
    """A value whose dimensions are named by letters, in another order."""
    if letters == wanted:
        return node
    order = [letters.index(letter) for letter in wanted]
    if order[:-2] == list(range(len(order) - 2)):
        return write("transpose", node, -2, -1)
    return write("permute", node, *order)


def arranged_mask(write: Writer, mask: fx.Node | None, letters: str, wanted: str) -> fx.Node | None:
    """A mask that broadcasts to scores of these letters, for scores of another order."""
    if mask is None or letters == wanted:
        return mask
    while len(shape_of(mask)) < len(letters):
        mask = write("unsqueeze", mask, 0)
    return arranged(write, mask, letters, wanted)


def attention_of(
    write: Writer, query: fx.Node, key: fx.Node, value: fx.Node, mask: fx.Node | None, scores: Scores, cast: bool
) -> fx.Node:
    """The attention call on (B, H, L, D), or on (B, L, D) as one head. ``cast``: by autocast, where it is on."""
    dtype = dtype_of(query)
    streams = [query, key, value]
    if mask is not None and scores.fill == -math.inf:
        mask = write(torch.logical_not, mask)
    elif mask is not None:  # a finite fill still counts where every pair is hidden
        mask = converted(write, mask, dtype)
        mask = mask if scores.fill is None else write(torch.mul, mask, scores.fill)
    if mask is not None and len(shape_of(mask)) < 2:
        mask = write("unsqueeze", mask, 0)
    flat = len(shape_of(query)) == 3
    if flat:
        streams = [write("unsqueeze", stream, 1) for stream in streams]
        if mask is not None and len(shape_of(mask)) == 3:
            mask = write("unsqueeze", mask, 1)
    streams = [converted(write, stream, dtype) for stream in streams]
    result = write.attention(*streams, dtype=None if cast else dtype, attn_mask=mask, scale=scores.scale)
    return write("squeeze", result, 1) if flat else result


def dtype_of(node: fx.Node) -> torch.dtype:
    value = tensor_of(node)
    assert value is not None
    return value.dtype


def device_of(node: fx.Node) -> str:
    """The device type of a node's value."""
    value = tensor_of(node)
    assert value is not None
    return value.device.type


def converted(write: Writer, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if dtype_of(node) == dtype else write("to", node, dtype)


def product_of(node: fx.Node) -> Product | None:
    """A batched matrix product, or an einsum of two values with a written-out result and no ellipsis."""
    name = op_name(node)
    if name not in PRODUCTS:
        return None
    if name == "einsum":
        equation, operands = str(argument(node, 0, "equation")).replace(" ", ""), node.args[1:]
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = tuple(operands[0])
        if "->" not in equation or "." in equation or equation.count(",") != 1 or len(operands) != 2:
            return None
        left, right = operands
        letters, out = equation.split("->")
        one, two = letters.split(",")
    else:
        if name == "baddbmm":
            left, right = argument(node, 1, "batch1"), argument(node, 2, "batch2")
        else:
            left, right = argument(node, 0, "input"), argument(node, 1, "mat2" if name == "bmm" else "other")
        rank = len(shape_of(node))
        batch = "abcdefgh"[: rank - 2]
        one, two, out = batch + "xy", batch + "yz", batch + "xz"
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    return Product(left, right, one, two, out)


def softmax_dim(softmax: fx.Node) -> int | None:
    """Which dimension a softmax is over, counted from the front."""
    dim = argument(softmax, 1, "dim")
    return dim % len(shape_of(softmax)) if type(dim) is int and shape_of(softmax) else None


def read_scores(node: object, chain: list[fx.Node]) -> Scores | None:
    """Follow the softmax's argument back to the product of queries and keys."""
    scale, mask, fill = 1.0, None, None
    while isinstance(node, fx.Node):
        name = op_name(node)
        chain.append(node)
        if name in CASTS - {"dropout"}:
            node = argument(node, 0, "input")
        elif name in ("mul", "truediv", "div", "mul_", "div_", "imul", "itruediv"):
            one, two = argument(node, 0, "input"), argument(node, 1, "other")
            if "mul" in name and is_number(one):
                one, two = two, one
            if not is_number(two) or ("div" in name and two == 0):
                return None
            scale *= float(two) if "mul" in name else 1.0 / float(two)
            node = one
        elif name in ("add", "add_", "iadd", "masked_fill", "masked_fill_") and mask is None and scale == 1.0:
            filled = name.startswith("masked_fill")
            added = argument(
                node, 1, "mask" if filled else "other"
            )  # with a factor met before, on the way back, the mask would be scaled too
            if not isinstance(added, fx.Node) or not is_lesser(added, node) or not hides(node):
                return None
            mask, fill = added, float(argument(node, 2, "value")) if filled else None
            node = argument(node, 0, "input")
        elif name in PRODUCTS:
            return product_of_streams(node, scale, mask, fill, chain)
        else:
            return None
    return None


def hides(node: fx.Node) -> bool:
    """Whether a sum or a fill is one that a mask makes: nothing scaled, hidden pairs far below all scores."""
    if op_name(node).startswith("masked_fill"):
        value = argument(node, 2, "value")
        return is_number(value) and float(value) <= -1e4
    return bool(argument(node, 2, "alpha", 1) == 1)


def is_number(value: object) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ) or value == -math.inf


def is_lesser(mask: fx.Node, scores: fx.Node) -> bool:
    """Whether a summand broadcasts to the scores, as a mask does."""
    shape, whole = shape_of(mask), shape_of(scores)
    return len(shape) <= len(whole) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(whole), strict=False))


def product_of_streams(
    node: fx.Node, scale: float, mask: fx.Node | None, fill: float | None, chain: list[fx.Node]
) -> Scores | None:
    product = product_of(node)
    if product is None or is_parameter(product.left) or is_parameter(product.right):
        return None
    if op_name(node) == "baddbmm":
        alpha = argument(node, 4, "alpha", 1)
        if argument(node, 3, "beta", 1) != 0 or not is_number(alpha):
            return None
        scale *= float(alpha)
    return Scores(product, scale, mask, fill, chain)


# --- nn.MultiheadAttention --------------------------------------------------------------------------------------------

MULTI_HEAD_ARGUMENTS = (
    "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v",
    "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training", "key_padding_mask", "need_weights",
    "attn_mask", "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "static_k", "static_v",
    "average_attn_weights", "is_causal",
)  # fmt: skip


def rewrite_multi_head(node: fx.Node) -> bool:
    """Rewrite ``F.multi_head_attention_forward``. Returns whether the node is one that can be."""
    if op_name(node) != "multi_head_attention_forward":
        return False
    given = {name: argument(node, i, name) for i, name in enumerate(MULTI_HEAD_ARGUMENTS)}
    refused = ("bias_k", "bias_v", "key_padding_mask", "attn_mask", "static_k", "static_v")
    if any(given[name] is not None for name in refused) or given["add_zero_attn"] or given["is_causal"]:
        return False
    needed = ["query", "key", "value", "in_proj_weight", "out_proj_weight"]
    if given["use_separate_proj_weight"]:
        needed[3:4] = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    if any(not isinstance(given[name], fx.Node) for name in needed) or type(given["num_heads"]) is not int:
        return False
    outputs = [user for user in node.users if op_name(user) == "getitem" and user.args[1] == 0]
    if set(node.users) - set(outputs) and any(user.users for user in set(node.users) - set(outputs)):
        return False  # the weights are used
    streams = [given[name] for name in ("query", "key", "value")]
    if any(len(shape_of(stream)) != 3 for stream in streams):
        return False
    write = Writer(node)
    heads, width = given["num_heads"], shape_of(streams[0])[-1]
    weights = list(projections(write, given, width))
    biases: list[fx.Node | None] = [None, None, None]
    if given["in_proj_bias"] is not None:
        biases = [*thirds(write, given["in_proj_bias"], width)]
    if streams[0] is streams[1] is streams[2] and not given["use_separate_proj_weight"]:
        together = write(F.linear, streams[0], given["in_proj_weight"], given["in_proj_bias"])
        projected = [write("narrow", together, -1, i * width, width) for i in range(3)]
    else:
        projected = [write(F.linear, s, w, b) for s, w, b in zip(streams, weights, biases, strict=True)]
    split = []
    for each in projected:
        length, batch, _ = shape_of(each)  # (L, B, heads * D) -> (B, heads, L, D)
        split.append(write("permute", write("view", write("contiguous", each), length, batch, heads, -1), 1, 2, 0, 3))
    attended = write("permute", write.attention(*split), 2, 0, 1, 3)
    flat = write("flatten", attended, 2)
    result = write(F.linear, flat, given["out_proj_weight"], given["out_proj_bias"])
    for user in outputs:
        user.replace_all_uses_with(result)
    for user in list(node.users):
        node.graph.erase_node(user)
    node.graph.erase_node(node)
    return True


def projections(write: Writer, given: dict[str, Any], width: int) -> Iterator[fx.Node]:
    if given["use_separate_proj_weight"]:
        yield from (given[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"))
    else:
        yield from thirds(write, given["in_proj_weight"], width)


def thirds(write: Writer, packed: fx.Node, width: int) -> Iterator[fx.Node]:
    yield from (write("narrow", packed, 0, i * width, width) for i in range(3))


# --- flash_attn -------------------------------------------------------------------------------------------------------


FLASH_FUNCTION = (
    "q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic",
    "return_attn_probs",
)  # fmt: skip
FLASH_OP = (
    "q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right", "softcap",
    "alibi_slopes", "return_softmax",
)  # fmt: skip


def rewrite_flash(node: fx.Node) -> bool:
    """Rewrite a call of ``flash_attn``. Returns whether the node is one that can be."""
    name = op_name(node)
    if name not in ("flash_attn_func", "_flash_attn_forward"):
        return False
    direct = name == "flash_attn_func"
    names = FLASH_FUNCTION if direct else FLASH_OP
    given = {each: argument(node, i, each) for i, each in enumerate(names)}
    sides = given["window_size"] if direct else (given["window_size_left"], given["window_size_right"])
    if not isinstance(sides, (tuple, list, type(None))) or any(side not in (None, -1) for side in sides or ()):
        return False
    if any(not isinstance(given[each], fx.Node) or len(shape_of(given[each])) != 4 for each in ("q", "k", "v")):
        return False
    if any(given[each] for each in ("dropout_p", "softcap")) or given["alibi_slopes"] is not None:
        return False
    if given.get("return_attn_probs"):
        return False
    outputs = [node] if direct else [user for user in node.users if op_name(user) == "getitem" and user.args[1] == 0]
    if not direct and any(user not in outputs and user.users for user in node.users):
        return False  # the log-sum-exp is used
    write = Writer(node)
    streams = [write("transpose", given[each], 1, 2) for each in ("q", "k", "v")]
    scale, causal = given["softmax_scale"], given["causal"]
    grouped = {} if shape_of(streams[0])[1] == shape_of(streams[1])[1] else {"enable_gqa": True}
    dtype = dtype_of(streams[0])  # the function takes what it is given
    attended = write.attention(*streams, dtype=dtype, is_causal=bool(causal), scale=scale, **grouped)
    result = write("transpose", attended, 1, 2)
    for user in outputs:
        user.replace_all_uses_with(result)
    for user in [] if direct else list(node.users):
        node.graph.erase_node(user)
    node.graph.erase_node(node)
    return True


# --- FlexAttention ----------------------------------------------------------------------------------------------------


def rewrite_flex(node: fx.Node) -> bool:
    """Rewrite a FlexAttention without functions of its own. Returns whether the node is one that can be."""
    if op_name(node) != "flex_attention" or len(node.args) < 6:
        return False
    query, key, value, score, block_mask, scale, *_ = node.args
    if not all(isinstance(each, fx.Node) and len(shape_of(each)) == 4 for each in (query, key, value)):
        return False
    if not changes_nothing(node, score, keeps_score) or not isinstance(block_mask, tuple) or len(block_mask) < 3:
        return False
    if not changes_nothing(node, block_mask[-1], sees_all) or not is_one_block(block_mask, query, key):
        return False
    outputs = [user for user in node.users if op_name(user) == "getitem" and user.args[1] == 0]
    if any(user not in outputs and user.users for user in node.users):
        return False  # the log-sum-exp is used
    write = Writer(node)
    grouped = {} if shape_of(query)[1] == shape_of(key)[1] else {"enable_gqa": True}  # type: ignore[arg-type]
    result = write.attention(query, key, value, dtype=first_of(node).dtype, scale=scale, **grouped)  # type: ignore[arg-type]
    for user in outputs:
        user.replace_all_uses_with(result)
    for user in list(node.users):
        node.graph.erase_node(user)
    node.graph.erase_node(node)
    return True


def first_of(node: fx.Node) -> torch.Tensor:
    """The first of a node's values."""
    values: Any = node.meta.get("example_value", node.meta.get("val"))
    value: torch.Tensor = values[0]
    return value


def is_one_block(block_mask: tuple[Any, ...], query: object, key: object) -> bool:
    """Whether a block mask has a single block, as the one made for a call without a mask has.

    Where it has several, those that are listed may be few, although the function inside them hides nothing.
    """
    blocks = block_mask[-3:-1]
    lengths = [shape_of(each)[2] for each in (query, key) if isinstance(each, fx.Node)]
    return all(isinstance(block, int) and block >= length for block, length in zip(blocks, lengths, strict=True))


def changes_nothing(node: fx.Node, function: object, trivial: Callable[[fx.Graph], bool]) -> bool:
    """Whether a score or mask function, a subgraph of its own, does nothing."""
    if not isinstance(function, fx.Node) or function.op != "get_attr":
        return False
    owner = node.graph.owning_module
    inner = getattr(owner, str(function.target), None) if owner is not None else None
    return isinstance(inner, fx.GraphModule) and trivial(inner.graph)


def keeps_score(graph: fx.Graph) -> bool:
    result = next(n for n in graph.nodes if n.op == "output").args[0]
    first = next((n for n in graph.nodes if n.op == "placeholder"), None)
    result = result[0] if isinstance(result, (tuple, list)) else result
    return result is first


def sees_all(graph: fx.Graph) -> bool:
    result = next(n for n in graph.nodes if n.op == "output").args[0]
    result = result[0] if isinstance(result, (tuple, list)) else result
    return isinstance(result, fx.Node) and op_name(result) in ("new_ones", "ones", "ones_like")
