"""Autocast regions of a graph: who stands in which, and that every part of a graph that runs alone is in its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from difa_compile.backend.entry import eager
from difa_compile.passes.autocast import Autocast, autocast_kept, autocast_of, is_enter, is_exit, open_at
from difa_compile.passes.graph import is_attention, op_name, tensor_of
from difa_compile.passes.prepare.canonical import SDPA, canonical
from difa_compile.passes.prepare.questions import Slice
from difa_compile.passes.replay import computes_the_same
from difa_compile.passes.variant import refresh
from tests.support.tiny_models import graph_of

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        x = self.a(x)
        with torch.autocast("cpu", BF16):
            x = self.b(x)
            with torch.autocast("cpu", enabled=False):
                x = self.c(x.float())
            with torch.autocast("cpu", F16):
                x = self.d(x)
        return self.a(x.float())


def nested(around=None):
    torch.manual_seed(0)
    with torch.autocast("cpu", around or BF16, enabled=around is not None):
        return graph_of(Nested().eval(), {"x": torch.randn(2, 8)})


@pytest.mark.parametrize("around", [None, BF16, F16])
def test_every_node_computes_alone_in_the_dtype_it_was_captured_in(around):
    module, _ = nested(around)
    with torch.autocast("cpu", around or BF16, enabled=around is not None):
        for node in module.graph.nodes:
            if node.op in ("call_function", "call_method") and not (is_enter(node) or is_exit(node)):
                captured = tensor_of(node).dtype
                refresh(node)
                assert tensor_of(node).dtype == captured, node
    linears = [tensor_of(node).dtype for node in module.graph.nodes if op_name(node) == "linear"]
    outside = around or F32
    assert linears == [outside, BF16, F32, F16, outside]
    depths = [len(open_at(node)) for node in module.graph.nodes if op_name(node) == "linear"]
    assert depths == [0, 1, 2, 2, 0]


def test_a_graph_that_fails_leaves_no_region_open():
    module, values = nested()
    fails = [node for node in module.graph.nodes if op_name(node) == "linear"][3]
    fails.args = (fails.args[0], fails.args[0], fails.args[2])
    module.recompile()
    before = Autocast.now()
    for run in (eager(module, values), autocast_kept()(module.forward)):
        with pytest.raises(RuntimeError):
            run(*values)
        assert Autocast.now() == before
        assert torch.autocast_increment_nesting() == 1
        assert torch.autocast_decrement_nesting() == 0


def test_what_answers_a_question_runs_in_the_regions_it_stood_in():
    def asks(x):
        with torch.autocast("cpu", BF16):
            inside = x @ x
        return inside, x @ x

    module, values = graph_of(asks, {"x": torch.randn(8, 8)})
    products = [node for node in module.graph.nodes if op_name(node) == "matmul"]
    found = Slice(module, module.graph, products)(values)
    assert [value.dtype for value in found] == [BF16, F32]
    assert torch.equal(found[1], values[0] @ values[0])
    assert not torch.is_autocast_enabled("cpu")


# --- one form of attention --------------------------------------------------------------------------------------------


class Form(nn.Module):
    """Attention on fused projections in one of the ways that it is written."""

    def __init__(self, form):
        super().__init__()
        self.qkv, self.out, self.form = nn.Linear(16, 48), nn.Linear(16, 16), form
        self.norm = nn.RMSNorm(8)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = self.form(self.norm(query), self.norm(key), value)
        return self.out(attended.transpose(1, 2).flatten(2)).float()


def explicit(q, k, v):
    return (q @ k.mT * 8**-0.5).softmax(-1) @ v


def einsum(q, k, v):
    weights = (torch.einsum("bhid,bhjd->bhij", q, k) * 8**-0.5).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def wide_softmax(q, k, v):
    return (q @ k.mT * 8**-0.5).float().softmax(-1).to(v.dtype) @ v


def uncast(q, k, v):
    with torch.autocast("cpu", enabled=False):
        return (q.float() @ k.float().mT * 8**-0.5).softmax(-1) @ v.float()


def scores_uncast(q, k, v):
    with torch.autocast("cpu", enabled=False):
        weights = (q.float() @ k.float().mT * 8**-0.5).softmax(-1)
    return weights.to(v.dtype) @ v


def masked(q, k, v):
    bias = -0.1 * torch.arange(q.shape[2]).float()
    return (q @ k.mT * 8**-0.5 + bias).softmax(-1) @ v


def flexible(q, k, v):
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q.to(v.dtype), k.to(v.dtype), v)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    ("form", "computed_in"),
    [(explicit, None), (einsum, None), (wide_softmax, None), (masked, None), (flexible, None), (uncast, F32),
     (scores_uncast, F32)],
)  # fmt: skip
def test_the_canonical_form_is_cast_as_the_written_one(form, computed_in, dtype):
    """In the dtype that its scores are in, and no farther from float64 than twice what the written form is."""
    torch.manual_seed(0)
    model, x = Form(form).eval(), torch.randn(2, 12, 16)
    with torch.autocast("cpu", dtype):
        module, values = graph_of(model, {"x": x})
        rewritten = canonical(module)
        (attention,) = (node for node in rewritten.graph.nodes if is_attention(node))
        assert attention.target is SDPA
        assert tensor_of(attention).dtype == (computed_in or dtype)
        with autocast_of(attention):
            assert torch.is_autocast_enabled("cpu") is (computed_in is None)
        assert computes_the_same(module, rewritten, values)
        with torch.no_grad():
            written, found = module(*values)[0], rewritten(*values)[0]
    with torch.no_grad():
        exact = Form(explicit if form is not masked else masked).double().eval()
        exact.load_state_dict(model.state_dict())
        reference = exact(x.double()).double()
    own, error = ((each.double() - reference).abs().max() for each in (written, found))
    assert error <= 2 * own


def test_the_function_itself_is_left_as_it_is():
    model = Form(F.scaled_dot_product_attention).eval()
    with torch.autocast("cpu", BF16):
        module, _ = graph_of(model, {"x": torch.randn(2, 12, 16)})
    assert canonical(module) is module
