"""Engines against the captures that they are made from, to the bit."""

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="models of diffusers are exported")

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import EngineError
from difa_compile.exporting import engines
from difa_compile.exporting.engines import Port, engines_of, factor_of, held_tensors, live_nodes, prune
from difa_compile.plan.schedule import FULL_ROLE, Role, assign_roles
from tests.support.exported import call_of, family_call, rows_of, run_engine, steps_of
from tests.support.tiny_models import ATTENTIONS, FAMILIES, Attention, PlainTransformer, plain

EMIT = Role(FULL, emit_output=True)


def compare(call, own, blocks, engines_for, steps):
    """Engines give what a capture gives at some of the steps of a schedule, outputs and caches, to the bit."""
    compared = 0
    for step, (row, now, read, outputs, written) in enumerate(steps_of(call, own, blocks)):
        if step not in steps:
            continue
        found = run_engine(engines_for(row), now, read)
        assert torch.equal(found.pop("output"), outputs[0]), f"step {step}: {[str(role) for role in row]}"
        assert found.keys() == written.keys()
        for name, value in written.items():
            assert torch.equal(found[name], value), f"step {step}: {name}"
        compared += 1
    assert compared == len(steps)


@pytest.mark.parametrize(
    ("family", "blocks", "steps"),
    [
        ("dit", False, (1, 3)),
        ("dit", True, (1, 5)),
        ("pixart", False, (5,)),
        *(pytest.param(family, blocks, range(9), marks=pytest.mark.slow) for family in FAMILIES for blocks in (0, 1)),
    ],
)
def test_an_engine_computes_what_the_capture_computes(family, blocks, steps):
    call, own = family_call(family)
    compare(call, own, blocks, lambda row: engines_of([call], row)[0], steps)


@pytest.mark.parametrize("family", ["dit", pytest.param("flux", marks=pytest.mark.slow)])
def test_a_row_that_is_full_is_the_unmodified_model(family):
    call, own = family_call(family)
    (engine,) = engines_of([call], [FULL_ROLE] * len(call.capture.model.sites))
    with torch.no_grad():
        assert torch.equal(run_engine(engine, own, {})["output"], call.model(**own)[0])
    names = {name for name, _ in (*call.model.named_parameters(), *call.model.named_buffers())}
    assert set(engine.weights) <= names
    assert engine.images == (1, 1)
    assert engine.why_static


# What is in an engine


@pytest.mark.parametrize("family", ["dit", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "dit")])
def test_what_is_reused_is_not_in_the_engine(family):
    call, _ = family_call(family)
    model = call.capture.model
    full = set(engines_of([call], [FULL_ROLE] * len(model.sites))[0].weights)
    attention = {name for name in full if any(name.startswith(f"{path}.") for path in attentions(family, call.model))}
    (reusing,) = engines_of([call], [Role(REUSE)] * len(model.sites))
    assert attention
    assert not attention & set(reusing.weights)
    rows = [[FULL] * len(model.units), [REUSE if unit.info.is_block else FULL for unit in model.units]]
    held = rows_of(model, True)[1]
    spans = {i for i, unit in enumerate(model.units) if unit.info.blocks}
    rows[1] = [FULL if held[i] in spans else each for i, each in enumerate(rows[1])]
    (left,) = engines_of([call], assign_roles(rows, held)[1])
    blocks = {name for name in full if "transformer_blocks." in name or name.startswith("blocks.")}
    assert attention < blocks
    assert blocks < full
    outside = {name for name in blocks if family == "dit" and name.startswith("transformer_blocks.0.norm1.emb.")}
    assert blocks & set(left.weights) == outside, "DiT's output layers read the first block's embedding of the timestep"
    assert {port.name.split(".")[0] for port in left.inputs} > {"cache"}


def attentions(family, model):
    return [name for name, _ in model.named_modules() if ATTENTIONS[family](name)]


