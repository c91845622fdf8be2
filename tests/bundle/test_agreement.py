"""Differences: relative, of what is finite, and what is not finite must be the same; what is still rounding."""

import math

import pytest
import torch

from difa_compile.bundle.agreement import LEVELS, LIMITS, Tested, coarsest, difference, levels_apart

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("found", "wanted", "wanted_difference"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([0.0, 0.25], [0.0, 0.0], 0.25),
        ([1.0, -INF], [1.0, -INF], 0.0),
        ([1.5, -INF], [1.0, -INF], 0.5),
        ([1.0, INF], [1.0, -INF], INF),
        ([1.0, 3.0], [1.0, INF], INF),
        ([1.0, INF], [1.0, 3.0], INF),
        ([NAN, 2.0], [NAN, 1.0], 1.0),
        ([NAN, 2.0], [1.0, 2.0], INF),
        ([1.0, 2.0], [NAN, 2.0], INF),
        ([-INF], [-INF], 0.0),
        ([], [], 0.0),
        ([1.0], [1.0, 1.0], INF),
        ([True, False], [True, True], 1.0),
    ],
)
def test_differences(found, wanted, wanted_difference):
    assert difference(torch.tensor(found), torch.tensor(wanted)) == wanted_difference


def test_levels_do_not_wrap_around():
    one, other = torch.tensor([255, 7], dtype=torch.uint8), torch.tensor([0, 7], dtype=torch.uint8)
    assert [levels_apart(one, other, dtype) for dtype in LEVELS] == [255] * len(LEVELS)
    pictures = torch.zeros(2, 1000, dtype=torch.uint8)
    pictures[1, :9], pictures[1, 9:500] = 40, 3
    assert levels_apart(*pictures, torch.float32) == 40
    assert levels_apart(*pictures, torch.float16) == 3, "but for a few"
    pictures[1, :11] = 40
    assert levels_apart(*pictures, torch.float16) == 40


def test_half_precision_alone_is_given_much_room():
    assert coarsest([torch.int64, torch.float32, torch.bfloat16, torch.float16]) is torch.bfloat16
    assert coarsest([torch.int64]) is torch.float32
    assert LIMITS[torch.float32] < LIMITS[torch.float16] < LIMITS[torch.bfloat16] < 1
    assert LEVELS[torch.float32] == 1
    assert LIMITS.keys() == LEVELS.keys()


@pytest.mark.parametrize(
    ("latents", "levels", "passed"),
    [(1e-6, None, True), (1e-6, 1, True), (1e-6, 2, False), (2e-3, 0, False), (INF, 0, False), (NAN, 0, False)],
)
def test_a_self_test_is_passed_by_both(latents, levels, passed):
    found = Tested(latents, levels, LIMITS[torch.float32], LEVELS[torch.float32])
    assert found.passed is passed
    assert ("pictures" in found.told) == (levels is not None)
