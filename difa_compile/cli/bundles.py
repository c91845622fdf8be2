"""``difa export``, ``difa run``, ``difa bundle`` with ``show``, ``verify``, ``adapt`` and ``diff``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
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
from difa_compile.cli.inputs import DTYPES, MOST_STEPS, call_inputs, dtype_named, labels_of, open_pipeline
from difa_compile.cli.options import Guidance, Inputs, Labels, Model, NegativePrompt, Prompt, Seed
from difa_compile.cli.tables import foreign
from difa_compile.files.writing import check_writable, write_whole
from difa_compile.report.view import size
from difa_compile.wording import quoted, shown, visible

if TYPE_CHECKING:
    from difa_compile.bundle.difference import BundleDifference
    from difa_compile.bundle.manifest import Manifest
    from difa_compile.plan.plan import Plan

DIFFERENT = 3
"""Exit code of a comparison that finds something: 1 is for what fails, 2 for wrong arguments."""
MOST_WEIGHTS = 20
"""Lines of a table of them."""
MOST_IMAGES = 1024
"""That one call of a bundle makes."""
DEAR = 0.03
"""What a limit on engines may cost before another way is told."""

BundleFolder = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A folder that difa export has written.", show_default=False)
]
Target = Annotated[
    str | None,
    typer.Option(help="Whose engines to run: onnx, aoti or tensorrt.", show_default="the first in the bundle"),
]

bundle_app = typer.Typer(help="Look at exported bundles, put other weights in.", no_args_is_help=True)


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
    sizes: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="HxW,...",
            help="Sizes to choose from, e.g. 512x512,768x512.",
            show_default="that of the call",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"What the model computes in: {', '.join(DTYPES)}.")] = "float32",
    batch: Annotated[
        str,
        typer.Option(help="Most images of a call; 1:2:8 says also how many are usual, which tensorrt is tuned for."),
    ] = "8",
    max_engines: Annotated[
        int | None,
        typer.Option(
            help="At most so many engines for each size: rows are merged, which computes more.",
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
    from difa_compile.exporting.write import check_request, export
    from difa_compile.plan.plan import Plan

    numbers = _numbers(steps)
    chosen = [] if sizes is None else [_size(part.strip()) for part in sizes.split(",")]
    computed = dtype_named(dtype)
    tiers: dict[str, Plan] = {}
    for text in plans:
        name, path = _tier_of(text)
        if name in tiers:
            raise typer.BadParameter(f"the tier {quoted(name)} is given twice", param_hint="--plan")
        tiers[name] = Plan.load(path)
    wanted = [part.strip() for part in targets.split(",")]
    capabilities = _capabilities(gpus)
    usual, most = _batch(batch)
    check_request(tiers, numbers, wanted, most, usual, capabilities, portable)
    call = call_inputs(model, inputs, labels, prompt, guidance)
    if isinstance(call.get("class_labels"), list):
        call["class_labels"] = call["class_labels"][:1]
    if isinstance(call.get("prompt"), list):
        call["prompt"] = call["prompt"][:1]
    console = make_console()
    check_writable(out)
    pipe = open_pipeline(model, "cpu", call, computed)
    pipe.set_progress_bar_config(disable=True)
    with console.status("exporting") as status:

        def told(text: str) -> None:
            console.print(Text(visible(text)))
            status.update(Text(shown(text, 100)))

        found = export(
            pipe,
            tiers,
            out,
            inputs=call,
            steps=numbers,
            targets=wanted,
            sizes=chosen,
            most_images=most,
            usual_images=usual,
            max_engines=max_engines,
            portable=portable,
            gpus=capabilities,
            name=model,
            told=told,
        )
    console.print(f"{found.engines} engines ({found.made} files made, {found.kept} kept), {size(found.bytes)} in all")
    if max_engines is not None and found.cost > 1:
        console.print(Text(_dearer(max_engines, found.cost, found.weighed, tiers)), soft_wrap=True)
    console.print(Text.assemble("The bundle: ", (visible(str(out)), "bold")), soft_wrap=True)


def _dearer(most: int, cost: float, weighed: str, plans: Mapping[str, Plan]) -> str:
    """What a limit on engines costs, in words; where it is much, how the planner can do better."""
    text = f"At most {most} engines cost {100 * (cost - 1):.1f} % more {weighed}."
    planned = [plan for plan in plans.values() if plan.settings.method == "planned" and len(set(plan.decisions)) > most]
    if cost <= 1 + DEAR or not planned:
        return text
    limits = sorted({shown(plan.settings.promise.limit) for plan in planned if plan.settings.promise is not None})
    return (
        f"{text} The planner can keep to {' and to '.join(limits) or 'its limit'} with few rows if it is told before: "
        f"difa plan TABLE --max-rows {most} with the same limit, TABLE being the file of difa measure. Export that."
    )


def run(
    bundle: BundleFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the images.")] = Path("difa-run"),
    labels: Labels = None,
    prompt: Prompt = None,
    negative_prompt: NegativePrompt = None,
    conditions: Annotated[
        Path | None,
        typer.Option(help="A safetensors file of what the model is conditioned on: cond.NAME, uncond.NAME."),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(help="How many.", min=1, max=MOST_IMAGES, show_default="one for each label or prompt"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps.", min=1, max=MOST_STEPS, show_default="the first exported")
    ] = None,
    tier: Annotated[str | None, typer.Option(help="Which plan.", show_default="the first exported")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Height and width.", show_default="the first exported")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", show_default="that of the export")] = None,
    seed: Seed = 0,
    preview: Annotated[
        int | None,
        typer.Option(
            help="Write what every so many steps have made, too.", min=1, max=MOST_STEPS, show_default="no previews"
        ),
    ] = None,
    target: Target = None,
) -> None:
    """Sample images from a bundle. Needs neither diffusers nor transformers."""
    require("msgspec", "PIL")
    from PIL import Image

    from difa_compile.bundle.runner import load_bundle
    from difa_compile.bundle.weights import WeightFile

    given: dict[str, Any] = {} if labels is None else {"class_labels": labels_of(labels)}
    for name, texts in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if texts:
            given[name] = texts[0] if len(texts) == 1 else list(texts)
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
    height, width = (None, None) if size is None else _size(size)
    check_writable(output)
    loaded = load_bundle(bundle, target)
    decode = loaded.manifest.sizes[loaded.size(height, width)].decode
    if decode is None or len(decode.shape) != 3:
        raise typer.BadParameter(
            "the bundle makes no pictures (videos, or latents alone); sample it from Python", param_hint="BUNDLE"
        )

    def write(pictures: torch.Tensor, when: str = "") -> None:
        for number, picture in enumerate(pictures):
            pixels = picture.squeeze(-1) if picture.shape[-1] == 1 else picture
            path = output / f"{number:04d}{when}.png"
            write_whole(path, _png(Image.fromarray(pixels.numpy())), "an image")

    def write_preview(step: int, total: int, latents: torch.Tensor, pictures: torch.Tensor | None) -> None:
        del latents
        if pictures is not None:
            write(pictures, f"-step-{step:0{len(str(total))}d}")

    found = loaded(
        steps=steps, tier=tier, seed=seed, guidance=guidance, conditions=by_half, images=images, height=height,
        width=width, preview=preview or False, callback=None if preview is None else write_preview, **given,
    )  # fmt: skip
    console = make_console()
    assert found.images is not None
    write(found.images)
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
    from difa_compile.bundle.runner import load_bundle
    from difa_compile.errors import BundleIntegrityError, TargetError

    console = make_console()
    manifest = read_manifest(bundle)
    for name in manifest.files:
        check_file(bundle, name, manifest.files)
    console.print(f"{len(manifest.files)} files are what was exported")
    for target in manifest.targets:
        try:
            loaded = load_bundle(bundle, target)
            tested = loaded.tested()
        except TargetError as error:
            before = "" if target in manifest.compared else "; nor was it run when the bundle was written"
            console.print(Text(f"{target}: not run: {visible(str(error))}{before}"))
            continue
        console.print(Text(f"{target}: beside what {manifest.tested_by} made, the self-test's {tested.told}"))
        if not tested.passed:
            again = "adapt the original" if manifest.adapters else "export"
            raise BundleIntegrityError(
                f"the engines of {target} do not make what {manifest.tested_by} made when the bundle was written; "
                f"{again} again here"
            )


@bundle_app.command("adapt")
def adapt(
    bundle: BundleFolder,
    lora: Annotated[
        Path,
        typer.Argument(
            metavar="LORA", help="A LoRA, or whole weights: a safetensors file, or its folder.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new bundle.", show_default=False)],
    scale: Annotated[float, typer.Option(help="How much of what a LoRA adds goes in.")] = 1.0,
    without: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART",
            help="Leave out this part of LORA, e.g. text_encoder or transformer.proj_out; may be repeated.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Put a LoRA or other weights into a bundle, as a new one beside it. No engine is made anew."""
    require("msgspec", "safetensors")
    from difa_compile.bundle.adapting import adapt_bundle

    console = make_console()
    found = adapt_bundle(
        bundle, lora, out, scale, without=without or (), told=lambda text: console.print(Text(visible(text)))
    )
    whole = sum(file.bytes for file in found.manifest.files.values())
    console.print(
        f"{len(found.changed)} weights changed; {size(whole)} in all, the same files shared where they can be"
    )
    console.print(Text.assemble("The bundle: ", (visible(str(out)), "bold")), soft_wrap=True)


