"""GLM-4.5, 4.6 and 4.7 (arXiv 2508.06471; the sizes are those of the published `config.json` files)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from titanmoe.models.common_rules import (
    DENSE,
    ENDS,
    EXPERTS,
    GATE,
    GROUPED_QUERY,
    NORMS,
    QK_NORMS,
    SELECTION_BIAS,
    SHARED_EXPERTS,
    STACKED_EXPERTS,
)
from titanmoe.models.deepseek_config import (
    feed_forward_entries,
    read_layers,
    read_num_dense,
    read_sigmoid_router,
)
from titanmoe.models.family import Family
from titanmoe.models.hf_config import HfConfig, decoder_entries
from titanmoe.models.spec import DecoderSpec, Dense, GroupedQuery, LayerSpec, MoE, Rope, Router

_ARCHITECTURE = "Glm4MoeForCausalLM"
_ROTATED = 0.5
"""Of each head's channels."""


def _spec(
    experts: MoE,
    *,
    dim: int,
    num_layers: int,
    dense_dim: int,
    num_dense: int = 1,
    num_heads: int = 96,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    qk_norm: bool = False,
    vocab_size: int = 151_552,
    max_seq_len: int = 131_072,
) -> DecoderSpec:
    rope = Rope(int(_ROTATED * head_dim), 1e6)
    attention = GroupedQuery(num_heads, num_kv_heads, head_dim, rope, qkv_bias=True, qk_norm=qk_norm)
    dense, sparse = LayerSpec(attention, Dense(dense_dim)), LayerSpec(attention, experts)
    return DecoderSpec(
        dim=dim,
        vocab_size=vocab_size,
        layers=(dense,) * num_dense + (sparse,) * (num_layers - num_dense),
        norm_eps=1e-5,
        max_seq_len=max_seq_len,
        family="glm4_moe",
    )


def _experts(num_experts: int, top_k: int, hidden_dim: int, scale: float = 1.0) -> MoE:
    router = Router(score="sigmoid", normalize=True, scale=scale, selection_bias=True)
    return MoE(num_experts, top_k, hidden_dim, router, shared=Dense(hidden_dim))


def _large(max_seq_len: int) -> DecoderSpec:
    return _spec(
        _experts(160, 8, 1536, scale=2.5),
        dim=5120,
        num_layers=92,
        dense_dim=12_288,
        num_dense=3,
        qk_norm=True,
        max_seq_len=max_seq_len,
    )


_FLAVORS = {
    # For trying things out, with the built-in tokenizer's vocabulary.
    "debugmodel": _spec(
        _experts(16, 4, 128),
        dim=256,
        num_layers=4,
        dense_dim=768,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=2048,
        max_seq_len=4096,
    ),
    "4.5-Air": _spec(_experts(128, 8, 1408), dim=4096, num_layers=46, dense_dim=10_944),
    "4.5": _large(131_072),
    "4.6": _large(202_752),
    "4.7": _large(202_752),
}

_RULES = (*ENDS, *NORMS, *GROUPED_QUERY, *QK_NORMS, *DENSE, *GATE, *SELECTION_BIAS, *EXPERTS, *SHARED_EXPERTS)


def _from_hf_config(values: Mapping[str, Any]) -> DecoderSpec:
    config = HfConfig(values)
    config.refuse_unsupported()
    num_heads, num_kv_heads = config.heads()
    head_dim = config.integer("head_dim", default=max(1, config.integer("hidden_size") // num_heads))
    attention = GroupedQuery(
        num_heads,
        num_kv_heads,
        head_dim,
        config.rope(head_dim, fraction=_ROTATED),
        qkv_bias=config.flag("attention_bias"),
        qk_norm=config.flag("use_qk_norm"),
    )
    num_layers, num_dense = config.integer("num_hidden_layers"), read_num_dense(config, default=1)
    is_dense = [index < num_dense for index in range(num_layers)]
    read_router = partial(read_sigmoid_router, default_groups=1, default_scale=1.0)
    layers = read_layers(config, attention, is_dense, read_router)
    return config.decoder("glm4_moe", layers, default_max_seq_len=131_072, default_eps=1e-5)


def _to_hf_config(spec: DecoderSpec, dtype_name: str) -> dict[str, Any]:
    attention = spec.layers[0].attention
    assert isinstance(attention, GroupedQuery) and attention.rope is not None
    return {
        **decoder_entries(spec, _ARCHITECTURE, "glm4_moe", dtype_name),
        **feed_forward_entries(spec),
        "attention_bias": attention.qkv_bias,
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": attention.rope.dim / attention.head_dim,
        "use_qk_norm": attention.qk_norm,
    }


FAMILY = Family(
    "glm4_moe",
    (_ARCHITECTURE,),
    _FLAVORS,
    _from_hf_config,
    _to_hf_config,
    _RULES,
    also_reads=(STACKED_EXPERTS,),
    extra_layer_key="model.layers.{i}.eh_proj.weight",
    model_types=("glm4_moe",),
)
