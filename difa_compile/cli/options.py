"""Arguments and options that several commands have, or that take long to say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from difa_compile.cli.inputs import LARGEST_SEED, MOST_STEPS

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="'demo', a hub id (OWNER/NAME) or a local folder.", show_default=False)
]
PlanFile = Annotated[
    Path, typer.Argument(metavar="PLAN", help="A plan file, as difa calibrate writes it.", show_default=False)
]
Steps = Annotated[int, typer.Option(help="Sampling steps.", min=1, max=MOST_STEPS)]
Seed = Annotated[int, typer.Option(help="First seed.", min=0, max=LARGEST_SEED)]
Labels = Annotated[str | None, typer.Option(help="Classes to sample, e.g. 1,2,3.", show_default=False)]
Prompt = Annotated[list[str] | None, typer.Option(help="Prompt to sample; may be repeated.", show_default=False)]
NegativePrompt = Annotated[
    list[str] | None,
    typer.Option(help="What is not to be seen; may be repeated, once an image.", show_default="that of the export"),
]
Inputs = Annotated[
    str | None, typer.Option(help="Arguments of the pipeline's call: JSON, or a JSON file.", show_default=False)
]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale.", show_default="the pipeline's")]
Budget = Annotated[
    float | None, typer.Option(help="Plan for this share of the full model's time, e.g. 0.5.", show_default=False)
]
Psnr = Annotated[
    float | None, typer.Option(help="Plan for this PSNR (dB) against the full model's images.", show_default=False)
]
AllowedError = Annotated[
    float | None,
    typer.Option("--error", help="Plan for this mean squared error of images in [0, 1].", show_default=False),
]
MaxRows = Annotated[
    int | None,
    typer.Option(
        help="At most so many distinct rows, each a variant of the model.",
        min=1,
        max=MOST_STEPS,
        show_default="any number",
    ),
]
NoBlocks = Annotated[
    bool, typer.Option("--no-blocks", help="Plan attention alone; all blocks are computed at every step.")
]
Table = Annotated[
    Path, typer.Argument(metavar="TABLE", help="A table of errors, as difa measure writes it.", show_default=False)
]
TableToTry = Annotated[
    Path | None,
    typer.Option(
        "--table",
        help="Planner: plan from this table of errors, as difa measure writes it; measure nothing.",
        show_default=False,
    ),
]
Windows = Annotated[
    list[str] | None,
    typer.Option("--window", help="SHAPE:RADIUS to measure at all attention sites; may be repeated."),
]
Tried = Annotated[
    list[str] | None,
    typer.Option(
        "--try",
        help="A decision to measure at all attention sites, e.g. full+cfg, 'window(box:2)+residual' or "
        "'heads(0-3:window(box:4);4-7:full)'; may be repeated.",
        show_default="full+cfg, if attention is measured",
    ),
]
HeadWindows = Annotated[
    list[str] | None,
    typer.Option(
        "--heads",
        help="SHAPE:RADIUS that single heads may take; which do is found, and measured for three shares of the work "
        "saved. May be repeated.",
    ),
]
Attention = Annotated[
    bool | None,
    typer.Option(
        help="Measure what attention alone may leave out, too; takes several times as long.",
        show_default="where --window, --try or --heads is given, or no blocks",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...", show_default="cuda if there is one")]
