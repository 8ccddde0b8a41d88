"""Tiny models of every family, as transformers' config classes take them: family -> variant -> (model_type, options).

A variant is there for an option that changes what is computed or how it is stored. In each, no two sizes that could be
confused are equal, and a window or chunk is a good deal shorter than the sequences of `tests.parity.compare`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import tests.models
from titanmoe.models.family import FAMILIES

Variants = Mapping[str, tuple[str, Mapping[str, Any]]]

_DENSE: dict[str, Any] = {
    # head_dim is not hidden_size / num_attention_heads.
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_MOE: dict[str, Any] = {
    **_DENSE,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}

_QWEN3: Variants = {
    "moe": ("qwen3_moe", _MOE),
    "moe_not_normalised_tied": ("qwen3_moe", {**_MOE, "norm_topk_prob": False, "tie_word_embeddings": True}),
    "moe_with_dense_layers_and_bias": (
        "qwen3_moe",
        {
            **_MOE,
            "num_hidden_layers": 5,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "dense": ("qwen3", {**_DENSE, "attention_bias": True}),
    "dense_tied": ("qwen3", {**_DENSE, "tie_word_embeddings": True}),
}


def _merged(*sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Variants]:
    """All variants of each family; the model type may stand beside the options or among them."""
    merged: dict[str, dict[str, tuple[str, Mapping[str, Any]]]] = {}
    for family, variants in chain.from_iterable(source.items() for source in sources):
        for name, variant in variants.items():
            if isinstance(variant, Mapping):
                variant = (variant["model_type"], {key: variant[key] for key in variant.keys() - {"model_type"}})
            assert name not in merged.setdefault(family, {}), f"{family} has two variants {name}"
            merged[family][name] = variant
    return {family: merged[family] for family in FAMILIES if family in merged}


def _found() -> Iterator[Mapping[str, Mapping[str, Any]]]:
    """VARIANTS of every file tests/models/tiny_configs_*.py."""
    for file in sorted(Path(tests.models.__path__[0]).glob("tiny_configs_*.py")):
        yield importlib.import_module(f"tests.models.{file.stem}").VARIANTS


VARIANTS = _merged({"qwen3": _QWEN3}, *_found())
