"""Where gradients of activations are computed if some of a model is frozen: behind the first thing that learns."""

from __future__ import annotations

from typing import NamedTuple

from titanmoe.models.decoder import Decoder


class Flow(NamedTuple):
    """Whether gradients are computed at the places of a layer, in the order of its forward pass.

    Attributes:
        attention: what goes into the attention's first projections.
        latents: what comes out of them; with latent attention it goes into others.
        heads: queries, keys and values, and what `o_proj` multiplies.
        feed_forward: what goes into the feed-forward, router and experts.
        hidden: what the down projections multiply, those of routed and of shared experts taken as one.
        output: what comes out of the layer.
    """

    attention: bool
    latents: bool
    heads: bool
    feed_forward: bool
    hidden: bool
    output: bool


_BEFORE = (
    ("attention_norm",),
    ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj"),
    ("q_b_proj", "kv_b_proj", "q_norm", "k_norm", "q_a_norm", "kv_a_norm"),
    ("o_proj", "sinks", "ffn_norm"),
    ("gate", "up_proj"),
    ("down",),
)
"""How names begin of what is between each place and the one before it."""


def place_after(name: str) -> int:
    """The first place, as an index of Flow, that comes after a parameter of a layer."""
    segments = name.split(".")
    return next(place for place, starts in enumerate(_BEFORE) if any(part.startswith(starts) for part in segments))


def gradient_flow(model: Decoder) -> list[Flow]:
    """Of every layer of a whole model, which may be distributed."""
    embedding = model.tok_embeddings
    assert embedding is not None and model.norm is not None, "a whole model"
    learns, flows = embedding.weight.requires_grad, []
    for block in model.blocks():
        places = [place_after(name) for name, weight in block.named_parameters() if weight.requires_grad]
        first = min(places, default=len(_BEFORE))
        flows.append(Flow(*(learns or place >= first for place in range(len(_BEFORE)))))
        learns = flows[-1].output
    return flows
