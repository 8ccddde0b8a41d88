"""Activation checkpointing: forget what a block computed, and compute it again in backward.

The router's choice is always kept (the outputs of `aten.topk`), never recomputed: rounding may differ the second time,
and a token that went elsewhere would mix the gradients of two experts.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from titanmoe.models.decoder import Decoder

Mode = Literal["none", "full", "selective"]

_CHOICES = frozenset({torch.ops.aten.topk.default})

_PRODUCTS = _CHOICES | {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.titanmoe.rows_times_weights.default,
}
"""What selective checkpointing by op keeps: products and attention. Norms, activations and moves are recomputed."""


_MARKS = (
    torch.ops.profiler._record_function_enter_new.default,
    torch.ops.profiler._record_function_exit._RecordFunction,
)
"""What FSDP puts around the gathering of its parameters. That of experts is inside a block, and is not the same the
second time; with these two ignored, selective checkpointing does not mind."""


def recomputed_blocks(num_layers: int, mode: Mode, option: str) -> list[bool]:
    """Which blocks are recomputed whole: all ("full"), every n-th ("selective" with option n), or none."""
    if mode == "full":
        return [True] * num_layers
    if mode == "selective" and option != "op":
        return [(index + 1) % int(option) == 0 for index in range(num_layers)]
    return [False] * num_layers


def apply_activation_checkpoint(
    model: Decoder, *, mode: Mode, option: str = "op", preserve_rng_state: bool = True, early_stop: bool = True
) -> None:
    """Wrap the forward of the blocks that `mode` asks for. Names of modules and parameters do not change."""
    if mode == "none":
        return
    SAC_IGNORED_OPS.update(_MARKS)
    whole = recomputed_blocks(len(model.layers), mode, option)
    for block, is_whole in zip(model.layers.values(), whole, strict=True):
        if is_whole or option == "op":
            kept = _CHOICES if is_whole else _PRODUCTS
            block.forward = functools.partial(
                checkpoint,
                block.forward,
                use_reentrant=False,
                context_fn=functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, kept)),
                preserve_rng_state=preserve_rng_state,
                early_stop=early_stop,
            )


def _policy(kept: frozenset, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE
