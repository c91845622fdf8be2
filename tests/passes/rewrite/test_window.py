"""The window rewrite: what is inserted, and where it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from difa_compile.decision import Decision
from difa_compile.layout import Layout
from difa_compile.passes.graph import is_attention
from difa_compile.passes.order import rewrite
from difa_compile.passes.rewrite.window import why_not_window
from difa_compile.passes.variant import Context
from difa_compile.plan.schedule import Role
from tests.support.printed import changes, graph_text, one_attention, printed
from tests.support.tiny_models import BareAttention, captured, captured_plain, graph_of, plain, sites_of

pytest.importorskip("diffusers")


def windowed(module, values, text, half=0):
    sites = sites_of(module, values)
    return rewrite(module, sites, [Role(Decision.parse(text))] * len(sites), Context(half))


def local_nodes(module):
    return [node for node in module.graph.nodes if node.target is torch.ops.difa.local_attention.default]


@pytest.mark.parametrize(
    ("family", "grid", "before", "after"),
    [
        ("dit", [4, 4], 0, 0),
        ("sd3", [4, 6], 0, 7),
        ("flux", [4, 6], 7, 0),
        ("wan", [3, 4, 4], 0, 0),
    ],
)
def test_the_op_carries_the_window_and_the_layout(family, grid, before, after):
    _, _, module, values = captured(family)
    variant = windowed(module, values, "window(disc:3)")
    nodes = local_nodes(variant.module)
    assert len(nodes) == len(sites_of(module, values))
    for node in nodes:
        assert [list(node.args[3]), *node.args[4:]] == [grid, before, after, "disc", 3, None, None]
    left = [node for node in variant.module.graph.nodes if is_attention(node)]
    assert len(left) == (2 if family == "wan" else 0), "cross-attention stays"
    assert variant.cache_inputs == variant.cache_outputs == ()


def test_the_residual_is_an_input_of_the_whole_batch():
    _, _, module, values = captured("dit")
    for text in ("window(band:2)+residual", "window(band:2)+residual+cfg"):
        variant = windowed(module, values, text)
        assert variant.cache_inputs == tuple(f"cache.transformer_blocks.{i}.attn1.residual" for i in range(2))
        inputs = [node for node in variant.module.graph.nodes if "difa_cache" in node.meta]
        assert [tuple(node.meta["example_value"].shape) for node in inputs] == [(2, 2, 16, 16)] * 2
        assert all(node.meta["example_value"].is_contiguous() for node in inputs)


def test_with_cfg_only_half_of_the_batch_is_attended():
    _, _, module, values = captured("dit")
    for node in local_nodes(windowed(module, values, "window(band:2)+cfg").module):
        assert node.meta["example_value"].shape[0] == 1


def test_the_scale_of_the_call_is_kept():
    class Scaled(BareAttention):
        def forward(self, x):
            q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
            return x + self.o(F.scaled_dot_product_attention(q, k, v, scale=0.25).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    module, values = graph_of(Scaled().eval(), {"x": torch.randn(2, 6, 16)})
    sites = sites_of(module, values, layout=Layout((2, 3)))
    variant = rewrite(module, sites, [Role(Decision.parse("window(box:5)"))], Context())
    torch.testing.assert_close(variant.module(*values)[0], module(*values)[0], atol=1e-6, rtol=0)
    assert local_nodes(variant.module)[0].args[-2:] == (0.25, None)


def test_causal_attention_is_refused():
    model, inputs = plain(masks=("causal", "none"))
    module, values = graph_of(model, inputs)
    first, second = sites_of(module, values)
    assert why_not_window(first) == "the attention is causal"
    assert why_not_window(second) is None


class Masked(BareAttention):
    """Attention on 2 x 3 tokens under a mask that is an input."""

    def forward(self, x, mask):
        q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return x + self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


HIDES_FIRST = torch.tensor([False, True, True, True, True, True]).expand(2, 1, 6, 6)


@pytest.mark.parametrize(
    ("mask", "bias"),
    [
        (torch.ones(2, 1, 6, 6, dtype=torch.bool), torch.zeros(6, 6)),
        (HIDES_FIRST, torch.zeros(6, 6).index_fill(1, torch.tensor([0]), -torch.inf)),
        (torch.arange(36.0).reshape(6, 6) / 36, torch.arange(36.0).reshape(6, 6) / 36),
    ],
    ids=["all visible", "bool", "additive"],
)
@pytest.mark.parametrize("decision", ["window(box:1)", "window(box:1)+cfg"])
def test_a_mask_of_the_models_own_hides_pairs_on_top_of_the_window(mask, bias, decision):
    torch.manual_seed(0)
    model = Masked().eval()
    inputs = {"x": torch.randn(2, 6, 16), "mask": mask}
    module, values = graph_of(model, inputs)
    sites = sites_of(module, values, layout=Layout((2, 3)))
    assert sites[0].mask == "mask"
    assert why_not_window(sites[0]) is None
    variant = rewrite(module, sites, [Role(Decision.parse(decision))], Context(1))
    row, column = torch.arange(6) // 3, torch.arange(6) % 3
    near = ((row[:, None] - row).abs() <= 1) & ((column[:, None] - column).abs() <= 1)
    q, k, v = (part(inputs["x"]).unflatten(-1, (2, 8)).transpose(1, 2) for part in (model.q, model.k, model.v))
    scores = (q @ k.mT / 8**0.5 + bias).masked_fill(~near, -torch.inf)
    attended = model.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    if "cfg" in decision:
        attended = torch.cat([attended[1:], attended[1:]])
    found = variant.module(*values)[0]
    torch.testing.assert_close(found, inputs["x"] + attended, atol=1e-6, rtol=0)
    assert not torch.allclose(found, module(*values)[0], atol=1e-3)


def test_without_a_grid_there_is_no_window():
    module, values = graph_of(BareAttention().eval(), {"x": torch.randn(2, 6, 16)})
    (site,) = sites_of(module, values)
    assert why_not_window(site) == (
        "no token layout: the graph does not show which grid the 6 packed tokens are; give layout="
    )
    (told,) = sites_of(module, values, layout=Layout((2, 3)))
    assert why_not_window(told) is None


def test_grouped_queries_are_windowed():
    class Grouped(BareAttention):
        def __init__(self):
            super().__init__()
            self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x):
            q, k, v = (part(x).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
            return x + self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model = Grouped().eval()
    module, values = graph_of(model, {"x": torch.randn(2, 6, 16)})
    sites = sites_of(module, values, layout=Layout((6,)))
    variant = rewrite(module, sites, [Role(Decision.parse("window(band:1)"))], Context())
    x = next(value for value in values if not isinstance(value, nn.Parameter))
    q, k, v = (part(x).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (model.q, model.k, model.v))
    near = (torch.arange(6)[:, None] - torch.arange(6)).abs() <= 1
    scores = (q @ k.mT / 8**0.5).masked_fill(~near, -torch.inf)
    wanted = x + model.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(variant.module(*values)[0], wanted, atol=1e-6, rtol=0)


def test_text_is_exempt_in_the_whole_model():
    """A window of one token: the text's own output moves only through what image tokens lost."""
    _, _, module, values = captured("sd3")
    sites = sites_of(module, values)
    variant = rewrite(module, sites, [Role(Decision.parse("window(band:1)"))] * 2, Context())
    recorded = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            result = super().run_node(node)
            recorded[node.name] = result
            return result

    Recorder(variant.module).run(*values)
    local = local_nodes(variant.module)[0]
    q, k, v = (recorded[node.name] for node in local.args[:3])
    full = (q @ k.transpose(-1, -2) / 4.0).softmax(-1) @ v
    found = recorded[local.name]
    torch.testing.assert_close(found[:, :, 24:], full[:, :, 24:], atol=2e-6, rtol=0)
    assert not torch.allclose(found[:, :, :24], full[:, :, :24], atol=1e-3)


