"""Engines of TensorRT, or of TensorRT-RTX where that is not installed; the latter builds without a GPU.

* *What is parsed* is the ONNX model of :mod:`difa_compile.exporting.targets.onnx`, its functions written out in place:
  TensorRT takes the first function of a name for all of them. Before it is built from, ONNX Runtime runs the very model
  beside the program.
* *Weights* of the model are inputs of the network, all of them, biases and scales too: engines have none of their own,
  share one copy on the device, and a LoRA needs no other engine. Weight streaming has nothing to stream then. Constants
  up to :data:`INSIDE` bytes stay in each engine, which can make use of a mask that it knows.
* *Numbers of images* are one optimisation profile, from the least over the usual, by default half the most, to the
  most.
* *Precision* is that of the model's dtypes (strongly typed).

TensorRT-RTX measures nothing while it builds; two engines of the same model have the same size and memory, but may list
their tensors in another order. TensorRT times kernels, and keeps what it measured for the engines that follow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from difa_compile.bundle.manifest import Port, sizes_of
from difa_compile.bundle.tensorrt import Library, check_engine, dtype_of, library
from difa_compile.bundle.weights import Place
from difa_compile.errors import TargetError
from difa_compile.exporting.checking import check_model
from difa_compile.exporting.lowered import Lowered, Wanted, table_name
from difa_compile.exporting.targets.onnx import OnnxEngine, to_onnx
from difa_compile.exporting.targets.onnx import check as check_onnx
from difa_compile.wording import shown

if TYPE_CHECKING:
    import onnx

INSIDE = 2**20
"""Bytes of a constant up to which each engine has its own."""
MEMORY = {"activations": "Total Activation Memory", "constants": "Total Weights Memory"}
"""What a build tells of memory: our names, and how its lines begin."""


def check(portable: bool) -> None:
    """Raise :class:`TargetError` unless the library and the packages that make engines are installed."""
    library()
    check_onnx(portable, ("onnx", "onnxscript"))


def lowered(wanted: Wanted, path: Path) -> Lowered:
    """A piece: ``path`` with the ending ``.plan``.

    Raises :class:`TargetError` without the packages that make it, for GPUs that the library does not build for, for
    what it refuses, with its own last lines, and where what it would be built from does not compute what the program
    does.
    """
    builder = library()
    gpus = capabilities(builder, wanted.gpus)
    try:
        import onnx.inliner
    except ImportError as error:
        raise TargetError(
            f"engines of the target tensorrt are made with onnx and onnxscript: pip install onnx onnxscript ({error})"
        ) from error
    made = to_onnx(wanted.program, *wanted.names, wanted.constants)
    weights = set(made.weights) - set(wanted.constants)
    given = {
        name: tensor
        for name, tensor in made.tensors.items()
        if name in weights or tensor.numel() * tensor.itemsize > INSIDE
    }
    model = inlined(made, given)
    unchecked = check_model(model.SerializeToString(), wanted, given)
    content, memory = build(builder, model, given, wanted, gpus)
    file = path.with_suffix(".plan")
    file.write_bytes(content)
    stored = {name: name if name in weights else table_name(tensor) for name, tensor in given.items()}
    tables = {stored[name]: tensor for name, tensor in given.items() if name not in weights}
    versions = {builder.name: builder.version, "onnx": onnx.__version__}
    return Lowered(file, stored, tables, versions, " ".join(gpus.values()), False, memory, unchecked)


def finished(piece: Path, file: str, places: Mapping[str, Place]) -> bytes:
    """The content of an engine, which is given its weights by their names."""
    del file, places
    return piece.read_bytes()


def inlined(made: OnnxEngine, given: Mapping[str, Tensor]) -> onnx.ModelProto:
    """The model without functions; the tensors ``given`` are inputs, behind the others."""
    import onnx.inliner
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import TorchTensor

    graph = made.model.graph
    for name, tensor in made.tensors.items():
        value = graph.initializers[name]
        value.shape = ir.Shape(tuple(tensor.shape))
        value.const_value = None if name in given else TorchTensor(tensor.detach().contiguous(), name=name)
        if name in given:
            graph.inputs.append(graph.initializers.pop(name))
    return onnx.inliner.inline_local_functions(ir.serde.serialize_model(made.model))


# --- building --------------------------------------------------------------------------------------------------------

_timings: dict[str, bytes] = {}
"""By library what it has measured of kernels in this process."""


def build(
    builder: Library,
    model: onnx.ModelProto,
    given: Mapping[str, Tensor],
    wanted: Wanted,
    capabilities: Mapping[Any, str],
) -> tuple[bytes, dict[str, int]]:
    """The engine of a model whose inputs are those ``wanted``, then ``given``, and what memory it takes.

    Raises :class:`TargetError`.
    """
    trt, log = builder.module, builder.log
    log.clear()
    made = trt.Builder(log.logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # where it is no choice, it is the rule
    network = made.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(model.SerializeToString()):
        log.errors += [str(parser.get_error(i).desc()) for i in range(parser.num_errors)]
        raise builder.refused("does not read the model of an engine")
    check_network(builder, network, given, wanted)
    config = made.create_builder_config()
    for i, kind in enumerate(capabilities if builder.name == "tensorrt-rtx" else ()):
        config.num_compute_capabilities = max(i + 1, config.num_compute_capabilities)
        if not config.set_compute_capability(kind, i):
            raise builder.refused(f"does not build for {capabilities[kind]}")
    if grows := [port for port in wanted.inputs if any(isinstance(size, str) for size in port.shape)]:
        profile = made.create_optimization_profile()
        low, high = wanted.images
        usual = min(max(low, wanted.usual or high // 2), high)
        for port in grows:
            profile.set_shape(port.name, *(sizes_of(port.shape, count) for count in (low, usual, high)))
        config.add_optimization_profile(profile)
    if builder.name == "tensorrt":
        timings = config.create_timing_cache(_timings.get(builder.name, b""))
        config.set_timing_cache(timings, False)
    built = made.build_serialized_network(network, config)
    if built is None:
        raise builder.refused("does not build an engine")
    if builder.name == "tensorrt":
        _timings[builder.name] = bytes(config.get_timing_cache().serialize())
    content = bytes(built)
    check_engine(builder, content, "an engine that was built")
    return content, memory_of(log.lines)


def memory_of(lines: Sequence[str]) -> dict[str, int]:
    """Of the lines of a build the memory that its engine takes on the device, in bytes; the last one counts."""
    found = {}
    for name, begins in MEMORY.items():
        for line in lines:
            if match := re.search(rf"{begins}: (\d+) bytes", line):
                found[name] = int(match[1])
    return found


def check_network(builder: Library, network: Any, given: Mapping[str, Tensor], wanted: Wanted) -> None:
    """Raise :class:`TargetError` unless a network has the inputs and outputs that are wanted: names, sizes, dtypes."""
    weights = [Port(name, str(each.dtype).removeprefix("torch."), tuple(each.shape)) for name, each in given.items()]
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for ports, tensors in (((*wanted.inputs, *weights), inputs), (wanted.outputs, outputs)):
        named = {tensor.name: tensor for tensor in tensors}
        for port in ports:
            tensor = named.pop(port.name, None)
            sizes = tuple(-1 if isinstance(size, str) else size for size in port.shape)
            found = None if tensor is None else tuple(tensor.shape)
            if found is None or len(found) != len(sizes) or not all(map(_fits, found, sizes)):
                raise TargetError(f"{builder.name} reads {shown(port.name)} as {found}, and it is {port.shape}")
            if (dtype := dtype_of(tensor.dtype, builder.module)) != port.dtype:
                raise TargetError(f"{builder.name} reads {shown(port.name)} as {dtype}, and it is {port.dtype}")
            if getattr(tensor, "is_shape_tensor", False):
                raise TargetError(
                    f"{builder.name} wants {shown(port.name)} before it runs, because sizes depend on its values"
                )
        if named:
            raise TargetError(f"{builder.name} reads {', '.join(map(shown, named))}, which the engine does not have")


def _fits(found: int, size: int) -> bool:
    """Whether a network's size is one that is wanted; -1 is one that is not known beforehand."""
    return found == size or found == -1


