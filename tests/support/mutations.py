"""Seeded damage: documents edited in their structure, and bytes changed, cut and moved."""

from __future__ import annotations

import copy
import random
from typing import Any

LEAVES: tuple[Any, ...] = (
    None, True, False, 0, -0.0, 1, -1, 2, 1.0, 0.5, -1e-9, 1e308, -1e308, 5e-324, 2**31, 2**53 + 1, 2**63, 10**39,
    10**59, 10**60, 10**400, 10**4000, "", "full", "reuse", "window(band:4)", "window(disc:8)+residual+cfg", "cpu",
    "float32", "self", "band:\u0663", "window(band:\u0663)", "window(band:0)", "window(disc:999999999999)",
    "window(disc:" + "9" * 5000 + ")", "forecast:1", "forecast:3(step)+cfg", "forecast:" + "9" * 5000,
    "\ud800", "\udfff tail", "\x00", "\x1b[31m", "\u202e", "日本", "x" * 10_000, "1",
    "1.0", "NaN", "../../etc/passwd", "transformer_blocks.0.attn1", [], {}, [[]], [None], {"": None}, {"\ud800": 1},
    [0] * 50, ["full"] * 3,
)  # fmt: skip
RAW = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"9" * 400, b"9" * 5000, b"1." + b"1" * 5000, b"-0",
    b"[" * 3000, b'{"a":1,"a":2}', b"\xff", b"\xed\xa0\x80", b"\x00", b"\xef\xbb\xbf", b"//", b"'", b",", b"}", b"]",
    b'"', b"\\ud800", b"01", b"0x1", b"1_0", b".5", b"+1", b"\xd9\xa3", b"null", b"true",
)  # fmt: skip


def edited(document: Any, seed: int) -> Any:
    """A copy with one to three changes: a value, a type, a key or an entry added, dropped, doubled or exchanged."""
    chance = random.Random(seed)
    holder = [copy.deepcopy(document)]  # so that the whole can be replaced, too
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(_places(holder))
        container, key = chance.choice(places[1:] if chance.random() < 0.98 and len(places) > 1 else places)
        value = container[key]
        change = chance.randrange(9)
        if change == 0:
            del container[key]
            if container is holder:
                holder.append(None)
        elif change == 1 and isinstance(container, list):
            container.insert(chance.randrange(len(container) + 1), copy.deepcopy(value))
        elif change == 1:
            container[chance.choice(("extra", "", "\ud800", "digest", "schema_version", "x" * 3000, key + " "))] = value
        elif change == 2:
            other, at = chance.choice(places)
            container[key] = (
                copy.deepcopy(other[at]) if at in (other if isinstance(other, dict) else range(len(other))) else 0
            )
        elif change == 3 and isinstance(value, (int, float)) and not isinstance(value, bool):
            container[key] = chance.choice(
                (value + 1, -value, value * 2, float(min(value, 1e300)), str(value), bool(value))
            )
        elif change == 4 and isinstance(value, str):
            at = chance.randrange(len(value) + 1)
            container[key] = value[:at] + chance.choice(("", "0", "٣", "\ud800", "\n", "é", value)) + value[at + 1 :]
        elif change == 5 and isinstance(value, list):
            container[key] = chance.choice((value[::-1], value * 2, value[:1], dict(enumerate(map(str, value)))))
        elif change == 6 and isinstance(value, dict):
            container[key] = chance.choice((list(value.items()), list(value), dict(list(value.items())[::-1])))
        else:
            container[key] = copy.deepcopy(chance.choice(LEAVES))
    return holder[0]


def _places(container: Any) -> Any:
    """(container, key) of every value inside, depth first."""
    for key in list(container) if isinstance(container, dict) else range(len(container)):
        yield container, key
        if isinstance(container[key], (dict, list)):
            yield from _places(container[key])


def damaged(data: bytes, seed: int) -> bytes:
    """One to three changes of bytes: flipped, cut out, doubled, moved, overwritten, or something foreign put in."""
    chance = random.Random(seed)
    for _ in range(chance.choice((1, 1, 2, 3))):
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + chance.choice((1, 1, 2, 8, 64, 1024)))
        piece = data[start:end]
        change = chance.randrange(7)
        if change == 0 and piece:
            data = data[:start] + bytes([piece[0] ^ (1 << chance.randrange(8))]) + data[start + 1 :]
        elif change == 1:
            data = data[:start] + data[end:]
        elif change == 2:
            data = data[:start] + piece * 2 + data[end:]
        elif change == 3:
            at = chance.randrange(len(data) + 1)
            data = data[:at] + piece + data[at:]
        elif change == 4:
            data = data[:start]
        elif change == 5:
            data = data[:start] + chance.choice(RAW) + data[start:]
        else:
            data = data[:start] + chance.choice(RAW) + data[end:]
    return data
