"""Autocast regions that a graph enters and leaves itself (``with torch.autocast(...)`` in a model's own code).

Dynamo writes such a region as two calls, ``a = _enter_autocast("cpu", bfloat16, True, None)`` before its nodes and
``_exit_autocast(a)`` behind them, which no value connects with the nodes between. So whoever runs, copies or computes
part of a graph has to ask what is open at a node: :func:`open_at`. The autocast that is on around a whole call is not
in its graph: Dynamo guards on it, so it is the same whenever the graph or a part of it is run or compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

ENTER: Callable[..., Any] = torch.amp.autocast_mode._enter_autocast
EXIT: Callable[..., Any] = torch.amp.autocast_mode._exit_autocast


def is_enter(node: fx.Node) -> bool:
    """Whether the node enters an autocast region."""
    return node.op == "call_function" and node.target is ENTER


def is_exit(node: fx.Node) -> bool:
    """Whether the node leaves the region that its argument entered."""
    return node.op == "call_function" and node.target is EXIT


def open_at(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes that entered the regions which a node stands in, outermost first; it need be the graph's, no more."""
    return tuple(
        enter
        for enter in node.graph.find_nodes(op="call_function", target=ENTER)
        if enter < node and not any(is_exit(user) and user < node for user in enter.users)
    )


@contextmanager
def autocast_of(node: fx.Node) -> Iterator[None]:
    """Within this block operations are cast as they are where the node stands."""
    with ExitStack() as stack:
        for enter in open_at(node):
            stack.enter_context(torch.autocast(*enter.args))  # type: ignore[arg-type]
        yield


@dataclass(frozen=True)
class Autocast:
    """What autocast is set to in a thread: per device type whether it is on and the dtype to cast to."""

    devices: tuple[tuple[str, bool, torch.dtype], ...]
    cached: bool
    """Whether casts of weights are kept for the next time."""

    @staticmethod
    def now() -> Autocast:
        """The calling thread's."""
        devices = torch._C._autocast_supported_devices()
        return Autocast(
            tuple((each, torch.is_autocast_enabled(each), torch.get_autocast_dtype(each)) for each in devices),
            torch.is_autocast_cache_enabled(),
        )

    def set(self) -> None:
        """Make it the calling thread's."""
        for device, enabled, dtype in self.devices:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.cached)

    def __str__(self) -> str:
        """The device types for which it is on, with their dtypes; "" where it is off."""
        return ", ".join(f"{device} {dtype}" for device, enabled, dtype in self.devices if enabled)


def _depth() -> int:
    """How many regions the thread is in."""
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())


@contextmanager
def autocast_kept() -> Iterator[None]:
    """Within this block a graph may fail, or end, inside a region that it entered: behind it all is as it was."""
    depth, before = _depth(), Autocast.now()
    try:
        yield
    finally:
        while _depth() > depth:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
        if Autocast.now() != before:
            before.set()


def runs_regions(graph: fx.Graph) -> bool:
    """Whether the graph enters regions itself."""
    return bool(graph.find_nodes(op="call_function", target=ENTER))


def casts_at(nodes: Sequence[fx.Node], device: str) -> tuple[bool, torch.dtype] | None:
    """Whether autocast is on for a device type and its dtype, where it is the same at all nodes; None where not.

    Asked while the autocast around the whole call is on.
    """
    found = set()
    for node in nodes:
        with autocast_of(node):
            found.add((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)))
    states = {(on, dtype if on else None) for on, dtype in found}
    return next(iter(found)) if len(states) == 1 else None
