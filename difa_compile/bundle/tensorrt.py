"""Engines of the target tensorrt: the library that makes and reads them, and what runs them.

There are two libraries, NVIDIA's TensorRT and TensorRT-RTX, with one interface. Neither reads the other's engines; an
engine's ``versions`` name the one that made it. TensorRT builds on the GPU that it builds for. TensorRT-RTX builds
without one, for any GPU of its list, and finishes its kernels when an engine is loaded.

Engines are built without a GPU in our tests, and never ran on one: what is tested of :class:`TensorRtSession` is which
memory it binds, with a library in TensorRT's place that computes on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difa_compile.bundle.manifest import Engine, sizes_of
from difa_compile.bundle.weights import WeightFile
from difa_compile.errors import EngineRunError, TargetError
from difa_compile.files.cache_folder import code_folder
from difa_compile.files.trust import why_untrusted
from difa_compile.files.writing import write_whole
from difa_compile.wording import shown

_log = logging.getLogger("difa_compile")
LIBRARIES = ("tensorrt", "tensorrt-rtx")
"""As the package index names them; the first that is installed builds."""
LINES = 4
"""Of a library's own errors in one of ours."""


class Log:
    """What a library tells while it works: ``lines`` of information, and ``errors``. ``logger``: the library's own
    object, which it keeps for good."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.logger: Any = None

    def clear(self) -> None:
        self.lines.clear()
        self.errors.clear()


@dataclass(frozen=True)
class Library:
    """``module``: of Python. ``log``: what it has told."""

    name: str
    version: str
    module: Any
    log: Log

    def refused(
        self, what: str, kind: type[TargetError | EngineRunError] = TargetError
    ) -> TargetError | EngineRunError:
        """The error for what the library does not do, with its own last lines."""
        lines = self.log.errors[-LINES:]
        reason = "; ".join(shown(line, 400) for line in lines) if lines else "it gives no reason"
        return kind(f"{self.name} {self.version} {what}: {reason}")


def library(name: str | None = None) -> Library:
    """The library of that name, or the first of :data:`LIBRARIES` that is installed. Raises :class:`TargetError`."""
    reasons = []
    for each in LIBRARIES if name is None else (name,):
        try:
            return _loaded(each)
        except (ImportError, OSError) as error:  # or a library of its own that is missing
            reasons.append(f"{each}: {shown(error, 200)}")
    raise TargetError(
        "engines of the target tensorrt need TensorRT or TensorRT-RTX, as their versions say: pip install "
        f"{name or ' or '.join(reversed(LIBRARIES))} ({'; '.join(reasons)})"
    )


@functools.cache
def _loaded(name: str) -> Library:
    module = _module(name)
    log = Log()

    base: Any = module.ILogger

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (base.INTERNAL_ERROR, base.ERROR):
                log.errors.append(message)
            elif severity == base.INFO:
                log.lines.append(message)

    log.logger = Logger()
    return Library(name, str(module.__version__), module, log)


def _module(name: str) -> Any:
    if name == "tensorrt":
        import tensorrt

        return tensorrt
    import tensorrt_rtx

    return tensorrt_rtx


def library_of(engine: Engine) -> Library:
    """The library that reads an engine. Raises :class:`TargetError` where it is another one, or missing."""
    made = [name for name in LIBRARIES if name in engine.versions]
    if len(made) != 1:
        raise TargetError(
            f"{shown(engine.file)} does not say which library built it ({' or '.join(LIBRARIES)}); export again"
        )
    try:
        return library(made[0])
    except TargetError as error:
        others = " or ".join(name for name in LIBRARIES if name != made[0])
        raise TargetError(
            f"{shown(engine.file)} was built by {made[0]} {shown(engine.versions[made[0]])}, and {others} cannot load "
            f"it: {error}"
        ) from error


def check_engine(library: Library, content: bytes, name: str) -> None:
    """Raise :class:`TargetError` for what is no engine of this library, or of another release of it. TensorRT-RTX
    tells, without a GPU; TensorRT when it loads one."""
    runtime = library.module.Runtime(library.log.logger)
    if not hasattr(runtime, "get_engine_validity"):
        return
    _, found = runtime.get_engine_validity(content)
    kinds = library.module.EngineInvalidityDiagnostics
    for kind, what in ((kinds.MALFORMED_ENGINE, "is damaged"), (kinds.VERSION_MISMATCH, "is of another release")):
        if int(found) & int(kind):
            raise TargetError(
                f"{shown(name)} {what}, says {library.name} {library.version}; export again, or install that release"
            )


def device() -> torch.device:
    """The GPU that engines run on, torch's current one. Raises :class:`TargetError` without one."""
    if not torch.cuda.is_available():
        raise TargetError(
            "engines of the target tensorrt run on an NVIDIA GPU, and torch sees none here; run the bundle where there "
            "is one, or choose another of its targets"
        )
    return torch.device("cuda", torch.cuda.current_device())


