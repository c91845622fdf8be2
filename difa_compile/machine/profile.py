"""What attention costs on a machine: seconds predicted from a few measurements, which ``difa tune`` makes and keeps.

Per dtype there is one *fit* for each operation: ``full`` (dense attention through SDPA), ``local X`` (local attention
through kernel X), ``linear`` (a projection) and ``elementwise`` (a pass over activations: adding a residual, copying).
A fit is a price per unit of each kind of work, none negative; an operation takes the sum of amounts times prices. Work
is counted as it is carried out, not as it is wanted: pairs of queries and keys inside the tiles of the kernel, for
instance, also those that the window hides.

A profile holds for one machine: processor or GPU, number of threads, torch, the kernels' sources. It is looked up under
a name made of these, so on another machine, or after an update, there is none until ``difa tune`` runs again, and
nothing is predicted. ``DIFA_PROFILE`` names another file, or is ``off``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import platform
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from difa_compile.errors import LayoutError, OutputError, ProfileError
from difa_compile.files.cache_folder import cache_folder
from difa_compile.files.documents import Format, Unfit, as_list, as_mapping, as_number, as_object, as_text, as_whole
from difa_compile.files.writing import write_whole
from difa_compile.ops.kernels import KERNEL_MODULES, LocalCall, LocalKernel, choose_kernel
from difa_compile.ops.pairs import visible_pairs
from difa_compile.wording import quoted, shown

PROFILE_VERSION = 2
PROFILE = Format(
    name="machine profile",
    version_key="profile_version",
    version=PROFILE_VERSION,
    keys=("machine", "date", "fits"),
    most_bytes=2**25,
    damaged=ProfileError,
    other_version=ProfileError,
    edited=ProfileError,
    where_from="name a file written by difa tune",
    again="run difa tune again",
)
DEVICES = ("cpu", "cuda")
Work = Mapping[str, float]
"""Amounts of work by kind; the kinds of an operation are the keys of its fit's prices."""

FULL_ATTENTION = "full"
LINEAR = "linear"
ELEMENTWISE = "elementwise"


def local(kernel: LocalKernel) -> str:
    """The operation of local attention through a kernel."""
    return f"local {kernel.name}"


