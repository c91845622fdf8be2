"""Look into a model without changing it: which attention sites it has, where their tokens stand, what can't be done."""

from __future__ import annotations

import inspect as signatures
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from difa_compile.backend.verdicts import Record
from difa_compile.decision import FULL, examples
from difa_compile.errors import (
    DifaError,
    NoAttentionError,
    OutputError,
    PassError,
    UnsupportedModelError,
    UnsupportedPipelineError,
)
from difa_compile.layout import Layout
from difa_compile.passes.analysed_model import AnalysedModel
from difa_compile.passes.order import analyse, rewrite
from difa_compile.passes.site import Site
from difa_compile.passes.trace import Trace
from difa_compile.pipeline.compiled_forward import CompiledForward
from difa_compile.pipeline.module_hooks import check_hooks, inner_forward
from difa_compile.plan.data import SiteInfo
from difa_compile.plan.schedule import Role


@dataclass(frozen=True)
class ModelInspection:
    """What was found in a model.

    ``sites``: every attention call, cross-attention included, in execution order. ``site_infos``: those a plan can act
    on. ``records``: for each site what is left alone and why, in general (reuse, windows) rather than for a plan.
    ``sample``: sizes of the noisy sample behind its first dimension (:class:`AnalysedModel`). ``blocks``: the blocks
    and spans that a plan can act on as a whole; ``block_records``: which it can't, and why.
    """

    model: nn.Module
    sites: tuple[Site, ...]
    site_infos: tuple[SiteInfo, ...]
    records: tuple[Record, ...]
    sample: tuple[int, ...] | None = None
    blocks: tuple[SiteInfo, ...] = ()
    block_records: tuple[Record, ...] = ()


class _Stop(Exception):
    """Raised inside a pipeline once the transformer's arguments are known."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.call_args = args
        self.call_kwargs = kwargs


def inspect_model(
    model_or_pipe: Any,
    inputs: Mapping[str, Any] | None = None,
    *,
    layout: Layout | None = None,
    trace: Path | str | None = None,
) -> ModelInspection:
    """Capture a model once and report its attention sites.

    Args:
        model_or_pipe: a diffusers pipeline with a transformer, or a module.
        inputs: keyword arguments of one call of the pipeline or the module; by default the smallest call that can be
            made up from the pipeline's signature or the model's config.
        layout: the token layout, where the graph does not show it.
        trace: a folder to write the graph to after every pass (:mod:`difa_compile.passes.trace`), and as an example of
            rewriting what becomes of it where every site takes its windows, or is reused.

    Raises:
        NoAttentionError: the model has no attention that a plan could act on.
        UnsupportedModelError: the model cannot be captured as one graph.
        UnsupportedPipelineError, ModelLoadError: no transformer, or hooks between its layers
            (:func:`difa_compile.pipeline.module_hooks.check_hooks`), or no inputs could be made up for it.
    """
    from difa_compile.pipeline.example_inputs import example_inputs, pipeline_inputs
    from difa_compile.pipeline.transformers import find_transformer

    name, model = find_transformer(model_or_pipe)
    args: tuple[Any, ...] = ()
    if name:
        args, kwargs = first_call(
            model_or_pipe, model, inputs if inputs is not None else pipeline_inputs(model_or_pipe)
        )
    else:
        kwargs = dict(inputs) if inputs is not None else example_inputs(model)
    check_hooks(model)
    parameters = signatures.signature(inner_forward(model)).parameters
    if "return_dict" in parameters:
        kwargs = {**kwargs, "return_dict": False}
    models: list[AnalysedModel] = []
    failures: list[DifaError] = []
    graphs = 0

    def collect(module: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        try:
            here = None if trace is None else Trace.begin(trace)
            models.append(analyse(module, example, layout=layout, trace=here))
            if here is not None:
                trace_rewrites(models[-1], here)
        except (PassError, OutputError):
            raise
        except DifaError as error:
            failures.append(error)
        return module.forward

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            try:
                CompiledForward(model, collect, private=True)(*args, **kwargs)
            except UnsupportedPipelineError as error:
                graphs = 0
                CompiledForward(model, collect, private=True, whole=False)(*args, **kwargs)
                if graphs != 1:  # one, where it breaks before all that is computed, or behind it
                    raise UnsupportedModelError(str(error)) from error
    finally:
        model.train(training)
        if name and hasattr(model_or_pipe, "maybe_free_model_hooks"):
            model_or_pipe.maybe_free_model_hooks()  # the call was stopped before it came to that
    sites = tuple(site for analysed in models for site in analysed.all_sites)
    if not models:
        detail = f": {failures[0]}" if failures else ""
        others = other_attention(model, ())
        forms = f" ({others[0].site} and {len(others) - 1} more: {others[0].reason})" if others else ""
        raise NoAttentionError(
            f"{type(model).__name__} has no attention that a plan could act on{detail}{forms}. Plans work on models "
            "with self- or joint softmax attention"
        )
    records = tuple(record for analysed in models for record in limits(analysed))
    records += other_attention(model, [site.path for site in sites])
    infos = tuple(site.info for analysed in models for site in analysed.sites)
    blocks = tuple(block.info for analysed in models for block in analysed.blocks)
    refused = tuple(record for analysed in models for record in block_limits(analysed))
    return ModelInspection(model, sites, infos, records, models[0].sample, blocks, refused)


def first_call(pipe: Any, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which a pipeline first calls its transformer; the pipeline is stopped there."""

    from difa_compile.pipeline.wiring import unwired

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Stop(args, kwargs)

    call = dict(inputs)
    if "num_inference_steps" in signatures.signature(type(pipe).__call__).parameters:
        call.setdefault("num_inference_steps", 2)
    handle = model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with unwired():  # the pipeline may carry a plan
            pipe(**call)
    except _Stop as found:
        return found.call_args, dict(found.call_kwargs)
    finally:
        handle.remove()
    raise NoAttentionError(f"{type(pipe).__name__} returned without calling its transformer")


