"""What a model asks its inputs: answered where the inputs alone answer, left open where the weights would have to."""

import pytest
import torch
from torch import nn

from difa_compile.errors import InputValuesError
from difa_compile.passes.graph import tensor_of
from difa_compile.passes.prepare.questions import (
    NO_QUESTIONS,
    Slice,
    Unanswerable,
    answer,
    answer_of,
    asked,
    leading_to,
    open_symbols,
)
from tests.support.printed import changes, graph_text, printed
from tests.support.tiny_models import captured_plain, graph_of

MASK = torch.tensor([True, False, True, True, False, True])


def asking(model, inputs):
    """The graph of a model that asks, and its inputs' values."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        return graph_of(model, inputs)


class Shown(nn.Module):
    """The mean of the tokens that a mask shows."""

    def forward(self, x, mask):
        shown = mask.nonzero()[:, 0]
        return x.index_select(1, shown).mean(1)


class Longest(nn.Module):
    """The mean of as many tokens as the longest of some lengths."""

    def forward(self, x, lengths):
        count = lengths.max().item()
        torch._check(count >= 1)
        torch._check(count <= 6)
        return x[:, :count].mean(1) + torch.arange(count).sum()


class Chosen(nn.Module):
    """Which tokens are taken is for the network's weights to say."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 1)

    def forward(self, x):
        return (self.gate(x)[..., 0] > 0).nonzero().float().sum() + x.sum()


def at(module, values, name, value):
    """The values of a graph's inputs with another one for the input called ``name``."""
    names = [node.name.strip("_").removeprefix("l_") for node in module.graph.find_nodes(op="placeholder")]
    changed = list(values)
    changed[names.index(name)] = value
    return changed


# --- answered --------------------------------------------------------------------------------------------------------


def test_a_size_that_the_inputs_answer_becomes_a_number():
    module, values = asking(Shown(), {"x": torch.randn(2, 6, 4), "mask": MASK})
    before, (wanted,) = printed(module), module(*values)
    questions = answer(module, values)
    assert questions.answers == ((4, 1),)
    assert changes(before, printed(module)) == graph_text("""
        ...
        - %nonzero = nonzero(%mask)  int64 (u0, 1)
        + %nonzero = nonzero(%mask)  int64 (4, 1)
        + %sized_default = sized(%nonzero, [4, 1])  int64 (4, 1)
        - %sym_size_int = sym_size(%nonzero, 0)
        + %sym_size_int = sym_size(%sized_default, 0)
        ...
        - %shown = getitem(%nonzero, (::, 0))  int64 (u0,)
        + %shown = getitem(%sized_default, (::, 0))  int64 (4,)
        - %index_select = index_select(%x, 1, %shown)  float32 (2, u0, 4)
        + %index_select = index_select(%x, 1, %shown)  float32 (2, 4, 4)
        ...
    """)
    assert not any(open_symbols(tensor_of(node)) for node in module.graph.nodes)
    assert torch.equal(module(*values)[0], wanted)


def test_a_number_that_the_inputs_answer_makes_sizes_plain():
    module, values = asking(Longest(), {"x": torch.randn(2, 6, 4), "lengths": torch.tensor([2, 4])})
    before, (wanted,) = printed(module), module(*values)
    questions = answer(module, values)
    assert questions.answers == (4,)
    assert changes(before, printed(module)) == graph_text("""
        ...
        - %getitem = getitem(%x, (::, :%item:))  float32 (2, u0, 4)
        + %getitem = getitem(%x, (::, :%item:))  float32 (2, 4, 4)
        ...
        - %arange = arange(%item)  int64 (u0,)
        + %arange = arange(%item)  int64 (4,)
        ...
    """)
    assert torch.equal(module(*values)[0], wanted)


def test_calls_are_judged_by_the_answers():
    module, values = asking(Shown(), {"x": torch.randn(2, 6, 4), "mask": MASK})
    questions = answer(module, values)
    questions.check(values)
    questions.check(at(module, values, "mask", MASK.roll(1)))
    with pytest.raises(InputValuesError, match=r"for instance on how many tokens.*\(2, 1\) where it was \(4, 1\)"):
        questions.check(at(module, values, "mask", ~MASK))


