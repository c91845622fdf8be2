"""Transformers over audio, tiny: their tokens are a line, not a grid."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from benchmarks.zoo.registry import Example, model

BATCH = 2
LENGTH = 26
CHANNELS = 4
TEXT = 7
TEXT_WIDTH = 24
HEADS, HEAD_DIM = 2, 16
INNER = HEADS * HEAD_DIM


def text() -> torch.Tensor:
    return torch.randn(BATCH, TEXT, TEXT_WIDTH)


def noise_level() -> torch.Tensor:
    return torch.full((BATCH,), 0.5)


@model("AceStepTransformer1DModel")
def ace_step() -> Example:
    """Two layers with a sliding window, two without; one key-value head for two query heads."""
    net = diffusers.AceStepTransformer1DModel(
        hidden_size=INNER,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        in_channels=3 * CHANNELS,
        audio_acoustic_hidden_dim=CHANNELS,
        sliding_window=5,
        encoder_hidden_size=TEXT_WIDTH,
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 2 * LENGTH, CHANNELS),
        "timestep": noise_level(),
        "timestep_r": noise_level(),
        "encoder_hidden_states": text(),
        "context_latents": torch.randn(BATCH, 2 * LENGTH, 2 * CHANNELS),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("MiniMaxMusic3RVQDepthDecoder")
def minimax_music3_depth_decoder() -> Example:
    """A causal language model over the codes of one audio frame, not a denoiser: eight steps are all there are."""
    net = diffusers.MiniMaxMusic3RVQDepthDecoder(
        hidden_size=INNER,
        num_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=64,
        audio_vocab_size=16,
    )
    return Example(net, {"inputs_embeds": torch.randn(BATCH, 8, INNER)}, latent="inputs_embeds")


@model("MiniMaxMusic3Transformer1DModel")
def minimax_music3() -> Example:
    net = diffusers.MiniMaxMusic3Transformer1DModel(
        in_channels=CHANNELS,
        condition_dim=8,
        num_layers=2,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        ff_inner_dim=64,
        rotary_dim=8,
        fourier_embedding_dim=16,
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, CHANNELS, LENGTH),
        "timestep": noise_level(),
        "encoder_hidden_states": torch.randn(BATCH, LENGTH, 8),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("StableAudioDiTModel")
def stable_audio() -> Example:
    net = diffusers.StableAudioDiTModel(
        sample_size=LENGTH,
        in_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_attention_heads=1,
        out_channels=CHANNELS,
        cross_attention_dim=16,
        time_proj_dim=16,
        global_states_input_dim=20,
        cross_attention_input_dim=TEXT_WIDTH,
    )
    rotary = get_1d_rotary_pos_embed(HEAD_DIM // 2, LENGTH + 1, use_real=True, repeat_interleave_real=False)
    inputs = {
        "hidden_states": torch.randn(BATCH, CHANNELS, LENGTH),
        "timestep": noise_level(),
        "encoder_hidden_states": text(),
        "global_hidden_states": torch.randn(BATCH, 1, 20),
        "rotary_embedding": rotary,
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("StableAudio3DiTModel")
def stable_audio_3() -> Example:
    """Differential attention: each layer subtracts one attention from another."""
    net = diffusers.StableAudio3DiTModel(
        io_channels=CHANNELS,
        embed_dim=INNER,
        depth=2,
        num_heads=HEADS,
        cond_token_dim=TEXT_WIDTH,
        global_cond_dim=20,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        ff_mult=2.0,
        num_memory_tokens=5,
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, CHANNELS, LENGTH),
        "timestep": noise_level(),
        "encoder_hidden_states": text(),
        "global_hidden_states": torch.randn(BATCH, 20),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("LongCatAudioDiTTransformer")
def longcat_audio() -> Example:
    net = diffusers.LongCatAudioDiTTransformer(
        dit_dim=INNER,
        dit_depth=2,
        dit_heads=HEADS,
        dit_text_dim=TEXT_WIDTH,
        latent_dim=CHANNELS,
        ff_mult=2.0,
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, LENGTH, CHANNELS),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": torch.ones(BATCH, TEXT, dtype=torch.bool),
        "timestep": noise_level(),
        "latent_cond": torch.zeros(BATCH, LENGTH, CHANNELS),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("T5FilmDecoder")
def t5_film() -> Example:
    """Cross-attention to the notes and to the audio before; it returns a bare tensor."""
    net = diffusers.T5FilmDecoder(
        input_dims=CHANNELS,
        targets_length=LENGTH,
        d_model=INNER,
        num_layers=2,
        num_heads=HEADS,
        d_kv=HEAD_DIM,
        d_ff=64,
    )
    notes = torch.randn(BATCH, TEXT, INNER), torch.ones(BATCH, TEXT, dtype=torch.bool)
    before = torch.randn(BATCH, 5, INNER), torch.ones(BATCH, 5)
    inputs = {
        "encodings_and_masks": [notes, before],
        "decoder_input_tokens": torch.randn(BATCH, LENGTH, CHANNELS),
        "decoder_noise_time": noise_level(),
    }
    return Example(net, inputs, latent="decoder_input_tokens")
