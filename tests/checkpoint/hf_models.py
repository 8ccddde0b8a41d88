"""Tiny random Qwen3 models of transformers, saved as it saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    # No two sizes are equal, and head_dim is not hidden_size / num_attention_heads.
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
MOE_SIZES: dict[str, Any] = {**SIZES, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}

VARIANTS: dict[str, dict[str, Any]] = {
    "moe": {**MOE_SIZES, "tie_word_embeddings": False, "norm_topk_prob": True},
    "moe_not_normalised_tied": {**MOE_SIZES, "tie_word_embeddings": True, "norm_topk_prob": False},
    "moe_with_dense_layers_and_bias": {
        **MOE_SIZES,
        "num_hidden_layers": 5,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "norm_topk_prob": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_theta": 1e6,
    },
    "dense": {**SIZES, "tie_word_embeddings": False, "attention_bias": True},
    "dense_tied": {**SIZES, "tie_word_embeddings": True},
}


def reference_model(variant: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A transformers model with every parameter drawn at random, norms and biases too: none can be mixed up."""
    import transformers

    options = VARIANTS[variant]
    kind = "Qwen3Moe" if "num_experts" in options else "Qwen3"
    config = getattr(transformers, f"{kind}Config")(**options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.to(dtype)


def save_reference(
    folder: Path, variant: str = "moe", dtype: torch.dtype = torch.float32, max_shard_size: str | int = "5GB"
) -> nn.Module:
    """Save a random model into the folder and return it."""
    model = reference_model(variant, dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's files, read by the safetensors library."""
    from safetensors.torch import load_file

    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def some_tokens(num_sequences: int = 2, seq_len: int = 23) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (num_sequences, seq_len), generator=torch.Generator().manual_seed(1))
