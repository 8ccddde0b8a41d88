"""GLM-4.7-Flash's config.json: as published, both ways, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.family_checks import check_flavor, config_class_of, filled_by_transformers
from titanmoe.config.errors import ConfigError
from titanmoe.data.tokenizer import check_vocab, load_tokenizer
from titanmoe.models.family import family_of_hf_config, get_family
from titanmoe.models.spec import DecoderSpec, Dense, Latent, MoE, Rope, Router

FAMILY = get_family("glm4_moe_lite")

_FLASH: dict[str, Any] = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "kv_lora_rank": 512,
    "max_position_embeddings": 202752,
    "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 20,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 1.0,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.8,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 256,
    "vocab_size": 154880,
}


def _is_dense(spec: DecoderSpec) -> list[bool]:
    return [isinstance(layer.feed_forward, Dense) for layer in spec.layers]


@pytest.mark.parametrize("flavor", FAMILY.flavors)
def test_a_flavor_comes_back_from_its_config(flavor: str) -> None:
    check_flavor(FAMILY, flavor)


def test_the_flavor_is_the_published_size() -> None:
    assert family_of_hf_config(_FLASH) is FAMILY
    spec = FAMILY.from_hf_config(_FLASH)
    assert spec == FAMILY.flavor("4.7-Flash")
    assert spec == FAMILY.from_hf_config(filled_by_transformers(_FLASH))
    attention = Latent(20, 768, 512, 192, 256, Rope(64, 1e6, interleaved=True), norm_eps=1e-6)
    experts = MoE(64, 4, 1536, Router("sigmoid", True, 1.8, selection_bias=True), shared=Dense(1536))
    assert {layer.attention for layer in spec.layers} == {attention}
    assert [layer.feed_forward for layer in spec.layers] == [Dense(10240)] + [experts] * 46


def test_the_debug_model_has_the_builtin_vocabulary() -> None:
    check_vocab(load_tokenizer("builtin"), FAMILY.flavor("debugmodel").vocab_size)


def test_dense_layers_anywhere() -> None:
    kinds = ["sparse", "dense", "sparse", "dense"]
    config = {key: value for key, value in _FLASH.items() if key != "first_k_dense_replace"}
    config |= {"num_hidden_layers": 4, "mlp_layer_types": kinds}
    spec = FAMILY.from_hf_config(config)
    assert _is_dense(spec) == [False, True, False, True]
    written = FAMILY.to_hf_config(spec, "float32")
    assert config_class_of(written).mlp_layer_types == kinds
    assert FAMILY.from_hf_config(written) == spec


def test_all_layers_of_one_kind() -> None:
    for kind, first in (("sparse", 0), ("dense", 47)):
        config = _FLASH | {"mlp_layer_types": [kind] * 47, "first_k_dense_replace": first}
        spec = FAMILY.from_hf_config(config)
        assert _is_dense(spec) == [kind == "dense"] * 47
        assert FAMILY.from_hf_config(FAMILY.to_hf_config(spec, "float32")) == spec


def test_kinds_of_layers_beyond_the_last_are_not_read() -> None:
    """Of the layer for multi-token prediction."""
    assert FAMILY.from_hf_config(_FLASH | {"mlp_layer_types": ["dense"] + ["sparse"] * 47}) == FAMILY.flavor(
        "4.7-Flash"
    )


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
    )
    config = {key: value for key, value in _FLASH.items() if key not in optional}
    assert FAMILY.from_hf_config(config) == FAMILY.from_hf_config(filled_by_transformers(config))


def test_transformers_own_defaults_are_the_published_model_but_for_theta() -> None:
    config = filled_by_transformers({"architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite"})
    assert FAMILY.from_hf_config(config) == FAMILY.from_hf_config(_FLASH | {"rope_theta": 1e4})


def test_transformers_reads_what_is_meant() -> None:
    config = config_class_of(FAMILY.to_hf_config(FAMILY.flavor("4.7-Flash"), "bfloat16"))
    expected = {
        "kv_lora_rank": 512,
        "mlp_layer_types": ["dense"] + ["sparse"] * 46,
        "n_routed_experts": 64,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 768,
        "qk_head_dim": 256,
        "qk_rope_head_dim": 64,
        "rope_interleave": True,
        "routed_scaling_factor": 1.8,
        "v_head_dim": 256,
    }
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.rope_parameters["rope_theta"] == 1e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types: is not a list of 47"),
        ({"mlp_layer_types": ["dense"] + ["moe"] * 46}, "mlp_layer_types: is not a list of 47"),
        ({"mlp_layer_types": "dense"}, "mlp_layer_types: is not a list of 47"),
        ({"first_k_dense_replace": 2}, "first_k_dense_replace: 2 dense layers contradict"),
        ({"mlp_layer_types": ["sparse"] * 47}, "first_k_dense_replace: 1 dense layers contradict"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: only 32 of the 64"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: latent attention"),
        ({"topk_method": "greedy"}, "topk_method 'greedy'"),
        ({"rope_interleave": "yes"}, "rope_interleave"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.from_hf_config(_FLASH | change)
