"""Llama's config.json: published ones, both ways, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.family_checks import check_flavor, filled_by_transformers
from titanmoe.config.errors import ConfigError
from titanmoe.data.tokenizer import check_vocab, load_tokenizer
from titanmoe.models.family import get_family
from titanmoe.models.spec import GroupedQuery, Rope

FAMILY = get_family("llama3")

_LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
_LLAMA_2_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": 28672,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
_CHANGES_OF_3_2_1B: dict[str, Any] = {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": {**_LLAMA_3_1_8B["rope_scaling"], "factor": 32.0},
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("flavor", FAMILY.flavors)
def test_a_flavor_comes_back_from_its_config(flavor: str) -> None:
    check_flavor(FAMILY, flavor)


def test_flavors_are_the_published_sizes() -> None:
    assert FAMILY.from_hf_config(_LLAMA_3_1_8B) == FAMILY.flavor("8B")
    assert FAMILY.from_hf_config(_LLAMA_3_1_8B | _CHANGES_OF_3_2_1B) == FAMILY.flavor("1B")


def test_the_debug_model_has_the_builtin_vocabulary() -> None:
    check_vocab(load_tokenizer("builtin"), FAMILY.flavor("debugmodel").vocab_size)


def test_llama_2() -> None:
    spec = FAMILY.from_hf_config(_LLAMA_2_70B)
    assert spec.layers[0].attention == GroupedQuery(64, 8, 128, Rope(128, 1e4))
    assert (spec.norm_eps, spec.max_seq_len, len(spec.layers)) == (1e-5, 4096, 80)
    assert FAMILY.from_hf_config(filled_by_transformers(_LLAMA_2_70B)) == spec
    assert FAMILY.from_hf_config(FAMILY.to_hf_config(spec, "float16")) == spec


def test_defaults_are_those_of_transformers() -> None:
    """What a config.json may leave out: the first LLaMA's has no grouped heads and no `max_position_embeddings`."""
    left_out = ("max_position_embeddings", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "rope_scaling")
    config = {key: value for key, value in _LLAMA_2_70B.items() if key not in left_out}
    spec = FAMILY.from_hf_config(config)
    assert spec == FAMILY.from_hf_config(filled_by_transformers(config))
    assert spec.norm_eps == 1e-6


def test_bias_is_on_all_of_attention() -> None:
    spec = FAMILY.from_hf_config(_LLAMA_3_1_8B | {"attention_bias": True})
    attention = spec.layers[0].attention
    assert isinstance(attention, GroupedQuery) and attention.qkv_bias and attention.out_bias
    assert FAMILY.from_hf_config(FAMILY.to_hf_config(spec, "float32")) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: rope type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"head_dim": 127}, "head_dim: 127"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.from_hf_config(_LLAMA_3_1_8B | change)
