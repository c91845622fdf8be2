"""Engines of TensorRT-RTX, built without a GPU; what they are built from computes what the program computes."""

import numpy as np
import pytest
import torch
from torch import nn

from difa_compile.bundle.manifest import Port
from difa_compile.bundle.tensorrt import library
from difa_compile.decision import REUSE, Decision
from difa_compile.errors import TargetError
from difa_compile.exporting.engines import engines_of
from difa_compile.exporting.lowered import TABLE, Wanted
from difa_compile.exporting.targets import tensorrt as module
from difa_compile.exporting.targets.onnx import to_onnx
from difa_compile.exporting.targets.tensorrt import check_network, inlined, lowered, memory_of
from difa_compile.plan.schedule import Role
from tests.support.exported import family_call
from tests.support.small_programs import (
    NAMES,
    TOKENS,
    WIDTH,
    full,
    inlined_program,
    parts,
    program_of,
    two_windows,
    wanted_of,
)

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
trt = pytest.importorskip("tensorrt_rtx")

HEADS = (4, TOKENS, WIDTH // 4)


@pytest.fixture(scope="module")
def plain():
    return inlined_program()


def parsed(model):
    """The network of a model, with what must outlive it."""
    made = library()
    builder = trt.Builder(made.log.logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, made.log.logger)
    assert parser.parse(model.SerializeToString())
    return network, parser, builder


def constants_of(network):
    found = []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.CONSTANT:
            layer.__class__ = trt.IConstantLayer
            found.append(np.array(layer.weights).reshape(tuple(layer.shape)))
    return found


def test_two_windows_of_an_engine_have_each_their_own_geometry():
    """Who sees whom, and the scale (its root, of queries and of keys), as the network has them before it is built."""
    _, program = program_of(two_windows)
    made = to_onnx(program, *NAMES)
    given = {name: made.tensors[name] for name in made.weights}
    tables = [tensor.numpy() for name, tensor in made.tensors.items() if name.startswith(TABLE)]
    assert len(tables) == 2
    assert not np.array_equal(*tables)
    model = inlined(made, given)
    assert not model.functions
    assert all(node.domain == "" for node in model.graph.node)
    network, *_ = parsed(model)
    constants = constants_of(network)
    seen = [sum(np.array_equal(constant, table) for constant in constants) for table in tables]
    assert all(seen), "both tables"
    factors = [round(float(constant.ravel()[0]), 4) for constant in constants if constant.dtype == np.float32]
    near, far = (round(scale**0.25, 4) for scale in (1 / HEADS[2], 0.2**2))
    assert (factors.count(near), factors.count(far)) == (2, 1), "the near window twice, the far one once"


def test_an_engine_has_no_weights(tmp_path):
    _, program = program_of(parts)
    state = program.state_dict
    one = lowered(wanted_of(program), tmp_path / "row")
    assert one.weights == {name: name for name in state}, "biases and scales as well"
    assert (one.tables, one.instruction_set, one.unchecked) == ({}, "", "")
    assert one.versions == {"tensorrt-rtx": trt.__version__, "onnx": onnx.__version__}
    assert set(one.memory) == {"activations", "constants"}
    largest = max(value.numel() * value.itemsize for value in state.values())
    assert one.memory["constants"] < largest <= one.memory["activations"]
    content = one.file.read_bytes()
    assert not any(value.detach().numpy().tobytes() in content for value in state.values() if len(value.unique()) > 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, dtype):
    _, program = program_of(two_windows, dtype=dtype)
    made = lowered(wanted_of(program, dtype), tmp_path / "row")
    assert made.unchecked == ("ONNX Runtime computes nothing in bfloat16 on a CPU" if dtype == torch.bfloat16 else "")


def test_large_constants_are_shared_as_weights_are(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "INSIDE", 1000)
    _, program = program_of(two_windows)
    made = lowered(wanted_of(program), tmp_path / "row")
    assert len(made.tables) == 2
    assert set(made.tables) == {stored for stored in made.weights.values() if stored.startswith(TABLE)}
    assert set(made.weights) > set(program.state_dict)


def test_what_is_no_weight_stays_inside(tmp_path):
    _, program = program_of(full)
    made = lowered(wanted_of(program, constants=("positions", "scale")), tmp_path / "row")
    assert set(made.weights) == set(program.state_dict) - {"positions", "scale"}


def test_a_bucket_of_a_model(tmp_path):
    """A tiny DiT, guided, with a window, and with attention that is reused."""
    call, _ = family_call("dit")
    roles = [Role(Decision.parse("window(band:3)")), *[Role(REUSE)] * (len(call.capture.model.sites) - 1)]
    (engine,) = engines_of([call], roles)
    assert any(port.name.startswith("cache.") for port in engine.inputs)
    inputs, outputs = (
        tuple(Port(each.name, str(each.dtype).removeprefix("torch."), each.shape) for each in ports)
        for ports in (engine.inputs, engine.outputs)
    )
    wanted = Wanted(engine.program, inputs, outputs, engine.images, tuple(engine.constants))
    made = lowered(wanted, tmp_path / "row")
    assert set(made.weights) == set(engine.weights)
    assert made.unchecked == ""


def test_compute_capabilities(plain, tmp_path):
    program, *_ = plain
    made = lowered(wanted_of(program, gpus=("8.9", "12.0")), tmp_path / "row")
    assert made.instruction_set == "8.9 12.0"
    with pytest.raises(TargetError, match=r"builds for no GPU of the compute capability 9.0; it does for .*8.9"):
        lowered(wanted_of(program, gpus=("9.0",)), tmp_path / "row")


def test_a_build_that_fails_says_why(plain, tmp_path):
    """Turing has no products in single precision for TensorRT-RTX."""
    program, *_ = plain
    with pytest.raises(TargetError, match=r"does not build an engine: .*FP32 GEMM is not supported"):
        lowered(wanted_of(program, gpus=("7.5",)), tmp_path / "row")


def test_a_model_that_is_not_read_says_why(tmp_path):
    class Determinant(nn.Module):
        def forward(self, value):
            return torch.linalg.det(value)

    program = torch.export.export(Determinant(), (torch.randn(2, 3, 3),), strict=False)
    wanted = Wanted(program, (Port("value", "float32", (2, 3, 3)),), (Port("output", "float32", (2,)),), (1, 1))
    with pytest.raises(TargetError, match=r"tensorrt-rtx .* does not read the model of an engine: .*Det"):
        lowered(wanted, tmp_path / "row")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"inputs": (Port("sample", "float32", ("images", TOKENS, WIDTH)),)}, "reads cache.a, which the engine"),
        ({"outputs": (Port("output", "float32", ("images", TOKENS, 1)),)}, "reads output as .*, and it is .* 1"),
        ({"outputs": (Port("output", "float16", ("images", TOKENS, WIDTH)),)}, "reads output as float32, and it is fl"),
        ({"outputs": (Port("latents", "float32", ("images", TOKENS, WIDTH)),)}, "reads latents as None"),
    ],
)
def test_a_network_has_what_the_manifest_names(plain, change, message):
    program, given, model = plain
    network, *_ = parsed(model)
    if message is None:
        check_network(library(), network, given, wanted_of(program))
        return
    with pytest.raises(TargetError, match=message):
        check_network(library(), network, given, wanted_of(program, **change))


