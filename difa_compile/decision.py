"""Decisions: what a plan says for one site at one step.

Definitions follow DiTFastAttn (arXiv 2406.08552), CLEAR (arXiv 2412.16112) and TaylorSeer (arXiv 2503.06923):

============================ ==========================================================================
full                         the attention as the model computes it
window                       keys limited to a neighbourhood of the query; text sees and is seen by everything
window+residual              window attention plus ``full - window`` of the last full step (WA-RS)
reuse                        the region's output of an earlier step; nothing is computed (AST)
forecast:k                   the region's output, extrapolated from its last k + 1 computed ones; nothing is computed
heads(0-3:...;4,7:...)       groups of heads, each full, windowed, or reused by itself (DiTFastAttnV2, arXiv 2503.22796)
...+cfg                      the conditional half of the batch is computed and copied to the other (ASC)
============================ ==========================================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property, lru_cache

from difa_compile.errors import DecisionError
from difa_compile.wording import quoted

_WINDOW = r"([a-z]+):([0-9]+)"
_FORECAST = r"forecast:([0-9]{1,4})(\(([a-z]+)\))?(\+cfg)?"


class WindowShape(StrEnum):
    """Form of a neighbourhood. ``band`` is 1-D over the sequence of image tokens, the others live on the grid."""

    BAND = "band"
    """``|i - j| <= radius`` over the flattened image tokens (DiTFastAttn)."""
    DISC = "disc"
    """``dy^2 + dx^2 < radius^2``, strict; with time ``dt^2`` is added (CLEAR)."""
    BOX = "box"
    """``|dy| <= radius`` and ``|dx| <= radius``; with time also ``|dt| <= radius``."""


MAX_RADIUS = 2**63 - 1
"""Plans, graphs and kernels hold a radius in 64 bits."""


@dataclass(frozen=True, order=True)
class Window:
    """A neighbourhood of ``radius`` tokens (1 to 2^63 - 1) around each image token; one that covers the grid is full
    attention."""

    shape: WindowShape | str
    radius: int

    def __post_init__(self) -> None:
        whole = isinstance(self.radius, int) and not isinstance(self.radius, bool)
        if not whole or not 1 <= self.radius <= MAX_RADIUS:
            raise DecisionError(
                f"window radius is {quoted(self.radius)}; give a whole number of tokens, at least 1, at most 2^63 - 1 "
                "(one of the grid's size covers all)"
            )
        if not isinstance(self.shape, str) or self.shape not in list(WindowShape):
            raise DecisionError(f"window shape {quoted(self.shape)} is unknown; choose one of {', '.join(WindowShape)}")
        object.__setattr__(self, "shape", WindowShape(self.shape))

    def __str__(self) -> str:
        return f"{self.shape}:{self.radius}"

    def scaled(self, old: Sequence[int], new: Sequence[int]) -> Window:
        """The window that covers on grid ``new`` the share that this one covers on grid ``old``.

        A band's radius counts tokens and grows with their number; that of a disc or box grows with the mean side.
        """
        ratio = math.prod(new) / math.prod(old)
        factor = ratio if self.shape is WindowShape.BAND else ratio ** (1 / max(len(old), len(new)))
        return Window(self.shape, min(max(1, round(self.radius * factor)), MAX_RADIUS))

    def within(self, grid: Sequence[int]) -> Window:
        """The same window on ``grid`` with no larger radius than makes a difference there.

        What computes with a radius does so after this: its square then is at most that of the grid's diagonal.
        """
        if self.shape is WindowShape.BAND:
            covering = math.prod(grid) - 1
        elif self.shape is WindowShape.BOX:
            covering = max(grid) - 1
        else:
            covering = math.isqrt(sum((size - 1) ** 2 for size in grid)) + 1
        return self if self.radius <= covering else Window(self.shape, max(1, covering))

    @classmethod
    def parse(cls, text: str) -> Window:
        """Read ``"band:128"``; the inverse of ``str``. Raises :class:`DecisionError`."""
        match = re.fullmatch(_WINDOW, text)
        if not match:
            raise DecisionError(
                f"window {quoted(text)} is not of the form SHAPE:RADIUS, for instance band:128 or disc:8"
            )
        return cls(match[1], _radius(match[2]))


def _radius(digits: str) -> int:
    """The number, or one that is above every limit: Python refuses to read numbers of thousands of digits."""
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) <= len(str(MAX_RADIUS)) else MAX_RADIUS + 1


class Kind(StrEnum):
    """What is computed at a site."""

    FULL = "full"
    WINDOW = "window"
    WINDOW_RESIDUAL = "window+residual"
    REUSE = "reuse"
    FORECAST = "forecast"
    HEADS = "heads"

    @property
    def windowed(self) -> bool:
        """Whether it has a window. Groups of heads have theirs each."""
        return self in (Kind.WINDOW, Kind.WINDOW_RESIDUAL)

    @property
    def reads(self) -> str | None:
        """The cache of the site that it reads: its ``"output"``, its ``"residual"``, or none."""
        return _READS.get(self)

    def fills(self, cache: str | None) -> bool:
        """Whether a step of this kind has what goes into a cache: its ``"output"``, or its ``"residual"``."""
        return self is Kind.FULL if cache == "residual" else self.reads != "output"


_READS = {Kind.WINDOW_RESIDUAL: "residual", Kind.REUSE: "output", Kind.FORECAST: "output"}


class Basis(StrEnum):
    """In what coordinate of the steps a forecast extrapolates: outputs are taken for a polynomial in it."""

    PROGRESS = "progress"
    """Progress through the schedule, the normalised timestep: uneven steps count as far as they go."""
    STEP = "step"
    """The number of the step: all steps count alike (TaylorSeer, arXiv 2503.06923)."""


MAX_ORDER = 3
"""A forecast of order k keeps k + 1 outputs of a site; higher ones amplify what is noise in them."""


@dataclass(frozen=True, order=True)
class Decision:
    """What one site does at one step.

    ``window`` is given for the two window kinds and for no other. ``cfg_shared``: only the conditional half of a
    classifier-free-guidance batch is computed; the other half receives a copy. ``order`` (1 to 3) and ``basis`` are
    given for a forecast and for no other: the degree of the polynomial through the last ``order + 1`` computed outputs,
    and the coordinate that it is one in. ``groups`` are given for the kind heads and for no other: at least two, which
    together name every head from 0 on once. They are kept in one order, groups of equal form as one, so that equal
    decisions are equal.
    """

    kind: Kind
    window: Window | None = None
    cfg_shared: bool = False
    order: int = 0
    basis: Basis | str | None = None
    groups: tuple[HeadGroup, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in list(Kind):
            raise DecisionError(f"decision kind {quoted(self.kind)} is unknown; choose one of {', '.join(Kind)}")
        object.__setattr__(self, "kind", Kind(self.kind))
        if self.kind.windowed and self.window is None:
            raise DecisionError(f"decision {self.kind} needs a window, for instance Window('band', 128)")
        if not self.kind.windowed and self.window is not None:
            raise DecisionError(f"decision {self.kind} takes no window, but {self.window} was given")
        if self.kind is Kind.FORECAST:
            if isinstance(self.order, bool) or not isinstance(self.order, int) or not 1 <= self.order <= MAX_ORDER:
                raise DecisionError(
                    f"the order of a forecast is {quoted(self.order)}; give a whole number from 1 (a line through the "
                    f"last two outputs) to {MAX_ORDER}, or use reuse"
                )
            basis = Basis.PROGRESS if self.basis is None else self.basis
            if not isinstance(basis, str) or basis not in list(Basis):
                raise DecisionError(f"the basis of a forecast is {quoted(basis)}; choose one of {', '.join(Basis)}")
            object.__setattr__(self, "basis", Basis(basis))
        elif self.order != 0 or self.basis is not None:
            raise DecisionError(f"decision {self.kind} takes no order and no basis; only a forecast has them")
        if self.kind is Kind.HEADS or self.groups:
            object.__setattr__(self, "groups", _checked_groups(self.kind, tuple(self.groups)))

    def __str__(self) -> str:
        text = str(self.kind)
        if self.kind is Kind.FORECAST:
            text += f":{self.order}" + ("" if self.basis is Basis.PROGRESS else f"({self.basis})")
        if self.groups:
            text += f"({';'.join(map(str, self.groups))})"
        if self.window is not None:
            text = text.replace("window", f"window({self.window})")
        return text + ("+cfg" if self.cfg_shared else "")

    @classmethod
    def parse(cls, text: str) -> Decision:
        """Read what ``str`` writes: ``"full"``, ``"window(band:128)+residual+cfg"``, ``"reuse"``, ``"forecast:1"``."""
        return _parsed(text)

    @classmethod
    def example(cls, kind: Kind, cfg_shared: bool = False, heads: int = 2) -> Decision:
        """A decision of a kind for a site of so many heads, with the smallest window or the lowest order where it has
        one.

        By heads the first has the window and the others are full; where it is alone, that is the window.
        """
        smallest = Window(WindowShape.BAND, 1)
        if kind is Kind.HEADS:
            return cls.of_heads([cls(Kind.WINDOW, smallest), *[FULL] * (heads - 1)], cfg_shared)
        return cls(kind, smallest if kind.windowed else None, cfg_shared, 1 if kind is Kind.FORECAST else 0)

    @property
    def is_full(self) -> bool:
        """Whether every key is attended to in this step (full or full+cfg), so that a residual can be taken."""
        return self.kind is Kind.FULL

    # --- heads -------------------------------------------------------------------------------------------------------

    @classmethod
    def of_heads(cls, forms: Sequence[Decision], cfg_shared: bool = False) -> Decision:
        """The decision in which head ``i`` does what ``forms[i]`` says: full, a window with or without residual, reuse.

        Where all heads do the same, that is the plain decision. Raises :class:`DecisionError`.
        """
        if not forms:
            raise DecisionError("a decision by heads needs the form of at least one head")
        groups = tuple(HeadGroup((head,), form) for head, form in enumerate(forms))
        if len(set(forms)) == 1:
            return replace(forms[0], cfg_shared=cfg_shared)
        return cls(Kind.HEADS, None, cfg_shared, groups=groups)

    @cached_property
    def forms(self) -> tuple[Decision, ...]:
        """What each head does, where heads differ; else ()."""
        form = {head: group.form for group in self.groups for head in group.heads}
        return tuple(form[head] for head in range(len(form)))

    def form_of(self, head: int) -> Decision:
        """What one head does: a decision that speaks of no single heads."""
        return self.forms[head] if self.groups else self

    def at_sites(self, heads: Sequence[int]) -> tuple[Decision, ...]:
        """What each of several sites does, of so many ``heads`` each, where this is decided for all of them at once.

        Groups that name as many heads as the sites have together number them site after site; else all sites do the
        same. Raises :class:`DecisionError` for groups that name neither so many heads nor those of every site.
        """
        named = len(self.forms)
        if not named or all(count == named for count in heads):
            return (self,) * len(heads)
        if named != sum(heads) or not all(heads):
            raise DecisionError(
                f"{self} names {named} heads, but the sites have {quoted(list(heads))}, {sum(heads)} together; name "
                "the heads of one site, which are then the same at every site, or those of all, site after site"
            )
        starts = [sum(heads[:place]) for place in range(len(heads))]
        return tuple(
            Decision.of_heads(self.forms[start : start + count], self.cfg_shared)
            for start, count in zip(starts, heads, strict=True)
        )

    @property
    def windows(self) -> tuple[Window, ...]:
        """All windows in it: its own, or those of its groups of heads."""
        own = () if self.window is None else (self.window,)
        return own + tuple(group.form.window for group in self.groups if group.form.window is not None)

    @property
    def reads_caches(self) -> bool:
        """Whether it reads what an earlier step has left."""
        return any(one.kind.reads is not None for one in (self, *(group.form for group in self.groups)))

    def with_windows(self, change: Callable[[Window], Window]) -> Decision:
        """The same decision with other windows."""
        if self.groups:
            return Decision.of_heads([form.with_windows(change) for form in self.forms], self.cfg_shared)
        return self if self.window is None else replace(self, window=change(self.window))


MAX_HEADS = 4096
"""A head's number is below this."""