@bundle_app.command("diff")
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="The folder of a bundle.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="The folder of another.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What differs between two bundles: model, plans, engines, weights, sizes. The exit code is 3 if anything does."""
    require("msgspec")
    from difa_compile.bundle.difference import bundle_difference

    found = bundle_difference(first, second)
    if as_json:
        print(json.dumps(_finite(asdict(found)) | {"equal": found.equal}, indent=1, allow_nan=False))
    else:
        _print_difference(make_console(), found)
    if not found.equal:
        raise typer.Exit(DIFFERENT)


def _finite(value: Any) -> Any:
    """A value for JSON, infinite numbers in it as none."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_difference(console: Console, found: BundleDifference) -> None:
    for title, sides in (
        ("source", found.source),
        ("made with", found.versions),
        ("settings", found.settings),
        ("sampling loop", found.programs),
        ("engine", found.engines),
    ):
        if sides:
            table = _table(title, "A", "B")
            for name, each in sides.items():
                table.add_row(*(Text(visible(text)) for text in (name, each.first, each.second)))
            console.print(table, "")
    if found.plans:
        table = _table("plan of", "differs in")
        for plan in found.plans:
            cells = visible(plan.why) if plan.cells is None else f"{plan.cells} of {plan.of} decisions"
            if plan.cells == 0:
                cells = "" if plan.weights else "figures and settings alone"
            weights = f"weights of {plan.weights} forecasts" if plan.weights else ""
            table.add_row(foreign(plan.tier), Text(", ".join(text for text in (cells, weights) if text)))
        console.print(table, "")
    if found.added or found.removed or found.changed:
        table = _table("weight", "change")
        names = [(name, "in A alone") for name in found.removed] + [(name, "in B alone") for name in found.added]
        largest = sorted(found.changed, key=lambda each: -math.inf if each.amount is None else -each.amount)
        names += [
            (each.name, " ".join(filter(None, ["" if each.amount is None else f"{each.amount:.2g}", each.form])))
            for each in largest
        ]
        for name, change in names[:MOST_WEIGHTS]:
            table.add_row(Text(visible(name)), Text(change))
        console.print(table)
        if len(names) > MOST_WEIGHTS:
            console.print(f"and {len(names) - MOST_WEIGHTS} more (--json has all)")
        console.print()
    same = "the same" if found.equal else f"{len(found.changed)} weights changed"
    console.print(
        f"{same}; {found.kept} engines in both; {size(found.bytes[0])} and {size(found.bytes[1])} on the disk"
    )


