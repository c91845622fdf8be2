"""Tiny models with random weights: one of each diffusers family, and a few modules that are not diffusers'.

Their attention is sharpened, so that a wrong window or a wrong cache shows in the output. Every builder returns the
model in eval mode and the keyword arguments of one call.
"""

import operator
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from difa_compile.backend.entry import eager
from difa_compile.passes.analyse.batch_dims import annotate_batch
from difa_compile.passes.analyse.find_attention import find_attention
from difa_compile.passes.analyse.sample import latent_inputs
from difa_compile.passes.prepare.arguments import note_arguments
from difa_compile.passes.prepare.specialize import fix_sizes
from difa_compile.plan.plan import Cell, Plan, Settings, model_digest
from difa_compile.plan.schedule import uniform_progress
from tests.support.captures import capture_of

TEXT = 7
"""Text tokens of every model that has them."""


def sharpened(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            place = name.split(".")
            if len(place) > 1 and place[-2] in (
                "to_q",
                "to_k",
                "to_v",
                "add_q_proj",
                "add_k_proj",
                "add_v_proj",
                "qkv",
            ):
                parameter.mul_(3.0)
    return model.eval()


def dit(batch=2, layers=2, size=(8, 8), seed=0):
    """One stream, 4 x 4 tokens by default."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    inputs = {
        "hidden_states": torch.randn(batch, 4, *size),
        "timestep": torch.full((batch,), 5),
        "class_labels": torch.arange(batch) % 10,
        "return_dict": False,
    }
    return sharpened(model), inputs


def pixart(batch=2, layers=2, size=(8, 8)):
    """One stream and cross-attention to the text."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=32,
        caption_channels=24,
        use_additional_conditions=False,
    )
    inputs = {
        "hidden_states": torch.randn(batch, 4, *size),
        "timestep": torch.full((batch,), 5),
        "encoder_hidden_states": torch.randn(batch, TEXT, 24),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    return sharpened(model), inputs


def sd3(batch=2, layers=2, size=(8, 12)):
    """Joint attention over 4 x 6 image tokens, then text."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=12,
        patch_size=2,
        in_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=8,
    )
    inputs = {
        "hidden_states": torch.randn(batch, 4, *size),
        "timestep": torch.full((batch,), 5),
        "encoder_hidden_states": torch.randn(batch, TEXT, 24),
        "pooled_projections": torch.randn(batch, 20),
        "return_dict": False,
    }
    return sharpened(model), inputs


def flux(batch=2, layers=2, grid=(4, 6)):
    """Joint attention over text, then packed image tokens; double and single blocks."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=False,
    )
    ids = torch.zeros(*grid, 3)
    ids[..., 1] = torch.arange(grid[0])[:, None]
    ids[..., 2] = torch.arange(grid[1])
    tokens = grid[0] * grid[1]
    inputs = {
        "hidden_states": torch.randn(batch, tokens, 4),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, TEXT, 24),
        "pooled_projections": torch.randn(batch, 20),
        "img_ids": ids.reshape(tokens, 3),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }
    return sharpened(model), inputs


def wan(batch=2, layers=2, size=(3, 8, 8)):
    """One stream over 3 x 4 x 4 tokens of a video, cross-attention to the text."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
    )
    inputs = {
        "hidden_states": torch.randn(batch, 4, *size),
        "timestep": torch.full((batch,), 5),
        "encoder_hidden_states": torch.randn(batch, TEXT, 24),
        "return_dict": False,
    }
    return sharpened(model), inputs


FAMILIES = {"dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux, "wan": wan}

ATTENTIONS = {
    "dit": lambda path: path.endswith(".attn1"),
    "pixart": lambda path: path.endswith(".attn1"),
    "sd3": lambda path: path.endswith(".attn"),
    "flux": lambda path: path.endswith(".attn"),
    "wan": lambda path: path.endswith(".attn1"),
}
"""Which module paths of a family are self- or joint attention, said independently of what the graph shows."""


class Attention(nn.Module):
    """Self-attention through one fused projection, on (B, N, D), written unlike diffusers does it.

    ``mask``: "none", "mask" (additive, given) or "causal". ``rotate``: queries and keys are turned in place, by slices.
    """

    def __init__(self, width, heads, mask="none", rotate=False):
        super().__init__()
        self.heads, self.mask, self.rotate = heads, mask, rotate
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.rotate:
            query, key = turned(query), turned(key)
        bias = None
        if self.mask == "mask":
            tokens = torch.arange(x.shape[1])
            bias = -(tokens[:, None] - tokens).abs().to(x.dtype)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=self.mask == "causal")
        return self.out(y.transpose(1, 2).flatten(2))


def turned(x):
    """A rotary embedding that writes its result in place into an empty tensor, slice by slice."""
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None]
    one, two = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = one * angle.cos() - two * angle.sin()
    out[..., 1::2] = one * angle.sin() + two * angle.cos()
    return out


class Block(nn.Module):
    def __init__(self, width, attention):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = attention
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class PlainTransformer(nn.Module):
    """A denoiser over an image, with no class of diffusers in it: patches, blocks, unpatching."""

    def __init__(self, attentions, width=32):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.layers = nn.ModuleList(Block(width, attention) for attention in attentions)
        self.head = nn.Linear(width, 12)

    def forward(self, x):
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        y = self.patch(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            y = layer(y)
        y = self.head(y).unflatten(1, (height, width)).unflatten(-1, (2, 2, 3))
        return y.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def plain(batch=2, masks=("none", "none"), rotate=False, size=(8, 12)):
    """:class:`PlainTransformer` over 4 x 6 tokens; ``masks`` and ``rotate`` as in :class:`Attention`."""
    torch.manual_seed(0)
    model = PlainTransformer([Attention(32, 2, mask, rotate) for mask in masks])
    return sharpened(model), {"x": torch.randn(batch, 3, *size)}


class Average(nn.Module):
    """No attention anywhere: tokens are mixed by their mean."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.two(self.one(x) + self.one(x).mean(1, keepdim=True))