@dataclass(frozen=True, order=True)
class HeadGroup:
    """Some heads of a site, by number, and what they do: ``form`` is full, a window with or without residual, or reuse.

    Reuse is here the head's attention output before the output projection, of the last step that computed it.
    """

    heads: tuple[int, ...]
    form: Decision

    def __post_init__(self) -> None:
        heads = tuple(self.heads)
        for head in heads:
            if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < MAX_HEADS:
                raise DecisionError(
                    f"{quoted(head)} is no head of an attention; give a whole number from 0 to {MAX_HEADS - 1}"
                )
        if not heads:
            raise DecisionError("a group of heads needs at least one head")
        if len(set(heads)) < len(heads):
            raise DecisionError(f"heads {quoted(heads)} name some head twice; name every head once")
        if self.form.kind not in _HEAD_KINDS or self.form.cfg_shared:
            raise DecisionError(
                f"a group of heads cannot be {self.form}; it can be full, window(SHAPE:RADIUS) with or without "
                "+residual, or reuse, and +cfg stands behind the parentheses, for all heads"
            )
        object.__setattr__(self, "heads", tuple(sorted(heads)))

    def __str__(self) -> str:
        return f"{heads_text(self.heads)}:{self.form}"


_HEAD_KINDS = (Kind.FULL, Kind.WINDOW, Kind.WINDOW_RESIDUAL, Kind.REUSE)


