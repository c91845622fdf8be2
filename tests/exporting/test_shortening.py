"""Programs made short compute what they did."""

from dataclasses import replace

import pytest
import torch

from difa_compile.bundle.program import Argument, Call, Draw, Form, Program, Sample, Scale, Term, replay
from difa_compile.exporting.shortening import shortened, trimmed
from tests.support.programs import small_program

STEPS = 9


def kept_to_itself(scale_in_factors):
    """A scheduler that keeps ``c' = c / 2 + m`` and returns ``2 c' + 3 m``: its samples are sums over all steps."""
    form = Form("transformer", None, 1, Argument("x", "float32", (3,)), None, (3,), None, (), ())
    operations = [Draw(1, (3,), "float32", True)]
    hidden = {0: 1.0}
    for step in range(STEPS):
        last = len(operations) - 1
        operations.append(Call(0, step, ((Term(last, 0, (1.0,)),),), ()))
        hidden = {value: factor / 2 for value, factor in hidden.items()} | {len(operations) - 1: 1.0}
        row = {value: 2 * factor for value, factor in hidden.items()}
        row[len(operations) - 1] += 3.0
        slopes = (0.25,) if scale_in_factors else ()
        terms = (Term(value, 0, (factor, *(factor * slope for slope in slopes))) for value, factor in row.items())
        operations.append(Sample((tuple(terms),)))
    final = (Term(len(operations) - 1, 0, (1.0,)),)
    scales = (Scale("guidance_scale", 2.0),)
    return Program("P", "S", STEPS, None, (3,), scales, (), (form,), tuple(operations), final, 0.0)


def model(form, operation, inputs):
    return torch.tanh(inputs["x"] + operation.step)


def reach(program):
    """How many operations back a sample reads, at most."""
    return max(
        index - term.value
        for index, each in enumerate(program.operations)
        if isinstance(each, Sample)
        for row in each.inputs
        for term in row
    )


@pytest.mark.parametrize("scale_in_factors", [False, True])
def test_a_short_program_computes_the_same(scale_in_factors):
    program = kept_to_itself(scale_in_factors)
    short = replace(program, operations=tuple(shortened(program)))
    assert reach(program) == 2 * STEPS
    assert reach(short) <= 5
    found, wanted = (replay(each, torch.Generator().manual_seed(2), {}, model, images=2) for each in (short, program))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_what_reads_back_for_good_is_left():
    """A sum over all outputs, each with a factor of its own, is no sum of a few samples."""
    program = kept_to_itself(False)
    chance = torch.Generator().manual_seed(1)
    operations = [
        Sample((tuple(replace(term, factor=(float(torch.rand((), generator=chance)),)) for term in each.inputs[0]),))
        if isinstance(each, Sample)
        else each
        for each in program.operations
    ]
    program = replace(program, operations=tuple(operations))
    short = replace(program, operations=tuple(shortened(program)))
    assert reach(short) == 2 * STEPS
    found, wanted = (replay(each, torch.Generator().manual_seed(2), {}, model) for each in (short, program))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_what_is_short_stays_as_it_is():
    program = small_program()
    assert tuple(shortened(program)) == program.operations


def test_slopes_of_zero_are_left_out():
    assert trimmed([1.0, 0.0, 0.0]) == (1.0,)
    assert trimmed([0.0, 0.0, 2.0, 0.0]) == (0.0, 0.0, 2.0)
    assert trimmed([0.0]) == (0.0,)