def stream_of(device: torch.device) -> int:
    """The handle of torch's current stream."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within it the device is the thread's own, which a library asks for."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def check_capability(engine: Engine, device: torch.device) -> None:
    """Raise :class:`TargetError` for an engine that was built for other GPUs; one without a list is for all that its
    library knows."""
    wanted = engine.instruction_set.split()
    here = "{}.{}".format(*torch.cuda.get_device_capability(device))
    if wanted and here not in wanted:
        raise TargetError(
            f"{shown(engine.file)} was built for GPUs of the compute capability {', '.join(wanted)}, and this one has "
            f"{here}; export for it"
        )


class TensorRtSession:
    """An engine on a GPU. *This never ran on a GPU*: tested is what it binds, with another library in TensorRT's place.

    Its weights are inputs, bound once to the device's copies that all engines of a bundle share
    (:meth:`difa_compile.bundle.weights.WeightFile.on`). Memory for activations is torch's, taken for the time of a run,
    so that engines which run one after the other share it, too. Caches lie on the device from call to call; what comes
    from the CPU and goes there is copied. Work goes to torch's current stream, and a run ends when its outputs are
    there. Threads take turns.

    What TensorRT-RTX compiles for this GPU is kept in the cache folder: the next process finds it there.

    Raises :class:`TargetError` without a GPU and without the library that built the engine, for an engine that it
    refuses, or one whose inputs and outputs are not those of the manifest.
    """

    def __init__(self, engine: Engine, content: bytes, weights: WeightFile) -> None:
        self._device = device()
        self._library = library_of(engine)
        check_capability(engine, self._device)
        self._library.log.clear()
        check_engine(self._library, content, engine.file)
        self._engine = engine
        module = self._library.module
        self._runtime = module.Runtime(self._library.log.logger)
        self._loaded = self._runtime.deserialize_cuda_engine(content)
        if self._loaded is None:
            raise self._refused("does not load")
        _check_tensors(engine, self._loaded, module)
        self._context, self._kept = self._begun(module, content)
        if self._context is None:
            raise self._refused("makes no context for")
        self._weights = {own: weights.on(name, self._device) for own, name in engine.weights.items()}
        for name, value in self._weights.items():
            self._bind(name, value)
        self._lock = threading.Lock()
        self._ran: set[int] = set()

    def _begun(self, module: Any, content: bytes) -> tuple[Any, CompiledKernels | None]:
        """The context in which the engine runs, and where there are such, the kernels that it compiles."""
        by_user = module.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(module, "IRuntimeCache"):
            return self._loaded.create_execution_context(by_user), None
        config = self._loaded.create_runtime_config()
        config.set_execution_context_allocation_strategy(by_user)
        kept = CompiledKernels(config, f"{self._library.name}-{hashlib.sha256(content).hexdigest()[:20]}.kernels")
        return self._loaded.create_execution_context(config), kept

    def run(self, inputs: Sequence[Tensor], into: Sequence[Tensor | None], images: int) -> list[Tensor]:
        """As :meth:`difa_compile.bundle.sessions.Session.run`; outputs without a place are on the CPU."""
        device = self._device
        with self._lock, on_device(device):
            given = [value.to(device) for value in inputs]
            for port, value in zip(self._engine.inputs, given, strict=True):
                if not self._context.set_input_shape(port.name, tuple(value.shape)):
                    raise self._refused(f"takes no {port.name} of the shape {tuple(value.shape)} for", EngineRunError)
                self._bind(port.name, value)
            found = []
            for port, place in zip(self._engine.outputs, into, strict=True):
                sizes, dtype = sizes_of(port.shape, images), getattr(torch, port.dtype)
                there = place is not None and place.device == device
                found.append(place if place is not None and there else torch.empty(sizes, dtype=dtype, device=device))
                self._bind(port.name, found[-1])
            size = int(self._context.update_device_memory_size_for_shapes())
            scratch = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
            self._context.set_device_memory(scratch.data_ptr(), size)
            if not self._context.execute_async_v3(stream_of(device)):
                raise self._refused("does not run", EngineRunError)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            if self._kept is not None and images not in self._ran:
                self._ran.add(images)
                self._kept.keep()
            return [
                value.cpu() if place is None else place if place is value else place.copy_(value)
                for value, place in zip(found, into, strict=True)
            ]

    def _bind(self, name: str, value: Tensor) -> None:
        assert value.is_contiguous()
        # of no elements: any address will do, but none is refused
        if not self._context.set_tensor_address(name, int(value.data_ptr()) or 256):
            raise self._refused(f"takes no memory for {shown(name)} of")

    def _refused(
        self, what: str, kind: type[TargetError | EngineRunError] = TargetError
    ) -> TargetError | EngineRunError:
        made = self._engine.versions[self._library.name]
        return self._library.refused(f"{what} {shown(self._engine.file)}, which {shown(made)} built", kind)


class CompiledKernels:
    """What TensorRT-RTX compiles of one engine while it runs, in a file of the cache folder.

    ``config``: of the engine that is about to run; what an earlier process kept is given to it. The library itself
    refuses what another release, GPU or driver made; then, and where the file is somebody else's or nothing can be
    kept, kernels are compiled again.
    """

    def __init__(self, config: Any, name: str) -> None:
        self._cache = config.create_runtime_cache()
        self._path: Path | None = None
        self._content = b""
        try:
            self._path = code_folder() / name
            if self._path.exists():
                if reason := why_untrusted(self._path.lstat()):
                    _log.warning("%s %s; its kernels are compiled again", self._path, reason)
                elif self._cache.deserialize(found := self._path.read_bytes()):
                    self._content = found
        except OSError as error:
            _log.warning("kernels of TensorRT-RTX are not kept: %s", shown(error, 300))
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write down what was compiled since."""
        made = bytes(self._cache.serialize())
        if self._path is None or made == self._content:
            return
        self._content = made
        try:
            write_whole(self._path, made, "the kernels of an engine")
        except OSError as error:
            _log.warning("kernels of TensorRT-RTX are not kept: %s", shown(error, 300))


