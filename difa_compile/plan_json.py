"""Plan files: JSON with a schema version and a digest, an explicit reader per type, and no key it does not know.

```
{
  "schema_version": 1,
  "digest": "<SHA-256 of everything below, as canonical JSON>",
  "model": {"class_name": ..., "config_digest": ..., "parameters": ...},
  "settings": {"method": "greedy", "threshold": 0.05, ...},
  "sites": [
    {"path": "transformer_blocks.0.attn1", "kind": "self", ..., "layout": {"grid": [16, 16], "before": 0, "after": 0}},
    ...
  ],
  "progress": [1.0, 0.98, ...],
  "rows": [
    [
      {"decision": "full", "flops_saved": 0.0, "trials": [{"decision": "reuse", "loss": 0.2, "threshold": 0.01, ...}]},
      ...
    ],
    ...
  ]
}
```

Canonical JSON: sorted keys, no spaces, ASCII, floats in Python's shortest form, no NaN or infinity. This is how the
digest is taken; the file itself is laid out for reading, one line per site and per cell.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Never

from difa_compile.decision import Decision
from difa_compile.errors import (
    DecisionError,
    LayoutError,
    PlanDigestError,
    PlanFormatError,
    PlanVersionError,
)
from difa_compile.layout import Layout
from difa_compile.plan_data import Cell, ModelInfo, Settings, SiteInfo, Trial

SCHEMA_VERSION = 1

Parts = tuple[
    ModelInfo, Settings, tuple[SiteInfo, ...], tuple[float, ...], tuple[tuple[Cell, ...], ...]
]  # the fields of a Plan, in order


def digest(
    model: ModelInfo,
    settings: Settings,
    sites: Sequence[SiteInfo],
    progress: Sequence[float],
    rows: Sequence[Sequence[Cell]],
) -> str:
    """SHA-256 of the plan's canonical JSON, 64 hex digits. The schema version enters it, the digest itself does not."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "model": _model_json(model),
        "settings": _settings_json(settings),
        "sites": [_site_json(site) for site in sites],
        "progress": list(progress),
        "rows": [[_cell_json(cell) for cell in row] for row in rows],
    }
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


# --- writing ---------------------------------------------------------------------------------------------------------


def write(
    model: ModelInfo,
    settings: Settings,
    sites: Sequence[SiteInfo],
    progress: Sequence[float],
    rows: Sequence[Sequence[Cell]],
) -> str:
    """The text of a plan file, ending in a newline."""
    site_lines = ",\n".join("    " + _line(_site_json(site)) for site in sites)
    row_blocks = ",\n".join(
        "    [\n" + ",\n".join("      " + _line(_cell_json(cell)) for cell in row) + "\n    ]" for row in rows
    )
    members = {
        "schema_version": str(SCHEMA_VERSION),
        "digest": _line(digest(model, settings, sites, progress, rows)),
        "model": _line(_model_json(model)),
        "settings": _line(_settings_json(settings)),
        "sites": f"[\n{site_lines}\n  ]",
        "progress": _line(list(progress)),
        "rows": f"[\n{row_blocks}\n  ]",
    }
    return "{\n" + ",\n".join(f'  "{key}": {value}' for key, value in members.items()) + "\n}\n"


def _line(value: object) -> str:
    return json.dumps(value, allow_nan=False)


def _model_json(model: ModelInfo) -> dict[str, object]:
    return {"class_name": model.class_name, "config_digest": model.config_digest, "parameters": model.parameters}


def _settings_json(settings: Settings) -> dict[str, object]:
    return {
        "method": settings.method,
        "threshold": settings.threshold,
        "loss": settings.loss,
        "window": settings.window,
        "candidates": list(settings.candidates),
        "guidance": settings.guidance,
        "conditional_half": settings.conditional_half,
        "torch": settings.torch,
        "diffusers": settings.diffusers,
        **({} if settings.sample is None else {"sample": list(settings.sample)}),
    }


def _site_json(site: SiteInfo) -> dict[str, object]:
    layout = site.layout
    return {
        "path": site.path,
        "kind": site.kind,
        "heads": site.heads,
        "head_dim": site.head_dim,
        "tokens": site.tokens,
        "width": site.width,
        "layout": layout and {"grid": list(layout.grid), "before": layout.before, "after": layout.after},
    }


def _cell_json(cell: Cell) -> dict[str, object]:
    trials = [
        {
            "decision": str(trial.decision),
            "loss": trial.loss,
            "threshold": trial.threshold,
            "reason": trial.reason,
            **({} if trial.cost is None else {"cost": trial.cost}),
        }
        for trial in cell.trials
    ]
    return {"decision": str(cell.decision), "flops_saved": cell.flops_saved, "trials": trials}


# --- reading ---------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The text of a plan file. Raises :class:`PlanFormatError` if it cannot be read or is not text."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanFormatError(
            f"the plan {path} cannot be read: {error.strerror or error}; give the path of a plan file, as written by "
            "Plan.save or difa calibrate"
        ) from error
    except UnicodeDecodeError as error:
        raise PlanFormatError(f"{path} is not a plan: it is not text ({error.reason}, byte {error.start})") from error


