"""Models that are not diffusers', written the ways people write them: planned without a change, and right.

Every attention here is one of the tests' own modules. The oracle is the same model with the attention function of its
modules replaced by hand.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from difa_compile.backend.entry import eager
from difa_compile.decision import FULL, REUSE, Decision, Kind
from difa_compile.layout import Layout
from difa_compile.passes.prepare.canonical import canonical
from difa_compile.plan.schedule import Role
from tests.support.altered import sees
from tests.support.captures import capture_of
from tests.support.printed import changes, graph_text, printed
from tests.support.tiny_models import BareAttention, graph_of

WIDTH, HEADS = 32, 2
FRAMES, ROWS, COLUMNS, TEXT = 3, 4, 6, 5


class FusedExplicit(nn.Module):
    """One linear for q, k, v; matmul, softmax in float32, matmul: a vision transformer's block, Open-Sora's STDiT."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)
        self.attend = self.plain

    def plain(self, q, k, v):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return F.dropout(scores.to(torch.float32).softmax(dim=-1).to(q.dtype), 0.1, self.training) @ v

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.attend(self.q_norm(q), self.k_norm(k), v)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, -1))


class Einsum(nn.Module):
    """Three linears without bias, einsum on (batch, tokens, heads, dim)."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.attend = self.plain

    def plain(self, q, k, v):
        weights = (torch.einsum("b h i d, b h j d -> b h i j", q, k) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return torch.einsum("b h i j, b h j d -> b h i d", weights, v)

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Sdpa(nn.Module):
    def __init__(self):
        super().__init__()
        self.kv, self.q, self.proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attend = F.scaled_dot_product_attention

    def forward(self, x):
        k, v = self.kv(x).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q(x), k, v))
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Spatial attention within frames, temporal attention along each position, text, MLP."""

    def __init__(self, form):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(3))
        self.scale_shift = nn.Parameter(torch.randn(6, WIDTH) / WIDTH**0.5)
        self.spatial, self.temporal = form(), form()
        self.cross = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x, text, t):
        batch = x.shape[0]
        shift, scale, gate = (self.scale_shift[None, :3] + t.reshape(batch, 3, -1)).chunk(3, dim=1)
        y = self.norms[0](x) * (1 + scale) + shift
        y = self.spatial(y.reshape(batch * FRAMES, -1, WIDTH)).reshape(x.shape)
        x = x + gate * y
        y = self.norms[1](x).reshape(batch, FRAMES, -1, WIDTH).permute(0, 2, 1, 3).reshape(-1, FRAMES, WIDTH)
        y = self.temporal(y).reshape(batch, -1, FRAMES, WIDTH).permute(0, 2, 1, 3).reshape(x.shape)
        x = x + gate * y
        x = x + self.cross(x, text, text, need_weights=False)[0]
        return x + self.mlp(self.norms[2](x))


class VideoModel(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.patch = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 3 * WIDTH))
        self.blocks = nn.ModuleList(Block(form) for _ in range(2))
        self.out = nn.Linear(WIDTH, 16)

    def forward(self, x, text, t):
        y = self.patch(x).flatten(2).transpose(1, 2)
        t = self.time(t)
        for block in self.blocks:
            y = block(y, text, t)
        y = self.out(y).reshape(x.shape[0], FRAMES, ROWS, COLUMNS, 2, 2, 4)
        return y.permute(0, 6, 1, 2, 4, 3, 5).reshape(x.shape)


def video(form):
    torch.manual_seed(0)
    model = VideoModel(form).eval()
    inputs = {
        "x": torch.randn(2, 4, FRAMES, 2 * ROWS, 2 * COLUMNS),
        "text": torch.randn(2, TEXT, WIDTH),
        "t": torch.randn(2, WIDTH),
    }
    return model, inputs


