"""A comparison as a folder, so that its page can be made again: ``plan.json``, ``comparison.json``, ``images.npz``.

``comparison.json`` is framed and guarded as plans are (:mod:`difa_compile.files.documents`), and binds the other two by
their digests, so that three files make one comparison or none.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from difa_compile.errors import ComparisonFormatError
from difa_compile.files.documents import (
    ARCHIVE_ERRORS,
    Format,
    Unfit,
    as_list,
    as_mapping,
    as_number,
    as_object,
    as_text,
    as_whole,
    open_plain,
)
from difa_compile.files.writing import write_together
from difa_compile.plan.plan import Plan
from difa_compile.report.write import write_report
from difa_compile.wording import shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from difa_compile.comparison.compare import Comparison, Operations, Timing
    from difa_compile.comparison.front import Point

SCHEMA_VERSION = 3
PLAN_NAME, COMPARISON_NAME, IMAGES_NAME = "plan.json", "comparison.json", "images.npz"
MOST_IMAGE_BYTES = 2**34
"""Of all images, unpacked: ten thousand of a megapixel on either side do not fit into the page's arithmetic anyway."""
MOST_DRAWN = 1000
"""Of a front, shares of the full model's time and decibels."""

COMPARISON = Format(
    name="comparison",
    version_key="schema_version",
    version=SCHEMA_VERSION,
    keys=("title", "command", "machine", "versions", "captions", "images", "front", "comparison"),
    most_bytes=2**28,
    damaged=ComparisonFormatError,
    other_version=ComparisonFormatError,
    edited=ComparisonFormatError,
    where_from="name a folder written by difa compare or difa demo",
    again="run difa compare again",
)
_IMAGES = replace(COMPARISON, name="archive of images")


