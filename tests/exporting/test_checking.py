"""ONNX models are run beside the programs that they are made of."""

import sys

import pytest
import torch
from torch import nn
from torch.export import Dim

from difa_compile.bundle.manifest import Port
from difa_compile.errors import TargetError
from difa_compile.exporting.checking import NO_BFLOAT16, _resized, alike, check_model
from difa_compile.exporting.lowered import Wanted
from difa_compile.exporting.targets.onnx import to_onnx
from difa_compile.exporting.targets.tensorrt import inlined
from tests.support.small_programs import full, inlined_program, program_of, wanted_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def plain():
    return inlined_program()


def test_a_model_that_computes_something_else_is_no_engine(plain):
    program, given, model = plain
    assert check_model(model.SerializeToString(), wanted_of(program), given) == ""
    with pytest.raises(TargetError, match=r"output of the ONNX model of an engine, for 1 images, is not what"):
        check_model(model.SerializeToString(), wanted_of(program), {**given, "scale": given["scale"] + 0.01})
    broken = onnx.ModelProto.FromString(model.SerializeToString())
    del broken.graph.node[0]
    with pytest.raises(TargetError, match="ONNX Runtime does not load the model of an engine"):
        check_model(broken.SerializeToString(), wanted_of(program), given)


def test_without_onnxruntime_nothing_is_compared(plain, monkeypatch):
    program, given, model = plain
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "not installed" in check_model(model.SerializeToString(), wanted_of(program), given)


def test_pictures_may_differ_by_one():
    """Of 255, where rounding falls the other way."""

    class Picture(nn.Module):
        def forward(self, value):
            return (value * 255).round().clamp(0, 255).to(torch.uint8)

    program = torch.export.export(
        Picture(), (torch.rand(2, 3),), dynamic_shapes=({0: Dim("images", min=1, max=4)},), strict=False
    )
    made = to_onnx(program, ["value"], ["images"])
    pictures = (Port("images", "uint8", ("images", 3)),)
    wanted = Wanted(program, (Port("value", "float32", ("images", 3)),), pictures, (1, 4))
    model = inlined(made, {})
    assert check_model(model.SerializeToString(), wanted, {}) == ""
    one, other, far = (torch.tensor([each, 4], dtype=torch.uint8) for each in (3, 4, 5))
    assert alike(one, other, torch.float32)
    assert not alike(one, far, torch.float32)
    assert alike(one, far, torch.float16)


def test_what_is_not_run(plain):
    _, program = program_of(full, dtype=torch.bfloat16)
    assert check_model(b"", wanted_of(program, torch.bfloat16), {}) == NO_BFLOAT16


def test_what_is_not_finite_has_to_be_equal():
    one = torch.tensor([1.0, float("-inf"), 100.0])
    assert alike(one, one + 0.05, torch.float32)
    assert not alike(one, one + 0.2, torch.float32), "of the largest finite number"
    assert not alike(one, -one.abs(), torch.bfloat16)
    assert not alike(one, one.abs(), torch.bfloat16), "another infinity"
    assert not alike(one, one.nan_to_num(), torch.bfloat16)
    assert not alike(one, one.double(), torch.bfloat16)
    assert not alike(one, one[:2], torch.bfloat16)
    assert alike(torch.tensor([3]), torch.tensor([3]), torch.bfloat16)
    assert not alike(torch.tensor([3]), torch.tensor([4]), torch.bfloat16)


def test_examples_are_repeated_for_more_images():
    example = torch.tensor([[1, 2], [3, 4]])
    assert _resized(example, (1, 2)).tolist() == [[1, 2]]
    assert _resized(example, (5, 2)).tolist() == [[1, 2], [3, 4], [1, 2], [3, 4], [1, 2]]
