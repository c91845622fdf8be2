"""FLUX, its kin, and other transformers that put image tokens and text into one sequence."""

from __future__ import annotations

import diffusers
import torch

from benchmarks.zoo.registry import Example, model

GRID = (4, 6)
"""Rows and columns of image tokens."""

TOKENS = GRID[0] * GRID[1]
TEXT = 7


def flux_ids(origin: tuple[int, int, int] = (0, 0, 0)) -> torch.Tensor:
    """Position ids (plane, row, column) of the image tokens: (24, 3)."""
    plane, row, column = (torch.arange(size) for size in (1, *GRID))
    return torch.cartesian_prod(plane, row, column).float() + torch.tensor(origin)


def flux2_ids(scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids (time, row, column, text) of the image tokens, (24, 4), and of the text, (7, 4)."""
    image, text = torch.zeros(TOKENS, 4), torch.zeros(TEXT, 4)
    image[:, 1:3] = flux_ids()[:, 1:] * scale
    text[:, 3] = torch.arange(TEXT)
    return image, text


def diagonal_ids() -> torch.Tensor:
    """Text positions that advance along rows and columns together: (7, 3)."""
    place = torch.arange(TEXT).float()
    return torch.stack([torch.zeros(TEXT), place, place], 1)


@model("FluxTransformer2DModel")
def flux() -> Example:
    net = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 16),
        "encoder_hidden_states": torch.randn(2, TEXT, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.full((2,), 0.5),
        "guidance": torch.full((2,), 3.5),
        "img_ids": flux_ids(),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("Flux2Transformer2DModel")
def flux2() -> Example:
    """The pipeline gives ids per sample, as whole numbers."""
    net = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    image_ids, text_ids = (ids.long().repeat(2, 1, 1) for ids in flux2_ids())
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 16),
        "encoder_hidden_states": torch.randn(2, TEXT, 24),
        "timestep": torch.full((2,), 0.5),
        "guidance": torch.full((2,), 4.0),
        "img_ids": image_ids,
        "txt_ids": text_ids,
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("Flux3Transformer2DModel")
def flux3() -> Example:
    """Text to image: without reference images, whose blocks stay idle."""
    net = diffusers.Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    image_ids, text_ids = flux2_ids(scale=0.5)
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 16),
        "encoder_hidden_states": torch.randn(2, TEXT, 24),
        "timestep": torch.full((2,), 0.5),
        "img_ids": image_ids,
        "txt_ids": text_ids,
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("BriaTransformer2DModel")
def bria() -> Example:
    net = diffusers.BriaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=[4, 6, 6],
    )
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 16),
        "encoder_hidden_states": torch.randn(2, TEXT, 24),
        "timestep": torch.full((2,), 500.0),
        "img_ids": flux_ids(),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("BriaFiboTransformer2DModel")
def bria_fibo() -> Example:
    """Every block gets a layer of the text encoder of its own."""
    net = diffusers.BriaFiboTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=[4, 6, 6],
        text_encoder_dim=12,
    )
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 16),
        "encoder_hidden_states": torch.randn(2, TEXT, 24),
        "text_encoder_layers": [torch.randn(2, TEXT, 12) for _ in range(4)],
        "timestep": torch.full((2,), 500.0),
        "img_ids": flux_ids(),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("BriaFibo2Transformer2DModel")
def bria_fibo2() -> Example:
    """7 text tokens become 8 gist tokens; every second block reads the text as well."""
    net = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        patch_size=2,
        dim=32,
        n_layers=4,
        n_refiner_layers=2,
        n_heads=2,
        cap_feat_dim=24,
        injection_layer_ids=(1, 3),
        perceiver_num_layers=2,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(4, 6, 6),
        axes_lens=(16, 8, 8),
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 2 * GRID[0], 2 * GRID[1]),
        "timestep": torch.full((2,), 0.5),
        "encoder_hidden_states": torch.randn(2, 3, TEXT, 24),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("ChromaTransformer2DModel")
def chroma() -> Example:
    net = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=2,
    )
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 16),
        "encoder_hidden_states": torch.randn(2, TEXT, 24),
        "timestep": torch.full((2,), 0.5),
        "img_ids": flux_ids(),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("LongCatImageTransformer2DModel")
def longcat_image() -> Example:
    net = diffusers.LongCatImageTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=24,
        axes_dims_rope=[4, 6, 6],
    )
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 16),
        "encoder_hidden_states": torch.randn(2, TEXT, 24),
        "timestep": torch.full((2,), 0.5),
        "img_ids": flux_ids(origin=(1, TEXT, TEXT)),
        "txt_ids": diagonal_ids(),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("OvisImageTransformer2DModel")
def ovis_image() -> Example:
    net = diffusers.OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 16),
        "encoder_hidden_states": torch.randn(2, TEXT, 24),
        "timestep": torch.full((2,), 0.5),
        "img_ids": flux_ids(),
        "txt_ids": diagonal_ids(),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("QwenImageTransformer2DModel")
def qwen_image() -> Example:
    net = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 16),
        "encoder_hidden_states": torch.randn(2, TEXT, 24),
        "timestep": torch.full((2,), 0.5),
        "img_shapes": [[(1, *GRID)]] * 2,
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("QwenImage21Transformer2DModel")
def qwen_image21() -> Example:
    """The target image's places in the text stream stand for 2 x 2 tokens each."""
    net = diffusers.QwenImage21Transformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(2, TOKENS, 16),
        "encoder_hidden_states": torch.randn(2, TEXT, 24),
        "timestep": torch.full((2,), 0.5),
        "img_shapes": [[(1, *GRID)]] * 2,
        "img_mask": (torch.arange(TEXT + TOKENS // 4) >= TEXT).repeat(2, 1),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("Ideogram4Transformer2DModel")
def ideogram4() -> Example:
    """Latent and text features span the whole sequence, text first, each zero at the other's places."""
    text_role, image_role, image_offset = 3, 2, 65536
    net = diffusers.Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=64,
        adaln_dim=16,
        llm_features_dim=24,
        mrope_section=(2, 2, 2),
    )
    text_ids = torch.arange(TEXT)[:, None].expand(TEXT, 3)
    roles = torch.tensor([text_role] * TEXT + [image_role] * TOKENS)
    inputs = {
        "hidden_states": torch.cat([torch.zeros(2, TEXT, 16), torch.randn(2, TOKENS, 16)], 1),
        "timestep": torch.full((2,), 0.5),
        "encoder_hidden_states": torch.cat([torch.randn(2, TEXT, 24), torch.zeros(2, TOKENS, 24)], 1),
        "position_ids": torch.cat([text_ids, flux_ids().long() + image_offset]).repeat(2, 1, 1),
        "segment_ids": torch.ones(2, TEXT + TOKENS, dtype=torch.long),
        "indicator": roles.repeat(2, 1),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("MiniMaxH3Transformer3DModel")
def minimax_h3() -> Example:
    """Video with stereo sound, one sequence of text, sound and 3 x 4 x 6 tokens of the video; two noise levels."""
    video_tag, text_tag, audio_tag = 0, 1, 2
    frames, sounds = 3, 5
    net = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=2,
        ffn_dim=64,
        in_channels=4,
        audio_in_channels=8,
        text_dim=24,
        freq_dim=16,
        time_embed_hidden_dim=32,
        time_embed_dim=16,
        rope_freq_dim=2,
    )
    rows, columns = GRID
    side = TOKENS**0.5
    height, width = (32 * ((1 - size / side) / 2 + torch.arange(size) / side) for size in GRID)
    times = torch.tensor([0, 1, 5]) * 5 / 3
    sound_ids = [torch.tensor([TEXT + time, 0, edge]) for edge in (width[0], width[-1]) for time in range(sounds)]
    position_ids = torch.cat(
        [
            torch.arange(TEXT)[:, None] * torch.tensor([1, 0, 0]),
            torch.stack(sound_ids),
            torch.cartesian_prod(TEXT + times, height, width),
        ]
    )
    lengths = (TEXT, 2 * sounds, frames * rows * columns)
    text, audio, video = torch.arange(sum(lengths)).split(lengths)
    inputs = {
        "hidden_states": torch.randn(2, len(video), 16),
        "audio_hidden_states": torch.randn(2, len(audio), 8),
        "encoder_hidden_states": torch.randn(2, TEXT, 24),
        "timestep": torch.tensor([0.4, 0.5]),
        "timestep_indices": torch.tensor([1, 0, 1]).repeat_interleave(torch.tensor(lengths)),
        "token_tags": torch.tensor([text_tag, audio_tag, video_tag]).repeat_interleave(torch.tensor(lengths)),
        "position_ids": position_ids.double(),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("ErnieImageTransformer2DModel")
def ernie_image() -> Example:
    """Patches of one latent pixel, as published; the blocks hold (tokens, batch, width)."""
    net = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=64,
        in_channels=16,
        out_channels=16,
        text_in_dim=24,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, *GRID),
        "timestep": torch.tensor([500, 500]),
        "text_bth": torch.randn(2, TEXT, 24),
        "text_lens": torch.tensor([TEXT, TEXT]),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("HiDreamImageTransformer2DModel")
def hidream_image() -> Example:
    """An image that is not square is padded to the area of ``max_resolution``, which is exactly its own here."""
    height, width = 2 * GRID[0], 2 * GRID[1]
    net = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[20, 24],
        text_emb_dim=16,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(height, width),
        llama_layers=[0, 1, 2, 3],
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, height, width),
        "timesteps": torch.tensor([500, 500]),
        "encoder_hidden_states_t5": torch.randn(2, TEXT, 20),
        "encoder_hidden_states_llama3": torch.randn(4, 2, TEXT, 24),
        "pooled_embeds": torch.randn(2, 16),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("JoyImageEditTransformer3DModel")
def joy_image_edit() -> Example:
    """Two images per sample: the reference, then the noisy one, which the model itself moves to the front."""
    net = diffusers.JoyImageEditTransformer3DModel(
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=24,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )
    inputs = {
        "hidden_states": torch.randn(2, 2, 4, 1, 2 * GRID[0], 2 * GRID[1]),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, TEXT, 24),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("JoyImageEditPlusTransformer3DModel")
def joy_image_edit_plus() -> Example:
    """Patches of the noisy image, then of a reference of another size."""
    reference = (3, 5)
    net = diffusers.JoyImageEditPlusTransformer3DModel(
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=24,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )
    inputs = {
        "hidden_states": torch.randn(2, TOKENS + reference[0] * reference[1], 4, 1, 2, 2),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, TEXT, 24),
        "shape_list": [[(1, *GRID), (1, *reference)]] * 2,
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("HunyuanImageTransformer2DModel")
def hunyuan_image() -> Example:
    """One text encoder: the projection of a second is 2048 wide whatever the config."""
    net = diffusers.HunyuanImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        text_embed_dim=24,
        rope_axes_dim=(8, 8),
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, *GRID),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": torch.randn(2, TEXT, 24),
        "encoder_attention_mask": torch.ones(2, TEXT, dtype=torch.long),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("Cosmos3OmniTransformer")
