"""Decisions and windows: text forms, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difa_compile.decision import FULL, REUSE, Decision, Kind, Window, WindowShape
from difa_compile.errors import DecisionError

windows = st.builds(Window, st.sampled_from(WindowShape), st.integers(1, 10**6))
decisions = st.one_of(
    st.builds(Decision, st.sampled_from([Kind.FULL, Kind.REUSE]), st.none(), st.booleans()),
    st.builds(Decision, st.sampled_from([Kind.WINDOW, Kind.WINDOW_RESIDUAL]), windows, st.booleans()),
)


@given(decisions)
def test_text_round_trip(decision: Decision) -> None:
    assert Decision.parse(str(decision)) == decision


@given(windows)
def test_window_text_round_trip(window: Window) -> None:
    assert Window.parse(str(window)) == window


@pytest.mark.parametrize(
    ("decision", "text"),
    [
        (FULL, "full"),
        (REUSE, "reuse"),
        (Decision(Kind.FULL, cfg_shared=True), "full+cfg"),
        (Decision(Kind.WINDOW, Window(WindowShape.DISC, 8)), "window(disc:8)"),
        (Decision(Kind.WINDOW_RESIDUAL, Window(WindowShape.BAND, 128)), "window(band:128)+residual"),
        (Decision(Kind.WINDOW_RESIDUAL, Window(WindowShape.BOX, 3), True), "window(box:3)+residual+cfg"),
    ],
)
def test_text_is_stable(decision: Decision, text: str) -> None:
    """Plan files hold these strings."""
    assert str(decision) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "FULL",
        "full ",
        "window",
        "window()",
        "window(disc:8",
        "window(disc:8)+cfg+residual",
        "full+residual",
        "reuse+residual",
        "window(disc:0)",
        "window(disc:-1)",
        "window(disc:1.5)",
        "window(blob:3)",
        "full+cfg+cfg",
    ],
)
def test_unknown_text_is_refused(text: str) -> None:
    with pytest.raises(DecisionError):
        Decision.parse(text)


@pytest.mark.parametrize("radius", [0, -3, 1.5, True, "8"])
def test_radius_must_be_a_positive_whole_number(radius: object) -> None:
    with pytest.raises(DecisionError, match="radius"):
        Window(WindowShape.BAND, radius)  # type: ignore[arg-type]


def test_shape_may_be_given_by_name() -> None:
    assert Window("disc", 8) == Window(WindowShape.DISC, 8)  # type: ignore[arg-type]
    with pytest.raises(DecisionError, match="band, disc, box"):
        Window("circle", 8)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Kind.WINDOW, Kind.WINDOW_RESIDUAL])
def test_window_kinds_need_a_window(kind: Kind) -> None:
    with pytest.raises(DecisionError, match="needs a window"):
        Decision(kind)


@pytest.mark.parametrize("kind", [Kind.FULL, Kind.REUSE])
def test_other_kinds_take_none(kind: Kind) -> None:
    with pytest.raises(DecisionError, match="takes no window"):
        Decision(kind, Window(WindowShape.BAND, 4))


def test_full_with_shared_cfg_counts_as_full() -> None:
    """It stores a residual for both halves."""
    assert Decision(Kind.FULL, cfg_shared=True).is_full
    assert FULL.is_full
    assert not REUSE.is_full
    assert not Decision(Kind.WINDOW, Window(WindowShape.BAND, 4)).is_full


def test_decisions_are_values() -> None:
    assert len({Decision.parse("full"), FULL, Decision(Kind.FULL)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.cfg_shared = True  # type: ignore[misc]


@pytest.mark.parametrize(
    "text",
    [
        "band:\u0663",
        "band:\u00b2",
        "b\u00e4nd:3",
        "band:" + "9" * 5000,
        "band:" + "0" * 5000,
        f"band:{2**63}",
        "band:3\n",
    ],
    ids=["arabic digit", "superscript", "umlaut", "5000 digits", "5000 zeros", "above the limit", "line break"],
)
def test_only_plain_digits_of_a_radius_that_can_be_are_read(text: str) -> None:
    for parse, written in ((Window.parse, text), (Decision.parse, f"window({text})+residual")):
        with pytest.raises(DecisionError) as caught:
            parse(written)
        assert len(str(caught.value)) < 500
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "value", [10**4000, -(10**4000), 2.0, True, None, [], "8"], ids=lambda value: type(value).__name__
)
def test_a_window_takes_no_other_radius_or_shape(value: object) -> None:
    with pytest.raises(DecisionError):
        Window("band", value)  # type: ignore[arg-type]
    with pytest.raises(DecisionError):
        Window(value, 8)  # type: ignore[arg-type]
