"""Qwen3, dense and mixture-of-experts (arXiv 2505.09388; the sizes are those of the published `config.json` files)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from titanmoe.models.common_rules import DENSE, ENDS, EXPERTS, GATE, GROUPED_QUERY, NORMS, QK_NORMS, STACKED_EXPERTS
from titanmoe.models.family import Family
from titanmoe.models.hf_config import HfConfig, decoder_entries, window_entries
from titanmoe.models.spec import DecoderSpec, Dense, GroupedQuery, LayerSpec, MoE, Rope, Router

_DENSE, _MOE = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
_VOCAB = 151_936


def _spec(
    dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    feed_forward: Dense | MoE,
    *,
    head_dim: int = 128,
    vocab_size: int = _VOCAB,
    rope_theta: float = 1e6,
    tie_embeddings: bool = False,
    max_seq_len: int = 40_960,
) -> DecoderSpec:
    attention = GroupedQuery(num_heads, num_kv_heads, head_dim, Rope(head_dim, rope_theta), qk_norm=True)
    return DecoderSpec(
        dim=dim,
        vocab_size=vocab_size,
        layers=(LayerSpec(attention, feed_forward),) * num_layers,
        tie_embeddings=tie_embeddings,
        max_seq_len=max_seq_len,
        family="qwen3",
    )


def _experts(num_experts: int, top_k: int, hidden_dim: int) -> MoE:
    return MoE(num_experts, top_k, hidden_dim, Router(score="softmax", normalize=True))


_FLAVORS = {
    # Sizes for trying things out, with the built-in tokenizer's vocabulary.
    "debug_dense": _spec(256, 4, 4, 2, Dense(768), head_dim=64, vocab_size=2048),
    "debug_moe": _spec(256, 4, 4, 2, _experts(16, 2, 128), head_dim=64, vocab_size=2048),
    "debugmodel": _spec(256, 8, 16, 8, Dense(3072), vocab_size=2048, max_seq_len=4096),
    "debugmodel_moe": _spec(256, 8, 16, 8, _experts(64, 8, 768), vocab_size=2048, max_seq_len=4096),
    "bench_60M": _spec(512, 4, 8, 2, _experts(32, 8, 208), head_dim=64, vocab_size=16_384),
    # 30B-A3B with a quarter of its widths and heads; and with its widths, and a quarter of its experts.
    "bench_170M": _spec(512, 4, 8, 2, _experts(128, 8, 192), head_dim=64, vocab_size=16_384),
    "bench_410M": _spec(2048, 2, 32, 4, _experts(32, 8, 768), vocab_size=16_384),
    "0.6B": _spec(1024, 28, 16, 8, Dense(3072), tie_embeddings=True),
    "1.7B": _spec(2048, 28, 16, 8, Dense(6144), tie_embeddings=True),
    "4B": _spec(2560, 36, 32, 8, Dense(9728), tie_embeddings=True),
    "8B": _spec(4096, 36, 32, 8, Dense(12_288)),
    "14B": _spec(5120, 40, 40, 8, Dense(17_408)),
    "32B": _spec(5120, 64, 64, 8, Dense(25_600)),
    "30B-A3B": _spec(2048, 48, 32, 4, _experts(128, 8, 768)),
    "235B-A22B": _spec(4096, 94, 64, 4, _experts(128, 8, 1536)),
    "Coder-30B-A3B": _spec(2048, 48, 32, 4, _experts(128, 8, 768), rope_theta=1e7, max_seq_len=262_144),
}

_RULES = (*ENDS, *NORMS, *GROUPED_QUERY, *QK_NORMS, *DENSE, *GATE, *EXPERTS)


def _from_hf_config(values: Mapping[str, Any]) -> DecoderSpec:
    config = HfConfig(values)
    config.refuse_unsupported()
    is_moe = _MOE in config.values.get("architectures", ()) or config.values.get("model_type") == "qwen3_moe"
    bias = config.flag("attention_bias")
    # transformers' defaults differ: the dense model's config has a head_dim of 128, the other's has none.
    attention = config.grouped_query(head_dim=None if is_moe else 128, qkv_bias=bias, out_bias=bias, qk_norm=True)
    num_layers = config.integer("num_hidden_layers")
    feed_forwards: list[Dense | MoE] = [Dense(config.integer("intermediate_size"))] * num_layers
    if is_moe:
        router = Router(score="softmax", normalize=config.flag("norm_topk_prob"))
        num_experts, top_k = config.experts("num_experts", "num_local_experts")
        experts = MoE(num_experts, top_k, config.integer("moe_intermediate_size"), router)
        step, dense_layers = config.integer("decoder_sparse_step", default=1), config.integers("mlp_only_layers")
        for index in range(num_layers):
            if index not in dense_layers and (index + 1) % step == 0:
                feed_forwards[index] = experts
        # The mixture gives all layers the window or none, whatever `layer_types` and `max_window_layers` say.
        windows = [config.integer("sliding_window") if config.flag("use_sliding_window") else None] * num_layers
    else:
        windows = config.layers_with_window(num_layers)
    layers = (
        LayerSpec(replace(attention, window=window), feed_forward)
        for window, feed_forward in zip(windows, feed_forwards, strict=True)
    )
    return config.decoder("qwen3", layers, default_max_seq_len=32_768)


def _to_hf_config(spec: DecoderSpec, dtype_name: str) -> dict[str, Any]:
    attention = spec.layers[0].attention
    assert isinstance(attention, GroupedQuery)
    dense_layers = [index for index, layer in enumerate(spec.layers) if isinstance(layer.feed_forward, Dense)]
    experts = next((layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, MoE)), None)
    dense = next((layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, Dense)), None)
    names = (_MOE, "qwen3_moe") if experts else (_DENSE, "qwen3")
    config: dict[str, Any] = {
        **decoder_entries(spec, *names, dtype_name),
        "attention_bias": attention.qkv_bias,
        "intermediate_size": dense.hidden_dim if dense else 4 * spec.dim,
        **window_entries(spec),
    }
    if experts:
        config |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense_layers,
            "moe_intermediate_size": experts.hidden_dim,
            "norm_topk_prob": experts.router.normalize,
            "num_experts": experts.num_experts,
            "num_experts_per_tok": experts.top_k,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }
    return config


FAMILY = Family(
    "qwen3",
    (_DENSE, _MOE),
    _FLAVORS,
    _from_hf_config,
    _to_hf_config,
    _RULES,
    also_reads=(STACKED_EXPERTS,),
    model_types=("qwen3", "qwen3_moe"),
)
