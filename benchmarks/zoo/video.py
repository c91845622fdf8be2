"""Tiny video transformers: latents of 2 or 3 frames of 4 x 6 tokens, for two samples."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15ByT5TextProjection

from benchmarks.zoo.registry import Example, model

BATCH, TEXT, TEXT_WIDTH, FRAMES = 2, 7, 24, 2
GRID = (4, 6)
SIZE = (8, 12)
"""Rows and columns of a latent frame that is cut into patches of 2 x 2, :data:`GRID` of them."""


def text(tokens: int = TEXT, width: int = TEXT_WIDTH) -> torch.Tensor:
    return torch.randn(BATCH, tokens, width)


def visible(tokens: int = TEXT, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """A mask of the text that hides nothing, for the classes that cannot do without."""
    return torch.ones(BATCH, tokens, dtype=dtype)


def frames_first(channels: int = 4) -> torch.Tensor:
    return torch.randn(BATCH, FRAMES, channels, *SIZE)


def channels_first(channels: int = 4, frames: int = FRAMES) -> torch.Tensor:
    return torch.randn(BATCH, channels, frames, *SIZE)


def channels_last(channels: int, size: tuple[int, int] = SIZE) -> torch.Tensor:
    """Noise, then a condition (absent: zeros) of as many channels, then the condition's mask."""
    noise = torch.randn(BATCH, FRAMES, *size, channels)
    return torch.cat([noise, torch.zeros(BATCH, FRAMES, *size, channels + 1)], dim=-1)


def at(step: float = 500.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((BATCH,), step, dtype=dtype)


def cogvideo_rotary(head_dim: int) -> Any:
    """Cosines and sines for the patches, at the size the model was trained for."""
    return get_3d_rotary_pos_embed(head_dim, ((0, 0), GRID), GRID, FRAMES)


def allegro_rotary(net: Any) -> Any:
    """Three tables of cosines and sines, and the place of every patch in each of them."""
    scale = (net.config.interpolation_scale_t, net.config.interpolation_scale_h, net.config.interpolation_scale_w)
    *tables, t, h, w = get_3d_rotary_pos_embed_allegro(
        net.config.attention_head_dim, ((0, 0), GRID), GRID, FRAMES, interpolation_scale=scale
    )
    places = torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1).contiguous()
    return tuple(tables), tuple(places)


