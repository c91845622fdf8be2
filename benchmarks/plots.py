"""Draw the plots of benchmarks/README.md from the result files: ``python -m benchmarks.plots``.

Each is an SVG beside the JSON it shows, written anew at every run and the same for the same results.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ._common import RESULTS

DENSE, OURS = "SDPA, dense", "difa CPU kernel"
COLOURS = {
    DENSE: "#444444",
    OURS: "#c1272d",
    "FlexAttention, row-major": "#7ea6c9",
    "FlexAttention, tiles": "#1f5f99",
    "gathered tiles, SDPA": "#5a9e5a",
    "SDPA, masked": "#b9a44c",
}
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
Rows = list[dict[str, Any]]


def select(rows: Rows, **wanted: object) -> Rows:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def time_over_tokens(rows: Rows) -> Figure:
    """Milliseconds per head over the number of tokens, disc of radius 8."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for panel, dtype in zip(panels, ("float32", "bfloat16"), strict=True):
        for name, colour in COLOURS.items():
            window = None if name == DENSE else "disc:8"
            found = select(rows, dtype=dtype, implementation=name, window=window, text_tokens=0, head_dim=64)
            points = sorted((row["tokens"], 1e3 * row["seconds"] / row["heads"]) for row in found)
            if points:
                panel.plot(*zip(*points, strict=True), "o-", color=colour, label=name, markersize=3.5, linewidth=1.4)
        finish(panel, dtype, "tokens", "ms per head" if dtype == "float32" else "")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
    return with_legend(figure)


def speedup_over_radius(rows: Rows) -> Figure:
    """Speed-up over dense attention for r = 8, 16, 32 at 4096 and 16384 tokens."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for panel, dtype in zip(panels, ("float32", "bfloat16"), strict=True):
        for tokens, style in ((4096, "o--"), (16384, "o-")):
            for name, colour in COLOURS.items():
                found = select(rows, dtype=dtype, implementation=name, tokens=tokens, head_dim=64)
                points = [
                    (int(row["window"].split(":")[1]), row["speedup_over_dense"])
                    for row in found
                    if (row["window"] or "").startswith("disc")
                ]
                if points:
                    label = name if style == "o-" or name == "SDPA, masked" else None
                    panel.plot(*zip(*sorted(points), strict=True), style, color=colour, label=label, markersize=3.5)
        panel.axhline(1, color="#444444", linewidth=0.8)
        finish(panel, dtype, "radius of the disc", "× dense SDPA" if dtype == "float32" else "")
        panel.set_yscale("log")
        panel.set_xticks([8, 16, 32], ["8", "16", "32"])
    return with_legend(figure, "solid: 16384 tokens, dashed: 4096")


def roofline(rows: Rows) -> Figure:
    """Operations per second on visible pairs over visible keys per query, under the rates of products and of memory.

    Reading queries, keys and values and writing the output once moves as many bytes per query as four elements per
    channel have, for four operations per channel and visible key: keys per query over the bytes of an element is the
    arithmetic intensity.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for panel, dtype in zip(panels, ("float32", "bfloat16"), strict=True):
        for name, colour in COLOURS.items():
            points = sorted(
                (row["visible_gflops"] * 1e9 * row["seconds"] / (4 * row["heads"] * row["head_dim"] * row["tokens"]),
                 row["visible_gflops"])
                for row in select(rows, dtype=dtype, implementation=name)
                if row["visible_gflops"]
            )  # fmt: skip
            if points:
                panel.plot(*zip(*points, strict=True), "o", color=colour, label=name, markersize=3.5)
        for row in select(rows, dtype=dtype, implementation="matrix product"):
            panel.axhline(row["visible_gflops"], color="#444444", linewidth=0.8)
            panel.annotate("torch's matrix product", (0.02, row["visible_gflops"]), xycoords=("axes fraction", "data"),
                           fontsize=7, va="bottom")  # fmt: skip
            for copy in select(rows, implementation="memory copy"):
                ridge = row["visible_gflops"] / copy["gigabytes_per_second"] * ELEMENT_BYTES[dtype]
                panel.plot([ridge / 8, ridge], [row["visible_gflops"] / 8, row["visible_gflops"]], color="#444444",
                           linewidth=0.8, linestyle="--")  # fmt: skip
                panel.annotate("memory", (ridge / 8, row["visible_gflops"] / 8), fontsize=7, va="top")
        finish(panel, dtype, "visible keys per query", "GFLOP/s on visible pairs" if dtype == "float32" else "")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
    return with_legend(figure)


TOOLS = {"difa": "#c1272d", "cache-dit": "#1f5f99", "diffusers": "#5a9e5a", "uniform": "#8d8d8d"}


def quality_over_time(rows: Rows) -> Figure:
    """PSNR over the share of inductor's time, one point for each recipe; a tool's best are joined."""
    figure, panel = plt.subplots(1, 1, figsize=(9, 4.6))
    for tool, colour in TOOLS.items():
        found = [row for row in select(rows, tool=tool) if row.get("psnr_db") is not None]
        points = sorted((row["ratio_to_inductor"], row["psnr_db"], row["case"]) for row in found)
        if not points:
            continue
        panel.plot([x for x, _, _ in points], [y for _, y, _ in points], "o", color=colour, label=tool, markersize=4)
        best = [point for i, point in enumerate(points) if all(point[1] > other[1] for other in points[:i])]
        panel.plot([x for x, _, _ in best], [y for _, y, _ in best], "-", color=colour, linewidth=1)
    finish(panel, "demo model, 50 steps", "share of inductor's time", "PSNR against the full model's images, dB")
    panel.set_xlim(left=0)
    return with_legend(figure)


def with_legend(figure: Figure, title: str = "") -> Figure:
    """One legend for all panels, below them."""
    found = {
        label: line
        for panel in figure.axes
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
        if not label.startswith("_")
    }
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.legend(
        found.values(), found.keys(), loc="lower center", ncol=3, fontsize=7, frameon=False, title=title,
        title_fontsize=7,
    )  # fmt: skip
    return figure


def finish(panel: Axes, title: str, x: str, y: str) -> None:
    panel.set_title(title, fontsize=9)
    panel.set_xlabel(x, fontsize=8)
    panel.set_ylabel(y, fontsize=8)
    panel.tick_params(labelsize=7)
    panel.grid(True, which="major", color="#dddddd", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


PLOTS: dict[str, tuple[str, Callable[[Rows], Figure]]] = {
    "attention_time": ("attention", time_over_tokens),
    "attention_speedup": ("attention", speedup_over_radius),
    "attention_roofline": ("attention", roofline),
    "planner_front": ("planner", quality_over_time),
}


def draw(folder: Path = RESULTS) -> list[Path]:
    """Write the plots whose results are there; the files written."""
    written = []
    for name, (result, plot) in PLOTS.items():
        source = folder / f"{result}.json"
        if not source.exists():
            continue
        with mpl.rc_context({"svg.hashsalt": "difa", "svg.fonttype": "none", "font.family": "sans-serif"}):
            figure = plot(json.loads(source.read_text())["rows"])
            fresh = folder / f"{name}.svg.new"
            figure.savefig(fresh, format="svg", metadata={"Date": None})
            plt.close(figure)
        os.replace(fresh, folder / f"{name}.svg")
        written.append(folder / f"{name}.svg")
    return written


if __name__ == "__main__":
    for path in draw():
        print(f"drew {path}")