@dataclass(frozen=True)
class StoredComparison:
    """A plan, what was measured with it, and where it was measured: all that the page shows.

    ``captions``: one per image in the order of the comparison, or none. ``front``: other plans that were run.
    """

    plan: Plan
    comparison: Comparison
    title: str
    command: str
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    captions: tuple[str, ...] = ()
    front: tuple[Point, ...] = ()

    def __post_init__(self) -> None:
        """Text as it can be written: a command line may hold bytes that are no UTF-8."""
        for name in ("title", "command"):
            object.__setattr__(self, name, _writable(getattr(self, name)))
        for name in ("machine", "versions"):
            pairs = getattr(self, name).items()
            object.__setattr__(self, name, {_writable(key): _writable(value) for key, value in pairs})
        object.__setattr__(self, "captions", tuple(map(_writable, self.captions)))

    def save(self, folder: str | Path) -> None:
        """Write the three files, each whole or not at all. Raises :class:`OutputError`."""
        import numpy as np

        folder = Path(folder)
        archive = io.BytesIO()
        arrays = self.comparison.images_full, self.comparison.images_planned
        full, planned = (np.ascontiguousarray(array) for array in arrays)
        np.savez_compressed(archive, full=full, planned=planned)
        images = archive.getvalue()
        content = {
            "title": self.title,
            "command": self.command,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "captions": list(self.captions),
            "images": hashlib.sha256(images).hexdigest(),
            "front": [point.to_json() for point in self.front],
            "comparison": self.comparison.to_json(),
        }
        text = json.dumps(COMPARISON.frame(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        write_together(
            {
                folder / IMAGES_NAME: images,
                folder / PLAN_NAME: self.plan.to_json(),
                folder / COMPARISON_NAME: text,
            },
            "the comparison",
        )

    @classmethod
    def load(cls, folder: str | Path) -> StoredComparison:
        """The inverse of :meth:`save`.

        Raises :class:`ComparisonFormatError` if a file is missing, damaged, edited or of another schema, or if plan or
        images are not those that were compared, and what :meth:`Plan.load` raises.
        """
        folder = Path(folder)
        path = folder / COMPARISON_NAME
        outer = COMPARISON.parse(COMPARISON.read_bytes(path), path)
        with COMPARISON.reading(path):
            read = _read_comparison(outer["comparison"])
            texts = {name: as_text(outer[name], name) for name in ("title", "command", "images")}
            tables = {
                name: {
                    key: as_text(item, f"{name}.{shown(key, 60)}")
                    for key, item in as_mapping(outer[name], name).items()
                }
                for name in ("machine", "versions")
            }
            captions = tuple(as_text(item, "captions") for item in as_list(outer["captions"], "captions"))
            front = tuple(_read_point(item, f"front[{i}]") for i, item in enumerate(as_list(outer["front"], "front")))
            count = len(read["seeds"]) * read["images_per_call"]
            if len(captions) not in (0, count):
                raise Unfit(f"captions has {len(captions)} entries for {count} images")
        COMPARISON.check_digest(outer, {name: outer[name] for name in COMPARISON.keys}, path)
        plan = Plan.load(folder / PLAN_NAME)
        if read["plan_digest"] != plan.digest:
            made_with = shown(read["plan_digest"][:12])
            raise ComparisonFormatError(
                f"{shown(folder)}: the comparison was made with plan {made_with}, but {PLAN_NAME} is plan "
                f"{plan.digest[:12]}; {COMPARISON.remedy}"
            )
        full, planned = _read_images(folder / IMAGES_NAME, texts["images"], count)
        from difa_compile.comparison.compare import Comparison

        comparison = Comparison(**read, images_full=full, images_planned=planned)
        return cls(
            plan, comparison, texts["title"], texts["command"], tables["machine"], tables["versions"], captions, front
        )

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
            front=self.front,
        )


def _writable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _read_comparison(value: object) -> dict[str, Any]:
    """The fields of a :class:`Comparison`, but for the images. Raises ``ValueError``."""
    from difa_compile.backend.verdicts import Record
    from difa_compile.comparison.compare import Comparison, Quality

    images = ("images_full", "images_planned")
    names = [field.name for field in fields(Comparison) if field.name not in images]
    content = as_object(value, "comparison", (*names, "speedup"))
    as_number(content["speedup"], "comparison.speedup")  # follows from the times; it stands there for other readers

    def text(name: str) -> str:
        return as_text(content[name], f"comparison.{name}")

    def whole(name: str, at_least: int) -> int:
        return as_whole(content[name], f"comparison.{name}", at_least)

    names = [field.name for field in fields(Quality)]
    quality = dict(as_object(content["quality"], "comparison.quality", tuple(names)))
    identical = as_whole(quality.pop("identical"), "comparison.quality.identical", 0)
    largest = as_number(quality.pop("max_difference"), "comparison.quality.max_difference")
    measured = {
        name: None if item is None else as_number(item, f"comparison.quality.{name}") for name, item in quality.items()
    }
    records = []
    for index, item in enumerate(as_list(content["records"], "comparison.records")):
        where = f"comparison.records[{index}]"
        record = as_object(item, where, ("site", "decision", "outcome", "reason"))
        records.append(Record(**{name: as_text(entry, f"{where}.{name}") for name, entry in record.items()}))
    seeds = as_list(content["seeds"], "comparison.seeds", at_least=1)
    return {
        "plan_digest": text("plan_digest"),
        "pipeline": text("pipeline"),
        "device": text("device"),
        "dtype": text("dtype"),
        "backend_full": text("backend_full"),
        "steps": whole("steps", 1),
        "seeds": tuple(as_whole(seed, "comparison.seeds") for seed in seeds),
        "images_per_call": whole("images_per_call", 1),
        "full": _read_timing(content["full"], "comparison.full"),
        "planned": _read_timing(content["planned"], "comparison.planned"),
        "quality": Quality(identical, largest, **measured),
        "cache_bytes": whole("cache_bytes", 0),
        "attention": _read_operations(content["attention"], "comparison.attention"),
        "with_projections": _read_operations(content["with_projections"], "comparison.with_projections"),
        "records": tuple(records),
    }


def _read_point(value: object, where: str) -> Point:
    from difa_compile.comparison.front import Origin, Point

    content = as_object(value, where, ("name", "origin", "share", "psnr"))
    share = as_number(content["share"], f"{where}.share", above=0)
    psnr = None if content["psnr"] is None else as_number(content["psnr"], f"{where}.psnr")
    if share > MOST_DRAWN or abs(psnr or 0) > MOST_DRAWN:
        raise Unfit(f"{where} is out of the chart: at most {MOST_DRAWN} times full's time, and as many dB, are drawn")
    return Point(
        as_text(content["name"], f"{where}.name"), Origin(as_text(content["origin"], f"{where}.origin")), share, psnr
    )


def _read_timing(value: object, where: str) -> Timing:
    from difa_compile.comparison.compare import Timing

    content = as_object(value, where, ("call_seconds", "calls", "first_call", "seconds_per_step", "step_seconds"))

    def seconds(name: str) -> tuple[float, ...]:
        items = as_list(content[name], f"{where}.{name}", at_least=1)
        return tuple(as_number(item, f"{where}.{name}", above=0) for item in items)

    for name in ("call_seconds", "seconds_per_step"):  # follow from the others
        as_number(content[name], f"{where}.{name}")
    return Timing(seconds("calls"), as_number(content["first_call"], f"{where}.first_call"), seconds("step_seconds"))


def _read_operations(value: object, where: str) -> Operations:
    from difa_compile.comparison.compare import Operations

    content = as_object(value, where, ("share", "full_per_step", "planned_per_step"))
    as_number(content["share"], f"{where}.share")  # follows from the others
    planned = as_list(content["planned_per_step"], f"{where}.planned_per_step", at_least=1)
    return Operations(
        as_whole(content["full_per_step"], f"{where}.full_per_step", at_least=1),
        tuple(as_whole(item, f"{where}.planned_per_step", at_least=0) for item in planned),
    )


# --- images ----------------------------------------------------------------------------------------------------------


def _read_images(path: Path, digest: str, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Full and planned images of the archive with this SHA-256: (count, H, W, C) each, C 1 or 3."""
    with _IMAGES.reading(path, also=ARCHIVE_ERRORS), open_plain(path, MOST_IMAGE_BYTES) as file:
        running = hashlib.sha256()
        while block := file.read(2**20):
            running.update(block)
        if running.hexdigest() != digest:
            raise Unfit(f"these are not the images of {COMPARISON_NAME} beside it, or they were changed")
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            if sorted(archive.namelist()) != ["full.npy", "planned.npy"]:
                raise Unfit(f"it holds {shown(archive.namelist())}, not full.npy and planned.npy")
            full, planned = (_read_array(archive, f"{name}.npy", count) for name in ("full", "planned"))
        if full.shape != planned.shape:
            raise Unfit(f"images of {full.shape} cannot be compared with images of {planned.shape}")
        return full, planned


_HEADER = re.compile(
    rb"\{'descr': '\|u1', 'fortran_order': False, 'shape': \(" + rb", ".join([rb"(\d{1,9})"] * 4) + rb"\), \} *\n"
)
"""Of a member, after ten bytes of magic, version and length: what NumPy writes for four-dimensional bytes."""


def _read_array(archive: zipfile.ZipFile, name: str, count: int) -> NDArray[np.uint8]:
    """One member, bytes in four dimensions. NumPy's own reader takes other types, objects among them, and any size."""
    import numpy as np

    with archive.open(name) as member:
        start = member.read(10)
        header = _HEADER.fullmatch(member.read(int.from_bytes(start[8:], "little")))
        if start[:8] != b"\x93NUMPY\x01\x00" or header is None:
            raise Unfit(f"{name} is no array of bytes in four dimensions")
        shape = tuple(map(int, header.groups()))
        if shape[0] != count or min(shape) < 1 or shape[3] not in (1, 3) or math.prod(shape) > MOST_IMAGE_BYTES // 2:
            raise Unfit(f"{name} has the shape {shape}; expected ({count}, H, W, 1 or 3)")
        array = np.empty(shape, np.uint8)
        _fill(array.data.cast("B"), member, name)
        return array


def _fill(room: memoryview, member: IO[bytes], name: str) -> None:
    """Fill ``room`` with all of ``member``, which must have exactly its size. Memory grows with what comes."""
    filled = 0
    while block := member.read(2**20):
        if filled + len(block) > len(room):
            raise Unfit(f"{name} goes on after its {len(room)} bytes")
        room[filled : filled + len(block)] = block
        filled += len(block)
    if filled != len(room):
        raise Unfit(f"{name} ends after {filled} of {len(room)} bytes")
