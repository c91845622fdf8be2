"""Draw the README's picture from a folder that ``difa demo`` or ``compare`` wrote.

    difa demo --samples 20 --output runs/demo
    python -m benchmarks.picture runs/demo    # writes docs/images/plan.png

On the left what a budget buys, where plans of other budgets were run, else the plan; on the right images. Colours,
names and counts of a plan are those of the report page's heat map; the images are the first of the comparison.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from difa_compile.comparison.front import Point
from difa_compile.files.writing import write_whole
from difa_compile.report.heatmap import HeatMap, heat_map
from difa_compile.report.pictures import amplification, difference
from difa_compile.report.stored import StoredComparison

from ._common import ROOT

PICTURE = ROOT / "docs" / "images" / "plan.png"
INK, QUIET = "#1b2330", "#566173"
SIZE = 10
IMAGES = 5
"""Columns of images: so many of the comparison's first."""
PALETTE = 224


def draw_map(panel: Axes, plan: HeatMap) -> None:
    """One row per site, one column per step, as on the report page; stripes where the CFG halves share."""
    colours = {colour.key: colour for colour in plan.colours}
    for top, row in enumerate(plan.rows):
        for step, cell in enumerate(row.cells):
            colour = colours[cell.classes.split()[0]]
            panel.add_patch(Rectangle((step + 0.06, top + 0.04), 0.88, 0.92, facecolor=colour.light, linewidth=0))
            if colour.shared:
                for start in (0.2, 0.5, 0.8):
                    panel.plot(
                        (step + 0.12, step + 0.88), (top + start + 0.11, top + start - 0.11),
                        color="white", alpha=0.55, linewidth=0.7, solid_capstyle="butt",
                    )  # fmt: skip
    panel.set(xlim=(0, len(plan.steps)), ylim=(len(plan.rows), 0))
    panel.set_yticks([top + 0.5 for top in range(len(plan.rows))], [row.name for row in plan.rows])
    shown = range(0, len(plan.steps), 2 * plan.tick)
    panel.set_xticks([step + 0.5 for step in shown], [str(step) for step in shown])
    panel.tick_params(length=0, labelsize=SIZE, labelcolor=QUIET, pad=3)
    panel.spines[:].set_visible(False)
    for x, text, side in ((0, "noise", "left"), (0.5, "sampling step →", "center"), (1, "image", "right")):
        panel.annotate(
            text,
            (x, 0),
            (0, -30),
            xycoords="axes fraction",
            textcoords="offset points",
            ha=side,
            color=QUIET,
            fontsize=SIZE,
        )


FRONT = {
    "planner": ("planned for a budget", "#2f6db3", "o"),
    "plan": ("the plan of the images", "#1f7a4d", "D"),
    "recipe": ("every n-th step computed", "#9aa3b0", "s"),
    "search": ("DiTFastAttn's search", "#c98a1b", "^"),
}
"""By origin of a point: its name, colour and marker."""


def draw_front(panel: Axes, points: Sequence[Point]) -> None:
    """PSNR over the share of the full model's time; what is planned is joined."""
    drawn = [(point.origin, point.share, point.psnr) for point in points if point.psnr is not None]
    joined = sorted((share, psnr) for origin, share, psnr in drawn if origin in ("planner", "plan"))
    panel.plot([share for share, _ in joined], [psnr for _, psnr in joined], color=FRONT["planner"][1], linewidth=1.2)
    for origin, (name, colour, marker) in FRONT.items():
        own = [(share, psnr) for other, share, psnr in drawn if other == origin]
        if own:
            x, y = zip(*own, strict=True)
            panel.scatter(
                x, y, 42, color=colour, marker=marker, label=name, zorder=3, edgecolors="white", linewidths=0.6
            )
    panel.set(xlim=(0, max([1.0, *(share + 0.05 for _, share, _ in drawn)])))
    panel.set_ylabel("PSNR (dB)", color=QUIET, fontsize=SIZE)
    panel.set_xlabel("share of the full model's time", color=QUIET, fontsize=SIZE, labelpad=2)
    panel.grid(color="#e4e7ec", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(length=0, labelsize=SIZE, labelcolor=QUIET, pad=3)
    panel.spines[:].set_visible(False)
    panel.legend(
        loc="center right",
        bbox_to_anchor=(1, 0.66),
        fontsize=SIZE - 1,
        frameon=False,
        labelcolor=INK,
        handletextpad=0.3,
        borderaxespad=0,
    )


def draw_legend(figure: Figure, plan: HeatMap, left: float, bottom: float) -> None:
    """The decisions with their numbers of cells, in one line."""
    handles = [Rectangle((0, 0), 1, 1, facecolor=colour.light) for colour in plan.colours]
    names = [f"{colour.name}  {colour.count}" for colour in plan.colours]
    figure.legend(
        handles, names, loc="lower left", bbox_to_anchor=(left, bottom), ncol=len(names), frameon=False, fontsize=SIZE,
        labelcolor=INK, handlelength=1.3, handleheight=0.9, handletextpad=0.5, columnspacing=1.6, borderaxespad=0,
    )  # fmt: skip


def picture(stored: StoredComparison) -> Figure:
    """What a budget buys, or the plan's heat map, on the left; images and their difference on the right."""
    plan = heat_map(stored.plan)
    full, planned = (as_tensor(side) for side in (stored.comparison.images_full, stored.comparison.images_planned))
    factor = amplification(full, planned)
    rows = {"full": full, "planned": planned, f"difference ×{factor}": difference(full, planned, factor)}
    columns = min(IMAGES, len(full))

    figure = plt.figure(figsize=(11, 2.72))
    heading = FontProperties(size=12, weight="bold")
    if any(point.psnr is not None for point in stored.front):
        figure.text(0.006, 0.985, "What a budget buys: images as close as this", font=heading, color=INK, va="top")
        draw_front(figure.add_axes((0.06, 0.17, 0.523, 0.68)), stored.front)
    else:
        figure.text(0.006, 0.985, "What each attention does at each sampling step", font=heading, color=INK, va="top")
        draw_map(figure.add_axes((0.066, 0.31, 0.517, 0.535)), plan)
        draw_legend(figure, plan, 0.006, 0.02)

    start, top, bottom = 0.668, 0.855, 0.02
    width, height = (0.997 - start) / columns, (top - bottom) / len(rows)
    figure.text(start, 0.985, "Same seeds, in full and planned", font=heading, color=INK, va="top")
    for row, (name, images) in enumerate(rows.items()):
        lower = top - (row + 1) * height
        middle = lower + height / 2
        figure.text(start - 0.008, middle, name.replace(" ", "\n"), ha="right", va="center", fontsize=SIZE, color=QUIET)
        for column in range(columns):
            panel = figure.add_axes((start + column * width, lower + 0.01, width * 0.96, height - 0.02))
            pixels = images[column].permute(1, 2, 0).squeeze(-1).numpy()
            panel.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            panel.set_axis_off()
    return figure


def as_tensor(images: NDArray[np.uint8]) -> Tensor:
    """(N, H, W, C) bytes as (N, C, H, W) in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def as_png(figure: Figure) -> bytes:
    """The figure in a palette of few colours, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    plt.close(figure)
    image = Image.open(buffer).convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a plan and its images from the folder of a comparison.")
    parser.add_argument("folder", type=Path, help="written by difa demo or difa compare")
    parser.add_argument("--output", type=Path, default=PICTURE)
    options = parser.parse_args()
    write_whole(options.output, as_png(picture(StoredComparison.load(options.folder))), "the picture")
    print(f"drew {options.output}")


if __name__ == "__main__":
    main()
