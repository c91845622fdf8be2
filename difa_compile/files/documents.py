"""The JSON files of this package: one frame with a version and a digest, and one way of reading what is not trusted.

```
{"schema_version": 1, "digest": "<SHA-256 of all but the digest, as canonical JSON>", ...}
```

Canonical JSON: sorted keys, no spaces, ASCII, floats in Python's shortest form, no NaN or infinity.

A reader takes a file of any content: only plain files of limited size are opened, numbers and nesting are limited, and
whatever goes wrong becomes an error of the format's classes that names the file and the remedy (:class:`Format`). The
fields are then read one by one, each with a reader of its type (:func:`as_text`, :func:`as_number`, ...), and no key is
left over.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Never

from difa_compile.errors import DifaError
from difa_compile.files.writing import kind_of
from difa_compile.wording import quoted, shown

MOST_CONTAINERS = 12_000_000
"""Objects and lists of a document: 1000 steps x 1000 sites with ten trials each have so many."""
MOST_VALUES = 64_000_000
"""Members of all of them together."""
MOST_DIGITS = 60
"""Characters of a whole number. Python takes forever over millions of digits, and refuses some thousand."""
MOST_CHARACTERS = 400
"""Characters of any other number."""
_BLOCK = 2**20


class Unfit(ValueError):
    """A value in a document that its reader does not take; the message says where it stands, and what it must be."""


@dataclass(frozen=True)
class Format:
    """A kind of file: its name in messages, its version, and the errors its readers raise, each with a remedy.

    ``damaged``: for what cannot be read, is no such file or lacks something; ``other_version`` and ``edited`` are
    subclasses of it, or itself. ``most_bytes``: larger files are not opened.
    """

    name: str
    version_key: str
    version: int
    keys: tuple[str, ...]
    """Those of the outermost object, beside version and digest."""
    most_bytes: int
    damaged: type[DifaError]
    other_version: type[DifaError]
    edited: type[DifaError]
    where_from: str
    """What to name where a file cannot be read."""
    again: str
    """How to make another one."""
    edit: str = ""
    """How to change what it holds, where that can be wanted."""
    optional: tuple[str, ...] = ()
    """Further keys of the outermost object, which files from before them do not have."""

    @property
    def remedy(self) -> str:
        """Against damage."""
        return f"restore the file, or {self.again}"

    # --- writing -----------------------------------------------------------------------------------------------------

    def digest(self, content: Mapping[str, object]) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits. The version enters it, the digest itself does not."""
        return hashlib.sha256(canonical({self.version_key: self.version, **content}).encode("ascii")).hexdigest()

    def frame(self, content: Mapping[str, object]) -> dict[str, object]:
        """The whole document: version, digest, content."""
        return {self.version_key: self.version, "digest": self.digest(content), **content}

    # --- reading -----------------------------------------------------------------------------------------------------

    @contextmanager
    def reading(self, where: object, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Around the reading of ``where``: all that a file can bring about becomes :attr:`damaged`.

        This is the one place where errors of Python's readers, and those of the parts that are read, are turned into
        the error of a file. ``also``: what else the reader of a binary format raises.
        """
        name = f"the {self.name} {shown(where)}"
        try:
            yield
        except MemoryError as error:
            raise self.damaged(f"{name} does not fit into memory; {self.remedy}") from error
        except json.JSONDecodeError as error:
            raise self.damaged(
                f"{name} is not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}): the file is "
                f"damaged or was cut off; {self.remedy}"
            ) from error
        except UnicodeDecodeError as error:
            raise self.damaged(
                f"{name} is not a {self.name}: it is not text ({error.reason}, byte {error.start}); {self.remedy}"
            ) from error
        except RecursionError as error:
            raise self.damaged(f"{name} is not a {self.name}: it is nested too deeply; {self.remedy}") from error
        except OSError as error:
            reason = shown(error.strerror or error)
            raise self.damaged(f"{name} cannot be read: {reason}; {self.where_from}") from error
        except also as error:
            raise self.damaged(f"{name} is damaged ({shown(error)}); {self.remedy}") from error
        except (ValueError, ArithmeticError) as error:
            raise self.damaged(f"{name} cannot be used: {shown(error, 600)}; {self.remedy}") from error

    def read_bytes(self, path: str | Path) -> bytes:
        """The content of a file."""
        with self.reading(path), open_plain(path, self.most_bytes) as file:
            return read_at_most(file, self.most_bytes)

    def parse(self, data: bytes | str, where: object) -> dict[str, Any]:
        """The outermost object of a document; ``where`` names it in messages.

        Checked here: that it is JSON, of this version, with the keys of this format. The digest is not: see
        :meth:`check_digest`.
        """
        with self.reading(where):
            document = parse_json(data)
        if isinstance(document, dict) and self.version_key in document:
            version = document[self.version_key]
            if type(version) is not int or version != self.version:
                raise self.other_version(
                    f"the {self.name} {shown(where)} has {self.version_key.replace('_', ' ')} {quoted(version)}, but "
                    f"this release reads version {self.version}; use the release that wrote it, or {self.again}"
                )
        with self.reading(where):
            fields = as_object(document, "", (self.version_key, "digest", *self.keys), self.optional)
            as_text(fields["digest"], "digest")
        return fields

    def check_digest(self, fields: Mapping[str, Any], content: Mapping[str, object], where: object) -> None:
        """Raise :attr:`edited` unless ``content``, as it was read, has the digest that stands in ``fields``."""
        with self.reading(where):
            found = self.digest(content)
        if fields["digest"] != found:
            raise self.edited(
                f"the {self.name} {shown(where)} was changed after it was written: its digest is "
                f"{shown(fields['digest'][:12])}, its content has {found[:12]}; {self.remedy}{self.edit and '; '}"
                f"{self.edit}"
            )


ARCHIVE_ERRORS: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    EOFError,
    LookupError,
    NotImplementedError,  # a way of compressing that Python does not know
    RuntimeError,  # an encrypted member
)
"""What reading a damaged archive raises, beside what any reading raises."""


def canonical(value: object) -> str:
    """Canonical JSON. Raises ``ValueError`` for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


# --- files -----------------------------------------------------------------------------------------------------------


def open_plain(path: str | Path, most_bytes: int) -> BinaryIO:
    """Open a plain file of at most ``most_bytes`` for reading; the caller closes it.

    A pipe or device could keep its reader waiting for ever, or never end: what was opened is looked at, not what stands
    under the name before or after. Raises ``OSError``, and ``ValueError`` for names no file can have.
    """
    waiting = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, os.O_RDONLY | waiting)
    try:
        state = os.fstat(descriptor)
        found = kind_of(state.st_mode)
        if found is not None:
            instead = "; save what comes out of it to a file, and name that" if found == "a pipe" else ""
            raise OSError(None, f"it is {found}{instead}")
        if state.st_size > most_bytes:
            raise _too_large(most_bytes)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_at_most(file: BinaryIO, most_bytes: int) -> bytes:
    """All that is left in ``file``. Raises ``OSError`` if that is more than ``most_bytes``."""
    blocks = []
    left = most_bytes
    while block := file.read(_BLOCK):
        left -= len(block)
        if left < 0:
            raise _too_large(most_bytes)
        blocks.append(block)
    return b"".join(blocks)