def test_tensorrt_itself_wants_a_gpu(plain, tmp_path, monkeypatch):
    program, *_ = plain
    installed = library()
    other = type(installed)("tensorrt", "11.0", installed.module, installed.log)
    monkeypatch.setattr(module, "library", lambda: other)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TargetError, match=r"builds on the GPU that it builds for.*pip install tensorrt-rtx"):
        lowered(wanted_of(program), tmp_path / "row")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(TargetError, match=r"for the GPU that is here, of 9.0, not for 8.9"):
        lowered(wanted_of(program, gpus=("8.9",)), tmp_path / "row")


def test_what_a_build_tells_of_memory():
    lines = ["Total Activation Memory: 100 bytes", "Total Weights Memory: 7 bytes", "Total Activation Memory: 5 bytes"]
    assert memory_of(lines) == {"activations": 5, "constants": 7}
    assert memory_of(["nothing of it"]) == {}


def test_profiles_span_the_images(plain, monkeypatch):
    """From the least to the most, of inputs that hold each image twice as well."""
    program, given, model = plain
    made = []
    make = trt.Builder.create_optimization_profile

    def noted(self):
        made.append(make(self))
        return made[-1]

    monkeypatch.setattr(trt.Builder, "create_optimization_profile", noted)
    cases = (
        ("images", None, (2, 3, 6)),
        ("2*images", None, (4, 6, 12)),
        ("images", 4, (2, 4, 6)),
        ("images", 1, (2, 2, 6)),
    )
    for size, usual, counts in cases:
        inputs = tuple(Port(name, "float32", (size, TOKENS, WIDTH)) for name in NAMES[0])
        module.build(library(), model, given, wanted_of(program, inputs=inputs, images=(2, 6), usual=usual), {})
        for name in NAMES[0]:
            shapes = [tuple(shape) for shape in made[-1].get_shape(name)]
            assert shapes == [(count, TOKENS, WIDTH) for count in counts]
