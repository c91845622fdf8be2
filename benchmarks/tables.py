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

Rows = list[dict[str, Any]]
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
class Gain:
    """A row made of two rows of one result: ``planned`` against ``against``, both the first that hold these values.

    ``ratio`` is the key of ``planned`` that holds its time over that of ``against``, the median over the rounds.
    """

    result: str
    runs: str
    compared_with: str
    against: dict[str, Any]
    planned: dict[str, Any]
    ratio: str = "ratio_to_inductor"

    def cells(self, rows: Rows) -> dict[str, Any]:
        """What the columns ``GAINED`` show."""
        planned = first(rows, self.planned)
        against = first(rows, self.against | ({"group": planned["group"]} if "group" in planned else {}))
        return {
            "runs": self.runs,
            "compared_with": self.compared_with,
            "against_seconds": against["seconds"],
            "planned_seconds": planned["seconds"],
            "times_faster": 1 / planned[self.ratio],
            "psnr_db": planned.get("psnr_db"),
            "judged_right": planned.get("judged_right"),
        }


@dataclass(frozen=True)
class Gains:
    """A table of rows from several results."""

    rows: tuple[Gain, ...]

    @property
    def results(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(gain.result for gain in self.rows))


@dataclass(frozen=True)
class Aims:
    """What was aimed at, what is reached and by how much it is missed, all read from results.

    ``optional``: results that some aims are read from, and are told to be missing where they are.
    """

    results: tuple[str, ...] = ("planner", "planner_budgets", "demo_end_to_end")
    optional: tuple[str, ...] = ("planning",)

    def rows(self, found: dict[str, Rows]) -> Rows:
        """What the columns ``AIMED`` show."""
        budgets = found["planner_budgets"]
        return [
            *(over_the_best(budgets, budget) for budget in dict.fromkeys(row["budget"] for row in budgets)),
            *(
                aimed_at(budgets, budget, "psnr_db", wanted)
                for budget, wanted in ((0.2, 33.0), (0.3, 42.0), (0.5, 55.0))
            ),
            aimed_at(budgets, 0.2, "judged_right", 0.98),
            attention_alone(found["planner"], found["demo_end_to_end"]),
            *(at_most(found.get("planning", []), *aim) for aim in LONGEST),
        ]


LONGEST = (
    ("measuring, generations", "measure", "generations", 5.0),
    ("measuring with nothing compiled yet, generations", "measure, cold", "generations", 5.0),
    ("planning, s", "plan, budget 0.3", "seconds", 10.0),
)
"""Aim, case of ``planning``, key, and what it takes at most."""


def over_the_best(rows: Rows, budget: float) -> dict[str, Any]:
    """By how much ours are over the best of the others within a budget: in its own rounds, where they were timed in
    them, or else by what both have within the budget."""
    aim: dict[str, Any] = {"aim": f"dB over the best other tool within {budget:g} of the time", "wanted": 3.0}
    here = [row for row in rows if row["budget"] == budget and row.get("psnr_db") is not None]
    ours = [row["psnr_db"] for row in here if row["tool"] == "difa"]
    others = [row for row in here if not row["tool"].startswith("difa")]
    if not ours or not others:
        return aim | {"note": "none of ours is as quick" if not ours else "no other tool is as quick"}
    best = max(others, key=lambda row: row["psnr_db"])
    gain = best.get("ours_over_it_db")
    return judged(aim | {"note": best["case"]}, max(ours) - best["psnr_db"] if gain is None else gain)


def aimed_at(rows: Rows, budget: float, key: str, wanted: float) -> dict[str, Any]:
    name = {"psnr_db": "PSNR in dB", "judged_right": "judged right"}[key]
    aim: dict[str, Any] = {"aim": f"{name} within {budget:g} of the time", "wanted": wanted}
    ours = [row for row in rows if (row["budget"], row.get("tool")) == (budget, "difa") and row.get(key) is not None]
    if not ours:
        return aim | {"note": "none of ours is as quick"}
    return judged(aim | {"note": ours[0]["case"]}, ours[0][key])


def attention_alone(planner: Rows, thresholds: Rows) -> dict[str, Any]:
    """The least share of the attention's operations at 33 dB, of plans in which every block is computed."""
    aim: dict[str, Any] = {"aim": "attention alone: its operations at 33 dB", "wanted": 0.15}
    found = [row for row in planner if row.get("tool", "").startswith("difa, ")] + thresholds
    kept = [row for row in found if (row.get("psnr_db") or 0) >= 33 and row.get("attention_flops_share") is not None]
    if not kept:
        return aim | {"note": "no such plan comes to 33 dB"}
    least = min(kept, key=lambda row: row["attention_flops_share"])
    return judged(aim | {"note": least["case"]}, least["attention_flops_share"], most=True)


def at_most(rows: Rows, name: str, case: str, key: str, wanted: float) -> dict[str, Any]:
    aim: dict[str, Any] = {"aim": name, "wanted": wanted}
    row = next((row for row in rows if row["case"] == case), None)
    return (
        judged(aim, row[key], most=True) if row else aim | {"note": "not measured yet: `python -m benchmarks.planning`"}
    )


