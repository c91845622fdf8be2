"""Engines loaded: outputs where they are wanted, and what cannot be loaded."""

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass

import msgspec
import pytest
import torch

from difa_compile.bundle import sessions
from difa_compile.bundle.manifest import Engine, File, Library, Port, check_file, read_manifest, sizes_of
from difa_compile.bundle.sessions import AotiSession, OnnxSession, load_kernel, open_session
from difa_compile.bundle.weights import WeightFile
from difa_compile.errors import BundleIntegrityError, EngineRunError, TargetError
from difa_compile.plugins.cpu import build
from tests.support import bundles
from tests.support.places import ROOT
from tests.support.small_programs import LABELS, packaged

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def manifest():
    return read_manifest(bundles.kept())


@pytest.fixture(scope="module")
def weights(manifest):
    return WeightFile(check_file(bundles.kept(), manifest.weights, manifest.files))


@pytest.fixture(scope="module")
def engine(manifest):
    """One that writes a cache."""
    return next(each for each in manifest.engines if any(port.name.startswith("cache.") for port in each.outputs))


def inputs(engine, images):
    made = [torch.zeros(sizes_of(port.shape, images), dtype=getattr(torch, port.dtype)) for port in engine.inputs]
    for value in made:
        if value.is_floating_point():
            value.normal_(generator=torch.Generator().manual_seed(0))
    return made


@pytest.mark.parametrize("prepack", [False, True])
@pytest.mark.parametrize("images", [1, 2])
def test_outputs_go_where_they_are_wanted(engine, manifest, weights, prepack, images):
    session = open_session(engine, bundles.kept(), manifest.files, weights, prepack)
    own = session.run(inputs(engine, images), [None] * len(engine.outputs), images)
    places = [torch.full_like(value, 7) for value in own]
    found = session.run(inputs(engine, images), places, images)
    for value, place, one, port in zip(found, places, own, engine.outputs, strict=True):
        assert value is place
        assert torch.equal(place, one)
        assert tuple(one.shape) == sizes_of(port.shape, images)


def test_a_model_that_onnxruntime_refuses(engine):
    with pytest.raises(TargetError, match=r"ONNX Runtime .* does not load"):
        OnnxSession(engine, b"no model", bundles.kept(), False)


def test_a_target_of_another_release(engine, manifest, weights):
    with pytest.raises(TargetError, match=r"is of the target abacus; this release runs onnx, aoti, tensorrt"):
        open_session(msgspec.structs.replace(engine, target="abacus"), bundles.kept(), manifest.files, weights)


def package(**changes):
    made = {"target": "aoti", "file": "row.pt2", "row": 0, "images": (1, 1), "weights": {}}
    port = Port("x", "float32", (1,))
    versions = {"torch": str(torch.__version__)}
    return Engine(**{**made, "inputs": (port,), "outputs": (port,), "versions": versions, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"versions": {"torch": "1.0.0"}}, "was compiled by torch 1.0.0"),
        ({"versions": {}}, "was compiled by torch"),
        ({"instruction_set": "AVX2 ABACUS"}, "this one lacks ABACUS"),
        ({}, "does not load"),
    ],
)
def test_packages_of_other_machines_and_releases(tmp_path, weights, changes, message):
    (tmp_path / "row.pt2").write_bytes(b"no package")
    with pytest.raises(TargetError, match=message):
        AotiSession(package(**changes), tmp_path / "row.pt2", weights)


def test_a_package_is_compared_before_torch_sees_it(tmp_path, weights, manifest, monkeypatch):
    (tmp_path / "row.pt2").write_bytes(b"no package")
    monkeypatch.setattr(sessions, "load_package", lambda path: pytest.fail("it was loaded"))

    @dataclass
    class Other:
        bytes: int = 10
        sha256: str = "0" * 64

    with pytest.raises(BundleIntegrityError):
        open_session(package(), tmp_path, {"row.pt2": Other()}, weights)


# --- ports -----------------------------------------------------------------------------------------------------------


def ports_of(engine, what, **changes):
    """The engine with its first input or output changed."""
    first, *others = getattr(engine, what)
    return msgspec.structs.replace(engine, **{what: (msgspec.structs.replace(first, **changes), *others)})


