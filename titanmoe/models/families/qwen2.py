"""Qwen2 and Qwen2.5 (arXiv 2412.15115), dense; the sizes are those of Qwen2.5-Instruct's `config.json` files.

The base models of 14B and more have the same sizes and a `rms_norm_eps` of 1e-5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from titanmoe.models.common_rules import DENSE, ENDS, GROUPED_QUERY, NORMS
from titanmoe.models.family import Family
from titanmoe.models.hf_config import HfConfig, decoder_entries, window_entries
from titanmoe.models.spec import DecoderSpec, Dense, GroupedQuery, LayerSpec, Rope

_ARCHITECTURE = "Qwen2ForCausalLM"


def _spec(
    dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    hidden_dim: int,
    *,
    vocab_size: int = 152_064,
    tie_embeddings: bool = False,
) -> DecoderSpec:
    head_dim = dim // num_heads
    attention = GroupedQuery(num_heads, num_kv_heads, head_dim, Rope(head_dim, 1e6), qkv_bias=True)
    return DecoderSpec(
        dim=dim,
        vocab_size=vocab_size,
        layers=(LayerSpec(attention, Dense(hidden_dim)),) * num_layers,
        tie_embeddings=tie_embeddings,
        max_seq_len=32_768,
        family="qwen2",
    )


_FLAVORS = {
    # With the built-in tokenizer's vocabulary.
    "debugmodel": _spec(256, 4, 4, 2, 768, vocab_size=2048),
    "0.5B": _spec(896, 24, 14, 2, 4864, vocab_size=151_936, tie_embeddings=True),
    "1.5B": _spec(1536, 28, 12, 2, 8960, vocab_size=151_936, tie_embeddings=True),
    "3B": _spec(2048, 36, 16, 2, 11_008, vocab_size=151_936, tie_embeddings=True),
    "7B": _spec(3584, 28, 28, 4, 18_944),
    "14B": _spec(5120, 48, 40, 8, 13_824),
    "32B": _spec(5120, 64, 40, 8, 27_648),
    "72B": _spec(8192, 80, 64, 8, 29_568),
}


def _from_hf_config(values: Mapping[str, Any]) -> DecoderSpec:
    config = HfConfig(values)
    config.refuse_unsupported()
    attention, feed_forward = config.grouped_query(qkv_bias=True), Dense(config.integer("intermediate_size"))
    windows = config.layers_with_window(config.integer("num_hidden_layers"))
    layers = (LayerSpec(replace(attention, window=window), feed_forward) for window in windows)
    return config.decoder("qwen2", layers, default_max_seq_len=32_768)


def _to_hf_config(spec: DecoderSpec, dtype_name: str) -> dict[str, Any]:
    feed_forward = spec.layers[0].feed_forward
    assert isinstance(feed_forward, Dense)
    return {
        **decoder_entries(spec, _ARCHITECTURE, "qwen2", dtype_name),
        "intermediate_size": feed_forward.hidden_dim,
        **window_entries(spec),
    }


FAMILY = Family(
    "qwen2",
    (_ARCHITECTURE,),
    _FLAVORS,
    _from_hf_config,
    _to_hf_config,
    (*ENDS, *NORMS, *GROUPED_QUERY, *DENSE),
    model_types=("qwen2",),
)
