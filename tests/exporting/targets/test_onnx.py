"""ONNX models of programs: ONNX Runtime gives what the program gives, and weights keep their names and numbers."""

import msgspec
import pytest
import torch
from torch import nn

from difa_compile.bundle.manifest import Port
from difa_compile.bundle.weights import write_weights
from difa_compile.decision import Window
from difa_compile.errors import TargetError
from difa_compile.exporting.lowered import Wanted
from difa_compile.exporting.plain_attention import PlainLocalAttention
from difa_compile.exporting.targets.onnx import DOMAIN, NAME, SMALL, finished, join_heads, lowered, to_onnx
from difa_compile.layout import Layout
from difa_compile.ops.heads import JOIN_HEADS
from difa_compile.ops.local_attention import local_attention
from tests.support.small_programs import (
    HEADS,
    LAYOUT,
    NAMES,
    TOKENS,
    WIDTH,
    Attends,
    full,
    parts,
    program_of,
    two_windows,
    wanted_of,
)

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

FILE = "weights.safetensors"


def written(program, folder, **changes):
    """The model and its weights as files, and the weights' names."""
    engine = to_onnx(program, *NAMES)
    piece = lowered(wanted_of(program, **changes), folder / "piece")
    assert set(piece.weights) == set(engine.tensors)
    tensors = {**piece.tables, **{name: engine.tensors[name] for name in engine.weights}}
    assert set(piece.weights.values()) == set(tensors)
    places = write_weights(folder / FILE, tensors)
    own = {name: places[stored] for name, stored in piece.weights.items()}
    (folder / "model.onnx").write_bytes(finished(piece.file, FILE, own))
    return engine, onnx.load(folder / "model.onnx", load_external_data=False)


def check(attend, folder, tokens=TOKENS, atol=2e-6):
    """What ONNX Runtime makes of it, for several batches."""
    module, program = program_of(attend, tokens)
    engine, model = written(program, folder)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["sample", "cache.a"]
    assert [each.name for each in session.get_outputs()] == ["output", "cache.b"]
    for batch in (1, 2, 5):
        args = [torch.randn(batch, tokens, WIDTH) for _ in range(2)]
        given = dict(zip(("sample", "cache.a"), (each.numpy() for each in args), strict=True))
        with torch.no_grad():
            wanted = module(*args)
        for found, one in zip(session.run(None, given), wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), one, atol=atol, rtol=0)
    return module, engine, model


def test_windows_are_nodes_with_bodies_of_their_own(tmp_path):
    _, engine, model = check(two_windows, tmp_path)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    assert [node.op_type for node in nodes] == [f"{NAME}_0", f"{NAME}_1", f"{NAME}_0"]
    assert sorted(each.name for each in model.functions) == [f"{NAME}_0", f"{NAME}_1"]
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in nodes[1].attribute}
    assert attributes.pop("scale") == pytest.approx(0.2)
    assert attributes == {"grid": [8, 8], "before": 0, "after": 2, "shape": b"disc", "radius": 3, "pooled": 0}
    tables = {name for name in engine.tensors if name not in engine.weights}
    assert len(tables) == 2
    assert {nodes[0].input[3], nodes[1].input[3]} == tables
    assert nodes[2].input[3] == nodes[0].input[3], "one table serves all nodes of a geometry"


def test_many_tokens_are_attended_to_in_tiles(tmp_path):
    layout = Layout((48, 32))
    check(lambda q, k, v: local_attention(q, k, v, layout, Window("box", 3)), tmp_path, tokens=layout.tokens)


def test_weights_keep_names_and_numbers(tmp_path):
    """Nothing is folded into a weight, transposed or merged, not even where weights are equal."""
    module, engine, model = check(full, tmp_path)
    state = module.state_dict()
    assert sorted(engine.weights) == sorted(state)
    for name in engine.weights:
        assert torch.equal(engine.tensors[name], state[name])
    assert {each.name for each in model.graph.initializer if each.data_location} == set(engine.tensors)
    size = (tmp_path / "model.onnx").stat().st_size
    assert size < 10_000, "no weights, and no notes of where the code stood"
    assert b".py" not in model.SerializeToString()


def test_a_weight_that_is_not_read_is_not_there(tmp_path):
    module, program = program_of(full)
    del module
    engine, _ = written(program, tmp_path)
    assert "positions" in engine.weights

    class Without(Attends):
        def forward(self, sample, cache):
            return self.out(sample) + cache, 2 * sample

    torch.manual_seed(1)
    args = tuple(torch.randn(2, TOKENS, WIDTH) for _ in range(2))
    engine, _ = written(torch.export.export(Without(full).eval(), args, strict=False), tmp_path, images=(2, 2))
    assert sorted(engine.weights) == ["out.bias", "out.weight"]


def test_heads_are_joined(tmp_path):
    check(parts, tmp_path)


