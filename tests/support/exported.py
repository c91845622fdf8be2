"""Calls of tiny models as engines are made from, and engines run on the arguments of a model."""

from functools import cache

import torch

from difa_compile.backend.entry import eager
from difa_compile.decision import FULL, Decision
from difa_compile.exporting.captured import CapturedCall
from difa_compile.passes.caches import CacheName, renew
from difa_compile.plan.data import blocks_of
from difa_compile.plan.schedule import assign_roles, forecast_weights, output_sources, uniform_progress
from tests.support.captures import capture_of
from tests.support.tiny_models import FAMILIES, at_step, graph_of

PROGRESS = uniform_progress(9)


def call_of(model, inputs, images=1, **options):
    """A call of a model with keyword arguments."""
    module, values = graph_of(model, inputs)
    return CapturedCall(capture_of(module, values, eager, **options), tuple(values), model, images)


@cache
def model_of(family):
    return FAMILIES[family](2)[0]


@cache
def family_call(family, images=1):
    """A call of a family for some images, guided in one batch, the conditional half first; and its arguments."""
    _, inputs = FAMILIES[family](2 * images)
    return call_of(model_of(family), inputs, images, conditional_half=0), inputs


def with_arguments(call, own, inputs):
    """The values of a call's graph with ``inputs`` in place of those that it was captured with."""
    swapped = {own[name].data_ptr(): value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return [swapped.get(v.data_ptr(), v) if isinstance(v, torch.Tensor) else v for v in call.args]


def run_engine(engine, inputs, caches):
    """What an engine gives by the names of its ports, for a model's arguments and caches by name."""
    given = [caches[port.name] if port.name in caches else inputs[port.name] for port in engine.inputs]
    images = engine.images[0]
    while given and given[0].shape != torch.Size(engine.inputs[0].sizes(images)):
        images += 1
        assert engine.serves(images), "no number of images has such sizes"
    for port, value in zip(engine.inputs, given, strict=True):
        assert (tuple(value.shape), value.dtype) == (port.sizes(images), port.dtype), port
    with torch.no_grad():
        results = engine.program.module()(*given)
    for port, value in zip(engine.outputs, results, strict=True):
        assert (tuple(value.shape), value.dtype) == (port.sizes(images), port.dtype), port
    return dict(zip([port.name for port in engine.outputs], results, strict=True))


SITES = [
    "F F",
    "W+residual reuse",
    "heads(0:W;1:reuse) full+cfg",
    "forecast:2 heads(0:reuse;1:W+residual)",
    "full+cfg reuse+cfg",
    "heads(0:W+residual;1:full)+cfg forecast:1(step)",
    "W+residual+cfg W",
    "reuse W+cfg",
    "full heads(0:W;1:reuse)+cfg",
]
"""By step what even and odd attention sites do: every kind of decision, with and without sharing."""
SITES_OF_BLOCKS = ["F F", "F F", "F F", "F F", "reuse+cfg W+residual", "F F", "F F", "W reuse", "full+cfg W"]
BLOCKS = ["F F", "F F", "reuse reuse", "F F", "F reuse", "forecast:1 forecast:1", "F F", "reuse F", "F forecast:1"]
SPANS = ["F", "F", "F", "reuse", "F", "F", "forecast:2", "F", "F"]
"""The same beside blocks (even and odd ones) and spans. What lies in something that is left out has no say."""


def decision(text, window):
    return FULL if text == "F" else Decision.parse(text.replace("W", f"window({window})"))


def rows_of(model, blocks, window="band:3"):
    """Rows of decisions for all units of a model: those of :data:`SITES`, or with ``blocks``; and what holds what."""
    infos = [unit.info for unit in model.units]
    held = blocks_of(infos)
    single = [i for i, info in enumerate(infos) if info.is_block and not info.blocks]
    spans = [i for i, info in enumerate(infos) if info.blocks]
    rows = []
    for step, sites in enumerate(SITES_OF_BLOCKS if blocks else SITES):
        row = [decision(sites.split()[i % 2], window) for i in range(len(model.sites))] + [FULL] * (
            len(infos) - len(model.sites)
        )
        if blocks:
            for place, i in enumerate(single):
                row[i] = decision(BLOCKS[step].split()[place % 2], window)
            for i in spans:
                row[i] = decision(SPANS[step], window)
        left = {None: False}
        for i in (*spans, *single, *range(len(model.sites))):
            row[i] = FULL if left[held[i]] else row[i]
            left[i] = left[held[i]] or row[i].kind.reads == "output"
        for i, each in enumerate(row):
            assert model.why_not(i, each) is None, f"{infos[i].path}: {each}"
        rows.append(row)
    return rows, held


def steps_of(call, own, blocks):
    """Each step of such a schedule as the capture makes it: roles, arguments, what is read, outputs, caches written."""
    model = call.capture.model
    rows, held = rows_of(model, blocks)
    roles = assign_roles(rows, held)
    caches = {}
    for step, row in enumerate(roles):
        weights = {}
        for i, role in enumerate(row):
            if role.decision.order:
                sources = output_sources([each[i] for each in rows], [each[i].covered for each in roles])[step]
                numbers = forecast_weights(PROGRESS, step, sources, role.decision.basis)
                weights[CacheName.weights(model.units[i].path)] = torch.tensor(numbers)
        now = at_step(own, step)
        read = {**caches, **weights}
        outputs, written = call.capture.execute(with_arguments(call, own, now), row, read)
        yield row, now, read, outputs, written
        renew(caches, written)
