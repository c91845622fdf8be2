"""Write the tables of README.md and benchmarks/README.md from the result files: ``python -m benchmarks.tables``.

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table -->``; a test compares it with ``results/NAME.json``,
so that no figure in a document is older than its result.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._common import RESULTS, ROOT

SECTION = re.compile(r"(<!-- table:(\w+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


@dataclass(frozen=True)
class Column:
    """``key`` of a row, the heading above it, and how a number is written (a format specification)."""

    key: str
    heading: str
    form: str = ""

    def cell(self, row: dict[str, Any]) -> str:
        value = row.get(self.key)
        return "–" if value is None else format(value, "" if isinstance(value, str) else self.form).replace("|", "\\|")


@dataclass(frozen=True)
class Excerpt:
    """A table of those rows only whose values are among the ones wanted."""

    columns: tuple[Column, ...]
    wanted: dict[str, tuple[Any, ...]]

    def keeps(self, row: dict[str, Any]) -> bool:
        return all(row.get(key) in values for key, values in self.wanted.items())


Table = tuple[Column, ...] | Excerpt
CASE = Column("case", "case")
SECONDS = Column("seconds", "s", ".2f")
TO_INDUCTOR = Column("ratio_to_inductor", "× inductor", ".3f")
SHARES = (
    Column("attention_flops_share", "attention FLOPs", ".1%"),
    Column("attention_flops_share_with_projections", "with projections", ".1%"),
)
ATTENTION = (
    Column("dtype", "dtype"),
    Column("tokens", "tokens", ",d"),
    Column("window", "window"),
    Column("implementation", "computed by"),
    Column("seconds", "s", ".4g"),
    Column("speedup_over_dense", "× faster than dense", ".2f"),
    Column("visible_gflops", "GFLOP/s, visible pairs", ".0f"),
    Column("share_of_product", "of the matrix product's", ".0%"),
)
LINEARITY = (
    Column("dtype", "dtype"),
    Column("window", "window"),
    Column("tokens", "tokens", ",d"),
    Column("time_over_a_quarter", "× time", ".2f"),
    Column("pairs_over_a_quarter", "× visible pairs", ".2f"),
)
BATCHES = (
    CASE,
    Column("batch", "images"),
    Column("first_seconds", "first call, s", ".1f"),
    Column("seconds", "later calls, s", ".2f"),
    TO_INDUCTOR,
)
STEP = (
    Column("model", "shaped like"),
    Column("size", "size"),
    Column("tokens", "tokens", ",d"),
    CASE,
    Column("seconds", "s per step", ".3f"),
    Column("speedup", "× faster", ".2f"),
)
DEMO = (
    CASE,
    SECONDS,
    TO_INDUCTOR,
    *SHARES,
    Column("psnr_db", "PSNR (dB)", ".1f"),
    Column("ssim", "SSIM", ".3f"),
    Column("frechet_to_real", "Fréchet to real", ".2f"),
    Column("judged_right", "judged right", ".1%"),
)
PUBLISHED = (
    CASE,
    Column("batch", "images"),
    SECONDS,
    Column("ratio_to_processors", "× processors", ".3f"),
    TO_INDUCTOR,
)
COMPILE = (
    CASE,
    Column("distinct_rows", "distinct rows"),
    Column("compile_seconds", "compile s", ".1f"),
    TO_INDUCTOR,
)
README: dict[str, Table] = {
    "attention": Excerpt(
        ATTENTION[:6],
        {
            "implementation": ("SDPA, dense", "FlexAttention, row-major", "FlexAttention, tiles", "difa CPU kernel"),
            "dtype": ("float32",),
            "tokens": (4096, 16384),
            "window": ("disc:8", "disc:16", None),
            "head_dim": (64,),
        },
    ),
    "end_to_end": STEP,
    "demo_end_to_end": DEMO,
    "published_form": PUBLISHED,
    "compile_time": COMPILE,
}
DETAILS: dict[str, Table] = {
    "attention": (
        *ATTENTION,
        Column("heads", "heads"),
        Column("head_dim", "head dim"),
        Column("text_tokens", "text"),
        Column("forward_error", "error", ".0e"),
        Column("repeats", "repeats"),
    ),
    "attention_linearity": LINEARITY,
    "end_to_end": (
        *STEP,
        Column("dtype", "dtype"),
        Column("steps", "steps"),
        Column("attention_flops_share", "attention FLOPs", ".1%"),
        Column("repeats", "repeats"),
    ),
    "batch_sizes": (*BATCHES, Column("ratio_to_planned", "× difa, per size", ".3f"), Column("repeats", "repeats")),
    "demo_end_to_end": (
        *DEMO,
        Column("frechet_to_full", "Fréchet to full", ".2f"),
        Column("judge_agrees_with_full", "judge agrees", ".1%"),
        Column("distinct_rows", "distinct rows"),
        Column("cache_peak_bytes", "cache bytes", ",d"),
        Column("seconds_min", "min s", ".2f"),
        Column("seconds_max", "max s", ".2f"),
    ),
    "published_form": (
        *PUBLISHED,
        *SHARES,
        Column("least_psnr_between_planned_db", "PSNR between (dB)", ".0f"),
        Column("seconds_min", "min s", ".2f"),
        Column("seconds_max", "max s", ".2f"),
    ),
    "compile_time": (
        *COMPILE,
        Column("compile_seconds_min", "min s", ".1f"),
        Column("compile_seconds_max", "max s", ".1f"),
    ),
    "deep_models": (
        Column("model", "model"),
        CASE,
        Column("sites", "sites"),
        Column("compile_seconds", "compile s", ".1f"),
        TO_INDUCTOR,
        SECONDS,
        Column("overhead", "overhead", ".1%"),
        Column("seconds_min", "min s", ".2f"),
        Column("seconds_max", "max s", ".2f"),
    ),
    "triton_aot": (
        Column("arch", "architecture"),
        Column("dtype", "dtype"),
        Column("head_dim", "head dim"),
        Column("window", "window"),
        Column("form", "output"),
        Column("mask", "mask"),
        Column("tile", "tile"),
        Column("patch", "patch"),
        Column("warps", "warps"),
        Column("stages", "stages"),
        Column("registers", "registers"),
        Column("local_bytes", "spilled bytes"),
        Column("shared_bytes", "shared bytes", ",d"),
    ),
    "cost_model": (
        Column("dtype", "dtype"),
        Column("batch", "batch"),
        Column("heads", "heads"),
        Column("head_dim", "head dim"),
        Column("layout", "layout"),
        Column("window", "window"),
        Column("predicted_ms", "predicted ms", ".3g"),
        Column("measured_ms", "measured ms", ".3g"),
        Column("error", "error", "+.1%"),
        Column("speedup", "full / window", ".2f"),
        Column("verdict", "quicker one"),
    ),
    "model_survey": (
        Column("class", "class"),
        Column("sites", "sites"),
        Column("other_attention", "other attention"),
        Column("layout", "layout"),
        Column("reuse", "reuse", ".0e"),
        Column("cfg", "CFG share", ".0e"),
        Column("window", "window", ".0e"),
        Column("window_residual", "with residual", ".0e"),
        Column("disc", "disc", ".0e"),
        Column("reason", "reason"),
    ),
}
DOCUMENTS = {ROOT / "README.md": README, ROOT / "benchmarks" / "README.md": DETAILS}


def render(result: dict[str, Any], table: Table) -> str:
    """The rows as a Markdown table, and a line that says where and when they were measured."""
    columns = table.columns if isinstance(table, Excerpt) else table
    rows = [row for row in result["rows"] if not isinstance(table, Excerpt) or table.keeps(row)]
    lines = [[column.heading for column in columns], ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[column.cell(row) for column in columns] for row in rows]
    machine = result["machine"]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    source = (
        f"`{result['command']}`, {result['date'][:10]}, commit {result['commit'][:12]}, torch "
        f"{result['versions']['torch']}, {machine['cores']} cores of {machine['cpu']}."
    )
    return f"{text}\n\n{source}\n"


def filled(document: str, tables: dict[str, Table], results: Path = RESULTS) -> str:
    """``document`` with each marked section made from its result file; one without a result says so."""

    def section(match: re.Match[str]) -> str:
        path = results / f"{match[2]}.json"
        if not path.exists():
            return f"{match[1]}*Not measured yet: `python -m benchmarks.{match[2]}`.*\n{match[4]}"
        result = json.loads(path.read_text())
        return match[1] + render(result, tables[match[2]]) + match[4]

    return SECTION.sub(section, document)


def main() -> None:
    for path, tables in DOCUMENTS.items():
        fresh = path.with_name(path.name + ".new")
        fresh.write_text(filled(path.read_text(), tables))
        os.replace(fresh, path)
        print(f"filled {path}")


if __name__ == "__main__":
    main()
