"""How close a kernel must come to the reference."""

import torch

from difa_compile.ops import reference

FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""About two units in the last place of values near one: below this, errors are not compared."""


def assert_as_good_as_the_reference(found, query, key, value, layout, window, scale=None, pooled=0):
    """At most twice the error that the reference itself makes in this precision, or what rounding the scores makes."""
    assert found.dtype == query.dtype
    assert found.shape == query.shape
    made = (query, key, value)
    exact = reference.local_attention(*(x.double() for x in made), layout, window, scale, pooled=pooled)
    same = reference.local_attention(*made, layout, window, scale, pooled=pooled)
    own = (same.double() - exact).abs().max().item()
    error = (found.double() - exact).abs().max().item()
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    groups = query.shape[1] // key.shape[1]
    scores = query.double() @ key.double().repeat_interleave(groups, 1).transpose(-2, -1)
    largest_score = scores.abs().max().item() * factor
    assert error <= 2 * own + FLOOR[query.dtype] * max(1.0, largest_score), (
        f"error {error}, the reference itself has {own}"
    )
