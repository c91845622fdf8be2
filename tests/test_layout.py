"""Layouts: token counts, and what is refused."""

from __future__ import annotations

import pytest

from difa_compile.errors import LayoutError
from difa_compile.layout import Layout


@pytest.mark.parametrize(
    ("layout", "image", "tokens", "text"),
    [
        (Layout((16, 16)), 256, 256, "16x16"),
        (Layout((4, 6), before=3), 24, 27, "3+4x6"),
        (Layout((4, 6), after=2), 24, 26, "4x6+2"),
        (Layout((2, 3, 5), before=1, after=7), 30, 38, "1+2x3x5+7"),
        (Layout((9,)), 9, 9, "9"),
    ],
)
def test_counts_and_text(layout: Layout, image: int, tokens: int, text: str) -> None:
    assert layout.image_tokens == image
    assert layout.tokens == tokens
    assert str(layout) == text


@pytest.mark.parametrize("grid", [(), (0, 4), (4, -1), (2, 2, 2, 2)])
def test_impossible_grids_are_refused(grid: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match="grid"):
        Layout(grid)


@pytest.mark.parametrize(("before", "after"), [(-1, 0), (0, -1)])
def test_negative_counts_are_refused(before: int, after: int) -> None:
    with pytest.raises(LayoutError, match="negative"):
        Layout((4, 4), before, after)


def test_check_names_site_and_both_counts() -> None:
    layout = Layout((4, 4), before=2)
    layout.check(18, "blocks.0.attn")
    with pytest.raises(LayoutError, match=r"blocks\.0\.attn.*18 tokens.*has 16"):
        layout.check(16, "blocks.0.attn")


def test_grid_becomes_a_tuple_of_ints() -> None:
    """So that layouts made from lists, as JSON gives them, are equal and hashable."""
    assert hash(Layout([4, 4])) == hash(Layout((4, 4)))  # type: ignore[arg-type]


def test_queries_are_all_tokens_the_image_or_the_image_and_what_follows() -> None:
    layout = Layout((4, 5), before=3, after=2)
    assert [layout.rows(count) for count in (25, 20, 22)] == [slice(0, 25), slice(3, 23), slice(3, 25)]
    assert not layout.holds(23)
    with pytest.raises(LayoutError, match=r"23 queries .* give the grid"):
        layout.rows(23)
