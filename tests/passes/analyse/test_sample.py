"""Which input of a graph is the noisy sample, and its sizes."""

import pytest
import torch
from torch import nn

from difa_compile.passes.analyse.sample import find_sample, latent_inputs, sample_sizes
from difa_compile.passes.facts import Facts
from difa_compile.passes.order import rewrite
from difa_compile.passes.prepare.arguments import argument_name
from difa_compile.passes.variant import Context
from tests.support.tiny_models import FAMILIES, captured, graph_of

pytest.importorskip("diffusers")


def names(module):
    return [argument_name(node) for node in latent_inputs(module.graph)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_noisy_sample_is_recognised(family):
    _, inputs, module, values = captured(family)
    (latent,) = latent_inputs(module.graph)
    position = [node for node in module.graph.nodes if node.op == "placeholder"].index(latent)
    assert values[position].data_ptr() == inputs["hidden_states"].data_ptr()


def test_the_noisy_sample_goes_before_larger_conditions():
    class Conditioned(nn.Module):
        def forward(self, condition, local_latents):
            return local_latents + condition.mean()

    module, _ = graph_of(Conditioned(), {"condition": torch.randn(2, 6, 64), "local_latents": torch.randn(2, 6, 4)})
    assert [argument_name(node) for node in latent_inputs(module.graph)] == ["local_latents"]


class Mixed(nn.Module):
    """Looks at a larger text before the noisy sample."""

    def forward(self, text, hidden_states, time):
        return hidden_states + text.mean() + time.mean()


class HalfNamed(nn.Module):
    def forward(self, text, *others):
        return others[0] + text.mean() + others[1].mean()


class Around(nn.Module):
    """A module whose own arguments have no names."""

    def __init__(self):
        super().__init__()
        self.inner = Mixed()

    def forward(self, *args):
        return self.inner(args[1], args[0], args[2])


TEXT, NOISY, TIME = torch.randn(2, 9, 64), torch.randn(2, 6, 4), torch.randn(2, 1)


def test_of_arguments_without_names_the_first_is_the_noisy_sample():
    module, _ = graph_of(Around(), {}, args=(NOISY, TEXT, TIME))
    assert names(module) == ["args[0]"]
    module, _ = graph_of(HalfNamed(), {}, args=(TIME, NOISY, TEXT))
    assert names(module) == ["others[0]"]


def test_sizes_of_the_noisy_sample():
    class Ragged(nn.Module):
        def forward(self, hidden_states):
            return [each * 2 for each in hidden_states]

    for sizes, expected in (([(4, 8, 8)] * 2, (8, 8)), ([(4, 8, 8), (4, 6, 8)], None)):
        module, values = graph_of(Ragged(), {"hidden_states": [torch.randn(size) for size in sizes]})
        found = find_sample(module, Facts(values, Context(), None, rewrite))
        assert len(found.latents) == 2
        assert found.sizes == expected


def test_a_graph_without_a_sample_has_none():
    module, _ = graph_of(lambda ids: ids + 1, {"ids": torch.arange(3)})
    assert latent_inputs(module.graph) == ()
    assert sample_sizes(()) is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("timestep", "sample", "context"), "sample"),
        (("sample", "hidden_states"), "hidden_states"),
        (("text", "latent_model_input"), "latent_model_input"),
        (("mask", "noisy_latents"), "noisy_latents"),
        (("image", "encoding"), "image"),
    ],
)
def test_names_in_their_order(arguments, expected):
    """Of equally large inputs: the usual names first, then what begins or ends like one, then the first of all."""
    code = f"def forward({', '.join(arguments)}):\n    return {' + '.join(arguments)}"
    space = {}
    exec(code, space)
    module, _ = graph_of(space["forward"], {name: torch.randn(2, 4, 8) for name in arguments})
    assert names(module) == [expected]