def test_ports_have_the_names_of_the_models_arguments_and_of_caches():
    call, _ = family_call("dit")
    (engine,) = engines_of([call], [EMIT, Role(REUSE)])
    assert engine.inputs == (
        Port("hidden_states", (2, 4, 8, 8), torch.float32),
        Port("timestep", (2,), torch.int64),
        Port("class_labels", (2,), torch.int64),
        Port("cache.transformer_blocks.1.attn1.output.0", (2, 16, 32), torch.float32),
    )
    assert engine.outputs == (
        Port("output", (2, 4, 8, 8), torch.float32),
        Port("cache.transformer_blocks.0.attn1.output.0", (2, 16, 32), torch.float32),
    )


class Nested(nn.Module):
    """Arguments in dictionaries and lists, numbers among them; a weight under two names, a tensor that is no buffer,
    and results that are several, one of them None."""

    def __init__(self):
        super().__init__()
        self.inner = PlainTransformer([Attention(32, 2), Attention(32, 2)])
        self.again = self.inner.head
        self.table = torch.linspace(0, 1, 3)
        self.register_buffer("shift", torch.tensor(0.25))

    def forward(self, x, more, scale=1.0, *, parts=(), unread=None):
        y = self.inner(x * scale) + more["shade"]["by"][:, None, None, None]
        unread.mul_(2)
        parts[1].mul_(3)
        y = y * parts[0] + parts[1] + self.table[:, None, None] + self.shift + self.again.bias.mean()
        return y, None, y.mean((1, 2, 3))


def nested():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(2, 3, 8, 12, generator=generator),
        "more": {"shade": {"by": torch.tensor([0.1, 0.2])}, "none": None},
        "scale": 1.5,
        "parts": [torch.tensor(2.0), torch.tensor(3.0)],
        "unread": torch.ones(3),
    }
    return Nested().eval(), inputs


def test_arguments_may_be_nested_and_weights_shared():
    model, inputs = nested()
    with torch.no_grad():
        wanted = model(**{**inputs, "parts": [part.clone() for part in inputs["parts"]]})
    call = call_of(model, {**inputs, "parts": [part.clone() for part in inputs["parts"]]})
    (engine,) = engines_of([call], [FULL_ROLE] * 2)
    assert sorted(port.name for port in engine.inputs) == ["more.shade.by", "parts.0", "parts.1", "x"]
    assert [port.name for port in engine.outputs] == ["output.0", "output.1"]
    assert [name for name in engine.weights if "head" in name or "again" in name] == [
        "inner.head.weight",
        "inner.head.bias",
    ]
    assert "shift" in engine.weights
    assert engine.constants == ("table",)
    assert any(value is model.table for value in held_tensors(call)), "an engine is another with another table"
    owned = {id(value) for value in (*model.parameters(), *model.buffers())}
    assert not any(id(value) in owned for value in held_tensors(call))
    flat = {
        "x": inputs["x"],
        "more.shade.by": inputs["more"]["shade"]["by"],
        "parts.0": inputs["parts"][0],
        "parts.1": inputs["parts"][1],
    }
    found = run_engine(engine, flat, {})
    assert torch.equal(found["output.0"], wanted[0])
    assert torch.equal(found["output.1"], wanted[2])
    assert inputs["parts"][1] == 3, "the engine leaves what it is given as it is"


@pytest.mark.slow
def test_positions_of_tokens_are_constants():
    call, own = family_call("flux")
    reading = [Role(FULL)] * 3 + [Role(REUSE)]
    (engine,) = engines_of([call], reading)
    assert engine.constants == ("img_ids",)
    assert "img_ids" not in {port.name for port in engine.inputs}
    assert torch.equal(engine.program.state_dict["img_ids"], own["img_ids"])


def test_weights_are_those_of_the_model_and_no_copies():
    call, _ = family_call("dit")
    (engine,) = engines_of([call], [EMIT] * 2)
    state = {**engine.program.state_dict, **engine.program.constants}
    own = dict((*call.model.named_parameters(), *call.model.named_buffers()))
    assert engine.weights
    for name in engine.weights:
        assert state[name].data_ptr() == own[name].data_ptr(), name


# Batches


