"""Models whose branches, lists and sizes depend on their inputs' values: captured for these, checked at every call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from difa_compile.backend.dynamo_answers import answering
from difa_compile.backend.entry import difa, eager
from difa_compile.backend.run import sampling
from difa_compile.decision import FULL, REUSE
from difa_compile.errors import InputValuesError, UnsupportedPipelineError
from difa_compile.pipeline.compiled_forward import CompiledForward
from difa_compile.pipeline.inspection import inspect_model
from tests.support.captures import capture_of
from tests.support.tiny_models import PlainTransformer, plan_of, sharpened

WIDTH, TEXT, TOKENS = 32, 5, 24


class JointAttention(nn.Module):
    """Attention of image and text, padded to the longest text of the batch."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, y):
        query, key, value = self.qkv(y).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Asking(PlainTransformer):
    """A denoiser whose text is as long as the mask says, and which branches on whether an image is given."""

    def __init__(self):
        super().__init__([JointAttention(), JointAttention()])

    def forward(self, hidden_states, text, mask, image):
        y = self.patch(hidden_states).flatten(2).transpose(1, 2)
        if torch.all(image == 0):
            y = y + 1.0
        lengths = mask.sum(dim=1).tolist()
        longest = max(lengths)
        joint = y.new_zeros(y.shape[0], y.shape[1] + longest, y.shape[2])
        for i, length in enumerate(lengths):
            joint[i, : y.shape[1]] = y[i]
            joint[i, y.shape[1] : y.shape[1] + length] = text[i][mask[i]]
        for layer in self.layers:
            joint = layer(joint)
        y = self.head(joint[:, : y.shape[1]]).unflatten(1, (4, 6)).unflatten(-1, (2, 2, 3))
        return y.permute(0, 5, 1, 3, 2, 4).reshape(hidden_states.shape)


class PerSample(PlainTransformer):
    """Mochi's way: each sample attends to its own valid text, found by its mask's places."""

    def __init__(self):
        super().__init__([])
        self.attention = JointAttention()

    def forward(self, hidden_states, text, mask):
        y = self.patch(hidden_states).flatten(2).transpose(1, 2)
        found = []
        for i in range(y.shape[0]):
            places = torch.nonzero(mask[i][None].flatten(), as_tuple=False).flatten()
            joint = self.attention(torch.cat([y[i : i + 1], text[i : i + 1, places]], dim=1))
            found.append(F.pad(joint, (0, 0, 0, TOKENS + TEXT - joint.shape[1])))
        y = self.head(torch.cat(found)[:, :TOKENS]).unflatten(1, (4, 6)).unflatten(-1, (2, 2, 3))
        return y.permute(0, 5, 1, 3, 2, 4).reshape(hidden_states.shape)


def first_tokens(*lengths):
    return torch.arange(TEXT) < torch.tensor(lengths)[:, None]


def inputs_of(*lengths, image=1.0, seed=0):
    torch.manual_seed(seed)
    inputs = {"hidden_states": torch.randn(2, 3, 8, 12), "text": torch.randn(2, TEXT, WIDTH)}
    return {**inputs, "mask": first_tokens(*lengths), "image": torch.full((2, 3), image)}


def build(cls):
    torch.manual_seed(1)
    return sharpened(cls())


class Counting:
    """The backend, counting its captures."""

    def __init__(self):
        self.captures = 0

    def __call__(self, module, example_inputs, *, options=None):
        self.captures += 1
        return difa(module, example_inputs, options=options)


def plan_for(model, inputs, rows):
    return plan_of(model, inspect_model(model, inputs).site_infos, rows)


@pytest.fixture
def asking():
    return planned(FULL, REUSE)


def planned(*rows):
    """A model with a plan, what calls it, and the backend."""
    torch._dynamo.reset()
    model = build(Asking)
    backend = Counting()
    plan = plan_for(model, inputs_of(3, 5), rows)
    forward = CompiledForward(model, backend, {"plan": plan, "inner": "eager", "resize": "tokens"})

    def call(inputs):
        with torch.no_grad():
            return forward(**inputs)

    return model, call, backend


