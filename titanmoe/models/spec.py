"""What a model is, as data.

A `DecoderSpec` is all that the rest of the package knows about an architecture: the Decoder is built from it,
FLOPs and memory are counted from it, and a family's only job is to produce one from a flavor or a `config.json`.
No torch here: specs are compared, hashed and printed freely.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding over the first `dim` channels of a head (Su et al., arXiv 2104.09864).

    Channel i rotates with channel i + dim/2 (the half-split convention of Hugging Face checkpoints).
    """

    dim: int
    theta: float


@dataclass(frozen=True)
class GroupedQuery:
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over head_dim on queries and keys, before RoPE."""


@dataclass(frozen=True)
class Dense:
    """A SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    hidden_dim: int


@dataclass(frozen=True)
class Router:
    """How tokens choose experts. Scores are computed in float32 whatever the model's dtype."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    """Divide the chosen weights by their sum."""
    scale: float = 1.0
    """Multiply the chosen weights, after normalisation."""
    selection_bias: bool = False
    """A float32 bias per expert that is added to the scores for choosing only (arXiv 2408.15664)."""


@dataclass(frozen=True)
class MoE:
    """A routed mixture of SwiGLU experts, optionally beside an always-on shared one."""

    num_experts: int
    top_k: int
    hidden_dim: int
    router: Router = Router()
    shared: Dense | None = None


@dataclass(frozen=True)
class LayerSpec:
    attention: GroupedQuery
    feed_forward: Dense | MoE


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only transformer with pre-norm residual layers."""

    dim: int
    vocab_size: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    """The output projection reuses `tok_embeddings.weight`; the model then has no `output.weight`."""
    max_seq_len: int = 4096
    """Longest sequence the weights were made for. Not a limit of the code."""


def with_selection_bias(spec: DecoderSpec) -> DecoderSpec:
    """The same model with a selection bias in every router."""

    def biased(layer: LayerSpec) -> LayerSpec:
        moe = layer.feed_forward
        if not isinstance(moe, MoE):
            return layer
        return replace(layer, feed_forward=replace(moe, router=replace(moe.router, selection_bias=True)))

    return replace(spec, layers=tuple(biased(layer) for layer in spec.layers))
