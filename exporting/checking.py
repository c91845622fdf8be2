"""Engines beside the programs that they were made of: what they give has to be what the program gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from difa_compile.bundle.agreement import LEVELS, LIMITS, coarsest, difference, levels_apart
from difa_compile.bundle.manifest import Port, sizes_of
from difa_compile.errors import TargetError
from difa_compile.exporting.lowered import Wanted
from difa_compile.wording import shown

SEED = 5
NO_BFLOAT16 = "ONNX Runtime computes nothing in bfloat16 on a CPU"


def first_other(wanted: Wanted, run: Callable[[list[Tensor]], Any]) -> tuple[Port, int] | None:
    """The output that ``run`` makes another of than the program, and for how many images; None if there is none.

    For the two least numbers of images, on random numbers; whole ones (steps of time, labels, words) are rows of the
    export's, for which they have a meaning.
    """
    module = wanted.program.module()
    dtype = coarsest(dtypes_of(wanted))
    least, most = wanted.images
    for images in sorted({least, min(least + 1, most)}):
        inputs = inputs_for(wanted, images)
        with torch.no_grad():
            found, right = _listed(run(inputs)), _listed(module(*inputs))
        for port, one, other in zip(wanted.outputs, found, right, strict=True):
            if not alike(one, other, dtype):
                return port, images
    return None


def dtypes_of(wanted: Wanted) -> set[torch.dtype]:
    """Of an engine's inputs, outputs and weights."""
    ports = {getattr(torch, port.dtype) for port in (*wanted.inputs, *wanted.outputs)}
    return ports | {value.dtype for value in wanted.program.state_dict.values()}


def inputs_for(wanted: Wanted, images: int) -> list[Tensor]:
    """Inputs of an engine for so many images."""
    examples = [value for value in wanted.program.example_inputs[0] if isinstance(value, Tensor)]
    generator = torch.Generator().manual_seed(SEED)
    return [
        torch.randn(sizes_of(port.shape, images), generator=generator).to(example.dtype)
        if example.is_floating_point()
        else _resized(example, sizes_of(port.shape, images))
        for port, example in zip(wanted.inputs, examples, strict=True)
    ]


def _resized(example: Tensor, sizes: Sequence[int]) -> Tensor:
    """``example`` with these sizes: its first rows, or all of them again and again."""
    for dim, size in enumerate(sizes):
        example = example.index_select(dim, torch.arange(size) % max(example.shape[dim], 1))
    return example.contiguous()


def _listed(results: Any) -> list[Tensor]:
    return list(results) if isinstance(results, (tuple, list)) else [results]


def alike(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Whether numbers, and colours in bytes, differ by what is rounding in ``dtype``
    (:mod:`difa_compile.bundle.agreement`); other whole numbers are equal, and what is not finite is."""
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return False
    if found.dtype == torch.uint8:
        return levels_apart(found, wanted, dtype) <= LEVELS[dtype]
    return difference(found, wanted) < LIMITS[dtype] if found.is_floating_point() else torch.equal(found, wanted)


def check_model(
    model: bytes, wanted: Wanted, inputs: Mapping[str, Tensor], external: Mapping[str, Tensor] | None = None
) -> str:
    """Run an ONNX model in ONNX Runtime beside its program: "" if it gives the same, or why it was not run.

    ``inputs``: what the model is given beside what an engine is. ``external``: initializers that it does not hold.
    Raises :class:`TargetError` where it gives something else.
    """
    tensors = {**inputs, **(external or {})}
    if torch.bfloat16 in dtypes_of(wanted) | {value.dtype for value in tensors.values()}:
        return NO_BFLOAT16
    try:
        import onnxruntime
    except ImportError:
        return "onnxruntime, which would run its model, is not installed"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    held = {name: value.detach().contiguous().numpy() for name, value in tensors.items()}
    if external:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(held[name]) for name in external]
        options.add_external_initializers(list(external), values)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no class but this one
        raise TargetError(f"ONNX Runtime does not load the model of an engine: {shown(error, 400)}") from error

    def run(given: list[Tensor]) -> list[Tensor]:
        named = {port.name: value.contiguous().numpy() for port, value in zip(wanted.inputs, given, strict=True)}
        named |= {name: held[name] for name in inputs}
        try:
            made = session.run([port.name for port in wanted.outputs], named)
        except Exception as error:
            raise TargetError(f"ONNX Runtime does not run the model of an engine: {shown(error, 400)}") from error
        return [torch.from_numpy(each) for each in made]

    if (other := first_other(wanted, run)) is not None:
        port, images = other
        raise TargetError(
            f"{port.name} of the ONNX model of an engine, for {images} images, is not what the program gives. This is "
            "a fault of difa-compile or of the exporter, not of the model or the plan"
        )
    return ""
