"""Diffusers' real video pipelines with tiny random parts, and what their plans are compared with.

Every builder makes the pipeline class itself: transformer (two layers, two heads of 16), VAE, text encoder and a
tokenizer over a vocabulary written to a folder. Nothing is fetched. Attention is not sharpened; parameters that start
as zeros are drawn anew, else the output would not depend on the attention.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from difa_compile.decision import FULL, Decision, Kind, WindowShape
from tests.support.extrapolated import extrapolated
from tests.support.single_heads import Heads
from tests.support.text_components import word_tokenizer
from tests.support.tiny_pipelines import drawn, quiet

TEXT_WIDTH = 24
WORDS = ("a", "red", "green", "cat", "dog", "walks", "sleeps", "in", "on", "grass", "blurry", "dark")
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}

WINDOW = "window(band:5)"
RESIDUAL = f"{WINDOW}+residual"


@dataclass
class Tiny:
    """A pipeline and how to call it.

    ``sites``: the paths of its self-attention, in execution order; ``numbers``: where each stands among all calls of
    ``scaled_dot_product_attention`` in one call of the transformer. ``two_calls``: guidance takes two calls per step,
    the conditional one first; else one call on ``[uncond, cond]``. ``text_comes_later``: than the first site.
    """

    pipe: diffusers.DiffusionPipeline
    arguments: dict
    sites: tuple[str, ...]
    numbers: tuple[int, ...]
    two_calls: bool = False
    text_comes_later: bool = True

    def frames(self, **arguments):
        """The video as an array; the same for the same arguments. Latents unless ``output_type`` says otherwise."""
        call = {**self.arguments, "generator": torch.Generator().manual_seed(3), "output_type": "latent", **arguments}
        frames = self.pipe(**call).frames
        return np.asarray(frames.float() if isinstance(frames, torch.Tensor) else frames)


def tokenizer(folder):
    """A tokenizer over ``WORDS``, loaded from the files it was written to."""
    word_tokenizer(WORDS, SPECIAL).save_pretrained(folder / "tokenizer")
    return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")


def text_encoder(config_class, model_class):
    torch.manual_seed(1)
    sizes = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return model_class(config_class(vocab_size=len(SPECIAL) + len(WORDS), dropout_rate=0.0, **sizes)).eval()


def wan_transformer(seed=0, layers=2):
    torch.manual_seed(seed)
    return drawn(
        diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=16,
            out_channels=16,
            text_dim=TEXT_WIDTH,
            freq_dim=16,
            ffn_dim=32,
            num_layers=layers,
        )
    )


def wan_scheduler(name):
    if name == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if name == "heun":
        return diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )


def wan(folder, scheduler="unipc", **components):
    """3 x 4 x 6 tokens; self-attention, then cross-attention to the text, in every block."""
    torch.manual_seed(2)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    parts = {
        "tokenizer": tokenizer(folder),
        "text_encoder": text_encoder(UMT5Config, UMT5EncoderModel),
        "vae": vae,
        "scheduler": wan_scheduler(scheduler),
        "transformer": wan_transformer(),
    }
    pipe = quiet(diffusers.WanPipeline(**{**parts, **components}))
    arguments = {
        "prompt": "a red cat walks on grass",
        "negative_prompt": "blurry",
        "height": 64,
        "width": 96,
        "num_frames": 9,
        "num_inference_steps": len(WAN_ROWS),
        "guidance_scale": 4.0,
        "max_sequence_length": 8,
    }
    return Tiny(pipe, arguments, ("blocks.0.attn1", "blocks.1.attn1"), (0, 2), two_calls=True)


def latte(folder):
    """Four sites: within a frame over 4 x 6 tokens, along time over 3 frames, twice."""
    torch.manual_seed(0)
    transformer = drawn(
        diffusers.LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=32,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=TEXT_WIDTH,
            video_length=3,
        )
    )
    vae = diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
    ).eval()
    pipe = diffusers.LattePipeline(
        tokenizer=tokenizer(folder),
        text_encoder=text_encoder(T5Config, T5EncoderModel),
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="linear", clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"
        ),
    )
    arguments = {
        "prompt": "a red cat walks on grass",
        "negative_prompt": "blurry",
        "height": 64,
        "width": 96,
        "video_length": 3,
        "num_inference_steps": len(LATTE_ROWS),
        "guidance_scale": 4.0,
        "clean_caption": False,
    }
    sites = (
        "transformer_blocks.0.attn1",
        "temporal_transformer_blocks.0.attn1",
        "transformer_blocks.1.attn1",
        "temporal_transformer_blocks.1.attn1",
    )
    return Tiny(quiet(pipe), arguments, sites, (0, 2, 3, 5))


def cogvideox(folder, form="2b", scheduler="ddim"):
    """Joint attention over 8 text tokens, then 3 x 4 x 6 image tokens.

    ``form``: "2b" adds a table of positions to the tokens, "5b" turns queries and keys, "1.5" does that too and puts
    two frames into a token, so that 4 latent frames (one of padding) make 2 x 4 x 6 tokens.
    """
    torch.manual_seed(0)
    sizes = {"use_rotary_positional_embeddings": form != "2b", "sample_frames": 9}
    if form == "1.5":
        sizes |= {"patch_size_t": 2, "patch_bias": False}
    transformer = drawn(
        diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=TEXT_WIDTH,
            num_layers=2,
            sample_height=8,
            sample_width=12,
            max_text_seq_length=8,
            **sizes,
        )
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()
    schedulers = {"ddim": diffusers.CogVideoXDDIMScheduler, "dpm": diffusers.CogVideoXDPMScheduler}
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=tokenizer(folder),
        text_encoder=text_encoder(T5Config, T5EncoderModel),
        vae=vae,
        transformer=transformer,
        scheduler=schedulers[scheduler](
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0 if form == "2b" else 1.0,
            timestep_spacing="trailing",
        ),
    )
    arguments = {
        "prompt": "a red cat walks on grass",
        "negative_prompt": "blurry",
        "height": 64,
        "width": 96,
        "num_frames": 9,
        "num_inference_steps": len(COGVIDEOX_ROWS),
        "guidance_scale": 4.0,
        "max_sequence_length": 8,
    }
    return Tiny(
        quiet(pipe),
        arguments,
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
        (0, 1),
        text_comes_later=False,
    )


def decisions(*rows):
    return [tuple(Decision.parse(text) for text in row) for row in rows]


WAN_ROWS = COGVIDEOX_ROWS = decisions(
    ("full", "full"),
    ("reuse", RESIDUAL),
    (RESIDUAL, "reuse"),
    ("full+cfg", f"{RESIDUAL}+cfg"),
    ("reuse+cfg", f"{WINDOW}+cfg"),
    (RESIDUAL, "reuse"),
)
"""Every kind of decision, each with and without sharing, each reader after its filler."""

ALONG_TIME = "window(band:1)"
LATTE_ROWS = decisions(
    ("full", "full", "full", "full"),
    ("reuse", f"{ALONG_TIME}+residual", RESIDUAL, "reuse"),
    ("full+cfg", "reuse", f"{RESIDUAL}+cfg", "full+cfg"),
    ("reuse+cfg", "full+cfg", "reuse", f"{ALONG_TIME}+residual+cfg"),
    (WINDOW, "reuse", f"{WINDOW}+cfg", ALONG_TIME),
)
"""The same for four sites, the second and fourth along time."""


def without_sharing(rows):
    return [tuple(Decision(decision.kind, decision.window) for decision in row) for row in rows]


@cache
def sees(layout, window):
    """bool (tokens, tokens): the definition of a band, token by token."""
    assert window.shape is WindowShape.BAND
    table = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    for i in range(layout.image_tokens):
        for j in range(layout.image_tokens):
            table[layout.before + i, layout.before + j] = abs(i - j) <= window.radius
    return table


@dataclass
class Altered:
    """The pipeline run as it is, its attention altered by hand: ``rows[step][site]`` with nothing of the package.

    ``layouts``: of the sites, in order. A full step leaves the residual against the window of the site's rows. Kept
    per transformer and guidance branch: the outputs that were computed, the newest first, with step and timestep, and
    the residuals. What would read before anything is kept, or enough, is full; ``promoted`` lists its steps and sites.
    """

    tiny: Tiny
    rows: list
    layouts: tuple
    guided: bool = True
    outputs: dict = field(default_factory=dict)
    now: dict = field(default_factory=dict)
    residuals: dict = field(default_factory=dict)
    heads: dict = field(default_factory=dict)
    promoted: set = field(default_factory=set)
    calls: int = 0

    def frames(self, **arguments):
        pipe = self.tiny.pipe
        models = [model for model in (pipe.transformer, getattr(pipe, "transformer_2", None)) if model is not None]
        for model in models:
            model.forward = partial(self.call, model, model.forward)
        try:
            return self.tiny.frames(**{"num_inference_steps": len(self.rows), **arguments})
        finally:
            for model in models:
                del model.forward

    def call(self, model, forward, *args, **kwargs):
        step, branch = divmod(self.calls, 2) if self.tiny.two_calls and self.guided else (self.calls, 0)
        self.calls += 1
        self.timestep = float(kwargs["timestep"].flatten()[0])
        with self.attending(model, step, branch):
            return forward(*args, **kwargs)

    @contextmanager
    def attending(self, model, step, branch):
        plain, site_of, count = F.scaled_dot_product_attention, {n: i for i, n in enumerate(self.tiny.numbers)}, 0

        def attend(query, key, value, **options):
            nonlocal count
            site, count = site_of.get(count), count + 1
            if site is None:
                return plain(query, key, value, **options)
            return self.attend(plain, model, step, branch, site, (query, key, value), options)

        F.scaled_dot_product_attention = attend
        try:
            yield
        finally:
            F.scaled_dot_product_attention = plain

    def attend(self, plain: Callable, model, step, branch, site, tensors, options):
        decision, place, conditional = self.rows[step][site], (model, branch, site), (model, 0, site)
        shared = decision.cfg_shared
        past = self.outputs.get(place, [])
        heads = self.heads.setdefault(place, Heads(self.layouts[site], sees))
        reads = decision.kind in (Kind.REUSE, Kind.FORECAST)
        if heads.lacks(decision) or (
            len(past) <= decision.order
            if reads
            else decision.kind is Kind.WINDOW_RESIDUAL and place not in self.residuals
        ):
            reads = False
            decision = Decision(Kind.FULL, None, shared)
            self.promoted.add((step, site))
        if shared and self.tiny.two_calls:
            if branch:  # the unconditional call takes what the conditional one had
                result = self.now[conditional]
                if not reads:
                    self.outputs[place] = [(step, self.timestep, result), *past]
                heads.take(decision, self.heads[conditional], tensors[0].shape[1])
                if decision.kind is Kind.FULL and conditional in self.residuals:
                    self.residuals[place] = self.residuals[conditional]
                return result
            shared = False
        if reads:
            reuses = decision.kind is Kind.REUSE
            result = past[0][2] if reuses else extrapolated(decision, past, step, self.timestep)
            self.now[place] = twice(second_half(result)) if shared else result
            return self.now[place]
        if shared:
            tensors = tuple(second_half(tensor) for tensor in tensors)
        near = self.near(site, decision, tensors, options)
        if decision.groups:
            result = heads.attend(decision, plain, tensors, options, second_half if shared else lambda value: value)
        elif decision.kind is Kind.FULL:
            result = plain(*tensors, **options)
            if near is not None:
                self.residuals[place] = twice(result - near) if shared else result - near
        elif decision.kind is Kind.WINDOW:
            result = near
        else:
            kept = self.residuals[place]
            result = near + (second_half(kept) if shared else kept)
        heads.note(decision, tensors, result, twice if shared else lambda value: value)
        self.now[place] = twice(result) if shared else result
        self.outputs[place] = [(step, self.timestep, self.now[place]), *past]
        return self.now[place]

    def near(self, site, decision, tensors, options):
        """Attention with far keys hidden; of a full step, against the window of the site's other steps."""
        window = decision.window or next((row[site].window for row in self.rows if row[site].window), None)
        if window is None:
            return None
        assert options.get("attn_mask") is None
        query, key, value = tensors
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        return scores.masked_fill(~sees(self.layouts[site], window), -torch.inf).softmax(-1) @ value


def second_half(tensor):
    """The conditional half of ``[uncond, cond]``."""
    return tensor[tensor.shape[0] // 2 :]


def twice(tensor):
    return torch.cat([tensor, tensor])


def lesser_rows(rows):
    """``rows`` with one decision after the other made full, where the later rows can still be carried out."""
    for step, row in enumerate(rows):
        for site, decision in enumerate(row):
            if decision != FULL:
                yield (
                    step,
                    site,
                    [tuple(FULL if (s, i) == (step, site) else d for i, d in enumerate(r)) for s, r in enumerate(rows)],
                )
