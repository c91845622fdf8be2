"""Engines loaded, each target in its way: tensors in, tensors out, weights shared by all of them.

A session may be run by several threads at once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from difa_compile.bundle import tensorrt
from difa_compile.bundle.manifest import Engine, File, Port, check_file, checked_bytes, sizes_of
from difa_compile.bundle.onnx_paths import check_places
from difa_compile.bundle.weights import WeightFile
from difa_compile.errors import BundleIntegrityError, EngineRunError, TargetError, is_out_of_memory
from difa_compile.plugins.cpu import build
from difa_compile.wording import shown

_log = logging.getLogger("difa_compile")


class Session(Protocol):
    """An engine that is loaded."""

    def run(self, inputs: Sequence[Tensor], into: Sequence[Tensor | None], images: int) -> list[Tensor]:
        """The outputs, in the engine's order, of contiguous inputs in its order.

        ``into``: of each output memory of its shape and dtype to write it into, or None for memory of its own. What is
        written into must not be among the inputs. Raises :class:`EngineRunError` for tensors that are not those of the
        engine's ports, and for what the runtime refuses while it runs.
        """


class OnnxSession:
    """On ONNX Runtime's CPU provider. Weights stay in the mapped file; ``prepack`` copies them, each session its own,
    into the form that its matrix products like best.

    Raises :class:`TargetError` without onnxruntime, and for a model that it refuses, and :class:`BundleIntegrityError`
    for one whose inputs and outputs are not those of the manifest.
    """

    def __init__(self, engine: Engine, content: bytes, folder: Path, prepack: bool) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise TargetError(
                "engines of the target onnx run on ONNX Runtime, which is not installed: pip install onnxruntime"
            ) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # when a run ends: the next is another's
        if _shares_memory():
            options.add_session_config_entry("session.use_env_allocators", "1")
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no class but this one
            raise TargetError(
                f"ONNX Runtime {onnxruntime.__version__} does not load {shown(engine.file)}: {shown(error, 400)}"
            ) from error
        _check_tensors(engine, "inputs", engine.inputs, self._session.get_inputs())
        _check_tensors(engine, "outputs", engine.outputs, self._session.get_outputs())
        self._engine = engine
        self._runtime = f"ONNX Runtime {onnxruntime.__version__}"

    def run(self, inputs: Sequence[Tensor], into: Sequence[Tensor | None], images: int) -> list[Tensor]:
        """As :meth:`Session.run`."""
        _check_given(self._engine, self._engine.inputs, inputs, images)
        binding = self._session.io_binding()
        found = []
        for port, value in zip(self._engine.inputs, inputs, strict=True):
            binding.bind_input(port.name, "cpu", 0, _ONNX[value.dtype], list(value.shape), _address(value))
        for port, place in zip(self._engine.outputs, into, strict=True):
            sizes = sizes_of(port.shape, images)
            value = torch.empty(sizes, dtype=getattr(torch, port.dtype)) if place is None else place
            _check_given(self._engine, [port], [value], images)
            binding.bind_output(port.name, "cpu", 0, _ONNX[value.dtype], list(value.shape), _address(value))
            found.append(value)
        with _running(self._engine, self._runtime):
            self._session.run_with_iobinding(binding)
        return found


@functools.cache
def _shares_memory() -> bool:
    """Let this process's sessions take the memory for what they compute from one arena: they run in turns, and each
    would keep as much as it needs most. False where ONNX Runtime takes no common one."""
    import onnxruntime

    info = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    try:
        onnxruntime.create_and_register_allocator(info, None)
    except Exception as error:  # its errors share no class but this one
        _log.warning("ONNX Runtime's sessions do not share their memory: %s", shown(error, 300))
        return False
    return True


_ONNX = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}
"""ONNX's numbers of dtypes."""
_NAMES = {"float": "float32", "double": "float64"}
"""Dtypes by ONNX Runtime's names, where it has others than torch."""


def _check_tensors(engine: Engine, what: str, ports: Sequence[Port], tensors: Sequence[Any]) -> None:
    """Raise :class:`BundleIntegrityError` unless a model that ONNX Runtime has loaded has these ports. Sizes that grow
    with the images have other names there, or none."""
    found = {tensor.name: tensor for tensor in tensors}
    if set(found) != {port.name for port in ports}:
        (other, *_) = sorted(set(found) ^ {port.name for port in ports})
        where = "the engine" if other in found else "the manifest"
        raise BundleIntegrityError(
            f"{shown(engine.file)} has not the {what} that the manifest names: {shown(other)} is in {where} alone; "
            "export again"
        )
    for port in ports:
        tensor = found[port.name]
        name = str(tensor.type).removeprefix("tensor(").removesuffix(")")
        dtype, shape = _NAMES.get(name, name), list(tensor.shape)
        fits = len(shape) == len(port.shape) and all(
            one == size for one, size in zip(shape, port.shape, strict=True) if isinstance(one, int)
        )
        if dtype != port.dtype or not fits:
            raise BundleIntegrityError(
                f"{shown(engine.file)} has {shown(port.name)} as {shown(dtype)} {shown(shape, 100)}, and the manifest "
                f"says {port.dtype} {list(port.shape)}; export again"
            )


