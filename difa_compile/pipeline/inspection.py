"""Look into a model without changing it: which attention sites it has, where their tokens stand, what can't be done."""

from __future__ import annotations

import inspect as signatures
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import fx, nn

from difa_compile.backend.dynamo_answers import answering
from difa_compile.backend.graph_breaks import why_not_whole
from difa_compile.backend.verdicts import Record
from difa_compile.decision import Decision, Kind, Window, WindowShape
from difa_compile.errors import DifaError, NoAttentionError, UnsupportedModelError
from difa_compile.layout import Layout
from difa_compile.passes.analysed_model import AnalysedModel
from difa_compile.passes.order import analyse
from difa_compile.passes.site import Site
from difa_compile.pipeline.module_hooks import call_in_hooks, check_hooks, inner_forward
from difa_compile.plan.data import SiteInfo


@dataclass(frozen=True)
class ModelInspection:
    """What was found in a model.

    ``sites``: every attention call, cross-attention included, in execution order. ``site_infos``: those a plan can act
    on. ``records``: for each site what is left alone and why, in general (reuse, windows) rather than for a plan.
    ``graphs``: how many graphs Dynamo made; one is the rule. ``sample``: sizes of the noisy sample behind its first
    dimension (:class:`AnalysedModel`).
    """

    model: nn.Module
    sites: tuple[Site, ...]
    site_infos: tuple[SiteInfo, ...]
    records: tuple[Record, ...]
    graphs: int
    sample: tuple[int, ...] | None = None


class _Stop(Exception):
    """Raised inside a pipeline once the transformer's arguments are known."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.call_args = args
        self.call_kwargs = kwargs


def inspect_model(
    model_or_pipe: Any, inputs: Mapping[str, Any] | None = None, *, layout: Layout | None = None
) -> ModelInspection:
    """Capture a model once and report its attention sites.

    Args:
        model_or_pipe: a diffusers pipeline with a transformer, or a module.
        inputs: keyword arguments of one call of the pipeline or the module; by default the smallest call that can be
            made up from the pipeline's signature or the model's config.
        layout: the token layout, where the graph does not show it.

    Raises:
        NoAttentionError: the model has no attention that a plan could act on.
        UnsupportedModelError: the model cannot be captured as one graph.
        UnsupportedPipelineError, ModelLoadError: no transformer, or hooks between its layers
            (:func:`difa_compile.pipeline.module_hooks.check_hooks`), or no inputs could be made up for it.
    """
    from torch._dynamo.exc import Unsupported, UserError

    from difa_compile.pipeline.apply import find_transformer
    from difa_compile.pipeline.example_inputs import example_inputs, pipeline_inputs

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
            models.append(analyse(module, example, layout=layout))
        except DifaError as error:
            failures.append(error)
        return module.forward

    def attempt(**settings: Any) -> None:
        nonlocal graphs
        models.clear()
        failures.clear()
        graphs = 0
        with torch.no_grad():
            compiled = torch.compile(private_forward(model), backend=collect, dynamic=False, **settings)
            call_in_hooks(model, compiled, args, kwargs)

    training = model.training
    model.eval()
    try:
        for _ in range(2):  # some models fill tables in their first call, which breaks the graph
            attempt()
            if graphs == 1:
                break
        else:
            try:
                with answering():
                    attempt(fullgraph=True)
            except (Unsupported, UserError) as failure:
                raise UnsupportedModelError(
                    f"{type(model).__name__} cannot be captured as one graph: {why_not_whole(failure)}; a plan needs "
                    "the whole model in one graph"
                ) from failure
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
    return ModelInspection(model, sites, infos, records, graphs, models[0].sample)


def private_forward(model: nn.Module) -> Callable[..., Any]:
    """The model's forward on a code object of its own: what Dynamo caches for it neither counts against the model's
    recompile limit nor outlives the inspection. Without a hook that accelerate put around it."""
    forward = inner_forward(model)
    plain = getattr(forward, "__func__", None)
    if plain is None:
        return forward
    copied = FunctionType(
        plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
    )
    copied.__kwdefaults__ = plain.__kwdefaults__
    return MethodType(copied, model)


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


def limits(analysed: AnalysedModel) -> tuple[Record, ...]:
    """What can't be done at the sites of a model, whatever the plan."""
    records = [
        Record(site.path, "any", "skipped", "cross-attention is left alone")
        for site in analysed.all_sites
        if not site.rewritable
    ]
    for index, site in enumerate(analysed.sites):
        for decision in (Decision(Kind.REUSE), Decision(Kind.WINDOW, Window(WindowShape.BAND, 1))):
            reason = analysed.why_not(index, decision)
            if reason is not None:
                records.append(Record(site.path, str(decision.kind), "skipped", reason))
    return tuple(records)
