"""What a calibration has found so far, on disk after every step, so that a kill costs one step at most.

A state belongs to one calibration: model (class, config and weights), scheduler, inputs, settings. It is refused for
any other. Its frame, its digest and what guards its reading are those of plans (:mod:`documents`), as are its cells.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn

from difa_compile.errors import CalibrationStateError
from difa_compile.files.cache_folder import cache_folder
from difa_compile.files.documents import Format, as_mapping, as_text
from difa_compile.files.writing import check_target, write_whole
from difa_compile.plan.json_form import MOST_BYTES, cell_json, read_rows
from difa_compile.plan.plan import Cell
from difa_compile.wording import shown

STATE_VERSION = 3
SAMPLES = 256
"""Values per parameter that enter the fingerprint of the weights."""

STATE = Format(
    name="calibration state",
    version_key="state_version",
    version=STATE_VERSION,
    keys=("identity", "rows"),
    most_bytes=MOST_BYTES,
    damaged=CalibrationStateError,
    other_version=CalibrationStateError,
    edited=CalibrationStateError,
    where_from="name another file",
    again="delete it to start from the beginning",
)

Stamp = tuple[int, int, int]
"""Of a file: inode, size, time of its last change in nanoseconds. Every write makes another one."""


@dataclass
class CalibrationState:
    """``rows[step]``: the cells decided so far. ``identity``: digests by what they cover. Saved at ``path``.

    There is no file before the first row. Several calibrations may come upon the same file. Equal ones share it: it
    holds whichever has come further. A calibration stops before it writes over the rows of another one.
    """

    path: Path
    identity: Mapping[str, str]
    rows: list[tuple[Cell, ...]] = field(default_factory=list)
    _seen: Stamp | None = None
    """The file as this calibration last read or wrote it."""

    @classmethod
    def open(cls, path: Path, identity: Mapping[str, str]) -> CalibrationState:
        """The state saved at ``path``, or an empty one.

        Raises :class:`CalibrationStateError` if the file is damaged or holds rows of another calibration, and
        :class:`OutputError` if it could not be written, so that this shows before the work is done. Leaves the file as
        it is, and none where there was none.
        """
        state = cls(path, dict(identity))
        seen = _stamp(path)
        if seen is not None:
            saved = cls._read(path)
            if saved.rows:
                state._check_identity(saved)
                state.rows = saved.rows
            state._seen = seen
        check_target(path, "the calibration state")
        return state

    def save(self) -> None:
        """Write the file, whole or not at all.

        Raises :class:`OutputError`, and :class:`CalibrationStateError` if another calibration has begun to use it.
        """
        seen = _stamp(self.path)
        if seen not in (None, self._seen):
            other = self._read(self.path)
            if other.rows:
                self._check_identity(other)
            if len(other.rows) >= len(self.rows):
                self._seen = seen
                return
        content = {
            "identity": dict(self.identity),
            "rows": [[cell_json(cell) for cell in row] for row in self.rows],
        }
        write_whole(self.path, json.dumps(STATE.frame(content), allow_nan=False) + "\n", "the calibration state")
        self._seen = _stamp(self.path)

    def remove(self) -> None:
        """The calibration is complete: delete the file, unless another calibration uses it by now."""
        if self._seen is None or _stamp(self.path) != self._seen:
            return
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:  # the plan is found, and must not be lost for this
            warnings.warn(f"{shown(self.path)} is done with but cannot be deleted: {shown(error)}", stacklevel=2)

    @classmethod
    def _read(cls, path: Path) -> CalibrationState:
        fields = STATE.parse(STATE.read_bytes(path), path)
        with STATE.reading(path):
            identity = {
                name: as_text(value, f"identity.{name}")
                for name, value in as_mapping(fields["identity"], "identity").items()
            }
            rows = list(read_rows(fields["rows"], "rows"))
        STATE.check_digest(
            fields, {"identity": identity, "rows": [[cell_json(cell) for cell in row] for row in rows]}, path
        )
        return cls(path, identity, rows)

    def _check_identity(self, saved: CalibrationState) -> None:
        """Raise :class:`CalibrationStateError` if ``saved``, from the same file, belongs to another calibration."""
        names = dict.fromkeys([*self.identity, *saved.identity])
        differing = [shown(name, 60) for name in names if self.identity.get(name) != saved.identity.get(name)]
        if differing:
            raise CalibrationStateError(
                f"{shown(self.path)} belongs to another calibration: {shown(', '.join(differing))} differ; delete it "
                "to start from the beginning, or name another file"
            )


def _stamp(path: Path) -> Stamp | None:
    """None if there is no such file, or none can be seen: opening it says why."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):  # the latter is said when the file is to be written
        return None
    except (OSError, ValueError):
        return (0, 0, 0)
    return found.st_ino, found.st_size, found.st_mtime_ns


def default_path(identity: Mapping[str, str]) -> Path:
    """A file for this calibration in the package's cache folder."""
    name = _sha256(json.dumps(dict(identity), sort_keys=True))[:24]
    return cache_folder() / "calibration" / f"{name}.json"


def digest_of(value: object) -> str:
    """SHA-256 of a value by its content: numbers, text, containers, tensors, arrays, images, random generators.

    Functions count by their name. Raises :class:`CalibrationStateError` for anything else, whose content cannot be
    told.
    """
    running = hashlib.sha256()
    _feed(value, running.update, "the value")
    return running.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Fingerprint of the weights: shape, dtype and up to 256 evenly spaced values of every parameter and buffer."""
    running = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES]
        running.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        running.update(_bytes_of(picked))
    return running.hexdigest()


def generators_in(value: object) -> list[torch.Generator]:
    """Random generators inside ``value``, in order."""
    if isinstance(value, torch.Generator):
        return [value]
    if isinstance(value, Mapping):
        return [found for item in value.values() for found in generators_in(item)]
    if isinstance(value, (list, tuple)):
        return [found for item in value for found in generators_in(item)]
    return []


def _feed(value: object, update: Callable[[bytes], object], where: str) -> None:
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        update(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, Tensor):
        update(f"tensor {tuple(value.shape)} {value.dtype};".encode())
        update(_bytes_of(value.detach()))
    elif isinstance(value, torch.Generator):
        update(f"generator {value.device.type};".encode())
        update(_bytes_of(value.get_state()))
    elif isinstance(value, Mapping):
        update(f"mapping {len(value)};".encode())
        for key in sorted(value, key=str):
            _feed(str(key), update, where)
            _feed(value[key], update, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        update(f"list {len(value)};".encode())
        for index, item in enumerate(value):
            _feed(item, update, f"{where}[{index}]")
    elif isinstance(value, (FunctionType, MethodType, type)):
        update(f"callable {value.__module__}.{value.__qualname__};".encode())
    elif callable(getattr(value, "tobytes", None)):  # NumPy arrays and PIL images
        shape = getattr(value, "shape", None) or getattr(value, "size", None)
        update(f"{type(value).__name__} {shape} {getattr(value, 'dtype', getattr(value, 'mode', ''))};".encode())
        update(value.tobytes())  # type: ignore[attr-defined]
    else:
        raise CalibrationStateError(
            f"{where} is a {type(value).__name__}, whose content cannot be compared with that of an earlier "
            "calibration; leave it out, or pass tensors, arrays, images, text or numbers"
        )


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).contiguous().cpu().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
