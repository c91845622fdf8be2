"""Real diffusers image pipelines over tiny random components, and what their planned runs are compared with.

All pipelines but DiT make 16 x 24 pixels from latents of 8 x 12: 4 x 6 image tokens. Text encoders and tokenizers are
made here as well, from a vocabulary of eight words.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from difa_compile.decision import FULL, Kind
from difa_compile.layout import Layout
from tests.support.altered import sees
from tests.support.extrapolated import extrapolated
from tests.support.single_heads import Heads
from tests.support.text_components import word_tokenizer
from tests.support.tiny_pipelines import drawn, quiet, tiny_pipeline

HEIGHT, WIDTH = 16, 24
GRID = (4, 6)
TEXT_TOKENS = 8
"""Of one text encoder; SD3 appends the T5's to the CLIPs', Flux takes the T5's alone."""
WORDS = ("a", "red", "house", "two", "small", "boats", "blurred", "grey")
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
TEXT_WIDTH, CLIP_WIDTH = 32, 16
MODEL = {"num_attention_heads": 2, "attention_head_dim": 16}


# Components


def tokenizer():
    """Words of ``WORDS`` between a begin and an end token, eight in all."""
    return word_tokenizer(WORDS, SPECIAL, model_max_length=TEXT_TOKENS)


def t5():
    torch.manual_seed(11)
    config = T5Config(
        vocab_size=len(SPECIAL) + len(WORDS), d_model=TEXT_WIDTH, d_kv=16, d_ff=32, num_layers=1, num_heads=2
    )
    return T5EncoderModel(config).eval()


def clip(cls, seed):
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=CLIP_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS,
        projection_dim=CLIP_WIDTH,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return cls(config).eval()


def autoencoder():
    """Halves height and width; four latent channels."""
    torch.manual_seed(12)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        shift_factor=0.1,
    ).eval()


# Pipelines


def dit():
    """Class labels for prompts; 4 x 4 tokens, images of 8 x 8; ``[cond, uncond]``."""
    return tiny_pipeline()


def pixart_sigma(scheduler=None):
    """One T5; self- and cross-attention in turn; a learned sigma beside the velocity; ``[uncond, cond]``.

    Velocity, since a random model that is to predict noise makes latents so large that it hardly sees its own output.
    """
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        **MODEL,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=TEXT_WIDTH,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    )
    scheduler = scheduler or DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    return quiet(PixArtSigmaPipeline(tokenizer(), t5(), autoencoder(), drawn(transformer, seed=13), scheduler))


def sd3(cls=StableDiffusion3Pipeline):
    """As SD 3.5: joint attention (image, then text), in the first block also within the image; ``[uncond, cond]``."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        **MODEL,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return quiet(
        cls(
            transformer=drawn(transformer, seed=13),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(),
            text_encoder=clip(CLIPTextModelWithProjection, 1),
            tokenizer=tokenizer(),
            text_encoder_2=clip(CLIPTextModelWithProjection, 2),
            tokenizer_2=tokenizer(),
            text_encoder_3=t5(),
            tokenizer_3=tokenizer(),
        )
    )


def sd3_img2img():
    return sd3(StableDiffusion3Img2ImgPipeline)


def flux(cls=FluxPipeline):
    """A double block and a single one; packed tokens behind the text; guidance is embedded or takes two calls."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        **MODEL,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return quiet(
        cls(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=autoencoder(),
            text_encoder=clip(CLIPTextModel, 1),
            tokenizer=tokenizer(),
            text_encoder_2=t5(),
            tokenizer_2=tokenizer(),
            transformer=drawn(transformer, seed=13),
        )
    )


def flux_img2img():
    """Its two calls of a step have no names."""
    return flux(FluxImg2ImgPipeline)


# LoRA


class LoraLinear(nn.Module):
    """A linear layer with a low-rank term beside it, in the form in which peft puts it there."""

    def __init__(self, base, rank=2, scaling=1.0):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.scaling = scaling

    def forward(self, x):
        low = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + low * self.scaling

    def delta(self):
        return self.scaling * self.lora_B["default"].weight @ self.lora_A["default"].weight


def add_lora(
    transformer, seed=21, names=("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0")
):
    """Put a :class:`LoraLinear` in place of the attentions' projections; returns them by module path."""
    torch.manual_seed(seed)
    linears = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    added = {}
    for path, linear in linears.items():
        if not path.endswith(tuple(f".{name}" for name in names)):
            continue
        added[path] = LoraLinear(linear).eval()
        with torch.no_grad():
            for part in (added[path].lora_A, added[path].lora_B):
                part["default"].weight.requires_grad_(False).normal_(0.0, 0.3)
        transformer.set_submodule(path, added[path])
    return added


def take_lora_off(transformer, added):
    for path, lora in added.items():
        transformer.set_submodule(path, lora.base_layer)


