"""What do many blocks cost: compile time and stitching, on a 28-block DiT and a FLUX-shaped model of 57 blocks?

    python -m benchmarks.deep_models

Random weights, 1024 image tokens, narrow blocks, so that what is measured is blocks and not arithmetic. A process with
empty compiler caches per model, and a small function compiled first, so that what compilers set up once is not counted.
In each:

- ``inductor``: plain ``torch.compile``; compile time (first call less a later one) and seconds of a call.
- ``difa, six kinds``: a plan whose rows hold six kinds of decision, every row another mixture; compile time of the
  whole schedule.
- ``difa, stitched``: every site full, but run block by block as rows of a plan are, in turns with plain
  ``torch.compile``; ``overhead`` is the median ratio less one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

import difa_compile
from difa_compile import FULL, Decision
from difa_compile.backend.capture import Capture
from difa_compile.backend.inductor import inductor
from difa_compile.backend.stitch import CompiledRow as Stitched
from difa_compile.passes.order import analyse
from difa_compile.pipeline.rules import plan_from_rule
from difa_compile.plan.schedule import FULL_ROLE

from ._common import RESULTS, ROOT, Row, interleave, write_result

KINDS = ("full", "window(band:64)", "window(band:64)+residual", "reuse", "full+cfg", "window(band:64)+residual+cfg")
STEPS = 8


def dit() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=28, sample_size=64,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 64, 64),
        "timestep": torch.full((2,), 5),
        "class_labels": torch.arange(2),
        "return_dict": False,
    }
    return model.eval(), inputs


def flux() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=19, num_single_layers=38, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 14, 14), guidance_embeds=True,
    )  # fmt: skip
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    inputs = {
        "hidden_states": torch.randn(2, 1024, 16),
        "encoder_hidden_states": torch.randn(2, 64, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.full((2,), 0.5),
        "img_ids": torch.stack([torch.zeros(1024), rows.flatten(), columns.flatten()], 1),
        "txt_ids": torch.zeros(64, 3),
        "guidance": torch.full((2,), 3.5),
        "return_dict": False,
    }
    return model.eval(), inputs


MODELS = {"DiT, 28 blocks": dit, "FLUX-shaped, 19 + 38 blocks": flux}


def six_kinds(sites: int) -> list[list[Decision]]:
    """A full row, then rows that mix all kinds at random, each legal behind the ones before."""
    generator = random.Random(0)
    kinds = [Decision.parse(kind) for kind in KINDS]
    return [[FULL] * sites] + [[generator.choice(kinds) for _ in range(sites)] for _ in range(STEPS - 1)]


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def worker(name: str, repeats: int) -> list[Row]:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    rows: list[Row] = []
    with torch.no_grad():
        paths = [info.path for info in difa_compile.inspect_model(model, inputs).site_infos]
        torch._dynamo.reset()

        warm = torch.compile(lambda x: (x @ x).softmax(-1))  # precompiled headers and workers are nobody's cost
        warm(torch.randn(8, 8))
        plain = torch.compile(model, dynamic=False)
        first = timed(lambda: plain(**inputs))
        plain_compile = first - min(timed(lambda: plain(**inputs)) for _ in range(2))
        rows.append({"model": name, "case": "inductor, full", "sites": len(paths), "compile_seconds": plain_compile})

        wanted = six_kinds(len(paths))
        plan = plan_from_rule(
            model,
            STEPS,
            lambda step, site: wanted[step][paths.index(site.path)],
            inputs=inputs,
            conditional_half=0,
        )
        options: dict[str, Any] = {"plan": plan, "strict": True}
        planned: Any = torch.compile(model, backend="difa", options=options, dynamic=False)

        def schedule() -> None:
            with difa_compile.sampling(planned, STEPS) as run:
                for step in range(STEPS):
                    run.step(step)
                    planned(**inputs)

        first = timed(schedule)
        seconds = first - timed(schedule)
        rows.append(
            {
                "model": name,
                "case": "difa, six kinds",
                "sites": len(paths),
                "compile_seconds": seconds,
                "ratio_to_inductor": seconds / plain_compile,
            }
        )
        stitched = compile_stitched(model)
        stitched(**inputs)
        cases = {"inductor, full": lambda: plain(**inputs), "difa, stitched": lambda: stitched(**inputs)}
        timings = interleave(cases, repeats, warmup=2)
        rows[0] |= timings["inductor, full"].row()
        overhead = timings["difa, stitched"].ratio_to(timings["inductor, full"]) - 1
        rows.append({"model": name, "case": "difa, stitched", **timings["difa, stitched"].row(), "overhead": overhead})
    return [{key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()} for row in rows]


def compile_stitched(model: nn.Module) -> Any:
    """The model run block by block, every site full; plans of full attention run the whole graph instead."""

    def backend(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        capture = Capture(analyse(module, example_inputs), inductor)
        roles = (FULL_ROLE,) * len(capture.model.sites)
        rows: list[Stitched] = []

        def run(*args: Any) -> list[Any]:
            if not rows:  # compiled behind Dynamo's back, as the runs of a plan are
                capture.advance(capture.begin(args), roles, {})
                rows.append(capture.stitched(roles))
            return rows[0](args, {})[0]

        return run

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, dynamic=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--output", default=RESULTS, type=type(RESULTS), help="folder of the result file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        print(json.dumps(worker(args.worker, args.repeats)))
        return
    rows: list[Row] = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as cache:
            env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}
            command = [sys.executable, "-m", "benchmarks.deep_models", "--worker", name, "--repeats", str(args.repeats)]
            done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
        rows += json.loads(done.stdout.splitlines()[-1])
        print(rows[-3:], file=sys.stderr, flush=True)
    write_result("deep_models", rows, folder=args.output)


if __name__ == "__main__":
    main()
