"""What does the Triton kernel of local attention take of a multiprocessor, on GPUs that need not be here?

    python -m benchmarks.triton_aot

Compiles the kernel ahead of time with the configurations of ``plugins/triton/configs.json`` and reads registers, spills
and shared memory off the cubins. ``local_bytes`` is the local memory of a thread: what it spills. A ``mask`` of the
model's own is another for each query, the dearest kind.
"""

from __future__ import annotations

import argparse
import itertools

import torch

from difa_compile.decision import Window
from difa_compile.layout import Layout
from difa_compile.plugins.geometry import Geometry
from difa_compile.plugins.triton import configs
from difa_compile.plugins.triton.ahead import compile_ahead, resources
from difa_compile.plugins.triton.tiling import choose

from ._common import RESULTS, Row, write_result

LAYOUTS = {
    "disc": (Layout((64, 64), 512), Window("disc", 16)),
    "box, video": (Layout((16, 32, 32), 256), Window("box", 4)),
    "band": (Layout((64, 64), 512), Window("band", 512)),
}

CASES = (
    *itertools.product((torch.bfloat16,), ("disc",), (False, True), ("none", "bool", "added")),
    *itertools.product((torch.bfloat16,), ("box, video", "band"), (False, True), ("none",)),
    *itertools.product((torch.bfloat16,), ("box, video", "band"), (False,), ("bool",)),
    *itertools.product((torch.float16,), ("disc",), (False, True), ("none",)),
    (torch.float32, "disc", False, "none"),
)
"""dtype, window, whether full attention is given too, mask of the model's own."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--archs", type=int, nargs="+", default=[80, 89, 90, 100], help="compute capabilities times ten"
    )
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--output", default=RESULTS, type=type(RESULTS), help="folder of the result file")
    return parser.parse_args(arguments)


def row(arch: int, dtype: torch.dtype, head_dim: int, window: str, with_full: bool, mask: str) -> Row:
    """Compile one kernel and say what it takes. ``mask``: as :func:`compile_ahead` names them."""
    config = configs.config(arch, dtype, head_dim, configs.Form.of(with_full, mask != "none"))
    geometry = Geometry.of(*LAYOUTS[window])
    tiling = choose(geometry, config.block_m, config.block_n)
    compiled = compile_ahead(arch, dtype, head_dim, geometry, config, with_full=with_full, mask=mask)
    used = resources(compiled)
    return {
        "arch": f"sm_{arch}",
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": head_dim,
        "window": window,
        "form": "window and full" if with_full else "window",
        "mask": mask,
        "tile": "x".join(map(str, tiling.tile)),
        "patch": "x".join(map(str, tiling.patch)),
        "warps": config.warps,
        "stages": config.stages,
        "registers": used.registers,
        "local_bytes": used.local_bytes,
        "shared_bytes": used.shared_bytes,
        "cubin_bytes": len(compiled.asm["cubin"]),
    }


def main() -> None:
    args = parse_arguments()
    rows = []
    for arch, head_dim in itertools.product(args.archs, args.head_dims):
        for dtype, window, with_full, mask in CASES:
            rows.append(row(arch, dtype, head_dim, window, with_full, mask))
            print("  ", rows[-1], flush=True)
    write_result("triton_aot", rows, folder=args.output)


if __name__ == "__main__":
    main()
