"""Decisions by heads, by hand: every head by itself, with what it has left in earlier steps."""

import torch

from difa_compile.decision import Kind

COMPUTED = (Kind.FULL, Kind.WINDOW, Kind.WINDOW_RESIDUAL)


class Heads:
    """What the heads of one site have left: their latest outputs, and query, key and value of when they were full.

    ``sees``: the table of who sees whom in a layout's window.
    """

    def __init__(self, layout, sees):
        self.layout, self.sees = layout, sees
        self.outputs, self.fulls = {}, {}

    def forms(self, decision, count):
        """What each head does."""
        named = {head: group.form for group in decision.groups for head in group.heads}
        return [named.get(head, decision) for head in range(count)]

    def lacks(self, decision):
        """Whether a head would read what it has not."""
        forms = {head: group.form.kind for group in decision.groups for head in group.heads}
        return any(
            (kind is Kind.REUSE and head not in self.outputs)
            or (kind is Kind.WINDOW_RESIDUAL and head not in self.fulls)
            for head, kind in forms.items()
        )

    def near(self, window, query, key, value):
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        return scores.masked_fill(~self.sees(self.layout, window), -torch.inf).softmax(-1) @ value

    def attend(self, decision, plain, operands, options, part=lambda value: value):
        """The attention of a decision by heads. ``part``: of a whole batch the half at hand."""
        heads = []
        full = plain(*operands, **options)
        for head, form in enumerate(self.forms(decision, operands[0].shape[1])):
            own = [value[:, head] for value in operands]
            if form.kind is Kind.REUSE:
                heads.append(part(self.outputs[head]))
            elif form.kind is Kind.FULL:
                heads.append(full[:, head])
            else:
                result = self.near(form.window, *own)
                if form.kind is Kind.WINDOW_RESIDUAL:
                    query, key, value = (part(value) for value in self.fulls[head])
                    then = plain(query[:, None], key[:, None], value[:, None])[:, 0]
                    result = result + then - self.near(form.window, query, key, value)
                heads.append(result)
        return torch.stack(heads, 1)

    def note(self, decision, operands, result, whole=lambda value: value):
        """Keep what a step has computed. ``whole``: of the half at hand the whole batch."""
        for head, form in enumerate(self.forms(decision, result.shape[1])):
            if form.kind in COMPUTED:
                self.outputs[head] = whole(result[:, head])
            if form.kind is Kind.FULL:
                self.fulls[head] = [whole(value[:, head]) for value in operands]

    def take(self, decision, other, count):
        """Keep what another branch has computed by the same decision."""
        for head, form in enumerate(self.forms(decision, count)):
            if form.kind in COMPUTED and head in other.outputs:
                self.outputs[head] = other.outputs[head]
            if form.kind is Kind.FULL and head in other.fulls:
                self.fulls[head] = other.fulls[head]
