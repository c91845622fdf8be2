"""Engines loaded: outputs where they are wanted, and what cannot be loaded."""

from dataclasses import dataclass

import msgspec
import pytest
import torch

from difa_compile.bundle import sessions
from difa_compile.bundle.manifest import Engine, Port, check_file, read_manifest, sizes_of
from difa_compile.bundle.sessions import AotiSession, OnnxSession, load_kernel, open_session
from difa_compile.bundle.weights import WeightFile
from difa_compile.errors import BundleIntegrityError, TargetError
from tests.support import bundles

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


def test_without_the_kernel(monkeypatch):
    monkeypatch.setattr(sessions.build, "why_not_built", lambda: "there is no compiler")
    with pytest.raises(TargetError, match="cannot be had: there is no compiler"):
        load_kernel()
