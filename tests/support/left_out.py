"""A model with whole blocks left out by hand, run eagerly: nothing here uses the package's passes.

The block modules' forward is wrapped. Left out, a block does not run: what it would return is, for each tensor, the one
of its shape that it was given plus what it has added to that in the steps that ran it (the last one's, or what the
last ones lead to). Of a span the last block returns that, of what the first was given.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch.utils import _pytree as pytree

from difa_compile.decision import FULL, Kind
from tests.support.altered import Altered
from tests.support.extrapolated import extrapolated


def computed(decision):
    return decision.kind not in (Kind.REUSE, Kind.FORECAST)


class LeftOut:
    """Blocks and spans of one model, over the steps of one branch.

    ``paths``: of the units in the order of the rows' cells: a block's, or ``FIRST..LAST`` of a span with ``blocks``
    (paths of those in it, in order). What would read more steps than have computed it is full: ``promoted`` lists the
    steps and units, by number.
    """

    def __init__(self, model, paths, blocks):
        self.model, self.paths = model, tuple(paths)
        names = list(blocks)
        ends = {path: path.split("..") for path in paths}
        self.runs = {path: names[names.index(end[0]) : names.index(end[-1]) + 1] for path, end in ends.items()}
        self.results, self.streams = {}, {}
        self.added = {path: [] for path in paths}
        """Of each unit, the newest first, by step that ran it: the step's number and coordinate, and what it added to
        each tensor."""
        self.ran = 0
        self.promoted = []

    @contextmanager
    def step(self, row, number, coordinate):
        """Within this, the model does what ``row`` says. Steps without progress are told apart by their number."""
        decisions = dict(zip(self.paths, row, strict=True))
        for unit, (path, decision) in enumerate(decisions.items()):
            if not computed(decision) and len(self.added[path]) <= decision.order:
                decisions[path] = FULL
                self.promoted.append((number, unit))
        names = dict.fromkeys(name for run in self.runs.values() for name in run)
        modules = {name: self.model.get_submodule(name) for name in names}
        for name, module in modules.items():
            module.forward = self.wrapped(name, module.forward, decisions, (number, coordinate))
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
                    self.added[path].insert(0, (at, parts))
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
            return past[0][1]
        parts = zip(*[[(*then, part) for part in parts] for then, parts in past[: decision.order + 1]], strict=True)
        return [None if part[0][2] is None else extrapolated(decision, part, *at) for part in parts]


def given(args, kwargs):
    """The tensors of a block's arguments, what it works on first."""
    values = pytree.tree_leaves((kwargs, args) if "hidden_states" in kwargs else (args, kwargs))
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


@dataclass
class ByHand:
    """What was seen of a pipeline that sampled by hand.

    ``ran``: by call of a transformer, how many blocks it ran. ``promoted``: the steps and sites (by number in the plan)
    that were full, since what they were to read had not been computed.
    """

    ran: list = field(default_factory=list)
    promoted: set = field(default_factory=set)


@contextmanager
def sampled_by_hand(pipe, plan, rows, calls=1, window=None):
    """Within this, ``pipe`` samples with blocks left out, and attention altered in those that run, by hand.

    ``rows[step]``: of the sites of ``plan`` what they do. ``calls``: of the transformer per step; each is a branch, the
    conditional one first. ``window``: what residuals are taken against; without it all attention is full. Yields a
    :class:`ByHand`.
    """
    first = sum(not site.is_block for site in plan.sites)
    assert window is not None or all(decision == FULL for row in rows for decision in row[:first])
    sites, units = plan.sites[:first], [site.path for site in plan.sites[first:]]
    names = list(dict.fromkeys(name for site in plan.sites[first:] for name in site.blocks or (site.path,)))
    models = [pipe.transformer, getattr(pipe, "transformer_2", None)]
    seen, left, attention = ByHand(), {}, {}

    def attending(model, branch, row, place):
        """What alters the attention of one call."""
        if window is None:
            return nullcontext()
        paths, layouts = [site.path for site in sites], [site.layout for site in sites]
        altered = attention.setdefault(
            (id(model), branch), Altered(model, paths, layouts, plan.settings.conditional_half, window)
        )
        if calls > 1 and not branch:
            row = [replace(decision, cfg_shared=False) for decision in row]
        return altered.step(row, place, attention[id(model), 0] if branch else None)

    def wrapped(model):
        original = model.forward

        def forward(*args, **kwargs):
            step, branch = divmod(len(seen.ran), calls)
            left_out = left.setdefault((id(model), branch), LeftOut(model, units, names))
            place, before = float(pipe.scheduler.timesteps[step]), left_out.ran  # models may be given it rounded
            with (
                attending(model, branch, rows[step][:first], place),
                left_out.step(rows[step][first:], step, place),
            ):
                result = original(*args, **kwargs)
            seen.ran.append(left_out.ran - before)
            seen.promoted |= {(step, first + unit) for step, unit in left_out.promoted}
            return result

        return forward

    for model in filter(None, models):
        model.forward = wrapped(model)
    try:
        yield seen
    finally:
        for model in filter(None, models):
            del model.forward
    assert len(seen.ran) == calls * len(rows)
