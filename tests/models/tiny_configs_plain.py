"""Tiny models as transformers' configs: family -> variant -> arguments of `AutoConfig.for_model`.

No two sizes that could be confused are equal, and each variant is there for an option that changes what is computed.
"""

from __future__ import annotations

from typing import Any

_BASE: dict[str, Any] = {
    # head_dim is not hidden_size / num_attention_heads.
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
_LLAMA3_ROPE = {
    # Channels below, on and above the ramp, of a head of 16.
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama3": {
        "llama3_rope": {"model_type": "llama", **_BASE, "rms_norm_eps": 1e-5, "rope_parameters": _LLAMA3_ROPE},
        "llama2": {"model_type": "llama", **_BASE, "num_key_value_heads": 4, "head_dim": None},
        "bias_tied_linear_rope": {
            "model_type": "llama",
            **_BASE,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        },
    },
    "qwen2": {
        "plain": {"model_type": "qwen2", **_BASE},
        "tied_yarn": {"model_type": "qwen2", **_BASE, "tie_word_embeddings": True, "rope_parameters": _YARN},
        "upper_layers_with_window": {
            "model_type": "qwen2",
            **_BASE,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
        },
    },
    "mixtral": {
        "plain": {"model_type": "mixtral", **_BASE, "num_local_experts": 6, "num_experts_per_tok": 2},
        "window": {
            "model_type": "mixtral",
            **_BASE,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "sliding_window": 7,
            "rms_norm_eps": 1e-4,
        },
        "tied": {
            "model_type": "mixtral",
            **_BASE,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": True,
        },
    },
    "qwen3": {
        "moe_window": {
            "model_type": "qwen3_moe",
            **_BASE,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 7,
        },
        "alternating_windows": {
            "model_type": "qwen3",
            **_BASE,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "yarn": {"model_type": "qwen3", **_BASE, "attention_bias": True, "rope_parameters": _YARN},
    },
}