def _check_tensors(engine: Engine, loaded: Any, module: Any) -> None:
    """Raise :class:`TargetError` unless an engine has the inputs, weights and outputs that the manifest names, in these
    dtypes."""
    inputs = {port.name: port.dtype for port in engine.inputs}
    outputs = {port.name: port.dtype for port in engine.outputs}
    found: dict[Any, set[str]] = {module.TensorIOMode.INPUT: set(), module.TensorIOMode.OUTPUT: set()}
    for i in range(loaded.num_io_tensors):
        name = loaded.get_tensor_name(i)
        found[loaded.get_tensor_mode(name)].add(name)
        wanted = inputs.get(name, outputs.get(name))
        if wanted is not None and (dtype := dtype_of(loaded.get_tensor_dtype(name), module)) != wanted:
            raise TargetError(f"{shown(engine.file)}: {shown(name)} is of {dtype}, and the manifest says {wanted}")
    wanted_inputs = {*inputs, *engine.weights}
    for names, wanted_names in zip(found.values(), (wanted_inputs, set(outputs)), strict=True):
        if names != wanted_names:
            (other, *_) = sorted(names ^ wanted_names)
            raise TargetError(
                f"{shown(engine.file)} has not the inputs and outputs that the manifest names: {shown(other)} is in "
                f"{'the engine' if other in names else 'the manifest'} alone; export again"
            )


def dtype_of(dtype: Any, module: Any) -> str:
    """The name that manifests have for a library's dtype; its own name where they have none."""
    names = {
        module.DataType.FLOAT: "float32",
        module.DataType.HALF: "float16",
        module.DataType.BF16: "bfloat16",
        module.DataType.INT64: "int64",
        module.DataType.INT32: "int32",
        module.DataType.INT8: "int8",
        module.DataType.UINT8: "uint8",
        module.DataType.BOOL: "bool",
    }
    return names.get(dtype, str(dtype))
