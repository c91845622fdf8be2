"""Groups of heads: what is inserted, what it computes, what it reads and writes, and where it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from difa_compile.decision import FULL, Decision, Window
from difa_compile.layout import Layout
from difa_compile.ops import reference
from difa_compile.passes.caches import CacheName
from difa_compile.passes.graph import is_attention
from difa_compile.passes.order import rewrite
from difa_compile.passes.rewrite.heads import why_not_heads
from difa_compile.passes.variant import Context
from difa_compile.plan.schedule import HeadCache, Role, assign_roles
from tests.support.printed import changes, graph_text, one_attention, printed
from tests.support.tiny_models import FAMILIES, captured, graph_of, plain, sites_of

pytest.importorskip("diffusers")

D = Decision.parse
HEADS, CHANNELS, LAYOUT = 6, 4, Layout((2, 3))
WIDTH = HEADS * CHANNELS
EVERYTHING = "heads(0,3:full;1:window(box:1);2,4:window(band:1)+residual;5:reuse)"


class Attention(nn.Module):
    """Attention of six heads on 2 x 3 tokens; ``options`` of the call, ``after`` is done to its result."""

    def __init__(self, key_heads=HEADS, after=None, **options):
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, key_heads * CHANNELS) for _ in range(2))
        self.after, self.options = after, options | ({} if key_heads == HEADS else {"enable_gqa": True})

    def operands(self, x):
        return [part(x).unflatten(-1, (-1, CHANNELS)).transpose(1, 2) for part in (self.q, self.k, self.v)]

    def forward(self, x, mask=None):
        y = F.scaled_dot_product_attention(*self.operands(x), attn_mask=mask, **self.options)
        if self.after is not None:
            y = self.after(y)
        return x + self.o(y.transpose(1, 2).flatten(2))


def made(batch=2, mask=None, **options):
    """(model, graph, its sites, a function from x to the graph's inputs)."""
    torch.manual_seed(0)
    model = Attention(**options).eval()
    with torch.no_grad():
        for parameter in (model.q.weight, model.k.weight):
            parameter.mul_(4)
    inputs = {"x": torch.randn(batch, 6, WIDTH)} | ({} if mask is None else {"mask": mask})
    module, values = graph_of(model, inputs)
    place = next(i for i, value in enumerate(values) if value is inputs["x"])
    return model, module, sites_of(module, values, layout=LAYOUT), lambda x: [*values[:place], x, *values[place + 1 :]]


def at_step(step, batch=2):
    return torch.randn(batch, 6, WIDTH, generator=torch.Generator().manual_seed(step))


def run(module, sites, column, values_at, half=0, batch=2):
    """The outputs of the steps of a column of decisions, and the caches at the end."""
    outputs, caches = [], {}
    for step, (role,) in enumerate(assign_roles([[decision] for decision in column])):
        variant = rewrite(module, sites, [role], Context(half))
        assert not set(variant.cache_inputs) & set(variant.cache_outputs)
        given = [caches[name] for name in variant.cache_inputs]
        kept = [value.clone() for value in given]
        with torch.no_grad():
            results = variant.module(*values_at(at_step(step, batch)), *given)
        assert all(torch.equal(one, two) for one, two in zip(given, kept, strict=True))
        outputs.append(results[0])
        written = results[len(results) - len(variant.cache_outputs) :]
        assert all(value.is_contiguous() and value.shape[0] == batch for value in written)
        caches |= dict(zip(variant.cache_outputs, written, strict=True))
    return outputs, caches


def by_hand(model, column, half=0, batch=2, mask=None, scale=None):
    """The same by the reference, with what heads have left."""
    outputs, last, left = [], torch.full((batch, HEADS, 6, CHANNELS), torch.nan), {}
    for step, decision in enumerate(column):
        x = at_step(step, batch)
        own = mask
        part = slice(None)
        if decision.cfg_shared:
            part = slice(half * batch // 2, (half + 1) * batch // 2)
            own = mask if mask is None or mask.shape[0] == 1 else mask[part]
        with torch.no_grad():
            operands = [value[part] for value in model.operands(x)]
            residual = torch.zeros(batch, HEADS, 6, CHANNELS)
            for head in range(HEADS):
                form = decision.form_of(head)
                if form.kind.reads == "residual":
                    residual[:, head] = left[head](form.window)[:, head]
            if decision.groups:
                y = reference.by_heads(
                    *operands, decision, LAYOUT, reused=last[part], residual=residual[part], scale=scale, mask=own
                )
            elif decision.window is not None:
                y = reference.local_attention(*operands, LAYOUT, decision.window, scale, own)
            else:
                y = reference.attention(*operands, own, scale)
            whole = y.repeat(2, 1, 1, 1) if decision.cfg_shared else y
            outputs.append(x + model.o(whole.transpose(1, 2).flatten(2)))
            full = reference.attention(*operands, own, scale)

            def residual_of(window, full=full, operands=operands, own=own, twice=decision.cfg_shared):
                found = full - reference.local_attention(*operands, LAYOUT, window, scale, own)
                return found.repeat(2, 1, 1, 1) if twice else found

            for head in range(HEADS):
                last[:, head] = whole[:, head]
                if decision.form_of(head).is_full:
                    left[head] = residual_of
    return outputs


COLUMN = [
    FULL,
    D(EVERYTHING),
    D("heads(0,2,4:reuse;1,3,5:full)"),
    D("heads(0-1:window(band:2)+residual;2-4:reuse;5:window(disc:2))"),
    D("full+cfg"),
    D(EVERYTHING + "+cfg"),
    D("window(band:2)"),
    D("heads(0-4:reuse;5:window(box:1))+cfg"),
    D("heads(0-4:full;5:reuse)"),
    D("heads(0-4:window(band:3)+residual;5:reuse)"),
]
"""Heads that are read were computed in the step before or an earlier one, alone or with others, of a half or whole."""


def assert_equal(found, wanted):
    for step, (one, two) in enumerate(zip(found, wanted, strict=True)):
        torch.testing.assert_close(one, two, atol=3e-6, rtol=0, msg=lambda text, step=step: f"step {step}: {text}")


@pytest.mark.parametrize("half", [0, 1])
def test_every_head_does_what_is_said_of_it(half):
    model, module, sites, values_at = made()
    found, _ = run(module, sites, COLUMN, values_at, half)
    assert_equal(found, by_hand(model, COLUMN, half))


@pytest.mark.parametrize("key_heads", [1, 2, 3])
def test_grouped_queries(key_heads):
    model, module, sites, values_at = made(key_heads=key_heads)
    found, _ = run(module, sites, COLUMN, values_at)
    assert_equal(found, by_hand(model, COLUMN))


MASKS = {
    "of all heads": torch.tensor([False, True, True, True, True, True]).expand(2, 1, 6, 6),
    "of each head": torch.arange(2 * HEADS * 36.0).reshape(2, HEADS, 6, 6).sin(),
    "of no batch": torch.arange(HEADS * 36.0).reshape(1, HEADS, 6, 6).cos(),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_the_models_own_goes_with_its_heads(name):
    mask = MASKS[name]
    model, module, sites, values_at = made(mask=mask)
    found, _ = run(module, sites, COLUMN, values_at)
    assert_equal(found, by_hand(model, COLUMN, mask=mask))


def test_the_scale_of_the_call_is_kept():
    model, module, sites, values_at = made(scale=0.75)
    assert_equal(run(module, sites, COLUMN, values_at)[0], by_hand(model, COLUMN, scale=0.75))


def test_causal_heads_are_full_or_reused():
    model, module, sites, values_at = made(is_causal=True)
    column = [FULL, D("heads(0-1:reuse;2-5:full)"), D("heads(0-1:full;2-5:reuse)")]
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    assert_equal(run(module, sites, column, values_at)[0], by_hand(model, column, mask=mask))
    assert why_not_heads(sites[0], column[1]) is None
    assert why_not_heads(sites[0], D("heads(0-4:full;5:window(box:1))")) == "the attention is causal"


def test_caches_are_not_of_memory_that_the_model_writes_to():
    """The attention's own value is doubled in place behind it; what is kept of heads is from before."""
    column = [
        FULL,
        D("heads(0:reuse;1-5:full)"),
        D("heads(0-5:window(band:1))".replace("0-5", "0-4")[:-1] + ";5:reuse)"),
    ]
    model, module, sites, values_at = made(after=lambda y: y.mul_(2))
    found, _ = run(module, sites, column, values_at)
    plain_model, *_ = made()
    plain_model.o.load_state_dict(
        {name: 2 * value if name == "weight" else value for name, value in model.o.state_dict().items()}
    )
    assert_equal(found, by_hand(plain_model, column))


@pytest.mark.parametrize("text", ["heads(0-2:full;3-5:reuse)", "heads(0,3:full;1-2,4-5:window(band:1))"])
def test_heads_that_are_full_are_full_to_the_bit(text):
    model, module, sites, values_at = made(after=None)
    kept = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            result = super().run_node(node)
            kept.setdefault(str(node.target), []).append(result)
            return result

    decision = D(text)
    with torch.no_grad():
        full = F.scaled_dot_product_attention(*model.operands(at_step(0)))
        caches = [torch.zeros(2, 6, 3, CHANNELS)] if decision.reads_caches else []
        Recorder(rewrite(module, sites, [Role(decision)], Context()).module).run(*values_at(at_step(0)), *caches)
    (joined,) = kept["difa.join_heads.default"]
    for head, form in enumerate(decision.forms):
        assert torch.equal(joined[:, head], full[:, head]) == form.is_full
    assert joined.stride() == full.stride() or full.is_contiguous()


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_of_heads_are_inputs_or_outputs_and_contiguous(family):
    _, _, module, values = captured(family)
    sites = sites_of(module, values)
    window = Window("disc", 2)
    decision = D("heads(0:full;1:reuse)")
    role = Role(decision, emit_output=True, head_writes=(HeadCache((0,)), HeadCache((0,), window)))
    for text in ("full", "full+cfg", "window(band:2)"):
        writes = (
            (HeadCache((0,)), HeadCache((1,))) if "window" in text else (HeadCache((0, 1)), HeadCache((1,), window))
        )
        variant = rewrite(module, sites, [Role(D(text), head_writes=writes)] * len(sites), Context(1))
        results = variant.module(*values)[-len(variant.cache_outputs) :]
        assert all(value.is_contiguous() and value.shape[0] == 2 for value in results)
    variant = rewrite(module, sites, [role] * len(sites), Context(1))
    reads = {CacheName.heads(site.path, (1,), residual=False) for site in sites}
    writes = {CacheName.heads(site.path, (0,), residual=left) for site in sites for left in (False, True)}
    assert set(variant.cache_inputs) == reads
    assert {name for name in variant.cache_outputs if name.of_heads} == writes
    assert any(name.kind == "output" for name in variant.cache_outputs)


# --- reasons ---------------------------------------------------------------------------------------------------------


def test_all_heads_of_the_site_have_to_be_named():
    _, _, sites, _ = made()
    assert why_not_heads(sites[0], D("heads(0:full;1:reuse)")) == (
        "0-1 are named of 6 heads; name every head of the attention once"
    )
    assert why_not_heads(sites[0], D("heads(0-5:full;6:reuse)")).startswith("0-6 are named of 6 heads")


def test_without_a_grid_heads_are_full_or_reused():
    module, values = graph_of(Attention().eval(), {"x": torch.randn(2, 6, WIDTH)})
    (site,) = sites_of(module, values)
    assert why_not_heads(site, D(EVERYTHING)).startswith("no token layout")
    assert why_not_heads(site, D("heads(0-2:full;3-5:reuse)")) is None


def test_causal_attention_takes_no_window_of_any_head():
    model, inputs = plain(masks=("causal", "none"))
    module, values = graph_of(model, inputs)
    first, second = sites_of(module, values)
    assert why_not_heads(first, D("heads(0:full;1:window(band:1))")) == "the attention is causal"
    assert why_not_heads(second, D("heads(0:full;1:window(band:1))")) is None


# --- the graph before and after --------------------------------------------------------------------------------------


def changed(role, half=1):
    module, sites, _ = one_attention()
    return changes(printed(module), printed(rewrite(module, sites, [role], Context(half)).module))


def test_each_group_is_one_call_on_slices_and_all_are_joined():
    assert changed(Role(D("heads(0:full;1:window(box:1))"))) == graph_text("""
        ...
        - %sdpa = sdpa(%query, %key, %value)  float32 (2, 2, 6, 8), batch 0
        + %narrow = narrow(%query, 1, 0, 1)  float32 (2, 1, 6, 8)
        + %narrow_1 = narrow(%key, 1, 0, 1)  float32 (2, 1, 6, 8)
        + %narrow_2 = narrow(%value, 1, 0, 1)  float32 (2, 1, 6, 8)
        + %sdpa_1 = sdpa(%narrow, %narrow_1, %narrow_2)  float32 (2, 1, 6, 8)
        + %narrow_3 = narrow(%query, 1, 1, 1)  float32 (2, 1, 6, 8)
        + %narrow_4 = narrow(%key, 1, 1, 1)  float32 (2, 1, 6, 8)
        + %narrow_5 = narrow(%value, 1, 1, 1)  float32 (2, 1, 6, 8)
        + %local = local_attention(%narrow_3, %narrow_4, %narrow_5, [2, 3], 0, 0, 'box', 1, None, None)  float32 (2, 1, 6, 8)
        + %join_heads_default = join_heads([%sdpa_1, %local], [0, 1], [1, 1], [], [], 2)  float32 (2, 2, 6, 8)
        - %transpose_3 = transpose(%sdpa, 1, 2)  float32 (2, 6, 2, 8), batch 0
        + %transpose_3 = transpose(%join_heads_default, 1, 2)  float32 (2, 6, 2, 8), batch 0
        ...
    """)  # noqa: E501


def test_reused_heads_and_residuals_are_inputs():
    assert changed(Role(D("heads(0:reuse;1:window(box:1)+residual)"))) == graph_text("""
        ...
        + %cache_0 = input  float32 (2, 6, 1, 8), cache.attention.heads.0
        + %cache_1 = input  float32 (2, 6, 1, 8), cache.attention.heads_residual.1
        ...
        - %sdpa = sdpa(%query, %key, %value)  float32 (2, 2, 6, 8), batch 0
        + %transpose = transpose(%cache_0, 1, 2)  float32 (2, 1, 6, 8)
        + %transpose_4 = transpose(%cache_1, 1, 2)  float32 (2, 1, 6, 8)
        + %narrow = narrow(%query, 1, 1, 1)  float32 (2, 1, 6, 8)
        + %narrow_1 = narrow(%key, 1, 1, 1)  float32 (2, 1, 6, 8)
        + %narrow_2 = narrow(%value, 1, 1, 1)  float32 (2, 1, 6, 8)
        + %local = local_attention(%narrow, %narrow_1, %narrow_2, [2, 3], 0, 0, 'box', 1, None, None)  float32 (2, 1, 6, 8)
        + %join_heads_default = join_heads([%transpose, %local], [0, 1], [1, 1], [%transpose_4], [1], 2)  float32 (2, 2, 6, 8)
        - %transpose_3 = transpose(%sdpa, 1, 2)  float32 (2, 6, 2, 8), batch 0
        + %transpose_3 = transpose(%join_heads_default, 1, 2)  float32 (2, 6, 2, 8), batch 0
        ...
    """)  # noqa: E501


def test_what_single_heads_leave_is_an_output():
    role = Role(FULL, head_writes=(HeadCache((0,)), HeadCache((1,), Window("box", 1))))
    assert changed(role) == graph_text("""
        ...
        + %narrow_1 = narrow(%sdpa, 1, 1, 1)  float32 (2, 1, 6, 8)
        + %narrow_2 = narrow(%query, 1, 1, 1)  float32 (2, 1, 6, 8)
        + %narrow_3 = narrow(%key, 1, 1, 1)  float32 (2, 1, 6, 8)
        + %narrow_4 = narrow(%value, 1, 1, 1)  float32 (2, 1, 6, 8)
        + %local = local_attention(%narrow_2, %narrow_3, %narrow_4, [2, 3], 0, 0, 'box', 1, None, None)  float32 (2, 1, 6, 8)
        + %sub = sub(%narrow_1, %local)  float32 (2, 1, 6, 8)
        + %transpose_4 = transpose(%sub, 1, 2)  float32 (2, 6, 1, 8)
        + %contiguous_1 = contiguous(%transpose_4)  float32 (2, 6, 1, 8)
        + %narrow = narrow(%sdpa, 1, 0, 1)  float32 (2, 1, 6, 8)
        + %join_heads_default = join_heads([%narrow], [0], [1], [], [], 1)  float32 (2, 1, 6, 8)
        + %transpose = transpose(%join_heads_default, 1, 2)  float32 (2, 6, 1, 8)
        + %contiguous = contiguous(%transpose)  float32 (2, 6, 1, 8)
        ...
        - return (%add)
        + return (%add, %contiguous, %contiguous_1)
    """)  # noqa: E501


def test_attention_is_computed_of_no_head_that_is_reused():
    _, module, sites, _ = made()
    variant = rewrite(module, sites, [Role(D("heads(0,2,4:reuse;1,3,5:full)"))], Context())
    (left,) = [node for node in variant.module.graph.nodes if is_attention(node)]
    assert left.meta["example_value"].shape[1] == 3, "every second head is one call"
