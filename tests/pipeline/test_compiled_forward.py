"""A model's forward, compiled: what Dynamo fails at in this package's words, second attempts, and what is around it."""

import pytest
import torch

from difa_compile.errors import InputValuesError, PlanMismatchError, UnsupportedPipelineError
from difa_compile.pipeline.compiled_forward import CompiledForward


class Doubling(torch.nn.Module):
    def forward(self, x):
        return x * 2


def test_dynamos_failures_become_errors_of_this_package():
    class Backend:
        def __call__(self, module, inputs, *, options=None):
            raise PlanMismatchError("another grid")

    class Broken(torch.nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x + 1

    with pytest.raises(PlanMismatchError, match="another grid"):
        CompiledForward(Doubling(), Backend())(torch.zeros(1))
    with pytest.raises(UnsupportedPipelineError, match="Broken cannot be captured as one graph"):
        CompiledForward(Broken(), lambda m, i: m.forward)(torch.zeros(1))


def test_more_pipelines_than_dynamos_own_limit_of_graphs():
    compiled = []

    def backend(module, inputs, options=None):
        compiled.append(options)
        return module.forward

    for number in range(10):
        CompiledForward(Doubling(), backend, {"a": number})(torch.zeros(1))
    assert [options["a"] for options in compiled] == list(range(10))


def test_too_many_shapes_is_an_error(monkeypatch):
    monkeypatch.setattr("difa_compile.pipeline.compiled_forward.MOST_SHAPES", 2)
    forward = CompiledForward(Doubling(), lambda m, i: m.forward)
    for rows in (1, 2):
        forward(torch.zeros(rows))
    with pytest.raises(UnsupportedPipelineError, match="more input shapes"):
        forward(torch.zeros(3))


def test_a_model_that_fills_a_table_in_its_first_call_is_captured_at_the_second_attempt():
    class Lazy(torch.nn.Module):
        table = None

        def forward(self, x):
            if self.table is None:
                with torch.device("cpu"):  # what Dynamo cannot enter
                    self.table = torch.arange(3.0)
            return x + self.table

    graphs = []

    def backend(module, inputs, options=None):
        graphs.append(module)
        return module.forward

    found = CompiledForward(Lazy(), backend)(torch.zeros(3))
    assert torch.equal(found, torch.arange(3.0))
    assert len(graphs) == 1


def test_what_holds_for_the_values_of_the_inputs_is_tried_first_the_next_time():
    asked = []

    def backend(module, inputs):
        number = len({id(each) for each, _ in asked})

        def run(*args):
            asked.append((module, number))
            if args[0].sum() < 0 and number == 0:
                raise InputValuesError("of other values")
            return module.forward(*args)

        return run

    forward = CompiledForward(Doubling(), backend)
    for value, numbers in ((1.0, [0]), (-1.0, [0, 1]), (-1.0, [1]), (1.0, [1])):
        before = len(asked)
        assert torch.equal(forward(torch.full((2,), value)), torch.full((2,), 2 * value))
        assert [number for _, number in asked[before:]] == numbers
    assert torch.equal(forward(torch.ones(3)), torch.full((3,), 2.0))


def test_a_private_forward_leaves_the_models_code_alone():
    """And so the limit of graphs that models of its class may have."""
    model = Doubling()
    with torch._dynamo.config.patch(recompile_limit=1):
        for rows in range(2, 6):
            CompiledForward(model, lambda m, i: m.forward, private=True)(torch.zeros(rows))
        assert not torch._dynamo.eval_frame._debug_get_cache_entry_list(Doubling.forward.__code__)


def test_pieces_of_a_model_that_need_not_be_whole():
    class Broken(torch.nn.Module):
        def forward(self, x):
            y = x + 1
            torch._dynamo.graph_break()
            return y * 2

    pieces = []

    def backend(module, inputs):
        pieces.append(module)
        return module.forward

    assert torch.equal(CompiledForward(Broken(), backend, whole=False)(torch.zeros(1)), torch.full((1,), 2.0))
    assert len(pieces) == 2


def test_guards_against_hooks_are_put_back_however_a_call_ends():
    model = Doubling()
    forward = CompiledForward(model, lambda m, i: m.forward)
    before = torch._dynamo.config.skip_nnmodule_hook_guards
    forward(torch.zeros(1))
    with pytest.raises(TypeError):
        forward("nothing", "at all")
    assert torch._dynamo.config.skip_nnmodule_hook_guards == before
