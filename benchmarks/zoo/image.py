"""Tiny text-to-image and class-to-image transformers."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0
from torch import nn

from benchmarks.zoo.registry import Example, model

BATCH = 2
TEXT = 7
"""Text tokens of every model that has them."""
GRID = (4, 6)
"""Image tokens, rows by columns, wherever a model doesn't ask for another grid."""


def latents(channels: int = 4, patch: int = 2, grid: tuple[int, int] = GRID) -> torch.Tensor:
    return torch.randn(BATCH, channels, grid[0] * patch, grid[1] * patch)


def packed(channels: int = 16) -> torch.Tensor:
    """A latent as the pipelines of packed models give it, one row per token."""
    return torch.randn(BATCH, GRID[0] * GRID[1], channels)


def text(width: int = 24, tokens: int = TEXT) -> torch.Tensor:
    return torch.randn(BATCH, tokens, width)


def visible(tokens: int = TEXT) -> torch.Tensor:
    """The mask of a prompt without padding."""
    return torch.ones(BATCH, tokens, dtype=torch.long)


def alike(*values: float) -> torch.Tensor:
    """The same numbers for both samples: (2,) of one number, (2, n) of n."""
    return torch.tensor(values if len(values) == 1 else [values]).repeat(BATCH, *[1] * (len(values) > 1))


def text_then_grid_ids() -> torch.Tensor:
    """(0, row, column) of the image tokens, after zeros for the text."""
    ids = torch.zeros(*GRID, 3)
    ids[..., 1] = torch.arange(GRID[0])[:, None]
    ids[..., 2] = torch.arange(GRID[1])
    return torch.cat([torch.zeros(TEXT, 3), ids.flatten(0, 1)])


@model("DiTTransformer2DModel")
def dit() -> Example:
    """Its forward takes the root of the number of tokens for both sides, so the grid is square: 6 x 6."""
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=12,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    inputs = {
        "hidden_states": latents(grid=(6, 6)),
        "timestep": alike(500),
        "class_labels": torch.tensor([3, 7]),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("PixArtTransformer2DModel")
def pixart() -> Example:
    net = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=2,
        caption_channels=24,
        use_additional_conditions=False,
    )
    inputs = {
        "hidden_states": latents(),
        "encoder_hidden_states": text(),
        "timestep": alike(500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("HunyuanDiT2DModel")
def hunyuan_dit() -> Example:
    """Six blocks, of which the last two take skip connections."""
    t5 = 5
    net = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=6,
        mlp_ratio=2.0,
        cross_attention_dim=24,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=TEXT,
        text_len_t5=t5,
    )
    inputs = {
        "hidden_states": latents(),
        "timestep": alike(500.0),
        "encoder_hidden_states": text(),
        "text_embedding_mask": visible(),
        "encoder_hidden_states_t5": text(16, t5),
        "text_embedding_mask_t5": visible(t5),
        "image_meta_size": alike(64.0, 96.0, 64.0, 96.0, 0.0, 0.0),
        "style": alike(0),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), GRID), GRID),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("LuminaNextDiT2DModel")
