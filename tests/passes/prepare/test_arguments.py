"""What the inputs of a graph are called, however they are given."""

import functools
import inspect

import pytest
import torch
from torch import nn

from difa_compile.passes.analyse.sample import latent_inputs
from difa_compile.passes.prepare.arguments import argument_name, input_name
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
def test_it_does_not_matter_whether_inputs_are_given_by_position_or_by_name(family):
    model, inputs, module, values = captured(family)
    args, rest = by_position(model, inputs)
    given, its_values = graph_of(model, rest, args=args)
    assert names(given) == names(module) == ["hidden_states"]
    infos = [site.info for site in sites_of(module, values)]
    assert [site.info for site in sites_of(given, its_values)] == infos
    assert all(info.layout is not None for info in infos)


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
    assert {input_name(node) for node in placeholders} == set(named)


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


class Collecting(nn.Module):
    """Takes a list of samples and a dictionary of dictionaries."""

    def forward(self, samples, extra, *rest, **more):
        return sum(samples) + extra["of"]["size"] + rest[0] + more["last"]["one"]


def test_places_within_arguments_are_named():
    given = {"samples": [torch.ones(2), torch.ones(2) * 2], "extra": {"of": {"size": torch.ones(2) * 3}}}
    args = (given["samples"], given["extra"], torch.ones(2) * 4)
    module, _ = graph_of(Collecting(), {"last": {"one": torch.ones(2) * 5}}, args=args)
    named = {input_name(node) for node in module.graph.find_nodes(op="placeholder")}
    assert named == {"samples.0", "samples.1", "extra.of.size", "rest[0]", "last.one"}