class BareAttention(nn.Module):
    """One attention directly in the model, followed by whatever ``after`` does to its result."""

    def __init__(self, after=None):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.o = nn.Linear(16, 16)
        self.after = after

    def forward(self, x):
        query, key, value = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return x + (self.o(y) if self.after is None else self.after(self, y))


# --- captured graphs -----------------------------------------------------------------------------------------------


def graph_of(model, inputs, *, args=(), **options):
    """The graph that Dynamo captures of one call, and the real values of its inputs; ``args`` are given by position."""
    found = []

    def keep(module, example_inputs):
        note_arguments(module.graph)
        found.append((module, list(example_inputs)))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, **{"dynamic": False, **options})(*args, **inputs)
    assert len(found) == 1, f"{len(found)} graphs"
    return found[0]


@cache
def captured(family, batch=2):
    """(model, inputs, graph, values of the graph's inputs) of a family; shared, so not to be changed."""
    model, inputs = FAMILIES[family](batch)
    return model, inputs, *graph_of(model, inputs)


def sites_of(module, values, **options):
    """The rewritable sites of a captured graph, with everything rewrites need annotated."""
    fix_sizes(module)
    annotate_batch(module.graph, latent_inputs(module.graph))
    return tuple(site for site in find_attention(module, values=values, **options) if site.rewritable)


def family_capture(family, batch=2, **options):
    """A :class:`Capture` of a family that runs eagerly, and the values of its graph's inputs."""
    _, _, module, values = captured(family, batch)
    return capture_of(module, values, eager, **options), values


def with_inputs(family, inputs, batch=2):
    """The graph's input values with the tensors of ``inputs`` in place of those of the family's own inputs."""
    _, own, _, values = captured(family, batch)
    swapped = {own[name].data_ptr(): value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return [swapped.get(v.data_ptr(), v) if isinstance(v, torch.Tensor) else v for v in values]


def plan_of(model, infos, rows, *, guidance=None, conditional_half=None):
    """A plan written by hand: ``rows[step]`` is one decision for all sites, or one per site."""
    cells = tuple(
        tuple(Cell(decision) for decision in (row if isinstance(row, (tuple, list)) else [row] * len(infos)))
        for row in rows
    )
    guidance = guidance or ("none" if conditional_half is None else "batched")
    settings = Settings(method="rule", guidance=guidance, conditional_half=conditional_half)
    return Plan(model_digest(model), settings, tuple(infos), uniform_progress(len(rows)), cells)


def family_plan(family, rows, **options):
    """:func:`plan_of` a family, with the sites that its graph shows."""
    model, _, module, values = captured(family)
    return plan_of(model, [site.info for site in sites_of(module, values)], rows, **options)


def counts(module):
    """(linears, attentions of any form) in a graph, read off its printed targets."""
    linears = attentions = 0
    for node in module.graph.nodes:
        if node.op == "call_function":
            name = getattr(node.target, "__name__", str(node.target))
            linears += name == "linear"
            attentions += name in ("scaled_dot_product_attention", "local_attention.default", "default")
    return linears, attentions


def in_place(node):
    return node.op == "call_function" and node.target is operator.setitem


@cache
def captured_plain(batch=2, rotate=False):
    """As :func:`captured`, of :func:`plain`."""
    model, inputs = plain(batch, rotate=rotate)
    return model, inputs, *graph_of(model, inputs)


def plain_plan(rows, **options):
    """A plan for :func:`plain`."""
    model, _, module, values = captured_plain()
    return plan_of(model, [site.info for site in sites_of(module, values)], rows, **options)


PLAIN_PATHS = ("layers.0.attention", "layers.1.attention")


def at_step(inputs, step):
    """The inputs of another step: other noise, another timestep."""
    generator = torch.Generator().manual_seed(100 + step)
    name = next(iter(inputs))
    changed = {**inputs, name: torch.randn(inputs[name].shape, generator=generator)}
    if "timestep" in changed:
        changed["timestep"] = (
            changed["timestep"] * (1 - 0.2 * step)
            if changed["timestep"].is_floating_point()
            else (changed["timestep"] + step)
        )
    return changed