def test_the_plain_model_is_windowed_as_well():
    _, _, module, values = captured_plain(rotate=True)
    variant = windowed(module, values, "window(box:6)")
    torch.testing.assert_close(variant.module(*values)[0], module(*values)[0], atol=2e-6, rtol=0)


# --- the graph before and after --------------------------------------------------------------------------------------


def changed(decision):
    module, sites, _ = one_attention()
    variant = rewrite(module, sites, [Role(Decision.parse(decision))], Context(1))
    return changes(printed(module), printed(variant.module))


def test_a_window_changes_the_attention_and_nothing_else():
    assert changed("window(box:1)") == graph_text("""
        ...
        - %sdpa = sdpa(%query, %key, %value)  float32 (2, 2, 6, 8), batch 0
        + %local = local_attention(%query, %key, %value, [2, 3], 0, 0, 'box', 1, None, None)  float32 (2, 2, 6, 8)
        - %transpose_3 = transpose(%sdpa, 1, 2)  float32 (2, 6, 2, 8), batch 0
        + %transpose_3 = transpose(%local, 1, 2)  float32 (2, 6, 2, 8), batch 0
        ...
    """)


def test_with_the_residual_a_cache_is_added():
    assert changed("window(box:1)+residual") == graph_text("""
        ...
        + %cache_0 = input  float32 (2, 2, 6, 8), cache.attention.residual
        ...
        - %sdpa = sdpa(%query, %key, %value)  float32 (2, 2, 6, 8), batch 0
        + %local = local_attention(%query, %key, %value, [2, 3], 0, 0, 'box', 1, None, None)  float32 (2, 2, 6, 8)
        + %add_1 = add(%local, %cache_0)  float32 (2, 2, 6, 8)
        - %transpose_3 = transpose(%sdpa, 1, 2)  float32 (2, 6, 2, 8), batch 0
        + %transpose_3 = transpose(%add_1, 1, 2)  float32 (2, 6, 2, 8), batch 0
        ...
    """)


def test_on_half_a_batch_the_same_half_of_the_residual_is_added():
    module, sites, _ = one_attention()
    variant = rewrite(module, sites, [Role(Decision.parse("window(box:1)+residual+cfg"))], Context(1))
    lines = printed(variant.module).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("%local"))
    assert "\n".join(lines[first : first + 4]) == graph_text("""
        %local = local_attention(%query, %key, %value, [2, 3], 0, 0, 'box', 1, None, None)  float32 (1, 2, 6, 8)
        %narrow_1 = narrow(%cache_0, 0, 1, 1)  float32 (1, 2, 6, 8)
        %add_1 = add(%local, %narrow_1)  float32 (1, 2, 6, 8)
        %transpose_3 = transpose(%add_1, 1, 2)  float32 (1, 6, 2, 8), batch 0
    """)
