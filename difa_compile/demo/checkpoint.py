"""Where the packaged demo model lies and how it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from difa_compile.demo.digits import NUM_CLASSES
from difa_compile.errors import MissingDependencyError, ModelLoadError
from difa_compile.wording import shown

if TYPE_CHECKING:
    from diffusers import DiTPipeline

LABELS = {digit: str(digit) for digit in range(NUM_CLASSES)}


def demo_model_path() -> Path:
    """Folder of the packaged ``DiTPipeline``; :class:`ModelLoadError` if this installation has none on disk."""
    folder = resources.files("difa_compile.demo").joinpath("model")
    if not isinstance(folder, Path) or not (folder / "model_index.json").is_file():
        raise ModelLoadError(
            f"the demo model is missing from this installation (looked for {folder}); install difa-compile from a "
            "wheel or a clone, unpacked, or train it with examples/train_demo_model.py"
        )
    return folder


@contextmanager
def _without_vae_type_notice() -> Iterator[None]:
    """Drop one notice of diffusers: ``AutoencoderTiny`` stands where ``DiTPipeline`` names ``AutoencoderKL``."""

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Expected types for vae:")

    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def load_demo(dtype: torch.dtype = torch.float32, folder: Path | None = None) -> DiTPipeline:
    """The demo pipeline on the CPU in ``dtype``: classes 0 to 9, images (N, 1, 32, 32), DPM-Solver++, batched CFG.

    ``folder`` is another checkpoint of the same kind, for instance one still in training; without it the packaged
    one is loaded. Raises :class:`ModelLoadError` if the folder holds no such pipeline, and
    :class:`MissingDependencyError` without diffusers.
    """
    try:
        from diffusers import DiTPipeline
    except ImportError as error:
        raise MissingDependencyError(
            "the demo model is a diffusers pipeline and diffusers is not installed; install difa-compile[diffusers]"
        ) from error
    source = folder if folder is not None else demo_model_path()
    if not (source / "model_index.json").is_file():
        raise ModelLoadError(f"{source} is not a diffusers pipeline folder: it has no model_index.json")
    loader: Any = DiTPipeline
    with _without_vae_type_notice():
        try:
            # Without a dtype it loads in float32; the name of that argument depends on the release of diffusers.
            pipe: Any = loader.from_pretrained(str(source), id2label=LABELS)
        except Exception as error:  # of diffusers, safetensors and json, for damaged files: they have no common class
            raise ModelLoadError(f"{shown(source)} cannot be loaded as the demo pipeline: {shown(error)}") from error
    result: DiTPipeline = pipe if pipe.dtype == dtype else pipe.to(dtype)
    return result
