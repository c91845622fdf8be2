"""What engines are lowered to, one module a target.

A target makes a piece (:class:`difa_compile.exporting.lowered.Lowered`) of what is wanted. Where weights lie is known
when all pieces are there; engines are finished then.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from difa_compile.bundle.weights import Place
from difa_compile.exporting.lowered import Lowered, Wanted

TARGETS = ("onnx", "aoti", "tensorrt")
"""Each is the name of its module here."""


class Target(Protocol):
    """What a target's module has."""

    def check(self, portable: bool) -> None:
        """Raise :class:`TargetError` where engines cannot be made, or not be run beside the pipeline, because something
        is not installed: what can be told before the work. ``portable``: as of :class:`Wanted`."""
        ...

    def lowered(self, wanted: Wanted, path: Path) -> Lowered:
        """A piece in the file ``path``, to which it gives an ending. Raises :class:`TargetError`, without the packages
        that make it too."""
        ...

    def finished(self, piece: Path, file: str, places: Mapping[str, Place]) -> bytes:
        """The content of the engine of a piece whose weights lie in ``file``, beside it, at ``places``."""
        ...


def target_of(name: str) -> Target:
    """The target of a name out of :data:`TARGETS`. What it is made with is imported when it is used."""
    return cast(Target, import_module(f"{__name__}.{name}"))
