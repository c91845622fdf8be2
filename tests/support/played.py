"""Engines in a transformer's place: the calls of a pipeline made by what was exported, on slots of caches."""

import inspect
from contextlib import contextmanager

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput


def argument_of(arguments, name):
    """An argument of a call by the name of an engine's port: ``added_cond_kwargs.resolution``."""
    value = arguments
    for part in name.split("."):
        value = value[int(part)] if isinstance(value, (list, tuple)) else value[part]
    return value


class Played:
    """The calls of one course, made one after the other. ``engines``: by number those for the images at hand."""

    def __init__(self, course, engines):
        self.course, self.engines = list(course), engines
        self.modules = {}
        self.slots = {}
        self.made = 0

    def call(self, arguments):
        """Outputs of the next call; ``arguments``: of the transformer, by name."""
        call = self.course[self.made]
        self.made += 1
        engine = self.engines[call.engine]
        read = dict(call.reads)
        weights = dict(call.weights)
        assert not set(read.values()) & {slot for _, slot in call.writes}
        given = []
        for port in engine.inputs:
            if port.name in read:
                value = self.slots[read[port.name]]
            elif port.name in weights:
                value = torch.tensor(weights[port.name], dtype=port.dtype)
            else:
                value = argument_of(arguments, port.name)
            assert value.dtype == port.dtype, port
            given.append(value)
        assert {*read, *weights} <= {port.name for port in engine.inputs}, "caches that are not read"
        module = self.modules.setdefault(call.engine, engine.program.module())
        with torch.no_grad():
            results = module(*given)
        cut = len(results) - len(call.writes)
        for (name, slot), port, value in zip(call.writes, engine.outputs[cut:], results[cut:], strict=True):
            assert port.name == name
            if slot is not None:
                self.slots[slot] = value.clone()
        return list(results[:cut])

    @contextmanager
    def instead_of(self, *models):
        """Within this, calls of ``models`` are made by the engines."""
        signatures = [inspect.signature(model.forward) for model in models]
        for model, signature in zip(models, signatures, strict=True):

            def forward(*args, signature=signature, **kwargs):
                given = signature.bind(*args, **kwargs).arguments
                results = tuple(self.call(given))
                return results if given.get("return_dict") is False else Transformer2DModelOutput(*results)

            model.forward = forward
        try:
            yield self
        finally:
            for model in models:
                del model.forward
        assert self.made == len(self.course)
