"""Configurations of the Triton kernel: one for every architecture, dtype and head dimension."""

from __future__ import annotations

import itertools

import pytest
import torch

from difa_compile.plugins.triton import configs
from difa_compile.plugins.triton import local_attention as kernel
from difa_compile.plugins.triton.configs import Config, Form


def test_every_architecture_dtype_and_head_dimension_has_a_configuration():
    for arch, dtype, dim in itertools.product((80, 86, 89, 90, 100, 120), kernel.DTYPES, (16, 32, 64, 128, 256)):
        found = configs.config(arch, dtype, dim)
        assert found.block_m >= 16 <= found.block_n


def test_the_configuration_of_the_nearest_older_architecture_and_next_head_dimension_is_taken(monkeypatch):
    """float16 goes by bfloat16 where it has no entry; an architecture older than all listed by the oldest."""
    entries = {
        name: Config(16 * place, 16, 4, 2)
        for place, name in enumerate(
            (
                "sm80/bfloat16/64",
                "sm80/bfloat16/128",
                "sm90/bfloat16/128",
                "sm90/float16/64",
                "sm80/bfloat16/128/masked",
            ),
            1,
        )
    }
    monkeypatch.setattr(configs, "table", lambda: entries)
    for wanted, asked in (
        ("sm80/bfloat16/64", (89, torch.bfloat16, 32)),
        ("sm80/bfloat16/128", (86, torch.float16, 80)),
        ("sm90/bfloat16/128", (90, torch.bfloat16, 64)),
        ("sm90/float16/64", (120, torch.float16, 64)),
        ("sm80/bfloat16/128", (75, torch.bfloat16, 128)),
        ("sm80/bfloat16/128/masked", (86, torch.float16, 80, Form.MASKED)),
        ("sm80/bfloat16/128", (86, torch.float16, 80, Form.MASKED_FULL)),
        ("sm90/bfloat16/128", (90, torch.bfloat16, 128, Form.MASKED)),
    ):
        assert configs.config(*asked) == entries[wanted], asked
    with pytest.raises(KeyError, match="no configuration for sm90/bfloat16/512"):
        configs.config(90, torch.bfloat16, 512)
