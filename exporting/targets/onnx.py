"""Engines as ONNX models whose weights lie in a file of all engines.

* *Weights keep their identity.* They are inputs of the graph while it is optimised, so that nothing is folded into
  them, transposed or merged: a LoRA, which changes weights, needs no other engine. Linear layers become ``Gemm`` with
  the weight as it is. In the end weights are initializers by name whose bytes the model does not have
  (:func:`finished` says where they are).
* *Local attention* is one node ``difa::LocalAttention_<n>`` with the op's attributes, and a function of that name whose
  body is plain operations (:mod:`difa_compile.exporting.plain_attention`): any runtime runs it, and one with a kernel
  of ours can take the node. Each geometry has a name of its own, because TensorRT's parser takes the first function of
  a name, whatever its overload.
* *Groups of heads* are joined by plain operations.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.fx.experimental._config as symbols_config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from difa_compile.bundle.weights import Place
from difa_compile.decision import Window
from difa_compile.errors import TargetError
from difa_compile.exporting.checking import check_model
from difa_compile.exporting.lowered import Lowered, Wanted, table_name
from difa_compile.exporting.plain_attention import PlainLocalAttention
from difa_compile.layout import Layout
from difa_compile.ops.heads import JOIN_HEADS
from difa_compile.ops.local_attention import LOCAL_ATTENTION
from difa_compile.ops.sized import SIZED

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 20
"""The version of ONNX's operators: the newest that TensorRT builds every attention of."""
DOMAIN = "difa"
NAME = "LocalAttention"
SMALL = 256
"""Numbers up to which a constant stands in the model itself."""


@dataclass(frozen=True)
class OnnxEngine:
    """``model``: without the bytes of its ``tensors``, the initializers by name. ``weights``: which of these are the
    model's own, under the names it has for them; the others are constants, tables of positions for instance."""

    model: ir.Model = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)
    weights: tuple[str, ...]


def to_onnx(
    program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], constants: Sequence[str] = ()
) -> OnnxEngine:
    """``program`` as an ONNX model whose inputs and outputs have these names, in order.

    ``constants``: which of its parameters and buffers are no weights. Small ones stand in the model itself: axes and
    shapes may be among them, which runtimes want to see.

    Raises what torch's exporter raises, for operations that ONNX does not have.
    """
    import onnxscript.optimizer

    program = joined_plainly(program)
    translation = _Translation()
    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            custom_translation_table=translation.table(),
            input_names=list(inputs),
            output_names=list(outputs),
        )
    assert exported is not None
    model = exported.model
    values = {name: _tensor_of(value) for name, value in model.graph.initializers.items()}
    named = _weight_names(program)
    small = {name for name in constants if name in values and values[name].numel() <= SMALL}
    weights = {name: values[name] for name in named if name in values and name not in small}
    held = {name: model.graph.initializers.pop(name) for name in weights}
    for value in held.values():
        value.const_value = None
        model.graph.inputs.append(value)
    with _quiet():
        onnxscript.optimizer.optimize_ir(
            model, onnx_shape_inference=False, input_size_limit=2**20, output_size_limit=2**22
        )
    del model.graph.inputs[len(inputs) :]
    tensors = {}
    for name, value in held.items():
        if value.uses():
            model.graph.initializers[name] = value
            tensors[name] = weights[name]
    own = tuple(tensors)
    for name, value in model.graph.initializers.items():
        if name not in tensors and value.const_value is not None and value.const_value.size > SMALL:
            tensors[name] = _tensor_of(value)
    for body in translation.bodies():
        model.functions[body.function.identifier()] = body.function
        model.opset_imports.setdefault(DOMAIN, 1)
        tables = [_initializer(model.graph, name, table) for name, table in body.tables.items()]
        tensors |= body.tables
        for node in model.graph:
            if (node.domain, node.op_type) == (DOMAIN, body.function.name):
                node.resize_inputs(len(body.function.inputs))
                for place, table in enumerate(tables, len(body.function.inputs) - len(tables)):
                    node.replace_input_with(place, table)
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        _strip(graph)
    model.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "difa-compile", None, None
    return OnnxEngine(model, tensors, own)


def _strip(graph: ir.Graph) -> None:
    """Take out what exporters note of where a node came from: names of files and lines of code."""
    graph.doc_string = None
    graph.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for node in graph:
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _initializer(graph: ir.Graph, name: str, tensor: Tensor) -> ir.Value:
    """A tensor of a graph by name, put there if it is not."""
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import TorchTensor

    if name not in graph.initializers:
        value = ir.Value(name=name, type=ir.TensorType(_dtype(tensor.dtype)), shape=ir.Shape(tuple(tensor.shape)))
        value.const_value = TorchTensor(tensor, name=name)
        graph.initializers[name] = value
    return graph.initializers[name]


