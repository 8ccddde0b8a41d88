"""GLM-4.5's config.json: published ones, both ways, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.family_checks import check_flavor, config_class_of, filled_by_transformers
from titanmoe.config.errors import ConfigError
from titanmoe.data.tokenizer import check_vocab, load_tokenizer
from titanmoe.models.family import family_of_hf_config, get_family
from titanmoe.models.spec import Dense, GroupedQuery, MoE, Rope, Router, YarnScaling

FAMILY = get_family("glm4_moe")

_AIR: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.1",
    "use_cache": True,
    "use_qk_norm": False,
    "vocab_size": 151552,
}
_LARGE = _AIR | {
    "first_k_dense_replace": 3,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "num_hidden_layers": 92,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}


@pytest.mark.parametrize("flavor", FAMILY.flavors)
def test_a_flavor_comes_back_from_its_config(flavor: str) -> None:
    check_flavor(FAMILY, flavor)


@pytest.mark.parametrize(
    ("config", "flavor"),
    [
        (_AIR, "4.5-Air"),
        (_LARGE, "4.5"),
        (_LARGE | {"max_position_embeddings": 202752}, "4.6"),
        (_LARGE | {"max_position_embeddings": 202752}, "4.7"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_flavors_are_the_published_sizes(config: dict[str, Any], flavor: str) -> None:
    assert family_of_hf_config(config) is FAMILY
    assert FAMILY.from_hf_config(config) == FAMILY.flavor(flavor)
    assert FAMILY.from_hf_config(filled_by_transformers(config)) == FAMILY.flavor(flavor)


def test_what_the_config_says() -> None:
    spec = FAMILY.from_hf_config(_LARGE)
    attention = GroupedQuery(96, 8, 128, Rope(64, 1e6), qkv_bias=True, out_bias=False, qk_norm=True)
    router = Router("sigmoid", True, 2.5, selection_bias=True)
    assert {layer.attention for layer in spec.layers} == {attention}
    kinds = [layer.feed_forward for layer in spec.layers]
    assert kinds == [Dense(12288)] * 3 + [MoE(160, 8, 1536, router, shared=Dense(1536))] * 89


def test_the_debug_model_has_the_builtin_vocabulary() -> None:
    check_vocab(load_tokenizer("builtin"), FAMILY.flavor("debugmodel").vocab_size)


def test_shared_experts_are_one_wider_feed_forward() -> None:
    spec = FAMILY.from_hf_config(_AIR | {"n_shared_experts": 3})
    experts = spec.layers[-1].feed_forward
    assert isinstance(experts, MoE) and experts.shared == Dense(3 * 1408)
    assert FAMILY.from_hf_config(FAMILY.to_hf_config(spec, "float32")) == spec


def test_rope_of_transformers_5() -> None:
    table = {"rope_type": "yarn", "rope_theta": 1e5, "partial_rotary_factor": 0.25, "factor": 4.0}
    config = {key: value for key, value in _AIR.items() if not key.startswith(("rope", "partial"))}
    spec = FAMILY.from_hf_config(config | {"rope_parameters": table | {"original_max_position_embeddings": 32768}})
    assert spec.layers[0].attention.rope == Rope(32, 1e5, YarnScaling(4.0, 32768))
    assert FAMILY.from_hf_config(FAMILY.to_hf_config(spec, "float32")) == spec
    assert FAMILY.from_hf_config(filled_by_transformers(FAMILY.to_hf_config(spec, "float32"))) == spec


def test_defaults_are_those_of_transformers() -> None:
    optional = (
        "attention_bias",
        "first_k_dense_replace",
        "max_position_embeddings",
        "n_group",
        "norm_topk_prob",
        "partial_rotary_factor",
        "rms_norm_eps",
        "rope_theta",
        "routed_scaling_factor",
        "tie_word_embeddings",
        "topk_group",
        "use_qk_norm",
    )
    config = {key: value for key, value in _LARGE.items() if key not in optional}
    spec = FAMILY.from_hf_config(config)
    assert spec == FAMILY.from_hf_config(filled_by_transformers(config))
    assert spec.layers[0].attention == GroupedQuery(96, 8, 128, Rope(64, 1e4))


def test_transformers_own_defaults() -> None:
    """They are GLM-4.5-Air's without biases, and leave `head_dim` to the model dim."""
    config = filled_by_transformers({"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe"})
    change = {"attention_bias": False, "head_dim": 4096 // 96, "rope_theta": 1e4}
    with pytest.raises(ConfigError, match="partial_rotary_factor: 21 of a head's 42 channels"):
        FAMILY.from_hf_config(config)
    even = {"num_attention_heads": 64}
    assert FAMILY.from_hf_config(config | even) == FAMILY.from_hf_config(_AIR | change | even | {"head_dim": 64})


def test_transformers_reads_what_is_meant() -> None:
    config = config_class_of(FAMILY.to_hf_config(FAMILY.flavor("4.5"), "bfloat16"))
    expected = {
        "attention_bias": True,
        "first_k_dense_replace": 3,
        "head_dim": 128,
        "n_routed_experts": 160,
        "n_shared_experts": 1,
        "num_key_value_heads": 8,
        "num_mtp_layers": 0,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 2.5,
        "use_qk_norm": True,
    }
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method 'greedy'"),
        ({"num_key_value_heads": 7}, "num_key_value_heads"),
        ({"n_group": 3}, "n_group: 128 experts cannot be in 3"),
        ({"n_group": 32, "topk_group": 1}, "topk_group: 8 experts cannot be chosen from 1 of 32"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"use_qk_norm": 1}, "use_qk_norm"),
        ({"n_shared_experts": None}, "n_shared_experts is missing"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope type 'longrope'"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.from_hf_config(_AIR | change)
