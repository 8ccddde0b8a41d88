"""Small models with values, to be saved and loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from titanmoe.models.build import build_model, init_weights, materialize
from titanmoe.models.decoder import Decoder
from titanmoe.models.spec import DecoderSpec, Dense, GroupedQuery, LayerSpec, MoE, Rope

ATTENTION = GroupedQuery(4, 2, 16, Rope(16, 1e4), qk_norm=True)
SPEC = DecoderSpec(
    dim=48,
    vocab_size=97,
    layers=(LayerSpec(ATTENTION, MoE(6, 2, 40)), LayerSpec(ATTENTION, Dense(56))),
    max_seq_len=64,
    family="qwen3",
)
# Several blocks along each side, some of them partial.
WIDE = DecoderSpec(
    dim=200,
    vocab_size=97,
    layers=(LayerSpec(ATTENTION, MoE(3, 2, 136)), LayerSpec(ATTENTION, Dense(300))),
    max_seq_len=64,
    family="qwen3",
)


def build(spec: DecoderSpec = SPEC, dtype: torch.dtype = torch.float32) -> Decoder:
    model = materialize(build_model(spec, dtype=dtype), "cpu")
    init_weights(model, seed=3)
    return model


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}