def check(portable: bool, packages: Sequence[str] = ("onnx", "onnxscript", "onnxruntime")) -> None:
    """Raise :class:`TargetError` unless the packages that make and run engines are installed."""
    del portable  # they always are
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise TargetError(
            f"engines of the target onnx are made with {', '.join(packages)}, and {', '.join(missing)} is not "
            f"installed: pip install {' '.join(missing)}"
        )


def lowered(wanted: Wanted, path: Path) -> Lowered:
    """A piece: ``path`` with the ending ``.onnx``, for any processor.

    ONNX Runtime runs it beside the program first. Raises :class:`TargetError` without the packages that make it, and
    where it gives something else.
    """
    try:
        import onnx
        import onnxscript
    except ImportError as error:
        raise TargetError(
            f"engines of the target onnx are made with onnx and onnxscript: pip install onnx onnxscript ({error})"
        ) from error
    import onnx_ir as ir

    made = to_onnx(wanted.program, *wanted.names, wanted.constants)
    for name, tensor in made.tensors.items():
        _placed(
            made.model.graph.initializers[name],
            tensor.dtype,
            tuple(tensor.shape),
            _NOWHERE,
            Place(0, 0, tensor.dtype, ()),
        )
    content = ir.serde.serialize_model(made.model).SerializeToString()
    unchecked = check_model(content, wanted, {}, made.tensors)
    file = path.with_suffix(".onnx")
    file.write_bytes(content)
    weights = set(made.weights) - set(wanted.constants)
    stored = {name: name if name in weights else table_name(tensor) for name, tensor in made.tensors.items()}
    tables = {stored[name]: tensor for name, tensor in made.tensors.items() if name not in weights}
    versions = {"onnx": onnx.__version__, "onnxscript": onnxscript.__version__, "opset": str(OPSET)}
    return Lowered(file, stored, tables, versions, unchecked=unchecked)


_NOWHERE = "weights"


def finished(piece: Path, file: str, places: Mapping[str, Place]) -> bytes:
    """The content of a model whose tensors lie in ``file``, beside it, at ``places``. Raises ``KeyError`` if one has no
    place."""
    import onnx
    import onnx_ir as ir

    model = ir.serde.deserialize_model(onnx.load(piece, load_external_data=False))
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            place = places[name]
            _placed(value, place.dtype, place.shape, file, place)
    content: bytes = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    return content


def _placed(value: ir.Value, dtype: torch.dtype, shape: tuple[int, ...], file: str, place: Place) -> None:
    """Let an initializer's numbers lie in a file."""
    import onnx_ir as ir

    value.const_value = ir.ExternalTensor(
        file, place.offset, place.length, _dtype(dtype), shape=ir.Shape(shape), name=str(value.name)
    )
    value.shape, value.type = ir.Shape(shape), ir.TensorType(_dtype(dtype))


def joined_plainly(program: ExportedProgram) -> ExportedProgram:
    """The program with heads joined by plain operations."""
    if not any(node.target is JOIN_HEADS for node in program.graph.nodes):
        return program
    plain: ExportedProgram = program.run_decompositions({JOIN_HEADS: join_heads})
    return plain


