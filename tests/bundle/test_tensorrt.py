"""Sessions of TensorRT bind what they are to bind; and what cannot be loaded. No engine runs: there is no GPU."""

import hashlib
import sys

import msgspec
import pytest
import torch

from difa_compile.bundle import tensorrt as module
from difa_compile.bundle.manifest import Engine, File, Port, check_file, read_manifest, sizes_of
from difa_compile.bundle.runner import Bundle, load_bundle
from difa_compile.bundle.sessions import open_session
from difa_compile.bundle.tensorrt import TensorRtSession, check_engine, library, library_of
from difa_compile.bundle.weights import WeightFile
from difa_compile.errors import EngineRunError, TargetError
from tests.support import bundles

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from tests.support import fake_tensorrt  # noqa: E402  # it needs both


@pytest.fixture
def loaded(monkeypatch):
    return fake_tensorrt.put_in_place(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    return bundles.copy(tmp_path)


@pytest.fixture
def manifest(folder):
    """That of a bundle whose engines are TensorRT's, those of the stand-in."""
    made = read_manifest(folder)
    files, engines = dict(made.files), []
    for engine in made.engines:
        content = fake_tensorrt.with_weights_as_inputs(folder / engine.file)
        name = engine.file.replace(".onnx", ".plan")
        (folder / name).write_bytes(content)
        files[name] = File(len(content), hashlib.sha256(content).hexdigest())
        versions = {"tensorrt": fake_tensorrt.VERSION}
        engines.append(msgspec.structs.replace(engine, target="tensorrt", file=name, versions=versions))
    return msgspec.structs.replace(made, files=files, engines=tuple(engines))


def test_a_bundle_makes_what_the_pipeline_makes_of_what_is_bound(loaded, folder, manifest):
    """Every weight, input and cache at its place, whichever engine wrote it."""
    bundle = Bundle(folder, "tensorrt", manifest=manifest)
    assert bundle.self_test() < bundles.AGREE
    onnx_too = load_bundle(folder)(class_labels=[1, 2], seed=3)
    found = bundle(class_labels=[1, 2], seed=3)
    torch.testing.assert_close(found.latents, onnx_too.latents, atol=1e-5, rtol=0)
    assert len(loaded) == len(manifest.engines)


def test_engines_share_one_copy_of_the_weights(loaded, folder, manifest):
    weights = WeightFile(check_file(folder, manifest.weights, manifest.files))
    opened = [open_session(engine, folder, manifest.files, weights) for engine in manifest.engines[:2]]
    addresses = {}
    for engine, one, session in zip(manifest.engines, loaded, opened, strict=False):
        assert set(engine.weights) == set(session._weights)
        for own, name in engine.weights.items():
            place = weights.places[name]
            assert one.context.bound[own] == addresses.setdefault(place, one.context.bound[own])
    shared = set(manifest.engines[0].weights.values()) & set(manifest.engines[1].weights.values())
    assert len(shared) > 10


def engine(**changes):
    port = Port("x", "float32", (1,))
    made = {"target": "tensorrt", "file": "row.plan", "row": 0, "images": (1, 1), "weights": {}}
    versions = {"tensorrt-rtx": fake_tensorrt.VERSION}
    return Engine(**{**made, "inputs": (port,), "outputs": (port,), "versions": versions, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: {"weights": {**one.weights, "bias": "bias"}}, "bias is in the manifest alone"),
        (lambda one: {"weights": dict([*one.weights.items()][1:])}, "is in the engine alone"),
        (lambda one: {"outputs": one.outputs[1:]}, "is in the engine alone"),
        (
            lambda one: {"inputs": (msgspec.structs.replace(one.inputs[0], dtype="float16"), *one.inputs[1:])},
            "is of float32, and the manifest says float16",
        ),
        (lambda one: {"instruction_set": "8.0 12.0"}, "of the compute capability 8.0, 12.0, and this one has 8.9"),
    ],
)
def test_an_engine_that_is_not_the_manifests(loaded, folder, manifest, change, message):
    weights = WeightFile(check_file(folder, manifest.weights, manifest.files))
    one = manifest.engines[0]
    with pytest.raises(TargetError, match=message):
        open_session(msgspec.structs.replace(one, **change(one)), folder, manifest.files, weights)


def test_what_the_library_says_is_passed_on(loaded, folder, manifest):
    weights = WeightFile(check_file(folder, manifest.weights, manifest.files))
    with pytest.raises(TargetError, match=r"does not load row.plan, which 1.0 built: the magic tag does not match"):
        TensorRtSession(engine(), b"other", weights)
    session = open_session(manifest.engines[0], folder, manifest.files, weights)
    inputs = [torch.zeros(1, 2, 3)] * len(manifest.engines[0].inputs)
    with pytest.raises(EngineRunError, match=r"is not of \(1, 2, 3\)"):
        session.run(inputs, [None] * len(manifest.engines[0].outputs), 1)


def test_kernels_that_were_compiled_are_kept(folder, manifest, monkeypatch, tmp_path, caplog):
    """For the next process; made again where the file is damaged, somebody else's, or nothing can be kept."""
    loaded = fake_tensorrt.put_in_place(monkeypatch, compiles=True)
    weights = WeightFile(check_file(folder, manifest.weights, manifest.files))
    one = manifest.engines[0]
    inputs = [torch.zeros(sizes_of(port.shape, 1), dtype=getattr(torch, port.dtype)) for port in one.inputs]
    cache = tmp_path / "cache"
    monkeypatch.setenv("DIFA_CACHE_DIR", str(cache))

    def compiled():
        session = open_session(one, folder, manifest.files, weights)
        for _ in range(2):
            session.run(inputs, [None] * len(one.outputs), 1)
        return loaded[-1].cache.compiled

    assert compiled() == 1
    (file,) = cache.glob("tensorrt-*.kernels")
    assert file.read_bytes() == b"kernels of this engine"
    assert compiled() == 0
    file.write_bytes(b"damaged")
    assert compiled() == 1
    assert file.read_bytes() == b"kernels of this engine"
    assert not caplog.records
    file.chmod(0o666)
    assert compiled() == 1
    assert "can be written by others (mode 0666); its kernels are compiled again" in caplog.text
    file.unlink()
    file.mkdir()
    assert compiled() == 1
    assert "are not kept" in caplog.text


def test_without_a_gpu(folder, manifest, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TargetError, match="run on an NVIDIA GPU, and torch sees none here"):
        Bundle(folder, "tensorrt", manifest=manifest)


def test_without_a_library(monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    module._loaded.cache_clear()
    try:
        with pytest.raises(TargetError, match=r"pip install tensorrt-rtx or tensorrt"):
            library()
        with pytest.raises(TargetError, match=r"was built by tensorrt 11.0, and tensorrt-rtx cannot load it"):
            library_of(engine(versions={"tensorrt": "11.0"}))
        with pytest.raises(TargetError, match="does not say which library built it"):
            library_of(engine(versions={}))
    finally:
        module._loaded.cache_clear()


def test_what_is_no_engine():
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(TargetError, match=r"row.plan is damaged, says tensorrt-rtx"):
        check_engine(library("tensorrt-rtx"), b"no engine", "row.plan")
