"""The weights of guidance, found from what a scheduler is given."""

import pytest
import torch

from difa_compile.calibration.guiding import (
    GuidedCall,
    StatedWeights,
    floats_of,
    guided_change,
    guiding_weights,
)
from difa_compile.errors import CalibrationError

NOTHING = StatedWeights(None)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def halves(given_of, stated, batch=2, dtype=torch.float32):
    """The weights found where one call has two halves and the scheduler gets ``given_of(first, second)``."""
    output = drawn(2 * batch, 4, 8, 8).to(dtype)
    (weights,) = guiding_weights([GuidedCall(None, output)], given_of(*output.chunk(2)), stated, "step 3")
    assert weights.dtype == torch.float64
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stated_weights_stand_exactly_where_they_explain_what_is_given(dtype):
    found = halves(lambda a, b: b + 4.0 * (a - b), StatedWeights((4.0, -3.0), 0), dtype=dtype)
    assert found.tolist() == [[4.0, -3.0]] * 2
    found = halves(lambda a, b: a + 4.0 * (b - a), StatedWeights((4.0, -3.0), 1), dtype=dtype)
    assert found.tolist() == [[-3.0, 4.0]] * 2


def test_halves_that_are_sampled_on_with_are_one():
    found = halves(lambda a, b: torch.cat([b + 4.0 * (a - b)] * 2), StatedWeights((4.0, -3.0), 0))
    assert found.tolist() == [[4.0, -3.0]] * 2
    same = torch.cat([drawn(1, 4, 8, 8)] * 2)  # two images that are equal, without guidance
    (found,) = guiding_weights([GuidedCall(None, same)], same, NOTHING, "step 0")
    assert found.tolist() == [[1.0]] * 2


def test_a_scale_that_has_changed_is_seen():
    found = halves(lambda a, b: b + 2.5 * (a - b), StatedWeights((4.0, -3.0), 0))
    torch.testing.assert_close(found, torch.tensor([[2.5, -1.5]] * 2, dtype=torch.float64), atol=1e-5, rtol=0)


def test_a_scale_of_each_image_is_seen():
    scales = torch.tensor([2.0, 7.0]).reshape(2, 1, 1, 1)
    found = halves(lambda a, b: b + scales * (a - b), NOTHING)
    wanted = torch.tensor([[2.0, -1.0], [7.0, -6.0]], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stated", [NOTHING, StatedWeights((5.0, -4.0), two_call=True)])
def test_two_calls(stated):
    calls = [GuidedCall("cond", drawn(2, 4, 8, 8)), GuidedCall("uncond", drawn(2, 4, 8, 8, seed=1))]
    given = 3 * calls[0].output - 2 * calls[1].output
    found = torch.cat(guiding_weights(calls, given, stated, "step 0"), 1)
    torch.testing.assert_close(found, torch.tensor([[3.0, -2.0]] * 2, dtype=torch.float64), atol=1e-5, rtol=0)
    weighed = guiding_weights(calls[::-1], given, StatedWeights((3.0, -2.0), two_call=True), "step 0")
    assert [each.tolist() for each in weighed] == [[[-2.0]] * 2, [[3.0]] * 2], "branches go by name, not by order"


def test_one_call_alone_counts_as_it_is_given():
    """Beyond an interval of guidance; and where a pipeline takes the output for another sign."""
    output = drawn(2, 4, 8, 8)
    stated = StatedWeights((4.0, -3.0), two_call=True)
    (found,) = guiding_weights([GuidedCall("cond", output)], output, stated, "step 0")
    assert found.tolist() == [[1.0]] * 2
    (found,) = guiding_weights([GuidedCall(None, output)], -output, NOTHING, "step 0")
    torch.testing.assert_close(found, torch.full((2, 1), -1.0, dtype=torch.float64))


def test_three_parts():
    output = drawn(3, 4, 8, 8)
    given = 2 * output[:1] - 3 * output[1:2] + 1.5 * output[2:]
    (found,) = guiding_weights([GuidedCall(None, output)], given, NOTHING, "step 0")
    torch.testing.assert_close(found, torch.tensor([[2.0, -3.0, 1.5]], dtype=torch.float64), atol=1e-5, rtol=0)


def test_halves_that_are_equal_say_nothing_of_their_weights():
    half = drawn(1, 4, 8, 8)
    calls = [GuidedCall(None, torch.cat([half, half]))]
    assert guiding_weights(calls, half, StatedWeights((4.0, -3.0), 0), "step 0")[0].tolist() == [[4.0, -3.0]]


@pytest.mark.parametrize("given", [None, "other", "curved"])
def test_what_is_no_sum_leaves_what_is_stated_or_is_refused(given):
    """``None``: nobody says what is given; ``other``: of another size; ``curved``: no sum of the outputs."""
    output = drawn(2, 4, 8, 8)
    made = {None: None, "other": drawn(1, 5, 3), "curved": output[:1] ** 3}[given]
    calls = [GuidedCall(None, output)]
    assert guiding_weights(calls, made, StatedWeights((4.0, -3.0), 1), "step 0")[0].tolist() == [[-3.0, 4.0]]
    with pytest.raises(CalibrationError, match=r"step 7: how the outputs .* Give one number as guidance_scale"):
        guiding_weights(calls, made, StatedWeights(None, 1), "step 7")


def test_changes_are_guided_as_outputs_are():
    changes = [drawn(4, 3, 2), drawn(4, 3, 2, seed=1)]
    weights = [torch.tensor([[2.0, -1.0], [3.0, 0.5]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])]
    found = guided_change(changes, weights)
    for image in range(2):
        wanted = sum(
            own[image, part] * change[2 * part + image]
            for change, own in zip(changes, weights, strict=True)
            for part in range(2)
        )
        torch.testing.assert_close(found[image], wanted)


def test_a_list_of_samples_is_one_output_and_sound_beside_pictures_is_another():
    samples = [drawn(4, 8), drawn(4, 8, seed=1)]
    (stacked,) = floats_of([samples[0], None, torch.arange(3), samples[1]])
    assert torch.equal(stacked, torch.stack(samples))
    picture, sound = floats_of([drawn(2, 4, 8), drawn(2, 7)])
    assert (picture.shape, sound.shape) == ((2, 4, 8), (2, 7))
