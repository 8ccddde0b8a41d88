"""What a model is, as data.

A `DecoderSpec` is all that the rest of the package knows about an architecture: the Decoder is built from it,
FLOPs and memory are counted from it, and a family's only job is to produce one from a flavor or a `config.json`.
No torch here: specs are compared, hashed and printed freely.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al., arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: low frequencies divided by `factor`, high ones kept, a ramp between (arXiv 2407.21783).

    The bounds are `original_max_seq_len` divided by `low_freq_factor` and by `high_freq_factor`, as wavelengths.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: frequencies interpolated by their number of turns, and larger logits (Peng et al., arXiv 2309.00071)."""

    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0
    """Channels that turn more often than this over the original length keep their frequency."""
    beta_slow: float = 1.0
    """Channels that turn less often than this are divided by `factor`."""
    truncate: bool = True
    """Round the bounds between the three kinds of channels to whole channels."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    """DeepSeek's refinement: with both, cos and sin grow by mscale(`mscale`) / mscale(`mscale_all_dim`) and latent
    attention's logits by mscale(`mscale_all_dim`) squared, where mscale(m) = 0.1 m ln(factor) + 1."""
    attention_factor: float | None = None
    """What cos and sin are multiplied with, in place of what follows from the above."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding over the first `dim` channels of a head (Su et al., arXiv 2104.09864)."""

    dim: int
    theta: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None
    interleaved: bool = False
    """Channel 2i rotates with channel 2i + 1, instead of i with i + dim/2 (what most Hugging Face checkpoints use)."""


@dataclass(frozen=True)
class Temperature:
    """Queries grow with the position p in the document: times 1 + scale ln(1 + floor((p + 1) / length)).

    Nakanishi, arXiv 2501.19399, as Llama 4 applies it to layers without RoPE.
    """

    length: int
    scale: float


@dataclass(frozen=True)
class GroupedQuery:
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over head_dim on queries and keys, before RoPE."""
    qk_l2_norm: bool = False
    """RMSNorm without a weight over head_dim on queries and keys, after RoPE."""
    sinks: bool = False
    """A learned logit per head that takes its share of the softmax and has no value (gpt-oss)."""
    window: int | None = None
    """A token sees itself and the `window` - 1 tokens before it."""
    chunk: int | None = None
    """Documents are cut into chunks of this many tokens, and a token sees only its own chunk."""
    temperature: Temperature | None = None


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from a low-rank latent.

    A head's query and key have `qk_nope_head_dim` channels without position and `rope.dim` with; the latter part of
    the key is shared by all heads.
    """

    num_heads: int
    q_lora_rank: int | None
    """None: queries come straight from the model dim."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    rope: Rope
    bias: bool = False
    """On the projections from and to the model dim, but for `q_proj`."""
    norm_eps: float = 1e-6
    """Of the norms on the latents, whatever the model's other norms use."""

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.rope.dim


@dataclass(frozen=True)
class Dense:
    """A SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    hidden_dim: int


@dataclass(frozen=True)
class ClampedSwiGLU:
    """gpt-oss's activation: (clamp(up) + 1) * g * sigmoid(alpha * g) with g = min(gate, limit), |up| <= limit."""

    limit: float = 7.0
    alpha: float = 1.702


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
    gate_bias: bool = False
    """A bias on the projection that gives the scores."""
    num_groups: int = 1
    top_groups: int = 1
    """Experts are in `num_groups` groups of neighbours; a token chooses among the best `top_groups` groups."""
    group_score: Literal["top2", "max"] = "top2"
    """A group is as good as the sum of its two best scores (DeepSeek-V3), or as its best one (DeepSeek-V2)."""
    weight_on: Literal["output", "input"] = "output"
    """What the chosen weight multiplies: the expert's output, or its input (Llama 4)."""


@dataclass(frozen=True)
class MoE:
    """A routed mixture of SwiGLU experts, optionally beside an always-on shared one."""

    num_experts: int
    top_k: int
    hidden_dim: int
    router: Router = Router()
    shared: Dense | None = None
    bias: bool = False
    """A bias per expert on all three projections."""
    activation: ClampedSwiGLU | None = None
    """In place of SwiGLU."""


@dataclass(frozen=True)
class LayerSpec:
    attention: GroupedQuery | Latent
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
    family: str = ""
    """Whose names and `config.json` its checkpoints use; "" if it belongs to none."""


def with_selection_bias(spec: DecoderSpec) -> DecoderSpec:
    """The same model with a selection bias in every router."""

    def biased(layer: LayerSpec) -> LayerSpec:
        moe = layer.feed_forward
        if not isinstance(moe, MoE):
            return layer
        return replace(layer, feed_forward=replace(moe, router=replace(moe.router, selection_bias=True)))

    return replace(spec, layers=tuple(biased(layer) for layer in spec.layers))


def num_experts(spec: DecoderSpec) -> set[int]:
    """Every number of experts that a layer of the model has; empty for a dense model."""
    return {layer.feed_forward.num_experts for layer in spec.layers if isinstance(layer.feed_forward, MoE)}


def num_heads(spec: DecoderSpec) -> set[int]:
    """Every number of query heads that a layer of the model has."""
    return {layer.attention.num_heads for layer in spec.layers}