def _check_given(engine: Engine, ports: Sequence[Port], values: Sequence[Tensor], images: int) -> None:
    """Raise :class:`EngineRunError` for tensors of other dtypes or shapes than those of an engine's ports: code that
    was compiled for these would go beyond their memory."""
    if len(values) != len(ports):
        raise EngineRunError(f"{shown(engine.file)} has {len(ports)} tensors there, and {len(values)} were given")
    for port, value in zip(ports, values, strict=True):
        sizes = sizes_of(port.shape, images)
        if tuple(value.shape) != sizes or value.dtype != getattr(torch, port.dtype):
            raise EngineRunError(
                f"{shown(port.name)} of {shown(engine.file)} is {port.dtype} {list(sizes)} for {images} images, not "
                f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            )


@contextmanager
def _running(engine: Engine, runtime: str) -> Iterator[None]:
    """What a runtime raises while it runs an engine as an :class:`EngineRunError`."""
    try:
        yield
    except Exception as error:  # ONNX Runtime's errors share no class but this one
        if is_out_of_memory(error):
            raise
        raise EngineRunError(
            f"{runtime} ended {shown(engine.file)} with an error; what it was given may be out of the model's range, a "
            f"label that it does not know, say: {shown(error, 400)}"
        ) from error


def _address(value: Tensor) -> int:
    assert value.is_contiguous()
    return int(value.data_ptr()) or 64  # of no elements: any address will do, but none is refused


class AotiSession:
    """An AOTInductor package, its weights views of the mapped file.

    ``library``: our kernel, which it calls, as it lies in the bundle.

    Raises :class:`TargetError` for a processor that lacks what the package was compiled for, another version of torch,
    a package that torch refuses, and where the kernel cannot be had, and :class:`BundleIntegrityError` for a package
    whose inputs, outputs and weights are not those of the manifest.
    """

    def __init__(self, engine: Engine, path: Path, weights: WeightFile, library: Path | None = None) -> None:
        _check_release(engine)
        _check_processor(engine)
        if engine.kernel:
            load_kernel(library, "" if engine.library is None else engine.library.instruction_set)
        try:
            self._model = load_package(path)
            _check_package(engine, self._model)
            hand_over(self._model, {own: weights[name] for own, name in engine.weights.items()})
        except (RuntimeError, OSError, KeyError) as error:
            raise TargetError(f"torch {torch.__version__} does not load {shown(path)}: {shown(error, 400)}") from error
        self._weights = weights  # views of it are in the model
        self._engine = engine

    def run(self, inputs: Sequence[Tensor], into: Sequence[Tensor | None], images: int) -> list[Tensor]:
        """As :meth:`Session.run`. Packages give memory of their own: it is copied where there is a place for it."""
        _check_given(self._engine, self._engine.inputs, inputs, images)
        assert all(value.is_contiguous() for value in inputs)
        with _running(self._engine, f"The AOTInductor code of torch {torch.__version__}"):
            found = self._model(*inputs)
        outputs = list(found) if isinstance(found, (tuple, list)) else [found]
        _check_given(self._engine, self._engine.outputs, outputs, images)
        return [value if place is None else place.copy_(value) for value, place in zip(outputs, into, strict=True)]


def load_package(path: Path) -> Any:
    """An AOTInductor package as a function of its inputs, with ``load_constants`` and ``get_constant_fqns``. Of one
    that calls our kernel :func:`load_kernel` comes first."""
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path))


