"""Tiny random models of transformers in a folder, for tests of reading and writing files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity import reference
from tests.parity.reference import load_reference, read_all
from tests.parity.variants import VARIANTS

__all__ = ["MOE_SIZES", "load_reference", "read_all", "save_reference", "some_tokens"]

MOE_SIZES: dict[str, Any] = dict(VARIANTS["qwen3"]["moe"][1])


def save_reference(
    folder: Path,
    variant: str = "moe",
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = "5GB",
    family: str = "qwen3",
) -> nn.Module:
    """Save a random model into the folder and return it."""
    model_type, options = VARIANTS[family][variant]
    model = reference.random_model(model_type, options)
    if dtype != torch.float32:
        model.config.dtype = dtype
        for parameter in model.parameters():  # not the buffers, which stay float32
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def some_tokens(num_sequences: int = 2, seq_len: int = 23) -> Tensor:
    """Tokens for the variants of Qwen3."""
    return reference.some_tokens(MOE_SIZES["vocab_size"], num_sequences, seq_len)
