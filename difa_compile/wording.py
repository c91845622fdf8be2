"""Foreign text in messages: file names, file contents and arguments, made printable and kept short."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

LIMIT = 200
"""Characters of foreign text in a message, unless told otherwise."""

_ITEMS = 8  # of a container, before the rest is left out
_DEPTH = 3  # of nested containers
_BRACKETS: dict[type, tuple[str, str]] = {list: ("[", "]"), tuple: ("(", ")"), set: ("{", "}"), frozenset: ("{", "}")}
_BITS = 512  # of a whole number that is still written out; Python refuses to write numbers of 4300 digits


def shown(value: object, limit: int = LIMIT) -> str:
    """``value`` for a message: on one line, printable, encodable, and at most ``limit`` (4 or more) characters.

    Text, paths and errors stand as they are, without quotation marks; anything else as Python writes it, text inside
    containers quoted. Control characters, line breaks, lone surrogates and marks of direction are escaped; what is too
    long is cut in the middle, where an ellipsis stands. Takes time in proportion to ``limit``, not to the value.
    """
    if isinstance(value, str):
        return _cut(value, limit)
    if isinstance(value, os.PathLike):
        return _cut(os.fsdecode(value), limit)
    if isinstance(value, BaseException):
        return _cut(_said(value) or type(value).__name__, limit)
    return _cut(_text(value, limit, _DEPTH), limit)


def quoted(value: object, limit: int = LIMIT) -> str:
    """As :func:`shown`, with text, paths and errors in quotation marks (and four characters at least)."""
    if isinstance(value, (str, os.PathLike, BaseException)):
        return f"'{shown(value, max(4, limit - 2))}'"
    return shown(value, limit)


def _text(value: object, limit: int, depth: int) -> str:
    """``value`` as Python writes it, with no more work than ``limit`` characters need."""
    if isinstance(value, str):
        return repr(_around(value, limit))
    if isinstance(value, (bytes, bytearray)):
        return repr(bytes(value[:limit])) + ("…" if len(value) > limit else "")
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > _BITS:
        return f"{'-' if value < 0 else ''}a whole number of {value.bit_length()} bits"
    if type(value) is dict:
        return _listed("{", "}", _pairs(value, limit, depth), len(value), depth)
    if isinstance(value, (list, tuple, set, frozenset)) and type(value) in _BRACKETS:
        start, end = _BRACKETS[type(value)]
        return _listed(start, end, (_text(item, limit, depth - 1) for item in value), len(value), depth)
    try:
        return repr(value)
    except Exception:  # a message about a value must not fail because of the value
        return f"<{type(value).__name__}>"


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return ""


def _pairs(value: Mapping[object, object], limit: int, depth: int) -> Iterator[str]:
    for key, item in value.items():
        yield f"{_text(key, limit, depth - 1)}: {_text(item, limit, depth - 1)}"


def _listed(start: str, end: str, items: Iterator[str], count: int, depth: int) -> str:
    if count and not depth:
        return f"{start}…{end}"
    few = [item for item, _ in zip(items, range(_ITEMS), strict=False)]
    alone = "," if start == "(" and count == 1 else ""
    return start + ", ".join(few + (["…"] if count > len(few) else [])) + alone + end


def _around(text: str, limit: int) -> str:
    """``text``, or its two ends with an ellipsis between where it is much longer than ``limit``."""
    return text if len(text) <= 2 * limit else f"{text[:limit]}…{text[-limit:]}"


def _cut(text: str, limit: int) -> str:
    pieces = [_escaped(character) for character in _around(text, limit)]
    if len(pieces) <= limit and sum(map(len, pieces)) <= limit:
        return "".join(pieces)
    tail = (limit - 1) // 3
    return _fitting(pieces, limit - 1 - tail) + "…" + _fitting(pieces[::-1], tail, backwards=True)


def _fitting(pieces: list[str], room: int, backwards: bool = False) -> str:
    taken: list[str] = []
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            break
        taken.append(piece)
    return "".join(reversed(taken) if backwards else taken)


def _escaped(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]


def visible(text: str) -> str:
    """``text`` of ours that may have foreign text inside, for a terminal or a page: what would steer it is escaped.

    Line breaks, tabs and hard spaces stay, for our own texts have them; nothing is cut.
    """
    if text.isprintable():  # at once, for the pictures of a page are long
        return text
    return "".join(character if character in "\n\t\u00a0" else _escaped(character) for character in text)