# --- work ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FullCall:
    """Dense attention, without the tensors: queries (batch, heads, queries, head_dim) over ``keys`` keys."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int = 0
    """Channels of a value; 0 stands for head_dim."""
    key_heads: int | None = None
    """Heads of keys and values; None: as many as of queries."""

    @property
    def work(self) -> Work:
        pairs = self.heads * self.queries * self.keys
        return attention_work(self, pairs, (self.key_heads or self.heads) * self.keys)


def local_work(kernel: LocalKernel, call: LocalCall) -> Work:
    """The work of local attention through ``kernel``, which says how many pairs it goes through."""
    batch, heads, queries, head_dim = call.shape
    keys = call.layout.tokens + call.pooled
    if kernel.work is not None:
        pairs, touched = kernel.work(call)
    else:
        pairs, touched = visible_pairs(call.layout, call.window, queries) + queries * call.pooled, keys
    whole = FullCall(batch, heads, queries, keys, head_dim, call.value_dim, call.key_heads)
    return attention_work(whole, heads * pairs, heads * touched)


def attention_work(call: FullCall, pairs: int, touched: int) -> Work:
    """``pairs``: (query, key) pairs of all heads; ``touched``: keys read, counted again for each tile that reads them.

    Both for one element of the batch.
    """
    dims = call.head_dim + (call.value_dim or call.head_dim)
    return {
        "calls": 1.0,
        "multiply_adds": float(call.batch * pairs * dims),
        "pairs": float(call.batch * pairs),
        "queries": float(call.batch * call.heads * call.queries),
        "queries x dims": float(call.batch * call.heads * call.queries * dims),
        "keys x dims": float(call.batch * touched * dims),
    }


def linear_work(rows: int, inputs: int, outputs: int) -> Work:
    """A projection of ``rows`` tokens (of the whole batch) from ``inputs`` to ``outputs`` channels."""
    return {
        "calls": 1.0,
        "multiply_adds": float(rows * inputs * outputs),
        "activations": float(rows * (inputs + outputs)),
        "weights": float(inputs * outputs),
    }


CACHED_BYTES = 2**25
"""Beyond so many bytes a pass over activations is priced by memory, not by caches."""
FRESH_BYTES = 2**25
"""On the CPU a result of so many bytes or more is new memory from the system each time (glibc's largest threshold for
that), whose pages it clears when they are first touched: that takes longer than the pass itself."""


def elementwise_work(elements: int, dtype: torch.dtype, device: torch.device, reads: float) -> Work:
    """A pass that writes one tensor of so many elements and reads ``reads`` times as much."""
    written = elements * dtype.itemsize
    size = written * (1 + reads)
    fresh = written if device.type == "cpu" and written >= FRESH_BYTES else 0
    return {
        "calls": 1.0,
        "bytes": size,
        "bytes beyond caches": max(0.0, size - CACHED_BYTES),
        "fresh bytes": float(fresh),
    }


# --- the machine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What a profile holds for. ``kernels``: digest of the sources of all kernels of local attention."""

    device: str
    name: str
    instructions: str
    threads: int
    torch_version: str
    kernels: str

    @classmethod
    def here(cls, device: torch.device | str) -> Machine:
        """This machine. Raises :class:`ProfileError` for a device that is not there or is of another kind."""
        device = torch.device(device)
        if device.type not in DEVICES:
            raise ProfileError(f"device {device.type} cannot be profiled; choose one of {', '.join(DEVICES)}")
        if device.type == "cpu":
            instructions, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
            return cls("cpu", processor(), instructions, threads, torch.__version__, kernels_digest())
        if not torch.cuda.is_available():
            raise ProfileError("torch sees no CUDA device here; choose --device cpu")
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        return cls("cuda", name, f"sm_{capability[0]}{capability[1]}", 0, torch.__version__, kernels_digest())

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def path(self) -> Path:
        """Where the profile of this machine is kept."""
        return cache_folder() / f"profile-{self.device}-{self.digest[:20]}.json"

    def __str__(self) -> str:
        threads = f", {self.threads} threads" if self.device == "cpu" else ""
        return f"{self.name} ({self.instructions}{threads}), torch {self.torch_version}"


def machine_name(device: torch.device | str) -> str:
    """What works on ``device`` here, in words, for what was timed: as :class:`Machine` says it where there can be a
    profile of it."""
    device = torch.device(device)
    if device.type in DEVICES:
        return str(Machine.here(device))
    return f"{processor()} ({device.type}), torch {torch.__version__}"