def read(text: str, where: str) -> Parts:
    """The fields of a plan from the text of a plan file; ``where`` names it in messages.

    Checked in this order: JSON, schema version, keys and types, digest. Raises :class:`PlanFormatError`,
    :class:`PlanVersionError`, :class:`PlanDigestError`.
    """
    try:
        document = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise PlanFormatError(
            f"{where} is not a plan: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); the "
            "file is damaged or was cut off: restore it or calibrate again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise PlanFormatError(f"{where} is not a plan: {error}; restore the file or calibrate again") from error
    if isinstance(document, dict) and "schema_version" in document:
        version = document["schema_version"]
        if isinstance(version, bool) or version != SCHEMA_VERSION:
            raise PlanVersionError(
                f"{where} has schema version {version!r}, but this release reads version {SCHEMA_VERSION}; use the "
                "release that wrote it, or calibrate again"
            )
    try:
        fields = _object(document, "", ("schema_version", "digest", "model", "settings", "sites", "progress", "rows"))
        written = _string(fields["digest"], "digest")
        parts: Parts = (
            _read_model(fields["model"]),
            _read_settings(fields["settings"]),
            tuple(_read_site(item, f"sites[{i}]") for i, item in enumerate(_list(fields["sites"], "sites"))),
            tuple(_float(item, f"progress[{i}]") for i, item in enumerate(_list(fields["progress"], "progress"))),
            tuple(
                tuple(_read_cell(cell, f"rows[{i}][{j}]") for j, cell in enumerate(_list(row, f"rows[{i}]")))
                for i, row in enumerate(_list(fields["rows"], "rows"))
            ),
        )
    except (PlanFormatError, DecisionError, LayoutError) as error:
        raise PlanFormatError(f"{where} is not a plan of this version: {error}") from error
    content = digest(*parts)
    if content != written:
        raise PlanDigestError(
            f"{where} was changed after it was written: its digest is {written[:12]}, its content has {content[:12]}; "
            "restore the file, or make the change in Python on a loaded plan and save that"
        )
    return parts


def _no_constant(name: str) -> Never:
    raise ValueError(f"it holds {name}, which is not a number a plan may contain")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice in one object")
        found[key] = value
    return found


def _read_model(value: object) -> ModelInfo:
    fields = _object(value, "model", ("class_name", "config_digest", "parameters"))
    return ModelInfo(fields["class_name"], fields["config_digest"], fields["parameters"])


def _read_settings(value: object) -> Settings:
    keys = (
        "method",
        "threshold",
        "loss",
        "window",
        "candidates",
        "guidance",
        "conditional_half",
        "torch",
        "diffusers",
    )
    fields = _object(value, "settings", keys, optional=("sample",))
    _list(fields["candidates"], "settings.candidates")
    sample = tuple(_list(fields["sample"], "settings.sample")) if "sample" in fields else None
    return replace(Settings(*(fields[key] for key in keys)), sample=sample)


def _read_site(value: object, where: str) -> SiteInfo:
    fields = _object(value, where, ("path", "kind", "heads", "head_dim", "tokens", "width", "layout"))
    layout = None
    if fields["layout"] is not None:
        place = f"{where}.layout"
        sizes = _object(fields["layout"], place, ("grid", "before", "after"))
        grid = tuple(_int(size, f"{place}.grid") for size in _list(sizes["grid"], f"{place}.grid"))
        layout = Layout(grid, _int(sizes["before"], f"{place}.before"), _int(sizes["after"], f"{place}.after"))
    return SiteInfo(
        fields["path"],
        fields["kind"],
        fields["heads"],
        fields["head_dim"],
        fields["tokens"],
        fields["width"],
        layout,
    )


def _read_cell(value: object, where: str) -> Cell:
    fields = _object(value, where, ("decision", "flops_saved", "trials"))
    trials = []
    for index, item in enumerate(_list(fields["trials"], f"{where}.trials")):
        place = f"{where}.trials[{index}]"
        trial = _object(item, place, ("decision", "loss", "threshold", "reason"), optional=("cost",))
        loss = None if trial["loss"] is None else _float(trial["loss"], f"{place}.loss")
        trials.append(
            Trial(
                _decision(trial["decision"], place),
                loss,
                _float(trial["threshold"], f"{place}.threshold"),
                _string(trial["reason"], f"{place}.reason"),
                _float(trial["cost"], f"{place}.cost") if "cost" in trial else None,
            )
        )
    saved = _float(fields["flops_saved"], f"{where}.flops_saved")
    return Cell(_decision(fields["decision"], where), tuple(trials), saved)


def _decision(value: object, where: str) -> Decision:
    try:
        return Decision.parse(_string(value, f"{where}.decision"))
    except DecisionError as error:
        raise PlanFormatError(f"{where}: {error}") from error


def _object(value: object, where: str, keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    place = where or "the file"
    if not isinstance(value, dict):
        raise PlanFormatError(f"{place} is {_kind(value)}; it must be an object with the keys {', '.join(keys)}")
    missing = [key for key in keys if key not in value]
    unknown = [key for key in value if key not in (*keys, *optional)]
    if missing or unknown:
        parts = [f"without the key {key!r}" for key in missing] + [f"with the unknown key {key!r}" for key in unknown]
        raise PlanFormatError(f"{place} is {', '.join(parts)}; known keys are {', '.join((*keys, *optional))}")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise PlanFormatError(f"{where} is {_kind(value)}; it must be a list")
    return value


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise PlanFormatError(f"{where} is {_kind(value)}; it must be a string")
    return value


def _int(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlanFormatError(f"{where} is {_kind(value)}; it must be a whole number")
    return value


def _float(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PlanFormatError(f"{where} is {_kind(value)}; it must be a number")
    if not math.isfinite(value):
        raise PlanFormatError(f"{where} is {value}; it must be finite")
    return float(value)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
