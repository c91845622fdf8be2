"""What is in progress in this thread: runs and calls of wired pipelines, the innermost last.

The one context variable of the package's calls. Whoever begins something enters it here and leaves it at the end,
however that comes; threads and async tasks see only their own.
"""

from __future__ import annotations

from contextvars import ContextVar

_entered: ContextVar[tuple[object, ...]] = ContextVar("difa_compile_in_progress", default=())


def in_progress() -> tuple[object, ...]:
    """All that is in progress in this thread, outermost first."""
    return _entered.get()


def enter(entry: object) -> None:
    """Something begins."""
    _entered.set((*_entered.get(), entry))


def leave(entry: object) -> None:
    """It is over: what was entered last of it is taken out. Nothing happens if it was never entered here."""
    entered = _entered.get()
    last = next((i for i in reversed(range(len(entered))) if entered[i] is entry), None)
    if last is not None:
        _entered.set((*entered[:last], *entered[last + 1 :]))