def machines_here() -> tuple[str, ...]:
    """The names (:func:`machine_name`) of all that can work here, the processor first."""
    names = [machine_name("cpu")]
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is not None:
        names += [machine_name(f"{found.type}:{i}") for i in range(torch.accelerator.device_count())]
    return tuple(dict.fromkeys(names))


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def kernels_digest() -> str:
    """SHA-256 of the sources of the kernels and of what stands beside them; none is loaded or compiled for it."""
    found = hashlib.sha256()
    folders = set()
    for module in KERNEL_MODULES:
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        folders.add(Path(spec.origin).parent)
    for folder in sorted(folders):
        for file in sorted(file for file in folder.iterdir() if file.is_file()):
            found.update(f"{folder.name}/{file.name}".encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


# --- profiles --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One measurement: what was run, in words; its work; the tokens it had; seconds of a call."""

    case: str
    work: Work
    tokens: int
    seconds: float

    def __post_init__(self) -> None:
        """Work in floating point, as a file gives it back: the digest of 1 is not that of 1.0."""
        object.__setattr__(self, "work", {kind: float(count) for kind, count in self.work.items()})


@dataclass(frozen=True)
class Fit:
    """Prices of one operation in one dtype: seconds per unit of each kind of work.

    ``errors``: relative errors of predictions of each sample by a fit that had not seen it (predicted / measured - 1).
    """

    operation: str
    dtype: str
    prices: Work
    samples: tuple[Sample, ...]
    errors: tuple[float, ...]

    def __post_init__(self) -> None:
        """In floating point, as :class:`Sample`."""
        object.__setattr__(self, "prices", {kind: float(price) for kind, price in self.prices.items()})
        object.__setattr__(self, "errors", tuple(map(float, self.errors)))

    def seconds(self, work: Work) -> float:
        return math.fsum(price * work[kind] for kind, price in self.prices.items())

    @property
    def held_out_error(self) -> float:
        """Median size of :attr:`errors`."""
        return statistics.median(map(abs, self.errors))

    @property
    def most_tokens(self) -> int:
        """Beyond so many tokens a prediction extrapolates."""
        return max(sample.tokens for sample in self.samples)


@dataclass(frozen=True)
class Profile:
    """The fits of one machine; ``date`` in ISO form."""

    machine: Machine
    date: str
    fits: tuple[Fit, ...]

    @cached_property
    def _by_operation(self) -> dict[tuple[str, str], Fit]:
        return {(fit.operation, fit.dtype): fit for fit in self.fits}

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes that were measured."""
        return tuple(getattr(torch, name) for name in dict.fromkeys(fit.dtype for fit in self.fits))

    @property
    def digest(self) -> str:
        """SHA-256 of what predictions depend on and of where they come from."""
        return PROFILE.digest(self._content())

    def fit(self, operation: str, dtype: torch.dtype) -> Fit | None:
        return self._by_operation.get((operation, str(dtype).removeprefix("torch.")))

    def seconds(self, operation: str, dtype: torch.dtype, work: Work) -> float | None:
        """Predicted seconds of an operation; None if it was not measured in this dtype."""
        fit = self.fit(operation, dtype)
        return None if fit is None else fit.seconds(work)

    def full_seconds(self, call: FullCall, dtype: torch.dtype) -> float | None:
        """Predicted seconds of dense attention."""
        return self.seconds(FULL_ATTENTION, dtype, call.work)

    def local_seconds(self, call: LocalCall) -> float | None:
        """Predicted seconds of local attention through the kernel that would serve it.

        None if that kernel was not measured or none serves, and under a mask, which was not measured.
        """
        if call.masked:
            return None
        try:
            kernel = choose_kernel(call)
        except LayoutError:
            return None
        operation = local(kernel)
        if self.fit(operation, call.dtype) is None:
            return None
        return self.seconds(operation, call.dtype, local_work(kernel, call))

    def extrapolates(self, tokens: int, dtype: torch.dtype) -> bool:
        """Whether so many tokens are more than were measured."""
        fit = self.fit(FULL_ATTENTION, dtype)
        return fit is not None and tokens > fit.most_tokens

    def updated(self, other: Profile) -> Profile:
        """This profile with the fits of ``other``, a newer one of the same machine, in place of its own."""
        kept = tuple(fit for fit in self.fits if (fit.operation, fit.dtype) not in other._by_operation)
        return replace(other, fits=(*kept, *other.fits))

    # --- files -------------------------------------------------------------------------------------------------------

    def _content(self) -> dict[str, Any]:
        return {"machine": asdict(self.machine), "date": self.date, "fits": [asdict(fit) for fit in self.fits]}

    def save(self, path: Path | None = None) -> Path:
        """Write the profile, whole or not at all, by default where it is looked up. Raises :class:`OutputError`."""
        path = path if path is not None else place(self.machine)
        if path is None:
            raise OutputError("DIFA_PROFILE is off, so no profile is kept; unset it, or set it to a path")
        text = json.dumps(PROFILE.frame(self._content()), indent=1, allow_nan=False) + "\n"
        write_whole(path, text, "the profile")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile. Raises :class:`ProfileError` if it can't be read, is damaged or of another version."""
        content = PROFILE.parse(PROFILE.read_bytes(path), path)
        with PROFILE.reading(path):
            fits = as_list(content["fits"], "fits")
            profile = cls(
                _read_machine(content["machine"]),
                as_text(content["date"], "date"),
                tuple(_read_fit(fit, f"fits[{index}]") for index, fit in enumerate(fits)),
            )
        PROFILE.check_digest(content, profile._content(), path)
        return profile


def _read_machine(value: object) -> Machine:
    content = as_object(value, "machine", tuple(field.name for field in fields(Machine)))
    texts = {name: as_text(item, f"machine.{name}") for name, item in content.items() if name != "threads"}
    if texts["device"] not in DEVICES:
        raise Unfit(f"machine.device is {quoted(texts['device'])}; it must be one of {', '.join(DEVICES)}")
    return Machine(threads=as_whole(content["threads"], "machine.threads", at_least=0), **texts)


def _read_fit(value: object, where: str) -> Fit:
    content = as_object(value, where, ("operation", "dtype", "prices", "samples", "errors"))
    operation, dtype = as_text(content["operation"], f"{where}.operation"), as_text(content["dtype"], f"{where}.dtype")
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise Unfit(f"{where}.dtype is {quoted(dtype)}, which is no dtype of torch")
    prices = _read_work(content["prices"], f"{where}.prices")
    needed = {"calls", "bytes" if operation == ELEMENTWISE else "multiply_adds"}
    if not needed <= prices.keys() <= _kinds_of(operation):
        raise Unfit(f"{where}.prices are of {shown(sorted(prices))}, which are not the kinds of work of that operation")
    samples = []
    for index, item in enumerate(as_list(content["samples"], f"{where}.samples", at_least=1)):
        place = f"{where}.samples[{index}]"
        sample = as_object(item, place, ("case", "work", "tokens", "seconds"))
        work = _read_work(sample["work"], f"{place}.work")
        if work.keys() != prices.keys():
            raise Unfit(f"{place}.work is of {shown(sorted(work))}, but prices are of {shown(sorted(prices))}")
        samples.append(
            Sample(
                as_text(sample["case"], f"{place}.case"),
                work,
                as_whole(sample["tokens"], f"{place}.tokens", at_least=0),
                as_number(sample["seconds"], f"{place}.seconds", above=0),
            )
        )
    errors = as_list(content["errors"], f"{where}.errors", at_least=1)
    return Fit(operation, dtype, prices, tuple(samples), tuple(as_number(e, f"{where}.errors") for e in errors))


def _read_work(value: object, where: str) -> Work:
    """Amounts or prices, none negative."""
    found = {kind: as_number(amount, f"{where}.{shown(kind, 60)}") for kind, amount in as_mapping(value, where).items()}
    if any(amount < 0 for amount in found.values()):
        raise Unfit(f"{where} holds a negative number")
    return found


def _kinds_of(operation: str) -> set[str]:
    """Kinds of work of an operation: what its prediction will be asked for."""
    if operation == LINEAR:
        return set(linear_work(1, 1, 1))
    if operation == ELEMENTWISE:
        return set(elementwise_work(1, torch.float32, torch.device("cpu"), 1))
    return set(FullCall(1, 1, 1, 1, 1).work)


def told() -> Path | None:
    """The path in ``DIFA_PROFILE``, if it holds one."""
    value = os.environ.get("DIFA_PROFILE", "")
    return Path(value) if value and value != "off" else None


def place(machine: Machine) -> Path | None:
    """Where the profile of ``machine`` is looked up and kept; None if ``DIFA_PROFILE`` is ``off``."""
    if os.environ.get("DIFA_PROFILE") == "off":
        return None
    return told() or machine.path


def current(device: torch.device | str) -> Profile | None:
    """The profile of this machine for ``device``; None if there is none.

    One that is damaged, or that ``DIFA_PROFILE`` names and was made elsewhere, is ignored with a warning.
    """
    if torch.device(device).type not in DEVICES or os.environ.get("DIFA_PROFILE") == "off":
        return None
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        return None
    machine = Machine.here(device)
    path = told() or machine.path
    try:
        profile = Profile.load(path)
        if profile.machine != machine:
            differing = _differing(profile.machine, machine)
            raise ProfileError(f"{shown(path)} was measured elsewhere: {differing}")
    except ProfileError as error:
        if told() is None and isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            return None
        warnings.warn(
            f"{error}. It is ignored: decisions are taken without predicted times. Run difa tune to measure this "
            "machine, or set DIFA_PROFILE=off",
            stacklevel=2,
        )
        return None
    return profile


def _differing(theirs: Machine, ours: Machine) -> str:
    a, b = asdict(theirs), asdict(ours)
    differing = [name for name in a if a[name] != b[name]]
    return "; ".join("other kernels" if n == "kernels" else f"{n} {shown(a[n])}, here {b[n]}" for n in differing)
