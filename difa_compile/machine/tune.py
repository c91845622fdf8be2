"""Measuring what attention costs on this machine, and fitting prices to it: :func:`tune`, behind ``difa tune``."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
import torch.nn.functional as F
from torch import Tensor

from difa_compile.decision import Window
from difa_compile.errors import LayoutError, ProfileError
from difa_compile.layout import Layout
from difa_compile.machine.profile import (
    DEVICES,
    ELEMENTWISE,
    FULL_ATTENTION,
    LINEAR,
    Fit,
    FullCall,
    Machine,
    Profile,
    Sample,
    Work,
    elementwise_work,
    linear_work,
    local,
    local_work,
)
from difa_compile.ops.kernels import LocalCall, choose_kernel

DTYPES = (torch.float32, torch.bfloat16)
"""Measured unless others are asked for."""
FOLDS = 5
REPEATS = 15
BUNCH = 0.002
"""Seconds that calls timed together take at least."""
ENOUGH = 0.25
"""Seconds that the repeats of one case may take together, but for the first two."""


@dataclass(frozen=True)
class Case:
    """Something to measure: the operation it belongs to, its work, and how to make what is timed."""

    operation: str
    name: str
    work: Work
    tokens: int
    make: Callable[[], Callable[[], object]]


# --- cases -----------------------------------------------------------------------------------------------------------


def full_case(call: FullCall, dtype: torch.dtype, device: torch.device) -> Case:
    """Dense attention of random operands, laid out as projections leave them."""

    def make() -> Callable[[], object]:
        heads, value_dim = call.key_heads or call.heads, call.value_dim or call.head_dim
        q = operand(call.batch, call.heads, call.queries, call.head_dim, dtype, device)
        k = operand(call.batch, heads, call.keys, call.head_dim, dtype, device)
        v = operand(call.batch, heads, call.keys, value_dim, dtype, device)
        return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != call.heads)

    size = f"{call.batch} x {call.heads} heads x {call.head_dim}, {call.queries} x {call.keys}"
    return Case(FULL_ATTENTION, size, call.work, max(call.queries, call.keys), make)


def local_case(call: LocalCall) -> Case:
    """Local attention through the kernel that serves it. Raises :class:`LayoutError` if none does."""
    kernel = choose_kernel(call)

    def make() -> Callable[[], object]:
        batch, heads, queries, head_dim = call.shape
        keys, key_heads = call.layout.tokens + call.pooled, call.key_heads or heads
        q = operand(batch, heads, queries, head_dim, call.dtype, call.device)
        k = operand(batch, key_heads, keys, head_dim, call.dtype, call.device)
        v = operand(batch, key_heads, keys, call.value_dim or head_dim, call.dtype, call.device)
        return lambda: kernel.run(q, k, v, None, call)

    batch, heads, _, head_dim = call.shape
    name = f"{batch} x {heads} heads x {head_dim}, {call.layout}, {call.window}"
    return Case(local(kernel), name, local_work(kernel, call), call.layout.tokens, make)


def linear_case(rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> Case:
    def make() -> Callable[[], object]:
        x = torch.randn(rows, inputs, device=device).to(dtype)
        weight, bias = torch.randn(outputs, inputs, device=device).to(dtype), torch.zeros(outputs, device=device)
        bias = bias.to(dtype)
        return lambda: F.linear(x, weight, bias)

    return Case(LINEAR, f"{rows} x {inputs} -> {outputs}", linear_work(rows, inputs, outputs), rows, make)


def elementwise_case(elements: int, dtype: torch.dtype, device: torch.device) -> Case:
    def make() -> Callable[[], object]:
        a, b = (torch.randn(elements, device=device).to(dtype) for _ in range(2))
        return lambda: torch.add(a, b)

    return Case(ELEMENTWISE, f"{elements} elements", elementwise_work(elements, dtype, device, 2), 0, make)


def operand(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(batch, tokens, heads, dim, device=device).to(dtype).transpose(1, 2)


def cases(dtype: torch.dtype, device: torch.device, quick: bool = False) -> Iterator[Case]:
    """What is measured: few heads, for the work of heads adds up; few queries where there are many keys."""
    fulls = [
        (1, 1, 256, 256, 64),
        (1, 6, 256, 256, 64),
        (2, 2, 576, 576, 72),
        (1, 2, 1024, 1024, 64),
        (2, 2, 1024, 1024, 128),
        (1, 4, 1536, 1536, 64),
        (1, 1, 2304, 2304, 128),
        (1, 2, 4096, 4096, 64),
        (1, 1, 4608, 4608, 96),
        (1, 1, 512, 16384, 64),
        (1, 2, 512, 16384, 128),
        (1, 1, 512, 65536, 64),
        (1, 4, 512, 512, 32),
        (8, 6, 256, 256, 64),
        (1, 16, 1024, 1024, 64),
    ]
    for batch, heads, queries, keys, dim in fulls[::2] if quick else fulls:
        yield full_case(FullCall(batch, heads, queries, keys, dim), dtype, device)
    locals_ = [
        (1, 1, Layout((16, 16)), "disc:4", 64),
        (1, 6, Layout((16, 16)), "band:32", 64),
        (8, 6, Layout((16, 16)), "band:32", 64),
        (2, 2, Layout((24, 24)), "disc:6", 72),
        (1, 2, Layout((32, 32)), "disc:8", 64),
        (1, 2, Layout((32, 32)), "band:128", 128),
        (1, 16, Layout((32, 32)), "box:3", 64),
        (1, 2, Layout((40, 30), 128), "disc:12", 64),
        (1, 2, Layout((64, 64)), "disc:8", 64),
        (1, 2, Layout((64, 64)), "band:512", 64),
        (1, 1, Layout((64, 64), 512), "disc:16", 128),
        (1, 2, Layout((48, 80)), "box:5", 32),
        (1, 2, Layout((5, 24, 24), 0, 77), "box:3", 64),
        (1, 1, Layout((128, 128)), "disc:8", 64),
        (1, 1, Layout((128, 128)), "disc:24", 96),
        (1, 1, Layout((256, 256)), "disc:8", 64),
        (1, 4, Layout((24, 24)), "box:2", 32),
    ]
    for batch, heads, layout, window, dim in locals_[::2] if quick else locals_:
        call = LocalCall(layout, Window.parse(window), None, (batch, heads, layout.tokens, dim), dtype, device)
        try:
            yield local_case(call)
        except LayoutError:
            continue  # without a kernel of its own, a device serves fewer tokens
    rows = (256, 1024, 4096)
    widths = ((384, 384), (768, 768), (1152, 1152), (1536, 512), (2048, 2048))
    linears = [*itertools.product(rows, widths)]
    for count, (inputs, outputs) in linears[::2] if quick else linears:
        yield linear_case(count, inputs, outputs, dtype, device)
    for power in range(14, 26, 3 if quick else 1):
        yield elementwise_case(3 * 2**power // 2 if power % 2 else 2**power, dtype, device)


# --- measuring -------------------------------------------------------------------------------------------------------


def seconds_of(case: Case, device: torch.device) -> float:
    """Seconds of a call, warmed up: the lower quartile of a few, for other work on the machine only adds to them.

    Short calls are timed in bunches, so that neither the clock nor starting them counts. On CUDA by the device's clock.
    """
    run = case.make()
    times: list[float] = []
    with torch.no_grad():
        run()
        once = _timed(run, device)
        bunch = max(1, round(BUNCH / max(once, 1e-6)))
        while len(times) < 2 or (len(times) < REPEATS and sum(times) * bunch < ENOUGH):
            times.append(_timed(run, device, bunch))
    times.sort()
    return statistics.median(times[: (len(times) + 1) // 2])


def _timed(run: Callable[[], object], device: torch.device, count: int = 1) -> float:
    """Seconds of one of ``count`` calls.

    With one thread it is the process's own time that counts, which other work on the machine does not add to.
    """
    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(count):
            run()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1000 / count
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(count):
        run()
    return (clock() - start) / count


def tune(
    device: torch.device | str = "cpu",
    dtypes: Iterable[torch.dtype] = DTYPES,
    *,
    quick: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Measure this machine: half a minute for float32 and bfloat16 on two cores. Saving it is up to the caller.

    ``quick`` measures half the cases. ``progress`` is told after every case how many of how many are done. CUDA is
    timed by events on the device; this has not been run on a GPU yet. Raises :class:`ProfileError` for a device that is
    not there or is of another kind.
    """
    device = torch.device(device)
    if device.type not in DEVICES:
        raise ProfileError(f"device {device.type} cannot be profiled; choose one of {', '.join(DEVICES)}")
    machine = Machine.here(device)
    wanted = [(dtype, case) for dtype in dict.fromkeys(dtypes) for case in cases(dtype, device, quick)]
    measured: dict[tuple[str, str], list[Sample]] = {}
    for index, (dtype, case) in enumerate(wanted):
        sample = Sample(case.name, case.work, case.tokens, seconds_of(case, device))
        measured.setdefault((case.operation, str(dtype).removeprefix("torch.")), []).append(sample)
        if progress is not None:
            progress(index + 1, len(wanted))
    fits = tuple(fitted(operation, dtype, samples) for (operation, dtype), samples in measured.items())
    return Profile(machine, datetime.now(UTC).isoformat(timespec="seconds"), fits)