def test_branches_lists_and_sizes_by_value_are_captured_as_one_graph():
    model = build(Asking)
    found = inspect_model(model, inputs_of(3, 5))
    assert [site.path for site in found.site_infos] == ["layers.0.attention", "layers.1.attention"]
    assert [site.tokens for site in found.site_infos] == [TOKENS + 5] * 2


def test_every_outcome_is_captured_once_and_computes_what_the_model_computes(asking):
    model, call, backend = asking
    cases = [inputs_of(3, 5), inputs_of(2, 4), inputs_of(3, 5, image=0.0), inputs_of(5, 3)]
    for captures, inputs in enumerate(cases, start=1):
        with sampling(model, 2), torch.no_grad():
            assert torch.equal(call(inputs), model(**inputs))
        assert backend.captures == captures
    for inputs in cases:
        with sampling(model, 2), torch.no_grad():
            assert torch.equal(call(inputs), model(**inputs))
    assert backend.captures == len(cases), "an outcome that is known was captured again"


def test_other_values_of_the_same_outcome_are_not_captured_again(asking):
    model, call, backend = asking
    with sampling(model, 2) as run:
        call(inputs_of(3, 5))
        run.step(1)
        call(inputs_of(3, 5, image=2.0, seed=7))
    assert backend.captures == 1


def test_reuse_takes_the_first_steps_attention_to_the_bit(asking, monkeypatch):
    model, call, _ = asking
    first, second = inputs_of(3, 5), inputs_of(3, 5, seed=7)
    with sampling(model, 2) as run:
        call(first)
        run.step(1)
        found = call(second)
    kept, plain = [], F.scaled_dot_product_attention
    with torch.no_grad():
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a: kept.append(plain(*a)) or kept[-1])
        model(**first)
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a: kept.pop(0))
        wanted = model(**second)
        monkeypatch.undo()
        assert torch.equal(found, wanted)
        assert not torch.equal(found, model(**second))


def test_attention_sample_by_sample_is_a_site_per_sample_with_its_own_text():
    model, inputs = build(PerSample), inputs_of(3, 5)
    inputs.pop("image")
    found = inspect_model(model, inputs)
    assert [site.path for site in found.site_infos] == ["attention", "attention#1"]
    assert [site.tokens for site in found.site_infos] == [TOKENS + 3, TOKENS + 5]


def test_a_call_that_the_capture_does_not_hold_for_is_refused_outside_of_apply():
    model, inputs = build(PerSample), inputs_of(3, 5)
    inputs.pop("image")
    plan = plan_for(model, inputs, [FULL, REUSE])
    fast = torch.compile(model, backend=difa, fullgraph=True, options={"plan": plan, "inner": "eager"})
    with torch.no_grad(), sampling(model, 2) as run:
        assert torch.equal(fast(**inputs), model(**inputs))
        run.step(1)
        with pytest.raises(InputValuesError, match="how many tokens a mask shows"):
            fast(**{**inputs, "mask": first_tokens(3, 4)})


@pytest.mark.slow
def test_inductor_compiles_sizes_that_the_inputs_answer():
    model, inputs = build(PerSample), inputs_of(3, 5)
    inputs.pop("image")
    forward = CompiledForward(model, difa, {"plan": plan_for(model, inputs, [FULL, REUSE])})
    with torch.no_grad(), sampling(model, 2) as run:
        torch.testing.assert_close(forward(**inputs), model(**inputs))
        run.step(1)
        again = forward(**inputs)
        torch.testing.assert_close(again, model(**inputs))


def test_what_the_weights_answer_is_not_answered():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(4, 1)

        def forward(self, x):
            return x + 1 if self.gate(x).sum() > 0 else x - 1

    model, x = Routed(), torch.ones(2, 4)
    forward = CompiledForward(model, lambda m, i: m.forward)
    with torch.no_grad(), pytest.raises(UnsupportedPipelineError, match="Data-dependent branching"):
        forward(x)


