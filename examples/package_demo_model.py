"""Put a trained pipeline into the package as the built-in demo model.

    python -m examples.package_demo_model runs/demo/pipeline

Copies the folder to ``difa_compile/demo/model`` with two changes to its configuration: the class names are added, so
that ``pipe.labels`` is right after a plain ``from_pretrained``; a derived entry of the autoencoder, which diffusers
writes and then warns about, is left out. Checks that the copy loads, is complete, is fp16 and is small enough.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch

from difa_compile.demo.checkpoint import LABELS, load_demo

DESTINATION = Path(__file__).resolve().parent.parent / "difa_compile" / "demo" / "model"
MOST_BYTES = 20_000_000
PARTS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)
CARD = "README.md"
"""The model card, which is written by hand and stays."""


def package(source: Path, destination: Path) -> int:
    """Copy ``source`` to ``destination``, replacing what is there only once the copy is good; its size in bytes."""
    fresh = destination.with_name(destination.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    for part in PARTS:
        (fresh / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / part, fresh / part)
    if (destination / CARD).is_file():
        shutil.copyfile(destination / CARD, fresh / CARD)
    labels = {str(key): name for key, name in LABELS.items()}
    edit(fresh / "model_index.json", lambda index: index | {"id2label": labels})
    edit(fresh / "vae" / "config.json", lambda config: {k: v for k, v in config.items() if k != "block_out_channels"})
    for name in ("transformer", "vae", "scheduler"):
        # The machine's own path is nobody's business.
        config = next((fresh / name).glob("*config.json"))
        edit(config, lambda config: {k: v for k, v in config.items() if k != "_name_or_path"})
    check(fresh)
    shutil.rmtree(destination, ignore_errors=True)
    os.replace(fresh, destination)
    return sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())


def edit(path: Path, change) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text())), indent=2, sort_keys=True) + "\n")


def check(folder: Path) -> None:
    """``SystemExit`` unless ``folder`` is a pipeline fit to ship."""
    from safetensors import safe_open

    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise SystemExit(f"{folder} takes {size / 1e6:.1f} MB; at most {MOST_BYTES / 1e6:.0f} MB ship with the package")
    for weights in folder.rglob("*.safetensors"):
        with safe_open(weights, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                if tensor.dtype != torch.float16 or not tensor.isfinite().all():
                    raise SystemExit(f"{weights}: {name} is {tensor.dtype} or not finite; save the pipeline in fp16")
    from diffusers import DiTPipeline

    if DiTPipeline.from_pretrained(str(folder)).labels != {name: key for key, name in LABELS.items()}:
        raise SystemExit(f"{folder}: the class names were lost")
    load_demo(folder=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--destination", type=Path, default=DESTINATION)
    args = parser.parse_args()
    size = package(args.pipeline, args.destination)
    print(f"{args.destination}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
