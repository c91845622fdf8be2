"""The plans whose compile time is measured."""

from __future__ import annotations

from benchmarks.compile_time import draw_rows
from difa_compile import FULL
from difa_compile.plan.schedule import assign_roles, buckets


def test_rows_are_distinct_valid_and_the_same_each_time():
    rows = draw_rows(16, 6)
    assert rows == draw_rows(16, 6)
    assert rows[0] == [FULL] * 6
    assert draw_rows(4, 6) == rows[:4]
    assert len(buckets(assign_roles(rows))) == 16