# --- fitting ---------------------------------------------------------------------------------------------------------


def fitted(operation: str, dtype: str, samples: Sequence[Sample]) -> Fit:
    """The fit of some samples, and the error for each sample of a fit that left it and a few others out."""
    errors = [0.0] * len(samples)
    for fold in range(min(FOLDS, len(samples))):
        seen = [sample for index, sample in enumerate(samples) if index % FOLDS != fold]
        prices = fit_prices(seen or samples)
        for index in range(fold, len(samples), FOLDS):
            predicted = sum(prices[kind] * amount for kind, amount in samples[index].work.items())
            errors[index] = predicted / samples[index].seconds - 1
    return Fit(operation, dtype, fit_prices(samples), tuple(samples), tuple(errors))


def fit_prices(samples: Sequence[Sample]) -> dict[str, float]:
    """Prices, none negative, with the least sum of squared relative errors.

    There are few kinds of work, so every subset of them is solved without bounds: the best of those solutions without a
    negative price is the optimum under the bound.
    """
    kinds = list(samples[0].work)
    rows = [[sample.work[kind] / sample.seconds for kind in kinds] for sample in samples]
    amounts = torch.tensor(rows, dtype=torch.float64)
    scale = amounts.abs().amax(0).clamp_min(1e-300)
    amounts = amounts / scale
    ones = torch.ones(len(samples), 1, dtype=torch.float64)
    best, least = torch.zeros(len(kinds), dtype=torch.float64), float(len(samples))
    for size in range(1, len(kinds) + 1):
        for chosen in itertools.combinations(range(len(kinds)), size):
            columns = amounts[:, chosen]
            found = torch.linalg.lstsq(columns, ones, driver="gelsd").solution
            error = float((columns @ found - ones).square().sum())
            if bool((found >= 0).all()) and error < least:
                least = error
                best = torch.zeros(len(kinds), dtype=torch.float64)
                best[list(chosen)] = found[:, 0]
    return dict(zip(kinds, (best / scale).tolist(), strict=True))
