"""Mixtral (arXiv 2401.04088; the sizes are those of the published `config.json` files)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titanmoe.models.common_rules import (
    ENDS,
    GATE,
    GROUPED_QUERY,
    LAYER,
    NORMS,
    STACKED_EXPERTS,
    expert_by_expert,
)
from titanmoe.models.family import Family
from titanmoe.models.hf_config import HfConfig, decoder_entries
from titanmoe.models.keys import Rule
from titanmoe.models.spec import DecoderSpec, GroupedQuery, LayerSpec, MoE, Rope, Router

_ARCHITECTURE = "MixtralForCausalLM"
_ROUTER = Router(score="softmax", normalize=True)
_EPS, _THETA = 1e-5, 1e6


def _spec(
    dim: int, num_layers: int, num_heads: int, hidden_dim: int, *, vocab_size: int = 32_000, max_seq_len: int
) -> DecoderSpec:
    head_dim = dim // num_heads
    attention = GroupedQuery(num_heads, 8, head_dim, Rope(head_dim, _THETA))
    return DecoderSpec(
        dim=dim,
        vocab_size=vocab_size,
        layers=(LayerSpec(attention, MoE(8, 2, hidden_dim, _ROUTER)),) * num_layers,
        norm_eps=_EPS,
        max_seq_len=max_seq_len,
        family="mixtral",
    )


_FLAVORS = {
    # With the built-in tokenizer's vocabulary.
    "debugmodel": _spec(256, 4, 16, 512, vocab_size=2048, max_seq_len=4096),
    "8x7B": _spec(4096, 32, 32, 14_336, max_seq_len=32_768),
    "8x22B": _spec(6144, 56, 48, 16_384, max_seq_len=65_536),
}

_EXPERTS = (
    Rule(f"{LAYER}.block_sparse_moe.gate.weight", "layers.{i}.moe.router.gate.weight"),
    *expert_by_expert(f"{LAYER}.block_sparse_moe.experts", gate="w1", up="w3", down="w2"),
)


def _from_hf_config(values: Mapping[str, Any]) -> DecoderSpec:
    config = HfConfig(values)
    config.refuse_unsupported()
    config.require("router_jitter_noise", 0, default=0)
    window = config.integer("sliding_window") if "sliding_window" in config else None
    num_experts, top_k = config.experts("num_local_experts", "num_experts")
    layer = LayerSpec(
        config.grouped_query(default_theta=_THETA, window=window),
        MoE(num_experts, top_k, config.integer("intermediate_size"), _ROUTER),
    )
    layers = (layer,) * config.integer("num_hidden_layers")
    return config.decoder("mixtral", layers, default_max_seq_len=131_072, default_eps=_EPS)


def _to_hf_config(spec: DecoderSpec, dtype_name: str) -> dict[str, Any]:
    attention, experts = spec.layers[0].attention, spec.layers[0].feed_forward
    assert isinstance(attention, GroupedQuery) and isinstance(experts, MoE)
    return decoder_entries(spec, _ARCHITECTURE, "mixtral", dtype_name) | {
        "intermediate_size": experts.hidden_dim,
        "num_experts_per_tok": experts.top_k,
        "num_local_experts": experts.num_experts,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "sliding_window": attention.window,
    }


FAMILY = Family(
    "mixtral",
    (_ARCHITECTURE,),
    _FLAVORS,
    _from_hf_config,
    _to_hf_config,
    (*ENDS, *NORMS, *GROUPED_QUERY, *_EXPERTS),
    also_reads=((*GATE, *STACKED_EXPERTS),),
    model_types=("mixtral",),
)
