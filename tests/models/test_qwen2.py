"""Qwen2's config.json: a published one, both ways, windows, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.family_checks import check_flavor, config_class_of, filled_by_transformers, windows_of
from titanmoe.config.errors import ConfigError
from titanmoe.models.family import get_family
from titanmoe.models.spec import GroupedQuery, Rope, YarnScaling

FAMILY = get_family("qwen2")

_QWEN2_5_72B_INSTRUCT: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": 29568,
    "max_position_embeddings": 32768,
    "max_window_layers": 70,
    "model_type": "qwen2",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


@pytest.mark.parametrize("flavor", FAMILY.flavors)
def test_a_flavor_comes_back_from_its_config(flavor: str) -> None:
    check_flavor(FAMILY, flavor)


def test_the_largest_flavor_is_the_published_one() -> None:
    assert FAMILY.from_hf_config(_QWEN2_5_72B_INSTRUCT) == FAMILY.flavor("72B")
    assert FAMILY.from_hf_config(filled_by_transformers(_QWEN2_5_72B_INSTRUCT)) == FAMILY.flavor("72B")


def test_biases_are_on_queries_keys_and_values_alone() -> None:
    # Configs made by hand say `attention_bias`; neither transformers nor the architecture has such an option.
    spec = FAMILY.from_hf_config(_QWEN2_5_72B_INSTRUCT | {"attention_bias": False})
    attention = spec.layers[0].attention
    assert isinstance(attention, GroupedQuery) and attention.qkv_bias and not attention.out_bias


def test_yarn_of_the_model_card() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    config = _QWEN2_5_72B_INSTRUCT | {"rope_scaling": scaling}
    spec = FAMILY.from_hf_config(config)
    attention = spec.layers[0].attention
    assert isinstance(attention, GroupedQuery) and attention.rope == Rope(128, 1e6, YarnScaling(4.0, 32_768))
    assert FAMILY.from_hf_config(filled_by_transformers(config)) == spec
    assert FAMILY.from_hf_config(FAMILY.to_hf_config(spec, "bfloat16")) == spec


def test_windows_of_the_upper_layers() -> None:
    config = _QWEN2_5_72B_INSTRUCT | {"use_sliding_window": True, "sliding_window": 4096}
    spec = FAMILY.from_hf_config(config)
    assert windows_of(spec) == [None] * 70 + [4096] * 10
    written = FAMILY.to_hf_config(spec, "bfloat16")
    assert FAMILY.from_hf_config(written) == spec
    theirs, of_ours = config_class_of(config), config_class_of(written)
    assert (of_ours.layer_types, of_ours.sliding_window) == (theirs.layer_types, theirs.sliding_window)


def test_a_head_dim_of_its_own() -> None:
    config = _QWEN2_5_72B_INSTRUCT | {"head_dim": 96}
    spec = FAMILY.from_hf_config(config)
    attention = spec.layers[0].attention
    assert isinstance(attention, GroupedQuery) and attention.head_dim == 96
    assert FAMILY.from_hf_config(filled_by_transformers(FAMILY.to_hf_config(spec, "bfloat16"))) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "rope_scaling: rope type 'mrope'"),
        ({"use_sliding_window": True, "sliding_window": None}, "sliding_window is missing"),
        ({"layer_types": ["full_attention"]}, "layer_types: is not a list of 80"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"vocab_size": 0}, "vocab_size: 0"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.from_hf_config(_QWEN2_5_72B_INSTRUCT | change)