@pytest.mark.parametrize("what", ["inputs", "outputs"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "other"}, "that the manifest names: .* alone; export again"),
        ({"dtype": "float16"}, "as float32 .*, and the manifest says float16"),
        ({"shape": ("images", 7, 8, 8)}, r"and the manifest says float32 \['images', 7, 8, 8\]"),
        ({"shape": ("images",)}, r"and the manifest says float32 \['images'\]"),
    ],
)
def test_models_have_the_ports_of_the_manifest(engine, manifest, weights, what, changes, message):
    with pytest.raises(BundleIntegrityError, match=message):
        open_session(ports_of(engine, what, **changes), bundles.kept(), manifest.files, weights)


def test_what_a_model_is_given_is_compared(engine, manifest, weights):
    session = open_session(engine, bundles.kept(), manifest.files, weights)
    given = inputs(engine, 2)
    nothing = [None] * len(engine.outputs)
    for wrong in (
        [given[0][:1], *given[1:]], [given[0].double(), *given[1:]], given[1:], [given[0].flatten(), *given[1:]]
    ):  # fmt: skip
        with pytest.raises(EngineRunError):
            session.run(wrong, nothing, 2)
    with pytest.raises(EngineRunError, match=r"is float32 .* for 2 images, not float32 \[1\]"):
        session.run(given, [torch.zeros(1), *nothing[1:]], 2)


def test_what_a_model_refuses_while_it_runs_is_told(engine, manifest, weights):
    session = open_session(engine, bundles.kept(), manifest.files, weights)
    given = [value if value.is_floating_point() else value + 10**6 for value in inputs(engine, 1)]
    with pytest.raises(EngineRunError, match=r"ONNX Runtime \S+ ended row-.* with an error; .* a label"):
        session.run(given, [None] * len(engine.outputs), 1)


def test_memory_that_runs_out_is_no_fault_of_an_engine(engine):
    with pytest.raises(MemoryError), sessions._running(engine, "it"):
        raise MemoryError


@pytest.fixture(scope="module")
def package_there():
    _, engine, folder = packaged()
    return engine, folder, WeightFile(folder / "weights.safetensors")


@pytest.mark.slow
def test_what_a_package_is_given_and_refuses_is_told(package_there):
    engine, folder, weights = package_there
    session = AotiSession(engine, folder / engine.file, weights)
    sample, labels = torch.randn(2, *engine.inputs[0].shape[1:]), torch.tensor([0, LABELS - 1])
    place = torch.zeros_like(sample)
    assert session.run([sample, labels], [place], 2)[0] is place
    for wrong in ([sample[:, :5], labels], [sample, labels.int()], [sample], [sample.half(), labels]):
        with pytest.raises(EngineRunError):
            session.run(wrong, [None], 2)
    for label in (LABELS, -1, 99):
        with pytest.raises(EngineRunError, match=r"AOTInductor code of torch .* ended engine\.pt2 with an error"):
            session.run([sample, torch.tensor([0, label])], [None], 2)
    with pytest.raises(EngineRunError, match=r"output of engine\.pt2 is float16"):
        AotiSession(ports_of(engine, "outputs", dtype="float16"), folder / engine.file, weights).run(
            [sample, labels], [None], 2
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": ()}, "has 2 inputs, and the manifest says 0"),
        ({"outputs": ()}, "has 1 outputs, and the manifest says 0"),
        ({"weights": {}}, "has not the weights .*: linear.bias is in the engine alone"),
    ],
)
def test_packages_have_the_ports_of_the_manifest(package_there, changes, message):
    engine, folder, weights = package_there
    with pytest.raises(BundleIntegrityError, match=message):
        AotiSession(msgspec.structs.replace(engine, **changes), folder / engine.file, weights)


# --- the kernel ------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch):
    """As in a process without the kernel, where none can be compiled: what is loaded, by name."""
    loaded = []
    monkeypatch.setattr(build, "registered", lambda: bool(loaded))
    monkeypatch.setattr(build, "load", lambda path: loaded.append(path.name))
    monkeypatch.setattr(build, "why_not_built", lambda: "there is no compiler")
    return loaded


def test_without_the_kernel(bare):
    with pytest.raises(TargetError, match="cannot be had: there is no compiler"):
        load_kernel()


def test_the_kernel_of_a_bundle_is_loaded_once_and_nothing_is_compiled(bare, tmp_path):
    load_kernel(tmp_path / "kernel-1.so")
    load_kernel(tmp_path / "kernel-2.so")
    assert bare == ["kernel-1.so"]


