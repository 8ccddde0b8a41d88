"""Sizes of DeepSeek's models and their like, counted by hand from the config.json that is written of each flavor."""

from __future__ import annotations

from typing import Any

import pytest

from titanmoe.models.family import get_family


def _attention(config: dict[str, Any]) -> int:
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    if "kv_lora_rank" not in config:
        head_dim, kv_heads = config["head_dim"], config["num_key_value_heads"]
        norms = 2 * head_dim if config["use_qk_norm"] else 0
        biases = (heads + 2 * kv_heads) * head_dim if config["attention_bias"] else 0
        return 2 * dim * heads * head_dim + 2 * dim * kv_heads * head_dim + norms + biases
    nope, rotated, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    query = heads * (nope + rotated)
    queries = dim * query if q_rank is None else dim * q_rank + q_rank + q_rank * query
    return queries + dim * (kv_rank + rotated) + kv_rank + kv_rank * heads * (nope + value) + heads * value * dim


def _sizes(config: dict[str, Any]) -> tuple[int, int]:
    """All parameters, and those that a token meets, without embeddings and the output."""
    dim, num_layers, num_dense = config["hidden_size"], config["num_hidden_layers"], config["first_k_dense_replace"]
    expert, num_experts = 3 * dim * config["moe_intermediate_size"], config["n_routed_experts"]
    always = num_layers * (_attention(config) + 2 * dim) + dim
    always += num_dense * 3 * dim * config["intermediate_size"]
    always += (num_layers - num_dense) * (config["n_shared_experts"] * expert + dim * num_experts)
    routed = (num_layers - num_dense) * expert
    return always + routed * num_experts, always + routed * config["num_experts_per_tok"]


@pytest.mark.parametrize(
    ("family", "flavor", "total", "num_in_total", "active", "num_in_active"),
    [
        # Billions, and how many of the two matrices of vocabulary x dim the makers count in each figure.
        ("glm4_moe", "4.5-Air", 106, 0, 12, 0),
        ("glm4_moe_lite", "4.7-Flash", 30, 2, 3, 0),
        ("deepseek_v3", "16B", 15.7, 2, 2.4, 1),
        ("deepseek_v3", "236B", 236, 2, 21, 1),
        ("deepseek_v3", "671B", 671, 2, 37, 1),
        ("deepseek_v3", "Moonlight-16B-A3B", 16, 2, 3, 2),
    ],
)
def test_sizes_are_the_published_ones(
    family: str, flavor: str, total: float, num_in_total: int, active: float, num_in_active: int
) -> None:
    config = get_family(family).to_hf_config(get_family(family).flavor(flavor), "bfloat16")
    embedding = config["vocab_size"] * config["hidden_size"]
    counted = [size + num * embedding for size, num in zip(_sizes(config), (num_in_total, num_in_active), strict=True)]
    # Half of the last digit that is published; what is 3.3 B was published as 3.
    assert counted[0] / 1e9 == pytest.approx(total, abs=0.05 if total % 1 else 0.5)
    assert counted[1] / 1e9 == pytest.approx(active, abs=0.06 if active % 1 else 0.5)


def test_glm_4_5_is_published_with_its_layer_for_multi_token_prediction() -> None:
    family = get_family("glm4_moe")
    config = family.to_hf_config(family.flavor("4.5"), "bfloat16")
    layer = _sizes(config | {"num_hidden_layers": 93})[0] - _sizes(config)[0] + 2 * config["hidden_size"] ** 2
    total, active = _sizes(config)
    assert (total + layer) / 1e9 == pytest.approx(355, abs=0.5)
    assert active / 1e9 == pytest.approx(32, abs=0.5)