@pytest.mark.parametrize("form", [FusedExplicit, Einsum, Sdpa])
def test_spatial_and_temporal_attention_of_a_video_model(form):
    """Every decision at every site against the model altered by hand; each site with the grid of its own tokens."""
    model, inputs = video(form)
    with torch.no_grad():
        module, values = graph_of(model, inputs)
        capture = capture_of(module, values, eager, conditional_half=1)
        assert [site.path for site in capture.model.sites] == [
            f"blocks.{i}.{n}" for i in range(2) for n in ("spatial", "temporal")
        ]
        assert [site.layout for site in capture.model.sites] == [Layout((ROWS, COLUMNS)), Layout((FRAMES,))] * 2
        assert len(capture.model.all_sites) == 6, "and the two cross-attentions, left alone"
        place = next(i for i, value in enumerate(values) if value.data_ptr() == inputs["x"].data_ptr())
        later = [value * 0.9 + 0.05 if i == place else value for i, value in enumerate(values)]
        moved = {**inputs, "x": inputs["x"] * 0.9 + 0.05}
        full = model(**moved)
        torch.testing.assert_close(capture.full()(values, {})[0][0], model(**inputs), atol=0, rtol=0)
        for text in ("reuse", "full+cfg", "window(disc:2)", "window(band:1)+cfg"):
            decision = Decision.parse(text)
            assert all(capture.verdicts.why_not(i, decision) is None for i in range(4)), text
            first = [Role(FULL, emit_output=decision.kind is Kind.REUSE)] * 4
            _, caches = capture.execute(values, first, {})
            found, _ = capture.execute(later, [Role(decision)] * 4, caches)
            wanted = altered(model, capture, decision, inputs, moved)
            torch.testing.assert_close(found[0], wanted, atol=2e-5, rtol=0)
            assert not torch.allclose(wanted, full, atol=1e-3)


def altered(model, capture, decision, before, now):
    """The second of two calls, with the attention of every module replaced by hand."""
    kept = {}

    def replaced(path, layout, first):
        attend = model.get_submodule(path).attend

        def function(q, k, v):
            if first:
                kept[path] = attend(q, k, v)
                return kept[path]
            if decision == REUSE:
                return kept[path]
            if decision.cfg_shared:
                q, k, v = (part.chunk(2)[1] for part in (q, k, v))
            y = attend(q, k, v)
            if decision.window is not None:
                hidden = ~sees(layout, decision.window)
                y = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v
            return torch.cat([y, y]) if decision.cfg_shared else y

        return function

    outputs = []
    for first, inputs in ((True, before), (False, now)):
        originals = {site.path: model.get_submodule(site.path).attend for site in capture.model.sites}
        for site in capture.model.sites:
            model.get_submodule(site.path).attend = replaced(site.path, site.layout, first)
        outputs.append(model(**inputs))
        for path, attend in originals.items():
            model.get_submodule(path).attend = attend
    return outputs[1]


class Explicit(BareAttention):
    """Attention written as the two products that it is."""

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1) @ v
        return x + self.o(y.transpose(1, 2).flatten(2))


def test_two_products_become_one_attention():
    module, values = graph_of(Explicit().eval(), {"x": torch.randn(2, 6, 16)})
    before = printed(module)
    rewritten = canonical(module)
    assert changes(before, printed(rewritten)) == graph_text("""
        ...
        + %transpose = transpose(%transpose_3, -2, -1)  float32 (2, 2, 6, 8)
        + %sdpa = sdpa(%q, %transpose, %v, attn_mask=None, scale=0.3535533905932738)  float32 (2, 2, 6, 8)
        - %matmul = matmul(%q, %transpose_3)  float32 (2, 2, 6, 6)
        - %mul = mul(%matmul, 0.3535533905932738)  float32 (2, 2, 6, 6)
        - %softmax = softmax(%mul, -1)  float32 (2, 2, 6, 6)
        - %y = matmul(%softmax, %v)  float32 (2, 2, 6, 8)
        - %transpose_4 = transpose(%y, 1, 2)  float32 (2, 6, 2, 8)
        + %transpose_4 = transpose(%sdpa, 1, 2)  float32 (2, 6, 2, 8)
        ...
    """)
    assert printed(module) == before, "full attention runs what was captured"
    torch.testing.assert_close(rewritten(*values)[0], module(*values)[0], atol=1e-6, rtol=0)
