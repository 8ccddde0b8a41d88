"""Qwen3, dense and mixture-of-experts (arXiv 2505.09388; the sizes are those of the published `config.json` files)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titanmoe.config.errors import ConfigError
from titanmoe.models.family import Family
from titanmoe.models.keys import Rule
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

_RULES = (
    Rule("model.embed_tokens.weight", "tok_embeddings.weight"),
    Rule("model.layers.{i}.input_layernorm.weight", "layers.{i}.attention_norm.weight"),
    *(
        Rule(f"model.layers.{{i}}.self_attn.{name}", f"layers.{{i}}.attention.{name}")
        for projection in "qkvo"
        for name in (f"{projection}_proj.weight", f"{projection}_proj.bias")
    ),
    Rule("model.layers.{i}.self_attn.q_norm.weight", "layers.{i}.attention.q_norm.weight"),
    Rule("model.layers.{i}.self_attn.k_norm.weight", "layers.{i}.attention.k_norm.weight"),
    Rule("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.ffn_norm.weight"),
    *(
        Rule(f"model.layers.{{i}}.mlp.{name}_proj.weight", f"layers.{{i}}.feed_forward.{name}_proj.weight")
        for name in ("gate", "up", "down")
    ),
    Rule("model.layers.{i}.mlp.gate.weight", "layers.{i}.moe.router.gate.weight"),
    Rule("model.layers.{i}.mlp.experts.{e}.gate_proj.weight", "layers.{i}.moe.experts.gate_up", at=("e", 0)),
    Rule("model.layers.{i}.mlp.experts.{e}.up_proj.weight", "layers.{i}.moe.experts.gate_up", at=("e", 1)),
    Rule("model.layers.{i}.mlp.experts.{e}.down_proj.weight", "layers.{i}.moe.experts.down", at=("e",)),
    Rule("model.norm.weight", "norm.weight"),
    Rule("lm_head.weight", "output.weight"),
)


def _from_hf_config(config: Mapping[str, Any]) -> DecoderSpec:
    is_moe = _MOE in config["architectures"]
    _refuse_unsupported(config)

    def need(*keys: str) -> int:
        for key in keys:
            value = config.get(key)
            if value is not None:
                if type(value) is not int or value < 1:
                    raise ConfigError(f"{value!r} is not a positive whole number", where=f"config.json: {key}")
                return value
        raise ConfigError(f"{' or '.join(keys)} is missing", where="config.json")

    dim, num_layers, num_heads = need("hidden_size"), need("num_hidden_layers"), need("num_attention_heads")
    num_kv_heads = need("num_key_value_heads")
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"{num_heads} query heads cannot be dealt to {num_kv_heads} key-value heads",
            where="config.json: num_key_value_heads",
        )
    head_dim = need("head_dim") if config.get("head_dim") is not None else dim // num_heads if is_moe else 128
    rope = config.get("rope_parameters") or {}
    theta = config.get("rope_theta") or rope.get("rope_theta") or 1e4
    bias = bool(config.get("attention_bias", False))
    attention = GroupedQuery(num_heads, num_kv_heads, head_dim, Rope(head_dim, float(theta)), bias, bias, qk_norm=True)
    dense = LayerSpec(attention, Dense(need("intermediate_size")))
    layers = (dense,) * num_layers
    if is_moe:
        router = Router(score="softmax", normalize=bool(config.get("norm_topk_prob", False)))
        experts = MoE(
            need("num_experts", "num_local_experts"), need("num_experts_per_tok"), need("moe_intermediate_size"), router
        )
        if experts.top_k > experts.num_experts:
            raise ConfigError(
                f"{experts.top_k} of {experts.num_experts} experts cannot be chosen",
                where="config.json: num_experts_per_tok",
            )
        step, dense_layers = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or []
        is_sparse = [index not in dense_layers and (index + 1) % step == 0 for index in range(num_layers)]
        layers = tuple(LayerSpec(attention, experts) if sparse else dense for sparse in is_sparse)
    return DecoderSpec(
        dim=dim,
        vocab_size=need("vocab_size"),
        layers=layers,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_seq_len=config.get("max_position_embeddings") or 32_768,
    )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type != "default":
        raise ConfigError(
            f"rope type {rope_type!r} is not supported", where="config.json: rope_scaling", mend="supported: default"
        )
    if config.get("use_sliding_window"):
        raise ConfigError(
            "sliding-window attention is not supported for qwen3", where="config.json: use_sliding_window"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"activation {config['hidden_act']!r} is not supported",
            where="config.json: hidden_act",
            mend="supported: silu",
        )
    if config.get("attention_dropout"):
        raise ConfigError(
            "attention dropout is not supported", where="config.json: attention_dropout", mend="set it to 0"
        )


def _to_hf_config(spec: DecoderSpec, dtype_name: str) -> dict[str, Any]:
    attention = spec.layers[0].attention
    rope = attention.rope
    dense_layers = [index for index, layer in enumerate(spec.layers) if isinstance(layer.feed_forward, Dense)]
    experts = next((layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, MoE)), None)
    dense = next((layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, Dense)), None)
    config: dict[str, Any] = {
        "architectures": [_MOE if experts else _DENSE],
        "model_type": "qwen3_moe" if experts else "qwen3",
        "attention_bias": attention.qkv_bias,
        "attention_dropout": 0.0,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.dim,
        "initializer_range": 0.02,
        "intermediate_size": dense.hidden_dim if dense else 4 * spec.dim,
        "max_position_embeddings": spec.max_seq_len,
        "num_attention_heads": attention.num_heads,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": attention.num_kv_heads,
        "rms_norm_eps": spec.norm_eps,
        "rope_scaling": None,
        "rope_theta": rope.theta,
        "tie_word_embeddings": spec.tie_embeddings,
        "torch_dtype": dtype_name,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": spec.vocab_size,
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


FAMILY = Family("qwen3", (_DENSE, _MOE), _FLAVORS, _from_hf_config, _to_hf_config, _RULES)