@model("CogVideoXTransformer3DModel")
def cogvideox() -> Example:
    net = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=TEXT_WIDTH,
        num_layers=2,
        sample_height=SIZE[0],
        sample_width=SIZE[1],
        sample_frames=5,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )
    inputs = {
        "hidden_states": frames_first(),
        "encoder_hidden_states": text(),
        "timestep": at(500, torch.long),
        "image_rotary_emb": cogvideo_rotary(16),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("ConsisIDTransformer3DModel")
def consisid() -> Example:
    """CogVideoX, and after every second block an attention to a face, written without SDPA."""
    width = 48
    net = diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=TEXT_WIDTH,
        num_layers=2,
        sample_height=SIZE[0],
        sample_width=SIZE[1],
        sample_frames=5,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_dim_head=16,
        cross_attn_num_heads=2,
        LFE_id_dim=20,
        LFE_vit_dim=16,
        LFE_depth=2,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=4,
        LFE_output_dim=width * 2 // 3,
        LFE_ff_mult=2,
        LFE_num_scale=2,
    )
    inputs = {
        "hidden_states": frames_first(8),
        "encoder_hidden_states": text(),
        "timestep": at(500, torch.long),
        "image_rotary_emb": cogvideo_rotary(16),
        "id_cond": torch.randn(BATCH, 20),
        "id_vit_hidden": [torch.randn(BATCH, 5, 16) for _ in range(2)],
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("LatteTransformer3DModel")
def latte() -> Example:
    """Blocks take turns: within a frame (batch of all frames), along time (batch of all places)."""
    net = diffusers.LatteTransformer3DModel(
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
    inputs = {
        "hidden_states": channels_first(frames=3),
        "timestep": at(500, torch.long),
        "encoder_hidden_states": text(),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("AllegroTransformer3DModel")
def allegro() -> Example:
    """The width of a head is the smallest above 16 that its rotary embedding can cut into three even parts."""
    net = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=18,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=36,
        sample_height=SIZE[0],
        sample_width=SIZE[1],
        sample_frames=FRAMES,
        caption_channels=TEXT_WIDTH,
    )
    inputs = {
        "hidden_states": channels_first(),
        "encoder_hidden_states": text(),
        "timestep": at(500, torch.long),
        "image_rotary_emb": allegro_rotary(net),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("AnyFlowTransformer3DModel")
def anyflow() -> Example:
    net = diffusers.AnyFlowTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )
    inputs = {
        "hidden_states": frames_first(),
        "timestep": torch.full((BATCH, FRAMES), 500.0),
        "r_timestep": torch.full((BATCH, FRAMES), 400.0),
        "encoder_hidden_states": text(),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("AnyFlowFARTransformer3DModel")
def anyflow_far() -> Example:
    """The third chunk of a video, of 2 frames: the first is cached in coarse patches, the second in fine ones."""
    chunks = [1, 1, FRAMES]
    net = diffusers.AnyFlowFARTransformer3DModel(
        full_chunk_limit=2,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
        chunk_partition=tuple(chunks),
    )
    fine, coarse = GRID[0] * GRID[1], GRID[0] * GRID[1] // 4
    cache = {
        layer: {
            "full_cache": torch.randn(2, BATCH, 2, 2 * FRAMES * fine, 16),
            "compressed_cache": torch.randn(2, BATCH, 2, 2 * FRAMES * coarse, 16),
        }
        for layer in range(2)
    }
    inputs = {
        "hidden_states": frames_first(),
        "timestep": torch.full((BATCH, FRAMES), 500.0),
        "r_timestep": torch.full((BATCH, FRAMES), 400.0),
        "encoder_hidden_states": text(),
        "chunk_partition": chunks,
        "kv_cache": cache,
        "kv_cache_flag": {"num_cached_chunks": 2, "is_cache_step": False},
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("ChronoEditTransformer3DModel")
def chronoedit() -> Example:
    """512 text tokens, because its attention to an image takes whatever comes before the last 512.

    The width of a head is the smallest above 16 whose rotary embedding is cut in the same places twice.
    """
    net = diffusers.ChronoEditTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=18,
        in_channels=9,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
        image_dim=20,
        added_kv_proj_dim=36,
        rope_max_seq_len=32,
    )
    inputs = {
        "hidden_states": channels_first(9),
        "timestep": at(),
        "encoder_hidden_states": text(512),
        "encoder_hidden_states_image": text(5, 20),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("CosmosTransformer3DModel")
def cosmos() -> Example:
    """Without the channel of the padding mask, whose resizing needs torchvision."""
    net = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_WIDTH,
        adaln_lora_dim=8,
        max_size=(4, 16, 24),
        concat_padding_mask=False,
    )
    inputs = {
        "hidden_states": channels_first(),
        "timestep": at(0.5),
        "encoder_hidden_states": text(),
        "fps": 30,
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("EasyAnimateTransformer3DModel")
def easyanimate() -> Example:
    """Two blocks with weights of their own for the text, then two that share them."""
    net = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_height=SIZE[0],
        sample_width=SIZE[1],
        num_layers=4,
        mmdit_layers=2,
        time_embed_dim=16,
        text_embed_dim=TEXT_WIDTH,
    )
    inputs = {
        "hidden_states": channels_first(),
        "timestep": at(),
        "encoder_hidden_states": text(),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("HeliosTransformer3DModel")
def helios() -> Example:
    """A history before the noisy frames: 4 frames in patches of 4 x 8 x 8, 2 of 2 x 4 x 4, 2 of 1 x 2 x 2."""
    net = diffusers.HeliosTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
        rope_dim=(4, 6, 6),
    )
    first, long, mid, short, noisy = torch.arange(1 + 4 + 2 + 1 + FRAMES)[None].split([1, 4, 2, 1, FRAMES], dim=1)
    inputs = {
        "hidden_states": channels_first(),
        "timestep": at(500, torch.long),
        "encoder_hidden_states": text(),
        "indices_hidden_states": noisy,
        "indices_latents_history_short": torch.cat([first, short], dim=1),
        "indices_latents_history_mid": mid,
        "indices_latents_history_long": long,
        "latents_history_short": channels_first(frames=2),
        "latents_history_mid": channels_first(frames=2),
        "latents_history_long": channels_first(frames=4),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("HunyuanVideoTransformer3DModel")
def hunyuan_video() -> Example:
    """Patches, then text; double and single blocks; two blocks over the text alone before them."""
    net = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=20,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = {
        "hidden_states": channels_first(),
        "timestep": at(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": visible(),
        "pooled_projections": torch.randn(BATCH, 20),
        "guidance": at(6000.0),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("HunyuanVideo15Transformer3DModel")
def hunyuan_video15() -> Example:
    """Patches of 1 x 1, then image, glyphs and prompt.

    The embedder of the glyphs is 2048 wide whatever one asks for, so a narrow one takes its place.
    """
    net = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_WIDTH,
        text_embed_2_dim=20,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    net.context_embedder_2 = HunyuanVideo15ByT5TextProjection(20, 32, 32)
    inputs = {
        "hidden_states": torch.randn(BATCH, 9, FRAMES, *GRID),
        "timestep": at(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": visible(),
        "encoder_hidden_states_2": text(5, 20),
        "encoder_attention_mask_2": visible(5),
        "image_embeds": text(3, 16),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("HunyuanVideoFramepackTransformer3DModel")
def framepack() -> Example:
    """A history before the noisy frames, of three resolutions; after them an image, then the text."""
    net = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=20,
        rope_axes_dim=(4, 6, 6),
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )
    first, noisy, near, mid, far = torch.arange(1 + FRAMES + 1 + 2 + 4).split([1, FRAMES, 1, 2, 4])
    inputs = {
        "hidden_states": channels_first(),
        "timestep": at(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": visible(),
        "pooled_projections": torch.randn(BATCH, 20),
        "image_embeds": text(3, 16),
        "indices_latents": noisy,
        "guidance": at(6000.0),
        "latents_clean": channels_first(frames=2),
        "indices_latents_clean": torch.cat([first, near]),
        "latents_history_2x": channels_first(frames=2),
        "indices_latents_history_2x": mid,
        "latents_history_4x": channels_first(frames=4),
        "indices_latents_history_4x": far,
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("Kandinsky5Transformer3DModel")
def kandinsky5() -> Example:
    net = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=20,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=True,
    )
    inputs = {
        "hidden_states": channels_last(4),
        "encoder_hidden_states": text(),
        "timestep": at(),
        "pooled_projections": torch.randn(BATCH, 20),
        "visual_rope_pos": [torch.arange(size) for size in (FRAMES, *GRID)],
        "text_rope_pos": torch.arange(TEXT),
        "scale_factor": (1.0, 2.0, 2.0),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("Kandinsky6Transformer3DModel")
def kandinsky6() -> Example:
    """Video and 10 tokens of sound, side by side, each attending to itself, to the text and to the other."""
    net = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=20,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        in_audio_dim=5,
        out_audio_dim=5,
    )
    inputs = {
        "hidden_states": channels_last(4),
        "encoder_hidden_states": text(),
        "pooled_projections": torch.randn(BATCH, 20),
        "timestep": at(),
        "audio_hidden_states": torch.randn(BATCH, 10, 5),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("Kandinsky6SRTransformer3DModel")
def kandinsky6_sr() -> Example:
    """Frames of 8 x 16 tokens, tile after tile of 8 x 8; no text; a block mask computed from queries and keys."""
    net = diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )
    inputs = {"hidden_states": channels_last(4, (8, 16)), "timestep": at(), "return_dict": False}
    return Example(net, inputs, latent="hidden_states")


@model("LTXVideoTransformer3DModel")
def ltx() -> Example:
    """Packed: one latent pixel is one token."""
    net = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, FRAMES * GRID[0] * GRID[1], 8),
        "encoder_hidden_states": text(),
        "timestep": at(),
        "encoder_attention_mask": None,
        "num_frames": FRAMES,
        "height": GRID[0],
        "width": GRID[1],
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("LTX2VideoTransformer3DModel")
def ltx2() -> Example:
    """Packed video and 10 tokens of sound, side by side, each attending to itself, to the text and to the other."""
    sound = 10
    net = diffusers.LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=6,
        audio_out_channels=6,
        audio_num_attention_heads=2,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
        rope_type="split",
    )
    cpu = torch.device("cpu")
    inputs = {
        "hidden_states": torch.randn(BATCH, FRAMES * GRID[0] * GRID[1], 8),
        "audio_hidden_states": torch.randn(BATCH, sound, 6),
        "encoder_hidden_states": text(),
        "audio_encoder_hidden_states": text(),
        "timestep": at(),
        "sigma": at(),
        "num_frames": FRAMES,
        "height": GRID[0],
        "width": GRID[1],
        "fps": 24.0,
        "audio_num_frames": sound,
        "video_coords": net.rope.prepare_video_coords(BATCH, FRAMES, *GRID, cpu, fps=24.0),
        "audio_coords": net.audio_rope.prepare_audio_coords(BATCH, sound, cpu),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("MochiTransformer3DModel")
def mochi() -> Example:
    """Two blocks, and the last, which drops the text; its attention goes through the samples one by one."""
    net = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=32,
        time_embed_dim=16,
        max_sequence_length=TEXT,
    )
    inputs = {
        "hidden_states": channels_first(),
        "encoder_hidden_states": text(width=32),
        "timestep": at(),
        "encoder_attention_mask": visible(dtype=torch.bool),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")
