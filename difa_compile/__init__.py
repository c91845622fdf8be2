"""difa-compile: attention planning and compilation for diffusion transformers.

    plan = difa_compile.calibrate(pipe, {"class_labels": [1, 2]}, steps=50, threshold=0.05)
    difa_compile.apply(pipe, plan)

Importing this package needs torch and nothing else, and does not load even that until a name is used: each public
name below is imported from its module on first access.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from difa_compile.backend.batch_sizes import AnyBatch
    from difa_compile.backend.run import Run, sampling
    from difa_compile.bundle.adapting import adapt_bundle
    from difa_compile.bundle.difference import bundle_difference
    from difa_compile.bundle.runner import load_bundle
    from difa_compile.calibration.calibrate import calibrate
    from difa_compile.calibration.measure import measure
    from difa_compile.comparison.planned import plan_within
    from difa_compile.decision import FULL, REUSE, Decision, Kind, Window, WindowShape
    from difa_compile.errors import DifaError
    from difa_compile.exporting.write import export
    from difa_compile.layout import Layout
    from difa_compile.pipeline.apply import apply, remove
    from difa_compile.pipeline.inspection import inspect_model
    from difa_compile.pipeline.loading import load_pipeline
    from difa_compile.pipeline.rules import plan_from_rule
    from difa_compile.plan.plan import Plan
    from difa_compile.planner.make import Limit, plan_from_table
    from difa_compile.planner.table import ErrorTable

_HOME = {
    "FULL": "decision",
    "REUSE": "decision",
    "AnyBatch": "backend.batch_sizes",
    "Decision": "decision",
    "DifaError": "errors",
    "ErrorTable": "planner.table",
    "Kind": "decision",
    "Layout": "layout",
    "Limit": "planner.make",
    "Plan": "plan.plan",
    "Run": "backend.run",
    "Window": "decision",
    "WindowShape": "decision",
    "adapt_bundle": "bundle.adapting",
    "apply": "pipeline.apply",
    "bundle_difference": "bundle.difference",
    "calibrate": "calibration.calibrate",
    "export": "exporting.write",
    "inspect_model": "pipeline.inspection",
    "load_bundle": "bundle.runner",
    "load_pipeline": "pipeline.loading",
    "measure": "calibration.measure",
    "plan_from_rule": "pipeline.rules",
    "plan_from_table": "planner.make",
    "plan_within": "comparison.planned",
    "remove": "pipeline.apply",
    "sampling": "backend.run",
}

__all__ = [
    "FULL",
    "REUSE",
    "AnyBatch",
    "Decision",
    "DifaError",
    "ErrorTable",
    "Kind",
    "Layout",
    "Limit",
    "Plan",
    "Run",
    "Window",
    "WindowShape",
    "adapt_bundle",
    "apply",
    "bundle_difference",
    "calibrate",
    "export",
    "inspect_model",
    "load_bundle",
    "load_pipeline",
    "measure",
    "plan_from_rule",
    "plan_from_table",
    "plan_within",
    "remove",
    "sampling",
]


def __getattr__(name: str) -> object:
    try:
        home = _HOME[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    try:
        value: object = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    except ModuleNotFoundError as error:
        extra = {"numpy": "report", "msgspec": "export"}.get(error.name or "")
        if extra is None:
            raise
        from difa_compile.errors import MissingDependencyError

        raise MissingDependencyError(
            f"difa_compile.{name} needs {error.name}, which is not installed; pip install {error.name}, or "
            f"difa-compile[{extra}]"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