def join_heads(
    values: Sequence[Tensor],
    first: Sequence[int],
    step: Sequence[int],
    added: Sequence[Tensor],
    to: Sequence[int],
    heads: int,
) -> Tensor:
    """``difa::join_heads`` in plain operations: runs of heads, put one after the other."""
    parts = list(values)
    for place, more in zip(to, added, strict=True):
        parts[place] = parts[place] + more
    whose = [
        (start + i * stride, part, i)
        for part, start, stride in zip(parts, first, step, strict=True)
        for i in range(part.shape[1])
    ]
    runs: list[tuple[Tensor, int, int]] = []
    for _, part, i in sorted(whose, key=lambda entry: entry[0]):
        if runs and runs[-1][0] is part and runs[-1][1] + runs[-1][2] == i:
            runs[-1] = (part, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((part, i, 1))
    assert sum(count for *_, count in runs) == heads, "every head is named once"
    return torch.cat([part.narrow(1, i, count) for part, i, count in runs], 1)


def _weight_names(program: ExportedProgram) -> list[str]:
    """The parameters and buffers of a program, by the names that their owner has for them."""
    kinds = (InputKind.PARAMETER, InputKind.BUFFER)
    return [str(spec.target) for spec in program.graph_signature.input_specs if spec.kind in kinds]


# --- operators -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Geometry:
    """All that tells one body of local attention from another: the op's attributes, and the operands' sizes but for the
    batch. ``mask``: shape and dtype, None without one; a size is None where it grows with the batch."""

    grid: tuple[int, ...]
    before: int
    after: int
    shape: str
    radius: int
    scale: float | None
    pooled: int
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    dtype: torch.dtype
    mask: tuple[tuple[int | None, ...], torch.dtype] | None

    def module(self) -> PlainLocalAttention:
        return PlainLocalAttention(
            Layout(self.grid, self.before, self.after),
            Window(self.shape, self.radius),
            self.query[1],
            self.scale,
            self.mask is not None,
            self.pooled,
        )


class _Translation:
    """How operations of torch become those of ONNX where the exporter's own way will not do."""

    def __init__(self) -> None:
        self._numbers: dict[_Geometry, int] = {}

    def table(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        @functools.wraps(self._local_attention)
        def local_attention(*args: Any, **kwargs: Any) -> Any:  # the exporter keeps notes on it, which no method takes
            return self._local_attention(*args, **kwargs)

        return {
            LOCAL_ATTENTION: local_attention,
            torch.ops.aten.linear.default: _linear,
            torch.ops.aten.squeeze.dim: _squeeze,
            SIZED: _sized,
        }

    def _local_attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        grid: Sequence[int],
        before: int,
        after: int,
        shape: str,
        radius: int,
        scale: float | None = None,
        mask: Any = None,
        pooled: int = 0,
    ) -> Any:
        of_query, of_key, of_value = (tuple(int(size) for size in each.shape[1:]) for each in (query, key, value))
        seen = None
        if mask is not None:
            seen = tuple(size if isinstance(size, int) else None for size in mask.shape), _torch_dtype(mask.dtype)
        geometry = _Geometry(
            tuple(grid),
            before,
            after,
            str(shape),
            radius,
            scale,
            pooled,
            of_query,
            of_key,
            of_value,
            _torch_dtype(query.dtype),
            seen,
        )
        name = self._name(geometry)
        attributes: dict[str, Any] = {
            "grid": list(grid), "before": before, "after": after, "shape": str(shape), "radius": radius,
            "pooled": pooled,
        }  # fmt: skip
        if scale is not None:
            attributes["scale"] = float(scale)
        operands = [query, key, value] + ([] if mask is None else [mask])
        return _operator(name, attributes, masked=mask is not None)(*operands, **attributes)

    def _name(self, geometry: _Geometry) -> str:
        return f"{NAME}_{self._numbers.setdefault(geometry, len(self._numbers))}"

    def bodies(self) -> Iterator[_Body]:
        """Of each geometry met."""
        for geometry in self._numbers:
            yield _body(self._name(geometry), geometry)


@dataclass(frozen=True)
class _Body:
    """A function, and the ``tables`` that are its last inputs: who sees whom, and which tokens make a tile. A table is
    named by its content, so that all engines share it."""

    function: ir.Function
    tables: Mapping[str, Tensor]


def _linear(value: Any, weight: Any, bias: Any = None) -> Any:
    """``aten::linear`` with the weight as it is: ``Gemm(transB=1)`` over all rows."""
    from onnxscript import opset20

    op: Any = opset20  # typed by operand kinds, which symbolic values do not tell
    sizes = list(value.shape)
    operands = [weight] if bias is None else [weight, bias]
    if len(sizes) == 2:
        return op.Gemm(value, *operands, transB=1)
    flat = op.Gemm(op.Reshape(value, op.Constant(value_ints=[-1, int(sizes[-1])])), *operands, transB=1)
    symbols = [i for i, size in enumerate(sizes[:-1]) if not isinstance(size, int)]
    wide = int(weight.shape[0])
    if len(symbols) <= 1:
        shape = [size if isinstance(size, int) else -1 for size in sizes[:-1]]
        return op.Reshape(flat, op.Constant(value_ints=[*shape, wide]))
    rows = op.Shape(value, start=0, end=-1)
    return op.Reshape(flat, op.Concat(rows, op.Constant(value_ints=[wide]), axis=0))


def _squeeze(value: Any, dim: int) -> Any:
    """``aten::squeeze.dim``, which leaves a dimension alone that is not 1; ``Squeeze`` refuses it."""
    from onnxscript import opset20

    op: Any = opset20
    return op.Squeeze(value, op.Constant(value_ints=[dim])) if value.shape[dim] == 1 else op.Identity(value)


def _sized(value: Any, shape: Sequence[Any]) -> Any:
    """``difa::sized``: a runtime refuses to reshape what has another number of elements. Other values do not come that
    far: whoever runs a bundle compares what sizes follow from (``asked`` in its manifest)."""
    from onnxscript import opset20

    op: Any = opset20
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    return op.Identity(value) if sizes.count(-1) > 1 else op.Reshape(value, op.Constant(value_ints=sizes))


def _operator(name: str, attributes: Mapping[str, Any], masked: bool) -> Any:
    """A node of our own as onnxscript calls it."""
    import onnx
    from onnxscript.values import Op, Opset

    schema = onnx.defs.OpSchema
    kinds = {int: schema.AttrType.INT, float: schema.AttrType.FLOAT, str: schema.AttrType.STRING}
    parameter = schema.FormalParameter
    operands = [parameter(each, "T") for each in ("query", "key", "value")]
    if masked:
        operands.append(parameter("mask", "M"))
    floats = [f"tensor({each})" for each in ("float", "float16", "bfloat16", "double")]
    constraints = [("T", floats, "")] + ([("M", [*floats, "tensor(bool)"], "")] if masked else [])
    return Op(
        Opset(DOMAIN, 1),
        name,
        schema(
            name,
            DOMAIN,
            1,
            inputs=operands,
            outputs=[parameter("output", "T")],
            type_constraints=constraints,
            attributes=[
                schema.Attribute(each, kinds.get(type(value), schema.AttrType.INTS), "")
                for each, value in attributes.items()
            ],
        ),
    )


def _body(name: str, geometry: _Geometry) -> _Body:
    """Local attention of one geometry in plain operations, for any batch that its mask is for."""
    import onnx_ir as ir
    import onnxscript.optimizer

    rows = geometry.mask[0][0] if geometry.mask is not None and len(geometry.mask[0]) == 4 else None
    batch = 2 if rows in (None, 1) else rows  # a mask with rows of its own is for so many and no others
    operands = [
        torch.zeros(batch, *sizes, dtype=geometry.dtype) for sizes in (geometry.query, geometry.key, geometry.value)
    ]
    images = Dim("images", min=1)
    dims: list[dict[int, Any]] = [{0: images} if rows in (None, 1) else {} for _ in operands]
    if geometry.mask is not None:
        shape, dtype = geometry.mask
        operands.append(torch.zeros([batch if size is None else size for size in shape], dtype=dtype))
        dims.append({i: images for i, size in enumerate(shape) if size is None})
    module = geometry.module().eval()
    with symbols_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(
            _Attention(module), (tuple(operands),), dynamic_shapes=(tuple(dims),), strict=False
        )
    with _quiet():
        exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
        assert exported is not None
        onnxscript.optimizer.optimize_ir(
            exported.model, onnx_shape_inference=False, input_size_limit=2**24, output_size_limit=2**26
        )
    graph = exported.model.graph
    nodes: list[ir.Node] = []
    tables: dict[str, tuple[ir.Value, Tensor]] = {}
    for value in list(graph.initializers.values()):
        constant = value.const_value
        assert constant is not None
        if constant.size > SMALL:
            tensor = _tensor_of(value)
            table = table_name(tensor)
            if table in tables:
                ir.convenience.replace_all_uses_with(value, tables[table][0])
                continue
            graph.initializers.pop(str(value.name))
            value.name, value.const_value = table, None
            tables[table] = value, tensor
            graph.inputs.append(value)
            continue
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", constant)], name=f"constant_{value.name}")
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = value.name, value.type, value.shape
        ir.convenience.replace_all_uses_with(value, node.outputs[0])
        nodes.append(node)
    graph.initializers.clear()
    if nodes:
        graph.insert_before(graph[0], nodes)
    graph.opset_imports[""] = OPSET
    attributes = [ir.Attr(each, ir.AttributeType.UNDEFINED, None) for each in _ATTRIBUTES]
    found = {table: tensor for table, (_, tensor) in tables.items()}
    return _Body(ir.Function(DOMAIN, name, graph=graph, attributes=attributes), found)


_ATTRIBUTES = ("grid", "before", "after", "shape", "radius", "scale", "pooled")


class _Attention(nn.Module):
    """The module with its operands in one tuple, as many as there are."""

    def __init__(self, attention: PlainLocalAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, operands: tuple[Tensor, ...]) -> Tensor:
        out: Tensor = self.attention(*operands)
        return out


# --- dtypes ----------------------------------------------------------------------------------------------------------


def _dtype(dtype: torch.dtype) -> ir.DataType:
    import onnx_ir as ir

    return ir.DataType[_NAMES[dtype]]


def _torch_dtype(dtype: Any) -> torch.dtype:
    return next(one for one, name in _NAMES.items() if name == dtype.name)


_NAMES = {
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.float64: "DOUBLE",
    torch.int64: "INT64",
    torch.int32: "INT32",
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.int8: "INT8",
}


def _tensor_of(value: ir.Value) -> Tensor:
    """The numbers of an initializer."""
    tensor = value.const_value
    assert tensor is not None
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, Tensor):
        return raw.detach().contiguous()
    array = tensor.numpy()
    if tensor.dtype.name == "BFLOAT16":
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on what is not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
