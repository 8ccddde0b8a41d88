"""Llama 3 (arXiv 2407.21783) and other models of its architecture, Llama 2 among them.

The sizes are those of the published `config.json` files of Llama 3.1 and, for 1B and 3B, of Llama 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titanmoe.models.common_rules import DENSE, ENDS, GROUPED_QUERY, NORMS
from titanmoe.models.family import Family
from titanmoe.models.hf_config import HfConfig, decoder_entries
from titanmoe.models.spec import DecoderSpec, Dense, GroupedQuery, LayerSpec, Llama3Scaling, Rope

_ARCHITECTURE = "LlamaForCausalLM"


def _spec(
    dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    hidden_dim: int,
    *,
    rope_factor: float = 8.0,
    vocab_size: int = 128_256,
    tie_embeddings: bool = False,
) -> DecoderSpec:
    head_dim = dim // num_heads
    rope = Rope(head_dim, 5e5, Llama3Scaling(rope_factor, 1.0, 4.0, 8192))
    return DecoderSpec(
        dim=dim,
        vocab_size=vocab_size,
        layers=(LayerSpec(GroupedQuery(num_heads, num_kv_heads, head_dim, rope), Dense(hidden_dim)),) * num_layers,
        norm_eps=1e-5,
        tie_embeddings=tie_embeddings,
        max_seq_len=131_072,
        family="llama3",
    )


_FLAVORS = {
    # With the built-in tokenizer's vocabulary.
    "debugmodel": _spec(256, 6, 16, 16, 768, vocab_size=2048),
    "1B": _spec(2048, 16, 32, 8, 8192, rope_factor=32.0, tie_embeddings=True),
    "3B": _spec(3072, 28, 24, 8, 8192, rope_factor=32.0, tie_embeddings=True),
    "8B": _spec(4096, 32, 32, 8, 14_336),
    "70B": _spec(8192, 80, 64, 8, 28_672),
    "405B": _spec(16_384, 126, 128, 8, 53_248),
}


def _from_hf_config(values: Mapping[str, Any]) -> DecoderSpec:
    config = HfConfig(values)
    config.refuse_unsupported()
    config.require("mlp_bias", False, default=False)
    bias = config.flag("attention_bias")
    layer = LayerSpec(config.grouped_query(qkv_bias=bias, out_bias=bias), Dense(config.integer("intermediate_size")))
    return config.decoder("llama3", (layer,) * config.integer("num_hidden_layers"), default_max_seq_len=2048)


def _to_hf_config(spec: DecoderSpec, dtype_name: str) -> dict[str, Any]:
    attention, feed_forward = spec.layers[0].attention, spec.layers[0].feed_forward
    assert isinstance(attention, GroupedQuery) and isinstance(feed_forward, Dense)
    return decoder_entries(spec, _ARCHITECTURE, "llama", dtype_name) | {
        "attention_bias": attention.qkv_bias,
        "intermediate_size": feed_forward.hidden_dim,
        "mlp_bias": False,
    }


FAMILY = Family(
    "llama3",
    (_ARCHITECTURE,),
    _FLAVORS,
    _from_hf_config,
    _to_hf_config,
    (*ENDS, *NORMS, *GROUPED_QUERY, *DENSE),
    model_types=("llama",),
)
