"""How well does a machine's profile predict shapes that it has not measured?

    python -m benchmarks.cost_model            # about a minute on two cores
    python -m benchmarks.cost_model --quick    # a few shapes of one dtype

The profile is measured as `difa tune` does. Then dense and local attention are timed at other grids, radii, head
dimensions and numbers of text tokens than the profile's, and set against the prediction. `verdict`: whether window or
full is quicker, as predicted and as measured.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.machine.profile import FullCall, Profile
from difa_compile.machine.tune import DTYPES, cases, full_case, linear_case, local_case, seconds_of, tune
from difa_compile.ops.kernels import LocalCall

from ._common import RESULTS, Row, write_result

CPU = torch.device("cpu")
SHAPES: tuple[tuple[int, int, Layout, tuple[str, ...], int], ...] = (
    (2, 6, Layout((16, 16)), ("band:16", "disc:6"), 48),
    (1, 8, Layout((20, 20)), ("disc:5", "band:50"), 80),
    (2, 3, Layout((28, 36)), ("disc:7", "box:4"), 64),
    (1, 4, Layout((32, 32), 77), ("disc:16", "band:128"), 96),
    (1, 2, Layout((48, 48)), ("disc:10", "band:288"), 64),
    (1, 1, Layout((60, 90), 226), ("disc:8", "disc:20"), 64),
    (1, 2, Layout((64, 64), 256), ("disc:12", "box:8"), 128),
    (1, 1, Layout((7, 30, 40)), ("box:4", "disc:6"), 64),
    (1, 1, Layout((96, 96)), ("disc:16", "band:1152"), 72),
    (1, 1, Layout((112, 112), 512), ("disc:12",), 128),
)
"""Batch, heads, layout, windows, head dimension. None is among those of :func:`difa_compile.machine.tune.cases`."""
LINEARS = ((400, 640, 640), (2304, 1024, 1024), (3000, 512, 1536))


def measure(dtype: torch.dtype, profile: Profile, quick: bool) -> Iterator[Row]:
    name = str(dtype).removeprefix("torch.")
    known = {case.name for case in cases(dtype, CPU)}
    for batch, heads, layout, windows, head_dim in SHAPES[:3] if quick else SHAPES:
        full = FullCall(batch, heads, layout.tokens, layout.tokens, head_dim)
        whole = full_case(full, dtype, CPU)
        common: Row = {
            "dtype": name,
            "batch": batch,
            "heads": heads,
            "head_dim": head_dim,
            "layout": str(layout),
            "tokens": layout.tokens,
        }
        measured_full, predicted_full = seconds_of(whole, CPU), profile.full_seconds(full, dtype)
        assert predicted_full is not None
        yield common | {"window": "full"} | compared(predicted_full, measured_full)
        for text in windows:
            shape = (batch, heads, layout.tokens, head_dim)
            call = LocalCall(layout, Window.parse(text), None, shape, dtype, CPU)
            case = local_case(call)
            assert case.name not in known, case.name
            measured, predicted = seconds_of(case, CPU), profile.local_seconds(call)
            assert predicted is not None
            right = "right" if (predicted < predicted_full) == (measured < measured_full) else "wrong"
            speedup = round(measured_full / measured, 2)
            yield common | {"window": text} | compared(predicted, measured) | {"speedup": speedup, "verdict": right}
    for rows, inputs, outputs in LINEARS:
        case = linear_case(rows, inputs, outputs, dtype, CPU)
        predicted = profile.seconds("linear", dtype, case.work)
        assert predicted is not None
        common = {"dtype": name, "window": f"linear {case.name}"}
        yield common | compared(predicted, seconds_of(case, CPU))


def compared(predicted: float, measured: float) -> Row:
    return {
        "predicted_ms": float(f"{1000 * predicted:.4g}"),
        "measured_ms": float(f"{1000 * measured:.4g}"),
        "error": round(predicted / measured - 1, 4),
    }


def summary(rows: list[Row]) -> Row:
    """A row of medians over the others."""
    errors = [abs(float(row["error"])) for row in rows if isinstance(row["error"], float)]
    verdicts = [row["verdict"] for row in rows if "verdict" in row]
    return {
        "dtype": "all",
        "window": f"median of {len(errors)} errors, without their signs",
        "error": round(statistics.median(errors), 4),
        "verdict": f"{verdicts.count('right')} of {len(verdicts)} right",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--quick", action="store_true", help="a few shapes, one dtype, nothing written")
    args = parser.parse_args()
    dtypes = DTYPES[:1] if args.quick else DTYPES
    torch.manual_seed(0)
    profile = tune(CPU, dtypes, quick=args.quick)
    for fit in profile.fits:
        print(f"{fit.operation}, {fit.dtype}: {len(fit.samples)} samples, {100 * fit.held_out_error:.1f} % held out")
    rows = [row for dtype in dtypes for row in measure(dtype, profile, args.quick)]
    rows.append(summary(rows))
    print(rows[-1])
    if not args.quick:
        write_result("cost_model", rows, folder=args.output)


if __name__ == "__main__":
    main()
