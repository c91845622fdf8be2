"""One file for the weights of all engines, in the safetensors format.

A tensor stands in it once, however many names it has and engines read it: equal bytes of equal dtype are one tensor.
Tensors begin at multiples of 64 bytes, as the widest vectors read them, and the file is mapped into memory by whoever
runs engines, so all of them share one copy. Other tools read it too: what fills the gaps are tensors called
``__fill.<n>``.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from difa_compile.errors import BundleError, BundleFormatError
from difa_compile.files.documents import (
    Unfit,
    as_list,
    as_mapping,
    as_object,
    as_text,
    as_whole,
    open_plain,
    parse_json,
)
from difa_compile.files.writing import open_whole
from difa_compile.wording import shown

ALIGNMENT = 64
"""Bytes."""
MOST_HEADER = 100_000_000
"""Bytes of a header, as safetensors limits it."""
FILL = "__fill."
TABLE = "table."
"""How names of tensors begin that are no weights of the model, but belong to an engine's program."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAMES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie in the file: ``offset`` from its beginning, and ``length``; their dtype and shape."""

    offset: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Place]:
    """Write ``tensors``, each of equal ones once, and say where they lie. The same tensors give the same file.

    They are asked for twice, one after the other, and not kept: a mapping may make them as they are wanted.

    Raises :class:`OutputError`, and :class:`BundleError` for a dtype that the format does not have.
    """
    own: dict[tuple[str, torch.dtype, tuple[int, ...]], str] = {}
    aliases: dict[str, str] = {}
    kept: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if tensor.dtype not in DTYPES:
            raise BundleError(f"tensor {shown(name)} is of {tensor.dtype}, which a file of weights cannot hold")
        key = (hashlib.sha256(bytes_of(tensor)).hexdigest(), tensor.dtype, tuple(tensor.shape))
        if key in own:
            aliases[name] = own[key]
        else:
            own[key], kept[name] = name, (tensor.dtype, tuple(tensor.shape))
    header: dict[str, object] = {"__metadata__": {"aliases": json.dumps(aliases, sort_keys=True)}}
    end = 0
    relative: dict[str, tuple[int, int]] = {}
    for number, (name, (dtype, shape)) in enumerate(kept.items()):
        length = math.prod(shape) * dtype.itemsize
        if gap := -end % ALIGNMENT:
            header[f"{FILL}{number}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
            end += gap
        relative[name] = (end, end + length)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    start = 8 + len(text)
    with open_whole(path, "the weights") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (first, _) in relative.items():
            file.write(b"\0" * (start + first - file.tell()))
            file.write(bytes_of(tensors[name]))
    places = {name: Place(start + first, last - first, *kept[name]) for name, (first, last) in relative.items()}
    return places | {name: places[stored] for name, stored in aliases.items()}


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major; copied only where they do not lie so in this machine's memory."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


class WeightFile:
    """A file of weights, mapped into memory: nothing is read before it is used, and all that map it share its pages.

    ``places``: of all names. Raises :class:`BundleFormatError` for what is no such file, or a damaged one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._tensors: dict[str, Tensor] = {}
        self._copies: dict[tuple[Place, torch.device], Tensor] = {}
        try:
            with open_plain(path, 2**62) as file:
                size = os.fstat(file.fileno()).st_size
                self.places = read_places(file.read(8), lambda length: read_exactly(file, length), size)
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (ValueError, OSError, RecursionError) as error:
            raise BundleFormatError(
                f"the weights {shown(path)} cannot be used: {shown(error, 300)}; restore the file, or export again"
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        """A tensor by name, as a view of the file: what is written into it stays in this process."""
        if name not in self._tensors:
            place = self.places[name]
            if place.length:
                flat = torch.frombuffer(
                    self._mapped, dtype=place.dtype, count=place.length // place.dtype.itemsize, offset=place.offset
                )
                self._tensors[name] = flat.view(place.shape)
            else:
                self._tensors[name] = torch.empty(place.shape, dtype=place.dtype)
        return self._tensors[name]

    def on(self, name: str, device: torch.device) -> Tensor:
        """A tensor's copy on a device, made once: all who ask share it, under whichever of its names."""
        key = (self.places[name], device)
        if key not in self._copies:
            self._copies[key] = self[name].to(device)
        return self._copies[key]

    def __contains__(self, name: object) -> bool:
        return name in self.places


def read_exactly(file: BinaryIO, length: int) -> bytes:
    """Exactly ``length`` bytes. Raises :class:`Unfit`."""
    found = file.read(length)
    if len(found) != length:
        raise Unfit("it was cut off within its header")
    return found


def read_places(first: bytes, read: Callable[[int], bytes], size: int) -> dict[str, Place]:
    """Where the tensors of a file of ``size`` bytes lie: ``first`` are its first 8 bytes, ``read`` gives those after.

    Every byte behind the header belongs to one tensor, as the format wants it. Raises ``ValueError``.
    """
    if len(first) < 8:
        raise Unfit("it is shorter than any file of weights")
    (length,) = struct.unpack("<Q", first)
    if length > min(MOST_HEADER, size - 8):
        raise Unfit(f"its header is said to be {length} bytes long, and the file has {size}")
    header = dict(as_mapping(parse_json(read(length)), "the header"))
    start = 8 + length
    metadata = header.pop("__metadata__", {})
    places: dict[str, Place] = {}
    spans = []
    for name, entry in header.items():
        place, span = _read_place(as_text(name, "a name"), entry, start)
        spans.append(span)
        if not name.startswith(FILL):
            places[name] = place
    end = 0
    for first_byte, last in sorted(spans):
        if first_byte != end:
            raise Unfit(f"its tensors overlap, or leave a gap, at byte {first_byte}")
        end = last
    if start + end != size:
        raise Unfit(f"it has {size} bytes, and its header tells of {start + end}")
    return places | _read_aliases(metadata, places)


def _read_place(name: str, entry: object, start: int) -> tuple[Place, tuple[int, int]]:
    fields = as_object(entry, name, ("dtype", "shape", "data_offsets"))
    dtype = as_text(fields["dtype"], f"{name}.dtype")
    if dtype not in _NAMES:
        raise Unfit(f"{name} is of {shown(dtype)}; known are {', '.join(_NAMES)}")
    shape = tuple(as_whole(size, f"{name}.shape", 0) for size in as_list(fields["shape"], f"{name}.shape"))
    offsets = as_list(fields["data_offsets"], f"{name}.data_offsets")
    if len(offsets) != 2:
        raise Unfit(f"{name}.data_offsets has {len(offsets)} entries; it must have two")
    first, last = (as_whole(offset, f"{name}.data_offsets", 0) for offset in offsets)
    if last - first != math.prod(shape) * _NAMES[dtype].itemsize:
        raise Unfit(f"{name} has {last - first} bytes, which its shape and dtype do not make")
    if (start + first) % _NAMES[dtype].itemsize:
        raise Unfit(f"{name} begins at byte {start + first}, where no number of its dtype can")
    return Place(start + first, last - first, _NAMES[dtype], shape), (first, last)


def _read_aliases(metadata: object, places: Mapping[str, Place]) -> dict[str, Place]:
    text = as_mapping(metadata, "__metadata__").get("aliases", "{}")
    found = as_mapping(parse_json(as_text(text, "__metadata__.aliases")), "aliases")
    for name, stored in found.items():
        if name in places or as_text(stored, f"aliases.{name}") not in places:
            raise Unfit(f"the alias {shown(name)} stands for {shown(stored)}, which is no tensor of its own")
    return {name: places[stored] for name, stored in found.items()}
