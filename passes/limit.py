"""Stop rewriting after a number of rewrites (``DIFA_PASS_LIMIT``), to find the one that spoils an image.

A rewrite is one pass at one site of one variant, numbered over the process in the order in which they are made. What is
beyond the limit is left out: the site computes what it does without that pass. Every rewrite is told on standard error,
so that an image that is right with a limit of 12 and wrong with 13 names its culprit. Writing caches is no rewrite in
this sense: it changes nothing of what a step gives, and later steps count on them.
"""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass, field

from difa_compile.errors import PassError
from difa_compile.wording import quoted

VARIABLE = "DIFA_PASS_LIMIT"


@dataclass
class RewriteLimit:
    """At most ``most`` rewrites are made; -1: all are, and told."""

    most: int
    made: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def allows(self, name: str, site: str, role: object) -> bool:
        """Whether the rewrite that comes next, of a pass at a site (module path), is made; says so."""
        with self._lock:
            self.made += 1
            allowed = self.most < 0 or self.made <= self.most
            print(
                f"difa: rewrite {self.made}: {name} at {site} ({role}){'' if allowed else ', left out'}",
                file=sys.stderr,
                flush=True,
            )
        return allowed


_current: tuple[str, RewriteLimit] | None = None


def rewrite_limit() -> RewriteLimit | None:
    """The limit that the environment asks for, the same until it asks for another; None if it asks for none.

    Raises :class:`PassError` if ``DIFA_PASS_LIMIT`` is no whole number of at least -1.
    """
    global _current
    told = os.environ.get(VARIABLE, "").strip()
    if not told:
        _current = None
        return None
    if _current is None or _current[0] != told:
        if not told.removeprefix("-").isdecimal() or len(told) > 12 or int(told) < -1:
            raise PassError(
                f"{VARIABLE} is {quoted(told)}; give how many rewrites to make, -1 for all of them, or leave it out"
            )
        _current = told, RewriteLimit(int(told))
    return _current[1]
