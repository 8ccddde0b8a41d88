"""gpt-oss (model card arXiv 2508.10925; the sizes are those of the published `config.json` files).

Every layer has sinks, biases on all projections, and experts with a clamped SwiGLU; every second one sees a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from titanmoe.config.errors import ConfigError
from titanmoe.models.common_rules import ENDS, GROUPED_QUERY, LAYER, NORMS
from titanmoe.models.family import Family
from titanmoe.models.hf_config import HfConfig, decoder_entries
from titanmoe.models.keys import Axes, Rule
from titanmoe.models.spec import ClampedSwiGLU, DecoderSpec, GroupedQuery, LayerSpec, MoE, Rope, Router, YarnScaling

_FULL, _SLIDING = "full_attention", "sliding_attention"
_WINDOW = 128
_THETA = 150_000.0
# The softmax over the chosen logits is the softmax over all of them, divided by the sum of those chosen.
_ROUTER = Router(score="softmax", normalize=True, gate_bias=True)


def _spec(num_layers: int, num_experts: int, *, dim: int = 2880, vocab_size: int = 201_088) -> DecoderSpec:
    rope = Rope(64, _THETA, YarnScaling(32.0, 4096, truncate=False))
    windowed = GroupedQuery(64, 8, 64, rope, qkv_bias=True, out_bias=True, sinks=True, window=_WINDOW)
    experts = MoE(num_experts, 4, 2880, _ROUTER, bias=True, activation=ClampedSwiGLU())
    return DecoderSpec(
        dim=dim,
        vocab_size=vocab_size,
        layers=(LayerSpec(windowed, experts), LayerSpec(replace(windowed, window=None), experts)) * (num_layers // 2),
        norm_eps=1e-5,
        max_seq_len=131_072,
        family="gpt_oss",
    )


_FLAVORS = {
    "debugmodel": _spec(4, 8, dim=256, vocab_size=2048),
    "20b": _spec(24, 32),
    "120b": _spec(36, 128),
}

_EXPERTS, _EXPERTS_HERE = f"{LAYER}.mlp.experts", "layers.{i}.moe.experts"
# In the files gate and up are interleaved, and matrices are (in, out) ...
_RULES = (
    *ENDS,
    *NORMS,
    *GROUPED_QUERY,
    Rule(f"{LAYER}.self_attn.sinks", "layers.{i}.attention.sinks"),
    *(Rule(f"{LAYER}.mlp.router.{kind}", f"layers.{{i}}.moe.router.gate.{kind}") for kind in ("weight", "bias")),
    Rule(f"{_EXPERTS}.gate_up_proj", f"{_EXPERTS_HERE}.gate_up", axes=Axes("e d (h g)", "e g h d")),
    Rule(f"{_EXPERTS}.down_proj", f"{_EXPERTS_HERE}.down", axes=Axes("e h d", "e d h")),
    Rule(f"{_EXPERTS}.gate_up_proj_bias", f"{_EXPERTS_HERE}.gate_up_bias", axes=Axes("e (h g)", "e g h")),
    Rule(f"{_EXPERTS}.down_proj_bias", f"{_EXPERTS_HERE}.down_bias"),
)
# ... but (out, in) where they are quantised, since MXFP4's blocks lie along `in`.
_MXFP4 = (
    Rule(f"{_EXPERTS}.gate_up_proj_blocks", f"{_EXPERTS_HERE}.gate_up", axes=Axes("e (h g) d", "e g h d")),
    Rule(f"{_EXPERTS}.down_proj_blocks", f"{_EXPERTS_HERE}.down"),
)


def _from_hf_config(values: Mapping[str, Any]) -> DecoderSpec:
    config = HfConfig(values)
    config.refuse_unsupported()
    if "rope_parameters" not in config and "rope_scaling" not in config:
        # Some versions of transformers then compute YaRN, some plain RoPE.
        raise ConfigError(
            "rope_parameters or rope_scaling is missing",
            where="config.json",
            mend='name the kind of RoPE; the plain one is {"rope_type": "default"}',
        )
    num_layers = config.integer("num_hidden_layers")
    if "layer_types" not in config:
        config = HfConfig({**config.values, "layer_types": [(_SLIDING, _FULL)[i % 2] for i in range(num_layers)]})
    bias = config.flag("attention_bias", True)
    attention = config.grouped_query(head_dim=64, default_theta=_THETA, qkv_bias=bias, out_bias=bias, sinks=True)
    num_experts, top_k = config.experts("num_local_experts", "num_experts")
    activation = ClampedSwiGLU(config.number("swiglu_limit", 7.0), config.number("swiglu_alpha", 1.702))
    experts = MoE(num_experts, top_k, config.integer("intermediate_size"), _ROUTER, bias=True, activation=activation)
    layers = (LayerSpec(replace(attention, window=window), experts) for window in config.layers_with_window(num_layers))
    return config.decoder("gpt_oss", layers, default_max_seq_len=131_072, default_eps=1e-5)


def _to_hf_config(spec: DecoderSpec, dtype_name: str) -> dict[str, Any]:
    attentions = [layer.attention for layer in spec.layers if isinstance(layer.attention, GroupedQuery)]
    experts = spec.layers[0].feed_forward
    assert isinstance(experts, MoE) and experts.activation is not None
    entries = decoder_entries(spec, "GptOssForCausalLM", "gpt_oss", dtype_name)
    return entries | {
        "attention_bias": attentions[0].qkv_bias,
        "intermediate_size": experts.hidden_dim,
        "layer_types": [_FULL if attention.window is None else _SLIDING for attention in attentions],
        "num_experts_per_tok": experts.top_k,
        "num_local_experts": experts.num_experts,
        "output_router_logits": False,
        "rope_scaling": entries["rope_scaling"] or {"rope_type": "default"},
        "router_aux_loss_coef": 0.001,
        # transformers wants a number even where no layer has a window.
        "sliding_window": next((attention.window for attention in attentions if attention.window), _WINDOW),
        "swiglu_alpha": experts.activation.alpha,
        "swiglu_limit": experts.activation.limit,
    }


FAMILY = Family(
    "gpt_oss",
    ("GptOssForCausalLM",),
    _FLAVORS,
    _from_hf_config,
    _to_hf_config,
    _RULES,
    also_reads=(_MXFP4,),
    model_types=("gpt_oss",),
)