def _checked_groups(kind: Kind, groups: tuple[HeadGroup, ...]) -> tuple[HeadGroup, ...]:
    """Groups in their one order, those of equal form as one. Raises :class:`DecisionError`."""
    if kind is not Kind.HEADS:
        raise DecisionError(f"decision {kind} takes no groups of heads; write heads(...)")
    owner: dict[int, HeadGroup] = {}
    heads_of: dict[Decision, list[int]] = {}
    for group in groups:
        for head in group.heads:
            if head in owner:
                raise DecisionError(
                    f"head {head} is named twice, in {owner[head]} and in {group}; name every head once"
                )
            owner[head] = group
            heads_of.setdefault(group.form, []).append(head)
    if not owner:
        raise DecisionError("decision heads needs groups of heads, for instance heads(0-3:window(band:32);4-7:full)")
    left = next((head for head in range(len(owner)) if head not in owner), None)
    if left is not None:
        raise DecisionError(
            f"head {left} is not named, but head {max(owner)} is; name every head from 0 on once, those that are as "
            "the model has them as full"
        )
    if len(heads_of) == 1:
        (form,) = heads_of
        raise DecisionError(f"all heads are {form}; write {form}, which speaks of no single heads")
    return tuple(sorted(HeadGroup(tuple(heads), form) for form, heads in heads_of.items()))


