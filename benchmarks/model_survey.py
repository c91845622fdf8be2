"""Which diffusion transformers can be planned: every transformer class of diffusers, tiny, every decision compared.

Each class is built with random weights (:mod:`benchmarks.zoo`), captured, and run for two steps: the first in full, the
second, on other inputs, with one decision at every site that admits it. The result is compared with the very same
model run eagerly, in which the k-th attention call is altered by hand (:class:`Altered`), without any of the passes.

Then once more with all blocks reused, and with spans of blocks reused, compared with the model in which the block
modules' outputs are altered by hand (:class:`LeftOut`).

A figure in the table is the largest difference, relative to the largest value of the output; ``exact`` is equality to
the bit. Where no site admits a decision there is none, and ``reason`` says why.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from benchmarks._common import RESULTS, Row, write_result
from benchmarks.zoo.check import call, shifted
from benchmarks.zoo.registry import Example, build, reasons, registered
from difa_compile.backend.capture import Capture
from difa_compile.backend.dynamo_answers import answering
from difa_compile.backend.entry import eager
from difa_compile.backend.graph_breaks import why_not_whole
from difa_compile.decision import FULL, REUSE, Decision, Kind, Window, WindowShape
from difa_compile.errors import DifaError
from difa_compile.layout import Layout
from difa_compile.ops.reference import attention, visible
from difa_compile.passes.analyse.find_attention import attention_inputs
from difa_compile.passes.caches import CacheName
from difa_compile.passes.graph import is_attention, op_name, tensor_of
from difa_compile.passes.order import analyse
from difa_compile.passes.site import Site
from difa_compile.passes.variant import Context
from difa_compile.plan.data import blocks_of
from difa_compile.plan.schedule import Role, assign_roles

BAND = Window(WindowShape.BAND, 3)
DECISIONS: dict[str, Decision] = {
    "reuse": REUSE,
    "cfg": Decision(Kind.FULL, None, cfg_shared=True),
    "window": Decision(Kind.WINDOW, BAND),
    "window_residual": Decision(Kind.WINDOW_RESIDUAL, BAND),
    "disc": Decision(Kind.WINDOW, Window(WindowShape.DISC, 2)),
}
CONDITIONAL_HALF = 1
BLOCKS = ("block_reuse", "span_reuse")
"""Columns of decisions on whole blocks."""
CALL = "survey_call"
"""Key of a node's number among the attention calls, in the order of execution."""


class Planned:
    """A compile backend that runs one capture with ``decision`` at every site that admits it."""

    def __init__(self) -> None:
        self.captures: list[Capture] = []
        self.graphs = 0
        self.refusal = ""
        self.calls = 0
        self.start(FULL)

    def start(self, decision: Decision, units: Sequence[int] = ()) -> None:
        """Two steps with this decision, at all sites or at these units: the next calls are the first step, until
        ``first`` is set to False."""
        self.decision = decision
        self.units = units
        self.first = True
        self.caches: dict[CacheName, Tensor] = {}

    def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        self.graphs += 1
        calls = [n for n in module.graph.nodes if is_attention(n) or op_name(n) == "multi_head_attention_forward"]
        for number, node in enumerate(calls):
            node.meta[CALL] = number
        self.calls = len(calls)
        try:
            capture = Capture(analyse(module, example_inputs, Context(CONDITIONAL_HALF)), eager)
        except DifaError as error:
            self.refusal = str(error)
            return module.forward
        self.captures.append(capture)

        def run(*args: Any) -> Any:
            outputs, written = capture.execute(args, self.roles(capture), self.caches)
            self.caches = {**self.caches, **written}
            return outputs

        return run

    def roles(self, capture: Capture) -> list[Role]:
        """Step 0: full, filling what step 1 reads. Step 1: the decision, where it can be carried out."""
        if self.units:
            every = capture.model.units
            row = [self.decision if i in self.units else FULL for i in range(len(every))]
            return list(
                assign_roles([[FULL] * len(row), row], blocks_of([unit.info for unit in every]))[not self.first]
            )
        if not self.first:
            return [Role(capture.verdicts.effective(site, self.decision)) for site in range(len(capture.model.sites))]
        kind = self.decision.kind
        found = []
        for site in range(len(capture.model.sites)):
            able = capture.model.why_not(site, self.decision) is None
            residual = BAND if able and kind is Kind.WINDOW_RESIDUAL else None
            reused = able and kind is Kind.REUSE
            found.append(Role(FULL, emit_output=reused, emit_residual=residual is not None, residual_window=residual))
        return found