@pytest.mark.parametrize(
    ("family", "blocks", "steps", "images"),
    [
        ("dit", False, (5,), (1, 2, 3)),
        pytest.param("dit", True, (5,), (1, 4, 6), marks=pytest.mark.slow),
        pytest.param("pixart", False, (0, 3), (1, 4, 6), marks=pytest.mark.slow),
        pytest.param("sd3", True, (8,), (1, 4, 6), marks=pytest.mark.slow),
        pytest.param("flux", True, (5,), (1, 4, 6), marks=pytest.mark.slow),
        pytest.param("wan", False, (3,), (1, 4, 6), marks=pytest.mark.slow),
    ],
)
def test_one_engine_serves_all_numbers_of_images(family, blocks, steps, images):
    calls = [family_call(family, count)[0] for count in (1, 2, 3)]
    made = {}

    def engine_for(row, count):
        if row not in made:
            made[row] = engines_of(calls, row, most=6)
        (found,) = [engine for engine in made[row] if engine.serves(count)]
        return found

    for count in images:
        call, own = family_call(family, count)
        compare(call, own, blocks, lambda row, count=count: engine_for(row, count), steps)
    for found in made.values():
        assert all(engine.images == (1, 1) or (not engine.why_static and engine.images[1] == 6) for engine in found)
        assert len(found) == 1 or family == "sd3", "there torch.export refuses one image, whose half is a batch of 1"
        shape = found[0].inputs[0].shape
        assert shape[0] == "2*images"


def test_sizes_of_ports_are_texts_that_are_understood():
    port = Port("x", ("2*images", 3, "images"), torch.float32)
    assert port.sizes(4) == (8, 3, 4)
    for text in ("0*images", "images*2", "x", "2*", "-1*images", ""):
        with pytest.raises(EngineError, match=r"a size of an engine is .*; it is a number, images, or 2\*images"):
            factor_of(text)


def test_a_graph_that_depends_on_the_batch_in_another_way_serves_each_alone():
    class Squared(nn.Module):
        """One token more for each image: batches differ in more than proportions."""

        def __init__(self):
            super().__init__()
            self.inner = PlainTransformer([Attention(32, 2), Attention(32, 2)])

        def forward(self, x):
            return self.inner(x) + torch.ones(x.shape[0] + 1).sum()

    torch.manual_seed(0)
    model = Squared().eval()
    calls = [call_of(model, {"x": torch.randn(2 * count, 3, 8, 12)}, count) for count in (1, 2)]
    one, two = engines_of(calls, [EMIT] * 2, most=4)
    assert (one.images, two.images) == ((1, 1), (2, 2))
    assert one.why_static == two.why_static
    assert "is 3, 5 for 1, 2 images, which is not in proportion" in one.why_static


def test_graphs_that_differ_serve_each_alone():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = PlainTransformer([Attention(32, 2), Attention(32, 2)])

        def forward(self, x):
            return self.inner(x) if len(x) < 3 else self.inner(x) + 1

    torch.manual_seed(0)
    model = Branching().eval()
    calls = [call_of(model, {"x": torch.randn(2 * count, 3, 8, 12)}, count) for count in (1, 2)]
    found = engines_of(calls, [EMIT] * 2, most=4)
    assert [engine.images for engine in found] == [(1, 1), (2, 2)]
    assert {engine.why_static for engine in found} == {"its graphs for 1, 2 images differ in more than numbers"}


def test_one_call_alone_says_why_it_is_static():
    call, _ = family_call("dit")
    (engine,) = engines_of([call], [Role(REUSE)] * 2, most=4)
    assert "no call for another number of images" in engine.why_static


# What is refused


def test_calls_that_do_not_go_together_are_refused():
    one, two = family_call("dit")[0], family_call("dit", 2)[0]
    row = [FULL_ROLE] * 2
    with pytest.raises(EngineError, match="for no images were given"):
        engines_of([], row)
    with pytest.raises(EngineError, match="for 1, 1 images were given; give at least one, and no two"):
        engines_of([one, one], row)
    with pytest.raises(EngineError, match="two transformers, or of two branches"):
        engines_of([one, replace(two, branch="cond")], row)
    with pytest.raises(EngineError, match="for up to 1 images were asked for, but a call for 2 was captured"):
        engines_of([one, two], row, most=1)
    with torch.autocast("cpu"), pytest.raises(EngineError, match=r"under torch\.autocast \(cpu torch.bfloat16\)"):
        engines_of([one], row)


