"""From a meta model to one that runs on a mesh, in the order that composes: sequences, experts, heads and
hidden units, compilation, recomputation, shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from titanmoe.config.sections.machine import ActivationCheckpoint
from titanmoe.models.decoder import Decoder, Part
from titanmoe.parallel.activation_checkpoint import apply_activation_checkpoint
from titanmoe.parallel.compile import compile_layers
from titanmoe.parallel.context import apply_context_parallel, share_sequence_statistics
from titanmoe.parallel.expert import apply_expert_parallel
from titanmoe.parallel.fsdp import Reshard, apply_fsdp
from titanmoe.parallel.limits import check_products_can_be_split, check_stored_can_be_split
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
    recompute: ActivationCheckpoint | None = None,
    compile_backend: str | None = None,
    cpu_offload: bool = False,
    parts: Sequence[Part] = (),
) -> list[Decoder]:
    """Apply everything in place. The model's parameters are still on the meta device afterwards.

    A single process needs no sharding, and gets none, unless its parameters are computed with in another dtype, or
    several microbatches (`accumulates`) are to be summed in another one, or its parameters are in host memory.

    Returns:
        What is to be called: the model; or a model for each of its `parts`, which are stages of a pipeline.
    """
    check_stored_can_be_split(model, mesh.degrees)
    if mesh.degrees.cp > 1:
        apply_context_parallel(model, mesh.context)
    if mesh.degrees.cp * mesh.degrees.tp > 1:
        share_sequence_statistics(model, mesh.parts)
    if mesh.degrees.ep * mesh.degrees.etp > 1:
        apply_expert_parallel(model, mesh.expert)
    if mesh.degrees.tp > 1:
        apply_tensor_parallel(model, mesh.tensor)
    check_products_can_be_split(model)
    models = [model.view(part) for part in parts] or [model]
    if compile_backend is not None:
        compile_layers(model.blocks(), compile_backend)
    if recompute is not None:
        apply_activation_checkpoint(
            model,
            mode=recompute.mode,
            option=recompute.selective_ac_option,
            preserve_rng_state=recompute.preserve_rng_state,
            early_stop=recompute.early_stop,
            determinism_check=recompute.determinism_check,
            recomputed_products=recompute.per_op_sac_force_recompute_mm_shapes_by_fqns,
            memory_budget=recompute.memory_budget,
            is_compiled=compile_backend is not None,
        )
    stored_dtype = next(model.parameters()).dtype
    sums_differently = accumulates and reduce_dtype != stored_dtype
    if mesh.num_ranks > 1 or stored_dtype != param_dtype or sums_differently or cpu_offload:
        if parts and reshard_after_forward == "default":
            reshard_after_forward = "never"  # or every microbatch would gather all parameters
        for called in models:
            apply_fsdp(
                called,
                mesh,
                param_dtype=param_dtype,
                reduce_dtype=reduce_dtype,
                reshard_after_forward=reshard_after_forward,
                cpu_offload=cpu_offload,
            )
    return models
