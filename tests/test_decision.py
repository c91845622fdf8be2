"""Decisions and windows: text forms, and what is refused."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difa_compile.decision import FULL, REUSE, Basis, Decision, HeadGroup, Kind, Window, WindowShape, examples
from difa_compile.errors import DecisionError

windows = st.builds(Window, st.sampled_from(WindowShape), st.integers(1, 10**6))
decisions = st.one_of(
    st.builds(Decision, st.sampled_from([Kind.FULL, Kind.REUSE]), st.none(), st.booleans()),
    st.builds(Decision, st.sampled_from([Kind.WINDOW, Kind.WINDOW_RESIDUAL]), windows, st.booleans()),
    st.builds(
        Decision,
        st.just(Kind.FORECAST),
        st.none(),
        st.booleans(),
        st.integers(1, 3),
        st.none() | st.sampled_from(Basis),
    ),
)

forms = st.one_of(
    st.sampled_from([FULL, REUSE]), st.builds(Decision, st.sampled_from([Kind.WINDOW, Kind.WINDOW_RESIDUAL]), windows)
)
by_heads = st.builds(
    Decision.of_heads, st.lists(forms, min_size=2, max_size=30).filter(lambda all_: len(set(all_)) > 1), st.booleans()
)


@given(st.one_of(decisions, by_heads))
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
        (Decision(Kind.FORECAST, order=1), "forecast:1"),
        (Decision(Kind.FORECAST, order=2, basis=Basis.PROGRESS), "forecast:2"),
        (Decision(Kind.FORECAST, None, True, 3, Basis.STEP), "forecast:3(step)+cfg"),
        (
            Decision.of_heads([Decision(Kind.WINDOW, Window(WindowShape.BAND, 32))] * 4 + [FULL, REUSE, REUSE, FULL]),
            "heads(0-3:window(band:32);4,7:full;5-6:reuse)",
        ),
        (Decision.of_heads([FULL, REUSE, FULL, FULL], True), "heads(0,2-3:full;1:reuse)+cfg"),
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
        "forecast",
        "forecast:",
        "forecast:0",
        "forecast:4",
        "forecast:-1",
        "forecast:1.0",
        "forecast:\u0661",
        "forecast:" + "9" * 5000,
        "forecast:1()",
        "forecast:1(steps)",
        "forecast:1+cfg(step)",
        "forecast:1+residual",
        "forecast:1(step)\n",
        "reuse:1",
        "full(step)",
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


@pytest.mark.parametrize("kind", [Kind.FULL, Kind.REUSE, Kind.FORECAST])
def test_other_kinds_take_none(kind: Kind) -> None:
    with pytest.raises(DecisionError, match="takes no window"):
        Decision(kind, Window(WindowShape.BAND, 4))


@pytest.mark.parametrize("order", [0, -1, 4, 1.0, True, None, "1", 10**4000], ids=lambda value: str(value)[:4])
def test_the_order_of_a_forecast_is_a_small_whole_number(order: object) -> None:
    with pytest.raises(DecisionError, match="order of a forecast") as caught:
        Decision(Kind.FORECAST, order=order)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("basis", ["steps", "", 1, [], Kind.FULL], ids=repr)
def test_the_basis_of_a_forecast_is_one_of_two(basis: object) -> None:
    with pytest.raises(DecisionError, match=r"basis of a forecast is .*; choose one of progress, step"):
        Decision(Kind.FORECAST, order=1, basis=basis)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Kind.FULL, Kind.REUSE, Kind.WINDOW])
def test_only_a_forecast_has_an_order_and_a_basis(kind: Kind) -> None:
    window = Window(WindowShape.BAND, 4) if kind.windowed else None
    for order, basis in ((1, None), (0, Basis.STEP)):
        with pytest.raises(DecisionError, match="takes no order and no basis"):
            Decision(kind, window, False, order, basis)


def test_a_forecast_is_in_progress_unless_it_says_otherwise() -> None:
    """One decision has one text, whichever way it was given."""
    given = [
        Decision(Kind.FORECAST, order=2),
        Decision("forecast", order=2, basis="progress"),  # type: ignore[arg-type]
        Decision.parse("forecast:2(progress)"),
        Decision.parse("forecast:2"),
    ]
    assert len(set(given)) == 1
    assert str(given[2]) == "forecast:2"
    assert given[0] != Decision.parse("forecast:2(step)")


@given(st.lists(decisions, max_size=8))
def test_decisions_have_an_order(several: list[Decision]) -> None:
    ordered = sorted(several)
    assert all(a < b for a, b in pairwise(ordered) if a != b)


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


# --- heads -----------------------------------------------------------------------------------------------------------


@given(by_heads, st.randoms())
def test_equal_decisions_by_heads_are_equal_however_they_are_written(decision: Decision, random: object) -> None:
    single = [HeadGroup((head,), group.form) for group in decision.groups for head in group.heads]
    random.shuffle(single)  # type: ignore[attr-defined]
    written = f"heads({';'.join(map(str, single))}){'+cfg' if decision.cfg_shared else ''}"
    other = Decision.parse(written)
    assert other == decision == Decision(Kind.HEADS, None, decision.cfg_shared, groups=tuple(single))
    assert hash(other) == hash(decision)
    assert str(other) == str(decision)
    assert Decision.of_heads(decision.forms, decision.cfg_shared) == decision


@given(by_heads)
def test_each_head_has_its_form(decision: Decision) -> None:
    for group in decision.groups:
        assert {decision.form_of(head) for head in group.heads} == {group.form}
    assert decision.windows == tuple(group.form.window for group in decision.groups if group.form.window)
    assert decision.reads_caches == any(form.kind.reads for form in decision.forms)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heads()", "not of the form HEADS:FORM"),
        ("heads(0)", "not of the form HEADS:FORM"),
        ("heads(full;reuse)", "not of the form"),
        ("heads(:full;1:reuse)", "heads '' are not understood"),
        ("heads(0:full;)", "not of the form"),
        ("heads(0:full;2:reuse)", "head 1 is not named, but head 2 is"),
        ("heads(1-3:full;4:reuse)", "head 0 is not named"),
        ("heads(0-2:full;2-3:reuse)", "head 2 is named twice, in 0-2:full and in 2-3:reuse"),
        ("heads(0,0:full;1:reuse)", "name some head twice"),
        ("heads(3-1:full;0:reuse)", "ranges that rise"),
        ("heads(0-99999999:full;1:reuse)", "numbers below 4096"),
        ("heads(0-4096:full;1:reuse)", "numbers below 4096"),
        ("heads(-1:full;0:reuse)", "not understood"),
        ("heads( 0:full;1:reuse)", "not understood"),
        ("heads(\u0660:full;1:reuse)", "not understood"),
        ("heads(0:full;1:reuse+cfg)", "a group of heads cannot be reuse\\+cfg"),
        ("heads(0:full;1:heads(0:full))", "not of the form HEADS:FORM"),
        ("heads(0:full;1:window(blob:2))", "window shape 'blob' is unknown"),
        ("heads(0:full;1:window(band:0))", "window radius is 0"),
        ("heads(0:full;1:reuse)+residual", "not understood"),
        ("heads(0:full;1:reuse", "not understood"),
        ("heads(0-3:reuse)", "all heads are reuse; write reuse"),
        ("heads(0-1:full;2:full)", "all heads are full; write full"),
        ("heads(" * 5000 + ")" * 5000, "not of the form"),
        ("heads(" + "0-4000," * 50 + "1:full)", "twice"),
    ],
    ids=lambda value: value[:40],
)
def test_heads_that_do_not_add_up_are_refused(text: str, message: str) -> None:
    with pytest.raises(DecisionError, match=message) as caught:
        Decision.parse(text)
    assert len(str(caught.value)) < 500


def test_groups_go_with_the_kind_heads_alone() -> None:
    group = HeadGroup((0,), FULL)
    with pytest.raises(DecisionError, match="decision full takes no groups of heads"):
        Decision(Kind.FULL, groups=(group,))
    with pytest.raises(DecisionError, match="needs groups of heads"):
        Decision(Kind.HEADS)
    with pytest.raises(DecisionError, match="takes no window"):
        Decision(Kind.HEADS, Window(WindowShape.BAND, 4), groups=(group, HeadGroup((1,), REUSE)))
    for heads in ((), (-1,), (4096,), (True,), (1.0,), ("1",)):
        with pytest.raises(DecisionError, match="head"):
            HeadGroup(heads, FULL)  # type: ignore[arg-type]
    with pytest.raises(DecisionError, match="at least one head"):
        Decision.of_heads([])


def test_heads_that_all_do_the_same_are_the_plain_decision() -> None:
    assert Decision.of_heads([FULL] * 4) == FULL
    assert Decision.of_heads([REUSE] * 4, True) == Decision(Kind.REUSE, None, True)
    window = Decision.parse("window(band:2)")
    wide = window.with_windows(lambda _: Window("band", 8))
    assert str(wide) == "window(band:8)"
    mixed = Decision.of_heads([window, wide])
    assert (
        str(mixed.with_windows(lambda window: Window("disc", window.radius)))
        == "heads(0:window(disc:2);1:window(disc:8))"
    )
    assert mixed.with_windows(lambda _: Window("box", 1)) == Decision.parse("window(box:1)")
    assert FULL.with_windows(lambda _: Window("box", 1)) == FULL


@pytest.mark.parametrize("heads", [1, 2, 24])
def test_there_is_an_example_of_every_kind_that_a_site_can_take(heads: int) -> None:
    found = {decision.kind for decision in examples(heads)}
    assert found == set(Kind) - ({Kind.HEADS} if heads == 1 else set())


def test_groups_of_several_sites_come_apart_site_by_site() -> None:
    decision = Decision.parse("heads(0-2:window(band:2);3-6:full)+cfg")
    assert list(map(str, decision.at_sites([2, 3, 2]))) == [
        "window(band:2)+cfg",
        "heads(0:window(band:2);1-2:full)+cfg",
        "full+cfg",
    ]
    assert decision.at_sites([7, 7]) == (decision, decision)
    assert decision.at_sites([7]) == (decision,)
    assert REUSE.at_sites([1, 2]) == (REUSE, REUSE)


@pytest.mark.parametrize("heads", [[2, 3], [3, 3, 3], [7, 3], [7, 0]])
def test_groups_that_do_not_add_up_to_the_heads_of_the_sites_are_refused(heads: list[int]) -> None:
    with pytest.raises(DecisionError, match="names 7 heads, but the sites have"):
        Decision.parse("heads(0-2:window(band:2);3-6:full)").at_sites(heads)