def heads_text(heads: Sequence[int]) -> str:
    """Numbers of heads, rising, as text: ``0-3,7``."""
    runs: list[list[int]] = []
    for head in heads:
        if runs and head == runs[-1][-1] + 1:
            runs[-1].append(head)
        else:
            runs.append([head])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _heads_of(text: str) -> tuple[int, ...]:
    """The inverse of :func:`heads_text`, in any order. Raises :class:`DecisionError`."""
    heads: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last >= MAX_HEADS:
            raise DecisionError(
                f"heads {quoted(text)} are not understood; write numbers below {MAX_HEADS} and ranges that rise, for "
                "instance 0-3,7"
            )
        heads += range(first, last + 1)
        if len(heads) > MAX_HEADS:
            raise DecisionError(f"heads {quoted(text)} name some head twice; name every head once")
    return tuple(heads)


@lru_cache(maxsize=4096)  # a plan repeats a few decisions in all its cells
def _parsed(text: str) -> Decision:
    forecast = re.fullmatch(_FORECAST, text)
    if forecast:
        order, _, basis, shared = forecast.groups()
        return Decision(Kind.FORECAST, None, bool(shared), int(order), basis or Basis.PROGRESS)
    groups = re.fullmatch(r"heads\((.*)\)(\+cfg)?", text)
    if groups:
        return Decision(Kind.HEADS, None, bool(groups[2]), groups=tuple(map(_group, groups[1].split(";"))))
    match = re.fullmatch(rf"(full|reuse|window\(({_WINDOW})\)(\+residual)?)(\+cfg)?", text)
    if not match:
        raise DecisionError(
            f"decision {quoted(text)} is not understood; write full, reuse, forecast:ORDER, window(SHAPE:RADIUS) or "
            "window(SHAPE:RADIUS)+residual, or heads(0-3:FORM;4,7:FORM;...) of these but forecasts by heads, each with "
            "+cfg if the CFG halves are shared"
        )
    _, window, shape, radius, residual, shared = match.groups()
    if window is None:
        return Decision(Kind(match[1]), None, bool(shared))
    kind = Kind.WINDOW_RESIDUAL if residual else Kind.WINDOW
    return Decision(kind, Window(shape, _radius(radius)), bool(shared))


def _group(text: str) -> HeadGroup:
    """Read what ``str`` writes of a group: ``0-3,7:window(band:32)``."""
    heads, _, form = text.partition(":")
    if form.startswith("heads") or not form:
        raise DecisionError(
            f"group of heads {quoted(text)} is not of the form HEADS:FORM, for instance 0-3,7:window(band:32)"
        )
    return HeadGroup(_heads_of(heads), Decision.parse(form))


FULL = Decision(Kind.FULL)
REUSE = Decision(Kind.REUSE)


def examples(heads: int) -> tuple[Decision, ...]:
    """A decision of every kind for a site of so many heads (:meth:`Decision.example`)."""
    return tuple(Decision.example(kind, heads=heads) for kind in Kind)