@pytest.mark.parametrize("first", [[0, 1, 3], [2, 0, 1]])
def test_joining_plainly_is_joining(first):
    values = [torch.randn(2, 2, 5, 3), torch.randn(2, 1, 5, 3), torch.randn(2, 1, 5, 3)]
    added = [torch.randn(2, 2, 5, 3)]
    where = (first, [2, 1, 1] if first[0] == 0 else [1, 1, 1])
    wanted = JOIN_HEADS(values, *where, added, [0], HEADS)
    assert torch.equal(join_heads(values, *where, added, [0], HEADS), wanted)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_with_rows_of_their_own(tmp_path, kind):
    """In an engine for one number of images: its function is for so many rows."""
    generator = torch.Generator().manual_seed(2)
    seen = torch.rand(3, 1, TOKENS, TOKENS, generator=generator) > 0.2
    seen |= torch.eye(TOKENS, dtype=torch.bool)
    mask = seen if kind == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, -5.0)
    module = Attends(lambda q, k, v: local_attention(q, k, v, LAYOUT, Window("box", 1), mask=mask)).eval()
    args = tuple(torch.randn(3, TOKENS, WIDTH, generator=generator) for _ in range(2))
    engine, _ = written(torch.export.export(module, args, strict=False), tmp_path, images=(3, 3))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, dict(zip(("sample", "cache.a"), (each.numpy() for each in args), strict=True)))
    with torch.no_grad():
        for one, wanted in zip(found, module(*args), strict=True):
            torch.testing.assert_close(torch.from_numpy(one), wanted, atol=2e-6, rtol=0)
    assert engine.model.functions


def test_a_model_that_gives_something_else_is_no_engine(tmp_path, monkeypatch):
    """Of a window that is translated to another."""
    monkeypatch.setattr("difa_compile.exporting.targets.onnx._Geometry.module", lambda geometry: PlainLocalAttention(
        LAYOUT, Window("box", 2), geometry.query[1], geometry.scale
    ))  # fmt: skip
    _, program = program_of(two_windows)
    with pytest.raises(
        TargetError, match=r"output of the ONNX model of an engine, for 1 images, is not what the program gives"
    ):
        lowered(wanted_of(program), tmp_path / "piece")
    assert not (tmp_path / "piece.onnx").exists()


def test_masks_of_the_models_own(tmp_path):
    mask = torch.rand(1, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(2)) > 0.2

    def attend(q, k, v):
        batch = q.shape[0]
        own = mask.expand(batch, 1, TOKENS, TOKENS) | torch.eye(TOKENS, dtype=torch.bool)
        return local_attention(q, k, v, LAYOUT, Window("box", 1), mask=own)

    check(attend, tmp_path)


def test_constants_of_two_engines_are_told_apart(tmp_path):
    """Exporters give them the same names; in the file of weights they are named by what they hold."""
    pieces = []
    for number in (1.0, 2.0):

        class Adds(nn.Module):
            def __init__(self, number):
                super().__init__()
                self.number = number

            def forward(self, value):
                return value + torch.full((TOKENS, WIDTH), self.number).cumsum(0)

        program = torch.export.export(Adds(number), (torch.randn(TOKENS, WIDTH),), strict=False)
        port = Port("value", "float32", (TOKENS, WIDTH))
        wanted = Wanted(program, (port,), (msgspec.structs.replace(port, name="output"),), (1, 1))
        pieces.append(lowered(wanted, tmp_path / str(number)))
    one, other = pieces
    assert set(one.weights) == set(other.weights)
    assert one.weights
    assert not set(one.weights.values()) & set(other.weights.values())
    assert set(one.tables) == set(one.weights.values())


def test_a_squeeze_of_more_than_one_does_nothing(tmp_path):
    """As PixArt has it; ONNX's operator refuses it."""
    check(lambda q, k, v: full(q, k, v).squeeze(1).unsqueeze(1).squeeze(1), tmp_path)


def test_half_precision(tmp_path):
    module, program = program_of(two_windows, dtype=torch.float16)
    written(program, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    args = [torch.randn(2, TOKENS, WIDTH, dtype=torch.float16) for _ in range(2)]
    (found, _) = session.run(None, dict(zip(("sample", "cache.a"), (each.numpy() for each in args), strict=True)))
    with torch.no_grad():
        wanted = module.float()(*(each.float() for each in args))[0]
    torch.testing.assert_close(torch.from_numpy(found).float(), wanted, atol=2e-2, rtol=0)


class Adds(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("small", torch.ones(2))
        self.register_buffer("large", torch.ones(SMALL + 1))

    def forward(self, x):
        return (x + self.weight + self.small).sum() + self.large


def test_small_constants_stand_in_the_model():
    program = torch.export.export(Adds(), (torch.zeros(2),))
    assert set(to_onnx(program, ["x"], ["y"]).weights) == {"weight", "small", "large"}
    found = to_onnx(program, ["x"], ["y"], ["small", "large"])
    assert set(found.weights) == {"weight", "large"}
    assert "small" not in found.tensors
