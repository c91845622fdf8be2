"""The plain model with a plan, compiled and altered by hand."""

import torch

from difa_compile.backend.entry import difa
from difa_compile.decision import Window
from difa_compile.layout import Layout
from tests.support.altered import Altered
from tests.support.tiny_models import PLAIN_PATHS, at_step

EXACT = 3e-6


def compiled(model, plan, **options):
    return torch.compile(model, backend=difa, options={"plan": plan, "inner": "eager", **options})


def by_hand(model, half=0, window="band:2"):
    return Altered(model, PLAIN_PATHS, [Layout((4, 6))] * 2, half, Window.parse(window))


def call(compiled_model, inputs):
    with torch.no_grad():
        output = compiled_model(**inputs)
    return output[0] if isinstance(output, tuple) else output


def plain_output(altered, row, inputs, **options):
    """The altered :class:`PlainTransformer` returns a tensor, whose first image ``Altered`` would take."""
    forward = type(altered.model).forward
    altered.model.forward = lambda **kwargs: (forward(altered.model, **kwargs),)
    try:
        return altered(row, inputs, **options)
    finally:
        del altered.model.forward


def assert_near(one, other):
    difference = ((one - other).abs().max() / other.abs().max()).item()
    assert difference <= EXACT, difference


def with_text(inputs, tokens, step):
    """The inputs of a step, with a text of as many tokens."""
    now = at_step(inputs, step)
    generator = torch.Generator().manual_seed(100 * tokens + step)
    text = now["encoder_hidden_states"]
    return now | {"encoder_hidden_states": torch.randn(len(text), tokens, text.shape[-1], generator=generator)}