def judged(aim: dict[str, Any], reached: float, most: bool = False) -> dict[str, Any]:
    """An aim with what is reached; ``most``: where less is better. Both are compared as they are shown."""
    off = round(reached - aim["wanted"] if most else aim["wanted"] - reached, 4)
    return aim | {"reached": reached, "missed": off if off > 0 else None}


def first(rows: Rows, wanted: dict[str, Any]) -> dict[str, Any]:
    """The first row with these values. Raises ``ValueError`` naming them if there is none."""
    found = next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)
    if found is None:
        raise ValueError(f"no row of the result has {wanted}; run the benchmark with the cases that tables need")
    return found


Table = tuple[Column, ...] | Gains | Aims
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
RECIPE = (
    CASE,
    SECONDS,
    TO_INDUCTOR,
    Column("psnr_db", "PSNR (dB)", ".1f"),
    Column("ssim", "SSIM", ".3f"),
    Column("frechet_to_full", "Fréchet to full", ".2f"),
    Column("judged_right", "judged right", ".1%"),
)
BESIDE = (
    Column("ours_at_equal_time_db", "ours at equal time (dB)", ".1f"),
    Column("ours_over_it_db", "ours over it (dB)", "+.1f"),
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
GAINED = (
    Column("runs", "what runs"),
    Column("compared_with", "compared with"),
    Column("against_seconds", "s", ".2f"),
    Column("planned_seconds", "difa, s", ".2f"),
    Column("times_faster", "× faster", ".2f"),
    Column("psnr_db", "PSNR (dB)", ".1f"),
    Column("judged_right", "judged right", ".0%"),
)
AIMED = (
    Column("aim", "aim"),
    Column("wanted", "wanted", ".4g"),
    Column("reached", "reached", ".3g"),
    Column("missed", "missed by", ".2g"),
    Column("note", "by, or against"),
)
PLAIN = "`torch.compile`"


def budget_gain(budget: str) -> Gain:
    """Of a plan, by what whole calls take where it was timed among all of ours, not where it stands beside others."""
    planned = {"case": f"difa, planner-budget-{budget}-steps-50", "beside": False}
    runs = f"demo model, plan made for {budget} of the time"
    return Gain("planner", runs, PLAIN, {"case": "inductor, full"}, planned, "ratio_of_calls")


def attention_gain(threshold: str) -> Gain:
    case = f"difa, threshold {threshold}"
    runs = f"demo model, attention alone, threshold {threshold}"
    return Gain("demo_end_to_end", runs, PLAIN, {"case": "inductor, full"}, {"case": case})


def step_gain(model: str, size: str, runs: str) -> Gain:
    one = {"model": model, "size": size}
    planned = one | {"case": "difa, disc + residual, reuse"}
    return Gain("end_to_end", runs, PLAIN, one | {"case": "inductor, full"}, planned)


README: dict[str, Table] = {
    "gains": Gains(
        (
            budget_gain("0.5"),
            budget_gain("0.3"),
            budget_gain("0.2"),
            attention_gain("0.1"),
            Gain(
                "published_form",
                "demo model, DiTFastAttn's choice",
                "the same plan, run eagerly",
                {"case": "processors, planned", "batch": 8},
                {"case": "difa, planned", "batch": 8},
                "ratio_to_processors",
            ),
            step_gain("FLUX", "2048 px", "step, FLUX, 2048 px"),
            step_gain("PixArt", "2048 px", "step, PixArt, 2048 px"),
            step_gain("Wan", "13 frames of 1024 x 1024", "step, Wan, 13 frames of 1024 px"),
        )
    ),
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
    "planner_budgets": (
        Column("budget", "at most × inductor", ".1f"),
        Column("tool", "tool"),
        *RECIPE,
        *BESIDE,
    ),
    "aims": Aims(),
    "planning": (
        CASE,
        Column("seconds", "s", ".3g"),
        Column("generations", "generations", ".1f"),
        Column("cpu_seconds", "of the processors, s", ".3g"),
        Column("repeats", "repeats"),
    ),
    "planner": (
        *RECIPE,
        Column("group", "group"),
        Column("ratio_of_calls", "of calls", ".3f"),
        Column("promised_ratio", "said", ".3f"),
        *BESIDE,
        Column("repeats", "repeats"),
        Column("images", "images"),
        Column("attention_flops_share", "attention FLOPs", ".1%"),
        Column("distinct_rows", "distinct rows"),
        Column("psnr_mean_db", "mean PSNR (dB)", ".1f"),
        Column("judge_agrees_with_full", "judge agrees", ".1%"),
        Column("seconds_min", "min s", ".2f"),
        Column("seconds_max", "max s", ".2f"),
        Column("version", "version"),
        Column("settings", "settings"),
        Column("note", "note"),
    ),
    "bundle": (
        CASE,
        Column("engines", "engines"),
        Column("work", "work", ".2f"),
        Column("seconds_1", "1 image, s", ".2f"),
        Column("times_full_1", "× full", ".2f"),
        Column("seconds_8", "8 images, s", ".2f"),
        Column("times_full_8", "× full", ".2f"),
        Column("export_seconds", "export, s", ".0f"),
        Column("load_seconds", "load, s", ".2f"),
        Column("first_call_seconds", "load and first call, s", ".2f"),
        Column("bytes", "bytes in all", ",d"),
        Column("weights_bytes", "of weights", ",d"),
        Column("rss_bytes", "resident", ",d"),
        Column("anonymous_bytes", "anonymous", ",d"),
        Column("switching", "switching", ".1%"),
        Column("outside", "outside", ".1%"),
    ),
    "parity": (
        Column("model", "model"),
        Column("dtype", "dtype"),
        Column("runtime", "runtime"),
        Column("final", "final latents", ".1e"),
        Column("worst_step", "worst step", ".1e"),
        Column("commit", "commit"),
    ),
    "plain_attention": (
        Column("tokens", "tokens"),
        Column("window", "window"),
        Column("share", "share", ".2f"),
        Column("dense_seconds", "dense, s", ".4f"),
        Column("masked_seconds", "masked, s", ".4f"),
        Column("tiled_seconds", "tiles, s", ".4f"),
        Column("tiled_to_masked", "tiles / masked", ".2f"),
    ),
    "travel": (
        CASE,
        Column("budget", "budget", ".1f"),
        Column("computed", "computed", ".0%"),
        Column("psnr_db", "PSNR (dB)", ".1f"),
        Column("computed_from_table", "computed, from the table", ".0%"),
        Column("psnr_from_table_db", "PSNR (dB), from the table", ".1f"),
        Column("computed_made_there", "computed, made there", ".0%"),
        Column("psnr_made_there_db", "PSNR (dB), made there", ".1f"),
        Column("images", "images"),
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
        Column("blocks", "blocks"),
        Column("streams", "streams"),
        Column("block_reuse", "blocks reused", ".0e"),
        Column("spans", "spans"),
        Column("span_reuse", "spans reused", ".0e"),
        Column("reason", "reason"),
    ),
}
DOCUMENTS = {ROOT / "README.md": README, ROOT / "benchmarks" / "README.md": DETAILS}


def lines(columns: tuple[Column, ...], rows: Rows) -> str:
    """A Markdown table, the first column left-aligned."""
    table = [[column.heading for column in columns], ["---", *["---:"] * (len(columns) - 1)]]
    table += [[column.cell(row) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def where(result: dict[str, Any]) -> str:
    return f"torch {result['versions']['torch']}, {result['machine']['cores']} cores of {result['machine']['cpu']}."


def rendered(columns: tuple[Column, ...], result: dict[str, Any]) -> str:
    """The rows as a Markdown table, and a line that says where and when they were measured."""
    origin = f"`{result['command']}`, {result['date'][:10]}, commit {result['commit'][:12]}, {where(result)}"
    return f"{lines(columns, result['rows'])}\n\n{origin}\n"


def gained(gains: Gains, results: dict[str, dict[str, Any]]) -> str:
    """One row for each gain, and a line that says which results they are from and where those were measured."""
    table = lines(GAINED, [gain.cells(results[gain.result]["rows"]) for gain in gains.rows])
    return f"{table}\n\n{places(results)}\n"


def places(results: dict[str, dict[str, Any]]) -> str:
    """Lines that say which results figures are from and where those were measured."""
    found: dict[str, list[str]] = {}
    for name, result in results.items():
        found.setdefault(where(result), []).append(f"`{name}`")
    return "\n".join(f"From {', '.join(names)}: {place}" for place, names in found.items())


def filled(document: str, tables: dict[str, Table], results: Path = RESULTS) -> str:
    """``document`` with each marked section made from its result files; one that lacks a result says so."""

    def section(match: re.Match[str]) -> str:
        table = tables[match[2]]
        names = (match[2],) if isinstance(table, tuple) else table.results
        missing = [name for name in names if not (results / f"{name}.json").exists()]
        if missing:
            scripts = dict.fromkeys(name.removesuffix("_budgets") for name in missing)  # one script may write two
            return match[1] + "".join(f"*Not measured yet: `python -m benchmarks.{n}`.*\n" for n in scripts) + match[4]
        found = {name: json.loads((results / f"{name}.json").read_text()) for name in names}
        if isinstance(table, Aims):
            optional = [name for name in table.optional if (results / f"{name}.json").exists()]
            found |= {name: json.loads((results / f"{name}.json").read_text()) for name in optional}
            aims = table.rows({name: result["rows"] for name, result in found.items()})
            return f"{match[1]}{lines(AIMED, aims)}\n\n{places(found)}\n{match[4]}"
        text = gained(table, found) if isinstance(table, Gains) else rendered(table, found[match[2]])
        return match[1] + text + match[4]

    return SECTION.sub(section, document)


def main() -> None:
    for path, tables in DOCUMENTS.items():
        fresh = path.with_name(path.name + ".new")
        fresh.write_text(filled(path.read_text(), tables))
        os.replace(fresh, path)
        print(f"filled {path}")


if __name__ == "__main__":
    main()
