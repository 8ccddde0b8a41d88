"""Llama 4's text models (the sizes are those of the published Scout and Maverick `config.json` files).

Most layers have RoPE and see a chunk of the document. Every fourth has no positions ("NoPE"), sees all of the document,
and its logits grow with the position. Releases are multimodal; their vision tensors are left unread, and what is
written is the text model alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from titanmoe.config.errors import ConfigError
from titanmoe.models.common_rules import ENDS, GROUPED_QUERY, LAYER, NORMS, expert_by_expert, linears
from titanmoe.models.family import Family
from titanmoe.models.hf_config import HfConfig, decoder_entries
from titanmoe.models.keys import Axes, Rule
from titanmoe.models.spec import (
    DecoderSpec,
    Dense,
    GroupedQuery,
    LayerSpec,
    Llama3Scaling,
    MoE,
    Rope,
    Router,
    Temperature,
)

_FULL, _CHUNKED = "full_attention", "chunked_attention"
_THETA = 500_000.0
_ROUTER = Router(score="sigmoid", normalize=False, weight_on="input")


def _experts(num_experts: int, hidden_dim: int) -> MoE:
    return MoE(num_experts, 1, hidden_dim, _ROUTER, shared=Dense(hidden_dim))


def _spec(
    experts: MoE,
    *,
    moe_step: int,
    scaling: Llama3Scaling | None,
    qk_l2_norm: bool,
    max_seq_len: int,
    dim: int = 5120,
    dense_dim: int = 16_384,
    num_layers: int = 48,
    heads: tuple[int, int, int] = (40, 8, 128),
    chunk: int = 8192,
    vocab_size: int = 202_048,
) -> DecoderSpec:
    rope = Rope(heads[2], _THETA, scaling, interleaved=True)
    chunked = GroupedQuery(*heads, rope, qk_l2_norm=qk_l2_norm, chunk=chunk)
    nope = GroupedQuery(*heads, None, temperature=Temperature(length=8192, scale=0.1))
    layers = tuple(
        LayerSpec(nope if index % 4 == 0 else chunked, experts if index % moe_step == 0 else Dense(dense_dim))
        for index in range(1, num_layers + 1)
    )
    return DecoderSpec(dim, vocab_size, layers, norm_eps=1e-5, max_seq_len=max_seq_len, family="llama4")


# Both bounds are one: there is no ramp between the frequencies that are stretched and those that are kept.
_SCALING = Llama3Scaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_seq_len=8192)
_PUBLISHED = {
    "debugmodel": _spec(
        _experts(8, 512),
        moe_step=2,
        scaling=_SCALING,
        qk_l2_norm=True,
        max_seq_len=1_048_576,
        dim=256,
        dense_dim=768,
        num_layers=6,
        heads=(16, 16, 16),
        chunk=256,
        vocab_size=2048,
    ),
    "17bx16e": _spec(_experts(16, 8192), moe_step=1, scaling=_SCALING, qk_l2_norm=True, max_seq_len=10_485_760),
    "17bx128e": _spec(_experts(128, 8192), moe_step=2, scaling=None, qk_l2_norm=False, max_seq_len=1_048_576),
}
# torchtitan's plain names leave out NoPE layers and chunks. Here both names mean the published model.
_FLAVORS = _PUBLISHED | {f"{name}_irope": spec for name, spec in _PUBLISHED.items()}

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_EXPERTS, _EXPERTS_HERE = f"{LAYER}.feed_forward.experts", "layers.{i}.moe.experts"
_RULES = (
    *ENDS,
    *NORMS,
    *GROUPED_QUERY,
    *linears(f"{LAYER}.feed_forward", "layers.{i}.feed_forward", *_PROJECTIONS),
    *linears(f"{LAYER}.feed_forward.shared_expert", "layers.{i}.moe.shared_experts", *_PROJECTIONS),
    Rule(f"{LAYER}.feed_forward.router.weight", "layers.{i}.moe.router.gate.weight"),
    Rule(f"{_EXPERTS}.gate_up_proj", f"{_EXPERTS_HERE}.gate_up", axes=Axes("e d (g h)", "e g h d")),
    Rule(f"{_EXPERTS}.down_proj", f"{_EXPERTS_HERE}.down", axes=Axes("e h d", "e d h")),
)
_EXPERT_BY_EXPERT = expert_by_expert(_EXPERTS)
"""What the quantised releases hold in place of the two stacked tensors."""


def _in_multimodal(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return tuple(replace(rule, file_pattern=f"language_model.{rule.file_pattern}") for rule in rules)


def _from_hf_config(values: Mapping[str, Any]) -> DecoderSpec:
    text = values.get("text_config")
    config = HfConfig(values) if text is None else HfConfig(text, table="text_config")
    config.refuse_unsupported()
    config.require("router_jitter_noise", 0, default=0)
    num_layers = config.integer("num_hidden_layers")
    layers = map(LayerSpec, _attentions(config, num_layers), _feed_forwards(config, num_layers))
    return config.decoder("llama4", layers, default_max_seq_len=131_072, default_eps=1e-5)


def _attentions(config: HfConfig, num_layers: int) -> list[GroupedQuery]:
    bias = config.flag("attention_bias")
    attention = config.grouped_query(head_dim=128, default_theta=_THETA, qkv_bias=bias, out_bias=bias)
    assert attention.rope is not None
    rope = replace(attention.rope, interleaved=True)
    with_rope = replace(attention, rope=rope, qk_l2_norm=config.flag("use_qk_norm", True))
    nope = replace(attention, rope=None)
    # Some releases say 4 where they mean true.
    if config.values.get("attn_temperature_tuning", True):
        temperature = Temperature(config.integer("floor_scale", default=8192), config.number("attn_scale", 0.1))
        nope = replace(nope, temperature=temperature)

    # In spite of its name, a 1 in `no_rope_layers` means RoPE; an empty list is as good as none.
    interval = config.integer("no_rope_layer_interval", default=4)
    has_rope = config.integers("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(num_layers)]
    kinds = config.values.get("layer_types") or [_CHUNKED if rotates else _FULL for rotates in has_rope]
    if len(has_rope) != num_layers:
        raise ConfigError(f"has {len(has_rope)} entries for {num_layers} layers", where=config.where("no_rope_layers"))
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in (_FULL, _CHUNKED) for kind in kinds):
        raise ConfigError(f"is not a list of {num_layers} of {_FULL}, {_CHUNKED}", where=config.where("layer_types"))
    chunk = config.integer("attention_chunk_size") if _CHUNKED in kinds else None
    return [
        replace(with_rope if rotates else nope, chunk=chunk if kind == _CHUNKED else None)
        for rotates, kind in zip(has_rope, kinds, strict=True)
    ]


def _feed_forwards(config: HfConfig, num_layers: int) -> list[Dense | MoE]:
    step = 1 if "moe_layers" in config else config.integer("interleave_moe_layer_step", default=1)
    moe_layers = config.integers("moe_layers") if "moe_layers" in config else range(step - 1, num_layers, step)

    def feed_forward(index: int) -> Dense | MoE:
        if index not in moe_layers:
            return Dense(config.integer("intermediate_size_mlp"))
        hidden_dim = config.integer("intermediate_size")
        return MoE(*config.experts("num_local_experts"), hidden_dim, _ROUTER, shared=Dense(hidden_dim))

    return [feed_forward(index) for index in range(num_layers)]


def _to_hf_config(spec: DecoderSpec, dtype_name: str) -> dict[str, Any]:
    attentions = [layer.attention for layer in spec.layers if isinstance(layer.attention, GroupedQuery)]
    temperature = next((attention.temperature for attention in attentions if attention.temperature), None)
    moe_layers = [index for index, layer in enumerate(spec.layers) if isinstance(layer.feed_forward, MoE)]
    experts = next((layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, MoE)), None)
    dense = next((layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, Dense)), None)
    hidden_dim = experts.hidden_dim if experts else spec.dim
    config = decoder_entries(spec, "Llama4ForCausalLM", "llama4_text", dtype_name) | {
        "attention_bias": attentions[0].qkv_bias,
        # transformers wants a number even where no layer has chunks.
        "attention_chunk_size": next((attention.chunk for attention in attentions if attention.chunk), 8192),
        "attn_temperature_tuning": temperature is not None,
        "intermediate_size": hidden_dim,
        "intermediate_size_mlp": dense.hidden_dim if dense else 2 * hidden_dim,
        "layer_types": [_CHUNKED if attention.chunk else _FULL for attention in attentions],
        "moe_layers": moe_layers,
        "no_rope_layers": [int(attention.rope is not None) for attention in attentions],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "use_qk_norm": any(attention.qk_l2_norm for attention in attentions),
    }
    if temperature:
        config |= {"attn_scale": temperature.scale, "floor_scale": temperature.length}
    if experts:
        config |= {
            # For readers that do not know `moe_layers`.
            "interleave_moe_layer_step": moe_layers[0] + 1,
            "num_experts_per_tok": experts.top_k,
            "num_local_experts": experts.num_experts,
        }
    return config


FAMILY = Family(
    "llama4",
    ("Llama4ForConditionalGeneration", "Llama4ForCausalLM"),
    _FLAVORS,
    _from_hf_config,
    _to_hf_config,
    _RULES,
    also_reads=(_in_multimodal(_RULES), _EXPERT_BY_EXPERT, _in_multimodal(_EXPERT_BY_EXPERT)),
    ignored_keys=("*.rotary_emb.inv_freq", "vision_model.*", "multi_modal_projector.*"),
    model_types=("llama4", "llama4_text"),
)
