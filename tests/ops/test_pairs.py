"""How many pairs attend in a window, against brute force and the tables of both papers."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_compile.decision import Window, WindowShape
from difa_compile.errors import LayoutError
from difa_compile.layout import Layout
from difa_compile.ops import reference
from difa_compile.ops.pairs import visible_pairs

layouts = st.builds(
    Layout, st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), st.integers(0, 3), st.integers(0, 3)
)


windows = st.builds(Window, st.sampled_from(WindowShape), st.integers(1, 9))


def brute_force_pairs(layout: Layout, window: Window) -> int:
    """The mask written out pair by pair, straight from the definitions."""
    cells = list(itertools.product(*(range(size) for size in layout.grid)))
    radius = window.radius
    sees: dict[WindowShape, Callable[[int, int], bool]] = {
        WindowShape.BAND: lambda i, j: abs(i - j) <= radius,
        WindowShape.BOX: lambda i, j: all(abs(a - b) <= radius for a, b in zip(cells[i], cells[j], strict=True)),
        WindowShape.DISC: lambda i, j: sum((a - b) ** 2 for a, b in zip(cells[i], cells[j], strict=True)) < radius**2,
    }
    first, end = layout.before, layout.before + layout.image_tokens
    count = 0
    for query, key in itertools.product(range(layout.tokens), repeat=2):
        is_image = first <= query < end and first <= key < end
        count += not is_image or sees[window.shape](query - first, key - first)
    return count


@settings(max_examples=60)
@given(layouts, windows)
def test_visible_pairs_match_brute_force(layout: Layout, window: Window) -> None:
    assert visible_pairs(layout, window, layout.tokens) == brute_force_pairs(layout, window)


@given(layouts, windows)
def test_keys_that_are_no_queries_ask_for_nothing(layout: Layout, window: Window) -> None:
    """Without the tokens before the image as queries, their rows of the mask are missing, which are full."""
    whole = visible_pairs(layout, window, layout.tokens)
    fewer = visible_pairs(layout, window, layout.image_tokens + layout.after)
    assert fewer == whole - layout.before * layout.tokens


@given(layouts)
def test_a_window_over_everything_sees_everything(layout: Layout) -> None:
    for shape in WindowShape:
        assert visible_pairs(layout, Window(shape, 10**6), layout.tokens) == layout.tokens**2
    assert visible_pairs(None, None, layout.tokens) == layout.tokens**2


@pytest.mark.parametrize("window", [Window(WindowShape.BAND, 2), Window(WindowShape.DISC, 2)])
def test_a_window_needs_a_fitting_layout(window: Window) -> None:
    with pytest.raises(LayoutError, match="needs a token layout"):
        visible_pairs(None, window, 16)
    with pytest.raises(LayoutError, match="16 tokens but the attention sequence has 17"):
        visible_pairs(Layout((4, 4)), window, 17)


@pytest.mark.parametrize(("radius", "keys"), [(8, 193), (16, 793), (32, 3205)])
def test_clear_neighbour_counts(radius: int, keys: int) -> None:
    """CLEAR, interior neighbours of an image token: what the specification shows the token in the middle, and what one
    row
    and one column more add to the count beyond what each adds alone."""
    side = 2 * radius + 1
    middle = torch.tensor(side * side // 2)
    window = Window(WindowShape.DISC, radius)
    assert reference.visible_pairs(Layout((side, side)), window, middle, torch.arange(side * side)).sum() == keys
    counts = [
        visible_pairs(Layout((height, width)), window, height * width)
        for height, width in itertools.product((2 * side, 2 * side + 1), repeat=2)
    ]
    assert counts[3] - counts[2] - counts[1] + counts[0] == keys
