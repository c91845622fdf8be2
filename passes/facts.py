"""What is known of a model while passes go over it: what they were given, and what each has found so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import fx

from difa_compile.layout import Layout
from difa_compile.passes.site import Unit
from difa_compile.passes.variant import Context, Rewritten
from difa_compile.plan.schedule import Role

T = TypeVar("T")

Rewriter = Callable[[fx.GraphModule, Sequence[Unit], Sequence[Role], Context], Rewritten]
"""Makes a variant: :func:`difa_compile.passes.order.rewrite`."""


@dataclass
class Facts:
    """Facts about one model. A fact is an object of a class of its own, and kept under that class: ``facts[Split]``.

    ``inputs``: the real values of the graph's inputs, in order. ``context``: how guidance's halves come. ``layout``:
    that of the attention sequence, where the user told it. ``rewrite``: makes variants, which proofs try.
    """

    inputs: Sequence[Any]
    context: Context
    layout: Layout | None
    rewrite: Rewriter
    _found: dict[type, object] = field(default_factory=dict)

    def keep(self, fact: object) -> None:
        """Add what a pass has found."""
        self._found[type(fact)] = fact

    def __getitem__(self, kind: type[T]) -> T:
        """The fact of this class; the pass that finds it must have gone before."""
        found = self._found[kind]
        assert isinstance(found, kind)
        return found

    def get(self, kind: type[T]) -> T | None:
        """The fact of this class, or None if no pass has found it yet."""
        return self[kind] if kind in self._found else None


Preparation = Callable[[fx.GraphModule, Facts], fx.GraphModule]
"""Brings a graph into another form that computes the same: the graph given, changed in place, or a copy."""

Analysis = Callable[[fx.GraphModule, Facts], object]
"""Finds a fact about a graph, which it leaves as it is. None: what it finds it has noted on the nodes."""
