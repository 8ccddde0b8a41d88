"""Tiny models as transformers' config classes take them: family -> variant -> (model_type, options).

In each, no two sizes that could be confused are equal, and a window, a chunk and the length at which a temperature
rises are a good deal shorter than the sequences that are compared.
"""

from __future__ import annotations

from typing import Any

_SIZES: dict[str, Any] = {
    # head_dim is not hidden_size / num_attention_heads.
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 5,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GPT_OSS: dict[str, Any] = {
    **_SIZES,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 8.0,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    },
}
_LLAMA4: dict[str, Any] = {
    **_SIZES,
    "intermediate_size_mlp": 56,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 8,
    "floor_scale": 4,
    "attn_scale": 0.3,
}

VARIANTS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "gpt_oss": {
        "like_the_release": ("gpt_oss", _GPT_OSS),
        # Numbers are small, so that a tight limit cuts many of them.
        "tight_limit": ("gpt_oss", {**_GPT_OSS, "swiglu_limit": 0.3, "swiglu_alpha": 1.3, "num_experts_per_tok": 4}),
        "plain_rope_tied_without_attention_bias": (
            "gpt_oss",
            {
                **_GPT_OSS,
                "num_key_value_heads": 6,
                "num_experts_per_tok": 1,
                "attention_bias": False,
                "tie_word_embeddings": True,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
    },
    "llama4": {
        "like_scout": (
            "llama4_text",
            {
                **_LLAMA4,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 1.0,
                    "original_max_position_embeddings": 32,
                },
            },
        ),
        "like_maverick": ("llama4_text", {**_LLAMA4, "interleave_moe_layer_step": 2, "use_qk_norm": False}),
        "top2": ("llama4_text", {**_LLAMA4, "num_experts_per_tok": 2}),
        "irregular_tied_with_bias": (
            "llama4_text",
            {
                **_LLAMA4,
                "num_hidden_layers": 5,
                "num_experts_per_tok": 3,
                "attention_bias": True,
                "tie_word_embeddings": True,
                "attn_temperature_tuning": False,
                "no_rope_layers": [0, 1, 1, 0, 1],
                "layer_types": [
                    "chunked_attention",
                    "full_attention",
                    "chunked_attention",
                    "full_attention",
                    "chunked_attention",
                ],
                "moe_layers": [0, 3],
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
        ),
    },
}
