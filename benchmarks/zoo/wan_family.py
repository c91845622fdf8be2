"""Wan and its relatives, SANA-Video and SANA-WM, Motif-Video and the temporal transformer, tiny."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

from benchmarks.zoo.registry import Example, model

BATCH = 2
TEXT = 7
TEXT_WIDTH = 24
FRAMES, HEIGHT, WIDTH = 3, 8, 12
"""Latent size of a video: with patches of 2 there are 3 x 4 x 6 tokens."""

HEADS, HEAD_DIM = 2, 16
INNER = HEADS * HEAD_DIM

WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "out_channels": 4,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 2,
}


def video(channels: int, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(BATCH, channels, frames, height, width)


def text(tokens: int = TEXT) -> torch.Tensor:
    return torch.randn(BATCH, tokens, TEXT_WIDTH)


def timesteps() -> torch.Tensor:
    return torch.full((BATCH,), 500)


def camera_path(frames: int, height: int, width: int) -> torch.Tensor:
    """(B, F, 20): a camera that moves forward, as flat camera-to-world matrices and intrinsics in latent pixels."""
    poses = torch.eye(4).repeat(frames, 1, 1)
    poses[:, 2, 3] = 0.1 * torch.arange(frames)
    intrinsics = torch.tensor([width, width, width / 2, height / 2]).expand(frames, 4)
    return torch.cat([poses.flatten(1), intrinsics], dim=1).repeat(BATCH, 1, 1)


@model("MotifVideoTransformer3DModel")
def motif_video() -> Example:
    """Two double blocks and two single blocks with cross-attention to the text, two decoder blocks without."""
    net = diffusers.MotifVideoTransformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_single_layers=4,
        num_decoder_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_WIDTH,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )
    inputs = {
        "hidden_states": video(9),
        "timestep": timesteps(),
        "encoder_hidden_states": text(),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("SanaVideoTransformer3DModel")
def sana_video() -> Example:
    net = diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=HEAD_DIM,
        cross_attention_dim=INNER,
        caption_channels=TEXT_WIDTH,
        mlp_ratio=2.0,
    )
    inputs = {
        "hidden_states": video(4),
        "encoder_hidden_states": text(),
        "timestep": timesteps(),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("SanaWMTransformer3DModel")
def sana_wm() -> Example:
    """Two blocks with a gated delta rule and two with softmax, each with a second branch for the camera."""
    height, width = HEIGHT // 2, WIDTH // 2
    net = diffusers.SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=4,
        hidden_size=INNER,
        num_attention_heads=HEADS,
        softmax_every_n=2,
        linear_head_dim=HEAD_DIM,
        chunk_plucker_channels=6,
        caption_channels=TEXT_WIDTH,
        mlp_ratio=2.0,
    )
    inputs = {
        "hidden_states": video(4, height=height, width=width),
        "timestep": torch.tensor([0, 500, 500]).repeat(BATCH, 1, 1),
        "encoder_hidden_states": text()[:, None],
        "encoder_attention_mask": torch.ones(BATCH, TEXT, dtype=torch.long),
        "camera_conditions": camera_path(FRAMES, height, width),
        "chunk_plucker": video(6, height=height, width=width),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("SanaWMLTX2RefinerTransformer3DModel")
def sana_wm_refiner() -> Example:
    """A denoising step of two frames, which also look at a frame kept from the start and at two earlier frames."""
    height, width, frames, sink, history = HEIGHT // 2, WIDTH // 2, 2, 1, 2
    layers, channels = 2, 4
    net = diffusers.SanaWMLTX2RefinerTransformer3DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=INNER,
        audio_in_channels=channels,
        audio_out_channels=channels,
        audio_num_attention_heads=HEADS,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=layers,
        caption_channels=TEXT_WIDTH,
        rope_type="split",
    )

    def rotary(positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        angles: tuple[torch.Tensor, torch.Tensor] = net.build_rotary_emb_for_absolute_positions(
            BATCH, positions, height, width, torch.device("cpu"), fps=16.0
        )
        return angles

    def keys_or_values(count: int) -> torch.Tensor:
        return torch.randn(BATCH, count * height * width, INNER)

    cache = SanaWMRefinerKVCache(layers)
    cache.sink_pe = rotary(list(range(sink)))
    for layer in cache.layer_caches:
        layer.store_sink(keys_or_values(sink), keys_or_values(sink))
        layer.store_history(keys_or_values(history), keys_or_values(history))
    inputs = {
        "hidden_states": torch.randn(BATCH, frames * height * width, channels),
        "encoder_hidden_states": text(),
        "timestep": torch.full((BATCH, frames * height * width), 500.0),
        "video_rotary_emb": rotary(list(range(sink + history, sink + history + frames))),
        "kv_cache": cache,
        "kv_cache_mode": "inject",
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("SkyReelsV2Transformer3DModel")
def skyreels_v2() -> Example:
    net = diffusers.SkyReelsV2Transformer3DModel(in_channels=4, **WAN)
    inputs = {
        "hidden_states": video(4),
        "timestep": timesteps(),
        "encoder_hidden_states": text(),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("TransformerTemporalModel")
def transformer_temporal() -> Example:
    """Attention over the frames alone, twice per block; samples and places make up the batch."""
    net = diffusers.TransformerTemporalModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=16,
        num_layers=2,
        norm_num_groups=4,
    )
    inputs = {
        "hidden_states": torch.randn(BATCH * FRAMES, 16, HEIGHT // 2, WIDTH // 2),
        "num_frames": FRAMES,
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("WanTransformer3DModel")
def wan() -> Example:
    net = diffusers.WanTransformer3DModel(in_channels=4, **WAN)
    inputs = {
        "hidden_states": video(4),
        "timestep": timesteps(),
        "encoder_hidden_states": text(),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("WanAnimateTransformer3DModel")
def wan_animate() -> Example:
    """As released, with keys from the reference image beside those from the text, which is then 512 tokens long."""
    image_width = 20
    net = diffusers.WanAnimateTransformer3DModel(
        in_channels=12,
        latent_channels=4,
        image_dim=image_width,
        added_kv_proj_dim=INNER,
        motion_encoder_channel_sizes={"4": 8, "8": 8},
        motion_encoder_size=8,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
        **WAN,
    )
    inputs = {
        "hidden_states": video(12),
        "timestep": timesteps(),
        "encoder_hidden_states": text(512),
        "encoder_hidden_states_image": torch.randn(BATCH, 5, image_width),
        "pose_hidden_states": video(4, frames=FRAMES - 1),
        "face_pixel_values": torch.randn(BATCH, 3, 4 * (FRAMES - 2) + 1, 8, 8),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("WanAnimate2Transformer3DModel")
def wan_animate_2() -> Example:
    """A denoising step; the keys and values of the driving video's two frames come from a cache."""
    layers, reference = 2, (FRAMES - 1, HEIGHT // 2, WIDTH // 2)
    net = diffusers.WanAnimate2Transformer3DModel(
        text_len=TEXT + 1,
        in_dim=12,
        dim=INNER,
        ffn_dim=64,
        freq_dim=16,
        text_dim=TEXT_WIDTH,
        out_dim=4,
        num_heads=HEADS,
        num_layers=layers,
    )
    cache = WanAnimate2KVCache(layers)
    for layer in cache.layer_caches:
        layer.store(*torch.randn(2, BATCH, (FRAMES - 1) * HEIGHT * WIDTH // 4, HEADS, HEAD_DIM))
    inputs = {
        "hidden_states": list(video(4)),
        "timestep": timesteps(),
        "encoder_hidden_states": [torch.randn(TEXT, TEXT_WIDTH), torch.randn(TEXT - 2, TEXT_WIDTH)],
        "condition_latents": list(video(8)),
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": FRAMES * HEIGHT * WIDTH // 4,
        "encoder_hidden_states_image": torch.randn(BATCH, 5, 1280),
        "reference_grid_sizes": torch.tensor([reference] * BATCH),
        "origin_len": 4 * (FRAMES - 2) + 1,
        "origin_area": [8 * HEIGHT, 8 * WIDTH],
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("WanVACETransformer3DModel")
def wan_vace() -> Example:
    net = diffusers.WanVACETransformer3DModel(in_channels=4, vace_layers=[0, 1], vace_in_channels=8, **WAN)
    inputs = {
        "hidden_states": video(4),
        "timestep": timesteps(),
        "encoder_hidden_states": text(),
        "control_hidden_states": video(8),
        "control_hidden_states_scale": torch.ones(2),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")
