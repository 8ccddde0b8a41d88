"""Qwen3's config.json: both ways, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from titanmoe.config.errors import ConfigError
from titanmoe.models.family import family_of_hf_config, get_family
from titanmoe.models.spec import Dense, MoE

FAMILY = get_family("qwen3")


def _config(flavor: str = "30B-A3B") -> dict[str, Any]:
    return FAMILY.to_hf_config(FAMILY.flavor(flavor), "bfloat16")


@pytest.mark.parametrize("flavor", FAMILY.flavors)
def test_a_flavor_comes_back_from_its_config(flavor: str) -> None:
    config = _config(flavor)
    assert family_of_hf_config(config) is FAMILY
    assert FAMILY.from_hf_config(config) == FAMILY.flavor(flavor)


def test_sparse_steps_and_dense_layers() -> None:
    config = _config() | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    kinds = [type(layer.feed_forward) for layer in FAMILY.from_hf_config(config).layers]
    assert kinds == [Dense, MoE, Dense, Dense, Dense, MoE]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "2048"}, "not a positive whole number"),
        ({"num_hidden_layers": 0}, "not a positive whole number"),
        ({"num_key_value_heads": 5}, "cannot be dealt"),
        ({"num_experts_per_tok": 129}, "cannot be chosen"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"attention_dropout": 0.1}, "dropout"),
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
