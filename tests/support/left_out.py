"""A model with whole blocks left out by hand, run eagerly: nothing here uses the package's passes.

The block modules' forward is wrapped. Left out, a block does not run: what it would return is, for each tensor, the one
of its shape that it was given plus what it has added to that in the steps that ran it (the last one's, or a line
through the last two). Of a span the last block returns that, of what the first was given.
"""

from contextlib import contextmanager

import torch
from torch.utils import _pytree as pytree

from difa_compile.decision import FULL, Kind


def computed(decision):
    return decision.kind not in (Kind.REUSE, Kind.FORECAST)


class LeftOut:
    """Blocks and spans of one model, over the steps of one branch.

    ``paths``: of the units in the order of the rows' cells: a block's, or ``FIRST..LAST`` of a span with ``blocks``
    (paths of those in it, in order).
    """

    def __init__(self, model, paths, blocks):
        self.model, self.paths = model, tuple(paths)
        names = list(blocks)
        ends = {path: path.split("..") for path in paths}
        self.runs = {path: names[names.index(end[0]) : names.index(end[-1]) + 1] for path, end in ends.items()}
        self.results, self.streams = {}, {}
        self.added = {path: [] for path in paths}
        """Of each unit, by step that ran it: the step's coordinate and number, and what it added to each tensor."""
        self.ran = 0

    @contextmanager
    def step(self, row, number, coordinate):
        """Within this, the model does what ``row`` says. Steps without progress are told apart by their number."""
        decisions = dict(zip(self.paths, row, strict=True))
        names = dict.fromkeys(name for run in self.runs.values() for name in run)
        modules = {name: self.model.get_submodule(name) for name in names}
        for name, module in modules.items():
            module.forward = self.wrapped(name, module.forward, decisions, (coordinate, number))
        try:
            yield
        finally:
            for module in modules.values():
                del module.forward

    def wrapped(self, name, original, decisions, at):
        around = [path for path in self.paths if name in self.runs[path]]
        around.sort(key=lambda path: -len(self.runs[path]))

        def forward(*args, **kwargs):
            for path in around:
                if self.runs[path][0] == name:
                    self.streams[path] = given(args, kwargs)
            for path in around:
                if computed(decisions[path]):
                    continue
                if self.runs[path][-1] != name:
                    return self.results[name]  # nobody reads it
                result = self.summed(path, name, self.extrapolated(path, decisions[path], at))
                break
            else:
                self.ran += 1
                result = self.results[name] = original(*args, **kwargs)
            for path in around:
                if not computed(decisions[path]):
                    break
                if self.runs[path][-1] == name:
                    leaves = pytree.tree_leaves(result)
                    parts = [x if s is None else x - s for x, s in zip(leaves, self.paired(path, leaves), strict=True)]
                    self.added[path].append((at, parts))
            return result

        return forward

    def paired(self, path, leaves):
        """For each tensor that a unit returns the first of its shape that it was given."""
        streams = self.streams[path]
        return [next((s for s in streams if isinstance(x, torch.Tensor) and s.shape == x.shape), None) for x in leaves]

    def summed(self, path, name, parts):
        leaves, form = pytree.tree_flatten(self.results[name])
        streams = self.paired(path, leaves)
        return pytree.tree_unflatten([p if s is None else s + p for p, s in zip(parts, streams, strict=True)], form)

    def extrapolated(self, path, decision, at):
        past = self.added[path]
        if decision.kind is Kind.REUSE:
            return past[-1][1]
        assert decision.order == 1
        (before, old), (after, new) = past[-2:]
        basis = int(decision.basis == "step" or before[0] == after[0])
        ahead = (at[basis] - after[basis]) / (after[basis] - before[basis])
        return [y if y is None else y * (1 + ahead) - x * ahead for x, y in zip(old, new, strict=True)]


def given(args, kwargs):
    """The tensors of a block's arguments, what it works on first."""
    values = pytree.tree_leaves((kwargs, args) if "hidden_states" in kwargs else (args, kwargs))
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


@contextmanager
def sampled_by_hand(pipe, plan, rows, calls=1):
    """Within this, ``pipe`` samples with blocks left out by hand: of ``rows[step]`` the cells of the plan's blocks.

    The sites that the plan names besides are full. ``calls``: of the transformer per step; each is a branch. Yields the
    list of (calls of a transformer, blocks that it ran).
    """
    first = sum(not site.is_block for site in plan.sites)
    assert all(decision == FULL for row in rows for decision in row[:first])
    units = [site.path for site in plan.sites[first:]]
    names = list(dict.fromkeys(name for site in plan.sites[first:] for name in site.blocks or (site.path,)))
    models = [pipe.transformer, getattr(pipe, "transformer_2", None)]
    made, branches = [], {}

    def wrapped(model):
        original = model.forward

        def forward(*args, **kwargs):
            step, branch = divmod(len(made), calls)
            left_out = branches.setdefault((id(model), branch), LeftOut(model, units, names))
            time = kwargs["timestep"] if "timestep" in kwargs else args[1]
            before = left_out.ran
            with left_out.step(rows[step][first:], step, float(time.flatten()[0])):
                result = original(*args, **kwargs)
            made.append(left_out.ran - before)
            return result

        return forward

    for model in filter(None, models):
        model.forward = wrapped(model)
    try:
        yield made
    finally:
        for model in filter(None, models):
            del model.forward
    assert len(made) == calls * len(rows)
