"""Models whose tensors lie in other files are not handed to a runtime, wherever in the model they stand."""

import hashlib

import msgspec
import pytest

pytest.importorskip("onnx")

import onnx
from onnx import TensorProto, helper

from difa_compile.bundle import sessions
from difa_compile.bundle.manifest import File, read_manifest
from difa_compile.bundle.onnx_paths import check_places
from difa_compile.bundle.runner import Bundle
from difa_compile.errors import BundleIntegrityError
from tests.support import bundles

WEIGHTS = "weights-0123456789ab.safetensors"


def outside(location, *more):
    tensor = TensorProto(name="w", dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for place in (location, *more):
        tensor.external_data.add(key="location", value=place)
    tensor.external_data.add(key="offset", value="0")
    return tensor


def graph(*nodes, initializers=()):
    return helper.make_graph(list(nodes), "g", [], [], list(initializers))


def in_initializers(tensor):
    return helper.make_model(graph(initializers=[tensor]))


def in_a_constant(tensor):
    return helper.make_model(graph(helper.make_node("Constant", [], ["c"], value=tensor)))


def in_a_branch(tensor):
    inner = graph(helper.make_node("Constant", [], ["c"], value=tensor))
    return helper.make_model(graph(helper.make_node("If", ["b"], ["y"], then_branch=inner, else_branch=graph())))


def in_a_function(tensor):
    model = helper.make_model(graph())
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    model.functions.append(helper.make_function("d", "f", [], ["c"], [node], [helper.make_opsetid("", 20)]))
    return model


def in_a_sparse_tensor(tensor):
    model = helper.make_model(graph())
    model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    return model


def in_training(tensor):
    model = helper.make_model(graph())
    model.training_info.add().algorithm.initializer.append(tensor)
    return model


PLACES = [in_initializers, in_a_constant, in_a_branch, in_a_function, in_a_sparse_tensor, in_training]


@pytest.mark.parametrize("model", PLACES)
@pytest.mark.parametrize("location", ["../../etc/passwd", "/etc/passwd", "other.bin", "", f"./{WEIGHTS}"])
def test_other_files_are_refused(model, location):
    check_places(model(outside(WEIGHTS)).SerializeToString(), WEIGHTS, "it")
    with pytest.raises(BundleIntegrityError, match=r"it has weights in '.*and those of its bundle lie in weights-0123"):
        check_places(model(outside(location)).SerializeToString(), WEIGHTS, "it")


def test_a_second_place_is_seen():
    for places in ((WEIGHTS, "/etc/passwd"), ("/etc/passwd", WEIGHTS)):
        with pytest.raises(BundleIntegrityError, match="/etc/passwd"):
            check_places(in_initializers(outside(*places)).SerializeToString(), WEIGHTS, "it")
    twice = b"".join(in_initializers(outside(place)).SerializeToString() for place in ("/etc/passwd", WEIGHTS))
    with pytest.raises(BundleIntegrityError, match="/etc/passwd"):
        check_places(twice, WEIGHTS, "it")


@pytest.mark.parametrize("content", [b"no model", b"\x3a\xff\xff\xff\xff\x7f", b"\x3a\x02\x0a\x7f"])
def test_what_is_no_model(content):
    with pytest.raises(BundleIntegrityError, match="it is no ONNX model"):
        check_places(content, WEIGHTS, "it")


def test_a_bundle_whose_engine_leads_out_of_it_is_not_opened(tmp_path, monkeypatch):
    """Though its manifest has the engine's digest."""
    folder = bundles.copy(tmp_path)
    manifest = read_manifest(folder)
    files = dict(manifest.files)
    for engine in manifest.engines:
        model = onnx.load_model_from_string((folder / engine.file).read_bytes())
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = "../secret" if entry.key == "location" else entry.value
        content = model.SerializeToString()
        (folder / engine.file).write_bytes(content)
        files[engine.file] = File(len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(sessions, "OnnxSession", lambda *_: pytest.fail("it was handed to the runtime"))
    bundle = Bundle(folder, manifest=msgspec.structs.replace(manifest, files=files))
    with pytest.raises(BundleIntegrityError, match=r"has weights in '\.\./secret'"):
        bundle(class_labels=[1])