def _too_large(most_bytes: int) -> OSError:
    return OSError(None, f"it is larger than {most_bytes // 2**20} MiB, more than such a file can need")


def parse_json(data: bytes | str) -> Any:
    """JSON with no key twice in an object, no NaN, no infinity, and limits on numbers, nesting and members.

    Raises ``ValueError`` and ``RecursionError``.
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    del data
    # Counted before anything is built of it: a few bytes of text can become a hundred times as much memory.
    if text.count("[") + text.count("{") > MOST_CONTAINERS or text.count(",") > MOST_VALUES:
        raise Unfit(f"it has more than {MOST_CONTAINERS} lists and objects, or {MOST_VALUES} values")
    return json.loads(
        text,
        parse_constant=_no_constant,
        parse_int=_whole_number,
        parse_float=_real_number,
        object_pairs_hook=_no_duplicates,
    )


def _no_constant(name: str) -> Never:
    raise Unfit(f"it holds {name}, which is not a number that JSON knows; every number must be finite")


def _whole_number(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise Unfit(f"it holds a whole number of {len(text)} characters")
    return int(text)


def _real_number(text: str) -> float:
    value = float(text) if len(text) <= MOST_CHARACTERS else math.inf
    if not math.isfinite(value):
        raise Unfit(f"it holds {shown(text, 40)}; every number must be finite, and of {MOST_CHARACTERS} characters")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Unfit(f"the key {quoted(twice, 60)} stands twice in one object")
    return found


# --- fields ----------------------------------------------------------------------------------------------------------
# Each raises :class:`Unfit` for a value that is not of its type. ``where`` says where it stands: ``rows[3][0].trials``.


def as_object(value: object, where: str, keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """An object with exactly these keys, those of ``optional`` or not."""
    place = where or "the file"
    if not isinstance(value, dict):
        raise Unfit(f"{place} is {kind(value)}; it must be an object with the keys {', '.join(keys)}")
    if len(value) == len(keys) and value.keys() == set(keys):
        return value
    missing = [key for key in keys if key not in value]
    unknown = [key for key in value if key not in keys and key not in optional]
    if missing or unknown:
        parts = [f"without the key {key!r}" for key in missing]
        parts += [f"with the unknown key {quoted(key, 60)}" for key in unknown[:3]]
        if len(unknown) > 3:
            parts.append(f"{len(unknown) - 3} more")
        raise Unfit(f"{place} is {', '.join(parts)}; known keys are {', '.join((*keys, *optional))}")
    return value


def as_mapping(value: object, where: str) -> dict[str, Any]:
    """An object with any keys."""
    if not isinstance(value, dict):
        raise Unfit(f"{where} is {kind(value)}; it must be an object")
    for key in value:
        as_text(key, f"a key of {where}")
    return value


def as_list(value: object, where: str, at_least: int = 0) -> list[Any]:
    if not isinstance(value, list):
        raise Unfit(f"{where} is {kind(value)}; it must be a list")
    if len(value) < at_least:
        raise Unfit(f"{where} has {len(value)} entries; it must have at least {at_least}")
    return value


def as_text(value: object, where: str) -> str:
    """A string that can be written: without lone surrogates, which JSON can spell and UTF-8 cannot."""
    if not isinstance(value, str):
        raise Unfit(f"{where} is {kind(value)}; it must be a string")
    if not value.isascii() and (found := _SURROGATE.search(value)):
        raise Unfit(f"{where} holds half a character ({found[0]!r}, alone), which cannot be written")
    return value


_SURROGATE = re.compile("[\ud800-\udfff]")


def as_whole(value: object, where: str, at_least: int | None = None) -> int:
    if type(value) is not int:
        raise Unfit(f"{where} is {kind(value)}; it must be a whole number")
    if at_least is not None and value < at_least:
        raise Unfit(f"{where} is {shown(value)}; it must be at least {at_least}")
    return value


def as_number(value: object, where: str, above: float | None = None) -> float:
    """A finite number, as a float; ``above``: greater than this."""
    if type(value) is not float:
        if type(value) is not int:
            raise Unfit(f"{where} is {kind(value)}; it must be a number")
        if abs(value) >= 2**1000:
            raise Unfit(f"{where} is {shown(value)}; it must fit into a floating-point number")
        value = float(value)
    if not math.isfinite(value):
        raise Unfit(f"{where} is {value}; it must be finite")
    if above is not None and not value > above:
        raise Unfit(f"{where} is {value}; it must be above {above:g}")
    return value


def kind(value: object) -> str:
    """What a JSON value is, in words."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        type(None): "null",
        int: "a whole number",
    }
    return names.get(type(value), "a number")
