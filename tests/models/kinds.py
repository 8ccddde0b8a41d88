"""Small Decoders of every kind of layer, for tests that hold whatever the layers are."""

from __future__ import annotations

from dataclasses import replace

from titanmoe.models.spec import (
    ClampedSwiGLU,
    DecoderSpec,
    Dense,
    GroupedQuery,
    Latent,
    LayerSpec,
    MoE,
    Rope,
    Router,
    Temperature,
    YarnScaling,
)

_ROPE = Rope(12, 1e4)
_PLAIN = GroupedQuery(4, 2, 12, _ROPE, qk_norm=True)
_SINKS = GroupedQuery(4, 2, 16, Rope(16, 1e4), qkv_bias=True, out_bias=True, sinks=True)
_WINDOW = GroupedQuery(4, 2, 16, Rope(16, 1e4), qkv_bias=True, out_bias=True, sinks=True, window=5)
_CHUNKS = GroupedQuery(4, 2, 12, Rope(12, 1e4, interleaved=True), qk_l2_norm=True, chunk=6)
_NO_ROPE = GroupedQuery(4, 2, 12, None, temperature=Temperature(4, 0.3))
_LATENT_ROPE = Rope(8, 1e4, YarnScaling(4.0, 16, mscale=1.0, mscale_all_dim=0.8), interleaved=True)
_LATENT = Latent(4, 20, 24, 10, 14, _LATENT_ROPE)
_DIRECT = Latent(4, None, 24, 10, 18, _LATENT_ROPE)
_GROUPS = MoE(12, 3, 24, Router("sigmoid", selection_bias=True, num_groups=4, top_groups=2), shared=Dense(16))
_BIASED = MoE(6, 2, 24, Router(gate_bias=True), bias=True, activation=ClampedSwiGLU(limit=0.5))
_ON_INPUT = MoE(6, 1, 24, Router("sigmoid", normalize=False, weight_on="input"), shared=Dense(24))
_WIDE = GroupedQuery(4, 2, 32, Rope(32, 1e4), qk_norm=True)
_WIDE_LATENT = Latent(4, 32, 32, 32, 32, Rope(32, 1e4))


def _spec(*layers: LayerSpec) -> DecoderSpec:
    return DecoderSpec(dim=40, vocab_size=100, layers=layers)  # shards of it are uneven


def deep(spec: DecoderSpec, num_layers: int, *, dense_first: bool = False) -> DecoderSpec:
    """The layers of `spec` by turns; or first those without experts, so that there are stages without any."""
    layers = [spec.layers[index % len(spec.layers)] for index in range(num_layers)]
    if dense_first:
        layers.sort(key=lambda layer: isinstance(layer.feed_forward, MoE))
    return replace(spec, layers=tuple(layers))


KINDS = {
    "dense": _spec(LayerSpec(_PLAIN, Dense(56)), LayerSpec(_PLAIN, Dense(32))),
    "grouped-query": _spec(
        LayerSpec(_PLAIN, Dense(56)), LayerSpec(_PLAIN, MoE(6, 2, 24, Router(normalize=True), shared=Dense(16)))
    ),
    "latent": _spec(LayerSpec(_LATENT, Dense(56)), LayerSpec(_DIRECT, _GROUPS)),
    "sinks and windows": _spec(LayerSpec(_WINDOW, _BIASED), LayerSpec(_SINKS, _BIASED)),
    "chunks and temperature": _spec(LayerSpec(_CHUNKS, _ON_INPUT), LayerSpec(_NO_ROPE, Dense(56))),
}

WIDE = replace(
    _spec(
        LayerSpec(_WIDE_LATENT, Dense(128)),
        LayerSpec(_WIDE, MoE(6, 2, 128, Router(normalize=True), shared=Dense(128))),
        LayerSpec(replace(_WIDE, qkv_bias=True, out_bias=True), replace(_BIASED, hidden_dim=128)),
        LayerSpec(_WIDE, replace(_ON_INPUT, hidden_dim=128, shared=Dense(128), bias=True)),
    ),
    dim=64,
)
"""Every number of features is a multiple of 32, as MX asks for, even where four ranks share heads and hidden units."""
