"""Read token layouts off a graph: the image grid, and where text stands among the image tokens.

The grid comes, in this order, from the user, from the output of the patch convolution over the noisy sample, or from
packed position ids among the inputs (:func:`packed_grid`). The place of the text comes from the concatenation that
made the sequence: the nearest one backwards from the query that depends on the noisy sample.

Where the pieces do not add up there is no layout, and the reason says so; windows are then refused at that site.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from difa_compile.layout import Layout
from difa_compile.passes.graph import argument, is_attention, is_parameter, op_name, shape_of


class LayoutFinder:
    """Finds layouts of one graph's sites."""

    def __init__(
        self,
        graph: fx.Graph,
        latent: fx.Node | None,
        from_latent: set[fx.Node],
        *,
        told: Layout | None,
        packed_grid: tuple[int, ...] | None,
    ) -> None:
        self.told = told
        self.from_latent = from_latent
        self.grid = patch_grid(latent) or packed_grid

    def of(self, attention: fx.Node, query: fx.Node, tokens: int) -> tuple[Layout | None, str]:
        """The layout of a site with ``tokens`` tokens, or None and the reason."""
        if self.told is not None:
            if self.told.tokens == tokens:
                return self.told, ""
            return None, f"the given layout {self.told} has {self.told.tokens} tokens, the sequence has {tokens}"
        if self.grid is None:
            return None, "the graph shows no image grid; give one with layout="
        image = math.prod(self.grid)
        if image == tokens:
            return Layout(self.grid), ""
        if image > tokens:
            return None, f"the grid {self.grid} has {image} tokens, more than the {tokens} of the sequence"
        parts = self.concatenated(query, tokens)
        if parts is None:
            return None, f"{tokens - image} tokens beside the grid {self.grid}, and no concatenation shows where"
        places = [i for i, (length, _) in enumerate(parts) if length == image]
        if len(places) > 1:
            places = [i for i in places if parts[i][1]]
        if len(places) != 1:
            return None, f"which of the parts {[length for length, _ in parts]} is the image is not clear"
        before = sum(length for length, _ in parts[: places[0]])
        return Layout(self.grid, before, tokens - image - before), ""

    def concatenated(self, query: fx.Node, tokens: int) -> list[tuple[int, bool]] | None:
        """Lengths of the parts of the nearest concatenation to ``tokens``, each with "comes from the sample alone"."""
        seen, todo = {query}, deque([query])
        while todo:
            node = todo.popleft()
            if op_name(node) in ("cat", "concat", "concatenate") and node in self.from_latent:
                operands = argument(node, 0, "tensors")
                axis = argument(node, 1, "dim", 0)
                shape = shape_of(node)
                if isinstance(axis, int) and len(shape) > 1 and shape[axis] == tokens:
                    return [(shape_of(part)[axis], part in self.from_latent) for part in operands]
            for source in node.all_input_nodes:
                if source in seen or is_parameter(source) or source not in self.from_latent:
                    continue
                seen.add(source)
                if not is_attention(source):
                    todo.append(source)
        return None


def patch_grid(latent: fx.Node | None) -> tuple[int, ...] | None:
    """Spatial output sizes of the first convolution over the noisy sample, reached through layout ops alone."""
    if latent is None:
        return None
    todo, seen = deque([latent]), {latent}
    while todo:
        node = todo.popleft()
        for user in node.users:
            name = op_name(user)
            if name in ("conv1d", "conv2d", "conv3d"):
                return shape_of(user)[2:]
            if user not in seen and name in ("to", "type_as", "float", "contiguous", "half", "bfloat16", "cat", "mul"):
                seen.add(user)
                todo.append(user)
    return None


def packed_grid(inputs: Sequence[object], tokens: int) -> tuple[int, ...] | None:
    """The grid that position ids enumerate: an input (N, 2..4) or (1, N, 2..4) that lists a grid row by row.

    ``inputs`` are the real example inputs of the graph; the values of the candidate are read once, at compile time.
    """
    for value in inputs:
        if not isinstance(value, Tensor) or isinstance(value, torch.nn.Parameter):
            continue
        ids = value[0] if value.ndim == 3 and value.shape[0] == 1 else value
        if ids.ndim != 2 or not 2 <= ids.shape[1] <= 4 or ids.shape[0] > tokens:
            continue
        rows = ids.detach().cpu().to(torch.float64)
        rows = rows - rows[:1]
        sizes = [int(size) + 1 for size in rows.amax(0).tolist()]
        if min(sizes) < 1 or math.prod(sizes) != len(rows) or len(rows) == 1:
            continue
        axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in sizes), indexing="ij")
        if torch.equal(torch.stack([axis.reshape(-1) for axis in axes], 1), rows):
            grid = tuple(size for size in sizes if size > 1)
            return grid if len(grid) > 1 else None
    return None
