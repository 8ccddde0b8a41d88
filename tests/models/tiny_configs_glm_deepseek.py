"""Tiny models as transformers' config classes take them: family -> variant -> (model_type, options).

In each, no two sizes that could be confused are equal, and a variant is there for an option that changes what is
computed or how it is stored.
"""

from __future__ import annotations

from typing import Any

_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 16, "n_group": 1, "topk_group": 1}
_LATENT = {
    # Channels of a query and a key: 20 + 8; of a value: 24. Heads x 24 is neither the model dim nor a rank.
    **_SIZES,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 36,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_group": 1,
    "topk_group": 1,
}
_FOUR_GROUPS = {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}


# Of 8 channels, the first pair is kept and the others are on the ramp; the defaults stretch all but the first.
_RAMP = {"rope_theta": 100.0, "beta_fast": 2.0, "beta_slow": 0.05}


def _yarn(**options: Any) -> dict[str, Any]:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
    return yarn | options


VARIANTS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "glm4_moe": {
        "plain": ("glm4_moe", {**_GROUPED, "attention_bias": True}),
        "qk_norm_scaled_three_dense": (
            "glm4_moe",
            {
                **_GROUPED,
                "num_hidden_layers": 5,
                "first_k_dense_replace": 3,
                "use_qk_norm": True,
                "rms_norm_eps": 1e-3,
                "attention_bias": True,
                "routed_scaling_factor": 2.5,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
            },
        ),
        "groups_two_shared_tied": (
            "glm4_moe",
            {
                **_GROUPED,
                **_FOUR_GROUPS,
                "n_shared_experts": 2,
                "norm_topk_prob": False,
                "tie_word_embeddings": True,
            },
        ),
        "no_dense_yarn": ("glm4_moe", {**_GROUPED, "first_k_dense_replace": 0, "rope_parameters": _yarn()}),
    },
    "glm4_moe_lite": {
        "plain": ("glm4_moe_lite", {**_LATENT, "routed_scaling_factor": 1.8}),
        "dense_between_bias_halves_rotated": (
            "glm4_moe_lite",
            {
                **{key: value for key, value in _LATENT.items() if key != "first_k_dense_replace"},
                "num_hidden_layers": 4,
                "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"],
                "attention_bias": True,
                "rope_interleave": False,
                "rms_norm_eps": 1e-3,
            },
        ),
        "direct_queries_groups_yarn": (
            "glm4_moe_lite",
            {
                **_LATENT,
                **_FOUR_GROUPS,
                "q_lora_rank": None,
                "norm_topk_prob": False,
                "tie_word_embeddings": True,
                "rope_parameters": _yarn(mscale=1.0, mscale_all_dim=0.5),
            },
        ),
    },
    "deepseek_v3": {
        "v3": (
            "deepseek_v3",
            {**_LATENT, **_FOUR_GROUPS, "rope_parameters": _yarn(mscale=1.0, mscale_all_dim=1.0)},
        ),
        "v3_direct_queries_bias_eps": (
            "deepseek_v3",
            {
                **_LATENT,
                "q_lora_rank": None,
                "n_shared_experts": 2,
                "attention_bias": True,
                "norm_topk_prob": False,
                "rms_norm_eps": 1e-3,
                "routed_scaling_factor": 1.5,
            },
        ),
        "v3_halves_rotated_yarn_without_mscale": (
            "deepseek_v3",
            {**_LATENT, "rope_interleave": False, "first_k_dense_replace": 2, "rope_parameters": _yarn()},
        ),
        "v3_yarn_logits_alone_tied": (
            "deepseek_v3",
            {
                **_LATENT,
                "first_k_dense_replace": 0,
                "tie_word_embeddings": True,
                "rope_parameters": _yarn(**_RAMP, mscale_all_dim=0.7),
            },
        ),
        "v2_greedy": (
            "deepseek_v2",
            {
                **_LATENT,
                "q_lora_rank": None,
                "n_shared_experts": 2,
                "topk_method": "greedy",
                "rope_parameters": _yarn(**_RAMP, mscale=0.707, mscale_all_dim=0.707),
            },
        ),
        "v2_groups_scaled": (
            "deepseek_v2",
            {
                **_LATENT,
                **_FOUR_GROUPS,
                "attention_bias": True,
                "topk_method": "group_limited_greedy",
                "routed_scaling_factor": 4.0,
                "rms_norm_eps": 1e-3,
                "rope_parameters": _yarn(mscale=0.707, mscale_all_dim=1.0),
            },
        ),
        "v2_plain_rope": ("deepseek_v2", {**_LATENT, "n_group": None, "topk_group": None}),
    },
}