def cosmos3_omni() -> Example:
    """Two videos of 2 x 4 x 6 tokens in one sequence after one text: the class has no batch dimension."""
    frames, videos, margin = 2, 2, 15000
    net = diffusers.Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=64,
        intermediate_size=64,
        latent_channel=4,
        latent_patch_size=2,
        patch_latent_dim=16,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=2,
        vocab_size=64,
        rope_axes_dim=(4, 2, 2),
    )
    tokens = frames * TOKENS
    start = TEXT + margin
    video_ids = torch.cartesian_prod(*(torch.arange(size) for size in (frames, *GRID))) + torch.tensor([start, 0, 0])
    places = TEXT + torch.arange(videos * tokens)
    inputs = {
        "input_ids": torch.randint(64, (TEXT,)),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.cat([torch.arange(TEXT).repeat(3, 1), video_ids.T.repeat(1, videos)], 1).float(),
        "und_len": TEXT,
        "sequence_length": TEXT + videos * tokens,
        "vision_tokens": [torch.randn(1, 4, frames, 2 * GRID[0], 2 * GRID[1]) for _ in range(videos)],
        "vision_token_shapes": [(frames, *GRID)] * videos,
        "vision_sequence_indexes": places,
        "vision_mse_loss_indexes": places.clone(),
        "vision_timesteps": torch.full((videos * tokens,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(frames) for _ in range(videos)],
        "return_dict": False,
    }
    return Example(net, inputs, latent="vision_tokens")
