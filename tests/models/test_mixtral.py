"""Mixtral's config.json and tensor names: published ones, both ways, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.family_checks import check_flavor, config_class_of, filled_by_transformers, windows_of
from titanmoe.config.errors import ConfigError
from titanmoe.models.family import get_family
from titanmoe.models.keys import map_keys
from titanmoe.models.spec import GroupedQuery, MoE

FAMILY = get_family("mixtral")

_MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
_CHANGES_OF_8X22B: dict[str, Any] = {
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "max_position_embeddings": 65536,
    "num_attention_heads": 48,
    "num_hidden_layers": 56,
    "rope_theta": 1000000,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
}


@pytest.mark.parametrize("flavor", FAMILY.flavors)
def test_a_flavor_comes_back_from_its_config(flavor: str) -> None:
    check_flavor(FAMILY, flavor)


def test_flavors_are_the_published_sizes() -> None:
    assert FAMILY.from_hf_config(_MIXTRAL_8X7B) == FAMILY.flavor("8x7B")
    assert FAMILY.from_hf_config(_MIXTRAL_8X7B | _CHANGES_OF_8X22B) == FAMILY.flavor("8x22B")


def test_weights_are_always_normalised() -> None:
    # No such option in this architecture.
    moe = FAMILY.from_hf_config(_MIXTRAL_8X7B | {"norm_topk_prob": False}).layers[0].feed_forward
    assert isinstance(moe, MoE) and moe.router.normalize and moe.router.score == "softmax"


def test_defaults_are_those_of_transformers() -> None:
    left_out = ("max_position_embeddings", "rms_norm_eps", "rope_theta", "sliding_window", "tie_word_embeddings")
    config = {key: value for key, value in _MIXTRAL_8X7B.items() if key not in left_out}
    assert FAMILY.from_hf_config(config) == FAMILY.from_hf_config(filled_by_transformers(config))


def test_a_window_is_in_all_layers_and_a_head_dim_is_kept() -> None:
    config = _MIXTRAL_8X7B | {"sliding_window": 4096, "head_dim": 64}
    spec = FAMILY.from_hf_config(config)
    attention = spec.layers[0].attention
    assert windows_of(spec) == [4096] * 32
    assert isinstance(attention, GroupedQuery) and attention.head_dim == 64
    written = FAMILY.to_hf_config(spec, "bfloat16")
    assert config_class_of(written).sliding_window == 4096
    assert FAMILY.from_hf_config(filled_by_transformers(written)) == spec


def test_names_and_which_projection_is_which() -> None:
    shapes = {
        "layers.3.moe.router.gate.weight": (2, 5),
        "layers.3.moe.experts.gate_up": (2, 2, 7, 5),
        "layers.3.moe.experts.down": (2, 5, 7),
    }
    published, unknown = map_keys(FAMILY.layouts, shapes)
    assert unknown == []
    prefix = "model.layers.3.block_sparse_moe"
    places = {key: (name.rpartition(".")[2], piece.at) for key, (name, piece) in published.items()}
    assert places == {
        f"{prefix}.gate.weight": ("weight", ()),
        f"{prefix}.experts.0.w1.weight": ("gate_up", (0, 0)),
        f"{prefix}.experts.0.w3.weight": ("gate_up", (0, 1)),
        f"{prefix}.experts.1.w1.weight": ("gate_up", (1, 0)),
        f"{prefix}.experts.1.w3.weight": ("gate_up", (1, 1)),
        f"{prefix}.experts.0.w2.weight": ("down", (0,)),
        f"{prefix}.experts.1.w2.weight": ("down", (1,)),
    }


def test_the_layout_of_transformers_memory_is_read_too() -> None:
    """`save_pretrained(..., save_original_format=False)` writes names and shapes as its module has them."""
    import torch
    import transformers

    with torch.device("meta"):
        config = _MIXTRAL_8X7B | {"num_hidden_layers": 1}
        theirs = transformers.AutoModelForCausalLM.from_config(config_class_of(config)).state_dict()
    present = {key: tuple(value.shape) for key, value in theirs.items() if ".mlp." in key}
    shapes = {
        "layers.0.moe.router.gate.weight": (8, 4096),
        "layers.0.moe.experts.gate_up": (8, 2, 14336, 4096),
        "layers.0.moe.experts.down": (8, 4096, 14336),
    }
    by_file_key, unknown = map_keys(FAMILY.layouts, shapes, present)
    assert unknown == []
    assert {key: piece.shape(shapes[name]) for key, (name, piece) in by_file_key.items()} == present


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router_jitter_noise": 0.1}, "router_jitter_noise 0.1 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: 9 of 8"),
        ({"num_local_experts": None}, "num_local_experts or num_experts is missing"),
        ({"sliding_window": "4096"}, "sliding_window: '4096'"),
        ({"sliding_window": 0}, "sliding_window: 0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: rope type 'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.from_hf_config(_MIXTRAL_8X7B | change)
