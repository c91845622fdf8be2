"""Programs against what a watched pipeline did: right ones agree, wrong ones are seen."""

from dataclasses import replace

import pytest
import torch

from difa_compile.bundle.program import Clamp, Sample, Term, replay
from difa_compile.errors import SamplingLoopError
from difa_compile.exporting.verifying import SEED, differences, in_dtypes_of, stand_in
from difa_compile.exporting.watching import Event
from tests.support.programs import small_program

CONDITIONS = {"cond": {"labels": torch.tensor([3, 4]), "ids": torch.arange(5.0)}}


def done(program, conditions=CONDITIONS, rounded=lambda sample: sample):
    """What a pipeline did whose loop is ``program``: the calls of its model and its final latents. ``rounded``: what
    its rounding makes of the sample that the model is given."""
    calls = []

    def call(form, operation, inputs):
        inputs["hidden_states"] = rounded(inputs["hidden_states"])
        rows = len(inputs["hidden_states"])
        calls.append(Event("call", rows, form.output, (), inputs, form=(form.model, form.branch)))
        return stand_in(len(calls), form.sample.name, form.output, inputs)

    latents = replay(program, torch.Generator().manual_seed(SEED), conditions, call, images=2, dtype=torch.float32)
    return calls, latents


def found(program, calls, latents, **changes):
    given = {"conditioning": CONDITIONS, "images": 2, "scales": {}, **changes}
    return differences(program, calls, latents, **given)


def test_a_right_program_differs_by_rounding_alone():
    error, rounding = found(small_program(), *done(small_program()))
    assert error == rounding
    assert 0 < error < 1e-6


@pytest.mark.parametrize(("dtype", "eps"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_a_step_of_rounding_in_half_precision_does_not_grow(dtype, eps):
    """A model is given the next number; what it makes of it is no fault of the loop."""
    program = small_program()
    half = replace(
        program, forms=tuple(replace(each, sample=replace(each.sample, dtype=dtype)) for each in program.forms)
    )
    error, _ = found(half, *done(half, rounded=lambda sample: sample * (1 + eps)))
    assert 0 < error < 1e-6
    error, _ = found(half, *done(half, rounded=lambda sample: sample * (1 + 4 * eps)))
    assert error > 2 * eps
    index, change = WRONG["a factor"]
    error, _ = found(altered(half, index, change), *done(half, rounded=lambda sample: sample * (1 + eps)))
    assert error > 1e-4


def altered(program, index, change):
    operations = list(program.operations)
    operations[index] = change(operations[index])
    return replace(program, operations=tuple(operations))


WRONG = {
    "a factor": (6, lambda sample: Sample(((Term(4, 0, (1.001,)), *sample.inputs[0][1:]),))),
    "a clamp": (2, lambda clamp: Clamp(clamp.inputs, -3.0, 3.0)),
    "a timestep": (5, lambda call: replace(call, values=(((101.0, 1.0), (100.0,)),))),
    "a draw": (3, lambda draw: replace(draw, seeded=False)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_program_is_seen(name):
    index, change = WRONG[name]
    error, rounding = found(altered(small_program(), index, change), *done(small_program()))
    assert error > 100 * rounding
    assert error > 1e-4


def test_another_scale_is_another_loop():
    error, _ = found(small_program(), *done(small_program()), scales={"guidance_scale": 4.1})
    assert error > 1e-3


def test_nan_is_no_agreement():
    calls, latents = done(small_program())
    assert found(small_program(), calls, latents * float("nan"))[0] == float("inf")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_what_a_model_is_given_is_no_agreement_and_hides_no_other(value):
    calls, latents = done(small_program())
    ids = calls[0].tensors["ids"].clone()
    ids[0] = value
    calls[0].tensors = {**calls[0].tensors, "ids": ids}
    assert found(small_program(), calls, latents)[0] == float("inf")


def test_a_mask_of_infinite_numbers_can_be_followed():
    given = {"cond": {**CONDITIONS["cond"], "ids": torch.tensor([0.0, 0.0, float("-inf"), 0.0, float("-inf")])}}
    calls, latents = done(small_program(), given)
    error, _ = found(small_program(), calls, latents, conditioning=given)
    assert 0 < error < 1e-6
    other = {"cond": {**given["cond"], "ids": given["cond"]["ids"].roll(1)}}
    assert found(small_program(), calls, latents, conditioning=other)[0] == float("inf")


@pytest.mark.parametrize("change", ["fewer", "more", "another branch", "another shape"])
def test_other_calls_are_refused(change):
    calls, latents = done(small_program())
    if change == "fewer":
        calls = calls[:1]
    elif change == "more":
        calls = [*calls, calls[0]]
    elif change == "another branch":
        calls[1].form = ("transformer", "cond")
    else:
        calls[0].tensors = {**calls[0].tensors, "ids": torch.zeros(4)}
    with pytest.raises(SamplingLoopError, match=r"otherwise|more often|another form"):
        found(small_program(), calls, latents)


def test_a_stand_in_takes_rows_by_themselves_and_all_that_it_is_given():
    generator = torch.Generator().manual_seed(0)
    inputs = {"x": torch.randn(3, 2, 2, generator=generator), "t": torch.tensor([1, 2, 3]), "s": torch.tensor(2.0)}
    made = stand_in(1, "x", (3, 2), inputs)
    assert made.shape == (3, 3, 2)
    alone = stand_in(1, "x", (3, 2), {"x": inputs["x"][1:2], "t": inputs["t"][1:2], "s": inputs["s"]})
    torch.testing.assert_close(alone[0], made[1])
    for change in ({"t": torch.tensor([1, 5, 3])}, {"s": torch.tensor(3.0)}, {"x": -inputs["x"]}):
        assert not torch.equal(stand_in(1, "x", (3, 2), {**inputs, **change})[1], made[1])
    assert not torch.equal(stand_in(2, "x", (3, 2), inputs), made)
    twice = stand_in(1, "x", (3, 2), {**inputs, "x": 2 * inputs["x"]})
    assert float((twice - 2 * made).abs().max()) > 0.1, "it is not linear"


def test_dtypes_are_those_that_were_watched():
    calls, _ = done(small_program())
    calls[0].tensors = {name: tensor.double() for name, tensor in calls[0].tensors.items()}
    (form,) = in_dtypes_of(small_program(), calls).forms
    arguments = (form.sample, *form.values, *(each.argument for each in form.conditions))
    assert {argument.dtype for argument in arguments} == {"float64"}
    assert in_dtypes_of(small_program(), []) == small_program()
