"""GLM-4.7-Flash: GLM-4.5's experts with DeepSeek's latent attention (the size is that of its `config.json`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from titanmoe.config.errors import ConfigError
from titanmoe.models.common_rules import (
    DENSE,
    ENDS,
    EXPERTS,
    GATE,
    LATENT,
    NORMS,
    SELECTION_BIAS,
    SHARED_EXPERTS,
    STACKED_EXPERTS,
)
from titanmoe.models.deepseek_config import (
    feed_forward_entries,
    latent_entries,
    read_latent,
    read_layers,
    read_num_dense,
    read_sigmoid_router,
)
from titanmoe.models.family import Family
from titanmoe.models.hf_config import HfConfig, decoder_entries
from titanmoe.models.spec import DecoderSpec, Dense, Latent, LayerSpec, MoE, Rope, Router

_ARCHITECTURE = "Glm4MoeLiteForCausalLM"
_DENSE, _SPARSE = "dense", "sparse"


def _spec(
    attention: Latent,
    experts: MoE,
    *,
    dim: int,
    num_layers: int,
    dense_dim: int,
    vocab_size: int = 154_880,
    max_seq_len: int = 202_752,
) -> DecoderSpec:
    return DecoderSpec(
        dim=dim,
        vocab_size=vocab_size,
        layers=(LayerSpec(attention, Dense(dense_dim)),) + (LayerSpec(attention, experts),) * (num_layers - 1),
        norm_eps=1e-5,
        max_seq_len=max_seq_len,
        family="glm4_moe_lite",
    )


def _attention(num_heads: int, q_rank: int, kv_rank: int, nope: int, rotated: int, v_head_dim: int) -> Latent:
    return Latent(num_heads, q_rank, kv_rank, nope, v_head_dim, Rope(rotated, 1e6, interleaved=True))


def _experts(num_experts: int, top_k: int, hidden_dim: int) -> MoE:
    router = Router(score="sigmoid", normalize=True, scale=1.8, selection_bias=True)
    return MoE(num_experts, top_k, hidden_dim, router, shared=Dense(hidden_dim))


_FLAVORS = {
    # For trying things out, with the built-in tokenizer's vocabulary.
    "debugmodel": _spec(
        _attention(4, 96, 64, nope=48, rotated=16, v_head_dim=64),
        _experts(16, 4, 128),
        dim=256,
        num_layers=4,
        dense_dim=768,
        vocab_size=2048,
        max_seq_len=4096,
    ),
    "4.7-Flash": _spec(
        _attention(20, 768, 512, nope=192, rotated=64, v_head_dim=256),
        _experts(64, 4, 1536),
        dim=2048,
        num_layers=47,
        dense_dim=10_240,
    ),
}

_RULES = (*ENDS, *NORMS, *LATENT, *DENSE, *GATE, *SELECTION_BIAS, *EXPERTS, *SHARED_EXPERTS)


def _from_hf_config(values: Mapping[str, Any]) -> DecoderSpec:
    config = HfConfig(values)
    config.refuse_unsupported()
    attention = read_latent(values, interleaved=config.flag("rope_interleave", True))
    is_dense = [kind == _DENSE for kind in _layer_kinds(config)]
    read_router = partial(read_sigmoid_router, default_groups=1, default_scale=1.8)
    layers = read_layers(config, attention, is_dense, read_router)
    return config.decoder("glm4_moe_lite", layers, default_max_seq_len=202_752, default_eps=1e-5)


def _layer_kinds(config: HfConfig) -> list[str]:
    """Each layer's kind, as `mlp_layer_types` gives it; releases before that key have one dense layer.

    Those hold `first_k_dense_replace` as well, which transformers does not read: it must say the same.
    """
    num_layers = config.integer("num_hidden_layers")
    kinds = config.values.get("mlp_layer_types", [_DENSE] + [_SPARSE] * (num_layers - 1))
    if not isinstance(kinds, list) or len(kinds) < num_layers or any(kind not in (_DENSE, _SPARSE) for kind in kinds):
        raise ConfigError(
            f"is not a list of {num_layers} of {_DENSE}, {_SPARSE}", where=config.where("mlp_layer_types")
        )
    kinds = kinds[:num_layers]
    num_dense = read_num_dense(config, default=0)
    if "first_k_dense_replace" in config and kinds != [_DENSE] * num_dense + [_SPARSE] * (num_layers - num_dense):
        raise ConfigError(
            f"{num_dense} dense layers contradict mlp_layer_types, which by default has one",
            where=config.where("first_k_dense_replace"),
        )
    return kinds


def _to_hf_config(spec: DecoderSpec, dtype_name: str) -> dict[str, Any]:
    attention = spec.layers[0].attention
    assert isinstance(attention, Latent)
    kinds = [_DENSE if isinstance(layer.feed_forward, Dense) else _SPARSE for layer in spec.layers]
    config = {
        **decoder_entries(spec, _ARCHITECTURE, "glm4_moe_lite", dtype_name),
        **latent_entries(attention),
        **feed_forward_entries(spec),
        "mlp_layer_types": kinds,
        "num_nextn_predict_layers": 0,
        "rope_interleave": attention.rope.interleaved,
    }
    if kinds != sorted(kinds):  # dense layers beyond the first ones, which only the list can say
        del config["first_k_dense_replace"]
    return config


FAMILY = Family(
    "glm4_moe_lite",
    (_ARCHITECTURE,),
    _FLAVORS,
    _from_hf_config,
    _to_hf_config,
    _RULES,
    also_reads=(STACKED_EXPERTS,),
    extra_layer_key="model.layers.{i}.eh_proj.weight",
    model_types=("glm4_moe_lite",),
)