# The reference


class Altered:
    """A pipeline whose transformer runs eagerly, with its attention calls altered by hand.

    ``rows[step][site]``: what site does what at which step. ``layouts``: of each site. ``calls``: the number, within a
    call of the transformer, of each site's attention call; the other attention calls stay as they are. ``half``:
    position of the conditional half in the batch. ``two_calls``: a step is a conditional call, then an unconditional
    one. ``window``: what residuals are taken against.

    An attention's result stands for what leaves its projection: the one follows from the other by weights alone.
    """

    def __init__(self, rows, layouts, window, *, calls, half=None, two_calls=False):
        self.rows, self.layouts, self.window = rows, layouts, window
        self.site_of = {call: site for site, call in enumerate(calls)}
        self.half, self.two_calls = half, two_calls
        self.made = 0
        """Calls of the transformer so far."""
        self.past, self.residuals = ({}, {}), ({}, {})
        """By branch and site: the outputs that were computed, the newest first, with step and timestep; residuals."""
        self.heads = tuple([Heads(layout, sees) for layout in layouts] for _ in range(2))
        self.now = {}
        """What the conditional call of this step has given, by site."""

    @contextmanager
    def of(self, pipe):
        """Within this block the pipeline's transformer is altered."""
        plain = pipe.transformer.forward

        def forward(*args, **kwargs):
            step, branch = divmod(self.made, 2) if self.two_calls else (self.made, 0)
            self.made += 1
            self.step, self.timestep = step, float(kwargs["timestep"].flatten()[0])
            with self.attending(self.rows[step], branch):
                return plain(*args, **kwargs)

        pipe.transformer.forward = forward
        try:
            yield
        finally:
            del pipe.transformer.forward

    @contextmanager
    def attending(self, row, branch):
        plain, count = F.scaled_dot_product_attention, 0

        def attend(query, key, value, **options):
            nonlocal count
            site = self.site_of.get(count)
            count += 1
            if site is None:
                return plain(query, key, value, **options)
            return self.decided(site, row[site], branch, plain, (query, key, value), options)

        F.scaled_dot_product_attention = attend
        try:
            yield
        finally:
            F.scaled_dot_product_attention = plain

    def decided(self, site, decision, branch, plain, operands, options):
        past, residuals = self.past[branch].setdefault(site, []), self.residuals[branch]
        shared = decision.cfg_shared
        heads = self.heads[branch][site]
        if shared and self.two_calls and branch == 1:
            heads.take(decision, self.heads[0][site], operands[0].shape[1])
            if decision.kind is Kind.FULL:
                residuals[site] = self.residuals[0][site]
            result = self.now[site]
        elif decision.kind in (Kind.REUSE, Kind.FORECAST):
            reuses = decision.kind is Kind.REUSE
            result = past[0][2] if reuses else extrapolated(decision, past, self.step, self.timestep)
            if shared and not self.two_calls:
                result = torch.cat([self.conditional(result)] * 2)
        else:
            halved = shared and not self.two_calls
            if halved:
                operands = tuple(self.conditional(operand) for operand in operands)
            if decision.groups:
                part = self.conditional if halved else lambda value: value
                result = residual = heads.attend(decision, plain, operands, options, part)
            else:
                result, residual = self.computed(site, decision, plain, operands, options, residuals, halved)
            whole = (lambda value: torch.cat([value, value])) if halved else lambda value: value
            heads.note(decision, operands, result, whole)
            if halved:
                result, residual = (torch.cat([value, value]) for value in (result, residual))
            if decision.kind is Kind.FULL:
                residuals[site] = residual
        if decision.kind not in (Kind.REUSE, Kind.FORECAST):
            past.insert(0, (self.step, self.timestep, result))
        self.now[site] = result
        return result

    def computed(self, site, decision, plain, operands, options, residuals, halved):
        """The attention of one decision, and full - window."""
        query, key, value = operands
        full = plain(query, key, value, **options)
        hidden = ~sees(self.layouts[site], decision.window or self.window)
        scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
        near = scores.softmax(-1) @ value
        if decision.kind is Kind.FULL:
            return full, full - near
        if decision.kind is Kind.WINDOW:
            return near, near
        return near + (self.conditional(residuals[site]) if halved else residuals[site]), near

    def conditional(self, value):
        size = value.shape[0] // 2
        return value[self.half * size : (self.half + 1) * size]


IMAGE = Layout(GRID)
IMAGE_THEN_TEXT = Layout(GRID, 0, 2 * TEXT_TOKENS)
TEXT_THEN_IMAGE = Layout(GRID, TEXT_TOKENS, 0)


def all_full(sites, steps):
    """Rows of a plan that changes nothing."""
    return ((FULL,) * sites,) * steps
