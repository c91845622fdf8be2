"""A comparison as a folder, so that its page can be made again: ``plan.json``, ``comparison.json``, ``images.npz``."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difa_compile.errors import ComparisonFormatError
from difa_compile.plan import Plan
from difa_compile.report.write import write_file, write_report

if TYPE_CHECKING:
    from difa_compile.compare import Comparison

SCHEMA_VERSION = 1
PLAN_NAME, COMPARISON_NAME, IMAGES_NAME = "plan.json", "comparison.json", "images.npz"
_OUTER = ("schema_version", "title", "command", "machine", "versions", "captions", "comparison")
_DERIVED = ("speedup",)


@dataclass(frozen=True)
class StoredComparison:
    """A plan, what was measured with it, and where it was measured: all that the page shows.

    ``captions``: one per image in the order of the comparison, or none.
    """

    plan: Plan
    comparison: Comparison
    title: str
    command: str
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    captions: tuple[str, ...] = ()

    def save(self, folder: str | Path) -> None:
        """Write the three files, each whole or not at all, ``comparison.json`` last. Raises :class:`OutputError`."""
        import numpy as np

        folder = Path(folder)
        images = io.BytesIO()
        np.savez_compressed(images, full=self.comparison.images_full, planned=self.comparison.images_planned)
        content = {
            "schema_version": SCHEMA_VERSION,
            "title": self.title,
            "command": self.command,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "captions": list(self.captions),
            "comparison": self.comparison.to_json(),
        }
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        write_file(folder / IMAGES_NAME, images.getvalue())
        write_file(folder / PLAN_NAME, self.plan.to_json().encode())
        write_file(folder / COMPARISON_NAME, text.encode())

    @classmethod
    def load(cls, folder: str | Path) -> StoredComparison:
        """The inverse of :meth:`save`.

        Raises :class:`ComparisonFormatError` if a file is missing, damaged or of another schema, or if the plan is not
        the one that was compared, and what :meth:`Plan.load` raises.
        """
        folder = Path(folder)
        path = folder / COMPARISON_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ComparisonFormatError(
                f"{path} cannot be read: {error.strerror or error}; name a folder written by difa compare or difa demo"
            ) from error
        except ValueError as error:
            raise ComparisonFormatError(f"{path} is not JSON, or is truncated ({error}); {_REMEDY}") from error
        where = str(path)
        if isinstance(content, dict) and content.get("schema_version") != SCHEMA_VERSION:
            found = content.get("schema_version")
            raise ComparisonFormatError(
                f"{where} has schema version {found!r}, this release reads {SCHEMA_VERSION}; {_REMEDY}"
            )
        outer = _keys(content, _OUTER, where)
        plan = Plan.load(folder / PLAN_NAME)
        try:
            comparison = _read_comparison(
                outer["comparison"], _read_images(folder / IMAGES_NAME), f"{where}: comparison"
            )
            stored = cls(
                plan=plan,
                comparison=comparison,
                title=_text(outer["title"]),
                command=_text(outer["command"]),
                machine={_text(name): _text(value) for name, value in outer["machine"].items()},
                versions={_text(name): _text(value) for name, value in outer["versions"].items()},
                captions=tuple(map(_text, outer["captions"])),
            )
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ComparisonFormatError):
                raise
            raise ComparisonFormatError(f"{where} has a value of the wrong type ({error}); {_REMEDY}") from error
        if comparison.plan_digest != plan.digest:
            raise ComparisonFormatError(
                f"{folder}: the comparison was made with plan {comparison.plan_digest[:12]}, but {PLAN_NAME} is plan "
                f"{plan.digest[:12]}; {_REMEDY}"
            )
        count = len(comparison.seeds) * comparison.images_per_call
        if len(comparison.images_full) != count or len(stored.captions) not in (0, count):
            raise ComparisonFormatError(
                f"{folder}: {len(comparison.images_full)} images and {len(stored.captions)} captions for "
                f"{len(comparison.seeds)} seeds of {comparison.images_per_call}; {_REMEDY}"
            )
        return stored

    def write_page(self, folder: str | Path) -> Path:
        """Write the report page into ``folder``; see :func:`difa_compile.report.write_report`."""
        return write_report(
            folder,
            plan=self.plan,
            comparison=self.comparison,
            records=self.comparison.records,
            title=self.title,
            machine=self.machine,
            versions=self.versions,
            command=self.command,
            captions=self.captions,
        )


_REMEDY = "run difa compare again"


def _read_comparison(value: object, images: tuple[Any, Any], where: str) -> Comparison:
    from difa_compile.capture import Record
    from difa_compile.compare import Comparison, Operations, Quality, Timing

    names = [
        field.name
        for field in fields(Comparison)
        if not field.name.startswith("images_f") and field.name != "images_planned"
    ]
    content = _keys(value, (*names, *_DERIVED), where)
    del content["speedup"]

    def timing(name: str) -> Timing:
        inner = _keys(
            content[name],
            ("call_seconds", "calls", "first_call", "seconds_per_step", "step_seconds"),
            f"{where}: {name}",
        )
        return Timing(_numbers(inner["calls"]), _number(inner["first_call"]), _numbers(inner["step_seconds"]))

    def operations(name: str) -> Operations:
        inner = _keys(content[name], ("share", "full_per_step", "planned_per_step"), f"{where}: {name}")
        return Operations(_whole(inner["full_per_step"]), tuple(map(_whole, inner["planned_per_step"])))

    quality = _keys(content["quality"], tuple(field.name for field in fields(Quality)), f"{where}: quality")
    identical, largest = _whole(quality.pop("identical")), _number(quality.pop("max_difference"))
    measured = {name: None if item is None else _number(item) for name, item in quality.items()}
    records = []
    for item in content["records"]:
        record = _keys(item, ("site", "decision", "outcome", "reason"), f"{where}: records")
        records.append(Record(**{name: _text(text) for name, text in record.items()}))
    return Comparison(
        plan_digest=_text(content["plan_digest"]),
        pipeline=_text(content["pipeline"]),
        device=_text(content["device"]),
        dtype=_text(content["dtype"]),
        backend_full=_text(content["backend_full"]),
        steps=_whole(content["steps"]),
        seeds=tuple(map(_whole, content["seeds"])),
        images_per_call=_whole(content["images_per_call"]),
        full=timing("full"),
        planned=timing("planned"),
        quality=Quality(identical=identical, max_difference=largest, **measured),
        cache_bytes=_whole(content["cache_bytes"]),
        attention=operations("attention"),
        with_projections=operations("with_projections"),
        records=tuple(records),
        images_full=images[0],
        images_planned=images[1],
    )


def _read_images(path: Path) -> tuple[Any, Any]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            full, planned = archive["full"], archive["planned"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ComparisonFormatError(f"{path} is missing or damaged ({error}); {_REMEDY}") from error
    if full.dtype != np.uint8 or full.ndim != 4 or planned.dtype != np.uint8 or full.shape != planned.shape:
        raise ComparisonFormatError(
            f"{path} holds {full.dtype} {full.shape} and {planned.dtype} {planned.shape}; expected two arrays "
            f"(N, H, W, C) of bytes; {_REMEDY}"
        )
    return full, planned


def _keys(value: object, names: tuple[str, ...], where: str) -> dict[str, Any]:
    """``value`` as a dictionary with exactly these keys."""
    if not isinstance(value, dict):
        raise ComparisonFormatError(f"{where} is not a JSON object; {_REMEDY}")
    missing, unknown = sorted(set(names) - set(value)), sorted(set(value) - set(names))
    if missing or unknown:
        parts = [f"{what} {', '.join(keys)}" for what, keys in (("lacks", missing), ("has unknown", unknown)) if keys]
        raise ComparisonFormatError(f"{where} {' and '.join(parts)}; {_REMEDY}")
    return dict(value)


def _typed(kind: type | tuple[type, ...], name: str) -> Callable[[object], Any]:
    def read(value: object) -> Any:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{value!r} is not {name}")
        return value

    return read


_text: Callable[[object], str] = _typed(str, "a text")
_whole: Callable[[object], int] = _typed(int, "a whole number")
_number: Callable[[object], float] = _typed((int, float), "a number")


def _numbers(values: object) -> tuple[float, ...]:
    if not isinstance(values, list) or not values:
        raise TypeError(f"{values!r} is not a list of numbers")
    return tuple(map(_number, values))
