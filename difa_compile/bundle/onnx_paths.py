"""Where the numbers of an ONNX model lie: in the bundle's file of weights, and nowhere else.

A model names files in which its tensors lie; whoever loads it opens them. So they are looked at before a runtime is
handed the model. Of ONNX's format only what can hold a tensor is read (by its numbers in ``onnx.proto``), by the
library protobuf, which comes with ONNX Runtime.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from difa_compile.errors import BundleIntegrityError, TargetError
from difa_compile.wording import quoted, shown

FIELDS: dict[str, dict[str, tuple[int, str]]] = {
    "Model": {"graph": (7, "Graph"), "training_info": (20, "Training"), "functions": (25, "Function")},
    "Training": {"initialization": (1, "Graph"), "algorithm": (2, "Graph")},
    "Function": {"node": (7, "Node"), "attribute_proto": (11, "Attribute")},
    "Graph": {"node": (1, "Node"), "initializer": (5, "Tensor"), "sparse_initializer": (15, "Sparse")},
    "Node": {"attribute": (5, "Attribute")},
    "Attribute": {
        "t": (5, "Tensor"),
        "g": (6, "Graph"),
        "tensors": (10, "Tensor"),
        "graphs": (11, "Graph"),
        "sparse_tensor": (22, "Sparse"),
        "sparse_tensors": (23, "Sparse"),
    },
    "Sparse": {"values": (1, "Tensor"), "indices": (2, "Tensor")},
    "Tensor": {"external_data": (13, "Entry")},
    "Entry": {"key": (1, ""), "value": (2, "")},
}
"""By message its fields that lead to a tensor's place: their numbers, and what they hold; "" is bytes."""


def check_places(content: bytes, weights: str, name: str) -> None:
    """Raise :class:`BundleIntegrityError` unless all tensors of a model that lie outside of it lie in the file
    ``weights``, and for what is no model. ``name``: of the model, in messages. Raises :class:`TargetError` without
    protobuf."""
    model, damaged = _reader()
    try:
        read = model.FromString(content)
    except damaged as error:
        raise BundleIntegrityError(f"{shown(name)} is no ONNX model: {shown(error, 200)}; export again") from error
    for entry in _entries(read):
        if entry.key == b"location" and entry.value != weights.encode():
            raise BundleIntegrityError(
                f"{shown(name)} has weights in {quoted(entry.value.decode(errors='replace'), 200)}, and those of its "
                f"bundle lie in {shown(weights)} alone; export again"
            )


def _entries(message: Any) -> Iterator[Any]:
    """All entries that say where a tensor lies, in a message and what it holds."""
    if message.DESCRIPTOR.name == "Entry":
        yield message
        return
    for _, value in message.ListFields():
        for each in value:
            yield from _entries(each)


@functools.cache
def _reader() -> tuple[Any, type[Exception]]:
    """The class of models, and what it raises for what is none."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
    except ImportError as error:
        raise TargetError(
            "engines of the target onnx run on ONNX Runtime, and protobuf, which comes with it, is not installed: "
            "pip install onnxruntime"
        ) from error
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="difa_onnx_paths.proto", package="difa")
    for name, fields in FIELDS.items():
        made = file.message_type.add(name=name)
        for field, (number, holds) in fields.items():
            kind = kinds.TYPE_MESSAGE if holds else kinds.TYPE_BYTES
            # All messages as lists: of one that stands there twice the first is read, too.
            label = kinds.LABEL_REPEATED if holds else kinds.LABEL_OPTIONAL
            made.field.add(
                name=field, number=number, type=kind, label=label, type_name=f".difa.{holds}" if holds else None
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("difa.Model")), message.DecodeError