def capabilities(builder: Library, gpus: Sequence[str]) -> dict[Any, str]:
    """The compute capabilities to build for, as the library has them and in words; none is TensorRT-RTX's own list,
    which takes in all that it serves. TensorRT builds for the GPU that is here. Raises :class:`TargetError`."""
    if builder.name == "tensorrt":
        if not torch.cuda.is_available():
            raise TargetError(
                "TensorRT builds on the GPU that it builds for, and torch sees none here; TensorRT-RTX, which needs "
                "none, is taken where TensorRT is not installed: pip uninstall tensorrt; pip install tensorrt-rtx"
            )
        here = "{}.{}".format(*torch.cuda.get_device_capability())
        if any(each != here for each in gpus):
            raise TargetError(f"TensorRT builds for the GPU that is here, of {here}, not for {', '.join(gpus)}")
        return {None: here}
    known = dict(_known(builder))
    for each in gpus:
        if each not in known:
            raise TargetError(
                f"{builder.name} {builder.version} builds for no GPU of the compute capability {shown(each)}; it does "
                f"for {', '.join(known)}"
            )
    return {known[each]: each for each in gpus}


def _known(builder: Library) -> Iterator[tuple[str, Any]]:
    """``8.9`` and so on, and what the library calls it."""
    for name, kind in builder.module.ComputeCapability.__members__.items():
        if found := re.fullmatch(r"SM(\d+)(\d)", name):
            yield f"{found[1]}.{found[2]}", kind
