"""A captured graph run with any row of decisions, against the same model altered by hand."""

import pytest
import torch

from difa_compile.backend.entry import eager
from difa_compile.decision import FULL, REUSE, Decision, Window
from difa_compile.errors import LayoutError, NoAttentionError, PlanMismatchError, SiteSkippedError
from difa_compile.layout import Layout
from difa_compile.plan.schedule import FULL_ROLE, Role, assign_roles
from tests.support.altered import Altered
from tests.support.captures import capture_of
from tests.support.tiny_models import (
    ATTENTIONS,
    FAMILIES,
    Average,
    at_step,
    captured,
    captured_plain,
    family_capture,
    family_plan,
    graph_of,
    plain,
    plain_plan,
    with_inputs,
)

pytest.importorskip("diffusers")

EXACT = 3e-6
"""Relative to the largest output: float32 rounding of attention computed by another kernel or on half a batch."""


def schedule(window):
    """Every decision, each after everything it may read; two columns, for even and odd sites."""
    even = [
        "full",
        "W+residual",
        "reuse",
        "W+residual+cfg",
        "reuse",
        "full+cfg",
        "W+residual",
        "W",
        "W+cfg",
        "reuse+cfg",
    ]
    odd = ["full", "reuse", "full+cfg", "reuse", "reuse+cfg", "W+residual+cfg", "W", "reuse", "W+residual", "full"]
    return [[Decision.parse(text.replace("W", f"window({window})")) for text in column] for column in (even, odd)]


def paths_of(family):
    return [name for name, _ in captured(family)[0].named_modules() if ATTENTIONS[family](name)]


def layouts_of(family):
    own = {
        "dit": Layout((4, 4)),
        "pixart": Layout((4, 4)),
        "sd3": Layout((4, 6), after=7),
        "flux": Layout((4, 6), before=7),
        "wan": Layout((3, 4, 4)),
    }
    return [own[family]] * len(paths_of(family))