class Altered:
    """The model run eagerly, with attention call k changed to ``decisions[k]`` in the second of two steps."""

    def __init__(self, decisions: Mapping[int, tuple[Decision, Layout | None]]) -> None:
        self.decisions = decisions
        self.kept: dict[int, Tensor] = {}
        self.calls: Callable[[], int] = lambda: 0
        """How many calls the step in progress has made."""

    @contextmanager
    def step(self, first: bool) -> Iterator[None]:
        plain = F.scaled_dot_product_attention
        count = 0

        def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal count
            number, count = count, count + 1
            options = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)), **kwargs}
            decision, layout = self.decisions.get(number, (FULL, None))
            if decision == FULL:
                return plain(query, key, value, **options)
            if decision.kind is Kind.REUSE:
                if first:
                    self.kept[number] = plain(query, key, value, **options)
                return self.kept[number]
            if decision.kind is Kind.FULL:
                return plain(query, key, value, **options) if first else halved(plain, query, key, value, options)
            if first and decision.kind is Kind.WINDOW:
                return plain(query, key, value, **options)
            assert decision.window is not None
            assert layout is not None
            near = windowed(query, key, value, options, layout, decision.window)
            if decision.kind is Kind.WINDOW:
                return near
            if first:
                full = plain(query, key, value, **options)
                self.kept[number] = full - near
                return full
            return near + self.kept[number]

        plain_flex = flex.flex_attention

        def attend_flex(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal plain
            kept, plain = plain, lambda q, k, v, **options: plain_flex(q, k, v, *args, **{**kwargs, **options})
            try:
                return attend(query, key, value, **({"scale": kwargs["scale"]} if "scale" in kwargs else {}))
            finally:
                plain = kept

        self.calls = lambda: count
        F.scaled_dot_product_attention = attend
        flex.flex_attention = attend_flex
        try:
            yield
        finally:
            F.scaled_dot_product_attention = plain
            flex.flex_attention = plain_flex


class LeftOut:
    """The model run eagerly, with blocks left out by hand in the second of two steps.

    ``spans``: the paths of the blocks of each run that is left out, one path for a single block. Of what the last block
    returns each tensor becomes the one of its shape that went into the first, plus what their difference was in the
    first step.
    """

    def __init__(self, model: nn.Module, spans: Sequence[Sequence[str]]) -> None:
        self.ends = [(model.get_submodule(paths[0]), model.get_submodule(paths[-1])) for paths in spans]
        self.kept: dict[tuple[int, int], Tensor] = {}

    @contextmanager
    def step(self, first: bool) -> Iterator[None]:
        hooks = []
        for number, (begin, end) in enumerate(self.ends):
            given: list[Tensor] = []

            def enter(_: nn.Module, args: Any, kwargs: Any, given: list[Tensor] = given) -> None:
                values = pytree.tree_leaves((kwargs, args) if "hidden_states" in kwargs else (args, kwargs))
                given[:] = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]

            def leave(_: nn.Module, __: Any, result: Any, number: int = number, given: list[Tensor] = given) -> Any:
                leaves, form = pytree.tree_flatten(result)
                for i, made in enumerate(leaves):
                    alike = [
                        x for x in given if isinstance(made, Tensor) and (x.shape, x.dtype) == (made.shape, made.dtype)
                    ]
                    if alike and first:
                        self.kept[number, i] = made - alike[0]
                    elif alike:
                        leaves[i] = alike[0] + self.kept[number, i]
                return pytree.tree_unflatten(leaves, form)

            hooks.append(begin.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(end.register_forward_hook(leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def halved(plain: Any, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Attention of the conditional half, twice."""
    size = query.shape[0] // 2

    def half(part: Tensor) -> Tensor:
        return part.narrow(0, CONDITIONAL_HALF * size, size)

    mask = options.get("attn_mask")
    if mask is not None and mask.ndim == 4 and mask.shape[0] == query.shape[0]:
        options = {**options, "attn_mask": half(mask)}
    one = plain(half(query), half(key), half(value), **options)
    return torch.cat([one, one])


def windowed(
    query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any], layout: Layout, window: Window
) -> Tensor:
    """Attention under the window's mask and the model's own."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    mask, near = options.get("attn_mask"), visible(layout, window)
    if query.shape[2] < key.shape[2]:  # the tokens before the image are keys only, those after it may be
        near = near[layout.before : layout.before + query.shape[2]]
    if mask is not None:
        near = near & mask if mask.dtype == torch.bool else mask.masked_fill(~near, float("-inf"))
    return attention(query, key, value, near, options.get("scale"))


def survey(name: str) -> Row:
    """One row of the table."""
    row: Row = {"class": name, "captured": False, "graphs": 0, "sites": 0, "other_attention": 0, "layout": ""}
    row |= dict.fromkeys(DECISIONS) | {"blocks": "", "streams": "", "spans": ""} | dict.fromkeys(BLOCKS)
    example = build(name)
    backend = Planned()
    torch._dynamo.reset()
    compiled = torch.compile(example.model, backend=backend, fullgraph=True, dynamic=False)
    try:
        with torch.no_grad():
            call(example)  # some classes fill tables in their first call, in ways that cannot be captured
            with answering():
                call(example, compiled)
    except Exception as error:
        return row | {"graphs": backend.graphs, "reason": f"not captured: {why_not_whole(error)}"}
    row |= {"captured": True, "graphs": backend.graphs}
    if not backend.captures:
        return row | {"reason": backend.refusal}
    capture = backend.captures[0]
    row["sites"] = len(capture.model.sites)
    row["other_attention"] = len(capture.model.all_sites) - len(capture.model.sites)
    layouts = Counter(str(site.layout) for site in capture.model.sites if site.layout is not None)
    row["layout"] = ", ".join(layouts)
    why: dict[str, list[str]] = {}
    row["dtype"] = ", ".join(sorted({str(dtype_of(site)).removeprefix("torch.") for site in capture.model.sites}))
    row |= survey_blocks(example, compiled, backend, why)
    if any(CALL not in site.region.attention.meta for site in capture.model.sites):
        form = "attention is written out in products, which this survey does not alter"
        why[f"{form}; tests/passes/test_canonical.py compares such forms"] = list(DECISIONS)
        return row | {"reason": told(why)}
    for column, decision in DECISIONS.items():
        refused = [
            reason
            for i in range(len(capture.model.sites))
            if (reason := capture.model.why_not(i, decision)) is not None
        ]
        for reason, count in Counter(refused).items():
            which = "" if count == len(capture.model.sites) else f"{count} of {len(capture.model.sites)} sites: "
            why.setdefault(which + reason, []).append(column)
        if len(refused) < len(capture.model.sites):
            row[column] = compare(example, compiled, backend, decision, by_hand(capture, decision))
    return row | {"reason": told(why)}


def told(why: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{', '.join(columns)}: {reason}" for reason, columns in why.items())


def survey_blocks(example: Example, compiled: Any, backend: Planned, why: dict[str, list[str]]) -> Row:
    """What of a row is about whole blocks; reasons go into ``why``."""
    model = backend.captures[0].model
    units = dict(enumerate(model.blocks, start=len(model.sites)))
    refusals = {block.path: model.why_not(i, REUSE) for i, block in units.items()}
    able = {i: block for i, block in units.items() if refusals[block.path] is None}
    blocks = [i for i, block in able.items() if not block.blocks]
    spans = [i for i, block in able.items() if block.blocks]
    for path, reason in (*model.refused_blocks, *refusals.items()):
        if reason is not None:
            column = BLOCKS[".." in path]
            why.setdefault(f"{path}: {reason}", []).append(column)
    if not any(".." in path for path in (*refusals, *dict(model.refused_blocks))):
        why["there are no two blocks to span"] = [BLOCKS[1]]
    every = {path for path, _ in model.refused_blocks if ".." not in path}
    every |= {block.path for block in units.values() if not block.blocks}
    row: Row = {"blocks": f"{len(blocks)} of {len(every)}"}
    row["streams"] = ", ".join(str(len(able[i].region.outputs)) for i in blocks)
    row["spans"] = ", ".join(str(len(able[i].blocks)) for i in spans)
    for column, chosen in zip(BLOCKS, (blocks, spans), strict=True):
        if chosen:
            left_out = LeftOut(example.model, [able[i].blocks or (able[i].path,) for i in chosen])
            row[column] = compare(example, compiled, backend, REUSE, left_out, chosen)
    return row


def dtype_of(site: Site) -> torch.dtype:
    value = tensor_of(attention_inputs(site.region.attention)[0])
    assert value is not None
    return value.dtype


def by_hand(capture: Capture, decision: Decision) -> Altered:
    """The model with a decision at every site that admits it."""
    return Altered(
        {
            site.region.attention.meta[CALL]: (decision, site.layout)
            for i, site in enumerate(capture.model.sites)
            if capture.model.why_not(i, decision) is None
        }
    )


def compare(
    example: Example,
    compiled: Any,
    backend: Planned,
    decision: Decision,
    altered: Altered | LeftOut,
    units: Sequence[int] = (),
) -> str | float:
    """Planned, at all sites or at these units, against altered by hand: ``"exact"`` or the error figure."""
    moved = Example(example.model, {**example.inputs, example.latent: shifted(example)}, example.latent)
    backend.start(decision, units)
    with torch.no_grad():
        full = call(moved)
        call(example, compiled)
        backend.first = False
        found = call(moved, compiled)
        with altered.step(first=True):
            call(example)
        with altered.step(first=False):
            wanted = call(moved)
            made = altered.calls() if isinstance(altered, Altered) else backend.calls
    if made != backend.calls:
        raise RuntimeError(f"the graph has {backend.calls} attention calls, the model makes {made}")
    if backend.graphs != 1:
        raise RuntimeError(f"captured {backend.graphs} times: the second step was compiled anew")
    if all(torch.equal(a, b) for a, b in zip(full, wanted, strict=True)):
        raise RuntimeError(f"{decision} changes nothing: the comparison could not fail")
    if all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)):
        return "exact"
    if not all(torch.isfinite(value).all() for value in (*found, *wanted)):
        raise RuntimeError(f"{decision} gives values that are not finite")
    scale = max(float(value.abs().max()) for value in wanted)
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) / scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="*", help="only these, printed and not written")
    parser.add_argument("--output", default=RESULTS, type=type(RESULTS), help="folder of the result file")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for name in arguments.classes or registered():
        started = time.perf_counter()
        try:
            rows.append(survey(name))
        except Exception as error:  # a row must not cost the others
            rows.append({"class": name, "reason": f"survey failed: {type(error).__name__}: {error}"})
        print(f"{time.perf_counter() - started:5.1f} s  {rows[-1]}", flush=True)
        gc.collect()
    if not arguments.classes:
        rows += [{"class": name, "captured": False, "reason": reason} for name, reason in reasons().items()]
        write_result("model_survey", sorted(rows, key=lambda row: str(row["class"])), folder=arguments.output)


if __name__ == "__main__":
    main()
