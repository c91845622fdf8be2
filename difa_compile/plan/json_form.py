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

The cell of a forecast may have ``"weights": [1.4, -0.5, 0.1]``, fitted to what was measured (:class:`~.data.Cell`).
The frame, the digest and what guards the reading are those of all files of the package (:mod:`documents`); the file
itself is laid out for reading, one line per site and per cell.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from difa_compile.decision import Decision
from difa_compile.errors import DecisionError, PlanDigestError, PlanFormatError, PlanVersionError
from difa_compile.files.documents import Format, Unfit, as_list, as_number, as_object, as_text, as_whole
from difa_compile.layout import Layout
from difa_compile.plan.data import Cell, ModelInfo, Promise, Settings, SiteInfo, Trial

SCHEMA_VERSION = 1
MOST_BYTES = 2**29
"""A thousand steps at a thousand sites with four trials each take this much; fifty steps of a large model take 2 MB."""

PLAN = Format(
    name="plan",
    version_key="schema_version",
    version=SCHEMA_VERSION,
    keys=("model", "settings", "sites", "progress", "rows"),
    most_bytes=MOST_BYTES,
    damaged=PlanFormatError,
    other_version=PlanVersionError,
    edited=PlanDigestError,
    where_from="give the path of a plan file, as written by Plan.save or difa calibrate",
    again="calibrate again",
    edit="to change a plan, load it in Python, change that and save it",
)

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
    return PLAN.digest(_content(model, settings, sites, progress, rows))


def _content(
    model: ModelInfo,
    settings: Settings,
    sites: Sequence[SiteInfo],
    progress: Sequence[float],
    rows: Sequence[Sequence[Cell]],
) -> dict[str, object]:
    return {
        "model": model_json(model),
        "settings": settings_json(settings),
        "sites": [site_json(site) for site in sites],
        "progress": list(progress),
        "rows": [[cell_json(cell) for cell in row] for row in rows],
    }


# --- writing ---------------------------------------------------------------------------------------------------------


def write(
    model: ModelInfo,
    settings: Settings,
    sites: Sequence[SiteInfo],
    progress: Sequence[float],
    rows: Sequence[Sequence[Cell]],
) -> str:
    """The text of a plan file, ending in a newline."""
    site_lines = ",\n".join("    " + _line(site_json(site)) for site in sites)
    row_blocks = ",\n".join(
        "    [\n" + ",\n".join("      " + _line(cell_json(cell)) for cell in row) + "\n    ]" for row in rows
    )
    members = {
        "schema_version": str(SCHEMA_VERSION),
        "digest": _line(digest(model, settings, sites, progress, rows)),
        "model": _line(model_json(model)),
        "settings": _line(settings_json(settings)),
        "sites": f"[\n{site_lines}\n  ]",
        "progress": _line(list(progress)),
        "rows": f"[\n{row_blocks}\n  ]",
    }
    return "{\n" + ",\n".join(f'  "{key}": {value}' for key, value in members.items()) + "\n}\n"


def _line(value: object) -> str:
    return json.dumps(value, allow_nan=False)


def model_json(model: ModelInfo) -> dict[str, object]:
    return {"class_name": model.class_name, "config_digest": model.config_digest, "parameters": model.parameters}


def settings_json(settings: Settings) -> dict[str, object]:
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
        **({} if settings.promise is None else {"promise": asdict(settings.promise)}),
    }


def site_json(site: SiteInfo) -> dict[str, object]:
    layout = site.layout
    return {
        "path": site.path,
        "kind": site.kind,
        "heads": site.heads,
        "head_dim": site.head_dim,
        "tokens": site.tokens,
        "width": site.width,
        "layout": layout and {"grid": list(layout.grid), "before": layout.before, "after": layout.after},
        **({} if site.flops is None else {"flops": site.flops}),
        **({"blocks": list(site.blocks)} if site.blocks else {}),
    }


def cell_json(cell: Cell) -> dict[str, object]:
    """A cell as JSON values."""
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
    weights = {"weights": list(cell.weights)} if cell.weights else {}
    return {"decision": str(cell.decision), "flops_saved": cell.flops_saved, "trials": trials, **weights}


# --- reading ---------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> Parts:
    """The fields of a plan file. Raises as :func:`read`, also where the file cannot be read."""
    return read(PLAN.read_bytes(path), path)


