"""From a meta model to one that runs on a mesh, in the order that composes: recomputation, compilation, sequences,
experts, heads and hidden units, shards."""

from __future__ import annotations

import torch

from titanmoe.models.decoder import Decoder
from titanmoe.parallel.activation_checkpoint import Mode, apply_activation_checkpoint
from titanmoe.parallel.context import apply_context_parallel, share_sequence_statistics
from titanmoe.parallel.expert import apply_expert_parallel
from titanmoe.parallel.fsdp import Reshard, apply_fsdp
from titanmoe.parallel.mesh import Mesh
from titanmoe.parallel.tensor import apply_tensor_parallel


def parallelize(
    model: Decoder,
    mesh: Mesh,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    accumulates: bool = False,
    reshard_after_forward: Reshard = "default",
    checkpoint_mode: Mode = "none",
    checkpoint_option: str = "op",
    checkpoint_early_stop: bool = True,
    preserve_rng_state: bool = True,
    compile_backend: str | None = None,
) -> None:
    """Apply everything in place. The model's parameters are still on the meta device afterwards.

    A single process needs no sharding, and gets none, unless its parameters are computed with in another dtype, or
    several microbatches (`accumulates`) are to be summed in another one.
    """
    apply_activation_checkpoint(
        model,
        mode=checkpoint_mode,
        option=checkpoint_option,
        preserve_rng_state=preserve_rng_state,
        early_stop=checkpoint_early_stop,
    )
    if compile_backend is not None:
        for block in model.layers.values():
            block.compile(backend=compile_backend)
    if mesh.degrees.cp > 1:
        apply_context_parallel(model, mesh.context)
    if mesh.degrees.cp * mesh.degrees.tp > 1:
        share_sequence_statistics(model, mesh.parts)
    if mesh.degrees.ep * mesh.degrees.etp > 1:
        apply_expert_parallel(model, mesh.expert)
    if mesh.degrees.tp > 1:
        apply_tensor_parallel(model, mesh.tensor)
    stored_dtype = next(model.parameters()).dtype
    sums_differently = accumulates and reduce_dtype != stored_dtype
    if mesh.num_ranks > 1 or stored_dtype != param_dtype or sums_differently:
        apply_fsdp(
            model,
            mesh,
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            reshard_after_forward=reshard_after_forward,
        )
