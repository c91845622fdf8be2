"""What plans are compared with: the very same model run eagerly, its attention altered by hand.

Nothing here uses the package's passes. The attention modules' forward is wrapped to return stored outputs (reuse) or
what they lead to (forecasts), or to be given the conditional half (CFG sharing); ``scaled_dot_product_attention`` is
replaced while a module runs, to hide keys behind a mask that is written out token by token (windows) and to add what a
full step left (residuals).
"""

from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F

from difa_compile.decision import Kind, WindowShape
from tests.support.extrapolated import extrapolated
from tests.support.single_heads import Heads

SPLIT = ("hidden_states", "encoder_hidden_states")


@cache
def sees(layout, window):
    """bool (tokens, tokens): the definition of a window, pair by pair."""
    places = [None] * layout.before
    places += [tuple(int(i) for i in place) for place in torch.ones(layout.grid).nonzero()]
    places += [None] * layout.after
    first = layout.before
    table = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    for i, one in enumerate(places):
        for j, two in enumerate(places):
            if one is None or two is None:
                continue
            gaps = [abs(a - b) for a, b in zip(one, two, strict=True)]
            if window.shape is WindowShape.BAND:
                table[i, j] = abs((i - first) - (j - first)) <= window.radius
            elif window.shape is WindowShape.BOX:
                table[i, j] = max(gaps) <= window.radius
            else:
                table[i, j] = sum(gap * gap for gap in gaps) < window.radius**2
    return table


class Altered:
    """Runs a model with one decision per attention module and call; keeps outputs and residuals from call to call.

    ``paths``: the attention modules, in execution order. ``window``: what residuals of full steps are taken against.
    Kept of each module are ``past``, the outputs that were computed, the newest first, each with its step and place in
    the schedule; ``residuals``; and ``now``, what its latest call gave.
    """

    def __init__(self, model, paths, layouts, half, window):
        self.model, self.half, self.window = model, half, window
        self.modules = [model.get_submodule(path) for path in paths]
        self.layouts = layouts
        self.past = [[] for _ in paths]
        self.now = [None] * len(paths)
        self.steps = 0
        self.residuals = [None] * len(paths)
        self.heads = [Heads(layout, sees) for layout in layouts]

    def __call__(self, row, inputs, place=None, conditional=None):
        """One call; ``place``: of its step in the schedule, by default its number.

        ``conditional``: what made the conditional call of this step, whose attention those take over that share it.
        """
        with self.step(row, place, conditional), torch.no_grad():
            return self.model(**inputs)[0]

    @contextmanager
    def step(self, row, place=None, conditional=None):
        """Within this the model, called once, does what ``row`` says; the others as in a call."""
        place = self.steps if place is None else place
        for index, (module, decision) in enumerate(zip(self.modules, row, strict=True)):
            original = type(module).forward.__get__(module)
            module.forward = self.wrapped(index, decision, original, place, conditional)
        try:
            yield
        finally:
            self.steps += 1
            for module in self.modules:
                del module.forward

    def conditional(self, value):
        size = value.shape[0] // 2
        return value[self.half * size : (self.half + 1) * size]

    def both(self, value):
        return torch.cat([self.conditional(value)] * 2)

    def stored(self, index, decision, place):
        """What a step that computes nothing takes from earlier ones."""
        if decision.kind is Kind.REUSE:
            found = self.past[index][0][2]
        else:
            parts = range(len(self.past[index][0][2]))
            found = tuple(
                extrapolated(decision, [(step, at, each[i]) for step, at, each in self.past[index]], self.steps, place)
                for i in parts
            )
        return tuple(self.both(part) for part in found) if decision.cfg_shared else found

    def wrapped(self, index, decision, original, place, conditional):
        computes = decision.kind not in (Kind.REUSE, Kind.FORECAST)

        def forward(*args, **kwargs):
            if conditional is not None and decision.cfg_shared:
                result = conditional.now[index]
                if decision.kind is Kind.FULL:
                    self.residuals[index] = conditional.residuals[index]
                heads = conditional.heads[index]
                self.heads[index].take(decision, heads, len(heads.outputs))
            elif not computes:
                result = self.stored(index, decision, place)
            elif decision.cfg_shared:
                args = tuple(self.conditional(value) if i == 0 else value for i, value in enumerate(args))
                kwargs = {
                    name: self.conditional(value) if name in SPLIT and value is not None else value
                    for name, value in kwargs.items()
                }
                with self.attending(index, decision):
                    half = original(*args, **kwargs)
                result = tuple(torch.cat([part, part]) for part in (half if isinstance(half, tuple) else (half,)))
            else:
                with self.attending(index, decision):
                    whole = original(*args, **kwargs)
                result = whole if isinstance(whole, tuple) else (whole,)
            if computes:
                self.past[index].insert(0, (self.steps, place, result))
            self.now[index] = result
            return result if len(result) > 1 else result[0]

        return forward

    @contextmanager
    def attending(self, index, decision):
        softmax_attention = F.scaled_dot_product_attention
        table = sees(self.layouts[index], decision.window or self.window)
        part = self.conditional if decision.cfg_shared else lambda value: value
        whole = (lambda value: torch.cat([value, value])) if decision.cfg_shared else lambda value: value

        def attend(query, key, value, **options):
            if decision.groups:
                result = self.heads[index].attend(decision, softmax_attention, (query, key, value), options, part)
            else:
                result = attend_alike(query, key, value, **options)
            self.heads[index].note(decision, (query, key, value), result, whole)
            return result

        def attend_alike(query, key, value, **options):
            full = softmax_attention(query, key, value, **options)
            scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            near = scores.masked_fill(~table, -torch.inf).softmax(-1) @ value
            if decision.kind is Kind.FULL:
                left = full - near
                self.residuals[index] = torch.cat([left, left]) if decision.cfg_shared else left
                return full
            if decision.kind is Kind.WINDOW:
                return near
            left = self.residuals[index]
            return near + (self.conditional(left) if decision.cfg_shared else left)

        F.scaled_dot_product_attention = attend
        try:
            yield
        finally:
            F.scaled_dot_product_attention = softmax_attention
