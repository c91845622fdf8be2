"""Graphs compiled once for all batch sizes."""

import functools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import difa_compile
from difa_compile.backend.batch_sizes import AnyBatch, pattern_of, proportions, unit_of
from difa_compile.backend.entry import eager
from difa_compile.backend.inductor import inductor
from difa_compile.decision import FULL, REUSE, Decision, Window
from difa_compile.errors import DecisionError
from difa_compile.pipeline.apply import apply, remove
from difa_compile.pipeline.rules import plan_from_rule
from tests.support.tiny_models import FAMILIES, at_step, family_plan
from tests.support.tiny_pipelines import sample, sample_plainly, tiny_pipeline

ROWS = [FULL, Decision.parse("window(band:2)+residual+cfg"), REUSE, Decision.parse("full+cfg")]


class Halves(nn.Module):
    """Shares the halves of a batch and reshapes with plain numbers, as rewritten graphs do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x):
        batch = x.shape[0]
        y = self.linear(x.narrow(0, 0, batch // 2)).reshape(batch // 2 * 4, 2)
        return torch.cat([y, y]).view(batch, 8) + torch.zeros(batch, 8)


def captured(model, *inputs):
    """The graph of a call, with plain numbers, and what it is called with."""
    found = []

    def keep(module, example_inputs):
        found.append((module, list(example_inputs)))
        return module.forward

    torch._dynamo.reset()
    torch.compile(model, backend=keep, dynamic=False)(*inputs)
    (graph,) = found
    return graph


def counting(compiler, counted):
    def compile_one(module, example_inputs):
        counted.append([tuple(value.shape) for value in example_inputs])
        return compiler(module, example_inputs)

    return compile_one


# Numbers


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(0, 9)))
def test_numbers_in_proportion_have_one_unit(times, before, after, constants):
    one = tuple(k * before for k in times) + tuple(constants)
    other = tuple(k * after for k in times) + tuple(constants)
    found = proportions(one, other)
    if before == after:
        assert found is None
        return
    assert found is not None
    unit = unit_of(other, found)
    assert tuple(b if k is None else k * unit for k, b in zip(found, other, strict=True)) == other
    assert [k is None for k in found] == [False] * len(times) + [True] * len(constants)


@pytest.mark.parametrize(
    ("one", "other"),
    [((2, 6), (4, 10)), ((2, 6), (4, 6 + 1)), ((2, 0), (4, 2)), ((4, 2), (2, 4)), ((3,), (3,))],
)
def test_numbers_out_of_proportion_have_none(one, other):
    assert proportions(one, other) is None


def test_numbers_of_another_unit_are_told():
    assert unit_of((6, 9, 5), (2, 3, None)) == 3
    assert unit_of((6, 8, 5), (2, 3, None)) is None
    assert unit_of((5, 9, 5), (2, 3, None)) is None


def test_a_pattern_tells_text_from_numbers_and_nodes():
    def graph(argument):
        made = torch.fx.Graph()
        x = made.placeholder("x")
        made.output(made.call_function(torch.einsum, (argument, x)))
        return torch.fx.GraphModule(nn.Module(), made)

    patterns = [pattern_of(graph(argument), [torch.ones(2)])[0] for argument in ("%0", "#", 7, 8, True)]
    assert patterns[2] == patterns[3]
    assert len(set(patterns)) == 4


# Compiling


@pytest.mark.parametrize("compiler", [eager, pytest.param(inductor, marks=pytest.mark.slow)], ids=["eager", "inductor"])
def test_the_second_batch_size_serves_all_others(compiler):
    model, batches, counted = Halves().eval(), AnyBatch(), []
    with torch.no_grad():
        for size in (2, 6, 4, 10, 2, 32):
            x = torch.randn(size, 6)
            module, inputs = captured(model, x)
            run = batches.compile(counting(compiler, counted), module, inputs)
            torch.testing.assert_close(run(*inputs)[0], model(x))
    assert len(counted) == batches.compiled == 2
    assert any(isinstance(size, torch.SymInt) for shape in counted[1] for size in shape)


def test_other_numbers_and_other_graphs_are_compiled_for_themselves():
    batches, counted = AnyBatch(), []
    compile_one = functools.partial(batches.compile, counting(eager, counted))

    def run(function, *sizes):
        x = torch.randn(*sizes)
        module, inputs = captured(function, x)
        assert torch.equal(compile_one(module, inputs)(*inputs)[0], function(x))
        return len(counted)

    def cut(x):
        return x[:, 1 : x.shape[1] // 2 + 1] * x.shape[0]

    assert run(cut, 2, 6) == 1
    assert run(cut, 2, 9) == 2  # 9 to 6, but 1:5 to 1:4
    assert run(cut, 4, 6) == 3  # twice the rows
    assert run(cut, 6, 6) == 3
    assert run(cut, 6, 9) == 4
    assert run(lambda x: x[:, 1 : x.shape[1] // 2 + 1] + x.shape[0], 6, 6) == 5
    assert run(cut, 2, 6) == 5


def test_a_graph_that_holds_for_some_sizes_only_serves_only_those():
    """The compiler's guards on its symbols are asked again."""
    batches, counted = AnyBatch(), []

    def compile_one(module, example_inputs):
        counted.append(module)
        size = example_inputs[0].shape[0]
        if isinstance(size, torch.SymInt):
            assert size < 7  # makes the guard
        return module.forward

    for size, count in ((2, 1), (4, 2), (6, 2), (8, 4), (8, 4), (5, 4)):
        module, inputs = captured(torch.sin, torch.randn(size, 3))
        batches.compile(compile_one, module, inputs)
        assert len(counted) == count, size