def test_inputs_on_which_the_question_cannot_be_asked_do_not_fit():
    module, values = asking(Longest(), {"x": torch.randn(2, 6, 4), "lengths": torch.tensor([2, 4])})
    questions = answer(module, values)
    with pytest.raises(InputValuesError, match="this call has others than the one it was captured for"):
        questions.check(at(module, values, "lengths", torch.tensor([], dtype=torch.int64)))
    with pytest.raises(InputValuesError, match="6 where it was 4"):
        questions.check(at(module, values, "lengths", torch.tensor([6, 1, 2])))


def test_a_result_of_another_size_stops_the_graph():
    """Whoever runs the graph without asking first does not get a wrong result."""
    module, values = asking(Shown(), {"x": torch.randn(2, 6, 4), "mask": MASK})
    answer(module, values)
    with pytest.raises(RuntimeError, match=r"a value of shape \[2, 1\] where \[4, 1\] was captured"):
        module(*at(module, values, "mask", ~MASK))


# --- left open -------------------------------------------------------------------------------------------------------


def test_what_the_weights_answer_stays_open():
    torch.manual_seed(0)
    module, values = asking(Chosen(), {"x": torch.randn(2, 6, 4)})
    before = printed(module)
    assert answer(module, values) is NO_QUESTIONS
    assert printed(module) == before
    (chosen,) = (node for node in module.graph.nodes if node.target == "nonzero")
    assert open_symbols(tensor_of(chosen))
    with pytest.raises(Unanswerable, match=r"depends on the network's weights \(l_self_modules_gate_"):
        leading_to(module.graph, [chosen])
    NO_QUESTIONS.check(())


def test_what_chance_answers_stays_open():
    module, values = asking(lambda x: (torch.rand_like(x) > 0.5).nonzero().sum() + x.sum(), {"x": torch.randn(3, 4)})
    (thrown,) = (node for node in module.graph.nodes if node.target == "nonzero")
    with pytest.raises(Unanswerable, match=r"depends on random numbers \(rand_like\)"):
        leading_to(module.graph, [thrown])
    assert answer(module, values) is NO_QUESTIONS


def test_a_model_that_asks_nothing_has_no_questions():
    _, _, module, values = captured_plain()
    before = printed(module)
    assert answer(module, values) is NO_QUESTIONS
    assert printed(module) == before


# --- parts -----------------------------------------------------------------------------------------------------------


def test_the_program_of_a_question_is_the_few_nodes_that_lead_to_it():
    def busy(x, mask):
        heavy = x @ x.mT
        first, again = mask.sum(), mask.sum()
        return heavy.sum() + first * 2 + again * 3

    module, _ = graph_of(busy, {"x": torch.randn(2, 6, 4), "mask": MASK})
    ends = [node for node in module.graph.nodes if node.target == "sum" and "mask" in str(node.args)]
    assert len(ends) == 2
    program = Slice(module, module.graph, ends)
    assert [node.name for node in program.inputs] == ["l_mask_"]
    assert [int(value) for value in program([MASK])] == [4, 4]
    calls = [node for node in program._module.graph.nodes if node.op.startswith("call")]
    assert len(calls) == 1, "what equal nodes compute is computed once"


def test_a_question_sees_what_was_written_before_it_and_changes_no_input():
    def writing(x, counts):
        counts.add_(2)
        return x * counts.max()

    module, values = graph_of(writing, {"x": torch.randn(3), "counts": torch.tensor([1, 5])})
    (end,) = (node for node in module.graph.nodes if node.target == "max")
    counts = next(value for value in values if value.dtype == torch.int64)
    kept = counts.clone()
    (largest,) = Slice(module, module.graph, [end])([counts])
    assert int(largest) == int(kept.max()) + 2
    assert torch.equal(counts, kept)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.zeros(2, 3), (2, 3)),
        ([1, 2.5, True], (1, 2.5, True)),
        ([[1], []], ((1,), ())),
        (float("nan"), "NaN"),
        (7, 7),
    ],
)
def test_answers_are_plain_values(value, expected):
    found = answer_of(value)
    assert found == expected
    assert type(found) is type(expected)


def test_other_values_are_no_answers():
    with pytest.raises(Unanswerable, match="is a str"):
        answer_of("text")


def test_what_python_asks_of_a_tensor():
    assert asked(torch.tensor([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]
    assert asked(torch.tensor([3]), truth=True) is True
    assert asked(torch.tensor(0.0), truth=True) is False
