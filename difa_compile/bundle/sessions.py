"""Engines loaded, each target in its way: tensors in, tensors out, weights shared by all of them.

A session may be run by several threads at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from difa_compile.bundle import tensorrt
from difa_compile.bundle.manifest import Engine, File, check_file, checked_bytes, sizes_of
from difa_compile.bundle.onnx_paths import check_places
from difa_compile.bundle.weights import WeightFile
from difa_compile.errors import TargetError
from difa_compile.plugins.cpu import build
from difa_compile.wording import shown


class Session(Protocol):
    """An engine that is loaded."""

    def run(self, inputs: Sequence[Tensor], into: Sequence[Tensor | None], images: int) -> list[Tensor]:
        """The outputs, in the engine's order, of contiguous inputs in its order.

        ``into``: of each output memory of its shape and dtype to write it into, or None for memory of its own. What is
        written into must not be among the inputs.
        """


class OnnxSession:
    """On ONNX Runtime's CPU provider. Weights stay in the mapped file; ``prepack`` copies them, each session its own,
    into the form that its matrix products like best.

    Raises :class:`TargetError` without onnxruntime, and for a model that it refuses.
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
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # every engine has threads of its own
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no class but this one
            raise TargetError(
                f"ONNX Runtime {onnxruntime.__version__} does not load {shown(engine.file)}: {shown(error, 400)}"
            ) from error
        self._engine = engine

    def run(self, inputs: Sequence[Tensor], into: Sequence[Tensor | None], images: int) -> list[Tensor]:
        """As :meth:`Session.run`."""
        binding = self._session.io_binding()
        found = []
        for port, value in zip(self._engine.inputs, inputs, strict=True):
            binding.bind_input(port.name, "cpu", 0, _ONNX[value.dtype], list(value.shape), _address(value))
        for port, place in zip(self._engine.outputs, into, strict=True):
            sizes = sizes_of(port.shape, images)
            value = torch.empty(sizes, dtype=getattr(torch, port.dtype)) if place is None else place
            binding.bind_output(port.name, "cpu", 0, _ONNX[value.dtype], list(value.shape), _address(value))
            found.append(value)
        self._session.run_with_iobinding(binding)
        return found


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


def _address(value: Tensor) -> int:
    assert value.is_contiguous()
    return int(value.data_ptr()) or 64  # of no elements: any address will do, but none is refused


class AotiSession:
    """An AOTInductor package, its weights views of the mapped file.

    Raises :class:`TargetError` for a processor that lacks what the package was compiled for, another version of torch,
    and a package that torch refuses.
    """

    def __init__(self, engine: Engine, path: Path, weights: WeightFile) -> None:
        _check_release(engine)
        _check_processor(engine)
        if engine.kernel:
            load_kernel()
        try:
            self._model = load_package(path)
            hand_over(self._model, {own: weights[name] for own, name in engine.weights.items()})
        except (RuntimeError, OSError, KeyError) as error:
            raise TargetError(f"torch {torch.__version__} does not load {shown(path)}: {shown(error, 400)}") from error
        self._weights = weights  # views of it are in the model
        self._engine = engine

    def run(self, inputs: Sequence[Tensor], into: Sequence[Tensor | None], images: int) -> list[Tensor]:
        """As :meth:`Session.run`. Packages give memory of their own: it is copied where there is a place for it."""
        found = self._model(*inputs)
        outputs = list(found) if isinstance(found, (tuple, list)) else [found]
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


def load_kernel() -> None:
    """Load the library with ``difa::local_attention_cpu``, built if need be. Raises :class:`TargetError`."""
    if (reason := build.why_not_built()) is not None:
        raise TargetError(f"the engines call our kernel for local attention, which cannot be had: {reason}")


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
    here = processor_flags()
    missing = [flag for flag in engine.instruction_set.upper().split() if flag not in here]
    if missing:
        raise TargetError(
            f"{shown(engine.file)} was compiled for a processor with {engine.instruction_set}, and this one lacks "
            f"{', '.join(missing)}; export here, or with portable=True (--portable)"
        )


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
    return AotiSession(engine, check_file(folder, engine.file, files), weights)


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
