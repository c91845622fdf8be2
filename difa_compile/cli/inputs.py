"""What the options say, as values: the arguments of a pipeline's call, devices, seeds."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import stat
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import typer

from difa_compile.pipeline.call_arguments import check_call
from difa_compile.pipeline.loading import DEMO
from difa_compile.wording import quoted, shown, visible

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DEMO_LABELS = tuple(range(10))
DEMO_GUIDANCE = 4.0
MOST_STEPS = 10_000
MOST_IMAGES = 100_000
LARGEST_SEED = 2**63 - 1
"""Random generators take seeds of 64 bits; this leaves room for the seeds that are counted up from it."""
LARGEST_FILE = 16 * 2**20
"""Bytes of a file of arguments."""
DTYPES = ("float32", "bfloat16", "float16", "float64")

_SET_HERE = {
    "generator": "give --seed",
    "num_inference_steps": "give --steps",
    "output_type": "it is chosen here",
    "return_dict": "it is chosen here",
}
"""Arguments of a pipeline's call that a command sets itself."""


def call_inputs(
    model: str, inputs: str | None, labels: str | None, prompts: list[str] | None, guidance: float | None
) -> dict[str, Any]:
    """Keyword arguments of the pipeline's call.

    ``inputs`` is JSON, or the path of a JSON file; ``labels`` a comma-separated list; both may be refined by the other
    options. The demo model has labels and guidance of its own if none are given.
    """
    call: dict[str, Any] = _read_json(inputs) if inputs is not None else {}
    for name, remedy in _SET_HERE.items():
        if name in call:
            raise typer.BadParameter(f"leave {name} out; {remedy}", param_hint="--inputs")
    if labels is not None:
        call["class_labels"] = labels_of(labels)
    if prompts:
        call["prompt"] = list(prompts)
    if guidance is not None:
        if not math.isfinite(guidance):
            raise typer.BadParameter(f"{guidance} is not a finite number", param_hint="--guidance")
        call["guidance_scale"] = guidance
    if model == DEMO:
        call = {"class_labels": list(DEMO_LABELS), "guidance_scale": DEMO_GUIDANCE} | call
        _check_digits(call["class_labels"], "--labels" if labels is not None else "--inputs")
    if not call.keys() & {"class_labels", "prompt", "prompt_embeds"}:
        raise typer.BadParameter(
            "say what to sample: --labels 1,2,3 for a class-conditional model, --prompt TEXT for a text model, or "
            "--inputs with the arguments of the pipeline's call as JSON"
        )
    return call


def _check_digits(labels: object, option: str) -> None:
    """The built-in model has room for more classes than it was trained on."""
    wanted = labels if isinstance(labels, list) else []
    strange = [label for label in wanted if isinstance(label, bool) or label not in DEMO_LABELS]
    if strange or not wanted:
        found = quoted(strange[0]) if strange else f"{quoted(labels)}"
        raise typer.BadParameter(
            f"{found} is no class of the demo model, or a list of them; it knows the digits 0 to 9", param_hint=option
        )


