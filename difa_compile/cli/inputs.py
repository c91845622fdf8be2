"""What the options say, as values: the arguments of a pipeline's call, devices, seeds."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer

from difa_compile.loading import DEMO

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DEMO_LABELS = tuple(range(10))
DEMO_GUIDANCE = 4.0


def call_inputs(
    model: str, inputs: str | None, labels: str | None, prompts: list[str] | None, guidance: float | None
) -> dict[str, Any]:
    """Keyword arguments of the pipeline's call.

    ``inputs`` is JSON, or the path of a JSON file; ``labels`` a comma-separated list; both may be refined by the other
    options. The demo model has labels and guidance of its own if none are given.
    """
    call: dict[str, Any] = _read_json(inputs) if inputs is not None else {}
    if labels is not None:
        call["class_labels"] = _labels(labels)
    if prompts:
        call["prompt"] = list(prompts)
    if guidance is not None:
        call["guidance_scale"] = guidance
    if model == DEMO:
        call = {"class_labels": list(DEMO_LABELS), "guidance_scale": DEMO_GUIDANCE} | call
    if not call.keys() & {"class_labels", "prompt", "prompt_embeds"}:
        raise typer.BadParameter(
            "say what to sample: --labels 1,2,3 for a class-conditional model, --prompt TEXT for a text model, or "
            "--inputs with the arguments of the pipeline's call as JSON"
        )
    return call


def image_captions(call: dict[str, Any], names: dict[int, str], images: int) -> tuple[str, ...]:
    """What was asked for, per image: the label's name or the prompt, repeated over the seeds; none if unknown."""
    labels, prompt = call.get("class_labels"), call.get("prompt")
    if isinstance(labels, list):
        texts = [names.get(label, f"class {label}") for label in labels]
    elif prompt is not None:
        texts = [prompt] if isinstance(prompt, str) else [str(text) for text in prompt]
    else:
        return ()
    if images % len(texts):
        return ()
    # The pipelines repeat over the images of a prompt before they go on to the next; seeds come outermost.
    per_text = call.get("num_images_per_prompt", 1) if labels is None else 1
    texts = [text if len(text) <= 60 else text[:59] + "…" for text in texts for _ in range(per_text)]
    return tuple(texts * (images // len(texts))) if images % len(texts) == 0 else ()


def seeds_for(samples: int, per_call: int, first: int) -> tuple[int, ...]:
    """As many seeds, from ``first`` on, as give at least ``samples`` images in calls of ``per_call``."""
    return tuple(range(first, first + max(1, -(-samples // per_call))))


def images_per_call(call: dict[str, Any]) -> int:
    """Images that one call makes, as far as its arguments tell."""
    given = call.get("class_labels", call.get("prompt"))
    return (len(given) if isinstance(given, list) else 1) * int(call.get("num_images_per_prompt", 1))


def open_pipeline(model: str, device: str | None) -> DiffusionPipeline:
    """The pipeline called ``model`` on ``device``, by default the first GPU if there is one."""
    from difa_compile.loading import load_pipeline

    hush_diffusers()
    return _move(load_pipeline(model), device)


def dtype_named(name: str) -> torch.dtype:
    """A floating-point dtype of torch by its name."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise typer.BadParameter(f"{name!r} is no dtype such as float32 or bfloat16", param_hint="--dtype")
    return found


def hush_diffusers() -> None:
    """Keep diffusers' notices and bars about single components off the terminal; errors still show."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _move(pipe: DiffusionPipeline, device: str | None) -> DiffusionPipeline:
    wanted = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return pipe.to(wanted)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"the model cannot be moved to {wanted!r}: {reason}", param_hint="--device") from error


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join(["difa", *sys.argv[1:]])


def _labels(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of class numbers such as 1,2,3", param_hint="--labels"
        ) from None


def _read_json(text: str) -> dict[str, Any]:
    source = text
    if not text.lstrip().startswith("{"):
        try:
            source = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(
                f"{text} is neither a JSON object nor a file that can be read ({error})", param_hint="--inputs"
            ) from None
    try:
        call = json.loads(source)
    except ValueError as error:
        raise typer.BadParameter(f"not valid JSON: {error}", param_hint="--inputs") from None
    if not isinstance(call, dict):
        raise typer.BadParameter("the JSON must be an object of arguments and values", param_hint="--inputs")
    return call
