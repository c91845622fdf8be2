"""Inputs to look at a model with when the user gave none: random tensors of the shapes its config asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from difa_compile.errors import ExampleInputsError

TEXT_TOKENS = 32
"""Length of the example text, for models whose config does not fix it."""
GRID = 16
"""Tokens per side of the example image, for models whose config does not fix it."""
FRAMES = 3
"""Latent frames of the example video."""


class _Source:
    """Random tensors like a model's: its device and dtype, always the same values."""

    def __init__(self, model: nn.Module, config: Mapping[str, Any], batch: int) -> None:
        parameter = next(model.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.dtype = torch.float32 if parameter is None else parameter.dtype
        self.generator = torch.Generator().manual_seed(0)
        self.config = config
        self.batch = batch

    def normal(self, *shape: int) -> Tensor:
        """``(batch, *shape)`` standard normal values in the model's dtype."""
        values = torch.randn(self.batch, *shape, generator=self.generator)
        return values.to(self.device, self.dtype)

    def integers(self, high: int) -> Tensor:
        """``(batch,)`` int64 values below ``high``."""
        return torch.randint(high, (self.batch,), generator=self.generator).to(self.device)

    def constant(self, value: float, dtype: torch.dtype | None = None) -> Tensor:
        """``(batch,)`` times ``value``."""
        return torch.full((self.batch,), value, device=self.device, dtype=dtype or self.dtype)

    def size(self) -> int:
        """Height and width of the latent image that the config names."""
        return int(self.config["sample_size"])


def _dit(source: _Source) -> dict[str, Any]:
    config = source.config
    return {
        "hidden_states": source.normal(config["in_channels"], source.size(), source.size()),
        "timestep": source.constant(500, torch.int64),
        "class_labels": source.integers(config["num_embeds_ada_norm"]),
    }


def _pixart(source: _Source) -> dict[str, Any]:
    config = source.config
    text = config["caption_channels"] or config["cross_attention_dim"]
    sizes = config["use_additional_conditions"]
    if sizes is None:
        sizes = config["sample_size"] == 128
    resolution, ratio = source.constant(1024.0)[:, None].repeat(1, 2), source.constant(1.0)[:, None]
    return {
        "hidden_states": source.normal(config["in_channels"], source.size(), source.size()),
        "encoder_hidden_states": source.normal(TEXT_TOKENS, text),
        "timestep": source.constant(500, torch.int64),
        "added_cond_kwargs": {"resolution": resolution if sizes else None, "aspect_ratio": ratio if sizes else None},
    }


def _sd3(source: _Source) -> dict[str, Any]:
    config = source.config
    return {
        "hidden_states": source.normal(config["in_channels"], source.size(), source.size()),
        "encoder_hidden_states": source.normal(TEXT_TOKENS, config["joint_attention_dim"]),
        "pooled_projections": source.normal(config["pooled_projection_dim"]),
        "timestep": source.constant(500.0),
    }


def _flux(source: _Source) -> dict[str, Any]:
    config = source.config
    axes = len(config["axes_dims_rope"])
    image_ids = torch.zeros(GRID, GRID, axes)
    image_ids[..., 1] = torch.arange(GRID)[:, None]
    image_ids[..., 2] = torch.arange(GRID)[None, :]
    inputs = {
        "hidden_states": source.normal(GRID * GRID, config["in_channels"]),
        "encoder_hidden_states": source.normal(TEXT_TOKENS, config["joint_attention_dim"]),
        "pooled_projections": source.normal(config["pooled_projection_dim"]),
        "timestep": source.constant(0.5),
        "img_ids": image_ids.reshape(GRID * GRID, axes).to(source.device, source.dtype),
        "txt_ids": torch.zeros(TEXT_TOKENS, axes, device=source.device, dtype=source.dtype),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = source.constant(3.5, torch.float32)
    return inputs


def _wan(source: _Source) -> dict[str, Any]:
    config = source.config
    _, height, width = config["patch_size"]
    inputs = {
        "hidden_states": source.normal(config["in_channels"], FRAMES, GRID * height, GRID * width),
        "timestep": source.constant(500, torch.int64),
        "encoder_hidden_states": source.normal(TEXT_TOKENS, config["text_dim"]),
    }
    if config.get("image_dim") is not None:
        inputs["encoder_hidden_states_image"] = source.normal(257, config["image_dim"])
    return inputs


_BUILDERS: dict[str, Callable[[_Source], dict[str, Any]]] = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "WanTransformer3DModel": _wan,
}
"""By class name, so that no model class is imported."""


def example_inputs(model: nn.Module, batch: int = 2) -> dict[str, Any]:
    """Keyword arguments for the forward of a bare diffusers transformer, from its config.

    Known: DiT, PixArt, SD3, FLUX, Wan, and subclasses. ``batch`` (>= 1) is the first size of every batched tensor.
    Tensors are on the model's device, floating ones in its dtype; values are the same at every call. Image models get
    the size their config names; FLUX a 16 x 16 grid of tokens and Wan a 3 x 16 x 16 one.

    Raises :class:`ExampleInputsError` for other models.
    """
    if batch < 1:
        raise ExampleInputsError(f"batch is {batch}; it must be at least 1")
    inner = getattr(model, "_orig_mod", model)
    build = next((_BUILDERS[base.__name__] for base in type(inner).__mro__ if base.__name__ in _BUILDERS), None)
    config = getattr(inner, "config", None)
    if build is None or not isinstance(config, Mapping):
        raise ExampleInputsError(
            f"no example inputs are known for {type(inner).__name__} (known: {', '.join(_BUILDERS)}); "
            "give the inputs of its forward as a dictionary"
        )
    return {**build(_Source(inner, config, batch)), "return_dict": False}


def pipeline_inputs(pipe: object) -> dict[str, Any]:
    """The smallest call of a diffusers pipeline: one step, one image of its default size, seeded, as latents if it can.

    Class-conditional pipelines get label 0, the others an empty prompt. Raises :class:`ExampleInputsError` for a
    pipeline that needs more than that, for instance an image.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    candidates = {
        "class_labels": [0],
        "prompt": "",
        "num_inference_steps": 1,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    inputs = {name: value for name, value in candidates.items() if name in parameters}
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in inputs
        and name != "self"
    ]
    if needed:
        raise ExampleInputsError(
            f"{type(pipe).__name__} needs {', '.join(needed)}, for which there is no example; give the inputs of its "
            "call as a dictionary"
        )
    return inputs
