"""What a calibration has found so far, on disk after every step, so that a kill costs one step at most.

A state belongs to one calibration: model (class, config and weights), scheduler, inputs, settings. It is refused for
any other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from difa_compile.decision import Decision
from difa_compile.errors import CalibrationStateError, DecisionError, OutputError, PlanFormatError
from difa_compile.plan import Cell, Trial

STATE_VERSION = 2
SAMPLES = 256
"""Values per parameter that enter the fingerprint of the weights."""


@dataclass
class CalibrationState:
    """``rows[step]``: the cells decided so far. ``identity``: digests by what they cover. Saved at ``path``."""

    path: Path
    identity: Mapping[str, str]
    rows: list[tuple[Cell, ...]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, identity: Mapping[str, str]) -> CalibrationState:
        """The state saved at ``path``, or an empty one.

        Raises :class:`CalibrationStateError` if the file is damaged or belongs to another calibration, and
        :class:`OutputError` if its folder cannot be written, so that this shows before the work is done.
        """
        state = cls(path, dict(identity))
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            state.save()
            return state
        except OSError as error:
            raise OutputError(f"{path}: the calibration state cannot be read ({error}); choose another file") from error
        try:
            content = json.loads(text)
            version, saved = content["state_version"], dict(content["identity"])
            written = content["rows"] if version == STATE_VERSION else []
            rows = [tuple(_read_cell(cell) for cell in row) for row in written]
        except (ValueError, KeyError, TypeError, DecisionError, PlanFormatError) as error:
            raise CalibrationStateError(
                f"{path} is not a calibration state, or is damaged ({error}); delete it to start from the beginning"
            ) from error
        if version != STATE_VERSION:
            raise CalibrationStateError(
                f"{path} has state version {version}, this release reads {STATE_VERSION}; delete it to start from the "
                "beginning"
            )
        differing = [name for name in dict.fromkeys([*identity, *saved]) if identity.get(name) != saved.get(name)]
        if differing:
            raise CalibrationStateError(
                f"{path} belongs to another calibration: {', '.join(differing)} differ; delete it to start from the "
                "beginning, or name another file"
            )
        state.rows = rows
        state.save()
        return state

    def save(self) -> None:
        """Write the file, whole or not at all. Raises :class:`OutputError`."""
        content = {
            "state_version": STATE_VERSION,
            "identity": dict(self.identity),
            "rows": [[_write_cell(cell) for cell in row] for row in self.rows],
        }
        fresh = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
            os.replace(fresh, self.path)
        except OSError as error:
            raise OutputError(
                f"{self.path}: the calibration state cannot be written ({error}); name a file in a folder you can write"
            ) from error
        finally:
            fresh.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the file: the calibration is complete."""
        self.path.unlink(missing_ok=True)


def default_path(identity: Mapping[str, str]) -> Path:
    """A file for this calibration in the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``)."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = _sha256(json.dumps(dict(identity), sort_keys=True))[:24]
    return root / "difa-compile" / "calibration" / f"{name}.json"


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


def _write_cell(cell: Cell) -> dict[str, Any]:
    return {
        "decision": str(cell.decision),
        "flops_saved": cell.flops_saved,
        "trials": [[str(t.decision), t.loss, t.threshold, t.reason, t.cost] for t in cell.trials],
    }


def _read_cell(content: Mapping[str, Any]) -> Cell:
    trials: Sequence[Sequence[Any]] = content["trials"]
    return Cell(
        Decision.parse(content["decision"]),
        tuple(Trial(Decision.parse(decision), *rest) for decision, *rest in trials),
        content["flops_saved"],
    )