def image_captions(call: dict[str, Any], names: dict[int, str], images: int) -> tuple[str, ...]:
    """What was asked for, per image: the label's name or the prompt, repeated over the seeds; none if unknown."""
    labels, prompt = call.get("class_labels"), call.get("prompt")
    if isinstance(labels, list):
        texts = [names.get(label, f"class {shown(label)}") for label in labels]
    elif prompt is not None:
        texts = [prompt] if isinstance(prompt, str) else [str(text) for text in prompt]
    else:
        return ()
    if images % len(texts):
        return ()
    # The pipelines repeat over the images of a prompt before they go on to the next; seeds come outermost.
    per_text = call.get("num_images_per_prompt", 1) if labels is None else 1
    texts = [_caption(text) for text in texts for _ in range(per_text)]
    return tuple(texts * (images // len(texts))) if images % len(texts) == 0 else ()


def _caption(text: str) -> str:
    """The beginning of a prompt, printable."""
    beginning = shown(text[:100], 1000)
    return beginning if len(beginning) <= 60 else beginning[:59] + "…"


def seeds_for(samples: int, per_call: int, first: int) -> tuple[int, ...]:
    """As many seeds, from ``first`` on, as give at least ``samples`` images in calls of ``per_call``."""
    return tuple(range(first, first + max(1, -(-samples // per_call))))


def images_per_call(call: dict[str, Any]) -> int:
    """Images that one call makes, as far as its arguments tell."""
    given = call.get("class_labels", call.get("prompt"))
    return (len(given) if isinstance(given, list) else 1) * int(call.get("num_images_per_prompt", 1))


def open_pipeline(
    model: str, device: str | None, call: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> DiffusionPipeline:
    """The pipeline called ``model`` on ``device``, by default the first GPU if there is one, in ``dtype``.

    ``call``: what it is going to be called with, which is checked. Raises what ``load_pipeline`` and ``check_call`` do.
    """
    from difa_compile.pipeline.loading import load_pipeline

    hush_diffusers()
    pipe = load_pipeline(model, dtype)
    if call is not None:
        check_call(pipe, call)
    return _move(pipe, device)


def check_device(name: str | None) -> None:
    """Refuse a device that does not exist, before anything is loaded for it."""
    if name is None:
        return
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise ValueError("nothing can be computed there")
        torch.empty(1, device=device).cpu()
    except Exception as error:  # each backend has errors of its own for what it lacks
        reason = shown(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise typer.BadParameter(f"device {quoted(name)} cannot be used: {reason}", param_hint="--device") from error


def dtype_named(name: str) -> torch.dtype:
    """A floating-point dtype of torch by its name."""
    if name not in DTYPES:
        raise typer.BadParameter(
            f"{quoted(name)} is no dtype of attention; choose from {', '.join(DTYPES)}", param_hint="--dtype"
        )
    found: torch.dtype = getattr(torch, name)
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
        reason = shown(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise typer.BadParameter(
            f"the model cannot be moved to {quoted(wanted)}: {reason}", param_hint="--device"
        ) from error


def command_line() -> str:
    """The command as it was typed, printable."""
    return visible(shlex.join(["difa", *sys.argv[1:]]))


def labels_of(text: str) -> list[int]:
    """Class numbers of a comma-separated list."""
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*(,\s*[0-9]{1,9}\s*)*", text):
        raise typer.BadParameter(f"{quoted(text)} is not a list of class numbers such as 1,2,3", param_hint="--labels")
    return [int(part) for part in text.split(",")]


def _read_json(text: str) -> dict[str, Any]:
    source = text if text.lstrip().startswith("{") else _read_file(text)
    try:
        call = json.loads(source, parse_constant=_no_constant)
    except RecursionError:
        raise typer.BadParameter("the JSON is nested too deeply", param_hint="--inputs") from None
    except ValueError as error:
        raise typer.BadParameter(f"not valid JSON: {shown(error)}", param_hint="--inputs") from None
    if not isinstance(call, dict):
        raise typer.BadParameter("the JSON must be an object of arguments and values", param_hint="--inputs")
    return call


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _read_file(name: str) -> str:
    """The text of a file; never waits, as reading from a pipe would."""
    try:
        with open(os.open(name, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("it is not a plain file")
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ValueError(f"it has more than {LARGEST_FILE:,} bytes")
        return content.decode("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else shown(error)
        raise typer.BadParameter(
            f"{quoted(name)} is neither a JSON object nor a file that can be read ({reason})", param_hint="--inputs"
        ) from None


def tried_decisions(windows: Sequence[str] | None, decisions: Sequence[str] | None) -> list[str] | None:
    """What ``--window`` and ``--try`` name, as texts of decisions; None where neither was given.

    Raises :class:`DecisionError` for what is no window or no decision.
    """
    from difa_compile.decision import Decision, Window

    found = [f"window({Window.parse(window)})" for window in windows or ()]
    found += [str(Decision.parse(text)) for text in decisions or ()]
    return found or None
