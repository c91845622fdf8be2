"""Small programs of torch.export with windows and groups of heads, as engines of a plan have them."""

import functools
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from difa_compile.bundle.manifest import Engine, Port
from difa_compile.bundle.weights import write_weights
from difa_compile.decision import Window
from difa_compile.exporting.lowered import Wanted
from difa_compile.layout import Layout
from difa_compile.ops.local_attention import local_attention

TOKENS, WIDTH, HEADS = 66, 32, 4
LAYOUT = Layout((8, 8), 0, 2)


class Attends(nn.Module):
    """Norms, projections, a table of positions, and an attention that ``attend(q, k, v)`` says."""

    def __init__(self, attend, tokens=TOKENS):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])  # equal weights
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("positions", torch.randn(1, tokens, WIDTH, generator=generator))
        self.scale = nn.Parameter(torch.randn(WIDTH, generator=generator))
        self.attend = attend

    def forward(self, sample, cache):
        batch, tokens, _ = sample.shape
        normed = self.norms[1](self.norms[0](sample + self.positions)) * (1 + self.scale)
        q, k, v = self.qkv(normed).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = self.attend(q, k, v)
        return self.out(attended.transpose(1, 2).reshape(batch, tokens, WIDTH)) + cache, attended.contiguous()


def program_of(attend, tokens=TOKENS, dtype=torch.float32):
    torch.manual_seed(1)
    module = Attends(attend, tokens).eval().to(dtype)
    args = tuple(torch.randn(2, tokens, WIDTH, dtype=dtype) for _ in range(2))
    images = Dim("images", min=1, max=8)
    program = torch.export.export(module, args, dynamic_shapes=({0: images}, {0: images}), strict=False)
    return module, program


NAMES = ["sample", "cache.a"], ["output", "cache.b"]


def wanted_of(program, dtype=torch.float32, **changes):
    """An engine of :func:`program_of`, as targets are asked for it."""
    name = str(dtype).removeprefix("torch.")
    tokens = program.example_inputs[0][0].shape[1]
    sample, cache = ("images", tokens, WIDTH), ("images", HEADS, tokens, WIDTH // HEADS)
    inputs = tuple(Port(each, name, sample) for each in NAMES[0])
    outputs = (Port("output", name, sample), Port("cache.b", name, cache))
    return Wanted(**{"program": program, "inputs": inputs, "outputs": outputs, "images": (1, 8), **changes})


def inlined_program():
    """A program without windows, its tensors, and an ONNX model that is given them."""
    from difa_compile.exporting.targets.onnx import to_onnx
    from difa_compile.exporting.targets.tensorrt import inlined

    _, program = program_of(full)
    made = to_onnx(program, *NAMES)
    return program, dict(made.tensors), inlined(made, made.tensors)


def two_windows(q, k, v):
    """Two geometries, and one of them twice."""
    near = local_attention(q, k, v, LAYOUT, Window("box", 1))
    far = local_attention(q, k, v, LAYOUT, Window("disc", 3), scale=0.2)
    return near + far + local_attention(q * 0.5, k, v, LAYOUT, Window("box", 1))


def full(q, k, v):
    return nn.functional.scaled_dot_product_attention(q, k, v)


def parts(q, k, v):
    heads = [q[:, 0:4:2], q[:, 1:2], q[:, 3:4]]
    return torch.ops.difa.join_heads(heads, [0, 1, 3], [2, 1, 1], [v[:, :2], k[:, :1]], [0, 2], HEADS)


LABELS = 10


class Labelled(nn.Module):
    """A row of a table for each label, added to what a linear layer gives."""

    def __init__(self):
        super().__init__()
        self.table, self.linear = nn.Embedding(LABELS, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, sample, labels):
        return torch.tanh(self.linear(sample) + self.table(labels)[:, None])


def labelled():
    """That module, and what an engine of it is to be."""
    torch.manual_seed(2)
    module, images = Labelled().eval(), Dim("images", min=1, max=8)
    args = torch.randn(2, TOKENS, WIDTH), torch.tensor([3, 8])
    program = torch.export.export(module, args, dynamic_shapes=({0: images}, {0: images}), strict=False)
    inputs = Port("sample", "float32", ("images", TOKENS, WIDTH)), Port("labels", "int64", ("images",))
    return module, Wanted(program, inputs, (Port("output", *_described(inputs[0])),), (1, 8))


def _described(port):
    return port.dtype, port.shape


@functools.cache
def packaged():
    """That engine as an AOTInductor package, made once for all tests of a process: the module, what a manifest says of
    the engine, and the folder with the package and the file of weights, ``weights.safetensors``."""
    from difa_compile.exporting.targets.aoti import lowered

    module, wanted = labelled()
    folder = Path(tempfile.mkdtemp(prefix="difa-test-"))
    made = lowered(wanted, folder / "engine")
    state = module.state_dict()
    write_weights(folder / "weights.safetensors", {name: state[name] for name in made.weights.values()})
    engine = Engine(
        "aoti", made.file.name, 0, wanted.images, wanted.inputs, wanted.outputs, made.weights, made.instruction_set,
        made.kernel, made.versions,
    )  # fmt: skip
    return module, engine, folder
