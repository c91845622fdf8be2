"""Transformers over proteins, tiny: a token is a residue."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.transformers.transformer_rfd4_proteina import CONDITION_KEYS

from benchmarks.zoo.registry import Example, model


@model("RFD4ProteinaTransformer")
def rfd4_proteina() -> Example:
    """Two chains without conditions; attention is biased by a representation of all pairs of residues."""
    batch, tokens, latent_dim = 2, 26, 4
    net = diffusers.RFD4ProteinaTransformer(
        nlayers=3,
        token_dim=32,
        nheads=2,
        dim_cond=16,
        pair_repr_dim=16,
        latent_dim=latent_dim,
        token_type_emb_dim=4,
        cath_emb_dim=4,
        t_emb_dim=8,
        seq_sep_dim=8,
        xt_pair_dist_dim=8,
        update_pair_repr_every_n=1,
        tri_mult_c=8,
    )
    chain = (torch.arange(tokens) >= 15).long().expand(batch, tokens)
    distance = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs()
    contacts = ("hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal_coord")
    conditioning = {
        "is_in_context_conditioning": torch.zeros(batch, tokens, dtype=torch.bool),
        "supports_local_latent": torch.ones(batch, tokens, dtype=torch.bool),
        "molecule_iid": chain,
        "molecule_entity_id": chain,
        "token_bond_path_length": torch.where(chain[:, :, None] == chain[:, None], distance, tokens),
        CONDITION_KEYS["index_group"]: chain,
        **{CONDITION_KEYS[name]: torch.zeros(batch, tokens, 37) for name in contacts},
    }
    inputs = {
        "bb_ca": torch.randn(batch, tokens, 3),
        "local_latents": torch.randn(batch, tokens, latent_dim),
        "bb_ca_time": torch.full((batch,), 0.5),
        "local_latents_time": torch.full((batch,), 0.5),
        "padding_mask": torch.ones(batch, tokens, dtype=torch.bool),
        "token_type": torch.zeros(batch, tokens, dtype=torch.long),
        "atom37_mask": torch.ones(batch, tokens, 37, dtype=torch.bool),
        "conditioning": conditioning,
        "return_dict": False,
    }
    return Example(net, inputs, latent="bb_ca")