def lumina_next() -> Example:
    net = diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=64,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=24,
    )
    nn.init.normal_(net.pad_token, std=0.02)
    inputs = {
        "hidden_states": latents(),
        "timestep": alike(0.5),
        "encoder_hidden_states": text(),
        "encoder_mask": visible(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 16, 16),
        "cross_attention_kwargs": {},
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("Lumina2Transformer2DModel")
def lumina2() -> Example:
    net = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=64,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(16, 16, 16),
        cap_feat_dim=24,
    )
    inputs = {
        "hidden_states": latents(),
        "timestep": alike(0.5),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": visible(),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("AuraFlowTransformer2DModel")
def aura_flow() -> Example:
    net = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    )
    inputs = {
        "hidden_states": latents(),
        "encoder_hidden_states": text(),
        "timestep": alike(0.5),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("CogView3PlusTransformer2DModel")
def cogview3_plus() -> Example:
    net = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=24,
        time_embed_dim=32,
        condition_dim=8,
        pos_embed_max_size=8,
        sample_size=8,
    )
    inputs = {
        "hidden_states": latents(),
        "encoder_hidden_states": text(),
        "timestep": alike(500),
        "original_size": alike(64.0, 96.0),
        "target_size": alike(64.0, 96.0),
        "crop_coords": alike(0.0, 0.0),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("CogView4Transformer2DModel")
def cogview4() -> Example:
    net = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=24,
        time_embed_dim=32,
        condition_dim=8,
        pos_embed_max_size=8,
        sample_size=8,
    )
    inputs = {
        "hidden_states": latents(),
        "encoder_hidden_states": text(),
        "timestep": alike(500.0),
        "original_size": alike(64.0, 96.0),
        "target_size": alike(64.0, 96.0),
        "crop_coords": alike(0.0, 0.0),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("SanaTransformer2DModel")
def sana() -> Example:
    """Self-attention is linear; only the cross-attention is a softmax."""
    net = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
        patch_size=1,
    )
    inputs = {
        "hidden_states": latents(patch=1),
        "encoder_hidden_states": text(),
        "timestep": alike(500),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("SD3Transformer2DModel")
def sd3() -> Example:
    """As SD 3.5 medium: the first blocks also attend within the image alone."""
    net = diffusers.SD3Transformer2DModel(
        sample_size=12,
        patch_size=2,
        in_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    inputs = {
        "hidden_states": latents(),
        "encoder_hidden_states": text(),
        "pooled_projections": torch.randn(BATCH, 20),
        "timestep": alike(500.0),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("Transformer2DModel")
def transformer_2d() -> Example:
    """As in the U-Nets of Stable Diffusion: every pixel of a feature map is a token."""
    net = diffusers.Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=32,
        num_layers=2,
        norm_num_groups=8,
        cross_attention_dim=24,
    )
    inputs = {"hidden_states": latents(32, patch=1), "encoder_hidden_states": text(), "return_dict": False}
    return Example(net, inputs, latent="hidden_states")


@model("DreamLiteTransformer2DModel")
def dreamlite() -> Example:
    """As in the U-Net of DreamLite, which is also what installs the processor for grouped keys and values."""
    net = diffusers.DreamLiteTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=32,
        num_layers=2,
        norm_num_groups=8,
        cross_attention_dim=24,
        use_linear_projection=True,
        qk_norm="rms_norm",
        num_kv_heads=1,
        ff_mult=2,
    )
    for block in net.transformer_blocks:
        block.attn1.set_processor(DreamLiteAttnProcessor2_0())
        block.attn2.set_processor(DreamLiteAttnProcessor2_0())
    inputs = {"hidden_states": latents(32, patch=1), "encoder_hidden_states": text(), "return_dict": False}
    return Example(net, inputs, latent="hidden_states")


@model("OmniGenTransformer2DModel")
def omnigen() -> Example:
    """Text to image: no image among the conditions."""
    net = diffusers.OmniGenTransformer2DModel(
        in_channels=4,
        patch_size=2,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        num_layers=2,
        pad_token_id=0,
        vocab_size=64,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        pos_embed_max_size=8,
        time_step_dim=32,
    )
    tokens = TEXT + 1 + GRID[0] * GRID[1]
    inputs = {
        "hidden_states": latents(),
        "timestep": alike(0.5),
        "input_ids": torch.randint(1, 64, (BATCH, TEXT)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": None,
        "position_ids": torch.arange(tokens).repeat(BATCH, 1),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("PRXTransformer2DModel")
def prx() -> Example:
    net = diffusers.PRXTransformer2DModel(
        in_channels=4,
        patch_size=2,
        context_in_dim=24,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    )
    inputs = {
        "hidden_states": latents(),
        "timestep": alike(0.5),
        "encoder_hidden_states": text(),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("NucleusMoEImageTransformer2DModel")
def nucleus_moe() -> Example:
    """Three dense blocks, then two with experts."""
    net = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=5,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        dense_moe_strategy="leave_first_three_blocks_dense",
        num_experts=4,
        moe_intermediate_dim=32,
        capacity_factors=2.0,
    )
    for block in net.transformer_blocks[3:]:
        nn.init.normal_(block.img_mlp.experts.gate_up_proj, std=0.1)
        nn.init.normal_(block.img_mlp.experts.down_proj, std=0.1)
    inputs = {
        "hidden_states": packed(),
        "img_shapes": [(1, *GRID)] * BATCH,
        "encoder_hidden_states": text(),
        "timestep": alike(0.5),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("ZImageTransformer2DModel")
def z_image() -> Example:
    """Image and prompt are each padded to a multiple of 32 tokens: 8 x 12 fills 96, the prompts fill part of 32."""
    net = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 16, 16],
    )
    inputs = {
        "x": list(latents(grid=(8, 12)).unsqueeze(2).unbind()),
        "t": alike(0.5),
        "cap_feats": [torch.randn(TEXT, 24), torch.randn(TEXT - 2, 24)],
        "return_dict": False,
    }
    return Example(net, inputs, latent="x")


@model("PriorTransformer")
def prior() -> Example:
    """As in Shap-E: the latent is a sequence of 24 vectors, without a grid or a text; the priors of unCLIP have one."""
    net = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        embedding_dim=16,
        num_embeddings=24,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        embedding_proj_norm_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
        time_embed_dim=64,
        embedding_proj_dim=20,
        clip_embed_dim=32,
    )
    inputs = {
        "hidden_states": torch.randn(BATCH, 24, 16),
        "timestep": alike(500),
        "proj_embedding": torch.randn(BATCH, 20),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("Krea2Transformer2DModel")
def krea2() -> Example:
    layers = 3
    net = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        timestep_embed_dim=32,
        text_hidden_dim=32,
        num_text_layers=layers,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=64,
        num_layerwise_text_blocks=2,
        num_refiner_text_blocks=2,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": packed(),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, layers, 32),
        "timestep": alike(0.5),
        "position_ids": text_then_grid_ids(),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")


@model("GlmImageTransformer2DModel")
def glm_image() -> Example:
    net = diffusers.GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=24,
        time_embed_dim=32,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=64,
    )
    prior_tokens = torch.randint(64, (BATCH, GRID[0] * GRID[1]))
    inputs = {
        "hidden_states": latents(),
        "encoder_hidden_states": text(),
        "prior_token_id": prior_tokens,
        "prior_token_drop": torch.zeros_like(prior_tokens, dtype=torch.bool),
        "timestep": alike(499.0),
        "target_size": alike(64.0, 96.0),
        "crop_coords": alike(0.0, 0.0),
        "return_dict": False,
    }
    return Example(net, inputs, latent="hidden_states")
