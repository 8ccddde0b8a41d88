"""DeepSeek's config.json, V3's and V2's: published ones, both ways, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.family_checks import check_flavor, config_class_of, filled_by_transformers
from titanmoe.config.errors import ConfigError
from titanmoe.data.tokenizer import check_vocab, load_tokenizer
from titanmoe.models.deepseek_config import first_experts
from titanmoe.models.family import family_of_hf_config, get_family
from titanmoe.models.spec import DecoderSpec, Dense, Latent, Rope, Router, YarnScaling, with_selection_bias

FAMILY = get_family("deepseek_v3")

_COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
}
_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
_V3 = _COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "rope_scaling": _YARN,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
_V2_LITE = _COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
_V2_5 = _V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "rope_scaling": _YARN,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
_MOONLIGHT = _V3 | {
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}


def _router(spec: DecoderSpec) -> Router:
    experts = first_experts(spec)
    assert experts is not None
    return experts.router


def _latent(spec: DecoderSpec) -> Latent:
    attention = spec.layers[0].attention
    assert isinstance(attention, Latent)
    return attention


@pytest.mark.parametrize("flavor", FAMILY.flavors)
def test_a_flavor_comes_back_from_its_config(flavor: str) -> None:
    check_flavor(FAMILY, flavor)


@pytest.mark.parametrize(
    ("config", "flavor"),
    [(_V3, "671B"), (_V2_LITE, "16B"), (_V2_5, "236B"), (_MOONLIGHT, "Moonlight-16B-A3B")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_flavors_are_the_published_sizes(config: dict[str, Any], flavor: str) -> None:
    assert family_of_hf_config(config) is FAMILY
    assert FAMILY.from_hf_config(config) == FAMILY.flavor(flavor)
    assert FAMILY.from_hf_config(filled_by_transformers(config)) == FAMILY.flavor(flavor)


def test_what_v3_s_config_says() -> None:
    spec = FAMILY.from_hf_config(_V3)
    yarn = YarnScaling(40.0, 4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
    assert _latent(spec) == Latent(128, 1536, 512, 128, 128, Rope(64, 1e4, yarn, interleaved=True))
    assert [isinstance(layer.feed_forward, Dense) for layer in spec.layers] == [True] * 3 + [False] * 58
    assert _router(spec) == Router("sigmoid", True, 2.5, selection_bias=True, num_groups=8, top_groups=4)


def test_what_v2_s_config_says() -> None:
    expected = Router("softmax", False, 16.0, num_groups=8, top_groups=3, group_score="max")
    assert _router(FAMILY.from_hf_config(_V2_5)) == expected
    # Groups mean nothing to the greedy method, and one group nothing to the other.
    for change in ({"topk_method": "greedy"}, {"n_group": 1, "topk_group": 1}):
        assert _router(FAMILY.from_hf_config(_V2_5 | change)) == Router("softmax", False, 16.0)


def test_the_debug_model_has_the_builtin_vocabulary() -> None:
    check_vocab(load_tokenizer("builtin"), FAMILY.flavor("debugmodel").vocab_size)


@pytest.mark.parametrize("architecture", ["DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM"])
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts_per_tok")
    sizes = ("vocab_size", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    layers = ("intermediate_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "n_group")
    source = _V3 if architecture == "DeepseekV3ForCausalLM" else _V2_LITE
    kept = (*required, *sizes, *layers, "topk_group", "model_type")
    config = {"architectures": [architecture]} | {key: source[key] for key in kept}
    spec = FAMILY.from_hf_config(config)
    assert spec == FAMILY.from_hf_config(filled_by_transformers(config))
    assert isinstance(spec.layers[0].feed_forward, Dense) is (architecture == "DeepseekV3ForCausalLM")


def test_transformers_own_defaults_are_v3_with_plain_rope() -> None:
    config = filled_by_transformers({"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"})
    expected = FAMILY.from_hf_config(_V3 | {"rope_scaling": None, "max_position_embeddings": 4096})
    assert FAMILY.from_hf_config(config) == expected


def test_transformers_reads_what_is_meant() -> None:
    config = config_class_of(FAMILY.to_hf_config(FAMILY.flavor("671B"), "bfloat16"))
    expected = {
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_mtp_layers": 0,
        "q_lora_rank": 1536,
        "qk_head_dim": 192,
        "rope_interleave": True,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
    }
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.rope_parameters["mscale_all_dim"] == 1.0 and config.rope_parameters["factor"] == 40.0
    v2 = config_class_of(FAMILY.to_hf_config(FAMILY.flavor("236B"), "bfloat16"))
    assert (v2.model_type, v2.topk_method, v2.n_group, v2.topk_group) == ("deepseek_v2", "group_limited_greedy", 8, 3)


def test_options_that_flavors_do_not_have() -> None:
    change = {"attention_bias": True, "n_shared_experts": 0, "rope_interleave": False, "first_k_dense_replace": 0}
    spec = FAMILY.from_hf_config(_V3 | change)
    assert _latent(spec).bias and not _latent(spec).rope.interleaved
    experts = spec.layers[0].feed_forward
    assert not isinstance(experts, Dense) and experts.shared is None
    assert FAMILY.from_hf_config(FAMILY.to_hf_config(spec, "float32")) == spec


def test_a_model_without_experts() -> None:
    config = _V3 | {"first_k_dense_replace": 61, "n_routed_experts": None, "n_group": None}
    spec = FAMILY.from_hf_config(config)
    assert {layer.feed_forward for layer in spec.layers} == {Dense(18432)}
    assert FAMILY.from_hf_config(FAMILY.to_hf_config(spec, "float32")) == spec


def test_no_config_of_v2_has_a_selection_bias() -> None:
    """So the export refuses such a model: it asks whether the spec survives."""
    spec = with_selection_bias(FAMILY.flavor("16B"))
    assert FAMILY.from_hf_config(FAMILY.to_hf_config(spec, "float32")) != spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method 'greedy'"),
        ({"topk_method": "group_limited_greedy"}, "topk_method 'group_limited_greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ({"use_mla": False}, "use_mla False"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_key_value_heads": 8}, "num_key_value_heads: latent attention"),
        ({"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ({"q_lora_rank": 0}, "q_lora_rank: 0 is not"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim: 63 channels"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: only 32 of the 64"),
        ({"n_group": None}, "n_group is missing"),
        ({"n_group": 7}, "n_group: 256 experts cannot be in 7"),
        ({"n_group": 256}, "n_group: 256 experts cannot be in 256 groups of at least 2"),
        ({"topk_group": 9}, "topk_group: 8 experts cannot be chosen from 9 of 8"),
        ({"n_group": 64, "topk_group": 1}, "topk_group: 8 experts cannot be chosen from 1 of 64"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace: -1"),
        ({"n_shared_experts": "1"}, "n_shared_experts"),
        ({"rope_scaling": _YARN | {"type": "dynamic"}}, "rope type 'dynamic'"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.from_hf_config(_V3 | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ({"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        # The authors' code and transformers' differ in what this means.
        ({"norm_topk_prob": True}, "norm_topk_prob True"),
        ({"rope_interleave": False}, "rope_interleave False"),
        ({"topk_method": "group_limited_greedy", "n_group": 5}, "n_group: 64 experts cannot be in 5"),
    ],
)
def test_what_cannot_be_built_of_v2_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.from_hf_config(_V2_LITE | change)


def test_queries_without_a_latent_must_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="q_lora_rank is missing"):
        FAMILY.from_hf_config({key: value for key, value in _V3.items() if key != "q_lora_rank"})
    assert _latent(FAMILY.from_hf_config(_V3 | {"q_lora_rank": None})).q_lora_rank is None


def test_the_model_type_names_the_architecture_where_nothing_else_does() -> None:
    for config in (_V3, _V2_5):
        unnamed = {key: value for key, value in config.items() if key != "architectures"}
        assert family_of_hf_config(unnamed) is FAMILY
        assert FAMILY.from_hf_config(unnamed) == FAMILY.from_hf_config(config)
