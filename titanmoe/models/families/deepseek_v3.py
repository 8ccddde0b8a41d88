"""DeepSeek-V3 (arXiv 2412.19437) and DeepSeek-V2 (arXiv 2405.04434), told apart by their architectures.

The sizes are those of the published `config.json` files. V2 scores experts by softmax, V3 by sigmoid with a selection
bias. R1 and V3.1 are of V3's architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

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
    first_experts,
    latent_entries,
    read_latent,
    read_layers,
    read_num_dense,
    read_sigmoid_router,
    read_softmax_router,
)
from titanmoe.models.family import Family
from titanmoe.models.hf_config import HfConfig, decoder_entries
from titanmoe.models.spec import DecoderSpec, Dense, Latent, LayerSpec, MoE, Rope, Router, YarnScaling

_V2, _V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"


def _yarn(mscale: float) -> YarnScaling:
    return YarnScaling(factor=40.0, original_max_seq_len=4096, mscale=mscale, mscale_all_dim=mscale)


def _spec(
    experts: MoE,
    *,
    dim: int,
    num_layers: int,
    num_heads: int,
    dense_dim: int,
    vocab_size: int,
    scaling: YarnScaling | None,
    q_lora_rank: int | None = None,
    num_dense: int = 1,
    rope_theta: float = 1e4,
    norm_eps: float = 1e-6,
    max_seq_len: int = 163_840,
) -> DecoderSpec:
    rope = Rope(64, rope_theta, scaling, interleaved=True)
    attention = Latent(num_heads, q_lora_rank, kv_lora_rank=512, qk_nope_head_dim=128, v_head_dim=128, rope=rope)
    dense, sparse = LayerSpec(attention, Dense(dense_dim)), LayerSpec(attention, experts)
    return DecoderSpec(
        dim=dim,
        vocab_size=vocab_size,
        layers=(dense,) * num_dense + (sparse,) * (num_layers - num_dense),
        norm_eps=norm_eps,
        max_seq_len=max_seq_len,
        family="deepseek_v3",
    )


def _experts(num_experts: int, top_k: int, hidden_dim: int, num_shared: int, router: Router) -> MoE:
    return MoE(num_experts, top_k, hidden_dim, router, shared=Dense(num_shared * hidden_dim))


def _softmax(scale: float = 1.0, **groups: Any) -> Router:
    return Router(score="softmax", normalize=False, scale=scale, **groups)


def _sigmoid(scale: float, **groups: Any) -> Router:
    return Router(score="sigmoid", normalize=True, scale=scale, selection_bias=True, **groups)


_FLAVORS = {
    # For trying things out, with the built-in tokenizer's vocabulary: V2's architecture.
    "debugmodel": _spec(
        _experts(8, 3, 256, 2, _softmax()),
        dim=256,
        num_layers=6,
        num_heads=16,
        dense_dim=1024,
        vocab_size=2048,
        scaling=_yarn(0.7),
    ),
    # DeepSeek-V2-Lite.
    "16B": _spec(
        _experts(64, 6, 1408, 2, _softmax()),
        dim=2048,
        num_layers=27,
        num_heads=16,
        dense_dim=10_944,
        vocab_size=102_400,
        scaling=_yarn(0.707),
    ),
    # DeepSeek-V2.
    "236B": _spec(
        _experts(160, 6, 1536, 2, _softmax(16.0, num_groups=8, top_groups=3, group_score="max")),
        dim=5120,
        num_layers=60,
        num_heads=128,
        dense_dim=12_288,
        vocab_size=102_400,
        scaling=_yarn(1.0),
        q_lora_rank=1536,
    ),
    "671B": _spec(
        _experts(256, 8, 2048, 1, _sigmoid(2.5, num_groups=8, top_groups=4)),
        dim=7168,
        num_layers=61,
        num_heads=128,
        dense_dim=18_432,
        vocab_size=129_280,
        scaling=_yarn(1.0),
        q_lora_rank=1536,
        num_dense=3,
    ),
    "Moonlight-16B-A3B": _spec(
        _experts(64, 6, 1408, 2, _sigmoid(2.446)),
        dim=2048,
        num_layers=27,
        num_heads=16,
        dense_dim=11_264,
        vocab_size=163_840,
        scaling=None,
        rope_theta=5e4,
        norm_eps=1e-5,
        max_seq_len=8192,
    ),
}

_RULES = (*ENDS, *NORMS, *LATENT, *DENSE, *GATE, *SELECTION_BIAS, *EXPERTS, *SHARED_EXPERTS)


def _is_v2(values: Mapping[str, Any]) -> bool:
    named = values.get("architectures")
    return _V2 in named if named else values.get("model_type") == "deepseek_v2"


def _from_hf_config(values: Mapping[str, Any]) -> DecoderSpec:
    is_v2 = _is_v2(values)
    config = HfConfig(values)
    config.refuse_unsupported()
    config.require("mlp_bias", False, default=False)
    if is_v2:
        config.require("rope_interleave", True, default=True)
    attention = read_latent(values, interleaved=config.flag("rope_interleave", True))
    num_layers, num_dense = config.integer("num_hidden_layers"), read_num_dense(config, default=0 if is_v2 else 3)
    is_dense = [index < num_dense for index in range(num_layers)]
    read_router = read_softmax_router if is_v2 else partial(read_sigmoid_router, default_groups=None, default_scale=2.5)
    layers = read_layers(config, attention, is_dense, read_router)
    return config.decoder("deepseek_v3", layers, default_max_seq_len=2048 if is_v2 else 4096)


def _to_hf_config(spec: DecoderSpec, dtype_name: str) -> dict[str, Any]:
    attention, experts = spec.layers[0].attention, first_experts(spec)
    assert isinstance(attention, Latent)
    is_v2 = experts is not None and experts.router.score == "softmax"
    config = decoder_entries(spec, _V2 if is_v2 else _V3, "deepseek_v2" if is_v2 else "deepseek_v3", dtype_name)
    config |= {**latent_entries(attention), **feed_forward_entries(spec), "moe_layer_freq": 1}
    if not is_v2:
        config |= {"num_nextn_predict_layers": 0, "rope_interleave": attention.rope.interleaved}
    return config


FAMILY = Family(
    "deepseek_v3",
    (_V3, _V2),
    _FLAVORS,
    _from_hf_config,
    _to_hf_config,
    _RULES,
    also_reads=(STACKED_EXPERTS,),
    extra_layer_key="model.layers.{i}.eh_proj.weight",
    model_types=("deepseek_v3", "deepseek_v2"),
)