def test_a_kernel_for_another_processor_is_compiled_here(bare, tmp_path, monkeypatch):
    with pytest.raises(TargetError, match=r"needs a processor with AVX2 ABACUS, .* lacks ABACUS, and here it"):
        load_kernel(tmp_path / "kernel.so", "AVX2 ABACUS")
    monkeypatch.setattr(build, "why_not_built", lambda: None)
    load_kernel(tmp_path / "kernel.so", "ABACUS")
    assert bare == []


def test_a_kernel_that_does_not_load_is_compiled_here(bare, tmp_path, monkeypatch):
    def refuse(path):
        raise OSError("version GLIBC_9.9 not found")

    monkeypatch.setattr(build, "load", refuse)
    with pytest.raises(TargetError, match=r"kernel\.so does not load: version GLIBC_9\.9 .* it cannot be compiled"):
        load_kernel(tmp_path / "kernel.so")
    monkeypatch.setattr(build, "load", lambda path: None)
    with pytest.raises(TargetError, match=r"kernel\.so has not the kernel"):
        load_kernel(tmp_path / "kernel.so")


def test_the_kernel_is_compared_before_it_is_loaded(bare, tmp_path, weights):
    (tmp_path / "kernel-0.so").write_bytes(b"no library")
    (tmp_path / "row.pt2").write_bytes(b"no package")
    engine = package(kernel=True, library=Library("kernel-0.so"))
    contents = {name: (tmp_path / name).read_bytes() for name in ("kernel-0.so", "row.pt2")}
    files = {name: File(len(each), hashlib.sha256(each).hexdigest()) for name, each in contents.items()}
    with pytest.raises(TargetError, match="does not load"):  # the package, once the kernel is there
        open_session(engine, tmp_path, files, weights)
    assert bare == ["kernel-0.so"]
    bare.clear()
    (tmp_path / "kernel-0.so").write_bytes(b"another one")
    with pytest.raises(BundleIntegrityError, match=r"kernel-0\.so"):
        open_session(engine, tmp_path, files, weights)
    assert bare == []


LOADS = """
import sys
from pathlib import Path
import torch
from difa_compile.bundle.sessions import load_kernel
from difa_compile.plugins import cpu
load_kernel(Path(sys.argv[1]), sys.argv[2])
load_kernel(Path(sys.argv[1]), sys.argv[2])
q, k, v = (torch.randn(1, 1, 16, 8) for _ in range(3))
found = torch.ops.difa.local_attention_cpu(q, k, v, [4, 4], 0, 0, 0, False, 4, 0.5, None, 0)
wanted = torch.softmax(q @ k.mT * 0.5, -1) @ v
torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
assert cpu.why_not_built() is None, "a second library with the op would end the process"
"""


@pytest.mark.slow
@pytest.mark.parametrize("portable", [False, True])
def test_the_kernel_of_a_bundle_needs_no_compiler(tmp_path, portable):
    """In another process, with an empty cache; the process's own uses find it there."""
    file, needed = build.for_bundle(portable)
    assert needed == ("AVX2" if portable else needed)
    (tmp_path / "kernel.so").write_bytes(file.read_bytes())
    (tmp_path / "cache").mkdir(mode=0o700)
    hidden = os.environ | {
        "CXX": "no-such-compiler",
        "DIFA_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONWARNINGS": "error",
    }
    command = [sys.executable, "-c", LOADS, str(tmp_path / "kernel.so"), needed]
    subprocess.run(command, env=hidden, cwd=ROOT, check=True, timeout=120)
    assert not list((tmp_path / "cache").glob("*.so"))


def test_where_sessions_share_no_memory_it_is_told(monkeypatch, caplog):
    onnxruntime = pytest.importorskip("onnxruntime")
    sessions._shares_memory.cache_clear()
    assert sessions._shares_memory()

    def refused(*_):
        raise RuntimeError("not in this build")

    monkeypatch.setattr(onnxruntime, "create_and_register_allocator", refused)
    sessions._shares_memory.cache_clear()
    try:
        assert not sessions._shares_memory()
        assert "do not share their memory: not in this build" in caplog.text
    finally:
        sessions._shares_memory.cache_clear()
