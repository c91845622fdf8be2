"""The ways to find a plan, as ``difa calibrate --method`` names them, and which options belong to which."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import typer

DEFAULT_BUDGET = 0.5
"""What is planned for where no limit is given."""
DEMO_BUDGET = 0.3
DEFAULT_THRESHOLD = 0.05
RUNS = 16
"""How many plans are tried at most, unless told otherwise."""
MOST_RUNS = 10_000


class Method(StrEnum):
    """``PLANNER``: the best plan under a limit. ``WEIGHED``, ``PUBLISHED``: attention alone, by a threshold."""

    PLANNER = "planner"
    WEIGHED = "weighed"
    PUBLISHED = "published"


def check_options_of(method: Method, given: Mapping[str, object], *methods: Method) -> None:
    """Raise ``typer.BadParameter`` for an option that was given and that only other methods have."""
    if method in methods:
        return
    wrong = next((option for option, value in given.items() if value is not None), None)
    if wrong is not None:
        raise typer.BadParameter(
            f"it belongs to --method {' and '.join(methods)}, and this is {method}; leave it out, or name the method",
            param_hint=wrong,
        )
