"""A tiny pipeline with plans, exported: what tests of bundles look at."""

import functools
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import msgspec
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from difa_compile.bundle.manifest import (
    ENCODES,
    MANIFEST,
    Encoder,
    Engine,
    File,
    Port,
    Prompts,
    Text,
    Tokens,
    read_manifest,
)
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.exporting.lowered import Wanted
from difa_compile.exporting.targets.onnx import finished, lowered
from difa_compile.exporting.write import export
from difa_compile.pipeline.rules import plan_from_rule
from tests.support.tiny_pipelines import tiny_pipeline

LAYERS, STEPS = 2, 4
INPUTS = {"class_labels": [1], "guidance_scale": 3.0}
AGREE = 2e-4
"""Of the largest value: at first a tiny model's rounding is divided by the little that is left of the image."""


def pipeline():
    return tiny_pipeline(layers=LAYERS)


def plan(pipe, later=REUSE):
    """Two steps in full, then what ``later`` says."""
    return plan_from_rule(pipe, steps=STEPS, rule=lambda step, site: FULL if step < 2 else later)


@functools.cache
def kept():
    """A bundle that was made once for all tests of a process; it is read, never changed."""
    pytest.importorskip("onnxruntime")
    folder = Path(tempfile.mkdtemp(prefix="difa-test-")) / "bundle"
    torch._dynamo.reset()
    pipe = pipeline()
    export(pipe, {"quick": plan(pipe)}, folder, inputs=INPUTS, steps=[STEPS], most_images=2)
    return folder


def copy(folder):
    """A copy of that bundle in a folder, to be changed."""
    return Path(shutil.copytree(kept(), folder / "bundle"))


NUMBERS = ("zero", "one", "two", "three")
"""Words that the bundle of :func:`prompted` knows."""


class Labels(torch.nn.Module):
    """The first word's number is the label; one that is not known is 0."""

    def forward(self, ids, mask):
        return (ids * mask)[:, 0].clamp(max=len(NUMBERS) - 1)


def prompted(folder):
    """A copy of that bundle that takes words for labels, of both halves: the short form of one with text encoders."""
    folder = copy(folder)
    manifest = read_manifest(folder)
    tokenizer = Tokenizer(models.WordLevel({**{word: i for i, word in enumerate(NUMBERS)}, "?": 9}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=3, pad_id=0, pad_token="zero")
    given = torch.tensor([[1, 0, 0]])
    program = torch.export.export(Labels(), (given, given.clone()))
    ports = tuple(Port(name, "int64", (1, 3)) for name in ("t.ids", "t.mask"))
    outputs = (Port("class_labels", "int64", (1,)),)
    piece = lowered(Wanted(program, ports, outputs, (1, 1)), folder / "piece")
    contents = {
        "encode-000000000000.onnx": finished(piece.file, manifest.weights, {}),
        "tokenizers/tokenizer-000000000000.json": tokenizer.to_str().encode(),
    }
    piece.file.unlink()
    files = dict(manifest.files)
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        files[name] = File(len(content), hashlib.sha256(content).hexdigest())
    engine, tokens = contents
    inputs = {"t.ids": "ids", "t.mask": "mask"}
    changed = msgspec.structs.replace(
        manifest,
        files=files,
        engines=(*manifest.engines, Engine("onnx", engine, ENCODES["cond"], (1, 1), ports, outputs, {})),
        prompts=Prompts(
            {"prompt": Text(tested="one"), "negative_prompt": Text()},
            tuple(
                Encoder(half, ENCODES["cond"], (Tokens(tokens, text, inputs, ("lower", "strip")),))
                for half, text in (("cond", "prompt"), ("uncond", "negative_prompt"))
            ),
        ),
    )
    (folder / MANIFEST).write_text(json.dumps(changed.to_json()))
    return folder


FORECAST = Decision.parse("forecast:1")
