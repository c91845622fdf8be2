"""Groups of heads, against every assignment there is."""

from itertools import product

import numpy as np
import pytest

from difa_compile.decision import FULL, Decision, Window
from difa_compile.errors import CalibrationError
from difa_compile.planner.groups import LEVELS, head_groups

WINDOWS = (Window("box", 1), Window("box", 3))


def accounts(decision, errors, saved):
    """What a decision's heads lose and save."""
    forms = decision.forms or (decision,) * len(errors)
    chosen = [None if form == FULL else WINDOWS.index(form.window) for form in forms]
    lost = sum(errors[head, option] for head, option in enumerate(chosen) if option is not None)
    return lost, sum(saved[head, option] for head, option in enumerate(chosen) if option is not None)


@pytest.mark.parametrize("seed", range(6))
def test_no_assignment_that_saves_as_much_has_a_smaller_error(seed):
    rng = np.random.default_rng(seed)
    errors, saved = rng.random((5, 2)), np.tile([0.9, 0.6], (5, 1))
    if seed > 2:  # heads of sites that differ in size
        saved = saved * rng.integers(1, 4, (5, 1))
    found = head_groups(errors, saved, WINDOWS)
    assert len(found) == len(LEVELS)
    every = []
    for options in product((None, 0, 1), repeat=5):
        chosen = [(head, option) for head, option in enumerate(options) if option is not None]
        every.append((sum(errors[each] for each in chosen), sum(saved[each] for each in chosen)))
    most = saved.max(1).sum()
    for level, decision in zip(LEVELS, found, strict=True):
        lost, gained = accounts(decision, errors, saved)
        assert gained >= level * most
        assert lost == pytest.approx(min(error for error, gain in every if gain >= gained * (1 - 1e-12)))


def test_heads_take_the_window_that_costs_them_least():
    errors = np.array([[0.0, 0.0], [0.9, 0.1], [0.9, 0.9]])
    saved = np.tile([1.0, 0.5], (3, 1))
    assert list(map(str, head_groups(errors, saved, WINDOWS, levels=(0.3, 0.5)))) == [
        "heads(0:window(box:1);1-2:full)",
        "heads(0:window(box:1);1:window(box:3);2:full)",
    ]


def test_heads_that_can_take_no_window_stay_full():
    errors = np.array([[0.1, 0.05], [np.inf, np.inf], [0.2, np.inf]])
    saved = np.tile([1.0, 0.5], (3, 1))
    (decision,) = head_groups(errors, saved, WINDOWS, levels=(1.0,))
    assert [str(form) for form in decision.forms] == ["window(box:1)", "full", "window(box:1)"]


def test_where_all_heads_do_the_same_it_is_the_plain_decision():
    found = head_groups(np.full((2, 1), 0.5), np.ones((2, 1)), WINDOWS[:1], levels=(0.9, 1.0))
    assert found == (Decision.parse("window(box:1)"),)


@pytest.mark.parametrize(
    ("errors", "saved", "message"),
    [
        ([[np.nan, 1]], [[1, 1]], "NaN or negative"),
        ([[-1, 1]], [[1, 1]], "NaN or negative"),
        ([[np.inf, np.inf]], [[1, 1]], "no head can take any"),
        ([[0.1, 0.1]], [[0, 0]], "no head can take any"),
        ([[0.1]], [[1, 1]], "for 2 windows"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "no head can take any"),
    ],
)
def test_what_makes_no_groups(errors, saved, message):
    with pytest.raises(CalibrationError, match=message):
        head_groups(np.array(errors, dtype=float), np.array(saved, dtype=float), WINDOWS)