def _table(*columns: str) -> Table:
    """Columns that share the terminal's width, long texts on several lines."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print_manifest(console: Console, manifest: Manifest) -> None:
    from difa_compile.bundle.adapters import LORA

    source = manifest.source
    console.print(
        Text(f"{shown(source.pipeline)} {shown(source.name)} ({shown(source.model)}), made with ")
        + Text(", ".join(f"{shown(name)} {shown(version)}" for name, version in manifest.made_with.items()))
    )
    for label, value in (
        ("licence", source.licence),
        ("model card and licence files", ", ".join(filter(None, [source.card, *manifest.notices]))),
        *(
            ("put in", f"{each.name}, scale {each.scale:g}" if each.kind == LORA else each.name)
            for each in manifest.adapters
        ),
    ):
        if value:
            console.print(Text(f"{label}: {shown(value, 400)}"))
    schedules = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    several = len(manifest.sizes) > 1
    for column in ("tier", *(["size"] if several else []), "steps", "calls", "engines"):
        schedules.add_column(column, justify="left" if column == "tier" else "right")
    for each in manifest.sizes:
        if each.layouts:
            where = f" at {each.name}" if several else ""
            console.print(Text(f"tokens of attention{where}: {shown(', '.join(each.layouts), 200)}"))
    for schedule in manifest.schedules:
        rows = {call.row for call in schedule.calls}
        cells = [manifest.sizes[schedule.size].name] if several else []
        cells += [str(schedule.steps), str(len(schedule.calls)), str(len(rows))]
        schedules.add_row(foreign(schedule.tier), *cells)
    console.print(schedules)
    engines = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    built = any("activations" in engine.memory for engine in manifest.engines)
    columns = ["engine", "target", "images", "calls", "weights", "caches in", "out", "size", "needs"]
    for column in [*columns[:-1], *(["activations"] if built else []), columns[-1]]:
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
            *([size(engine.memory["activations"]) if "activations" in engine.memory else ""] if built else []),
            foreign(engine.instruction_set),
        )
    console.print(engines)
    for engine in manifest.engines:
        if engine.unchecked:
            label = shown(engine.file.rsplit("-", 1)[0])
            console.print(Text(f"{label} was not run beside its program: {shown(engine.unchecked, 200)}"))
    if manifest.prompts is not None:
        told = []
        for encoder in manifest.prompts.encoders:
            files = [f"{shown(tokens.text)} by {shown(tokens.file)}" for tokens in encoder.tokens]
            label = next(shown(each.file.rsplit("-", 1)[0]) for each in manifest.engines if each.row == encoder.row)
            told.append(f"{shown(encoder.half)}: {', '.join(files)}, encoded by {label}")
        console.print(Text("prompts, " + "; ".join(told)))
    whole = sum(file.bytes for file in manifest.files.values())
    console.print(f"{size(manifest.files[manifest.weights].bytes)} of weights, {size(whole)} in all")
    console.print(_memory(manifest), soft_wrap=True)


def _memory(manifest: Manifest) -> str:
    """What a call of a bundle takes, as far as that is known beforehand."""
    most = manifest.most_images

    def told(one: int, all_of_them: int) -> str:
        return f"{size(one)} an image" + (f" ({size(all_of_them)} of {most} images)" if most > 1 else "")

    caches = manifest.cache_bytes()
    return (
        f"Memory of a call: weights {size(manifest.files[manifest.weights].bytes)}, one copy for all engines and "
        f"calls; caches {told(caches, caches * most)}; what an engine takes and gives, at most "
        f"{told(manifest.port_bytes(1), manifest.port_bytes(most))}; and what a runtime needs within engines, which "
        "tensorrt alone tells beforehand"
    )


def _tier_of(text: str) -> tuple[str, Path]:
    """``fast=plan.json`` or ``plan.json``, whose tier is ``plan``."""
    name, sign, path = text.partition("=")
    return (name, Path(path)) if sign else (Path(text).stem, Path(text))


def _size(text: str) -> tuple[int, int]:
    """``512x768``: height and width in pixels."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text, re.ASCII)
    if found is None:
        raise typer.BadParameter(f"{quoted(text)} is no height and width such as 512x768", param_hint="--size")
    return int(found[1]), int(found[2])


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 6 and 1 <= int(part) <= MOST_STEPS for part in parts):
        raise typer.BadParameter(f"{quoted(text)} is no list of numbers such as 20,50", param_hint="--steps")
    return [int(part) for part in parts]


def _batch(text: str) -> tuple[int | None, int]:
    """``8`` or ``1:2:8``: of images of a call, how many are usual, if that is said, and the most."""
    found = re.fullmatch(r"(?:1:([0-9]{1,4}):)?([0-9]{1,4})", text, re.ASCII)
    usual, most = (None, 0) if found is None else (None if found[1] is None else int(found[1]), int(found[2]))
    if not (1 if usual is None else usual) <= most <= MOST_IMAGES or usual == 0 or most == 0:
        raise typer.BadParameter(
            f"{quoted(text)} is no number of images up to {MOST_IMAGES} such as 8, nor the least (which is 1), the "
            "usual and the most such as 1:2:8",
            param_hint="--batch",
        )
    return usual, most


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