def test_a_graph_that_torch_export_refuses_is_an_error(monkeypatch):
    call, _ = family_call("dit")

    def refuse(*_, **__):
        raise ValueError("no such thing\nand more")

    monkeypatch.setattr(torch.export, "export", refuse)
    with pytest.raises(EngineError, match=r"refuses the graph of DiTTransformer2DModel: ValueError: no such thing$"):
        engines_of([call], [FULL_ROLE] * 2)


def test_a_program_that_computes_something_else_is_an_error(monkeypatch):
    call, _ = family_call("dit")
    plain_export = torch.export.export

    def other(module, *args, **kwargs):
        (output,) = module.graph.find_nodes(op="output")
        with module.graph.inserting_before(output):
            output.args = ((module.graph.call_function(torch.neg, output.args[0]),),)
        module.recompile()
        return plain_export(module, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", other)
    with pytest.raises(EngineError, match="output of an exported program is not what the variant gives for 1 images"):
        engines_of([call], [Role(REUSE)] * 2)


def test_a_weight_that_nothing_needs_is_an_error(monkeypatch):
    call, _ = family_call("dit")

    def everything(module):
        places = range(len(module.graph.find_nodes(op="placeholder")))
        (output,) = module.graph.find_nodes(op="output")
        return module, tuple(places), tuple(range(len(output.args[0])))

    monkeypatch.setattr(engines, "prune", everything)
    with pytest.raises(EngineError, match=r"transformer_blocks\.\d\.attn1\..* more weights are read by an engine"):
        engines_of([call], [Role(REUSE)] * 2)


class Casting(nn.Module):
    """Autocast regions of its own, one that casts and one that does not."""

    def __init__(self, dtype):
        super().__init__()
        self.inner = PlainTransformer([Attention(32, 2), Attention(32, 2)])
        self.dtype = dtype

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            x = self.inner(x)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            x = self.inner.head(x.flatten(1)[:, :64].unflatten(1, (2, 32)))
        return x.float()


def test_autocast_regions_that_change_nothing_are_left_out_and_others_refused():
    torch.manual_seed(0)
    model, inputs = Casting(None).eval(), {"x": torch.randn(2, 3, 8, 12)}
    call = call_of(model, inputs)
    found = run_engine(engines_of([call], [EMIT] * 2)[0], inputs, {})
    assert torch.equal(found["output"], call.capture.execute(list(call.args), [EMIT] * 2, {})[0][0])
    model.dtype = torch.bfloat16
    with pytest.raises(EngineError, match=r"Casting computes under torch\.autocast in regions of its own"):
        engines_of([call_of(model, inputs)], [EMIT] * 2)


# Pruning


def test_in_place_writes_stay_where_what_they_write_is_read():
    model, inputs = plain(rotate=True)
    call = call_of(model, inputs)
    for row in ([EMIT] * 2, [Role(Decision.parse("window(band:2)")), EMIT], [EMIT, Role(Decision.parse("full"))]):
        outputs, written = call.capture.execute(list(call.args), row, {})
        found = run_engine(engines_of([call], row)[0], inputs, {})
        assert torch.equal(found.pop("output"), outputs[0])
        assert found.keys() == written.keys()
        assert all(torch.equal(found[name], value) for name, value in written.items())


def test_what_nothing_depends_on_goes():
    def compute(x, y, z):
        read, unread = z.new_zeros(3), y.new_zeros(3)
        read[1:].add_(x)
        unread[1:].add_(y)
        z.mul_(2)
        return read.sum() + z

    module = torch.fx.symbolic_trace(compute)
    pruned, left, kept = prune(module)
    assert (left, kept) == ((0, 2), (0,))
    assert [str(node.target) for node in pruned.graph.nodes if not node.users] == ["add_", "mul_", "output"]
    x, z = torch.ones(2), torch.ones(())
    assert pruned(x, z)[0] == 4
    assert z == 1
    assert len([node for node in pruned.graph.nodes if str(node.target) == "clone"]) == 1
    (output,) = module.graph.find_nodes(op="output")
    assert len(live_nodes(module.graph, output.all_input_nodes)) < len(module.graph.nodes) - 3