def hand_over(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give a loaded package its weights, by its own names, which stay the caller's: they must outlive it, and what is
    written into them is what it computes with."""
    model.load_constants(dict(tensors), check_full_update=True, user_managed=True)


def _check_package(engine: Engine, model: Any) -> None:
    """Raise :class:`BundleIntegrityError` unless a package has as many inputs and outputs as the manifest says, and the
    weights. Their sizes and dtypes it does not tell."""
    from torch.utils import _pytree as pytree

    specs = (pytree.treespec_loads(each) for each in model.loader.get_call_spec())
    for what, ports, spec in zip(("inputs", "outputs"), (engine.inputs, engine.outputs), specs, strict=True):
        if spec.num_leaves != len(ports):
            raise BundleIntegrityError(
                f"{shown(engine.file)} has {spec.num_leaves} {what}, and the manifest says {len(ports)}; export again"
            )
    if other := sorted(set(model.get_constant_fqns()) ^ set(engine.weights)):
        where = "the manifest" if other[0] in engine.weights else "the engine"
        raise BundleIntegrityError(
            f"{shown(engine.file)} has not the weights that the manifest names: {shown(other[0])} is in {where} alone; "
            "export again"
        )


def load_kernel(library: Path | None = None, needed: str = "") -> None:
    """Give this process ``difa::local_attention_cpu``, unless it has it: no two libraries can give it to one process.

    ``library``: of a bundle, compared with its manifest. Where there is none, this processor lacks something of what it
    ``needed``, or it does not load, the kernel is compiled here. Raises :class:`TargetError` where that fails, too.
    """
    if build.registered():
        return
    reason = ""
    if library is not None:
        if missing := _missing(needed):
            reason = f"{shown(library)} needs a processor with {shown(needed)}, and this one lacks {', '.join(missing)}"
        else:
            try:
                build.load(library)
            except OSError as error:
                reason = f"{shown(library)} does not load: {shown(error, 300)}"
            else:
                if build.registered():
                    return
                reason = f"{shown(library)} has not the kernel"
        _log.warning("%s; the kernel is compiled here", reason)
    if (why := build.why_not_built()) is not None:
        raise TargetError(
            "the engines call our kernel for local attention, which cannot be had: "
            + (f"{reason}, and here it cannot be compiled: {why}" if reason else why)
        )


def _check_release(engine: Engine) -> None:
    wanted = engine.versions.get("torch", "")
    if wanted.split("+")[0] != torch.__version__.split("+")[0]:
        raise TargetError(
            f"{shown(engine.file)} was compiled by torch {shown(wanted)}, whose packages no other release reads, and "
            f"this is {torch.__version__}; install that release, export with this one, or use another target"
        )


def processor_flags() -> frozenset[str]:
    """What this processor can do, by the names that torch has for it: AVX2, AVX512, AMX_TILE ..."""
    if not hasattr(torch.cpu, "get_capabilities"):  # older torch tells the widest vectors alone
        widest = torch.backends.cpu.get_cpu_capability().upper()
        return frozenset({widest, "AVX2"} if widest == "AVX512" else {widest})
    found = {name.upper() for name, has in torch.cpu.get_capabilities().items() if has is True}
    return frozenset(found | ({"AVX512"} if {"AVX512_F", "AVX512_BW"} <= found else set()))


def _check_processor(engine: Engine) -> None:
    if missing := _missing(engine.instruction_set):
        raise TargetError(
            f"{shown(engine.file)} was compiled for a processor with {engine.instruction_set}, and this one lacks "
            f"{', '.join(missing)}; export here, or with portable=True (--portable)"
        )


def _missing(needed: str) -> list[str]:
    """What this processor lacks of what code needs."""
    here = processor_flags() if needed else frozenset()
    return [flag for flag in needed.upper().split() if flag not in here]


def open_session(
    engine: Engine, folder: Path, files: Mapping[str, File], weights: WeightFile, prepack: bool = False
) -> Session:
    """Load an engine once its file is what the manifest says. Raises :class:`TargetError`, and
    :class:`BundleIntegrityError` for another file."""
    found = SESSIONS.get(engine.target)
    if found is None:
        raise TargetError(f"{shown(engine.file)} is of the target {shown(engine.target)}; this release runs "
                          f"{', '.join(SESSIONS)}")  # fmt: skip
    return found(engine, folder, files, weights, prepack)


def _open_onnx(engine: Engine, folder: Path, files: Mapping[str, File], weights: WeightFile, prepack: bool) -> Session:
    content = checked_bytes(folder, engine.file, files)
    check_places(content, weights.path.name, engine.file)  # ONNX Runtime maps the file itself
    return OnnxSession(engine, content, folder, prepack)


def _open_aoti(engine: Engine, folder: Path, files: Mapping[str, File], weights: WeightFile, prepack: bool) -> Session:
    del prepack
    library = None if engine.library is None else check_file(folder, engine.library.file, files)
    return AotiSession(engine, check_file(folder, engine.file, files), weights, library)


def _open_tensorrt(
    engine: Engine, folder: Path, files: Mapping[str, File], weights: WeightFile, prepack: bool
) -> Session:
    del prepack
    return tensorrt.TensorRtSession(engine, checked_bytes(folder, engine.file, files), weights)


SESSIONS: dict[str, Callable[[Engine, Path, Mapping[str, File], WeightFile, bool], Session]] = {
    "onnx": _open_onnx,
    "aoti": _open_aoti,
    "tensorrt": _open_tensorrt,
}
"""By target what loads an engine."""
ELSEWHERE = frozenset({"tensorrt"})
"""Targets whose engines can be made on machines that cannot run them."""


def device_of(target: str) -> torch.device:
    """Where a target's sessions like their caches to lie. Raises :class:`TargetError` where it is not there."""
    return tensorrt.device() if target == "tensorrt" else torch.device("cpu")