def read(data: str | bytes, where: object) -> Parts:
    """The fields of a plan from the content of a plan file; ``where`` names it in messages.

    Checked in this order: JSON, schema version, keys and types, digest. Raises :class:`PlanFormatError`,
    :class:`PlanVersionError`, :class:`PlanDigestError`.
    """
    fields = PLAN.parse(data, where)
    del data
    with PLAN.reading(where):
        parts: Parts = (
            read_model(fields["model"]),
            read_settings(fields["settings"]),
            tuple(read_site(item, f"sites[{i}]") for i, item in enumerate(as_list(fields["sites"], "sites"))),
            tuple(as_number(item, f"progress[{i}]") for i, item in enumerate(as_list(fields["progress"], "progress"))),
            read_rows(fields["rows"], "rows"),
        )
    PLAN.check_digest(fields, _content(*parts), where)
    return parts


def read_rows(value: object, where: str) -> tuple[tuple[Cell, ...], ...]:
    """Rows of cells, as :func:`cell_json` writes each. Raises ``ValueError``."""
    return tuple(
        tuple(_read_cell(cell, f"{where}[{i}][{j}]") for j, cell in enumerate(as_list(row, f"{where}[{i}]")))
        for i, row in enumerate(as_list(value, where))
    )


def read_model(value: object) -> ModelInfo:
    fields = as_object(value, "model", ("class_name", "config_digest", "parameters"))
    return ModelInfo(fields["class_name"], fields["config_digest"], fields["parameters"])


def read_settings(value: object) -> Settings:
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
    fields = as_object(value, "settings", keys, optional=("sample", "promise"))
    as_list(fields["candidates"], "settings.candidates")
    sample = tuple(as_list(fields["sample"], "settings.sample")) if "sample" in fields else None
    promise = _read_promise(fields["promise"]) if "promise" in fields else None
    return replace(Settings(*(fields[key] for key in keys)), sample=sample, promise=promise)


def _read_promise(value: object) -> Promise:
    names = tuple(Promise.__dataclass_fields__)
    return Promise(**as_object(value, "settings.promise", names))


def read_site(value: object, where: str) -> SiteInfo:
    fields = as_object(
        value, where, ("path", "kind", "heads", "head_dim", "tokens", "width", "layout"), ("flops", "blocks")
    )
    layout = None
    if fields["layout"] is not None:
        place = f"{where}.layout"
        sizes = as_object(fields["layout"], place, ("grid", "before", "after"))
        grid = tuple(as_whole(size, f"{place}.grid") for size in as_list(sizes["grid"], f"{place}.grid"))
        layout = Layout(grid, as_whole(sizes["before"], f"{place}.before"), as_whole(sizes["after"], f"{place}.after"))
    return SiteInfo(
        fields["path"],
        fields["kind"],
        fields["heads"],
        fields["head_dim"],
        fields["tokens"],
        fields["width"],
        layout,
        as_whole(fields["flops"], f"{where}.flops") if "flops" in fields else None,
        tuple(as_text(path, f"{where}.blocks") for path in as_list(fields.get("blocks", []), f"{where}.blocks")),
    )


def _read_cell(value: object, where: str) -> Cell:
    fields = as_object(value, where, ("decision", "flops_saved", "trials"), optional=("weights",))
    trials = []
    for index, item in enumerate(as_list(fields["trials"], f"{where}.trials")):
        place = f"{where}.trials[{index}]"
        trial = as_object(item, place, ("decision", "loss", "threshold", "reason"), optional=("cost",))
        loss = None if trial["loss"] is None else as_number(trial["loss"], f"{place}.loss")
        trials.append(
            Trial(
                _decision(trial["decision"], place),
                loss,
                as_number(trial["threshold"], f"{place}.threshold"),
                as_text(trial["reason"], f"{place}.reason"),
                as_number(trial["cost"], f"{place}.cost") if "cost" in trial else None,
            )
        )
    saved = as_number(fields["flops_saved"], f"{where}.flops_saved")
    weights = tuple(
        as_number(item, f"{where}.weights[{i}]")
        for i, item in enumerate(as_list(fields.get("weights", []), f"{where}.weights"))
    )
    return Cell(_decision(fields["decision"], where), tuple(trials), saved, weights)


def _decision(value: object, where: str) -> Decision:
    try:
        return Decision.parse(as_text(value, f"{where}.decision"))
    except DecisionError as error:
        raise Unfit(f"{where}: {error}") from error
