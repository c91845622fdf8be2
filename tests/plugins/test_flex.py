"""Local attention through FlexAttention."""

import pytest
import torch

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.ops import reference
from difa_compile.ops.kernels import LocalCall
from difa_compile.plugins import flex
from tests.support.operands import operands
from tests.support.tolerances import assert_as_good_as_the_reference


@pytest.mark.parametrize("shape", ["band", "disc", "box"])
@pytest.mark.parametrize("layout", [Layout((5, 7), 2, 3), Layout((3, 4, 5), 0, 4), Layout((33,))], ids=str)
def test_flex_mask_is_the_definition(layout, shape):
    token = torch.arange(layout.tokens)
    for radius in (1, 2, 4):
        window = Window(shape, radius)
        nothing = torch.tensor(0)
        found = flex.mask_mod(layout, window)(nothing, nothing, token[:, None], token[None, :])
        assert torch.equal(found, reference.visible(layout, window)), radius


@pytest.mark.slow
def test_flex_attention_is_the_reference():
    """Compiled once per form; a grid that 128 does not divide, text on both sides, strided operands."""
    layout = Layout((13, 17), before=3, after=9)
    for window in (Window("disc", 4), Window("band", 30)):
        query, key, value = operands(layout, 2, 16, torch.float32, strides="tokens first")
        call = LocalCall(layout, window, None, tuple(query.shape), query.dtype, query.device)
        found = flex.run(query, key, value, None, call)
        assert_as_good_as_the_reference(found, query, key, value, layout, window)
