"""A library in TensorRT's place: engines are ONNX models, which ONNX Runtime computes on the CPU, and only on what lies
at the addresses that were bound. What a session binds, and to what, shows in what comes out."""

import ctypes
import enum
import math
import types

import numpy as np
import onnx
import onnx.inliner
import onnxruntime

from difa_compile.bundle import tensorrt
from difa_compile.bundle.tensorrt import Library, Log

VERSION = "1.0"
DTYPES = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.UINT8: "UINT8",
}


class Context:
    """``bound``: addresses by name. ``log``: of the library."""

    def __init__(self, engine, log):
        self._engine, self._log = engine, log
        self._shapes = {name: value.shape for name, value in engine.values.items() if None not in value.shape}
        self.bound, self.memory = {}, None

    def set_input_shape(self, name, shape):
        wanted = self._engine.values[name].shape
        if len(wanted) != len(shape) or any(one not in (None, other) for one, other in zip(wanted, shape, strict=True)):
            self._log.errors.append(f"{name} is not of {shape}")
            return False
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name, address):
        self.bound[name] = address
        return name in self._engine.values and address % 64 == 0

    def update_device_memory_size_for_shapes(self):
        assert self._engine.inputs <= self._shapes.keys(), "all shapes come first"
        return 1000

    def set_device_memory(self, address, size):
        self.memory = (address, size)

    def execute_async_v3(self, stream):
        assert self.memory[1] == 1000
        if (cache := self._engine.cache) is not None and not cache.content:
            cache.compiled, cache.content = cache.compiled + 1, b"kernels of this engine"
        given = {name: self._at(name, self._shapes[name]).copy() for name in self._engine.inputs}
        outputs = self._engine.session.run(None, given)
        for each, value in zip(self._engine.session.get_outputs(), outputs, strict=True):
            self._at(each.name, value.shape)[...] = value
        return True

    def _at(self, name, shape):
        dtype = self._engine.values[name].numpy
        size = math.prod(shape) * dtype.itemsize
        memory = (ctypes.c_byte * size).from_address(self.bound[name])
        return np.frombuffer(memory, dtype).reshape(shape)


class Engine:
    def __init__(self, content, log):
        self._log = log
        model = onnx.load_from_string(content)
        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        self.inputs = {value.name for value in model.graph.input}
        self.values = {}
        for value in (*model.graph.input, *model.graph.output):
            kind = value.type.tensor_type
            shape = tuple(size.dim_value if size.HasField("dim_value") else None for size in kind.shape.dim)
            numpy = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
            self.values[value.name] = types.SimpleNamespace(shape=shape, kind=DTYPES[kind.elem_type], numpy=numpy)

    @property
    def num_io_tensors(self):
        return len(self.values)

    def get_tensor_name(self, i):
        return list(self.values)[i]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return DataType[self.values[name].kind]

    def create_runtime_config(self):
        return RuntimeConfig()

    def create_execution_context(self, given):
        self.cache = given.cache if isinstance(given, RuntimeConfig) else None
        assert "by the user" in (given, getattr(given, "strategy", None))
        self.context = Context(self, self._log)
        return self.context


class RuntimeConfig:
    strategy, cache = None, None

    def create_runtime_cache(self):
        return RuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy


class RuntimeCache:
    """``compiled``: how many kernels were, since it was made or was given others."""

    compiled, content = 0, b""

    def deserialize(self, content):
        fits = content.startswith(b"kernels")
        self.content = content if fits else b""
        return fits

    def serialize(self):
        return memoryview(self.content)


TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT64 INT32 INT8 UINT8 BOOL")


def put_in_place(monkeypatch, compiles=False):
    """Let it be the installed library, and the CPU the GPU, of the compute capability 8.9. What is returned are the
    engines that are loaded from then on. ``compiles``: kernels, while engines run, as TensorRT-RTX does."""
    log, loaded = Log(), []

    class Runtime:
        def __init__(self, logger):
            del logger

        def deserialize_cuda_engine(self, content):
            if content == b"other":
                log.errors.append("the magic tag does not match")
                return None
            loaded.append(Engine(content, log))
            return loaded[-1]

    module = types.SimpleNamespace(
        Runtime=Runtime,
        TensorIOMode=TensorIOMode,
        DataType=DataType,
        ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED="by the user"),
    )
    if compiles:
        module.IRuntimeCache = RuntimeCache
    import torch

    monkeypatch.setattr(tensorrt, "_loaded", lambda name: Library(name, VERSION, module, log))
    monkeypatch.setattr(tensorrt, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(tensorrt, "stream_of", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    return loaded


def with_weights_as_inputs(path):
    """An ONNX engine of a bundle as this library's: functions in place, and what lies in the file as inputs."""
    model = onnx.inliner.inline_local_functions(onnx.load(path, load_external_data=False))
    inside = []
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            model.graph.input.append(value)
        else:
            inside.append(tensor)
    del model.graph.initializer[:]
    model.graph.initializer.extend(inside)
    return model.SerializeToString()
