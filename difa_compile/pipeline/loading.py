"""Loading what the user named: the built-in demo model, a local folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from difa_compile.demo.checkpoint import load_demo
from difa_compile.errors import MissingDependencyError, ModelLoadError
from difa_compile.wording import quoted, shown

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DEMO = "demo"
"""Name of the model that ships with this package."""


def load_pipeline(name_or_folder: str | Path, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The diffusers pipeline called ``demo`` (built in), or in a local folder, or of a hub repository.

    ``dtype`` is that of the weights after loading. Raises :class:`ModelLoadError` if there is nothing that loads under
    this name, and :class:`MissingDependencyError` without diffusers.
    """
    diffusers = _diffusers()
    if str(name_or_folder) == DEMO:
        return load_demo(dtype)
    folder = _resolve(name_or_folder)
    if isinstance(folder, Path) and not (folder / "model_index.json").is_file():
        remedy = (
            "it is a single model: name the folder above it"
            if (folder / "config.json").is_file()
            else "name the folder that DiffusionPipeline.save_pretrained wrote"
        )
        raise ModelLoadError(f"{shown(folder)} is not a pipeline folder (no model_index.json); {remedy}")
    try:
        pipe: DiffusionPipeline = diffusers.DiffusionPipeline.from_pretrained(str(folder), **_dtype(diffusers, dtype))
    except Exception as error:
        raise _load_error(name_or_folder, folder, error) from error
    for name, component in pipe.components.items():
        _check_complete(component, f"{shown(name)} of {shown(name_or_folder)}")
    return pipe


def load_model(name_or_folder: str | Path, dtype: torch.dtype = torch.float32) -> DiffusionPipeline | nn.Module:
    """A pipeline, or a bare diffusers model where the folder or repository holds only one (``config.json``).

    Raises as :func:`load_pipeline`.
    """
    diffusers = _diffusers()
    if str(name_or_folder) == DEMO:
        return load_demo(dtype)
    folder = _resolve(name_or_folder)
    is_pipeline = (
        (folder / "model_index.json").is_file() or not (folder / "config.json").is_file()
        if isinstance(folder, Path)
        else _hub_holds_pipeline(folder)
    )
    if is_pipeline:
        return load_pipeline(name_or_folder, dtype)
    try:
        model: nn.Module = diffusers.AutoModel.from_pretrained(str(folder), **_dtype(diffusers, dtype))
    except Exception as error:
        raise _load_error(name_or_folder, folder, error) from error
    _check_complete(model, shown(name_or_folder))
    return model.eval()


def _check_complete(model: object, what: str) -> None:
    """Raise :class:`ModelLoadError` for a model with weights that its files lack: diffusers leaves those unset."""
    if not isinstance(model, nn.Module):
        return
    missing = [name for name, weight in model.state_dict(keep_vars=True).items() if weight.is_meta]
    if missing:
        raise ModelLoadError(
            f"{what}: the files lack {len(missing)} weights of a {shown(type(model).__name__)} of this configuration, "
            f"for instance {shown(missing[0])}; they are damaged, or belong to another configuration"
        )


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise MissingDependencyError(
            "loading a pipeline needs diffusers, which is not installed; pip install 'difa-compile[diffusers]'"
        ) from error
    return diffusers


def _dtype(diffusers: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype argument by the name that this version of diffusers has for it: ``dtype``, earlier ``torch_dtype``."""
    renamed = hasattr(diffusers.utils.deprecation_utils, "_resolve_dtype")
    return {"dtype" if renamed else "torch_dtype": dtype}


def _resolve(name_or_folder: str | Path) -> Path | str:
    """A local folder as a ``Path``, or a hub id as a ``str``."""
    folder = Path(os.path.expanduser(name_or_folder))
    # os.path, for it takes any text, names too long for a file or with a zero byte among it.
    if os.path.isdir(folder):
        return folder
    if os.path.lexists(folder):
        raise ModelLoadError(
            f"{shown(folder)} is a file; name the folder of a diffusers pipeline or model, or a hub id"
        )
    parts = str(name_or_folder).split("/")
    if isinstance(name_or_folder, Path) or len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise ModelLoadError(
            f"there is no folder {quoted(name_or_folder)}; give the folder of a diffusers pipeline, a hub id of the "
            f"form OWNER/NAME, or {DEMO!r} for the built-in model"
        )
    return str(name_or_folder)


def _hub_holds_pipeline(repository: str) -> bool:
    """Whether a hub repository has a ``model_index.json``."""
    try:
        from huggingface_hub import file_exists

        return file_exists(repository, "model_index.json")
    except Exception as error:
        raise _load_error(repository, repository, error) from error


def _load_error(name: str | Path, folder: Path | str, error: BaseException) -> ModelLoadError:
    # What diffusers, safetensors, pickle and the hub client raise for folders that are incomplete or damaged, and for
    # names that do not exist, has no common class; whatever it is, the model was not loaded, and the cause is kept.
    reason = str(error).strip().splitlines()
    first = shown(reason[0]) if reason else type(error).__name__
    if isinstance(folder, Path):
        return ModelLoadError(f"{shown(_folder_class(folder))} in {shown(folder)} could not be loaded: {first}")
    return ModelLoadError(
        f"{shown(name)} could not be loaded from the hub: {first}; check the spelling, the network and, for a gated "
        "repository, that you are logged in"
    )


def _folder_class(folder: Path) -> str:
    """Class named by a folder's index, for messages."""
    for name in ("model_index.json", "config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("_class_name")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if isinstance(found, str):
            return found
    return "the model"
