"""Measure the demo model: draw digits and let the judge read them.

    python -m examples.evaluate_demo_model

Draws 50 digits per class with full attention (cfg 4, 50 steps, DPM-Solver++), reports the share that the judge reads
as the class asked for, and the Frechet distance, in the judge's features, to rendered digits that the model has not
seen; beside it the same distance of as many rendered training digits, which is what a perfect model would reach. Writes
``benchmarks/results/demo_model.json``. The seed of a batch is ``--seed`` plus its number.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks._common import RESULTS, commit, machine, table, versions
from difa_compile.comparison.metrics import frechet_distance, judged_classes
from difa_compile.demo import load_demo
from difa_compile.demo.digits import NUM_CLASSES, load_split, sample_batch
from difa_compile.demo.judge import load_judge


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="pipeline folder; default: the packaged one")
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "demo_model.json")
    parser.add_argument("--sheet", type=Path, help="also save a contact sheet: drawings read wrong first, then others")
    return parser.parse_args()


def draw(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 32, 32) in [0, 1] and the labels (N,) asked for, classes in turn."""
    pipe = load_demo(folder=args.model).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if args.compile:
        pipe.transformer.compile()
    labels = torch.arange(args.per_class * NUM_CLASSES) % NUM_CLASSES
    images = []
    for index, part in enumerate(tqdm(labels.split(args.batch), desc="draw", unit="batch")):
        generator = torch.Generator().manual_seed(args.seed + index)
        output = pipe(
            part.tolist(),
            guidance_scale=args.guidance,
            num_inference_steps=args.steps,
            generator=generator,
            output_type="pt",
        )
        images.append(output.images.float().cpu())
    return torch.cat(images), labels


def contact_sheet(images: Tensor, right: Tensor, path: Path, columns: int = 25) -> None:
    from PIL import Image

    order = right.int().argsort(stable=True)
    columns = min(columns, len(images))
    images = images[order][: len(images) // columns * columns]
    size = images.shape[-1]
    grid = images.reshape(-1, columns, size, size).permute(0, 2, 1, 3).reshape(-1, columns * size)
    Image.fromarray((grid * 255).round().to(torch.uint8).numpy()).save(path)


def main() -> None:
    args = parse_arguments()
    judge = load_judge()
    started = time.perf_counter()
    images, labels = draw(args)
    seconds = time.perf_counter() - started
    right = judged_classes(images, judge) == labels

    generator = torch.Generator().manual_seed(args.seed)
    unseen, _ = sample_batch(load_split(held_out=True), len(images), generator)
    seen, _ = sample_batch(load_split(held_out=False), len(images), generator)
    unseen, seen = unseen / 2 + 0.5, seen / 2 + 0.5
    rows = [
        {
            "case": "all classes",
            "images": len(images),
            "judged_right": right.float().mean().item(),
            "frechet_to_held_out": frechet_distance(unseen, images, judge),
            "frechet_training_to_held_out": frechet_distance(unseen, seen, judge),
            "steps": args.steps,
            "guidance": args.guidance,
            "seconds": round(seconds, 1),
        }
    ]
    for digit in range(NUM_CLASSES):
        of_class = right[labels == digit]
        rows.append({"case": f"class {digit}", "images": len(of_class), "judged_right": of_class.float().mean().item()})
    record = {
        "benchmark": "demo_model",
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "command": " ".join(["python", "-m", "examples.evaluate_demo_model", *sys.argv[1:]]),
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    fresh = args.output.with_suffix(".json.new")
    fresh.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    os.replace(fresh, args.output)
    if args.sheet:
        contact_sheet(images, right, args.sheet)
    print(table(rows))
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