def difference(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize(
    ("family", "window"),
    [("dit", "band:2"), ("pixart", "disc:2"), ("sd3", "box:1"), ("flux", "disc:2"), ("wan", "box:1")],
)
def test_every_decision_computes_what_the_model_altered_by_hand_computes(family, window, half):
    model, inputs, _, _ = captured(family)
    capture, _ = family_capture(family, conditional_half=half)
    columns = schedule(window)
    rows = [[columns[i % 2][step] for i in range(len(capture.model.sites))] for step in range(len(columns[0]))]
    expected = Altered(model, paths_of(family), layouts_of(family), half, Window.parse(window))
    caches = {}
    for step, (row, roles) in enumerate(zip(rows, assign_roles(rows), strict=True)):
        now = at_step(inputs, step)
        outputs, written = capture.execute(with_inputs(family, now), roles, caches)
        caches.update(written)
        wanted = expected(row, now)
        assert difference(outputs[0], wanted) <= EXACT, f"step {step}: {[str(d) for d in row]}"
        if any(decision != FULL for decision in row):
            with torch.no_grad():
                assert difference(model(**now)[0], wanted) > 1e-3, f"step {step} would pass with full attention"


@pytest.mark.parametrize("family", FAMILIES)
def test_full_is_the_unmodified_model_to_the_bit(family):
    model, inputs, _, _ = captured(family)
    capture, _ = family_capture(family, conditional_half=0)
    now = at_step(inputs, 1)
    args = with_inputs(family, now)
    with torch.no_grad():
        wanted = model(**now)[0]
    row = [FULL_ROLE] * len(capture.model.sites)
    assert torch.equal(capture.execute(args, row, {})[0][0], wanted)
    in_segments = capture.outputs(capture.advance(capture.begin(args), row, {}))
    assert torch.equal(in_segments[0], wanted)
    emitting = [Role(FULL, emit_output=True)] * len(capture.model.sites)
    assert torch.equal(capture.execute(args, emitting, {})[0][0], wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_larger_than_the_grid_is_full_attention(family):
    capture, values = family_capture(family)
    full, _ = capture.execute(values, [FULL_ROLE] * len(capture.model.sites), {})
    for window in ("band:47", "disc:9", "box:5"):
        role = Role(Decision.parse(f"window({window})"))
        assert capture.verdicts.why_not(0, role.decision) is None
        outputs, _ = capture.execute(values, [role] * len(capture.model.sites), {})
        assert difference(outputs[0], full[0]) <= EXACT, window


def test_the_residual_belongs_to_each_half_of_the_batch():
    """On the step that fills it, window + residual is full attention again, in both halves."""
    capture, values = family_capture("sd3", conditional_half=1)
    window = Window("disc", 2)
    fill = [Role(FULL, emit_residual=True, residual_window=window)] * len(capture.model.sites)
    full, caches = capture.execute(values, fill, {})
    for name, value in caches.items():
        assert not torch.allclose(*value.chunk(2), atol=1e-4), name
    read = [Role(Decision.parse("window(disc:2)+residual"))] * len(capture.model.sites)
    again, _ = capture.execute(values, read, caches)
    assert difference(again[0], full[0]) <= EXACT
    half, _ = capture.execute(values, [Role(Decision.parse("window(disc:2)+residual+cfg"))] * 2, caches)
    shared, _ = capture.execute(values, [Role(Decision.parse("full+cfg"))] * 2, {})
    assert difference(half[0], shared[0]) <= EXACT


def test_a_state_can_be_continued_in_several_ways():
    capture, values = family_capture("dit", conditional_half=0)
    emit = Role(FULL, emit_output=True)
    start = capture.begin(values)
    before = capture.advance(start, [emit, emit], {}, stop=1)
    kept = before.values
    assert before.caches_out.keys() == {"cache.transformer_blocks.0.attn1.output.0"}
    full = capture.advance(before, [emit, emit], {})
    window = capture.advance(before, [emit, Role(Decision.parse("window(band:2)"))], {})
    again = capture.advance(before, [emit, emit], {})
    assert before.values is kept
    assert start.caches_out == {}
    assert before.caches_out.keys() == {"cache.transformer_blocks.0.attn1.output.0"}
    assert torch.equal(capture.outputs(full)[0], capture.outputs(again)[0])
    assert torch.equal(capture.outputs(full)[0], capture.execute(values, [FULL_ROLE] * 2, {})[0][0])
    assert not torch.equal(capture.outputs(full)[0], capture.outputs(window)[0])


def test_equal_blocks_share_compiled_variants():
    model, inputs = FAMILIES["dit"](layers=4)
    module, values = graph_of(model, inputs)
    compiled = []

    def compiler(graph, example_inputs):
        compiled.append(len(example_inputs))
        return eager(graph, example_inputs)

    capture = capture_of(module, values, compiler, conditional_half=0)
    emit, reuse = Role(FULL, emit_output=True), Role(REUSE)
    _, caches = capture.execute(values, [emit] * 4, {})
    assert capture.compiled_variants == 3, "what comes before the blocks, one block for all four, what comes after"
    capture.execute(values, [emit, reuse, emit, reuse], caches)
    assert capture.compiled_variants == 4
    capture.execute(values, [reuse, reuse, emit, emit], caches)
    capture.execute(values, [emit, emit, reuse, reuse], caches)
    assert capture.compiled_variants == 4 == len(compiled)
    capture.execute(values, [FULL_ROLE] * 4, {})
    assert capture.compiled_variants == 4
    assert len(compiled) == 5, "the whole graph, once, for rows that are full"


def test_equal_blocks_with_other_weights_compute_with_their_own():
    """Shared code, own weights: each of the four blocks windowed alone gives its own output."""
    model, inputs = FAMILIES["dit"](layers=4)
    module, values = graph_of(model, inputs)
    capture = capture_of(module, values, eager)
    window = Decision.parse("window(band:2)")
    paths = [f"transformer_blocks.{i}.attn1" for i in range(4)]
    expected = Altered(model, paths, [Layout((4, 4))] * 4, 0, window.window)
    for index in range(4):
        row = [window if i == index else FULL for i in range(4)]
        outputs, _ = capture.execute(values, [Role(decision) for decision in row], {})
        assert difference(outputs[0], expected(row, inputs)) <= EXACT
    assert capture.compiled_variants == 4


def test_records_say_what_became_of_every_decision():
    rows = [FULL, Decision.parse("window(band:2)"), REUSE]
    model, inputs = plain(masks=("none", "causal"))
    plan = plain_plan(rows)
    module, values = graph_of(model, inputs)
    capture = capture_of(module, values, eager, plan=plan)
    found = [(r.site, r.decision, r.outcome, r.reason) for r in capture.verdicts.records]
    assert found == [
        ("layers.0.attention", "full", "full", ""),
        ("layers.0.attention", "window(band:2)", "rewritten", ""),
        ("layers.0.attention", "reuse", "rewritten", ""),
        ("layers.1.attention", "full", "full", ""),
        ("layers.1.attention", "window(band:2)", "skipped", "the attention is causal"),
        ("layers.1.attention", "reuse", "rewritten", ""),
    ]
    assert capture.verdicts.effective(1, rows[1]) == FULL
    assert capture.verdicts.effective(0, rows[1]) == rows[1]
    with pytest.raises(SiteSkippedError, match=r"layers\.1\.attention: window\(band:2\).*is causal"):
        capture_of(module, values, eager, plan=plan, strict=True)


def test_cfg_sharing_needs_to_know_the_half_and_an_even_batch():
    shared = Decision.parse("full+cfg")
    capture, _ = family_capture("dit")
    assert "not known" in capture.verdicts.why_not(0, shared)
    single, _ = family_capture("dit", batch=1, conditional_half=0)
    assert single.verdicts.why_not(0, shared) == "a batch of 1 has no two CFG halves"
    assert family_capture("dit", conditional_half=0)[0].verdicts.why_not(0, shared) is None


def test_a_graph_without_attention_is_refused():
    module, values = graph_of(Average().eval(), {"x": torch.randn(2, 4, 8)})
    with pytest.raises(NoAttentionError, match="nothing a plan could change"):
        capture_of(module, values, eager)


def test_a_plan_for_other_sites_is_refused_saying_what_differs():
    _, _, module, values = captured_plain()
    with pytest.raises(PlanMismatchError, match=r"transformer_blocks\.0\.attn1"):
        capture_of(module, values, eager, plan=family_plan("dit", [FULL]))
    model, inputs = plain(size=(8, 8))
    other, other_values = graph_of(model, inputs)
    with pytest.raises(PlanMismatchError, match="24 tokens"):
        capture_of(other, other_values, eager, plan=plain_plan([FULL]))


def test_roles_for_another_number_of_sites_are_refused():
    capture, values = family_capture("dit")
    with pytest.raises(PlanMismatchError, match="1 roles were given for 2 sites"):
        capture.advance(capture.begin(values), [FULL_ROLE], {})


def test_a_layout_given_by_the_user_is_used_and_must_add_up():
    _, _, module, values = captured_plain()
    capture = capture_of(module, values, eager, layout=Layout((2, 10), before=3, after=1))
    assert {site.layout for site in capture.model.sites} == {Layout((2, 10), before=3, after=1)}
    with pytest.raises(LayoutError, match="the given layout 5x5 has 25 tokens, the sequence has 24; give the layout"):
        capture_of(module, values, eager, layout=Layout((5, 5)))