def test_random_numbers_answer_nothing():
    class Tossing(nn.Module):
        def forward(self, x):
            return x + 1 if torch.rand(()) > 0.5 else x - 1

    model = Tossing()
    forward = CompiledForward(model, lambda m, i: m.forward)
    with pytest.raises(UnsupportedPipelineError, match="Data-dependent branching"):
        forward(torch.ones(2))


def test_more_outcomes_than_are_compiled_are_an_error(monkeypatch):
    monkeypatch.setattr("difa_compile.pipeline.compiled_forward.MOST_SHAPES", 2)
    model, call, _ = planned(FULL, REUSE)
    for length in (1, 2):
        with sampling(model, 2):
            call(inputs_of(length, 5))
    with sampling(model, 2), pytest.raises(UnsupportedPipelineError, match="texts of other lengths"):
        call(inputs_of(3, 5))


def test_asking_changes_no_input():
    class Writing(Asking):
        def forward(self, hidden_states, text, mask, image):
            mask[:, 0] = False  # the model's own write, which the answer depends on
            return super().forward(hidden_states, text, mask, image)

    model, seen = build(Writing), []

    def backend(module, example_inputs):
        capture = capture_of(module, example_inputs, eager)
        seen.append(capture)
        masks = [value for value in example_inputs if value.dtype == torch.bool]
        before = [mask.clone() for mask in masks]
        capture.model.check(example_inputs)
        assert all(torch.equal(a, b) for a, b in zip(masks, before, strict=True))
        return module.forward

    with torch.no_grad():
        wanted = model(**inputs_of(3, 5))
        with answering():
            found = torch.compile(model, backend=backend, fullgraph=True)(**inputs_of(3, 5))
    assert torch.equal(found, wanted)
    assert [site.info.tokens for site in seen[0].model.sites] == [TOKENS + 4] * 2


def test_dynamo_is_as_it_was_afterwards():
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.variables.tensor import TensorVariable

    def places():
        return ShapeEnv.evaluate_expr, TensorVariable.method_tolist, list(InstructionTranslator.dispatch_table)

    before = places()
    with answering(), answering():
        assert places() != before
    assert places() == before


class Branching(PlainTransformer):
    """A denoiser that branches on a flag of some shape."""

    def __init__(self):
        super().__init__([JointAttention()])

    def forward(self, hidden_states, flag):
        y = self.patch(hidden_states).flatten(2).transpose(1, 2)
        y = self.layers[0](y)
        if flag:
            y = y * 2
        y = self.head(y).unflatten(1, (4, 6)).unflatten(-1, (2, 2, 3))
        return y.permute(0, 5, 1, 3, 2, 4).reshape(hidden_states.shape)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_branch_goes_the_way_a_tensor_of_one_value_says(shape):
    torch._dynamo.reset()
    model = build(Branching)
    sample = torch.randn(2, 3, 8, 12)
    calls = [{"hidden_states": sample, "flag": torch.full(shape, flag)} for flag in (False, True)]
    forward = CompiledForward(model, difa, {"plan": plan_for(model, calls[0], [FULL]), "inner": "eager"})
    with torch.no_grad(), sampling(model, 1):
        for inputs in calls * 2:
            assert torch.equal(forward(**inputs), model(**inputs))


def test_a_branch_on_several_values_is_refused_as_python_refuses_it():
    torch._dynamo.reset()
    model = build(Branching)
    inputs = {"hidden_states": torch.randn(2, 3, 8, 12), "flag": torch.tensor([True, False])}
    forward = CompiledForward(model, difa, {"inner": "eager"})
    with torch.no_grad(), pytest.raises(RuntimeError, match="ambiguous"):
        forward(**inputs)


def test_other_shapes_do_not_capture_known_outcomes_again():
    model, call, backend = planned(FULL)
    other = {key: torch.cat([value, value]) for key, value in inputs_of(1, 5).items()}
    with sampling(model, 1):
        for captures, inputs in enumerate([inputs_of(3, 5), other, inputs_of(2, 4), inputs_of(1, 2)], start=1):
            call(inputs)
            call(other) if captures > 1 else None
            assert backend.captures == captures
