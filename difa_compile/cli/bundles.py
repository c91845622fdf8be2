"""``difa export``, ``difa run``, ``difa bundle show`` and ``verify``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from difa_compile.cli.demo import require
from difa_compile.cli.failures import make_console
from difa_compile.cli.inputs import MOST_STEPS, call_inputs, labels_of, open_pipeline
from difa_compile.cli.options import Guidance, Inputs, Labels, Model, Prompt, Seed
from difa_compile.cli.tables import foreign
from difa_compile.files.writing import check_writable, write_whole
from difa_compile.report.view import size
from difa_compile.wording import quoted, shown, visible

if TYPE_CHECKING:
    from difa_compile.bundle.manifest import Manifest
    from difa_compile.plan.plan import Plan

MOST_IMAGES = 1024
"""That one call of a bundle makes."""

BundleFolder = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A folder that difa export has written.", show_default=False)
]
Target = Annotated[
    str | None,
    typer.Option(help="Whose engines to run: onnx, aoti or tensorrt.", show_default="the first in the bundle"),
]

bundle_app = typer.Typer(help="Look at exported bundles.", no_args_is_help=True)


def export(
    model: Model,
    plans: Annotated[
        list[str],
        typer.Option("--plan", metavar="[TIER=]PLAN", help="A plan file; may be repeated, each a tier to choose from."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the bundle.")] = Path("difa-bundle"),
    targets: Annotated[
        str, typer.Option("--target", help="onnx, aoti, tensorrt (or TensorRT-RTX), or several with commas.")
    ] = "onnx",
    steps: Annotated[str, typer.Option(help="Numbers of steps to choose from, e.g. 20,50.")] = "50",
    batch: Annotated[int, typer.Option(help="Most images of a call.", min=1, max=MOST_IMAGES)] = 8,
    max_engines: Annotated[
        int | None,
        typer.Option(
            help="At most so many engines: rows are merged, which computes more.",
            min=1,
            max=MOST_STEPS,
            show_default="all",
        ),
    ] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="AOTInductor for any processor of this kind, not for this one.")
    ] = False,
    gpus: Annotated[
        str | None,
        typer.Option(
            "--gpus",
            help="Compute capabilities that tensorrt builds for, e.g. 8.9,12.0.",
            show_default="all that TensorRT-RTX knows; the one here",
        ),
    ] = None,
    labels: Labels = None,
    prompt: Prompt = None,
    inputs: Inputs = None,
    guidance: Guidance = None,
) -> None:
    """Write a model with its plans as a bundle: engines, one file of weights, the sampling loops as data.

    An export that was interrupted goes on where it was when the same command is given again.
    """
    require("diffusers", "tqdm", "msgspec")
    from difa_compile.export.write import check_request, export_bundle
    from difa_compile.plan.plan import Plan

    numbers = _numbers(steps)
    tiers: dict[str, Plan] = {}
    for text in plans:
        name, path = _tier_of(text)
        if name in tiers:
            raise typer.BadParameter(f"the tier {quoted(name)} is given twice", param_hint="--plan")
        tiers[name] = Plan.load(path)
    wanted = [part.strip() for part in targets.split(",")]
    capabilities = _capabilities(gpus)
    check_request(tiers, numbers, wanted, batch)
    call = call_inputs(model, inputs, labels, prompt, guidance)
    if isinstance(call.get("class_labels"), list):
        call["class_labels"] = call["class_labels"][:1]
    if isinstance(call.get("prompt"), list):
        call["prompt"] = call["prompt"][:1]
    console = make_console()
    check_writable(out)
    pipe = open_pipeline(model, "cpu", call)
    pipe.set_progress_bar_config(disable=True)
    with console.status("exporting") as status:

        def told(text: str) -> None:
            console.print(Text(visible(text)))
            status.update(Text(shown(text, 100)))

        found = export_bundle(
            pipe,
            tiers,
            out,
            inputs=call,
            steps=numbers,
            targets=wanted,
            most_images=batch,
            max_engines=max_engines,
            portable=portable,
            gpus=capabilities,
            name=model,
            told=told,
        )
    dearer = f"; at most {max_engines} cost {100 * (found.cost - 1):.0f} % more work" if found.cost > 1 else ""
    console.print(
        f"{found.engines} engines ({found.made} files made, {found.kept} kept), {size(found.bytes)} in all{dearer}"
    )
    console.print(Text.assemble("The bundle: ", (visible(str(out)), "bold")), soft_wrap=True)


def run(
    bundle: BundleFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the images.")] = Path("difa-run"),
    labels: Labels = None,
    conditions: Annotated[
        Path | None,
        typer.Option(help="A safetensors file of what the model is conditioned on: cond.NAME, uncond.NAME."),
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="How many.", min=1, max=MOST_IMAGES, show_default="one for each label")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps.", min=1, max=MOST_STEPS, show_default="the first exported")
    ] = None,
    tier: Annotated[str | None, typer.Option(help="Which plan.", show_default="the first exported")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", show_default="that of the export")] = None,
    seed: Seed = 0,
    target: Target = None,
) -> None:
    """Sample images from a bundle. Needs neither diffusers nor transformers."""
    require("msgspec", "PIL")
    from PIL import Image

    from difa_compile.bundle.runner import load_bundle
    from difa_compile.bundle.weights import WeightFile

    given: dict[str, Any] = {} if labels is None else {"class_labels": labels_of(labels)}
    by_half: dict[str, dict[str, torch.Tensor]] = {}
    if conditions is not None:
        file = WeightFile(conditions)
        for key in file.places:
            half, _, name = key.partition(".")
            if half not in ("cond", "uncond") or not name:
                raise typer.BadParameter(
                    f"{quoted(key)} is no condition; name tensors cond.NAME or uncond.NAME", param_hint="--conditions"
                )
            by_half.setdefault(half, {})[name] = file[key]
    check_writable(output)
    loaded = load_bundle(bundle, target)
    decode = loaded.manifest.decode
    if decode is None or len(decode.shape) != 3:
        raise typer.BadParameter(
            "the bundle makes no pictures (videos, or latents alone); sample it from Python", param_hint="BUNDLE"
        )
    found = loaded(
        steps=steps, tier=tier, seed=seed, guidance=guidance, conditions=by_half, images=images,
        **given,
    )  # fmt: skip
    console = make_console()
    assert found.images is not None
    for number, picture in enumerate(found.images):
        pixels = picture.squeeze(-1) if picture.shape[-1] == 1 else picture
        path = output / f"{number:04d}.png"
        write_whole(path, _png(Image.fromarray(pixels.numpy())), "an image")
    console.print(Text.assemble(f"{len(found.images)} images: ", (visible(str(output)), "bold")), soft_wrap=True)


@bundle_app.command("show")
def show_bundle(bundle: BundleFolder) -> None:
    """What is in a bundle: tiers and steps, engines, weights, the memory that caches take. Nothing is loaded."""
    require("msgspec")
    from difa_compile.bundle.manifest import read_manifest

    _print_manifest(make_console(), read_manifest(bundle))


@bundle_app.command("verify")
def verify_bundle(bundle: BundleFolder) -> None:
    """Check every file of a bundle, and run its self-test on the targets that are installed."""
    require("msgspec")
    from difa_compile.bundle.manifest import check_file, read_manifest
    from difa_compile.bundle.runner import AGREES, load_bundle
    from difa_compile.errors import BundleIntegrityError, TargetError

    console = make_console()
    manifest = read_manifest(bundle)
    for name in manifest.files:
        check_file(bundle, name, manifest.files)
    console.print(f"{len(manifest.files)} files are what was exported")
    for target in manifest.targets:
        try:
            worst = load_bundle(bundle, target).self_test()
        except TargetError as error:
            before = "" if target in manifest.compared else "; nor was it run when it was exported"
            console.print(Text(f"{target}: not run: {visible(str(error))}{before}"))
            continue
        console.print(f"{target}: the self-test's latents differ by {worst:.1e} of the largest from the pipeline's")
        if not worst < AGREES:
            raise BundleIntegrityError(
                f"the engines of {target} do not make what the pipeline made when they were exported; export again here"
            )


def _print_manifest(console: Console, manifest: Manifest) -> None:
    source = manifest.source
    console.print(
        Text(f"{shown(source.pipeline)} {shown(source.name)} ({shown(source.model)}), made with ")
        + Text(", ".join(f"{shown(name)} {shown(version)}" for name, version in manifest.made_with.items()))
    )
    schedules = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("tier", "steps", "calls", "engines"):
        schedules.add_column(column, justify="left" if column == "tier" else "right")
    for schedule in manifest.schedules:
        rows = {call.row for call in schedule.calls}
        schedules.add_row(foreign(schedule.tier), str(schedule.steps), str(len(schedule.calls)), str(len(rows)))
    console.print(schedules)
    engines = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    told = any("activations" in engine.memory for engine in manifest.engines)
    columns = ["engine", "target", "images", "calls", "weights", "caches in", "out", "size", "needs"]
    for column in [*columns[:-1], *(["activations"] if told else []), columns[-1]]:
        engines.add_column(
            column,
            justify="left" if column in ("engine", "target", "needs") else "right",
            no_wrap=column != "needs",
            overflow="fold",
        )
    for engine in manifest.engines:
        calls = sum(call.row == engine.row for schedule in manifest.schedules for call in schedule.calls)
        reads, writes = (
            sum(port.name.startswith("cache.") for port in ports) for ports in (engine.inputs, engine.outputs)
        )
        low, high = engine.images
        engines.add_row(
            foreign(engine.file.rsplit("-", 1)[0]),
            foreign(engine.target),
            str(low) if low == high else f"{low}-{high}",
            "" if engine.row < 0 else str(calls),
            str(len(engine.weights)),
            str(reads),
            str(writes),
            size(manifest.files[engine.file].bytes),
            *([size(engine.memory["activations"]) if "activations" in engine.memory else ""] if told else []),
            foreign(engine.instruction_set),
        )
    console.print(engines)
    caches = sum(torch.Size(slot.shape).numel() * getattr(torch, slot.dtype).itemsize for slot in manifest.slots)
    whole = sum(file.bytes for file in manifest.files.values())
    console.print(
        f"{size(manifest.files[manifest.weights].bytes)} of weights, {size(whole)} in all; caches take {size(caches)} "
        "an image"
    )


def _tier_of(text: str) -> tuple[str, Path]:
    """``fast=plan.json`` or ``plan.json``, whose tier is ``plan``."""
    name, sign, path = text.partition("=")
    return (name, Path(path)) if sign else (Path(text).stem, Path(text))


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 6 and 1 <= int(part) <= MOST_STEPS for part in parts):
        raise typer.BadParameter(f"{quoted(text)} is no list of numbers such as 20,50", param_hint="--steps")
    return [int(part) for part in parts]


def _capabilities(text: str | None) -> list[str]:
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,2}\.[0-9]", part, re.ASCII) for part in parts):
        raise typer.BadParameter(f"{quoted(text)} is no list of compute capabilities such as 8.9,12.0",
                                 param_hint="--gpus")  # fmt: skip
    return parts


def _png(picture: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