def test_a_batch_of_one_is_compiled_for_itself():
    """The compiler takes a size of 1 to be 1 always, whichever comes first."""
    for sizes in ((1, 2, 3), (2, 1, 3), (2, 3, 1)):
        batches, counted = AnyBatch(), []
        for size in sizes:
            module, inputs = captured(torch.sin, torch.randn(size, 3))
            run = batches.compile(counting(inductor, counted), module, inputs)
            assert torch.allclose(run(*inputs)[0], inputs[0].sin())
        assert len(counted) == {1: 2, 2: 3}[sizes[0]], sizes


def test_what_cannot_be_compiled_for_all_sizes_is_told_and_compiled_for_one():
    batches = AnyBatch()

    def compile_one(module, example_inputs):
        if isinstance(example_inputs[0].shape[0], torch.SymInt):
            raise NotImplementedError("no symbols here\nnone at all")
        return module.forward

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module, inputs = captured(torch.sin, torch.randn(2, 3))
        batches.compile(compile_one, module, inputs)
    module, inputs = captured(torch.sin, torch.randn(4, 3))
    with pytest.warns(UserWarning, match="compiled for this one: NotImplementedError: no symbols here$"):
        run = batches.compile(compile_one, module, inputs)
    assert torch.equal(run(*inputs)[0], inputs[0].sin())


# Plans


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_pipeline_compiles_twice_for_any_number_of_batch_sizes(inner, monkeypatch):
    made = []
    monkeypatch.setattr("difa_compile.pipeline.apply.AnyBatch", lambda: made.append(AnyBatch()) or made[-1])
    pipe = tiny_pipeline()
    plan = plan_from_rule(pipe, len(ROWS), lambda step, site: ROWS[step])
    rows, window = [(decision, decision) for decision in ROWS], Window("band", 2)
    wanted = {count: sample_plainly(pipe, rows, residual_window=window, labels=[1] * count) for count in (2, 3, 5, 1)}
    applied = apply(pipe, plan, inner=inner, strict=True, dynamic=True)
    counts = []
    for count, images in wanted.items():
        assert np.allclose(sample(pipe, labels=[1] * count), images, atol=2e-5)
        counts.append(made[0].compiled)
    assert counts[1] == counts[2] == 2 * counts[0]
    assert len(applied.captures) == 4  # each batch size is captured, analysed and proved
    remove(pipe)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_compiled_twice(family):
    """Shared halves, joint attention, rotary tables, video: all numbers that change follow the batch."""
    model, _ = FAMILIES[family](2)
    rows = [*ROWS, Decision.parse("forecast:1+cfg"), Decision.parse("forecast:2")]
    plan = family_plan(family, rows, conditional_half=1)

    def outputs(batch, **options):
        options = {"plan": plan, "inner": "eager", "strict": True, **options}
        torch._dynamo.reset()  # which keeps eight graphs of a model
        compiled = torch.compile(model, backend="difa", options=options, dynamic=False)
        inputs = FAMILIES[family](batch)[1]
        with torch.no_grad(), difa_compile.sampling(compiled, len(rows)) as run:
            for step in range(len(rows)):
                run.step(step)
                result = compiled(**at_step(inputs, step))
        return result[0] if isinstance(result, tuple) else result.sample

    batches, counts = AnyBatch(), []
    for batch in (2, 4, 6):
        assert torch.equal(outputs(batch, dynamic=batches), outputs(batch))
        counts.append(batches.compiled)
    assert counts[1] == counts[2]
    assert counts[1] <= 2 * counts[0]


def test_without_it_every_batch_size_is_compiled(monkeypatch):
    monkeypatch.setattr("difa_compile.pipeline.apply.AnyBatch", None)
    pipe = tiny_pipeline()
    plan = plan_from_rule(pipe, len(ROWS), lambda step, site: ROWS[step])
    applied = apply(pipe, plan, inner="eager")
    for count in (1, 2, 3):
        sample(pipe, labels=[1] * count)
    assert len({capture.compiled_variants for capture in applied.captures}) == 1
    assert applied.captures[0].compiled_variants > 0


@pytest.mark.slow
def test_a_compiled_model_takes_an_any_batch_and_nothing_else():
    pipe = tiny_pipeline()
    plan = plan_from_rule(pipe, 1, lambda step, site: FULL)
    batches = AnyBatch()
    options = {"plan": plan, "inner": "eager", "dynamic": batches}
    compiled = torch.compile(pipe.transformer, backend="difa", options=options, dynamic=False)
    with torch.no_grad(), difa_compile.sampling(compiled, 1) as run:
        run.step(0)
        for count in (1, 2, 3, 4):
            compiled(
                torch.randn(count, 1, 8, 8),
                timestep=torch.ones(count, dtype=torch.long),
                class_labels=torch.ones(count, dtype=torch.long),
            )
    assert batches.compiled == 2
    torch._dynamo.reset()
    wrong = torch.compile(pipe.transformer, backend="difa", options={**options, "dynamic": True})
    with torch.no_grad(), pytest.raises(DecisionError, match=r"give a difa_compile.AnyBatch\(\)"):
        wrong(
            torch.randn(1, 1, 8, 8),
            timestep=torch.ones(1, dtype=torch.long),
            class_labels=torch.ones(1, dtype=torch.long),
        )