def other_attention(model: nn.Module, found: Sequence[str]) -> tuple[Record, ...]:
    """Modules that are attention by name, but in which no softmax attention was found."""
    places = {path.split("#")[0] for path in found}
    records: list[Record] = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if not re.search(r"attn|attention", kind, re.IGNORECASE) or any(
            n.startswith(f"{name}.") or n == name for n in places
        ):
            continue
        if records and name.startswith(f"{records[-1].site}."):
            continue  # said of the module around it
        if any(name.startswith(f"{place}.") for place in places):
            continue
        reason = f"{kind} holds no softmax attention call that ran (linear attention, or another form); left alone"
        records.append(Record(name, "any", "skipped", reason))
    return tuple(records)


def trace_rewrites(analysed: AnalysedModel, trace: Trace) -> None:
    """Write what each example decision makes of the whole graph, at all sites that can take it."""
    heads = max(site.info.heads for site in analysed.sites)
    for number, decision in enumerate(examples(heads)):
        here = [examples(site.info.heads)[number] for site in analysed.sites]
        roles = [Role(one if analysed.why_not(i, one) is None else FULL) for i, one in enumerate(here)]
        if not decision.is_full:
            rewrite(analysed.canonical, analysed.sites, roles, analysed.context, trace=trace.variant(str(decision)))


def limits(analysed: AnalysedModel) -> tuple[Record, ...]:
    """What can't be done at the sites of a model, whatever the plan."""
    records = [
        Record(site.path, "any", "skipped", "cross-attention is left alone")
        for site in analysed.all_sites
        if not site.rewritable
    ]
    for index, site in enumerate(analysed.sites):
        said: set[tuple[bool, str]] = set()
        for decision in examples(site.info.heads):
            reason = analysed.why_not(index, decision)
            if reason is not None and (bool(decision.windows), reason) not in said:  # of all windows alike
                said.add((bool(decision.windows), reason))
                records.append(Record(site.path, str(decision.kind), "skipped", reason))
    return tuple(records)


def block_limits(analysed: AnalysedModel) -> tuple[Record, ...]:
    """The blocks of a model that can't be left out as a whole, and why."""
    records = [Record(path, "any", "skipped", reason) for path, reason in analysed.refused_blocks]
    for index, block in enumerate(analysed.blocks, start=len(analysed.sites)):
        for decision in examples(block.info.heads):
            reason = None if decision.windows else analysed.why_not(index, decision)
            if reason is not None:
                records.append(Record(block.path, str(decision.kind), "skipped", reason))
    return tuple(records)
