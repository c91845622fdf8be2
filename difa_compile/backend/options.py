"""What a user may ask of the compilation: the options of the ``torch.compile`` backend, most of which
:func:`difa_compile.apply` takes as keyword arguments.

    torch.compile(model, backend="difa", options={"plan": plan, "strict": True})

One dataclass names, explains and checks them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from difa_compile.backend.batch_sizes import AnyBatch
from difa_compile.backend.inductor import Config, inductor_config, torch_tensorrt
from difa_compile.errors import DecisionError, LayoutError
from difa_compile.layout import Layout
from difa_compile.plan.guidance import StatedGuidance
from difa_compile.plan.plan import RESIZES, Plan

INNER = ("inductor", "eager", "tensorrt")


@dataclass(frozen=True)
class Options:
    """The options of the backend, checked. Equal options compile equal graphs to the same functions.

    Raises :class:`DecisionError` and :class:`LayoutError` for values that an option does not take, and
    :class:`MissingDependencyError` for an inner compiler that is not installed.
    """

    plan: Plan | Path | None = None
    """The plan to follow, or the file that holds it. None: calibration decides call by call. If the option is not
    given at all, graphs are compiled as inductor compiles them."""
    strict: bool = False
    """A decision that cannot be carried out is a :class:`~difa_compile.errors.SiteSkippedError`, not a record."""
    layout: Layout | None = None
    """Where the image stands in the attention sequence, for models whose graph does not show it."""
    cfg: Mapping[str, object] = field(default_factory=dict)
    """How guidance is done: ``{"conditional_half": 0 | 1}``, which half of the batch is the conditional one, or
    ``{"two_call": True}``, the halves are two calls per step. What is not said is as the plan says."""
    inner: str = "inductor"
    """What compiles the rewritten graphs: ``"inductor"``, ``"eager"``, for debugging and exact comparisons, or
    ``"tensorrt"``: torch-tensorrt, where it is installed (it never ran in our tests)."""
    resize: str | None = None
    """Carry the plan onto other image sizes than its own, by ``"fraction"`` or by ``"tokens"`` (:meth:`Plan.resized`).
    Without it other sizes are errors."""
    mode: str | None = None
    """A mode of ``torch.compile``, for instance ``"reduce-overhead"`` (CUDA graphs). ``torch.compile`` itself takes no
    mode beside options."""
    inductor_options: Mapping[str, Any] = field(default_factory=dict)
    """Values of ``torch._inductor.config``, for instance ``{"max_autotune": True}``; they go before those of a mode."""
    allow_slower: bool = False
    """Carry out windows that are predicted slower than full attention on this machine, by a profile that ``difa tune``
    measured. By default they are left full and recorded as skipped, which ``strict`` does not mind."""
    dynamic: AnyBatch | None = None
    """Where the captures of one compiled model find what is compiled already: what is compiled at the second batch size
    then serves all others, instead of compiling for each. One for each model; for :func:`difa_compile.apply` it is
    ``True`` or ``False``."""
    trace: Path | None = None
    """A folder to write the graph to after every pass (:mod:`difa_compile.passes.trace`), a new folder inside for each
    captured graph."""

    def __post_init__(self) -> None:
        if self.plan is not None and not isinstance(self.plan, (Plan, Path)):
            raise DecisionError(f"option plan is a {type(self.plan).__name__}; give a Plan, the path of one, or None")
        if self.layout is not None and not isinstance(self.layout, Layout):
            raise LayoutError(f"option layout is {self.layout!r}; give a difa_compile.Layout")
        if self.trace is not None and not isinstance(self.trace, Path):
            raise DecisionError(f"option trace is a {type(self.trace).__name__}; give the path of a folder, or None")
        StatedGuidance.of_option(self.cfg)
        if self.inner not in INNER:
            raise DecisionError(f"inner compiler {self.inner!r} is unknown; choose one of {', '.join(INNER)}")
        if self.resize not in (None, *RESIZES):
            raise DecisionError(f"resize is {self.resize!r}; choose one of {', '.join(RESIZES)}, or leave it out")
        config = self.config
        if config and self.inner != "inductor":
            why = "compiles nothing" if self.inner == "eager" else "is not inductor"
            raise DecisionError(
                f"inner={self.inner!r} {why}, so it takes no {', '.join(config)}; leave mode and inductor_options out"
            )
        if self.dynamic is not None and not isinstance(self.dynamic, AnyBatch):
            raise DecisionError(
                f"option dynamic is {self.dynamic!r}; give a difa_compile.AnyBatch(), in which the captures of one "
                "compiled model find what is compiled already"
            )
        if self.inner == "tensorrt":
            torch_tensorrt()

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """The options ``given`` by name. Raises :class:`DecisionError` also for a name that is none."""
        unknown = sorted(set(given) - set(NAMES))
        if unknown:
            raise DecisionError(f"backend difa does not know option {unknown[0]!r}; its options are {', '.join(NAMES)}")
        chosen = dict(given)
        for name in ("plan", "trace"):
            if isinstance(chosen.get(name), str):
                chosen[name] = Path(chosen[name])
        for name in ("strict", "allow_slower"):
            chosen[name] = bool(chosen.get(name, False))
        for name in ("cfg", "inductor_options"):
            values = chosen.get(name)
            chosen[name] = {} if values is None else dict(values) if isinstance(values, Mapping) else values
        return cls(**chosen)

    @property
    def config(self) -> Config:
        """The values of ``torch._inductor.config`` that mode and options stand for."""
        return inductor_config(self.mode, self.inductor_options)

    @property
    def given(self) -> dict[str, Any]:
        """The plan and what is not as by default: what ``torch.compile`` is handed. Dynamo compares it by value and
        takes graphs that were compiled with equal options for its own."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        default = Options()
        return {name: value for name, value in values.items() if name == "plan" or value != getattr(default, name)}


NAMES = tuple(each.name for each in fields(Options))
