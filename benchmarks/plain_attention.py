"""Local attention as plain operations in ONNX Runtime: from where on are tiles quicker than a mask?

    python -m benchmarks.plain_attention

Both forms of :mod:`difa_compile.exporting.plain_attention` and dense attention, one batch element, 8 heads of 64, as
ONNX models, timed interleaved. ``share`` is the share of all (query, key) pairs that tiles compute: what
:func:`~difa_compile.exporting.plain_attention.form_for` decides by.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from difa_compile.decision import Window
from difa_compile.exporting.plain_attention import PlainLocalAttention, sizes
from difa_compile.layout import Layout

from ._common import RESULTS, Row, interleave, write_result

SIDES = (16, 24, 32, 48, 64)
SHARES = (0.1, 0.25, 0.5, 0.75)
"""Of an image's width, on each side of a query: the radius of a box."""
HEADS, WIDTH = 8, 64


class Dense(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sides", default=",".join(map(str, SIDES)))
    parser.add_argument("--output", default=RESULTS, type=type(RESULTS), help="folder of the result file")
    return parser.parse_args()


def session(module: nn.Module, inputs: tuple[Tensor, ...], folder: str) -> Callable[[], object]:
    """A call of a module in ONNX Runtime."""
    path = Path(folder) / f"{len(list(Path(folder).iterdir()))}.onnx"
    torch.onnx.export(module.eval(), inputs, path, dynamo=True, opset_version=20, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    made: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {each.name: value.numpy() for each, value in zip(made.get_inputs(), inputs, strict=True)}
    return partial(made.run, None, feed)


def share(layout: Layout, window: Window) -> float:
    """Of all pairs those that tiles compute."""
    grid, tiles, patches = sizes(layout, window)
    count = math.prod(-(-size // tile) for size, tile in zip(grid, tiles, strict=True))
    return count * math.prod(tiles) * math.prod(patches) / layout.tokens**2


def main() -> None:
    args = parse_arguments()
    rows: list[Row] = []
    for side in map(int, args.sides.split(",")):
        layout = Layout((side, side))
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(1, HEADS, side * side, WIDTH, generator=generator) for _ in range(3))
        with TemporaryDirectory() as folder:
            cases: dict[tuple[str, str], Callable[[], object]] = {
                ("dense", ""): session(Dense(), (query, key, value), folder)
            }
            windows = [Window("box", max(1, round(part * side / 2))) for part in SHARES]
            for window in windows:
                for form in ("masked", "tiled"):
                    module = PlainLocalAttention(layout, window, layout.tokens, form=form)
                    cases[form, str(window)] = session(module, (query, key, value), folder)
            times = interleave(cases, args.repeats)
        dense = times["dense", ""]
        for window in windows:
            masked, tiled = times["masked", str(window)], times["tiled", str(window)]
            rows.append(
                {
                    "tokens": layout.tokens,
                    "window": str(window),
                    "share": round(share(layout, window), 3),
                    "dense_seconds": round(dense.median, 5),
                    "masked_seconds": round(masked.median, 5),
                    "tiled_seconds": round(tiled.median, 5),
                    "tiled_to_masked": round(tiled.ratio_to(masked), 3),
                }
            )
            print(rows[-1], flush=True)
    write_result("plain_attention", rows, folder=args.output)


if __name__ == "__main__":
    with torch.no_grad():
        main()
