import sys
import tracemalloc
from pathlib import Path

import pytest

from difa_compile.wording import LIMIT, quoted, shown


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no text for this")


class Broken(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for this")


class Silent(Exception):
    def __str__(self) -> str:
        return ""


FOREIGN = [
    "",
    "plan.json",
    "a b'\"\\",
    "x" * 100_000,
    "\x1b[31mred\x07\r\n\t\0",
    "\ud800\udfff" * 400,
    "\u202egnp.exe\u2066\u200b",
    "日本" * 300,
    "\x1b" * 199,
    Path("a/b") / ("n" * 5000),
    ValueError("\n" * 1000),
    Silent(),
    Broken(),
    b"\xff" * 100_000,
    bytearray(3),
    True,
    None,
    -0.0,
    float("nan"),
    10**400,
    -(10**6000),
    [10**6000],
    list(range(1_000_000)),
    {"\ud800": "\x00" * 1000, 10**6000: [[[[[[]]]]]]},
    ("a", ("b", ("c", ("d", ("e",))))),
    {1, 2, 3},
    Unprintable(),
    [Unprintable()],
    sys,
]


@pytest.mark.parametrize("value", FOREIGN, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("limit", [4, 20, LIMIT])
@pytest.mark.parametrize("form", [shown, quoted])
def test_foreign_text_becomes_one_short_printable_line(value, limit, form):
    text = form(value, limit)
    text.encode("utf-8")
    assert text.isprintable()
    assert len(text) <= max(limit, 6 if form is quoted else 4)


def test_short_text_stands_as_it_is():
    assert shown("a b'\"\\") == "a b'\"\\"
    assert shown(Path("a/plan.json")) == "a/plan.json"
    assert shown(ValueError("bad value")) == "bad value"
    assert shown(Silent()) == "Silent"
    assert quoted("text") == "'text'"
    assert shown(["a", 1, None, 0.5, (True,), {"k": {}}]) == "['a', 1, None, 0.5, (True,), {'k': {}}]"
    assert quoted(3) == shown(3) == "3"


def test_control_characters_are_escaped():
    assert shown("a\nb\x1b\ud800\u202e") == r"a\nb\x1b\ud800\u202e"


def test_long_text_keeps_both_ends():
    text = shown("/start/" + "x" * 1000 + "/end.json", 30)
    assert text.startswith("/start/x")
    assert text.endswith("/end.json")
    assert "…" in text
    assert len(text) == 30


def test_a_huge_value_is_not_written_out():
    value = {"key": ["x" * 100] * 10, "text": "x" * 5_000_000, "list": list(range(200_000)), "number": 1 << 3_000_000}
    tracemalloc.start()
    try:
        shown(value)
        shown(value["text"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000
