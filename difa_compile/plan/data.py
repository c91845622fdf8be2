"""The parts a plan is made of: model, sites, settings, and one cell per step and site with its measurements."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING

from difa_compile.decision import Decision
from difa_compile.errors import PlanFormatError
from difa_compile.layout import MAX_TOKENS, Layout
from difa_compile.wording import quoted, shown

if TYPE_CHECKING:
    from torch import nn

SITE_KINDS = ("self", "joint", "block")
METHODS = ("greedy", "weighed", "planned", "rule")
LOSSES = ("paper", "code")
GUIDANCE = ("batched", "two-call", "none")
MAX_PARAMETERS = 10**18
MAX_FLOPS = 10**24
MAX_WEIGHT = 1000.0
_UNEVEN = 1e-6
"""By how much the sum of weights may be off 1."""

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class SiteInfo:
    """One self- or joint-attention call, a block, or a span of blocks, named by its module path.

    ``tokens`` is the number of queries, ``width`` the input width of the q, k and v projections, ``layout`` where the
    image stands among the keys (``None``: unknown, no window possible). Queries are all of these, or ``layout.rows``.
    A block (kind ``block``) has the tokens and the width of its streams, one head and no layout; ``flops`` are its
    operations for one element of the batch, attention included, where they are known. A span is a block whose
    ``blocks`` are the paths of those that it consists of; its own path is ``FIRST..LAST``.
    """

    path: str
    kind: str
    heads: int
    head_dim: int
    tokens: int
    width: int
    layout: Layout | None = None
    flops: int | None = None
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            raise PlanFormatError(f"a site's path is {quoted(self.path)}; it must be the module path, a string")
        what = f"site {shown(self.path)}"
        _choice(self.kind, SITE_KINDS, f"{what}: kind")
        for name in ("heads", "head_dim", "tokens", "width"):
            _whole(getattr(self, name), f"{what}: {name}", at_least=1, at_most=MAX_TOKENS)
        if self.is_block and self.layout is not None:
            raise PlanFormatError(f"{what}: a block has no layout; its attention sites have")
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.blocks and not self.is_block:
            raise PlanFormatError(f"{what}: it names blocks, which only a span has")
        for path in self.blocks:
            _text(path, f"{what}: a block")
        if self.flops is not None:
            _whole(self.flops, f"{what}: flops", at_least=0, at_most=MAX_FLOPS)
        if self.layout is not None and not self.layout.holds(self.tokens):
            self.layout.check(self.tokens, what)

    @property
    def is_block(self) -> bool:
        """Whether it is a whole block, and no attention call."""
        return self.kind == "block"

    @property
    def keys(self) -> int:
        """The number of keys, as far as the layout tells."""
        return self.tokens if self.layout is None else self.layout.tokens

    @property
    def inner(self) -> int:
        """Width of q, k, v and of the attention output: heads x head_dim."""
        return self.heads * self.head_dim

    @property
    def shape(self) -> str:
        """The sizes in words, for messages: ``self, 6 heads x 64, 256 tokens (16x16), width 384``."""
        if self.is_block:
            form = f"span of {len(self.blocks)} blocks" if self.blocks else "block"
            return f"{form}, {self.tokens} tokens, width {self.width}"
        grid = f" ({self.layout})" if self.layout else ""
        return f"{self.kind}, {self.heads} heads x {self.head_dim}, {self.tokens} tokens{grid}, width {self.width}"


def blocks_of(sites: Sequence[SiteInfo]) -> tuple[int | None, ...]:
    """For each site the index of the block or span that holds it, the innermost that is named; None if none does."""
    spans = {path: index for index, site in enumerate(sites) for path in site.blocks}
    blocks = {site.path: index for index, site in enumerate(sites) if site.is_block and not site.blocks}
    found: list[int | None] = []
    for site in sites:
        parts = [] if site.blocks else site.path.split(".")
        paths = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
        own = None if site.is_block else next((blocks[path] for path in paths if path in blocks), None)
        found.append(next((spans[path] for path in paths if path in spans), None) if own is None else own)
    return tuple(found)


@dataclass(frozen=True)
class ModelInfo:
    """Which model a plan was made for: class, digest (:func:`model_digest`), number of parameters (informative)."""

    class_name: str
    config_digest: str
    parameters: int

    def __post_init__(self) -> None:
        _text(self.class_name, "model class_name")
        _text(self.config_digest, "model config_digest")
        _whole(self.parameters, "model parameters", at_least=0, at_most=MAX_PARAMETERS)


@dataclass(frozen=True)
class Trial:
    """One candidate measured in calibration.

    ``loss``: distance of the whole model output from that with the site full, no unit; ``None`` if the candidate does
    not apply, with the ``reason``. It is admitted if ``loss < threshold``, the depth-scaled threshold of the site.
    ``cost``: what the candidate takes, as a share of full attention, where that was weighed against its loss.
    """

    decision: Decision
    loss: float | None
    threshold: float
    reason: str = ""
    cost: float | None = None

    @property
    def price(self) -> float | None:
        """``cost + loss / threshold``, by which candidates are weighed; full attention has 1. None if not weighed."""
        if self.cost is None or self.loss is None:
            return None
        return self.cost + (self.loss / self.threshold if self.threshold else math.inf)

    def __post_init__(self) -> None:
        if self.cost is not None:
            object.__setattr__(self, "cost", _number(self.cost, f"cost of {self.decision}", at_least=0.0))
        if self.loss is not None:
            object.__setattr__(self, "loss", _number(self.loss, f"loss of {self.decision}", at_least=0.0))
        object.__setattr__(self, "threshold", _number(self.threshold, f"threshold of {self.decision}", at_least=0.0))
        _text(self.reason, f"reason of {self.decision}")


@dataclass(frozen=True)
class Cell:
    """The decision at one step and site, the candidates measured for it, in the order tried, and what it saves.

    ``flops_saved``: share of the site's attention FLOPs at this step, projections included, that is not computed; in
    [0, 1]. ``weights``: of a forecast, those of the outputs that it reads, the newest first, where they were fitted
    (:mod:`difa_compile.planner.fitting`); they sum to 1. Empty: those of the polynomial
    (:func:`difa_compile.plan.schedule.forecast_weights`).
    """

    decision: Decision
    trials: tuple[Trial, ...] = ()
    flops_saved: float = 0.0
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", self._checked_weights())
        object.__setattr__(self, "trials", tuple(self.trials))
        saved = _number(self.flops_saved, f"flops_saved of {self.decision}", at_least=0.0)
        if saved > 1.0:
            raise PlanFormatError(f"flops_saved of {self.decision} is {saved:g}; it is a share, at most 1")
        object.__setattr__(self, "flops_saved", saved)

    def _checked_weights(self) -> tuple[float, ...]:
        if not self.weights:
            return ()
        if not self.decision.order:
            raise PlanFormatError(f"{self.decision} has weights, and forecasts alone sum outputs by weights")
        if len(self.weights) != self.decision.order + 1:
            raise PlanFormatError(
                f"{self.decision} reads {self.decision.order + 1} outputs, and has {len(self.weights)} weights"
            )
        what = f"a weight of {self.decision}"
        weights = tuple(_number(weight, what, -MAX_WEIGHT) for weight in self.weights)
        if max(weights) > MAX_WEIGHT:
            raise PlanFormatError(f"{what} is {max(weights):g}; it must be at most {MAX_WEIGHT:g}")
        if abs(sum(weights) - 1) > _UNEVEN:
            raise PlanFormatError(
                f"the weights of {self.decision} sum to {sum(weights):g}; they must sum to 1, so that what does not "
                "change is forecast as it is"
            )
        return weights


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Promise:
    """What a plan was made to keep to, what was predicted of it, and what came of it.

    ``limit``: in words. Shares are of the full model's time on the machine it was made on, PSNR in dB against the full
    model's images (None where these are equal): ``predicted_*`` from the table of errors; ``measured_*`` in a run with
    the inputs it was made with; ``held_out_psnr`` with other noise. None where nothing was run. ``note``: what was
    given up for it.
    """

    limit: str
    predicted_share: float
    predicted_psnr: float | None
    measured_share: float | None = None
    measured_psnr: float | None = None
    held_out_psnr: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        _text(self.limit, "promise: limit")
        _text(self.note, "promise: note")
        for name in ("predicted_share", "predicted_psnr", "measured_share", "measured_psnr", "held_out_psnr"):
            value = getattr(self, name)
            if value is not None or name == "predicted_share":
                object.__setattr__(self, name, _number(value, f"promise: {name}", at_least=0.0))

    def __str__(self) -> str:
        """In words: ``budget 0.5: predicted 0.49 of the time, 54.2 dB; measured 0.51, 53.9 dB (held out 53.5 dB)``."""
        text = f"{shown(self.limit)}: "
        text += f"predicted {self.predicted_share:.2f} of full's time, {_decibels(self.predicted_psnr)}"
        if self.measured_share is not None:
            text += f"; measured {self.measured_share:.2f}, {_decibels(self.measured_psnr)}"
            text += f" (held out {_decibels(self.held_out_psnr)})"
        return text + (f"; {shown(self.note, 400)}" if self.note else "")


def _decibels(value: float | None) -> str:
    return "the same images" if value is None else f"{value:.1f} dB"


@dataclass(frozen=True)
class Settings:
    """How a plan came about.

    ``method`` is ``greedy`` (calibrated, the first candidate below the threshold), ``weighed`` (calibrated, what saves
    most for its loss), ``planned`` (chosen from a table of errors: ``promise`` tells for what) or ``rule`` (written by
    hand: no threshold, no loss). ``guidance``: the CFG
    halves in one ``batched`` call, in ``two-call`` steps, or ``none``. ``conditional_half``: which half of the batch is
    the conditional one, 0 or 1. ``torch``, ``diffusers``: versions, ``None`` if not installed. ``sample``: sizes of the
    noisy sample behind its first dimension, ``None`` if not known; they tell whether tokens that no layout tells apart
    are more or fewer because of the text.
    """

    method: str
    threshold: float | None = None
    loss: str | None = None
    window: str | None = None
    candidates: tuple[str, ...] = ()
    guidance: str = "none"
    conditional_half: int | None = None
    torch: str | None = field(default_factory=lambda: _installed("torch"))
    diffusers: str | None = field(default_factory=lambda: _installed("diffusers"))
    sample: Sizes | None = None
    promise: Promise | None = None

    def __post_init__(self) -> None:
        _choice(self.method, METHODS, "settings: method")
        if self.threshold is not None:
            object.__setattr__(self, "threshold", _number(self.threshold, "settings: threshold", at_least=0.0))
        if self.loss is not None:
            _choice(self.loss, LOSSES, "settings: loss")
        for name in ("window", "torch", "diffusers"):
            if getattr(self, name) is not None:
                _text(getattr(self, name), f"settings: {name}")
        object.__setattr__(self, "candidates", tuple(self.candidates))
        for candidate in self.candidates:
            _text(candidate, "settings: candidates")
        _choice(self.guidance, GUIDANCE, "settings: guidance")
        if self.conditional_half is not None and (type(self.conditional_half) is not int or self.conditional_half >> 1):
            raise PlanFormatError(
                f"settings: conditional_half is {quoted(self.conditional_half)}; it must be 0, 1 or null"
            )
        if self.sample is not None:
            object.__setattr__(self, "sample", tuple(self.sample))
            for size in self.sample:
                _whole(size, "settings: sample", 0, MAX_TOKENS)


def model_digest(model: nn.Module) -> ModelInfo:
    """Name ``model`` so that a plan for another one can be refused; weights do not enter, so fine-tunes match.

    The digest is the SHA-256 of canonical JSON. For a diffusers model it covers the class and the config without keys
    that start with ``_`` (versions, paths); for any other module the class and the names and shapes of the parameters.
    A module wrapped by ``torch.compile`` counts as the module inside.
    """
    inner = getattr(model, "_orig_mod", model)
    config = getattr(inner, "config", None)
    content: object
    if isinstance(config, Mapping):
        content = {str(key): value for key, value in config.items() if not str(key).startswith("_")}
    else:
        content = [[name, list(parameter.shape)] for name, parameter in inner.named_parameters()]
    name = type(inner).__name__
    text = json.dumps([name, content], sort_keys=True, separators=(",", ":"), default=str)
    parameters = sum(parameter.numel() for parameter in inner.parameters())
    return ModelInfo(name, hashlib.sha256(text.encode()).hexdigest(), parameters)


def _text(value: object, what: str) -> None:
    if not isinstance(value, str):
        raise PlanFormatError(f"{what} is {quoted(value)}; it must be a string")


def _choice(value: object, known: tuple[str, ...], what: str) -> None:
    if not isinstance(value, str) or value not in known:
        raise PlanFormatError(f"{what} is {quoted(value)}; it must be one of {', '.join(known)}")


def _whole(value: object, what: str, at_least: int, at_most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
        raise PlanFormatError(
            f"{what} is {quoted(value)}; it must be a whole number, at least {at_least} and at most {at_most}"
        )


def _number(value: object, what: str, at_least: float) -> float:
    number = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # a whole number of hundreds of digits
            number = float(value)
    if not math.isfinite(number) or number < at_least:
        raise PlanFormatError(f"{what} is {quoted(value)}; it must be a finite number, at least {at_least:g}")
    return number


@dataclass(frozen=True)
class Difference:
    """One cell in which two plans disagree; ``site`` is an index."""

    step: int
    site: int
    mine: Decision
    theirs: Decision
