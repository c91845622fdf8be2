"""What every benchmark shares: interleaved timing and the one format of a result file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

K = TypeVar("K")
Value = str | int | float | bool | None
Row = dict[str, Value]


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat of one case, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio_to(self, other: Timing) -> float:
        """Median over the rounds of this case's time over the other's in the same round.

        Rounds are interleaved, so that a slower spell of the machine falls on both sides of each ratio.
        """
        return statistics.median(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))

    def row(self) -> Row:
        return {
            "seconds": round(self.median, 5),
            "seconds_min": round(min(self.seconds), 5),
            "seconds_max": round(max(self.seconds), 5),
            "repeats": len(self.seconds),
        }


def interleave(cases: Mapping[K, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[K, Timing]:
    """Time each case ``repeats`` times: every round runs all cases once, starting with another one each round.

    ``warmup`` untimed rounds come first and take compilation with them. On CUDA the device is waited for.
    """
    names = list(cases)
    times: dict[K, list[float]] = {name: [] for name in names}
    for round_ in range(-warmup, repeats):
        start = round_ % len(names)
        for name in names[start:] + names[:start]:
            began = time.perf_counter()
            cases[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ >= 0:
                times[name].append(time.perf_counter() - began)
        label = f"round {round_ + 1} of {repeats}" if round_ >= 0 else "warm-up"
        print(f"  {label} done", file=sys.stderr, flush=True)
    return {name: Timing(tuple(values)) for name, values in times.items()}


def machine() -> dict[str, Value]:
    """The processor, cores, memory, threads in use and the load when asked, which tells of company on the machine."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    kib = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(kib / 2**20, 1),
        "torch_threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()}",
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("diffusers", "difa-compile", "numpy", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """The commit of the sources; ``-dirty`` is added when tracked sources differ from it, results aside."""
    try:
        head = _git("rev-parse", "HEAD")
        dirty = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!benchmarks/plans")
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return head + ("-dirty" if dirty else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def command_line(module: str, arguments: Sequence[str]) -> str:
    """What was run, but for where its result was put: a folder of one machine."""
    kept = list(arguments)
    if "--output" in kept:
        place = kept.index("--output")
        del kept[place : place + 2]
    return " ".join(["python", "-m", module, *kept])


def write_result(name: str, rows: Sequence[Row], *, folder: Path = RESULTS, script: str | None = None) -> Path:
    """Write ``folder/name.json`` whole or not at all, and print the rows as a table.

    ``script``: the benchmark that was run, if the result is not named after it.
    """
    module = f"benchmarks.{script or name}"
    record = {
        "benchmark": name,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "command": command_line(module, sys.argv[1:]),
        "rows": list(rows),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    fresh = path.with_suffix(".json.new")
    fresh.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    os.replace(fresh, path)
    print(table(rows))
    print(f"written to {path}")
    return path


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; columns in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _cell(value: Value) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
