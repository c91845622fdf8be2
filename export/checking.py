"""An ONNX model beside the program that it was made of: ONNX Runtime has to give what the program gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from difa_compile.bundle.manifest import Port, sizes_of
from difa_compile.errors import TargetError
from difa_compile.export.lowered import Wanted
from difa_compile.wording import shown

SEED = 5
ALIKE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2}
"""Of the largest number of an output, by the coarsest dtype: a whole model's rounding, on random inputs, is well below.
What computes something else is further off."""
NO_BFLOAT16 = "ONNX Runtime computes nothing in bfloat16 on a CPU"


def check_model(
    model: bytes, wanted: Wanted, inputs: Mapping[str, Tensor], external: Mapping[str, Tensor] | None = None
) -> str:
    """Run a model in ONNX Runtime beside its program, on random inputs, for the least number of images and for that of
    the export: "" if it gives the same, or why it was not run.

    Whole numbers (steps of time, labels) are those of the export, for which they have a meaning. ``inputs``: what the
    model is given beside what an engine is. ``external``: initializers that it does not hold. Raises
    :class:`TargetError` where it gives something else.
    """
    tensors = {**inputs, **(external or {})}
    arguments = [value for value in wanted.program.example_inputs[0] if isinstance(value, Tensor)]
    dtypes = {value.dtype for value in (*arguments, *tensors.values())}
    if torch.bfloat16 in dtypes:
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
    generator = torch.Generator().manual_seed(SEED)
    arguments = [
        torch.randn(value.shape, generator=generator).to(value.dtype) if value.is_floating_point() else value
        for value in arguments
    ]
    floats = [each for each in dtypes if each.is_floating_point]
    coarsest = max(floats, key=lambda each: torch.finfo(each).eps, default=torch.float32)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no class but this one
        raise TargetError(f"ONNX Runtime does not load the model of an engine: {shown(error, 400)}") from error
    module = wanted.program.module()
    for given in (_fewest(wanted.inputs, arguments, wanted.images[0]), arguments):
        with torch.no_grad():
            found = module(*given)
        results = list(found) if isinstance(found, (tuple, list)) else [found]
        named = {port.name: value.detach().contiguous().numpy()
                 for port, value in zip(wanted.inputs, given, strict=True)}  # fmt: skip
        named |= {name: held[name] for name in inputs}
        try:
            others = session.run([port.name for port in wanted.outputs], named)
        except Exception as error:
            raise TargetError(f"ONNX Runtime does not run the model of an engine: {shown(error, 400)}") from error
        for port, one, array in zip(wanted.outputs, results, others, strict=True):
            _check_alike(port, one, torch.from_numpy(array), coarsest)
    return ""


def _fewest(ports: Sequence[Port], arguments: Sequence[Tensor], images: int) -> list[Tensor]:
    """The first of the images of arguments."""
    sizes = [sizes_of(port.shape, images) for port in ports]
    return [value[tuple(map(slice, each))] for value, each in zip(arguments, sizes, strict=True)]


def _check_alike(port: Port, one: Any, other: Tensor, coarsest: torch.dtype) -> None:
    if not (alike(one, other, ALIKE[coarsest]) or near(one, other)):
        raise TargetError(
            f"{port.name} of the ONNX model of an engine is not what the program gives. This is a fault of "
            "difa-compile or of the exporter, not of the model or the plan"
        )


def alike(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether numbers differ by rounding: by ``tolerance`` of the largest finite one. What is not finite is equal."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    finite = one.isfinite()
    if not torch.equal(finite, other.isfinite()) or not torch.equal(
        one[~finite].nan_to_num(), other[~finite].nan_to_num()
    ):
        return False
    largest = one[finite].double().abs().max().clamp_min(1e-6) if finite.any() else 1.0
    return bool(((one[finite].double() - other[finite].double()).abs() <= tolerance * largest).all())


def near(one: Tensor, other: Tensor) -> bool:
    """Whether whole numbers differ by 1 at most: what rounding to them makes of rounding."""
    if one.is_floating_point() or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one.long() - other.long()).abs() <= 1).all())
