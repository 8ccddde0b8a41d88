"""Qwen3's config.json: both ways, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.family_checks import check_flavor, config_class_of, filled_by_transformers, windows_of
from titanmoe.config.errors import ConfigError
from titanmoe.models.family import family_of_hf_config, get_family
from titanmoe.models.spec import Dense, GroupedQuery, MoE, Rope, YarnScaling

FAMILY = get_family("qwen3")


def _config(flavor: str = "30B-A3B") -> dict[str, Any]:
    return FAMILY.to_hf_config(FAMILY.flavor(flavor), "bfloat16")


@pytest.mark.parametrize("flavor", FAMILY.flavors)
def test_a_flavor_comes_back_from_its_config(flavor: str) -> None:
    check_flavor(FAMILY, flavor)


def test_sparse_steps_and_dense_layers() -> None:
    config = _config() | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    spec = FAMILY.from_hf_config(config)
    assert [type(layer.feed_forward) for layer in spec.layers] == [Dense, MoE, Dense, Dense, Dense, MoE]
    assert FAMILY.from_hf_config(FAMILY.to_hf_config(spec, "float32")) == spec


def test_head_dim_by_default_as_in_transformers() -> None:
    for flavor in ("30B-A3B", "8B"):
        config = _config(flavor) | {"head_dim": None, "num_attention_heads": 16, "num_key_value_heads": 4}
        del config["head_dim"]
        expected = config_class_of(config)
        attention = FAMILY.from_hf_config(config).layers[0].attention
        assert isinstance(attention, GroupedQuery)
        expected_head_dim = getattr(expected, "head_dim", None) or config["hidden_size"] // 16
        assert attention.head_dim == expected_head_dim


@pytest.mark.parametrize(
    "scaling",
    [
        # As the model cards ask users to add it, in the names of transformers before and after 4.45.
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ],
)
@pytest.mark.parametrize("flavor", ["8B", "30B-A3B"])
def test_yarn(flavor: str, scaling: dict[str, Any]) -> None:
    config = _config(flavor) | {"rope_scaling": scaling, "max_position_embeddings": 131_072}
    spec = FAMILY.from_hf_config(config)
    attention = spec.layers[0].attention
    assert isinstance(attention, GroupedQuery)
    assert attention.rope == Rope(128, 1e6, YarnScaling(4.0, 32_768))
    assert FAMILY.from_hf_config(filled_by_transformers(config)) == spec
    assert FAMILY.from_hf_config(FAMILY.to_hf_config(spec, "float32")) == spec


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 30},
        {
            "use_sliding_window": True,
            "sliding_window": 4096,
            "layer_types": ["sliding_attention", "full_attention"] * 18,
        },
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 30},
    ],
)
def test_windows_of_the_dense_model(change: dict[str, Any]) -> None:
    config = _config("8B")
    del config["use_sliding_window"]
    config |= change
    expected = config_class_of(config)
    spec = FAMILY.from_hf_config(config)
    assert windows_of(spec) == [
        expected.sliding_window if kind == "sliding_attention" else None for kind in expected.layer_types
    ]
    written = FAMILY.to_hf_config(spec, "float32")
    assert FAMILY.from_hf_config(written) == spec
    assert FAMILY.from_hf_config(filled_by_transformers(written)) == spec
    assert config_class_of(written).layer_types == expected.layer_types
    assert config_class_of(written).sliding_window == expected.sliding_window


@pytest.mark.parametrize("in_use", [True, False])
def test_the_mixture_has_the_window_in_all_layers_or_none(in_use: bool) -> None:
    change = {
        "use_sliding_window": in_use,
        "sliding_window": 4096,
        "max_window_layers": 30,
        "layer_types": ["full_attention"] * 48,
    }
    config = _config("30B-A3B") | change
    expected = config_class_of(config).sliding_window
    assert expected == (4096 if in_use else None)
    spec = FAMILY.from_hf_config(config)
    assert windows_of(spec) == [expected] * 48
    written = FAMILY.to_hf_config(spec, "float32")
    assert config_class_of(written).sliding_window == expected
    assert FAMILY.from_hf_config(filled_by_transformers(written)) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "2048"}, "hidden_size: '2048' is not a positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 is not a positive whole number"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: .*cannot be dealt"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok: .*cannot be chosen"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_scaling: rope type 'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"use_sliding_window": True, "sliding_window": None}, "sliding_window is missing"),
        ({"mlp_only_layers": 3}, "mlp_only_layers: 3 is not a list"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step: 0"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.from_hf_config(_config() | change)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no model family") as caught:
        get_family("qwen")
    assert "qwen3" in caught.value.mend
    with pytest.raises(ConfigError, match="no flavor") as caught:
        FAMILY.flavor("30B")
    assert "30B-A3B" in caught.value.mend
    with pytest.raises(ConfigError, match="FooForCausalLM") as caught:
        family_of_hf_config({"architectures": ["FooForCausalLM"]})
    assert "Qwen3MoeForCausalLM" in caught.value.mend
