"""Train the judge: the digit classifier that measures what the demo model draws.

    python examples/train_judge.py

Trains on the demo model's training data, made harder with noise, blur, contrast changes and erased patches, so that
it can be trusted on generated images too; then measures the saved file on digits that neither it nor the demo model
has seen. Writes ``difa_compile/demo/judge.safetensors`` and, beside it, ``judge.json`` with the measured accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from difa_compile.comparison.metrics import judged_classes
from difa_compile.demo.digits import IMAGE_SIZE, DigitSplit, load_split, render, sample_batch
from difa_compile.demo.judge import DigitJudge, load_judge, save_judge

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "difa_compile" / "demo" / "judge.safetensors"


def roughen(images: Tensor, generator: torch.Generator) -> Tensor:
    """Spoil images (N, 1, 32, 32) the way a generator does: contrast, blur, noise, a lost patch; each at random."""
    count, size = len(images), IMAGE_SIZE

    def uniform(low: float, high: float) -> Tensor:
        return (torch.rand(count, generator=generator) * (high - low) + low)[:, None, None, None]

    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images.lerp(blurred, uniform(-0.3, 0.8).clamp_min(0))
    images = images * uniform(0.8, 1.1) + uniform(-0.1, 0.1)
    noise = torch.randn(images.shape, generator=generator)
    images = images + noise * uniform(-0.1, 0.2).clamp_min(0)
    # One patch in five is replaced by its mean.
    corner = torch.randint(size - 7, (count, 2), generator=generator)
    axis = torch.arange(size)
    inside_y = (axis >= corner[:, :1]) & (axis < corner[:, :1] + 7)
    inside_x = (axis >= corner[:, 1:]) & (axis < corner[:, 1:] + 7)
    hole = (inside_y[:, :, None] & inside_x[:, None, :]).unsqueeze(1) & (uniform(0, 1) < 0.2)
    images = torch.where(hole, images.mean((2, 3), keepdim=True), images)
    return images.clamp(-1, 1)


def accuracy(judge: DigitJudge, split: DigitSplit, renderings: int, seed: int) -> float:
    """Share of ``renderings`` drawings of every digit of ``split`` that ``judge`` reads right."""
    generator = torch.Generator().manual_seed(seed)
    right = 0
    for _ in range(renderings):
        images = render(split.digits, generator) / 2 + 0.5
        right += int((judged_classes(images, judge) == split.labels).sum())
    return right / (renderings * len(split.labels))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    train = load_split(held_out=False)
    judge = DigitJudge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=args.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    started = time.monotonic()
    judge.train()
    bar = tqdm(range(args.steps), desc="judge", unit="step", mininterval=5)
    for step in bar:
        images, labels = sample_batch(train, args.batch, generator)
        loss = F.cross_entropy(judge(roughen(images, generator)), labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    seconds = time.monotonic() - started

    save_judge(judge, args.output)
    saved = load_judge(args.output)
    held_out = load_split(held_out=True)
    result = {
        "held_out_accuracy": accuracy(saved, held_out, renderings=10, seed=1),
        "train_accuracy": accuracy(saved, train, renderings=2, seed=1),
        "held_out_digits": len(held_out.labels),
        "steps": args.steps,
        "batch": args.batch,
        "seed": args.seed,
        "train_seconds": round(seconds, 1),
    }
    report = args.output.with_suffix(".json")
    fresh = report.with_name(report.name + ".new")
    fresh.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(fresh, report)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
