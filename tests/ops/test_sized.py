"""``difa::sized``: a value of a size that its values determine, held to the size it had in the capture."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

from difa_compile.ops.sized import SIZED


def test_it_passes_the_value_on_row_by_row():
    value = torch.arange(12.0).reshape(3, 4).T
    found = SIZED(value, [4, 3])
    assert torch.equal(found, value)
    assert found.is_contiguous()
    found.zero_()
    assert value.any(), "the result is no view of what was given"


@pytest.mark.parametrize("shape", [[3, 4], [12], [4, 3, 1], []])
def test_another_size_than_was_captured_is_an_error(shape):
    with pytest.raises(RuntimeError, match=r"a value of shape \[4, 3\] where \[.*\] was captured"):
        SIZED(torch.zeros(4, 3), shape)


def test_for_the_compiler_the_size_is_plain():
    with FakeTensorMode(shape_env=ShapeEnv()):
        mask = torch.empty(6, dtype=torch.bool)
        open_ = mask.nonzero()
        assert free_unbacked_symbols(open_)
        held = SIZED(open_, [4, 1])
        assert held.shape == (4, 1)
        assert held.dtype == torch.int64
        assert not free_unbacked_symbols(held)


def test_opcheck():
    torch.library.opcheck(SIZED, (torch.randn(4, 3).T, [3, 4]), test_utils=("test_schema", "test_faketensor"))
