"""What the inputs of a graph are called, and which of them is the noisy sample."""

import functools
import inspect

import pytest
import torch
from torch import nn

from difa_compile.passes.analyse.sample import latent_inputs
from difa_compile.passes.prepare.arguments import argument_name
from tests.support.tiny_models import FAMILIES, captured, graph_of, sites_of

pytest.importorskip("diffusers")


def names(module):
    return [argument_name(node) for node in latent_inputs(module.graph)]


def by_position(model, inputs):
    """As many of a call's arguments as can be given by position, and the rest."""
    bound = inspect.signature(model.forward).bind(**inputs)
    bound.apply_defaults()
    return bound.args, bound.kwargs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_noisy_sample_is_recognised(family):
    _, inputs, module, values = captured(family)
    (latent,) = latent_inputs(module.graph)
    position = [node for node in module.graph.nodes if node.op == "placeholder"].index(latent)
    assert values[position].data_ptr() == inputs["hidden_states"].data_ptr()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_does_not_matter_whether_inputs_are_given_by_position_or_by_name(family):
    model, inputs, module, values = captured(family)
    args, rest = by_position(model, inputs)
    given, its_values = graph_of(model, rest, args=args)
    assert names(given) == names(module) == ["hidden_states"]
    infos = [site.info for site in sites_of(module, values)]
    assert [site.info for site in sites_of(given, its_values)] == infos
    assert all(info.layout is not None for info in infos)


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


def decorated(forward):
    @functools.wraps(forward)
    def call(self, /, *given, **named):
        return forward(self, *given, **named)

    return call


class Decorated(Mixed):
    forward = decorated(Mixed.forward)


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


@pytest.mark.parametrize("given", [0, 1, 2, 3])
def test_a_decorated_forward_has_the_names_of_its_own(given):
    named = {"text": TEXT, "hidden_states": NOISY, "time": TIME}
    rest = dict(list(named.items())[given:])
    module, values = graph_of(Decorated(), rest, args=tuple(named.values())[:given])
    (latent,) = latent_inputs(module.graph)
    placeholders = module.graph.find_nodes(op="placeholder")
    assert {argument_name(node) for node in placeholders} == set(named)
    assert all(value is named[argument_name(node)] for node, value in zip(placeholders, values, strict=True))
    assert argument_name(latent) == "hidden_states"


def test_of_arguments_without_names_the_first_is_the_noisy_sample():
    module, _ = graph_of(Around(), {}, args=(NOISY, TEXT, TIME))
    assert names(module) == ["args[0]"]
    module, _ = graph_of(HalfNamed(), {}, args=(TIME, NOISY, TEXT))
    assert names(module) == ["others[0]"]


def test_the_elements_of_a_list_stay_one_argument():
    """Samples of several sizes, as a list given by position to a function that takes ``*args``."""

    class Ragged(nn.Module):
        def forward(self, hidden_states, text):
            return [each + text.mean() for each in hidden_states]

    class Wrapped(Ragged):
        forward = decorated(Ragged.forward)

    module, values = graph_of(Wrapped(), {}, args=([NOISY, NOISY[:, :3]], TEXT))
    found = latent_inputs(module.graph)
    assert [argument_name(node) for node in found] == ["hidden_states"] * 2
    placeholders = module.graph.find_nodes(op="placeholder")
    assert [values[placeholders.index(node)].shape for node in found] == [(2, 6, 4), (2, 3, 4)]
