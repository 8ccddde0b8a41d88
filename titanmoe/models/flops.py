"""Exact FLOPs of a `DecoderSpec`, by layer.

Only matrix products are counted: a product of (m, k) with (k, n) is 2*m*n*k FLOPs. Norms, activations, rotary
embeddings, softmax and the embedding's look-up are not. Per token of a sequence of S tokens, one forward is

    attention projections   2*D*(Hq + 2*Hk)*d + 2*Hq*d*D     grouped-query (Hq, Hk heads of d channels)
                            2*(weights of the projections)   latent
    attention core          S*Hq*(d + d_v)                   scores and values of d and d_v channels, see below
    dense feed-forward      6*D*F                            gate, up and down
    router                  2*D*E
    routed experts          6*D*F*K                          only the K experts a token chooses
    shared expert           6*D*F
    output projection       2*D*V

A causal query sees (S + 1)/2 keys on average; the core (2*keys*d for scores and 2*keys*d_v for values per head) is
counted with S/2 of them, half of the full square, which is what Megatron-LM and NVIDIA's published TFLOP/s use. With a
window of W < S it is counted with W - W^2/(2S) keys, in chunks of C < S with C/2. Masks between documents are not
subtracted.
"""

from __future__ import annotations

from titanmoe.models.spec import DecoderSpec, GroupedQuery, Latent, LayerSpec, MoE


def layer_flops(layer: LayerSpec, dim: int, seq_len: int) -> dict[str, int]:
    """Forward FLOPs per token of one layer, by product; the formulas are in the module's docstring."""
    attention, feed_forward = layer.attention, layer.feed_forward
    flops = {
        "attention_projections": 2 * projection_weights(attention, dim),
        "attention_core": _core_flops(attention, seq_len),
    }
    if isinstance(feed_forward, MoE):
        flops["router"] = 2 * dim * feed_forward.num_experts
        flops["experts"] = 6 * dim * feed_forward.hidden_dim * feed_forward.top_k
        if feed_forward.shared is not None:
            flops["shared_experts"] = 6 * dim * feed_forward.shared.hidden_dim
    else:
        flops["feed_forward"] = 6 * dim * feed_forward.hidden_dim
    return flops


def forward_flops_per_token(spec: DecoderSpec, seq_len: int) -> int:
    """Forward FLOPs per token of the whole model on sequences of `seq_len` tokens."""
    layers = sum(sum(layer_flops(layer, spec.dim, seq_len).values()) for layer in spec.layers)
    return layers + output_flops(spec)


def output_flops(spec: DecoderSpec) -> int:
    """Forward FLOPs per token of the output projection."""
    return 2 * spec.dim * spec.vocab_size


def projection_weights(attention: GroupedQuery | Latent, dim: int) -> int:
    """Weights of the projections: each is used once per token."""
    if isinstance(attention, GroupedQuery):
        return 2 * dim * (attention.num_heads + attention.num_kv_heads) * attention.head_dim
    query_dim, rank = attention.num_heads * attention.qk_head_dim, attention.q_lora_rank
    queries = dim * query_dim if rank is None else rank * (dim + query_dim)
    latent = dim * (attention.kv_lora_rank + attention.rope.dim)
    values_dim = attention.num_heads * attention.v_head_dim
    key_values = attention.kv_lora_rank * (attention.num_heads * attention.qk_nope_head_dim + values_dim)
    return queries + latent + key_values + values_dim * dim


def _core_flops(attention: GroupedQuery | Latent, seq_len: int) -> int:
    if isinstance(attention, Latent):
        return seq_len * attention.num_heads * (attention.qk_head_dim + attention.v_head_dim)
    span = min(seq_len, attention.chunk or seq_len)
    window = min(span, attention.window or span)
    # Twice the mean number of keys, so that it is whole for a full square.
    keys = 2 * window - window * window // span
    return keys * attention.num_heads * 2 * attention.head_dim
