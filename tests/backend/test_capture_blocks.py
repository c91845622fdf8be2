"""Blocks and spans left out of a captured graph, against the model with the same blocks left out by hand."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch.overrides import TorchFunctionMode

from difa_compile.backend.entry import eager
from difa_compile.backend.stitch import source_of
from difa_compile.decision import FULL, REUSE, Decision, Window
from difa_compile.errors import PlanMismatchError, SiteSkippedError, SitesMismatchError
from difa_compile.passes.caches import CacheName, renew
from difa_compile.passes.order import rewrite
from difa_compile.plan.data import blocks_of
from difa_compile.plan.schedule import FULL_ROLE, Role, assign_roles
from tests.support.altered import Altered
from tests.support.captures import capture_of
from tests.support.left_out import LeftOut
from tests.support.tiny_models import (
    ATTENTIONS,
    FAMILIES,
    at_step,
    captured,
    captured_plain,
    family_capture,
    plan_of,
    with_inputs,
)

pytest.importorskip("diffusers")

EXACT = 3e-6
"""Relative to the largest output: float32 rounding of window attention computed by another kernel."""
WINDOW = "band:3"
SCHEDULE = (
    ("F F", "F", "F F"),
    ("F F", "F", "heads(0:full;1:W) F"),
    ("reuse reuse", "F", "F F"),
    ("F F", "reuse", "F F"),
    ("F reuse", "F", "heads(0:W+residual;1:reuse)+cfg F"),
    ("forecast:1 forecast:1", "F", "F F"),
    ("F F", "forecast:1", "F F"),
    ("reuse F", "F", "F reuse"),
    ("F forecast:1", "F", "full+cfg F"),
    ("F F", "F", "reuse+cfg heads(0:W+residual;1:full)"),
    ("F F", "F", "W+residual heads(0:reuse;1:W+residual)+cfg"),
)
"""By step what the even and the odd blocks do, their span, and the even and the odd attention sites. A site whose block
is left out has no say, nor a block whose span is; heads read what they left before their blocks were left out."""


def decision(text):
    return FULL if text == "F" else Decision.parse(text.replace("W", f"window({WINDOW})"))


def units_of(model):
    """Numbers of the blocks and of the span among a model's units, after the attention sites'."""
    blocks = [i for i, unit in enumerate(model.units) if unit.info.is_block and not unit.info.blocks]
    (span,) = [i for i, unit in enumerate(model.units) if unit.info.blocks]
    return blocks, span


def rows_of(model):
    """The schedule above for the units of a model."""
    held = blocks_of([unit.info for unit in model.units])
    blocks, span = units_of(model)
    rows = []
    for block_texts, span_text, site_texts in SCHEDULE:
        row = [decision(site_texts.split()[i % 2]) for i in range(len(model.sites))]
        row += [decision(block_texts.split()[i % 2]) for i in range(len(blocks))] + [decision(span_text)]
        for i in (*blocks, *range(len(model.sites))):
            if row[held[i]].kind.reads == "output" or row[span].kind.reads == "output":
                row[i] = FULL
        rows.append(row)
    return rows, held


class Linears(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") == "linear"
        return func(*args, **(kwargs or {}))


def linears(run):
    with torch.no_grad(), Linears() as counted:
        run()
    return counted.count


def linears_of(module, run):
    """How many linears a module makes in a run of the model that it is part of."""
    before, counts = [], []
    hooks = [
        module.register_forward_pre_hook(lambda *_: before.append(mode.count)),
        module.register_forward_hook(lambda *_: counts.append(mode.count - before[-1])),
    ]
    try:
        with torch.no_grad(), Linears() as mode:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counts)


def weights_by_hand(step, computed):
    """Of a line through the outputs of two steps, evenly spaced ones."""
    old, new = computed[-2:]
    ahead = (step - new) / (new - old)
    return torch.tensor([1 + ahead, -ahead])


def difference(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


SOME = [pytest.param(family, marks=[] if family == "sd3" else pytest.mark.slow) for family in FAMILIES]


@cache
def capture_and_values(family):
    """Shared; tests that look at what it has compiled make one of their own."""
    return family_capture(family, conditional_half=0)


@cache
def plain_capture():
    _, _, module, values = captured_plain()
    return capture_of(module, values, eager), module, values


@pytest.mark.parametrize("family", SOME)
def test_what_is_left_out_by_plan_and_by_hand(family):
    """Blocks and spans, reused and forecast, beside attention that is reused, windowed and decided by heads in blocks
    that run; in segments and, to the bit, in the whole graph. Of what is left out no linear remains."""
    model, inputs, _, _ = captured(family)
    capture, _ = capture_and_values(family)
    analysed = capture.model
    rows, held = rows_of(analysed)
    blocks, span = units_of(analysed)
    units = analysed.units
    attentions = [name for name, _ in model.named_modules() if ATTENTIONS[family](name)]
    layouts = [site.layout for site in analysed.sites]
    altered = Altered(model, attentions, layouts, 0, Window.parse(WINDOW))
    left_out = LeftOut(model, [units[i].path for i in (*blocks, span)], units[span].blocks)
    computed = {i: [] for i in (*blocks, span)}
    caches, whole = {}, {}
    counts = []
    for step, roles in enumerate(assign_roles(rows, held)):
        now = at_step(inputs, step)
        args = with_inputs(family, now)
        weights = {
            CacheName.weights(units[i].path): weights_by_hand(step, computed[i])
            for i in computed
            if roles[i].decision.order
        }
        read = {**caches, **weights}
        outputs, written = capture.execute(args, roles, read)
        with left_out.step(rows[step][len(analysed.sites) :], step, 0.0):
            wanted = altered(rows[step][: len(analysed.sites)], now)
        assert difference(outputs[0], wanted) <= EXACT, f"step {step}: {[str(role) for role in roles]}"
        if any(each != FULL for each in rows[step]):
            with torch.no_grad():
                assert difference(model(**now)[0], wanted) > 1e-3, f"step {step} would pass with nothing left out"
        again, rewritten = capture.execute(args, roles, read)
        assert torch.equal(again[0], outputs[0])
        assert all(torch.equal(rewritten[name], value) for name, value in written.items())

        variant = rewrite(analysed.canonical, units, roles, analysed.context)
        with torch.no_grad():
            results = variant.module(*args, *[{**whole, **weights}[name] for name in variant.cache_inputs])
        cut = len(results) - len(variant.cache_outputs)
        made = dict(zip(variant.cache_outputs, results[cut:], strict=True))
        assert torch.equal(results[0], outputs[0]), f"step {step}"
        assert made.keys() == written.keys()
        assert all(torch.equal(made[name], value) for name, value in written.items())
        counts.append(linears(lambda roles=roles, args=args, read=read: capture.execute(args, roles, read)))
        renew(caches, written)
        renew(whole, made)
        for i in computed:
            if not roles[i].covered and roles[i].decision == FULL:
                computed[i].append(step)

    full = linears(lambda: model(**inputs))
    in_blocks = sum(linears_of(model.get_submodule(units[i].path), lambda: model(**inputs)) for i in blocks)
    assert 0 < in_blocks < full
    assert counts[:2] == [full, full]
    assert counts[2] == counts[3] == counts[5] == counts[6] == full - in_blocks
    in_even = sum(linears_of(model.get_submodule(units[i].path), lambda: model(**inputs)) for i in blocks[::2])
    assert counts[7] + in_even < full, "of the odd blocks attention is reused"
    assert counts[8] == full - in_blocks + in_even


@pytest.mark.parametrize("family", SOME)
def test_full_blocks_and_spans_are_the_unmodified_model_to_the_bit(family):
    model, inputs, _, _ = captured(family)
    capture, values = capture_and_values(family)
    with torch.no_grad():
        wanted = model(**inputs)[0]
    sites, units = len(capture.model.sites), len(capture.model.units)
    for roles in ([FULL_ROLE] * units, [FULL_ROLE] * sites + [Role(FULL, emit_output=True)] * (units - sites)):
        outputs, written = capture.execute(values, roles, {})
        assert torch.equal(outputs[0], wanted)
        assert len(written) == sum(
            len(unit.region.outputs) for unit, role in zip(capture.model.units, roles, strict=True) if role.emit_output
        )
    assert torch.equal(capture.full()(values, {})[0][0], wanted)


@pytest.fixture
def spanned():
    """A capture of two layers, the numbers of its units, and the caches of a first step that writes all that blocks and
    span add."""
    _, _, module, values = captured_plain()
    capture = capture_of(module, values, eager)
    blocks, span = units_of(capture.model)
    roles = [FULL_ROLE] * 2 + [Role(FULL, emit_output=True)] * 3
    _, caches = capture.execute(values, roles, {})
    return capture, values, blocks, span, caches


def reused(capture, *units):
    held = blocks_of([unit.info for unit in capture.model.units])
    row = [REUSE if i in units else FULL for i in range(len(capture.model.units))]
    return assign_roles([[FULL] * len(row), row], held)[1]


def test_a_gate_runs_where_its_span_writes_or_is_left_out_and_nothing_else_hands_on(spanned):
    capture, values, blocks, span, caches = spanned
    gate = capture.model.split.segments[capture.model.segment_of(span)]
    assert gate.spanned == tuple(capture.model.segment_of(i) for i in blocks)
    built = capture.compiled_variants
    capture.execute(values, reused(capture, blocks[0]), caches)
    assert capture.compiled_variants == built + 2, "one for a block that is left out, one for a block that is not"
    capture.execute(values, reused(capture, blocks[1]), caches)
    assert capture.compiled_variants == built + 2, "equal blocks share them"
    capture.execute(values, reused(capture, span), caches)
    assert capture.compiled_variants == built + 3


def test_the_segments_of_a_span_that_is_left_out_are_not_run(spanned):
    capture, values, _, span, caches = spanned
    roles = reused(capture, span)
    first, _ = capture.execute(values, roles, caches)
    gate = capture.model.split.segments[capture.model.segment_of(span)]

    def fail(*_):
        raise AssertionError("a segment of the span is run")

    for index in gate.spanned:
        segment = capture.model.split.segments[index]
        for key, variant in list(capture._compiled.items()):
            if key[0] == segment.structure:
                object.__setattr__(variant, "run", fail)
    again, written = capture.execute(values, roles, caches)
    assert written == {}
    assert torch.equal(first[0], again[0])
    capture._rows.clear()
    assert torch.equal(capture.execute(values, roles, caches)[0][0], first[0])


def test_values_are_let_go_after_the_last_segment_that_a_row_runs(spanned):
    """As soon as no segment that runs reads them: a stream that only the gate of a span would read, what only the span
    would."""
    capture, values, blocks, span, caches = spanned
    for roles in (reused(capture, blocks[0]), reused(capture, span), reused(capture), reused(capture, *blocks)):
        capture.advance(capture.begin(values), roles, caches)
        whole = capture.whole(roles)
        out = capture._left_out(whole)
        split = capture.model.split
        links = [None if i in out else capture._link(i, whole) for i in range(len(split.segments))]
        lines = source_of(split, links).splitlines()
        made = {
            number for segment, link in zip(split.segments, links, strict=True) if link for number in segment.outputs
        }
        gone = [name.strip(",") for line in lines if line.strip().startswith("del ") for name in line.split()[1:]]
        assert sorted(gone) == sorted(f"v{number}" for number in made if number not in split.results)
        for line, after in pairwise(lines):
            if after.strip().startswith("del "):
                for name in after.split()[1:]:
                    assert name.strip(",") in line.replace("(", " ").replace(")", " ").replace(",", " ").split()
        state = capture.advance(capture.begin(values), roles, caches)
        kept = {number for number in made if state.values[number] is not None}
        assert kept <= set(split.results) | {n for s in split.segments if s.spanned for n in s.outputs}


@pytest.mark.parametrize("which", ["block", "span"])
def test_outputs_and_caches_are_copied_where_memory_is_overwritten(which):
    """As under CUDA graphs: what compiled segments return is overwritten in the next call of the model."""
    plain, module, values = plain_capture()
    pools = []

    def overwriting(graph, inputs):
        run = eager(graph, inputs)
        pools.append(pool := {})

        def again(*args):
            results = run(*args)
            for i, value in enumerate(results):
                pool.setdefault(i, torch.empty_like(value)).copy_(value)
            return [pool[i] for i in range(len(results))]

        return again

    capture = capture_of(module, values, overwriting, overwrites=True)
    blocks, span = units_of(capture.model)
    chosen = blocks if which == "block" else [span]
    emitting = [FULL_ROLE] * len(capture.model.units)
    for i in chosen:
        emitting[i] = Role(FULL, emit_output=True)
    leaving = reused(capture, *chosen)
    moved = [value + 0.1 if i == 0 else value for i, value in enumerate(values)]
    wanted, wanted_caches = plain.execute(values, emitting, {})
    left, _ = plain.execute(values, leaving, wanted_caches)
    for _ in range(2):
        outputs, caches = capture.execute(values, emitting, {})
        for pool in pools:
            for value in pool.values():
                value.fill_(float("nan"))
        assert torch.equal(outputs[0], wanted[0])
        assert all(torch.equal(caches[name], value) for name, value in wanted_caches.items())
        outputs, _ = capture.execute(values, leaving, caches)
        for pool in pools:
            for value in pool.values():
                value.fill_(float("nan"))
        assert torch.equal(outputs[0], left[0])
    assert not torch.equal(plain.execute(moved, leaving, wanted_caches)[0][0], left[0])


# Plans that name blocks


def plain_plan_of(rows, choose=lambda info: True, change=lambda infos: infos):
    """A plan for the plain model: ``rows[step]`` by path the decisions that are not full."""
    model = captured_plain()[0]
    capture, module, values = plain_capture()
    infos = [unit.info for unit in capture.model.units if not unit.info.is_block or choose(unit.info)]
    infos = change(infos)
    cells = [[row.get(info.path, FULL) for info in infos] for row in rows]
    return plan_of(model, infos, cells), module, values


def executed(plan, module, values, **options):
    capture = capture_of(module, values, eager, plan=plan, **options)
    caches, outputs = {}, None
    effective = capture.verdicts.effective
    rows = [[effective(i, decision) for i, decision in enumerate(row)] for row in plan.decisions]
    for roles in assign_roles(rows, plan.blocks):
        outputs, written = capture.execute(values, roles, caches)
        renew(caches, written)
    return capture, outputs[0]


@pytest.mark.parametrize(
    ("paths", "choose"),
    [
        (["layers.0..layers.1"], lambda info: info.blocks),
        (["layers.1"], lambda info: info.path == "layers.1"),
        (["layers.0"], lambda info: not info.blocks),
    ],
)
def test_a_plan_names_the_blocks_that_it_likes(paths, choose):
    plan, module, values = plain_plan_of([{}, dict.fromkeys(paths, REUSE)], choose)
    capture, output = executed(plan, module, values)
    assert [capture.model.units[i].path for i in capture.units] == [site.path for site in plan.sites]
    every = {unit.path: i for i, unit in enumerate(capture.model.units)}
    caches = capture.execute(values, [FULL_ROLE] * 2 + [Role(FULL, emit_output=True)] * 3, {})[1]
    wanted, _ = capture.execute(values, reused(capture, *[every[path] for path in paths]), caches)
    assert torch.equal(output, wanted[0])
    told = {(record.site, record.decision): record.outcome for record in capture.verdicts.records}
    assert all(told[path, "reuse"] == "rewritten" for path in paths)


def test_blocks_that_the_model_lacks_or_that_run_in_another_order_are_refused():
    plan, module, values = plain_plan_of([{}])
    other = replace(plan, sites=(*plan.sites[:2], replace(plan.sites[2], path="layers.7"), *plan.sites[3:]))
    with pytest.raises(SitesMismatchError, match=r"not in the model: layers\.7"):
        capture_of(module, values, eager, plan=other)
    turned = replace(plan, sites=(*plan.sites[:2], plan.sites[3], plan.sites[2], plan.sites[4]))
    with pytest.raises(PlanMismatchError, match="the sites run in another order"):
        capture_of(module, values, eager, plan=turned)
    lesser = replace(plan.sites[4], blocks=("layers.0",))
    with pytest.raises(PlanMismatchError, match=r"made for span of 1 blocks.*here it is span of 2 blocks"):
        capture_of(module, values, eager, plan=replace(plan, sites=(*plan.sites[:4], lesser)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("full+cfg", "the halves of a whole block are not shared; decide so for its attention"),
        ("window(band:2)", "a whole block has no window; decide so for its attention"),
    ],
)
def test_a_block_is_not_shared_and_has_no_window(text, reason):
    rows = [{}, {"layers.0": Decision.parse(text), "layers.0..layers.1": Decision.parse(text)}]
    plan, module, values = plain_plan_of(rows)
    capture, output = executed(plan, module, values, conditional_half=0)
    skipped = {record.site: record.reason for record in capture.verdicts.records if record.outcome == "skipped"}
    assert skipped == dict.fromkeys(("layers.0", "layers.0..layers.1"), reason)
    with torch.no_grad():
        assert torch.equal(output, module(*values)[0]), "it is full"
    with pytest.raises(SiteSkippedError, match=rf"layers\.0: .* can't be carried out: {reason}"):
        capture_of(module, values, eager, plan=plan, conditional_half=0, strict=True)
